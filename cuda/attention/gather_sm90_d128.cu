#include "attention/gather_sm90.cuh"

namespace heddle {
template void launch_gather_sm90<DType::kBF16, 128>(const GatherCall&, cudaStream_t);
template void launch_gather_sm90<DType::kF16, 128>(const GatherCall&, cudaStream_t);
}  // namespace heddle
