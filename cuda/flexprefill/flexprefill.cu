#include "core/flexprefill.h"

#include "common/elements.cuh"
#include "common/team.cuh"
#include "core/registry.h"

namespace heddle {
namespace {

// A CTA per head, all heads at once
__global__ void __launch_bounds__(kThreads) flexprefill_kernel(FlexPrefill op) {
  __shared__ FlexMemory memory;
  flexprefill_head(CtaTeam{}, op, blockIdx.x, memory);
}

void run(const FlexPrefill& op, CudaContext& context) {
  const int64_t heads = op.map.shape[0] * op.map.shape[1];
  if (heads == 0) return;
  flexprefill_kernel<<<static_cast<unsigned>(heads), kThreads, 0, context.stream>>>(op);
  context.launched("flexprefill_kernel");
}

HEDDLE_REGISTER(FlexPrefill);

}  // namespace
}  // namespace heddle
