#include "lightning/forward_sm90.cuh"

namespace heddle {
template void launch_scan_sm90<DType::kBF16, 192, 64>(const ScanCall&, const ScanPlan&,
                                                      cudaStream_t);
template void launch_scan_sm90<DType::kF16, 192, 64>(const ScanCall&, const ScanPlan&,
                                                     cudaStream_t);
}  // namespace heddle
