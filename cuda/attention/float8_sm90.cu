#include "attention/float8_sm90.cuh"

namespace heddle {
template void launch_float8_sm90<128>(const ForwardCall&, cudaStream_t);
template void launch_float8_sm90<64>(const ForwardCall&, cudaStream_t);
}  // namespace heddle
