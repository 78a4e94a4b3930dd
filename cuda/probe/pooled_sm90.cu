#include "probe/pooled_sm90.cuh"

namespace heddle {
template void launch_pooled_sm90<64>(const PooledCall&, cudaStream_t);
template void launch_pooled_sm90<128>(const PooledCall&, cudaStream_t);
}  // namespace heddle
