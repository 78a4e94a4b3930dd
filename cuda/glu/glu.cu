#include "ops/glu.h"

#include "common/elements.cuh"
#include "core/slot.h"

namespace heddle {
namespace {

template <class T>
__global__ void glu_kernel(Strided gate, Strided up, T* out, int64_t count, int activation) {
  HEDDLE_EACH(i, count) {
    const float x = to_float(gate.at<T>(i));
    const float activated = activation == 0 ? x * sigmoid(x) : activation == 1 ? sigmoid(x) : x;
    out[i] = from_float<T>(activated * to_float(up.at<T>(i)));
  }
}

void run(const Glu& op, CudaContext& context) {
  const int64_t count = op.gate.size();
  if (count == 0) return;
  dispatch_float(op.gate.dtype, [&]<class T>(T) {
    glu_kernel<T><<<blocks_for(count, context), kThreads, 0, context.stream>>>(
        Strided(op.gate), Strided(op.up), op.out.as<T>(), count, op.activation);
  });
  context.launched("glu_kernel");
}

HEDDLE_REGISTER(Glu);

}  // namespace
}  // namespace heddle
