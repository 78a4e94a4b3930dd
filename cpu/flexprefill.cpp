#include "core/flexprefill.h"

#include "core/cpu_context.h"
#include "core/registry.h"
#include "cpu/team.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

void run(const FlexPrefill& op, CpuContext& context) {
  context.parallel(op.map.shape[0] * op.map.shape[1], [&](int64_t head, int) {
    FlexMemory memory;
    flexprefill_head(Alone{}, op, head, memory);
  });
}

HEDDLE_REGISTER(FlexPrefill);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
