#include "lightning/decode_sm90.cuh"

namespace heddle {
template void launch_decode_sm90<BF16>(const DecodeCall&, cudaStream_t);
template void launch_decode_sm90<F16>(const DecodeCall&, cudaStream_t);
template void launch_decode_sm90<float>(const DecodeCall&, cudaStream_t);
}  // namespace heddle
