#include "ops/elementwise.h"

#include "common/elements.cuh"
#include "core/slot.h"

namespace heddle {
namespace {

template <class T>
__global__ void elementwise_kernel(Strided x, Strided y, T* out, int64_t count, int function) {
  HEDDLE_EACH(i, count) {
    const float a = to_float(x.at<T>(i));
    float result;
    if (function == Elementwise::kAdd) {
      result = a + to_float(y.at<T>(i));
    } else if (function == Elementwise::kMul) {
      result = a * to_float(y.at<T>(i));
    } else {
      result = (function == Elementwise::kSilu ? a : 1) * sigmoid(a);
    }
    out[i] = from_float<T>(result);
  }
}

void run(const Elementwise& op, CudaContext& context) {
  const int64_t count = op.x.size();
  if (count == 0) return;
  dispatch_float(op.x.dtype, [&]<class T>(T) {
    elementwise_kernel<T><<<blocks_for(count, context), kThreads, 0, context.stream>>>(
        Strided(op.x), Strided(op.y ? op.y : op.x), op.out.as<T>(), count, op.function);
  });
  context.launched("elementwise_kernel");
}

HEDDLE_REGISTER(Elementwise);

}  // namespace
}  // namespace heddle
