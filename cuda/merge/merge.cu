#include "ops/merge.h"

#include "common/elements.cuh"
#include "core/slot.h"

namespace heddle {
namespace {

// One warp per row of d numbers. A side without weight is not read: it may hold anything.
template <class T>
__global__ void merge_kernel(Strided out_a, Strided lse_a, Strided out_b, Strided lse_b, T* out,
                             float* lse) {
  const int64_t tokens = out_a.shape[1], heads = out_a.shape[2], d = out_a.shape[3];
  const int64_t rows = out_a.shape[0] * tokens * heads;
  const int lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  for (int64_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < rows; row += warps) {
    const int64_t h = row % heads, s = row / heads % tokens, b = row / heads / tokens;
    const int64_t statistic = (b * heads + h) * tokens + s;
    const float a = lse_a.at<float>(statistic), c = lse_b.at<float>(statistic);
    const float top = a > c || isnan(a) ? a : c;
    const bool empty = top == -INFINITY;
    const float weight_a = empty ? 0 : expf(a - top), weight_b = empty ? 0 : expf(c - top);
    const float sum = weight_a + weight_b;
    if (lane == 0) lse[statistic] = empty ? -INFINITY : top + logf(sum);
    for (int64_t i = lane; i < d; i += 32) {
      const float left = weight_a == 0 ? 0 : weight_a * to_float(out_a.at<T>(row * d + i));
      const float right = weight_b == 0 ? 0 : weight_b * to_float(out_b.at<T>(row * d + i));
      out[row * d + i] = from_float<T>(empty ? 0 : (left + right) / sum);
    }
  }
}

void run(const Merge& op, CudaContext& context) {
  if (op.lse.size() == 0) return;
  dispatch_float(op.out.dtype, [&]<class T>(T) {
    merge_kernel<T><<<blocks_for(op.lse.size() * 32, context), kThreads, 0, context.stream>>>(
        Strided(op.out_a), Strided(op.lse_a), Strided(op.out_b), Strided(op.lse_b), op.out.as<T>(),
        op.lse.as<float>());
  });
  context.launched("merge_kernel");
}

HEDDLE_REGISTER(Merge);

}  // namespace
}  // namespace heddle
