#include "lightning/backward_sm90.cuh"

namespace heddle {
template void launch_sweep_sm90<DType::kBF16, 128>(const SweepCall&, const ScanPlan&, cudaStream_t);
template void launch_sweep_sm90<DType::kF16, 128>(const SweepCall&, const ScanPlan&, cudaStream_t);
}  // namespace heddle
