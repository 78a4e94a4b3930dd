#include "attention/forward_sm90.cuh"

namespace heddle {
template void launch_forward_sm90<DType::kBF16, 192, 128, Form::kPlain>(const ForwardCall&,
                                                                        cudaStream_t);
template void launch_forward_sm90<DType::kBF16, 192, 128, Form::kMapped>(const ForwardCall&,
                                                                         cudaStream_t);
template void launch_forward_sm90<DType::kF16, 192, 128, Form::kPlain>(const ForwardCall&,
                                                                       cudaStream_t);
template void launch_forward_sm90<DType::kF16, 192, 128, Form::kMapped>(const ForwardCall&,
                                                                        cudaStream_t);
template void launch_forward_sm90<DType::kBF16, 192, 192, Form::kPlain>(const ForwardCall&,
                                                                        cudaStream_t);
template void launch_forward_sm90<DType::kBF16, 192, 192, Form::kMapped>(const ForwardCall&,
                                                                         cudaStream_t);
template void launch_forward_sm90<DType::kF16, 192, 192, Form::kPlain>(const ForwardCall&,
                                                                       cudaStream_t);
template void launch_forward_sm90<DType::kF16, 192, 192, Form::kMapped>(const ForwardCall&,
                                                                        cudaStream_t);
}  // namespace heddle
