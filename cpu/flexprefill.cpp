#include "core/flexprefill.h"

#include "core/cpu_context.h"
#include "core/registry.h"
#include "cpu/team.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

void run(const FlexPrefill& op, CpuContext& context) {
  context.parallel(op.map.shape[0] * op.map.shape[1], [&](int64_t head, int) {
    for (int64_t line = 0; line < 2; ++line)
      for (int64_t c = 0; c < op.map.shape[3]; ++c) {
        const FlexSum sum(op, head, line, c);
        *sum.to = 0;
        for (int64_t i = 0; i < sum.count; ++i) *sum.to += sum(i);
      }
    FlexMemory memory;
    flexprefill_head(Alone{}, Alone{}, op, head, memory);
  });
}

HEDDLE_REGISTER(FlexPrefill);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
