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
// A CTA owns one head of the output and a segment of a sequence. A warp of warpgroup 0 loads q,
// dout, k and v of a chunk at a time into a ring. Warpgroup 1 makes dV and warpgroup 2 dK, with P
// of the next chunk behind the last product of this one. Warpgroup 3 holds R in f32 registers and
// leaves its image in 16 bits in shared memory, which serves both: K R reads it along its rows,
// V R^T along its columns. A gradient is staged where the K or V that it belongs to was, which the
// warp that copies it gives back.
namespace heddle {
namespace {

constexpr int kSweepThreads = 512, kSweepers = 384;
// named barriers: the image holds R behind this chunk; it has been read; rows behind the end are
// cleared, one for each warpgroup that waits; a gradient is staged, one for each
constexpr int kImageFull = 1, kImageEmpty = 2, kCleared = 3, kStaged = 6;

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
  sm90::Barrier written[2][kStages];  // dV and dK, where K and V were
};

struct SweepArgs : ScanArgs {
  void *dk, *dv;
};

// What a warpgroup of a gradient does: `own` meets `other` in P and R, whose product meets
// `weighted`
template <DType kType, int kSize, bool kKeys>
__device__ __forceinline__ void sweep(SweepSmem<kSize>& smem, const SweepArgs& args,
                                      const ScanPlace& place, int head, float slope) {
  using namespace sm90;
  using Rows = typename SweepSmem<kSize>::Rows;
  constexpr int kStages = SweepSmem<kSize>::kStages;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int row = warp * 16 + lane / 4;  // and row + 8, of accumulators
  const int chunks = (place.length + kChunk - 1) / kChunk, tail = place.length % kChunk;
  const float slope_log2 = in_log2(slope);
  const int size = kKeys ? args.d : args.e;  // of a row of the gradient
  // behind the end of a packed sequence the next one begins
  const bool clears = args.cu_seqlens && tail != 0;
  if (chunks == 0) return;

  float acc_p[kChunk / 2], acc_o[kSize / 2];
  uint32_t frag_p[4][4];
  const auto own_of = [&](uint32_t stage) -> Rows& {
    return kKeys ? smem.v[stage] : smem.k[stage];
  };
  const auto other_of = [&](uint32_t stage) -> Rows& {
    return kKeys ? smem.dout[stage] : smem.q[stage];
  };
  const auto is_late = [&](int visit) {
    const Turn<kStages> turn(visit);
    return __any_sync(~0u, !smem.full[turn.stage].has_ended(turn.parity)) != 0;
  };
  const auto release = [&](uint32_t stage) {
    if (lane == 0) smem.empty_q[stage].arrive();
  };
  const auto issue_scores = [&](int visit) {
    const Turn<kStages> turn(visit);
    smem.full[turn.stage].wait(turn.parity);
    const Rows &own = own_of(turn.stage), &other = other_of(turn.stage);
    if (clears && visit == 0) {
      clear_rows(other, tail, thread, 128);
      fence_async_smem();
      named_barrier_arrive(kCleared + !kKeys, 256);
      named_barrier_arrive(kCleared + 2, kSweepers);
      named_barrier_sync(kCleared + kKeys, 256);
    }
    wgmma_fence(acc_p);
#pragma unroll
    for (int i = 0; i < kSize; i += 16)
      wgmma<kType, Major::kK>(acc_p, own.k_major(0, i), other.k_major(0, i), i > 0);
    wgmma_commit();
  };
  const auto pack_scores = [&] {
    // columns are later than rows where the entry is not 0
    const float* decay = smem.decay + 63 - row + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kChunk / 4; ++i) {
      const int distance = (i / 2 - i % 2) * 8;
      frag_p[i / 4][i % 4] =
          pack<kType>(acc_p[2 * i] * decay[distance], acc_p[2 * i + 1] * decay[distance + 1]);
    }
  };
  const auto step = [&](int visit, bool more) {
    const Turn<kStages> turn(visit);
    const int chunk = chunks - 1 - visit, token = place.begin + chunk * kChunk;
    const int tokens = min(kChunk, place.length - chunk * kChunk);
    Rows& own = own_of(turn.stage);
    const Rows& weighted = kKeys ? smem.q[turn.stage] : smem.dout[turn.stage];
    // rows behind the end are not stored
    const auto carried = [&](int r) {
      return exp2_approx(-slope_log2 * static_cast<float>(max(tokens - 1 - r, 0)));
    };
    const float factors[2] = {carried(row), carried(row + 8)};
    named_barrier_sync(kImageFull, kSweepers);
    wgmma_fence(acc_o);
#pragma unroll
    for (int i = 0; i < kSize; i += 16)
      if constexpr (kKeys)
        wgmma<kType, Major::kK>(acc_o, own.k_major(0, i), smem.image.k_major(0, i), i > 0);
      else
        wgmma<kType, Major::kMN>(acc_o, own.k_major(0, i), smem.image.mn_major(i), i > 0);
    wgmma_commit();
    wgmma_wait<0>(acc_o);
    if (more) named_barrier_arrive(kImageEmpty, kSweepers);
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) acc_o[i] *= factors[i / 2 % 2];
    wgmma_fence(acc_o);
#pragma unroll
    for (int i = 0; i < kChunk; i += 16)
      wgmma<kType, Major::kMN>(acc_o, frag_p[i / 16], weighted.mn_major(i), true);
    wgmma_commit();
    // a chunk that is done makes room before the next one has come
    const bool late = more && is_late(visit + 1);
    if (late) {
      wgmma_wait<0>(acc_o);
      release(turn.stage);
    }
    if (more) {
      issue_scores(visit + 1);
      wgmma_wait<1>(acc_o);
    } else {
      wgmma_wait<0>(acc_o);
    }
    if (!late) release(turn.stage);

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
    } else {
      store_rows<kType>(own, 0, acc_o, warp, lane);
      fence_async_smem();
      if (clears && visit == 0) {
        named_barrier_sync(kStaged + kKeys, 128);
        for (int i = thread; i < tokens * kSize / 8; i += 128) {
          const int r = i / (kSize / 8), column = i % (kSize / 8) * 8;
          if (column < size)
            copy_16_bytes(static_cast<uint16_t*>(to) + at(r) + column, own.address(r, column));
        }
      }
    }
    __syncwarp();
    if (lane == 0) smem.written[kKeys][turn.stage].arrive();
    if (more) {
      wgmma_wait<0>(acc_p);
      pack_scores();
    }
  };
  issue_scores(0);
  wgmma_wait<0>(acc_p);
  pack_scores();
  int visit = 0;
#pragma unroll 1
  for (; visit + 1 < chunks; ++visit) step(visit, true);
  // apart, so that no product is issued under a condition
  step(visit, false);
}

// A warp that copies one gradient and gives its tile back
template <int kSize, bool kKeys>
__device__ __forceinline__ void store_gradient(SweepSmem<kSize>& smem,
                                               const sm90::TensorMap& gmem_to,
                                               const SweepArgs& args, const ScanPlace& place,
                                               int head) {
  using namespace sm90;
  const int chunks = (place.length + kChunk - 1) / kChunk;
  const bool clears = args.cu_seqlens && place.length % kChunk != 0, elected = elect_one();
  for (int visit = 0; visit < chunks; ++visit) {
    const Turn<SweepSmem<kSize>::kStages> turn(visit);
    const uint32_t stage = turn.stage;
    smem.written[kKeys][stage].wait(turn.parity);
    if (elected) {
      if (args.share_k == 1 && !(clears && visit == 0)) {
        auto& own = kKeys ? smem.v[stage] : smem.k[stage];
        for (int column = 0; column < kSize; column += 64)
          copy_to_gmem(gmem_to, own.panel(column), column,
                       place.begin + (chunks - 1 - visit) * kChunk, head, place.batch);
        commit_copies();
        // shared memory must outlive the copies that read it
        wait_copies_read<0>();
      }
      smem.empty_k[stage].arrive();
    }
    __syncwarp();
  }
}

// What the warpgroup that holds R does
template <DType kType, int kSize, bool kPrecise>
__device__ __forceinline__ void carry_back(SweepSmem<kSize>& smem, const SweepArgs& args,
                                           const ScanPlace& place, int head, float slope) {
  using namespace sm90;
  constexpr int kStages = SweepSmem<kSize>::kStages, kTiles = kSize / 64;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int chunks = (place.length + kChunk - 1) / kChunk;
  const bool clears = args.cu_seqlens && place.length % kChunk != 0;
  const bool wanted = args.state && place.segment == 0;

  CarriedState<kType, kSize, kPrecise> carry[kTiles];
  const auto each = [&](const auto& body) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      carry[tile].each(tile * 64 + warp * 16, lane, [&](float& number, int i, int f) {
        if (i < args.d && f < args.e) body(number, i, f);
      });
      // one after the other: there are no registers for the addresses of all
      pin(carry[tile].acc);
    }
  };
  // from shared memory each time: there is no register left to keep it
  const auto lowered = [&] { return kLifts<kType, kPrecise> ? smem.lowered : 1; };
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    carry[tile].each(0, lane, [](float& number, int, int) { number = 0; });
    pin(carry[tile].acc);  // not before there are registers for them
  }
  // heads that share a state have its gradient once
  if (args.initial_state && head % args.share_state == 0) {
    const float* from = args.initial_state + place.sequence * args.initial_strides[0] +
                        head / args.share_state * args.initial_strides[1];
    const float lift = lift_of<kType, kPrecise>(in_log2(slope));
    each([&](float& number, int i, int f) {
      number = lift * from[i * args.initial_strides[2] + f * args.initial_strides[3]];
    });
  }
  const int last = max((place.sequence_length - 1) / args.segment, 0);
  if (place.segment < last) await_previous();  // which made the summaries
  for (int segment = last; segment > place.segment; --segment) {
    const int tokens = min(args.segment, place.sequence_length - segment * args.segment);
    const int64_t slot = place.slot + (segment - place.segment) * place.distance;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      carry[tile].add_summary(args.summaries + (slot * args.heads + head) * (kSize * kSize) +
                                  tile * 64 * kSize + thread * 4,
                              static_cast<float>(exp(-static_cast<double>(slope) * tokens)));
      pin(carry[tile].acc);
    }
  }
  const auto write_image = [&] {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      store_rows<kType>(smem.image, tile * 64, carry[tile].acc, warp, lane, lowered());
    fence_async_smem();
    named_barrier_arrive(kImageFull, kSweepers);
  };
  if (chunks > 0) write_image();

#pragma unroll 1
  for (int visit = 0; visit < chunks; ++visit) {
    const bool more = visit + 1 < chunks;
    const Turn<kStages> turn(visit);
    smem.full[turn.stage].wait(turn.parity);
    if (clears && visit == 0) named_barrier_sync(kCleared + 2, kSweepers);
    if (!more && !wanted) break;  // nobody needs R before it
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      carry[tile].load(rows_address(smem.q[turn.stage], tile * 64 + warp * 16, lane));
      carry[tile].decay([&](int step, int i) { return smem.reach[8 * step + 4 * i + lane % 4]; });
      carry[tile].scale(smem.keep[visit > 0]);
      // there are registers for split queries of one tile
      if (kPrecise) {
        carry[tile].issue_update(smem.dout[turn.stage]);
        wgmma_wait<0>(carry[tile].acc);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles && !kPrecise; ++tile)
      carry[tile].issue_update(smem.dout[turn.stage]);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) wgmma_wait<0>(carry[tile].acc);
    if (lane == 0) smem.empty_q[turn.stage].arrive();
    if (more) {
      named_barrier_sync(kImageEmpty, kSweepers);
      write_image();
    }
  }
  if (wanted) {
    float* state =
        args.state + (static_cast<int64_t>(place.sequence) * args.heads + head) * args.d * args.e;
    each([&](float number, int i, int f) { state[i * args.e + f] = number * lowered(); });
  }
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
    if (bad_slope(slope)) *args.fault = 1;
    for (int stage = 0; stage < kStages; ++stage) {
      smem.full[stage].init(1);
      smem.empty_q[stage].init(kSweepers / 32);
      smem.empty_k[stage].init(2);
      for (int i = 0; i < 2; ++i) smem.written[i][stage].init(4);
    }
    fence_barrier_init();
    const int tail = place.length % kChunk;
    smem.keep[0] =
        static_cast<float>(exp(-static_cast<double>(slope) * (tail != 0 ? tail : kChunk)));
    smem.lowered = 1 / lift_of<kType, kPrecise>(in_log2(slope));
    smem.keep[1] = static_cast<float>(exp(-static_cast<double>(slope) * kChunk));
  }
  const auto power = [&](int tokens) {
    return args.scale * exp2_approx(-in_log2(slope) * static_cast<float>(tokens));
  };
  if (threadIdx.x < 2 * kChunk) {
    const int i = threadIdx.x;
    smem.decay[i] = i < kChunk - 1 ? 0 : power(i - (kChunk - 1));
    const float lift = lift_of<kType, kPrecise>(in_log2(slope));
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
    if (threadIdx.x / 32 == 1) store_gradient<kSize, false>(smem, gmem_dv, args, place, head);
    if (threadIdx.x / 32 == 2) store_gradient<kSize, true>(smem, gmem_dk, args, place, head);
    return;
  }
  if (warpgroup == 3) {
    raise_registers<200>();
    carry_back<kType, kSize, kPrecise>(smem, args, place, head, slope);
    return;
  }
  raise_registers<144>();
  if (warpgroup == 1) {
    sweep<kType, kSize, false>(smem, args, place, head, slope);
  } else {
    sweep<kType, kSize, true>(smem, args, place, head, slope);
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
