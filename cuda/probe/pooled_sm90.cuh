#pragma once
#include <cmath>
#include <cstdint>

#include "common/lanes.cuh"
#include "common/launch.h"
#include "common/sm80.cuh"
#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "common/tile.cuh"
#include "core/select.h"
#include "probe/pooled_sm90.h"

// The pooled map of FlexPrefill:
//
//   score[r,c] = softmax(scale * mean_q[r] . mean_k)[c]     where block c begins before row r ends
//
// as precise as in f32: a mean is the sum of three numbers of bf16, its planes, and of their nine
// products the six largest count. A CTA has 128 rows, 64 for each of two warpgroups, which keep
// them in registers; a third loads 128 columns at a time, a plane in each stage. It goes over them
// twice, first for the largest score and the sum of each row, then for shares: multiplying again is
// as cheap as reading scores again, and nobody waits for memory.
namespace heddle {
namespace {

constexpr int kPooledRows = 128, kPooledColumns = 128, kPooledStages = 2 * kMeanPlanes,
              kPooledThreads90 = 384;

struct PooledArgs90 {
  Probe op;
  uint32_t* bins;
  const int32_t* wanted;
  const int* ready;
  float scale_log2;
};

template <int kD> struct PooledSmem {
  sm90::Tile<kPooledColumns, kD> means[kPooledStages];
  uint32_t bins[kShareBins + 1];  // the last of what nobody sees
  sm90::Barrier full[kPooledStages], empty[kPooledStages];
};

template <int kD>
__global__ void __launch_bounds__(kPooledThreads90, 1)
    probe_pooled_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_q,
                             const __grid_constant__ sm90::TensorMap gmem_k,
                             const __grid_constant__ PooledArgs90 args) {
  using namespace sm90;
  auto& smem = shared_memory<PooledSmem<kD>>();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const Probe& op = args.op;
  const int64_t sq = op.q.shape[1], sk = op.k.shape[1];
  const int rows = static_cast<int>(op.score.shape[2]),
            columns = static_cast<int>(op.score.shape[3]);
  // Long rows first; heads are those of the batch
  const int heads = static_cast<int>(op.q.shape[0] * op.q.shape[2]);
  const int head = static_cast<int>(blockIdx.x) % heads,
            first = (rows - 1) / kPooledRows * kPooledRows -
                    static_cast<int>(blockIdx.x) / heads * kPooledRows;
  const auto seen_by = [&](int row) {
    const int64_t keys = sk - sq + min((row + 1) * op.block_q, sq);
    return row < rows ? static_cast<int>((keys + op.block_k - 1) / op.block_k) : 0;
  };
  const int tiles =
      (seen_by(min(first + kPooledRows, rows) - 1) + kPooledColumns - 1) / kPooledColumns;
  // Warpgroups that have rows
  const int groups = first + 64 < rows ? 2 : 1;

  if (threadIdx.x == 0) {
    prefetch(gmem_q);
    prefetch(gmem_k);
    for (int stage = 0; stage < kPooledStages; ++stage) {
      smem.full[stage].init(1);
      smem.empty[stage].init(4 * groups);
    }
    fence_barrier_init();
  }
  for (int i = static_cast<int>(threadIdx.x); i < kShareBins; i += kPooledThreads90)
    smem.bins[i] = 0;
  __syncthreads();
  static_assert(kPooledRows == kReadyBlocks);
  if (!args.wanted) await_previous();
  // What does not need this one, only those before it, begins where it has no CTAs; with `wanted`
  // not even they may have ended
  let_next_begin();
  // So that whoever waits for this one waits for them as well
  const bool last = args.wanted && blockIdx.x == gridDim.x - 1;
  if (args.wanted && load_fresh(args.wanted + head) != 1) {
    if (last) await_previous();
    return;
  }

  if (warpgroup == 0) {
    lower_registers<40>();
    if (threadIdx.x < 32 && elect_one()) {
      const int group = static_cast<int>(op.q.shape[2] / op.k.shape[2]);
      if (args.wanted) {
        wait_for_signals(
            args.ready + head * ((rows + kPooledRows - 1) / kPooledRows) + first / kPooledRows,
            min(kPooledRows, rows - first), nullptr);
        fence_async_gmem();
      }
      Turn<kPooledStages> turn(0);
      // Rows come as tile -1
      for (int n = -1; n < (tiles > 1 ? 2 * tiles : tiles); ++n)
        for (int plane = 0; plane < kMeanPlanes; ++plane) {
          smem.empty[turn.stage].wait(turn.parity ^ 1);
          smem.full[turn.stage].arrive_expect(smem.means[0].kBytes);
          smem.means[turn.stage].load(n < 0 ? gmem_q : gmem_k, smem.full[turn.stage],
                                      n < 0 ? first : n % tiles * kPooledColumns,
                                      n < 0 ? head : head / group, plane, Keep::kLong);
          turn.advance();
        }
      if (last) await_previous();
    }
    return;
  }

  raise_registers<232>();
  if (warpgroup > groups) return;
  const int own = warpgroup - 1, warp = static_cast<int>(threadIdx.x) % 128 / 32,
            lane = static_cast<int>(threadIdx.x) % 32;
  // Of a thread: rows, the second of them 8 below, and the columns that they see
  const int row = first + own * 64 + warp * 16 + lane / 4;
  const int seen[2] = {seen_by(row), seen_by(row + 8)};
  uint32_t frag_q[kMeanPlanes][kD / 16][4];
  float acc[64];
  Turn<kPooledStages> turn(0);
  const auto release = [&](uint32_t stage) {
    if (lane == 0) smem.empty[stage].arrive();
  };
#pragma unroll
  for (auto& plane : frag_q) {
    smem.full[turn.stage].wait(turn.parity);
#pragma unroll
    for (int d = 0; d < kD; d += 16)
      load_matrices<false>(
          smem.means[turn.stage].address(own * 64 + warp * 16 + lane % 16, d + lane / 16 * 8),
          plane[d / 16]);
    __syncwarp();
    release(turn.stage);
    turn.advance();
  }
  // Warpgroups multiply one after the other, so that one has exponentials meanwhile
  const auto take_turn = [&] {
    if (groups == 2) named_barrier_sync(2 + own, 256);
  };
  const auto pass_turn = [&] {
    if (groups == 2) named_barrier_arrive(3 - own, 256);
  };
  if (own == 1) pass_turn();
  // Scores of the columns from `column` on
  const auto multiply = [&](int column) {
#pragma unroll
    for (int plane = 0; plane < kMeanPlanes; ++plane, turn.advance())
      smem.full[turn.stage].wait(turn.parity);
    take_turn();
    wgmma_fence(acc);
#pragma unroll
    for (int plane = 0; plane < kMeanPlanes; ++plane)
#pragma unroll
      for (int other = 0; other < kMeanPlanes - plane; ++other)
#pragma unroll
        for (int d = 0; d < kD; d += 16)
          wgmma<DType::kBF16, Major::kK>(acc, frag_q[other][d / 16],
                                         smem.means[turn.before(kMeanPlanes - plane)].k_major(0, d),
                                         plane + other + d > 0);
    wgmma_commit();
    wgmma_wait<0>(acc);
    pass_turn();
#pragma unroll
    for (int plane = 0; plane < kMeanPlanes; ++plane) release(turn.before(kMeanPlanes - plane));
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int c = column + i / 4 * 8 + i % 2;
      acc[i] = c < seen[i / 2 % 2] ? acc[i] * args.scale_log2 : -INFINITY;
    }
  };
  // Calls body(column) where the scores from there on are known. Those of a single tile stay.
  const auto walk = [&](bool multiplies, const auto& body) {
#pragma unroll 1
    for (int column = lane % 4 * 2; column < tiles * kPooledColumns; column += kPooledColumns) {
      if (multiplies) multiply(column);
      body(column);
    }
  };

  float top[2] = {-3e38f, -3e38f}, sum[2] = {};
  walk(true, [&](int) {
    float next[2] = {top[0], top[1]};
#pragma unroll
    for (int i = 0; i < 64; ++i) next[i / 2 % 2] = fmaxf(next[i / 2 % 2], acc[i]);
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      sum[below] *= sm90::exp2_approx(top[below] - next[below]);
      top[below] = next[below];
    }
#pragma unroll
    for (int i = 0; i < 64; i += 2)
      sum[i / 2 % 2] += sm90::exp2_approx(acc[i] - top[i / 2 % 2]) +
                        sm90::exp2_approx(acc[i + 1] - top[i / 2 % 2]);
  });
  // Four lanes have a row
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const float most = quad_max(top[below]);
    const float total = quad_sum(sum[below] * sm90::exp2_approx(top[below] - most));
    top[below] = most + log2f(total);
  }
  float* score = static_cast<float*>(op.score.data) + (int64_t{head} * rows + row) * columns;
  // No branches: what is behind one would wait for what is before it
  walk(tiles > 1, [&](int column) {
    float* const to[2] = {score + column, score + int64_t{8} * columns + column};
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[i] = sm90::exp2_approx(acc[i] - top[i / 2 % 2]);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int below = i / 2 % 2, c = i / 4 * 8 + i % 2;
      const bool sees = c < seen[below] - column;
      if (sees) to[below][c] = acc[i];
      atomicAdd(&smem.bins[sees ? share_bin(acc[i]) : kShareBins], 1);
    }
  });
  if (own == 0) take_turn();
  named_barrier_sync(1, 128 * groups);
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x) - 128; args.bins && i < kShareBins; i += 128 * groups)
    if (smem.bins[i] != 0) atomicAdd(&args.bins[int64_t{head} * kShareBins + i], smem.bins[i]);
}

}  // namespace

template <int kD> void launch_pooled_sm90(const PooledCall& call, cudaStream_t stream) {
  const Probe& op = call.op;
  const auto map = [](const MeanArgs& means) {
    const int64_t blocks = means.blocks(), heads = means.x.shape[0] * means.x.shape[2];
    return make_tensor_map(DType::kBF16, means.planes,
                           {kD, blocks, heads, kMeanPlanes, kD, blocks * kD, heads * blocks * kD},
                           kPooledRows);
  };
  const int64_t heads = op.q.shape[0] * op.q.shape[2], rows = op.score.shape[2];
  launch<probe_pooled_sm90_kernel<kD>>(
      {static_cast<int>(heads * ((rows + kPooledRows - 1) / kPooledRows)), kPooledThreads90,
       sm90::shared_memory_bytes<PooledSmem<kD>>(), stream, true},
      map(call.mean_q), map(call.mean_k),
      PooledArgs90{op, call.bins, call.wanted, call.ready,
                   static_cast<float>(op.scale * 1.4426950408889634)});
}

}  // namespace heddle
