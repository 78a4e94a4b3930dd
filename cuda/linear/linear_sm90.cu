#include "linear/linear_sm90.cuh"

namespace heddle {
template void launch_linear_sm90<DType::kBF16>(const LinearCall&, cudaStream_t);
template void launch_linear_sm90<DType::kF16>(const LinearCall&, cudaStream_t);
}  // namespace heddle
