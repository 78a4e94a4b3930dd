#include "attention/backward_portable.cuh"

namespace heddle {
template void backward_portable<F16>(const BackwardArgs&, CudaContext&);
}
