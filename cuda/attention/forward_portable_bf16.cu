#include "attention/forward_portable.cuh"

namespace heddle {
template void forward_portable<BF16>(const ForwardArgs&, dim3, size_t, CudaContext&);
}
