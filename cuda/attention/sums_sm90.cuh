#pragma once
#include "attention/forward_sm90.cuh"

// The sums of attention without its values, for calls whose v has no columns:
//
//   lse[p] = ln(sum(w(S[p,t])))   with S and its weights w as in forward_sm90.cuh
//
// A tile is 64 rows of q for each computing warpgroup; warpgroup 0 loads. Products of one warpgroup
// hide behind what the others make of theirs: two of scores that take long to map, or four of
// unit rows, which multiply one after the other and also tell the highest score of each row.
namespace heddle {
namespace {

template <bool kUnits> struct SumsTile {
  static constexpr int kD = kSlotColumns, kWarpgroups = kUnits ? 4 : 2;
  static constexpr int kQueries = 64 * kWarpgroups, kKeys = 128;
  static constexpr int kBuffers = 2, kStages = kUnits ? 2 : 4;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // sums to at most the registers per lane that a CTA begins with, which are 504 and 480
  static constexpr int kLoadRegisters = 24, kComputeRegisters = kUnits ? 112 : 240;
};

template <class Shape> struct SumsSmem {
  sm90::Tile<Shape::kQueries, Shape::kD> q[Shape::kBuffers];
  sm90::Tile<Shape::kKeys, Shape::kD> k[Shape::kStages];
  ForwardWork work[Shape::kBuffers];
  sm90::Barrier q_full[Shape::kBuffers], q_empty[Shape::kBuffers];
  sm90::Barrier k_full[Shape::kStages], k_empty[Shape::kStages];
};

// `kUnits` are those of softplus alone, and come with peaks
template <DType kType, bool kUnits>
__global__ void __launch_bounds__(SumsTile<kUnits>::kThreads, 1)
    sums_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_q,
                     const __grid_constant__ sm90::TensorMap gmem_k, const ForwardArgs args) {
  using namespace sm90;
  using Shape = SumsTile<kUnits>;
  constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys, kD = Shape::kD;
  constexpr int kBuffers = Shape::kBuffers, kStages = Shape::kStages;
  auto& smem = shared_memory<SumsSmem<Shape>>();
  // the same in all lanes, which the compiler cannot know of threadIdx
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) {
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
      smem.q_full[buffer].init(1);
      smem.q_empty[buffer].init(Shape::kWarpgroups * 4);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      smem.k_full[stage].init(1);
      smem.k_empty[stage].init(Shape::kWarpgroups * 4);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == 0) {
    lower_registers<Shape::kLoadRegisters>();
    if (threadIdx.x < 32 && elect_one()) {
      prefetch(gmem_q);
      prefetch(gmem_k);
      ForwardOrder<kQueries> order{args};
      ForwardWork work = order.at(blockIdx.x);
      uint32_t visit = 0, loaded = 0;  // tiles of q, and of k
      auto publish = [&] {
        const Turn<kBuffers> q(visit);
        smem.q_empty[q.stage].wait(q.parity ^ 1);
        smem.work[q.stage] = work;
        return q.stage;
      };
      for (; work.row >= 0; ++visit) {
        find_keys<kQueries, kKeys>(args, work);
        const uint32_t buffer = publish();
        smem.q_full[buffer].arrive_expect(smem.q[0].kBytes);
        smem.q[buffer].load(gmem_q, smem.q_full[buffer], work.q_begin + work.row, work.head,
                            work.batch, Keep::kShortly);
        for (int j = 0; j < work.key_tiles; ++j, ++loaded) {
          const Turn<kStages> k(loaded);
          smem.k_empty[k.stage].wait(k.parity ^ 1);
          smem.k_full[k.stage].arrive_expect(smem.k[0].kBytes);
          smem.k[k.stage].load(gmem_k, smem.k_full[k.stage],
                               work.k_begin + (work.key_end - 1 - j) * kKeys,
                               work.head / args.group, work.batch, Keep::kLong);
        }
        work = order.at(static_cast<int>(gridDim.x) + fetch_add(&args.tickets[0], 1));
      }
      smem.q_full[publish()].arrive();
      // the last CTA leaves the counters as it found them
      if (fetch_add(&args.tickets[1], 1) == static_cast<int>(gridDim.x) - 1)
        args.tickets[0] = args.tickets[1] = 0;
    }
    return;
  }

  raise_registers<Shape::kComputeRegisters>();
  const int own = warpgroup - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  float acc[kKeys / 2];
  RowSoftmax rows;
  SlotMap slots(args.slots, args.scale, args.soft_cap);
  auto release = [&](Barrier& empty) {
    __syncwarp();
    if (lane == 0) empty.arrive();
  };

  // products at the same time would end at the same time
  const auto await_turn = [&] {
    if (kUnits) named_barrier_sync(1 + own, 256);
  };
  const auto pass_turn = [&] {
    if (kUnits) named_barrier_arrive(1 + (own + 1) % Shape::kWarpgroups, 256);
  };
  if (own == Shape::kWarpgroups - 1) pass_turn();
  for (uint32_t visit = 0, used = 0;; ++visit) {
    const Turn<kBuffers> q(visit);
    smem.q_full[q.stage].wait(q.parity);
    const ForwardWork& work = smem.work[q.stage];
    if (work.row < 0) break;
    const int first_row = work.row + own * 64, diagonal = work.sk - work.sq;
    const int row = first_row + warp * 16 + lane / 4;
    const RowBounds bounds = bounds_of(args, work, row);
    const int64_t line = (static_cast<int64_t>(work.batch) * args.hq + work.head) * args.sq;
    float shift[2];
    if constexpr (kUnits) {
      rows.clear();
      rows.row_max[0] = rows.row_max[1] = slots.kSoftplusBase;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        shift[r] = args.slots.shifts[line + min(row + 8 * r, work.sq - 1)];
    } else {
      open_rows<Form::kMapped>(args, work, row, slots, rows);
    }
    // key tiles that this warpgroup's first row sees whole, where the last row's window begins, and
    // where those are that no row sees
    const int whole_end = (args.causal ? max(first_row + diagonal + 1, 0) : work.sk) / kKeys;
    const int whole_begin =
        args.window ? max(first_row + 64 + diagonal - args.window + kKeys - 1, 0) / kKeys : 0;
    const int own_end =
        args.causal ? (max(first_row + 64 + diagonal, 0) + kKeys - 1) / kKeys : work.key_end;
    const int key_end = __shfl_sync(~0u, work.key_end, 0);
    const int key_tiles = __shfl_sync(~0u, work.key_tiles, 0);
    const int skipped = min(max(key_end - __shfl_sync(~0u, own_end, 0), 0), key_tiles);
    float beyond[2] = {0, 0};  // what rounding has added to sums
    int highest[2] = {0, 0};   // as the integers that their bits are
    const auto tile_of = [&](int j) { return key_end - 1 - j; };
    const auto column_of = [&](int j) { return tile_of(j) * kKeys + lane % 4 * 2; };
#pragma unroll 1
    for (int j = 0; j < skipped; ++j) {
      const Turn<kStages> k(used + j);
      smem.k_full[k.stage].wait(k.parity);
      release(smem.k_empty[k.stage]);
      await_turn();
      pass_turn();
    }
#pragma unroll 1
    for (int j = skipped; j < key_tiles; ++j) {
      const Turn<kStages> k(used + j);
      // what is read of a tile while it is multiplied
      uint32_t ahead[kUnits ? 1 : kKeys / 8][2];
      if constexpr (!kUnits) {
        if (slots.reads()) {
#pragma unroll
          for (int g = 0; g < kKeys / 8; ++g)
#pragma unroll
            for (int x = 0; x < 2; ++x) ahead[g][x] = slots.word(column_of(j) + 8 * g, x, work.sk);
        }
      }
      smem.k_full[k.stage].wait(k.parity);
      await_turn();
      wgmma_fence(acc);
#pragma unroll
      for (int d = 0; d < kD; d += 16)
        wgmma<kType, Major::kK>(acc, smem.q[q.stage].k_major(own * 64, d),
                                smem.k[k.stage].k_major(0, d), d > 0);
      wgmma_commit();
      wgmma_wait<0>(acc);
      pass_turn();
      release(smem.k_empty[k.stage]);
      if constexpr (!kUnits) slots.map(acc, ahead, bounds, column_of(j), work.sk);
      const int tile = tile_of(j);
      if (tile >= whole_end || tile < whole_begin)
        mask_scores(acc, bounds, tile * kKeys, args.window, lane);
      if constexpr (kUnits)
        slots.sum_units(acc, shift, rows, beyond, highest);
      else
        slots.sum(acc, rows, beyond);
    }
    used += key_tiles;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = rows.total(r);
      const RowEnd end(rows.row_max[r], args.slots.hides(rows.row_max[r]) ? 0 * sum : sum,
                       args.sink ? args.sink + work.head * args.sink_stride : nullptr);
      int top = max(highest[r], __shfl_xor_sync(~0u, highest[r], 1));
      top = max(top, __shfl_xor_sync(~0u, top, 2));
      if (lane % 4 == 0 && row + 8 * r < work.sq) {
        args.lse[line + work.q_begin + row + 8 * r] = end.lse_log2 * kLn2;
        if (kUnits) args.slots.peaks[line + row + 8 * r] = std::bit_cast<float>(top);
      }
    }
    release(smem.q_empty[q.stage]);
  }
  if (own == 0) await_turn();  // nobody leaves with a turn passed to nobody
}

}  // namespace

template <DType kType, bool kUnits>
void launch_sums_sm90(const ForwardCall& call, cudaStream_t stream) {
  using Shape = SumsTile<kUnits>;
  const ForwardArgs args = forward_args(call, Shape::kQueries);
  const auto map = [&](const void* data, int64_t s, int64_t h, const Strides& strides, int rows) {
    return make_tensor_map(kType, data,
                           {call.d, s, h, call.b, strides.row, strides.head, strides.batch}, rows);
  };
  launch<sums_sm90_kernel<kType, kUnits>>(
      {std::min(args.tiles, call.processors), Shape::kThreads,
       sm90::shared_memory_bytes<SumsSmem<Shape>>(), stream},
      map(call.q, call.sq, call.hq, call.q_strides, Shape::kQueries),
      map(call.k, call.sk, call.hk, call.k_strides, Shape::kKeys), args);
}

}  // namespace heddle
