#pragma once
#include <string>

#include "common/context.h"
#include "core/error.h"
#include "core/explain.h"

namespace heddle {

// One way to run an operator, of a table that lists them best first. `declines` returns why it
// can't take a call, or null.
template <class Op> struct Variant {
  const char* name;
  const char* (*declines)(const Op& op, const CudaContext& context);
  void (*run)(const Op& op, CudaContext& context);
};

// Runs the first variant that does not decline; if all do, the error lists every reason
template <class Op, size_t N>
void run_variants(const Variant<Op> (&table)[N], const Op& op, CudaContext& context) {
  for (const Variant<Op>& variant : table)
    if (!variant.declines(op, context)) return variant.run(op, context);
  // asked again, as a call that is taken has no time for texts
  std::string reasons;
  for (const Variant<Op>& variant : table)
    reasons +=
        concat(reasons.empty() ? "" : "; ", variant.name, ": ", variant.declines(op, context));
  fail(Code::kUnsupported, "",
       concat("no kernel takes this call on sm_", context.arch, " (", reasons, ")"));
}

// A device to ask about: nothing can be enqueued or allocated
class IdleContext final : public CudaContext {
 public:
  explicit IdleContext(const DeviceInfo& device);
  int* fault(const char* text) override;
  int* verdict(const char* text) override;
  int* counters(size_t count) override;

 private:
  void* scratch_bytes(size_t nbytes) override;
};

// Which variant of a table would run
template <class Op, const auto& kTable>
Explanation explain_variants(const void* arguments, const DeviceInfo& device) {
  const IdleContext context(device);
  Explanation explanation;
  for (const Variant<Op>& variant : kTable) {
    const char* reason = variant.declines(*static_cast<const Op*>(arguments), context);
    if (!reason) {
      explanation.variant = variant.name;
      break;
    }
    explanation.declined.push_back({variant.name, reason});
  }
  return explanation;
}

}  // namespace heddle

// Lets `explain` see a table of variants, beside HEDDLE_REGISTER
#define HEDDLE_EXPLAIN(Op, table)                                           \
  [[maybe_unused]] static const bool HEDDLE_JOIN(explained_, __COUNTER__) = \
      ::heddle::register_explain(Op::kName, ::heddle::explain_variants<Op, table>)
