#include "attention/backward_portable.cuh"

namespace heddle {
template void backward_portable<BF16>(const BackwardArgs&, CudaContext&);
}
