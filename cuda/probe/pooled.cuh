#pragma once
#include <cmath>

#include "common/elements.cuh"
#include "common/lanes.cuh"
#include "common/sm80.cuh"
#include "core/select.h"
#include "ops/probe.h"
#include "probe/means.cuh"

// Scores of pooled blocks: the mean of every block once, limited by memory, then
//
//   score[r,c] = scale * mean_q[r,e] * mean_k[c,e]     where block c begins before row r ends
//
// as precise as in f32: a number is the sum of two that matrix instructions take, and of their
// products the smallest is left out. A CTA has 64 rows, or 16 where there are few, to their end,
// 128 columns at a time and 32 numbers of a mean deep; each of 4 warps has 32 of the columns.
namespace heddle {
namespace {

constexpr int kMeanThreads = 256, kPooledThreads = 128;
constexpr int kTileColumns = 128, kDepth = 32, kPooledWarps = kPooledThreads / 32;
constexpr int kWarpColumns = kTileColumns / kPooledWarps, kSquares = kWarpColumns / 8;
// float4 from row to row: what 8 lanes load together lies in different banks
constexpr int kPooledLine = 12;

struct PooledArgs {
  Probe op;
  int64_t depth;  // d, or the next multiple of 4
  const float *mean_q, *mean_k;
  uint32_t* bins;  // of every head, or null
};

// A CTA per block and head, heads side by side as they are in memory. So are threads in a row,
// kCount elements each
template <class T, int kCount>
__device__ __forceinline__ void average_block(const MeanArgs& args, int64_t cta) {
  struct alignas(sizeof(T) * kCount) Piece {
    T values[kCount];
  };
  __shared__ float sums[kMeanThreads * kCount];
  const Tensor& x = args.x;
  const auto [b, head, first, rows, to] = args.at(static_cast<uint32_t>(cta));
  const int d = static_cast<int>(x.shape[3]), pieces = d / kCount, lines = kMeanThreads / pieces;
  const int line = static_cast<int>(threadIdx.x) / pieces,
            piece = static_cast<int>(threadIdx.x) % pieces;
  const T* from = static_cast<T*>(x.data) + b * x.strides[0] + head * x.strides[2] +
                  first * x.strides[1] + piece * kCount * x.strides[3];
  if (line < lines) {
    float sum[kCount] = {};
#pragma unroll 8
    for (int64_t i = line; i < rows; i += lines) {
      const Piece own = *reinterpret_cast<const Piece*>(from + i * x.strides[1]);
#pragma unroll
      for (int e = 0; e < kCount; ++e) sum[e] += to_float(own.values[e]);
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) sums[line * d + piece * kCount + e] = sum[e];
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < args.depth; e += kMeanThreads) {
    float sum = 0;
    for (int i = 0; e < d && i < lines; ++i) sum += sums[i * d + e];
    store_mean(args, to + e, sum / static_cast<float>(rows));
  }
}

// Both tensors in one launch
template <class T, int kCount>
__global__ void __launch_bounds__(kMeanThreads)
    probe_means_kernel(const __grid_constant__ MeanArgs q, const __grid_constant__ MeanArgs k,
                       int blocks_of_q) {
  const int block = static_cast<int>(blockIdx.x);
  const bool first = block < blocks_of_q;
  average_block<T, kCount>(first ? q : k, block - (first ? 0 : blocks_of_q));
}

// Four numbers, each as one of tf32 and the rest
struct Split {
  float high[4], low[4];

  __device__ __forceinline__ void set(const float4& x) {
    const float all[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = to_tf32(all[i]);
      low[i] = all[i] - high[i];
    }
  }
};

// kTiles of 16 rows
template <int kTiles>
__global__ void __launch_bounds__(kPooledThreads, kTiles == 1 ? 5 : 3)
    probe_pooled_kernel(const __grid_constant__ PooledArgs args) {
  constexpr int kRows = 16 * kTiles;
  __shared__ float4 smem_q[kRows][kPooledLine], smem_k[kTileColumns][kPooledLine];
  __shared__ float2 stats[kPooledWarps][kRows];  // largest score and sum
  __shared__ int visible[kRows];                 // columns of a row
  const Probe& op = args.op;
  const int64_t heads = op.q.shape[2], rows = op.score.shape[2], columns = op.score.shape[3];
  const int64_t sq = op.q.shape[1], sk = op.k.shape[1], depth = args.depth;
  // Long rows first
  const int64_t head = blockIdx.x % (op.q.shape[0] * heads);
  const int64_t tiles = (rows + kRows - 1) / kRows;
  const int64_t row = (tiles - 1 - blockIdx.x / (op.q.shape[0] * heads)) * kRows;
  const int64_t kv_head = head / (heads / op.k.shape[2]);  // over the batch as well
  const float *mean_q = args.mean_q + head * rows * depth,
              *mean_k = args.mean_k + kv_head * columns * depth;
  const auto seen_by = [&](int64_t r) {
    const int64_t keys = sk - sq + min((r + 1) * op.block_q, sq);
    return static_cast<int>((keys + op.block_k - 1) / op.block_k);
  };
  const int count = static_cast<int>(min(rows - row, int64_t{kRows})),
            end = seen_by(row + count - 1);
  if (threadIdx.x < kRows)
    visible[threadIdx.x] = static_cast<int>(threadIdx.x) < count ? seen_by(row + threadIdx.x) : 0;
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  // Of a lane: the first of two rows of a tile, a quarter of a row's depth, two columns of a square
  const int line = lane / 4, quarter = lane % 4, own_column = warp * kWarpColumns + quarter * 2;
  float* score = static_cast<float*>(op.score.data) + (head * rows + row) * columns;
  float top[kTiles][2], sum[kTiles][2] = {};
#pragma unroll
  for (auto& pair : top) pair[0] = pair[1] = -3e38f;
  const auto fetch = [&](auto& smem, int size, const float* from, int64_t at, int64_t all,
                         int64_t e0) {
#pragma unroll
    for (int i = static_cast<int>(threadIdx.x); i < size * kDepth / 4; i += kPooledThreads) {
      const int r = i / (kDepth / 4), e = i % (kDepth / 4);
      const bool inside = at + r < all && e0 + 4 * e < depth;
      smem[r][e] = inside ? *reinterpret_cast<const float4*>(from + (at + r) * depth + e0 + 4 * e)
                          : float4{0, 0, 0, 0};
    }
  };
  for (int column = 0; column < columns; column += kTileColumns) {
    // Who counts shares looks at nothing that a row does not see
    if (args.bins && column >= end) break;
    float acc[kTiles][kSquares][4] = {};
    for (int64_t e0 = 0; e0 < depth && column < end; e0 += kDepth) {
      __syncthreads();
      fetch(smem_q, kRows, mean_q, row, rows, e0);
      fetch(smem_k, kTileColumns, mean_k, column, columns, e0);
      __syncthreads();
#pragma unroll 1
      for (int e = quarter; e < kDepth / 4; e += 4) {
        Split y[kSquares];
#pragma unroll
        for (int n = 0; n < kSquares; ++n) y[n].set(smem_k[warp * kWarpColumns + n * 8 + line][e]);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          Split upper, lower;
          upper.set(smem_q[m * 16 + line][e]);
          lower.set(smem_q[m * 16 + 8 + line][e]);
          // A lane's 4 numbers stand for two columns of one product and two of the next
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            const float high[4] = {upper.high[i], lower.high[i], upper.high[i + 1],
                                   lower.high[i + 1]};
            const float low[4] = {upper.low[i], lower.low[i], upper.low[i + 1], lower.low[i + 1]};
#pragma unroll
            for (int n = 0; n < kSquares; ++n) {
              multiply_tf32(acc[m][n], low, y[n].high[i], y[n].high[i + 1]);
              multiply_tf32(acc[m][n], high, y[n].low[i], y[n].low[i + 1]);
              multiply_tf32(acc[m][n], high, y[n].high[i], y[n].high[i + 1]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int r = m * 16 + below * 8 + line, seen = visible[r];
        float next = top[m][below];
        float own[kSquares][2];
#pragma unroll
        for (int n = 0; n < kSquares; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int c = column + own_column + n * 8 + j;
            own[n][j] =
                c < seen ? acc[m][n][below * 2 + j] * static_cast<float>(op.scale) : -INFINITY;
            if (r < count && c < columns) score[r * columns + c] = own[n][j];
            next = fmaxf(next, own[n][j]);
          }
        sum[m][below] *= expf(top[m][below] - next);
#pragma unroll
        for (int n = 0; n < kSquares; ++n)
          sum[m][below] += expf(own[n][0] - next) + expf(own[n][1] - next);
        top[m][below] = next;
      }
  }
  if (!op.softmax) return;
    // Four lanes and all warps have parts of a row
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const float most = quad_max(top[m][below]);
      const float total = quad_sum(sum[m][below] * expf(top[m][below] - most));
      if (quarter == 0) stats[warp][m * 16 + below * 8 + line] = {most, total};
    }
  // Nobody looks at means any more
  auto* bins = reinterpret_cast<uint32_t*>(smem_k);
  static_assert(sizeof smem_k >= kShareBins * sizeof *bins);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); args.bins && i < kShareBins; i += kPooledThreads)
    bins[i] = 0;
  __syncthreads();
  for (int r = warp; r < count; r += kPooledWarps) {
    float most = -3e38f, total = 0;
#pragma unroll
    for (int w = 0; w < kPooledWarps; ++w) most = fmaxf(most, stats[w][r].x);
#pragma unroll
    for (int w = 0; w < kPooledWarps; ++w) total += stats[w][r].y * expf(stats[w][r].x - most);
    const int seen = visible[r];
#pragma unroll 8
    for (int c = lane; c < seen; c += 32) {
      float& own = score[r * columns + c];
      if (own != -INFINITY) own = expf(own - most) / total;
      if (args.bins) atomicAdd(&bins[share_bin(own)], 1);
    }
  }
  if (!args.bins) return;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kShareBins; i += kPooledThreads)
    if (bins[i] != 0) atomicAdd(&args.bins[head * kShareBins + i], bins[i]);
}

}  // namespace
}  // namespace heddle
