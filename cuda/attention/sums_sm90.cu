#include "attention/sums_sm90.cuh"

namespace heddle {
template void launch_sums_sm90<DType::kBF16, false>(const ForwardCall&, cudaStream_t);
template void launch_sums_sm90<DType::kF16, false>(const ForwardCall&, cudaStream_t);
template void launch_sums_sm90<DType::kF16, true>(const ForwardCall&, cudaStream_t);
}  // namespace heddle
