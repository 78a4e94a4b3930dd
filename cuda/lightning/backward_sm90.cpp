#include "lightning/backward_sm90.h"

namespace heddle {

ScanPlan plan_sweep_sm90(const SweepCall& call) {
  ScanPlan plan{};
  plan.rows = plan.columns = std::max(call.d, call.e) <= 64 ? 64 : 128;
  plan.slices = plan.parts = 1;
  plan.cut(call, plan.segments_for(call, call.heads * call.sequences));
  // segments but the first are summed up, and the first come first
  if (plan.segments > 1) plan.summed = plan.slots;
  return plan;
}

const char* declines_sweep_sm90(const ScanCall& call) {
  if (call.d > 128 || call.e > 128) return "d and e must be at most 128";
  if (call.hq != call.heads) return "values must not share a query head";
  return nullptr;
}

void sweep_sm90(const SweepCall& call, const ScanPlan& plan, cudaStream_t stream) {
  const auto pick = [&]<DType kType>() {
    plan.rows == 64 ? launch_sweep_sm90<kType, 64>(call, plan, stream)
                    : launch_sweep_sm90<kType, 128>(call, plan, stream);
  };
  call.dtype == DType::kF16 ? pick.operator()<DType::kF16>() : pick.operator()<DType::kBF16>();
}

}  // namespace heddle
