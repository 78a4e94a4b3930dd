#include "core/keep.h"

#include "core/cpu_context.h"
#include "core/registry.h"
#include "cpu/simd.h"
#include "cpu/team.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

void run(const Keep& op, CpuContext& context) {
  const int64_t rows = op.score.shape[2], heads = op.score.shape[0] * op.score.shape[1];
  if (op.score.size() == 0) return;
  const int64_t parts = op.over_map ? 1 : rows;
  context.parallel(heads * parts, [&](int64_t index, int) {
    KeepMemory memory;
    keep_part(Alone{}, op, index / parts, index % parts, rows / parts, memory);
  });
}

HEDDLE_REGISTER(Keep);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
