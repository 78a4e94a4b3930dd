#include "ops/einsum.h"

#include "common/elements.cuh"
#include "core/einsum.h"
#include "core/slot.h"

namespace heddle {
namespace {

// One thread per coordinate: the plan of what no kernel fuses, for its result and not for speed
__global__ void einsum_kernel(const int64_t* words, int64_t length, int64_t count, int64_t step,
                              float* work, int64_t size, int* fault) {
  HEDDLE_EACH(i, count) {
    if (!einsum::run(words, length, i, step, work, size)) *fault = 1;
  }
}

void run(const Einsum& op, CudaContext& context) {
  if (op.count == 0) return;
  int* fault = context.fault("program must be a statement");
  einsum_kernel<<<blocks_for(op.count, context), kThreads, 0, context.stream>>>(
      op.program.as<int64_t>() + op.start, op.program.shape[0] - op.start, op.count, op.step,
      op.work.as<float>(), op.work.shape[0], fault);
  context.launched("einsum_kernel");
}

HEDDLE_REGISTER(Einsum);

}  // namespace
}  // namespace heddle
