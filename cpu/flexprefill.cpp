#include "core/flexprefill.h"

#include <deque>

#include "core/cpu_context.h"
#include "core/registry.h"
#include "cpu/team.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

void run(const FlexPrefill& op, CpuContext& context) {
  std::deque<Scratch<float>> memory;
  const FlexTask task(
      op, [&](int64_t count) { return memory.emplace_back(static_cast<size_t>(count)).data(); });
  if (task.heads == 0) return;
  const auto probe = [&](const Probe& own) { operator_entry(Probe::kName).cpu(&own, context); };
  probe(task.probe_lines());
  probe(task.probe_map());
  if (!task.whole) probe(task.probe_estimate());
  context.parallel(task.heads, [&](int64_t head, int) {
    for (int64_t line = 0; line < 2; ++line)
      for (int64_t c = 0; c < task.nk; ++c) {
        const FlexSum sum(task, head, line, c);
        *sum.to = 0;
        for (int64_t i = 0; i < sum.count; ++i) *sum.to += sum.from[i] * sum.weight(i);
      }
    FlexMemory own;
    const Alone alone;
    const FlexKind kind = flexprefill_decide(alone, task, head, own);
    flexprefill_head(alone, alone, task, head, kind, own, FlexFinder{});
  });
}

HEDDLE_REGISTER(FlexPrefill);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
