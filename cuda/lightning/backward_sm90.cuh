#pragma once
#include "lightning/backward_sm90.h"
#include "lightning/forward_sm90.cuh"

// Gradients of k and v in f16 or bf16, by chunks of m = 64 tokens from the last to the first. Keys
// are rows and queries columns, so that no tile has to be turned around:
//
//   dV = P dO + lambda^(m - 1 - j) K R       where P = scale lambda^(i - j) K[j,:] . Q[i,:]
//   dK = P Q + lambda^(m - 1 - j) V R^T      where P = scale lambda^(i - j) V[j,:] . dO[i,:]
//   R  = lambda^m R + (scale lambda^(i + 1) Q[i,:])^T dO
//
// P is 0 where j > i, and R is that behind the chunk until it is updated.
//
// A CTA owns one head of the output and a segment of a sequence. Warpgroup 0 loads q, dout, k and v
// of a chunk at a time into a ring. Warpgroup 1 makes dV and warpgroup 2 dK. Each also holds 64
// rows of R in f32 registers, or the first all of 64. They leave its image in 16 bits in shared
// memory, which serves both: K R reads it along its rows, V R^T along its columns. A gradient is
// staged where the K or V that it belongs to was, so those are given back a chunk later than q and
// dout.
namespace heddle {
namespace {

constexpr int kSweepThreads = 384, kSweepers = 256;

template <int kSize> struct SweepSmem {
  static constexpr int kStages = kSize == 64 ? 6 : 3;
  using Rows = sm90::Tile<kChunk, kSize>;
  Rows q[kStages], dout[kStages], k[kStages], v[kStages];
  sm90::Tile<kSize, kSize> image;
  float decay[2 * kChunk];   // scale lambda^(i - 63), 0 for i < 63
  float2 reach[kChunk / 2];  // scale lambda^(i + 1), of two tokens each
  float lowered;             // 1 / lift_of
  float keep[2];  // what R decays by in the first chunk that is visited, and in all others
  sm90::Barrier full[kStages], empty_q[kStages], empty_k[kStages];
};

struct SweepArgs : ScanArgs {
  void *dk, *dv;
};

// What a warpgroup does: `own` meets `other` in P and R, whose product meets `weighted`
template <DType kType, int kSize, bool kPrecise, bool kKeys>
__device__ __forceinline__ void sweep(SweepSmem<kSize>& smem, const sm90::TensorMap& gmem_to,
                                      const SweepArgs& args, const ScanPlace& place, int head,
                                      float slope) {
  using namespace sm90;
  using Rows = typename SweepSmem<kSize>::Rows;
  constexpr int kStages = SweepSmem<kSize>::kStages;
  // named barriers: the image holds R behind this chunk; it has been read; a gradient is written;
  // rows behind the end are cleared
  // two each: a barrier that both warpgroups waited at, each in its own code, looks like divergence
  constexpr int kImageFull = 1, kImageEmpty = 3, kCleared = 5, kWritten = 7 + kKeys;
  const auto meet = [](int barrier) {
    named_barrier_arrive(barrier + !kKeys, kSweepers);
    named_barrier_sync(barrier + kKeys, kSweepers);
  };
  constexpr bool kCarries = !kKeys || kSize == 128;
  constexpr int kRow0 = kKeys ? 64 : 0;  // of R
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int row = warp * 16 + lane / 4;  // and row + 8, of accumulators
  const int chunks = (place.length + kChunk - 1) / kChunk;
  const float slope_log2 = slope * 1.44269504f;
  const int size = kKeys ? args.d : args.e;  // of a row of the gradient

  CarriedState<kType, 1, kSize, kPrecise> carry;
  const auto each = [&](const auto& body) {
    carry.each(kRow0 + warp * 16, lane, [&](float& number, int i, int f) {
      if (i < args.d && f < args.e) body(number, i, f);
    });
  };
  // from shared memory each time: there is no register left to keep it
  const auto lowered = [&] { return kLifts<kType, kPrecise> ? smem.lowered : 1; };
  if constexpr (kCarries) {
    carry.each(0, lane, [](float& number, int, int) { number = 0; });
    // heads that share a state have its gradient once
    if (args.initial_state && head % args.share_state == 0) {
      const float* from = args.initial_state + place.sequence * args.initial_strides[0] +
                          head / args.share_state * args.initial_strides[1];
      const float lift = lift_of<kType, kPrecise>(slope_log2);
      each([&](float& number, int i, int f) {
        number = lift * from[i * args.initial_strides[2] + f * args.initial_strides[3]];
      });
    }
    const int last = max((place.sequence_length - 1) / args.segment, 0);
    if (place.segment < last) await_previous();  // which made the summaries
    for (int segment = last; segment > place.segment; --segment) {
      const int tokens = min(args.segment, place.sequence_length - segment * args.segment);
      const int64_t slot = place.slot + (segment - place.segment) * place.distance;
      carry.add_summary(args.summaries + (slot * args.heads + head) * (kSize * kSize) +
                            kRow0 * kSize + thread * 4,
                        static_cast<float>(exp(-static_cast<double>(slope) * tokens)));
    }
  }
  const auto write_image = [&] {
    if constexpr (kCarries) {
      store_rows<kType>(smem.image, kRow0, carry.acc[0], warp, lane, lowered());
      fence_async_smem();
    }
  };
  write_image();

#pragma unroll 1
  for (int visit = 0; visit < chunks; ++visit) {
    const Turn<kStages> turn(visit);
    const int chunk = chunks - 1 - visit, token = place.begin + chunk * kChunk;
    const int tokens = min(kChunk, place.length - chunk * kChunk);
    const Rows &q = smem.q[turn.stage], &dout = smem.dout[turn.stage];
    Rows& own = kKeys ? smem.v[turn.stage] : smem.k[turn.stage];
    const Rows &other = kKeys ? dout : q, &weighted = kKeys ? q : dout;
    // behind the end of a packed sequence the next one begins
    const bool clears = args.cu_seqlens && tokens < kChunk;
    float acc_p[kChunk / 2], acc_o[kSize / 2];
    uint32_t frag_p[4][4];

    smem.full[turn.stage].wait(turn.parity);
    if (clears) {
      clear_rows(own, tokens, thread, 128);
      clear_rows(other, tokens, thread, 128);
      fence_async_smem();
      meet(kCleared);
    }
    if constexpr (kCarries) {
      carry.load_keys(keys_address(q, kRow0 + warp * 16, lane));
      carry.decay_keys([&](int step, int i) { return smem.reach[8 * step + 4 * i + lane % 4]; });
      carry.scale(smem.keep[visit > 0]);
    }
    wgmma_fence(acc_p);
#pragma unroll
    for (int i = 0; i < kSize; i += 16)
      wgmma<kType, Major::kK>(acc_p, own.k_major(0, i), other.k_major(0, i), i > 0);
    wgmma_commit();
    if constexpr (kCarries) carry.issue_update(dout);
    meet(kImageFull);
    wgmma_fence(acc_o);
#pragma unroll
    for (int i = 0; i < kSize; i += 16)
      if constexpr (kKeys)
        wgmma<kType, Major::kK>(acc_o, own.k_major(0, i), smem.image.k_major(0, i), i > 0);
      else
        wgmma<kType, Major::kMN>(acc_o, own.k_major(0, i), smem.image.mn_major(i), i > 0);
    wgmma_commit();
    wgmma_wait<kCarries ? 2 : 1>(acc_p);
#pragma unroll
    for (int i = 0; i < kChunk / 4; ++i) {
      // columns are later than rows where the entry is not 0
      const float* decay = smem.decay + 63 - row - i % 2 * 8 + i / 2 * 8 + lane % 4 * 2;
      frag_p[i / 4][i % 4] = pack<kType>(acc_p[2 * i] * decay[0], acc_p[2 * i + 1] * decay[1]);
    }
    // the gradient of the chunk before has left its tile
    if (thread == 0 && visit > 0) {
      wait_copies_read<0>();
      smem.empty_k[Turn<kStages>(visit - 1).stage].arrive();
    }
    __syncwarp();
    if constexpr (kCarries) wgmma_wait<0>(carry.acc[0]);
    wgmma_wait<0>(acc_o);
    // rows behind the end are not stored
    const auto carried = [&](int r) {
      return exp2_approx(-slope_log2 * static_cast<float>(max(tokens - 1 - r, 0)));
    };
    const float factors[2] = {carried(row), carried(row + 8)};
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) acc_o[i] *= factors[i / 2 % 2];
    wgmma_fence(acc_o);
#pragma unroll
    for (int i = 0; i < kChunk; i += 16)
      wgmma<kType, Major::kMN>(acc_o, frag_p[i / 16], weighted.mn_major(i), true);
    wgmma_commit();
    // and everybody has read `own`, which acc_o goes to
    meet(kImageEmpty);
    write_image();
    wgmma_wait<0>(acc_o);
    if (lane == 0) smem.empty_q[turn.stage].arrive();

    void* const to = kKeys ? args.dk : args.dv;
    const auto at = [&](int r) {
      return ((static_cast<int64_t>(place.batch) * args.tokens + token + r) * args.heads + head) *
             size;
    };
    if (args.share_k > 1) {
#pragma unroll
      for (int i = 0; i < kSize / 2; i += 2) {
        const int r = row + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
        if (r < tokens && column < size)
          *reinterpret_cast<float2*>(static_cast<float*>(to) + at(r) + column) =
              float2{acc_o[i], acc_o[i + 1]};
      }
      continue;
    }
    store_rows<kType>(own, 0, acc_o, warp, lane);
    fence_async_smem();
    named_barrier_sync(kWritten, 128);
    if (clears) {
      for (int i = thread; i < tokens * kSize / 8; i += 128) {
        const int r = i / (kSize / 8), column = i % (kSize / 8) * 8;
        if (column < size)
          copy_16_bytes(static_cast<uint16_t*>(to) + at(r) + column, own.address(r, column));
      }
    } else if (thread == 0) {
      for (int column = 0; column < kSize; column += 64)
        copy_to_gmem(gmem_to, own.panel(column), column, token, head, place.batch);
      commit_copies();
    }
    __syncwarp();
  }
  if constexpr (kCarries)
    if (args.state && place.segment == 0) {
      float* state =
          args.state + (static_cast<int64_t>(place.sequence) * args.heads + head) * args.d * args.e;
      each([&](float number, int i, int f) { state[i * args.e + f] = number * lowered(); });
    }
  // shared memory must outlive the copies that read it
  if (thread == 0) wait_copies_read<0>();
  await_previous();  // what runs behind this kernel waits for it alone
}

template <DType kType, int kSize, bool kPrecise>
__global__ void __launch_bounds__(kSweepThreads, 1)
    lightning_backward_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_q,
                                   const __grid_constant__ sm90::TensorMap gmem_k,
                                   const __grid_constant__ sm90::TensorMap gmem_v,
                                   const __grid_constant__ sm90::TensorMap gmem_dout,
                                   const __grid_constant__ sm90::TensorMap gmem_dk,
                                   const __grid_constant__ sm90::TensorMap gmem_dv,
                                   const SweepArgs args) {
  using namespace sm90;
  constexpr int kStages = SweepSmem<kSize>::kStages;
  auto& smem = shared_memory<SweepSmem<kSize>>();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int head = blockIdx.x % args.heads;
  const ScanPlace place = place_of(args, blockIdx.x / args.heads);
  if (place.slot < 0) return;

  const float slope = args.slopes[head / args.share_state * args.slopes_stride];
  if (threadIdx.x == 0) {
    if (!(slope >= 0 && slope < INFINITY)) *args.fault = 1;
    for (int stage = 0; stage < kStages; ++stage) {
      smem.full[stage].init(1);
      smem.empty_q[stage].init(kSweepers / 32);
      smem.empty_k[stage].init(2);
    }
    fence_barrier_init();
    const int tail = place.length % kChunk;
    smem.keep[0] =
        static_cast<float>(exp(-static_cast<double>(slope) * (tail != 0 ? tail : kChunk)));
    smem.lowered = 1 / lift_of<kType, kPrecise>(slope * 1.44269504f);
    smem.keep[1] = static_cast<float>(exp(-static_cast<double>(slope) * kChunk));
  }
  const auto power = [&](int tokens) {
    return args.scale * exp2_approx(-slope * 1.44269504f * static_cast<float>(tokens));
  };
  if (threadIdx.x < 2 * kChunk) {
    const int i = threadIdx.x;
    smem.decay[i] = i < kChunk - 1 ? 0 : power(i - (kChunk - 1));
    const float lift = lift_of<kType, kPrecise>(slope * 1.44269504f);
    if (i < kChunk / 2) smem.reach[i] = float2{lift * power(2 * i + 1), lift * power(2 * i + 2)};
  }
  __syncthreads();

  if (warpgroup == 0) {
    lower_registers<24>();
    if (threadIdx.x < 32 && elect_one()) {
      prefetch(gmem_q);
      prefetch(gmem_k);
      prefetch(gmem_v);
      prefetch(gmem_dout);
      prefetch(gmem_dk);
      prefetch(gmem_dv);
      const int chunks = (place.length + kChunk - 1) / kChunk;
      for (int visit = 0; visit < chunks; ++visit) {
        const Turn<kStages> turn(visit);
        const int token = place.begin + (chunks - 1 - visit) * kChunk;
        Barrier& full = smem.full[turn.stage];
        const auto load = [&](auto& tile, const TensorMap& map, int of) {
          tile.load(map, full, token, of, place.batch, Keep::kNormal);
        };
        smem.empty_q[turn.stage].wait(turn.parity ^ 1);
        full.arrive_expect(4 * smem.q[0].kBytes);
        load(smem.q[turn.stage], gmem_q, head / args.share_q);
        load(smem.dout[turn.stage], gmem_dout, head);
        smem.empty_k[turn.stage].wait(turn.parity ^ 1);
        load(smem.k[turn.stage], gmem_k, head / args.share_k);
        load(smem.v[turn.stage], gmem_v, head / args.share_v);
      }
    }
    return;
  }
  raise_registers<240>();
  if (warpgroup == 1) {
    sweep<kType, kSize, kPrecise, false>(smem, gmem_dv, args, place, head, slope);
  } else {
    sweep<kType, kSize, kPrecise, true>(smem, gmem_dk, args, place, head, slope);
  }
}

template <DType kType, int kSize, bool kPrecise>
void launch_sweep(const SweepCall& call, const ScanPlan& plan, cudaStream_t stream) {
  SweepArgs args{scan_args(call, plan), call.dk, call.dv};
  const auto gmem_q = scan_map<kType>(call, call.q, call.d, call.hq, call.q_strides);
  const auto gmem_k = scan_map<kType>(call, call.k, call.d, call.hk, call.k_strides);
  const auto gmem_v = scan_map<kType>(call, call.v, call.e, call.hv, call.v_strides);
  const auto gmem_dout = scan_map<kType>(call, call.dout, call.e, call.heads, call.dout_strides);
  // not looked at where heads share keys
  const auto gradient = [&](const void* data, int64_t size) {
    const int64_t row = call.heads * size;
    return scan_map<kType>(call, data, size, call.heads, {call.s * row, row, size});
  };
  const auto gmem_dk = gradient(call.dk, call.d), gmem_dv = gradient(call.dv, call.e);
  if (plan.summed > 0) {
    ScanArgs summary = args;
    summary.share_k = args.share_q;
    summary.share_v = 1;
    launch<lightning_summary_sm90_kernel<kType, kSize, kSize, kPrecise, true>>(
        {static_cast<int>(call.heads * plan.summed), 128 + 128 * SummarySmem<kSize, kSize>::kGroups,
         sm90::shared_memory_bytes<SummarySmem<kSize, kSize>>(), stream, true},
        gmem_q, gmem_dout, summary);
  }
  launch<lightning_backward_sm90_kernel<kType, kSize, kPrecise>>(
      {static_cast<int>(call.heads * plan.slots), kSweepThreads,
       sm90::shared_memory_bytes<SweepSmem<kSize>>(), stream, true},
      gmem_q, gmem_k, gmem_v, gmem_dout, gmem_dk, gmem_dv, args);
}

}  // namespace

template <DType kType, int kSize>
void launch_sweep_sm90(const SweepCall& call, const ScanPlan& plan, cudaStream_t stream) {
  // a gradient that is handed on keeps its digits, which takes one product more
  call.state ? launch_sweep<kType, kSize, true>(call, plan, stream)
             : launch_sweep<kType, kSize, false>(call, plan, stream);
}

}  // namespace heddle
