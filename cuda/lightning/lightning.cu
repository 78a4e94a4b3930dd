#include "ops/lightning.h"

#include "common/variants.h"
#include "core/slot.h"
#include "lightning/scan_call.h"
#include "lightning/scan_portable.cuh"

namespace heddle {
namespace {

ScanCall hopper_call(const Lightning& op, const CudaContext& context) {
  ScanCall call = scan_call(op, context);
  call.out = op.out.data;
  call.schedule = op.schedule;
  set_initial_state(call, op.initial_state);
  call.state = op.state ? op.state.as<float>() : nullptr;
  return call;
}

const char* declines_hopper(const Lightning& op, const CudaContext& context) {
  if (const char* reason = declines_scan_options(op, context)) return reason;
  return declines_scan_sm90(hopper_call(op, context));
}

void run_hopper(const Lightning& op, CudaContext& context) {
  ScanCall call = hopper_call(op, context);
  const ScanPlan plan = plan_scan_sm90(call);
  if (plan.summed > 0)
    call.summaries = context.scratch<float>(static_cast<size_t>(plan.summary_size(call)));
  call.fault = context.fault(scan_fault_text(op.cu_seqlens));
  scan_sm90(call, plan, context.stream);
  context.launched("lightning_sm90_kernel");
}

const char* declines_portable(const Lightning&, const CudaContext&) { return nullptr; }

void run_portable(const Lightning& op, CudaContext& context) {
  PortableArgs args = portable_args(op, context.fault(scan_fault_text(op.cu_seqlens)));
  if (op.initial_state) args.initial_state = Strided(op.initial_state);
  args.has_initial = bool(op.initial_state);
  args.out = op.out.data;
  args.state = op.state ? op.state.as<float>() : nullptr;
  dispatch_float(op.q.dtype, [&]<class T>(T) { launch_scan<T, T, false>(args, context); });
}

constexpr Variant<Lightning> kVariants[] = {
    {"sm90_wgmma", declines_hopper, run_hopper},
    {"sm80_simt", declines_portable, run_portable},
};

void run(const Lightning& op, CudaContext& context) {
  if (op.out.size() > 0 || op.state) run_variants(kVariants, op, context);
}

HEDDLE_REGISTER(Lightning);
HEDDLE_EXPLAIN(Lightning, kVariants);

}  // namespace
}  // namespace heddle
