#include "attention/backward_sm90.cuh"

namespace heddle {
template void launch_backward_sm90<DType::kBF16, 128, false>(const BackwardCall&, cudaStream_t);
template void launch_backward_sm90<DType::kBF16, 128, true>(const BackwardCall&, cudaStream_t);
template void launch_backward_sm90<DType::kBF16, 128, false, true>(const BackwardCall&,
                                                                   cudaStream_t);
template void launch_backward_sm90<DType::kF16, 128, false>(const BackwardCall&, cudaStream_t);
template void launch_backward_sm90<DType::kF16, 128, true>(const BackwardCall&, cudaStream_t);
template void launch_backward_sm90<DType::kF16, 128, false, true>(const BackwardCall&,
                                                                  cudaStream_t);
}  // namespace heddle
