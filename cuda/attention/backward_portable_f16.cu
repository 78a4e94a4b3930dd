#include "attention/backward_portable.cuh"

namespace heddle {
template void backward_portable<F16>(const BackwardArgs&, CudaContext&);
template void backward_redo<F16>(const BackwardArgs&, const GradientTiles&, const int*,
                                 CudaContext&);
}  // namespace heddle
