#include "attention/forward_portable.cuh"

namespace heddle {
template void forward_portable<float>(const ForwardArgs&, dim3, size_t, CudaContext&);
template void forward_portable<BF16>(const ForwardArgs&, dim3, size_t, CudaContext&);
template void forward_portable<F16>(const ForwardArgs&, dim3, size_t, CudaContext&);
template void forward_portable<E4M3>(const ForwardArgs&, dim3, size_t, CudaContext&);
}  // namespace heddle
