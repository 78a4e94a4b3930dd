#include "probe/pooled.h"

#include "common/elements.cuh"

// Scores of pooled blocks: the mean of every block once, limited by memory, then
//
//   score[r,c] = scale * mean_q[r,e] * mean_k[c,e]     where block c begins before row r ends
//
// in f32, 32 rows times 64 columns at a time, 64 numbers of a mean deep. A CTA has its rows to the
// end and makes them probabilities itself.
namespace heddle {
namespace {

constexpr int kTileRows = 32, kTileColumns = 64, kDepth = 64;

struct PooledArgs {
  Probe op;
  float *mean_q, *mean_k;  // [b, heads, blocks, d]
};

// A CTA per block and head. Threads side by side share a row, kCount elements each
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads)
    probe_means_kernel(const __grid_constant__ Tensor x, int64_t block, float* mean) {
  struct alignas(sizeof(T) * kCount) Piece {
    T values[kCount];
  };
  __shared__ float sums[kThreads * kCount];
  const int64_t rows = x.shape[1], heads = x.shape[2], blocks = (rows + block - 1) / block;
  const int64_t index = blockIdx.x, first = index % blocks * block, head = index / blocks % heads;
  const int64_t end = min(first + block, rows);
  const int d = static_cast<int>(x.shape[3]), pieces = d / kCount, lines = kThreads / pieces;
  const int line = static_cast<int>(threadIdx.x) / pieces,
            piece = static_cast<int>(threadIdx.x) % pieces;
  const T* from = static_cast<T*>(x.data) + index / blocks / heads * x.strides[0] +
                  head * x.strides[2] + piece * kCount * x.strides[3];
  if (line < lines) {
    float sum[kCount] = {};
#pragma unroll 8
    for (int64_t i = first + line; i < end; i += lines) {
      const Piece own = *reinterpret_cast<const Piece*>(from + i * x.strides[1]);
#pragma unroll
      for (int e = 0; e < kCount; ++e) sum[e] += to_float(own.values[e]);
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) sums[line * d + piece * kCount + e] = sum[e];
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < d; e += kThreads) {
    float sum = 0;
    for (int i = 0; i < lines; ++i) sum += sums[i * d + e];
    mean[index * d + e] = sum / static_cast<float>(end - first);
  }
}

__device__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ void normalise(float* score, int64_t count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float top = -INFINITY, sum = 0;
  for (int64_t c = lane; c < count; c += 32) top = fmaxf(top, score[c]);
  top = warp_max(top);
  for (int64_t c = lane; c < count; c += 32)
    if (score[c] != -INFINITY) sum += expf(score[c] - top);
  sum = warp_sum(sum);
  for (int64_t c = lane; c < count; c += 32)
    if (score[c] != -INFINITY) score[c] = expf(score[c] - top) / sum;
}

__global__ void __launch_bounds__(kThreads)
    probe_pooled_kernel(const __grid_constant__ PooledArgs args) {
  __shared__ __align__(16) float smem_q[kTileRows][kDepth + 4], smem_k[kTileColumns][kDepth + 4];
  constexpr int kWarpRows = kTileRows / (kThreads / kTileColumns);
  const Probe& op = args.op;
  const int64_t heads = op.q.shape[2], rows = op.score.shape[2], columns = op.score.shape[3];
  const int64_t sq = op.q.shape[1], sk = op.k.shape[1], d = op.q.shape[3];
  // Long rows first
  const int64_t head = blockIdx.x % (op.q.shape[0] * heads);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t row = (tiles - 1 - blockIdx.x / (op.q.shape[0] * heads)) * kTileRows;
  const int64_t kv_head = head / (heads / op.k.shape[2]);  // over the batch as well
  const float *mean_q = args.mean_q + head * rows * d,
              *mean_k = args.mean_k + kv_head * columns * d;
  float* score = static_cast<float*>(op.score.data) + head * rows * columns;
  const auto visible = [&](int64_t r) {
    const int64_t keys = sk - sq + min((r + 1) * op.block_q, sq);
    return (keys + op.block_k - 1) / op.block_k;
  };
  const int64_t last = min(row + kTileRows, rows) - 1, end = visible(last);
  const int own_column = static_cast<int>(threadIdx.x) % kTileColumns;
  const int own_row = static_cast<int>(threadIdx.x) / kTileColumns * kWarpRows;
  const auto fetch = [&](auto& smem, int size, const float* from, int64_t at, int64_t count,
                         int64_t e0) {
    for (int i = static_cast<int>(threadIdx.x); i < size * kDepth; i += kThreads) {
      const int r = i / kDepth, e = i % kDepth;
      smem[r][e] = at + r < count && e0 + e < d ? from[(at + r) * d + e0 + e] : 0;
    }
  };
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    float acc[kWarpRows] = {};
    for (int64_t e0 = 0; e0 < d && column < end; e0 += kDepth) {
      __syncthreads();
      fetch(smem_q, kTileRows, mean_q, row, rows, e0);
      fetch(smem_k, kTileColumns, mean_k, column, columns, e0);
      __syncthreads();
      if (row + own_row > last) continue;
#pragma unroll 4
      for (int e = 0; e < kDepth; e += 4) {
        const float4 y = *reinterpret_cast<const float4*>(&smem_k[own_column][e]);
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
          const float4 x = *reinterpret_cast<const float4*>(&smem_q[own_row + r][e]);
          acc[r] = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, acc[r]))));
        }
      }
    }
    const int64_t c = column + own_column;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int64_t its = row + own_row + r;
      if (its <= last && c < columns)
        score[its * columns + c] =
            c < visible(its) ? acc[r] * static_cast<float>(op.scale) : -INFINITY;
    }
  }
  if (!op.softmax) return;
  __syncthreads();
  for (int64_t r = row + threadIdx.x / 32; r <= last; r += kThreads / 32)
    normalise(score + r * columns, visible(r));
}

template <class T> bool moves_wide(const Tensor& x) {
  for (int i = 0; i < 3; ++i)
    if (!Wide<T>::fits(x.data, x.shape[3], x.strides[i])) return false;
  return x.strides[3] == 1;
}

void average(const Tensor& x, int64_t block, float* mean, CudaContext& context) {
  const int64_t ctas = x.shape[0] * x.shape[2] * ((x.shape[1] + block - 1) / block);
  HEDDLE_CHECK(ctas < INT32_MAX, kUnsupported, "block", "block gives too many for one call");
  dispatch_float(x.dtype, [&]<class T>(T) {
    auto* kernel =
        moves_wide<T>(x) ? probe_means_kernel<T, Wide<T>::kCount> : probe_means_kernel<T, 1>;
    kernel<<<static_cast<unsigned>(ctas), kThreads, 0, context.stream>>>(x, block, mean);
  });
  context.launched("probe_means_kernel");
}

}  // namespace

void run_pooled(const Probe& op, CudaContext& context) {
  const int64_t heads = op.q.shape[0] * op.q.shape[2], d = op.q.shape[3];
  const int64_t rows = op.score.shape[2], columns = op.score.shape[3];
  const PooledArgs args{
      op, context.scratch<float>(static_cast<size_t>(heads * rows * d)),
      context.scratch<float>(static_cast<size_t>(op.k.shape[0] * op.k.shape[2] * columns * d))};
  average(op.q, op.block_q, args.mean_q, context);
  average(op.k, op.block_k, args.mean_k, context);
  const int64_t ctas = heads * ((rows + kTileRows - 1) / kTileRows);
  probe_pooled_kernel<<<static_cast<unsigned>(ctas), kThreads, 0, context.stream>>>(args);
  context.launched("probe_pooled_kernel");
}

}  // namespace heddle
