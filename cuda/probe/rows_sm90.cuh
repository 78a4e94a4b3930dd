#pragma once
#include <cmath>
#include <cstdint>

#include "common/elements.cuh"
#include "common/lanes.cuh"
#include "common/launch.h"
#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "common/tile.cuh"
#include "probe/rows_sm90.h"

// Blocks by some rows of the whole map, or by sums along antidiagonals:
//
//   P[i,t] = softmax(scale * sum(p) q[i,p] . k[t,p])[t]     where t < end(i)
//   score[r,c] = mean(i in r) sum(t in c) P[i,t]
//
// Rows of the map are every stride-th query, in one phase p, or groups of that many, in as many. A
// tile is 256 of them, 64 for each of four warpgroups; columns pass by 128 at a time, from the last
// to the first, of groups a phase at a time. Each warpgroup has one product, and while it waits for
// that the others have exponentials.
//
// Nothing is multiplied twice: of each row and some columns the sum of weights goes to memory, as a
// logarithm, since what weights are relative to may change. That of the whole row is known at the
// end, and then the CTA, whose memory that is, adds up shares.
namespace heddle {
namespace {

constexpr int kRowsWarpgroups = kRowsOfTile / 64, kRowsThreads = 128 * (kRowsWarpgroups + 1);

struct RowsArgs {
  RowsCall call;
  float scale_log2;
};

struct RowsMaps {
  sm90::TensorMap q[kMostPhases], k[kMostPhases];
};

template <int kD, bool kGroups> struct RowsSmem {
  static constexpr int kStages = kGroups ? 2 : 4, kBuffers = kGroups ? kStages : 1;
  sm90::Tile<kRowsOfTile, kD> q[kBuffers];
  sm90::Tile<kColumnsOfTile, kD> k[kStages];
  float lse[kRowsOfTile];
  sm90::Barrier q_full, q_empty;  // of rows, which stay
  sm90::Barrier full[kStages], empty[kStages];
};

// A tile, and how many tiles of columns some of its rows see
struct RowsTile {
  int first, head, batch, columns;

  __device__ __forceinline__ RowsTile(const RowsArgs& args, int index) {
    const int hq = static_cast<int>(args.call.op.q.shape[2]),
              heads = static_cast<int>(args.call.op.q.shape[0]) * hq;
    first = (args.call.plan.tiles() - 1 - index / heads) * kRowsOfTile;
    head = index % heads % hq;
    batch = index % heads / hq;
    columns = (end(args, first + kRowsOfTile - 1) + kColumnsOfTile - 1) / kColumnsOfTile;
  }
  // How many columns row i sees; rows behind the last one see all
  __device__ __forceinline__ static int end(const RowsArgs& args, int i) {
    const RowsPlan& plan = args.call.plan;
    const int sk = static_cast<int>(args.call.op.k.shape[1]),
              keys = sk - static_cast<int>(args.call.op.q.shape[1]) + (i + 1) * plan.stride;
    return min(plan.groups ? (keys - 1) / plan.stride + 1 : keys, plan.columns);
  }
};

// The n-th tile of a CTA. Tiles are longest first and dealt out there and back.
__device__ __forceinline__ int tile_of(int n) {
  const auto ctas = static_cast<int>(gridDim.x), own = static_cast<int>(blockIdx.x);
  return n * ctas + (n % 2 == 0 ? own : ctas - 1 - own);
}

// What a thread has of two rows so far. Lanes of a row agree on `base`.
struct RowsSums {
  // Sums of so much lose no digits, and tell that some weight is beyond 2^kLag
  static constexpr float kLag = 64, kMost = 0x1p72f;
  float base[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  // What scores are to lack: who has seen nothing has no base
  __device__ __forceinline__ float shift(int r) const { return base[r] == -INFINITY ? 0 : base[r]; }
  __device__ __forceinline__ bool based() const { return fminf(base[0], base[1]) > -INFINITY; }
  // Makes room for the scores of a tile
  __device__ __forceinline__ void look(float (&x)[64]) {
    float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 64; ++i) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], x[i]);
    bool beyond = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) beyond |= highest[r] > (base[r] == -INFINITY ? -INFINITY : kLag);
    if (!__any_sync(~0u, beyond)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = quad_max(highest[r]);
      const bool none = base[r] == -INFINITY;
      const float rise = none ? highest[r] : fmaxf(highest[r], 0);
      if (rise == -INFINITY) continue;
      sum[r] = sum[r] == 0 ? 0 : sum[r] * sm90::exp2_approx(-rise);
      base[r] = shift(r) + rise;
#pragma unroll
      for (int i = 2 * r; i < 64; i += i % 2 ? 3 : 1) x[i] -= rise;
    }
  }
};

// Where queries stand behind no whole strides the last group of keys that a block sees has some
// that it doesn't. Of such a tile from column `column` on scores of the last row of each block, and
// of that group, are multiplied again, by the warp that has 16 rows from `row` on.
template <DType kType>
__device__ __forceinline__ void cut_groups(const RowsArgs& args, const RowsTile& tile, int row,
                                           int column, int lane, float (&acc)[64]) {
  const Probe& op = args.call.op;
  const int stride = args.call.plan.stride, ahead = static_cast<int>(op.k.shape[1] - op.q.shape[1]),
            d = static_cast<int>(op.q.shape[3]);
  if (ahead % stride == 0) return;
#pragma unroll 1
  for (int i = 0; i < 16; ++i) {
    const int own = row + i, end = RowsTile::end(args, own), c = end - 1 - column;
    if ((own + 1) % args.call.plan.block_rows != 0 || own >= args.call.plan.rows - 1) continue;
    if (c < 0 || c >= kColumnsOfTile) continue;
    const auto row_of = [&](const Tensor& x, int head, int s) {
      return static_cast<const uint16_t*>(x.data) + tile.batch * x.strides[0] +
             head * x.strides[2] + s * x.strides[1];
    };
    const int kv_head = tile.head / static_cast<int>(op.q.shape[2] / op.k.shape[2]);
    float sum = 0;
    for (int p = 0; (end - 1) * stride + p < ahead + (own + 1) * stride; ++p) {
      const uint16_t* q = row_of(op.q, tile.head, (own + 1) * stride - 1 - p);
      const uint16_t* k = row_of(op.k, kv_head, (end - 1) * stride + p);
      for (int e = lane; e < d; e += 32)
        sum = fmaf(sm90::unpack<kType>(q[e]), sm90::unpack<kType>(k[e]), sum);
    }
    sum = warp_sum(sum);
    const int mine =
        lane / 4 == i % 8 && lane % 4 == c % 8 / 2 ? c / 8 * 4 + i / 8 * 2 + c % 2 : -1;
#pragma unroll
    for (int x = 0; x < 64; ++x)
      if (x == mine) acc[x] = sum;
  }
}

// Shares of blocks of 128 rows from `first_row` on, by one of `warps`. A lane has four rows, of one
// block.
__device__ __forceinline__ void add_shares(const RowsArgs& args, const RowsTile& tile,
                                           const float* parts, const float* lse, int first_row,
                                           int warp, int warps, int lane) {
  const RowsPlan& plan = args.call.plan;
  const Probe& op = args.call.op;
  const int sq = static_cast<int>(op.q.shape[1]), sk = static_cast<int>(op.k.shape[1]),
            rows = static_cast<int>(op.score.shape[2]),
            columns = static_cast<int>(op.score.shape[3]), block_q = static_cast<int>(op.block_q),
            block_k = static_cast<int>(op.block_k);
  const int own_row = first_row + 4 * lane, row = (tile.first + own_row) / plan.block_rows;
  const bool leads = 4 * lane % plan.block_rows == 0 && row < rows;
  const int last = min((row + 1) * block_q, sq);
  const int visible = (sk - sq + last + block_k - 1) / block_k;
  const float sampled = static_cast<float>((last - row * block_q + plan.stride - 1) / plan.stride);
  float own[4];
  int end[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    own[i] = lse[own_row + i];
    // rows that are none may have weights that are no numbers, where a key has no finite ones
    end[i] =
        tile.first + own_row + i < plan.rows ? RowsTile::end(args, tile.first + own_row + i) : 0;
  }
  float* score = static_cast<float*>(op.score.data) +
                 ((int64_t{tile.batch} * op.q.shape[2] + tile.head) * rows + row) * columns;
  const int each = plan.block_columns / plan.part;
  constexpr int kAhead = 4;  // blocks that are waited for at once
#pragma unroll 1
  for (int first = warp * kAhead; first < columns; first += warps * kAhead) {
    float sums[kAhead] = {};
#pragma unroll 1
    for (int x = 0; x < each; ++x) {
      float4 logs[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int part = (first + i) * each + x;
        logs[i] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
        if (part * plan.part < tile.columns * kColumnsOfTile)
          logs[i] = *reinterpret_cast<const float4*>(parts + int64_t{part} * kRowsOfTile + own_row);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float its[4] = {logs[i].x, logs[i].y, logs[i].z, logs[i].w};
        const int column = ((first + i) * each + x) * plan.part;
        // a row that is no number says nothing of what it doesn't see
#pragma unroll
        for (int y = 0; y < 4; ++y)
          sums[i] += column < end[y] ? sm90::exp2_approx(its[y] - own[y]) : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      for (int step = 1; step < plan.block_rows / 4; step *= 2)
        sums[i] += __shfl_xor_sync(~0u, sums[i], step);
      if (leads && first + i < columns)
        score[first + i] = first + i < visible ? sums[i] / sampled : -INFINITY;
    }
  }
}

template <DType kType, int kD, bool kGroups>
__global__ void __launch_bounds__(kRowsThreads, 1)
    probe_rows_sm90_kernel(const __grid_constant__ RowsMaps gmem,
                           const __grid_constant__ RowsArgs args) {
  using namespace sm90;
  using Smem = RowsSmem<kD, kGroups>;
  constexpr int kStages = Smem::kStages, kPart = RowsPlan::part_of(kGroups),
                kParts = kColumnsOfTile / kPart;
  auto& smem = shared_memory<Smem>();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const Probe& op = args.call.op;
  const RowsPlan& plan = args.call.plan;
  const int tiles = plan.tiles() * static_cast<int>(op.q.shape[0] * op.q.shape[2]);
  const int phases = kGroups ? plan.phases : 1;

  if (threadIdx.x == 0) {
    smem.q_full.init(1);
    smem.q_empty.init(kRowsWarpgroups * 4);
    for (int stage = 0; stage < kStages; ++stage) {
      smem.full[stage].init(1);
      smem.empty[stage].init(kRowsWarpgroups * 4);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == 0) {
    lower_registers<24>();
    if (threadIdx.x >= 32 || !elect_one()) return;
    const int group = static_cast<int>(op.q.shape[2] / op.k.shape[2]);
    Turn<kStages> turn(0);
    int visit = 0;
    for (; tile_of(visit) < tiles; ++visit) {
      const RowsTile tile(args, tile_of(visit));
      if constexpr (!kGroups) {
        smem.q_empty.wait(Turn<1>(visit).parity ^ 1);
        smem.q_full.arrive_expect(smem.q[0].kBytes);
        smem.q[0].load(gmem.q[0], smem.q_full, tile.first, tile.head, tile.batch, Keep::kShortly);
      }
      for (int j = tile.columns - 1; j >= 0; --j)
        for (int phase = 0; phase < phases; ++phase, turn.advance()) {
          Barrier& full = smem.full[turn.stage];
          smem.empty[turn.stage].wait(turn.parity ^ 1);
          full.arrive_expect(smem.k[0].kBytes + (kGroups ? smem.q[0].kBytes : 0));
          if constexpr (kGroups)
            smem.q[turn.stage].load(gmem.q[phase], full, tile.first, tile.head, tile.batch,
                                    Keep::kNormal);
          smem.k[turn.stage].load(gmem.k[phase], full, j * kColumnsOfTile, tile.head / group,
                                  tile.batch, Keep::kLong);
        }
    }
    return;
  }

  raise_registers<112>();
  const int own = warpgroup - 1, thread = static_cast<int>(threadIdx.x) % 128, warp = thread / 32,
            lane = thread % 32;
  const int own_row = own * 64 + warp * 16 + lane / 4;  // and the eighth behind it
  constexpr int kAll = 9, kOwn = 5, kFirstTurn = 1;     // barriers; of warpgroups one each
  float* const parts = args.call.parts + blockIdx.x * plan.parts();
  Turn<kStages> turn(0);
  int visit = 0;
  float acc[64];
  const auto release = [&](Barrier& empty) {
    __syncwarp();
    if (lane == 0) empty.arrive();
  };
  const auto issue = [&](bool accumulates) {
    wgmma_fence(acc);
#pragma unroll
    for (int d = 0; d < kD; d += 16)
      wgmma<kType, Major::kK>(acc, smem.q[kGroups ? turn.stage : 0].k_major(own * 64, d),
                              smem.k[turn.stage].k_major(0, d), accumulates || d > 0);
    wgmma_commit();
  };
  if (!kGroups && own == kRowsWarpgroups - 1) named_barrier_arrive(kFirstTurn, 256);
  for (; tile_of(visit) < tiles; ++visit) {
    const RowsTile tile(args, tile_of(visit));
    const int row = tile.first + own_row;
    const int end[2] = {RowsTile::end(args, row), RowsTile::end(args, row + 8)};
    // the warp's first row, and columns that all of its rows see
    const int warp_row = tile.first + own * 64 + warp * 16, whole = RowsTile::end(args, warp_row);
    if constexpr (!kGroups) {
      smem.q_full.wait(Turn<1>(visit).parity);
      // the last row may be of less than a stride, where no copy found it
      const int last = plan.rows - 1 - tile.first - own * 64;
      if (op.q.shape[1] % plan.stride != 0 && last >= 0 && last < 64) {
        const auto* from = static_cast<const uint16_t*>(op.q.data) + tile.batch * op.q.strides[0] +
                           tile.head * op.q.strides[2] + (op.q.shape[1] - 1) * op.q.strides[1];
        if (const int d = 8 * thread; d < op.q.shape[3])
          store_16_bytes(smem.q[0].address(own * 64 + last, d), from + d);
        fence_async_smem();
        named_barrier_sync(kOwn + own, 128);
      }
    }
    RowsSums sums;
    for (int j = tile.columns - 1; j >= 0; --j) {
      if constexpr (kGroups) {
        for (int phase = 0; phase < phases; ++phase, turn.advance()) {
          smem.full[turn.stage].wait(turn.parity);
          issue(phase > 0);
          wgmma_wait<1>(acc);
          if (phase > 0) release(smem.empty[turn.before(1)]);
        }
        wgmma_wait<0>(acc);
        release(smem.empty[turn.before(1)]);
      } else {
        smem.full[turn.stage].wait(turn.parity);
        named_barrier_sync(kFirstTurn + own, 256);
        issue(false);
        wgmma_wait<0>(acc);
        named_barrier_arrive(kFirstTurn + (own + 1) % kRowsWarpgroups, 256);
        release(smem.empty[turn.stage]);
        turn.advance();
      }
      const int column = j * kColumnsOfTile;
      if constexpr (kGroups) cut_groups<kType>(args, tile, warp_row, column, lane, acc);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float shift = -sums.shift(r);
#pragma unroll
        for (int i = 2 * r; i < 64; i += i % 2 ? 3 : 1)
          acc[i] = fmaf(acc[i], args.scale_log2, shift);
      }
      if (column + kColumnsOfTile > whole)
#pragma unroll
        for (int i = 0; i < 64; ++i)
          if (column + i / 4 * 8 + lane % 4 * 2 + i % 2 >= end[i / 2 % 2]) acc[i] = -INFINITY;
      float* const to = parts + int64_t{j} * kParts * kRowsOfTile + lane / 2 % 2 * kRowsOfTile +
                        own_row + lane % 2 * 8;
      // Nobody looks for a maximum, but where there is none yet or sums tell that one is beyond it
      for (bool looks = !__all_sync(~0u, sums.based());; looks = true) {
        if (looks) sums.look(acc);
        float all[2] = {};
        // Two parts of two rows at a time, of whose sums a lane of a row's four has one each
#pragma unroll
        for (int part = 0; part < kParts; part += 2) {
          float found[4];
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            float its[2] = {};  // of even and odd columns, which need not wait for each other
#pragma unroll
            for (int n = 0; n < kPart / 8; ++n)
#pragma unroll
              for (int y = 0; y < 2; ++y)
                its[y] += exp2_approx(acc[(part + x / 2) * (kPart / 2) + x % 2 * 2 + 4 * n + y]);
            found[x] = its[0] + its[1];
          }
#pragma unroll
          for (int r = 0; r < 2; ++r) all[r] += found[r] + found[r + 2];
          const float sum = quad_sum_own(found, lane);
          to[part * kRowsOfTile] = log2_approx(sum) + (lane % 2 ? sums.base[1] : sums.base[0]);
        }
        if (!looks && !__all_sync(~0u, all[0] <= RowsSums::kMost && all[1] <= RowsSums::kMost))
          continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) sums.sum[r] += all[r];
        break;
      }
    }
    if constexpr (!kGroups) release(smem.q_empty);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float all = quad_sum(sums.sum[r]);
      if (lane % 4 == 0)
        smem.lse[own_row + 8 * r] = row + 8 * r < plan.rows ? sums.base[r] + log2f(all) : INFINITY;
    }
    named_barrier_sync(kAll, 128 * kRowsWarpgroups);
    constexpr int kHalves = kRowsOfTile / 128, kWarps = 4 * kRowsWarpgroups;
    add_shares(args, tile, parts, smem.lse, own % kHalves * 128, (own / kHalves) * 4 + warp,
               kWarps / kHalves, lane);
    // before either is written again
    named_barrier_sync(kAll, 128 * kRowsWarpgroups);
  }
  if (!kGroups && own == 0) named_barrier_sync(kFirstTurn, 256);
}

}  // namespace

template <DType kType, int kD, bool kGroups>
void launch_rows_sm90(const RowsCall& call, cudaStream_t stream) {
  const Probe& op = call.op;
  const RowsPlan& plan = call.plan;
  RowsMaps maps{};
  // rows of x that stand at i * step + phase
  const auto map = [&](const Tensor& x, int64_t step, int64_t phase, int box) {
    return make_tensor_map(kType, static_cast<const uint16_t*>(x.data) + phase * x.strides[1],
                           {x.shape[3], (x.shape[1] - phase + step - 1) / step, x.shape[2],
                            x.shape[0], step * x.strides[1], x.strides[2], x.strides[0]},
                           box);
  };
  for (int phase = 0; phase < plan.phases; ++phase) {
    maps.q[phase] = map(op.q, plan.stride, plan.stride - 1 - phase, kRowsOfTile);
    maps.k[phase] = map(op.k, kGroups ? plan.stride : 1, phase, kColumnsOfTile);
  }
  const double scale = op.scale / (kGroups ? plan.stride : 1);
  launch<probe_rows_sm90_kernel<kType, kD, kGroups>>(
      {call.ctas, kRowsThreads, sm90::shared_memory_bytes<RowsSmem<kD, kGroups>>(), stream}, maps,
      RowsArgs{call, static_cast<float>(scale * 1.4426950408889634)});
}

}  // namespace heddle
