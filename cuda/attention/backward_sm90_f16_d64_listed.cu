#include "attention/backward_sm90.cuh"

namespace heddle {
template void launch_backward_sm90<DType::kF16, 64, false, true>(const BackwardCall&, cudaStream_t);
}  // namespace heddle
