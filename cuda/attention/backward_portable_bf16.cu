#include "attention/backward_portable.cuh"

namespace heddle {
template void backward_portable<BF16>(const BackwardArgs&, CudaContext&);
template void backward_redo<BF16>(const BackwardArgs&, const GradientTiles&, const int*,
                                  CudaContext&);
}  // namespace heddle
