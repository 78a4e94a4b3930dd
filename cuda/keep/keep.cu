#include "core/keep.h"

#include "common/elements.cuh"
#include "common/team.cuh"
#include "core/slot.h"

namespace heddle {
namespace {

// A CTA per row, or per head where the rule holds for its map
__global__ void __launch_bounds__(kThreads) keep_kernel(Keep op) {
  __shared__ KeepMemory memory;
  const int64_t rows = op.score.shape[2], parts = op.over_map ? 1 : rows;
  keep_part(CtaTeam{}, op, blockIdx.x / parts, blockIdx.x % parts, rows / parts, memory);
}

void run(const Keep& op, CudaContext& context) {
  if (op.score.size() == 0) return;
  const int64_t parts = op.over_map ? 1 : op.score.shape[2];
  const int64_t ctas = op.score.shape[0] * op.score.shape[1] * parts;
  HEDDLE_CHECK(ctas < INT32_MAX, kUnsupported, "score", "score has too many rows for one call");
  keep_kernel<<<static_cast<unsigned>(ctas), kThreads, 0, context.stream>>>(op);
  context.launched("keep_kernel");
}

HEDDLE_REGISTER(Keep);

}  // namespace
}  // namespace heddle
