#include "attention/forward_sm90.cuh"

namespace heddle {
template void launch_forward_sm90<DType::kF16, 128, 128, Form::kPlain>(const ForwardCall&,
                                                                       cudaStream_t);
template void launch_forward_sm90<DType::kF16, 128, 128, Form::kMapped>(const ForwardCall&,
                                                                        cudaStream_t);
template void launch_forward_sm90<DType::kF16, 128, 128, Form::kSloped>(const ForwardCall&,
                                                                        cudaStream_t);
template void launch_forward_sm90<DType::kF16, 128, 128, Form::kBiased>(const ForwardCall&,
                                                                        cudaStream_t);
template void launch_forward_sm90<DType::kF16, 128, 128, Form::kSigmoid>(const ForwardCall&,
                                                                         cudaStream_t);
template void launch_forward_sm90<DType::kF16, 128, 128, Form::kReweighted>(const ForwardCall&,
                                                                            cudaStream_t);
}  // namespace heddle
