#include "attention/forward_portable.cuh"

namespace heddle {
template void forward_portable<float>(const ForwardArgs&, int64_t, CudaContext&);
template void forward_portable<BF16>(const ForwardArgs&, int64_t, CudaContext&);
template void forward_portable<F16>(const ForwardArgs&, int64_t, CudaContext&);
template void forward_portable<E4M3>(const ForwardArgs&, int64_t, CudaContext&);
}  // namespace heddle
