#include "attention/forward_portable.cuh"

namespace heddle {
template void forward_portable<E4M3>(const ForwardArgs&, dim3, size_t, CudaContext&);
}
