#include "attention/forward_portable.cuh"

namespace heddle {
template void forward_portable<float>(const ForwardArgs&, dim3, size_t, CudaContext&);
}
