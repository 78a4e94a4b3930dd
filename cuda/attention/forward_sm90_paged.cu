#include "attention/forward_sm90.cuh"

namespace heddle {
template void launch_forward_sm90<DType::kBF16, 64, 64, Form::kPlain, Layout::kPaged>(
    const ForwardCall&, cudaStream_t);
template void launch_forward_sm90<DType::kF16, 64, 64, Form::kPlain, Layout::kPaged>(
    const ForwardCall&, cudaStream_t);
template void launch_forward_sm90<DType::kBF16, 128, 128, Form::kPlain, Layout::kPaged>(
    const ForwardCall&, cudaStream_t);
template void launch_forward_sm90<DType::kF16, 128, 128, Form::kPlain, Layout::kPaged>(
    const ForwardCall&, cudaStream_t);
}  // namespace heddle
