#include "attention/backward_portable.cuh"

namespace heddle {
template void backward_portable<float>(const BackwardArgs&, CudaContext&);
}
