#pragma once
#include <cmath>

#include "common/elements.cuh"
#include "core/select.h"
#include "ops/probe.h"
#include "probe/means.h"

// Scores of pooled blocks: the mean of every block once, limited by memory, then
//
//   score[r,c] = scale * mean_q[r,e] * mean_k[c,e]     where block c begins before row r ends
//
// in f32, 32 rows times 128 columns at a time, 64 numbers of a mean deep. A CTA has its rows to the
// end, and a warp 8 of them, which it makes probabilities itself. A thread has 8 by 4 scores: what
// it reads of shared memory takes less time than its products.
namespace heddle {
namespace {

constexpr int kMeanThreads = 256, kPooledThreads = 128;
constexpr int kTileRows = 32, kTileColumns = 128, kDepth = 64;
constexpr int kWarpRows = kTileRows / (kPooledThreads / 32), kLaneColumns = kTileColumns / 32;

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
  const auto [first, rows, to] = args.at(static_cast<uint32_t>(cta));
  const int d = static_cast<int>(x.shape[3]), pieces = d / kCount, lines = kMeanThreads / pieces;
  const int line = static_cast<int>(threadIdx.x) / pieces,
            piece = static_cast<int>(threadIdx.x) % pieces;
  const T* from = static_cast<T*>(x.data) + first + piece * kCount * x.strides[3];
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
  float* mean = args.mean + to;
  for (int e = static_cast<int>(threadIdx.x); e < args.depth; e += kMeanThreads) {
    float sum = 0;
    for (int i = 0; e < d && i < lines; ++i) sum += sums[i * d + e];
    mean[e] = sum / static_cast<float>(rows);
  }
}

// Both tensors in one launch
template <class T, int kCount>
__global__ void __launch_bounds__(kMeanThreads)
    probe_means_kernel(const __grid_constant__ MeanArgs q, const __grid_constant__ MeanArgs k,
                       int ctas_of_q) {
  const bool first = static_cast<int>(blockIdx.x) < ctas_of_q;
  average_block<T, kCount>(first ? q : k, blockIdx.x - (first ? 0 : ctas_of_q));
}

__global__ void __launch_bounds__(kPooledThreads, 4)
    probe_pooled_kernel(const __grid_constant__ PooledArgs args) {
  __shared__ float4 smem_q[kTileRows][kDepth / 4 + 1], smem_k[kTileColumns][kDepth / 4 + 1];
  const Probe& op = args.op;
  const int64_t heads = op.q.shape[2], rows = op.score.shape[2], columns = op.score.shape[3];
  const int64_t sq = op.q.shape[1], sk = op.k.shape[1], depth = args.depth;
  // Long rows first
  const int64_t head = blockIdx.x % (op.q.shape[0] * heads);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t row = (tiles - 1 - blockIdx.x / (op.q.shape[0] * heads)) * kTileRows;
  const int64_t kv_head = head / (heads / op.k.shape[2]);  // over the batch as well
  const float *mean_q = args.mean_q + head * rows * depth,
              *mean_k = args.mean_k + kv_head * columns * depth;
  const auto visible = [&](int64_t r) {
    const int64_t keys = sk - sq + min((r + 1) * op.block_q, sq);
    return (keys + op.block_k - 1) / op.block_k;
  };
  const int64_t last = min(row + kTileRows, rows) - 1, end = visible(last);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int own_row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  float* score =
      static_cast<float*>(op.score.data) + (head * rows + row + own_row) * columns + lane;
  int seen[kWarpRows];  // columns of a row
  float top[kWarpRows], sum[kWarpRows];
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    seen[r] = static_cast<int>(visible(row + own_row + r));
    top[r] = -3e38f;
    sum[r] = 0;
  }
  const auto fetch = [&](auto& smem, int size, const float* from, int64_t at, int64_t count,
                         int64_t e0) {
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < size * kDepth / 4; i += kPooledThreads) {
      const int r = i / (kDepth / 4), e = i % (kDepth / 4);
      const bool inside = at + r < count && e0 + 4 * e < depth;
      smem[r][e] = inside ? *reinterpret_cast<const float4*>(from + (at + r) * depth + e0 + 4 * e)
                          : float4{0, 0, 0, 0};
    }
  };
  for (int column = 0; column < columns; column += kTileColumns) {
    float acc[kWarpRows][kLaneColumns] = {};
    for (int64_t e0 = 0; e0 < depth && column < end; e0 += kDepth) {
      __syncthreads();
      fetch(smem_q, kTileRows, mean_q, row, rows, e0);
      fetch(smem_k, kTileColumns, mean_k, column, columns, e0);
      __syncthreads();
      if (row + own_row > last) continue;
#pragma unroll 1
      for (int e = 0; e < kDepth / 4; ++e) {
        float4 y[kLaneColumns];
#pragma unroll
        for (int j = 0; j < kLaneColumns; ++j) y[j] = smem_k[lane + 32 * j][e];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
          const float4 x = smem_q[own_row + r][e];
#pragma unroll
          for (int j = 0; j < kLaneColumns; ++j)
            acc[r][j] = fmaf(x.x, y[j].x,
                             fmaf(x.y, y[j].y, fmaf(x.z, y[j].z, fmaf(x.w, y[j].w, acc[r][j]))));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      if (row + own_row + r > last) break;
      float next = top[r];
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        const int c = column + lane + 32 * j;
        acc[r][j] = c < seen[r] ? acc[r][j] * static_cast<float>(op.scale) : -INFINITY;
        if (c < columns) score[r * columns + column + 32 * j] = acc[r][j];
        next = fmaxf(next, acc[r][j]);
      }
      sum[r] *= expf(top[r] - next);
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) sum[r] += expf(acc[r][j] - next);
      top[r] = next;
    }
  }
  if (!op.softmax) return;
  // Nobody looks at means any more
  auto* bins = reinterpret_cast<uint32_t*>(smem_k);
  static_assert(sizeof smem_k >= kShareBins * sizeof *bins);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kShareBins; i += kPooledThreads) bins[i] = 0;
  __syncthreads();
  // A lane finds its own scores again
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    if (row + own_row + r > last) break;
    float most = top[r];
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    float total = sum[r] * expf(top[r] - most);
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
#pragma unroll 8
    for (int c = 0; c < seen[r] - lane; c += 32) {
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
