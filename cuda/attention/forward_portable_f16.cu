#include "attention/forward_portable.cuh"

namespace heddle {
template void forward_portable<F16>(const ForwardArgs&, dim3, size_t, CudaContext&);
}
