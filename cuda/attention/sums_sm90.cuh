#pragma once
#include "attention/forward_sm90.cuh"

// The sums of attention without its values, for calls whose v has no columns:
//
//   lse[p] = ln(sum(w(S[p,t])))   with S and its weights w as in forward_sm90.cuh
//
// A tile is 64 rows of q for each of two computing warpgroups; warpgroup 0 loads. Of cosines, each
// issues the products of the next key tile one by one between the sums of this one: issued at once
// they would hold the warp until the last of them begins. Other scores take so much longer to map
// that the products of one warpgroup hide behind those of the other.
namespace heddle {
namespace {

struct SumsTile {
  static constexpr int kD = kSlotColumns, kWarpgroups = 2, kQueries = 64 * kWarpgroups;
  static constexpr int kKeys = 128, kBuffers = 2, kStages = 4;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kLoadRegisters = 24, kComputeRegisters = 240;
};

struct SumsSmem {
  using Shape = SumsTile;
  sm90::Tile<Shape::kQueries, Shape::kD> q[Shape::kBuffers];
  sm90::Tile<Shape::kKeys, Shape::kD> k[Shape::kStages];
  ForwardWork work[Shape::kBuffers];
  sm90::Barrier q_full[Shape::kBuffers], q_empty[Shape::kBuffers];
  sm90::Barrier k_full[Shape::kStages], k_empty[Shape::kStages];
};

// `kCosines` are those of softplus, and nothing else is added to them
template <DType kType, bool kCosines>
__global__ void __launch_bounds__(SumsTile::kThreads, 1)
    sums_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_q,
                     const __grid_constant__ sm90::TensorMap gmem_k, const ForwardArgs args) {
  using namespace sm90;
  using Shape = SumsTile;
  constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys, kD = Shape::kD;
  constexpr int kBuffers = Shape::kBuffers, kStages = Shape::kStages;
  auto& smem = shared_memory<SumsSmem>();
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

  for (uint32_t visit = 0, used = 0;; ++visit) {
    const Turn<kBuffers> q(visit);
    smem.q_full[q.stage].wait(q.parity);
    const ForwardWork& work = smem.work[q.stage];
    if (work.row < 0) break;
    const int row = work.row + own * 64 + warp * 16 + lane / 4, diagonal = work.sk - work.sq;
    const RowBounds bounds = bounds_of(args, work, row);
    open_rows<kCosines ? Form::kReweighted : Form::kMapped>(args, work, row, slots, rows);
    if (kCosines) rows.row_max[0] = rows.row_max[1] = slots.kSoftplusBase;
    // key tiles that the first row sees whole, and where the last row's window begins
    const int whole_end = (args.causal ? max(work.row + diagonal + 1, 0) : work.sk) / kKeys;
    const int whole_begin =
        args.window ? max(work.row + kQueries + diagonal - args.window + kKeys - 1, 0) / kKeys : 0;
    const int key_end = __shfl_sync(~0u, work.key_end, 0);
    const int key_tiles = __shfl_sync(~0u, work.key_tiles, 0);
    const auto tile_of = [&](int j) { return key_end - 1 - j; };
    const auto column_of = [&](int j) { return tile_of(j) * kKeys + lane % 4 * 2; };
    const auto begin = [&](int j) {
      const Turn<kStages> k(used + j);
      smem.k_full[k.stage].wait(k.parity);
      wgmma_fence(acc);
      return k.stage;
    };
    const auto multiply = [&](uint32_t stage, int d) {
      wgmma<kType, Major::kK>(acc, smem.q[q.stage].k_major(own * 64, d),
                              smem.k[stage].k_major(0, d), d > 0);
      if (d == kD - 16) wgmma_commit();
    };
    const auto issue = [&](int j) {
      const uint32_t stage = begin(j);
#pragma unroll
      for (int d = 0; d < kD; d += 16) multiply(stage, d);
    };
    const auto give_back = [&](int j) { release(smem.k_empty[Turn<kStages>(used + j).stage]); };
    const auto mask = [&](float(&scores)[kKeys / 2], int j) {
      const int tile = tile_of(j);
      if (tile >= whole_end || tile < whole_begin)
        mask_scores(scores, bounds, tile * kKeys, args.window, lane);
    };
    issue(0);
    if constexpr (kCosines) {
      float2 factors[kKeys / 8];
      const auto fetch = [&](int j) {
#pragma unroll
        for (int g = 0; g < kKeys / 8; ++g)
          factors[g] = *reinterpret_cast<const float2*>(slots.columns + column_of(j) + 8 * g);
      };
      fetch(0);
#pragma unroll 1
      for (int j = 0; j < key_tiles; ++j) {
        float cosines[kKeys / 2];
        wgmma_wait<0>(acc);
        give_back(j);
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) cosines[i] = acc[i];
        multiply_columns(cosines, [&](int column) { return factors[column / 8]; });
        mask(cosines, j);
        bool summed = false;
        if (j + 1 < key_tiles) {
          fetch(j + 1);
          const uint32_t next = begin(j + 1);
          float products[2][4] = {{1, 1, 1, 1}, {1, 1, 1, 1}};
#pragma unroll
          for (int d = 0; d < kD; d += 16) {
            multiply(next, d);
            constexpr int kPart = kKeys / 2 * 16 / kD;
            slots.multiply_weights<kPart>(cosines, d / 16 * kPart, products);
          }
          summed = slots.add_products(products, rows);
        }
        if (!summed) slots.sum_cosines(cosines, rows);
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < key_tiles; ++j) {
        // what is read of a tile while it is multiplied
        uint32_t ahead[kKeys / 8][2];
        if (slots.reads()) {
#pragma unroll
          for (int g = 0; g < kKeys / 8; ++g)
#pragma unroll
            for (int x = 0; x < 2; ++x) ahead[g][x] = slots.word(column_of(j) + 8 * g, x, work.sk);
        }
        wgmma_wait<0>(acc);
        give_back(j);
        slots.map(acc, ahead, bounds, column_of(j), work.sk);
        mask(acc, j);
        slots.sum(acc, rows);
        if (j + 1 < key_tiles) issue(j + 1);
      }
    }
    used += key_tiles;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = rows.total(r);
      const RowEnd end(rows.row_max[r], args.slots.hides(rows.row_max[r]) ? 0 * sum : sum,
                       args.sink ? args.sink + work.head * args.sink_stride : nullptr);
      const int64_t line = (static_cast<int64_t>(work.batch) * args.hq + work.head) * args.sq;
      if (lane % 4 == 0 && row + 8 * r < work.sq)
        args.lse[line + work.q_begin + row + 8 * r] = end.lse_log2 * kLn2;
    }
    release(smem.q_empty[q.stage]);
  }
}

}  // namespace

template <DType kType, bool kCosines>
void launch_sums_sm90(const ForwardCall& call, cudaStream_t stream) {
  using Shape = SumsTile;
  const ForwardArgs args = forward_args(call, Shape::kQueries);
  const auto map = [&](const void* data, int64_t s, int64_t h, const Strides& strides, int rows) {
    return make_tensor_map(kType, data,
                           {call.d, s, h, call.b, strides.row, strides.head, strides.batch}, rows);
  };
  launch<sums_sm90_kernel<kType, kCosines>>(
      {std::min(args.tiles, call.processors), Shape::kThreads,
       sm90::shared_memory_bytes<SumsSmem>(), stream},
      map(call.q, call.sq, call.hq, call.q_strides, Shape::kQueries),
      map(call.k, call.sk, call.hk, call.k_strides, Shape::kKeys), args);
}

}  // namespace heddle
