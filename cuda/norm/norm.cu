#include "ops/norm.h"

#include "common/elements.cuh"
#include "common/lanes.cuh"
#include "core/slot.h"

namespace heddle {
namespace {

// One warp per row, which it reads twice: the second time from the cache
template <class T>
__global__ void norm_kernel(Strided x, const T* weight, int64_t weight_stride, T* out, int64_t rows,
                            int64_t d, float eps) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  for (int64_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < rows; row += warps) {
    float square = 0;
    for (int64_t i = lane; i < d; i += 32) {
      const float value = to_float(x.at<T>(row * d + i));
      square += value * value;
    }
    const float factor = 1 / sqrtf(warp_sum(square) / static_cast<float>(d) + eps);
    for (int64_t i = lane; i < d; i += 32) {
      const float scale = weight ? to_float(weight[i * weight_stride]) : 1;
      out[row * d + i] = from_float<T>(to_float(x.at<T>(row * d + i)) * factor * scale);
    }
  }
}

// The same by 16 bytes
template <class T>
__global__ void norm_wide_kernel(const Wide<T>* x, const Wide<T>* weight, Wide<T>* out,
                                 int64_t rows, int64_t d, float eps) {
  constexpr int kCount = Wide<T>::kCount;
  const int lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32), wides = d / kCount;
  for (int64_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < rows; row += warps) {
    const Wide<T>* from = x + row * wides;
    float square = 0;
#pragma unroll 4
    for (int64_t i = lane; i < wides; i += 32) {
      const Wide<T> wide = from[i];
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const float value = to_float(wide.values[e]);
        square += value * value;
      }
    }
    const float factor = 1 / sqrtf(warp_sum(square) / static_cast<float>(d) + eps);
#pragma unroll 4
    for (int64_t i = lane; i < wides; i += 32) {
      Wide<T> wide = from[i];
      const Wide<T> scale = weight ? weight[i] : Wide<T>{};
#pragma unroll
      for (int e = 0; e < kCount; ++e)
        wide.values[e] = from_float<T>(to_float(wide.values[e]) * factor *
                                       (weight ? to_float(scale.values[e]) : 1));
      out[row * wides + i] = wide;
    }
  }
}

void run(const Norm& op, CudaContext& context) {
  const int64_t d = op.x.shape[op.x.rank - 1];
  if (op.x.size() == 0) return;
  const int64_t rows = op.x.size() / d;
  dispatch_float(op.x.dtype, [&]<class T>(T) {
    const Strided x(op.x);
    if (x.contiguous && Wide<T>::fits(x.data, d, 0) && Wide<T>::fits(op.out.data, d, 0) &&
        (!op.weight || (op.weight.strides[0] == 1 && Wide<T>::fits(op.weight.data, d, 0)))) {
      norm_wide_kernel<<<blocks_for(rows * 32, context), kThreads, 0, context.stream>>>(
          op.x.as<const Wide<T>>(), op.weight ? op.weight.as<const Wide<T>>() : nullptr,
          op.out.as<Wide<T>>(), rows, d, static_cast<float>(op.eps));
      return;
    }
    norm_kernel<T><<<blocks_for(rows * 32, context), kThreads, 0, context.stream>>>(
        x, op.weight ? op.weight.as<T>() : nullptr, op.weight.strides[0], op.out.as<T>(), rows, d,
        static_cast<float>(op.eps));
  });
  context.launched("norm_kernel");
}

HEDDLE_REGISTER(Norm);

}  // namespace
}  // namespace heddle
