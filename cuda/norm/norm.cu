#include "ops/norm.h"

#include "common/elements.cuh"
#include "core/registry.h"

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

void run(const Norm& op, CudaContext& context) {
  const int64_t d = op.x.shape[op.x.rank - 1];
  if (op.x.size() == 0) return;
  const int64_t rows = op.x.size() / d;
  dispatch_float(op.x.dtype, [&]<class T>(T) {
    norm_kernel<T><<<blocks_for(rows * 32, context), kThreads, 0, context.stream>>>(
        Strided(op.x), op.weight ? op.weight.as<T>() : nullptr, op.weight.strides[0],
        op.out.as<T>(), rows, d, static_cast<float>(op.eps));
  });
  context.launched("norm_kernel");
}

HEDDLE_REGISTER(Norm);

}  // namespace
}  // namespace heddle
