#include "attention/split_sm90.cuh"

namespace heddle {
template void launch_split_sm90<DType::kBF16, 64>(const SplitCall&, cudaStream_t);
template void launch_split_sm90<DType::kF16, 64>(const SplitCall&, cudaStream_t);
template void launch_split_sm90<DType::kBF16, 128>(const SplitCall&, cudaStream_t);
template void launch_split_sm90<DType::kF16, 128>(const SplitCall&, cudaStream_t);
template void launch_split_sm90<DType::kBF16, 256>(const SplitCall&, cudaStream_t);
template void launch_split_sm90<DType::kF16, 256>(const SplitCall&, cudaStream_t);
template void launch_split_sm90<DType::kF16, 64, true>(const SplitCall&, cudaStream_t);
template void launch_split_sm90<DType::kF16, 128, true>(const SplitCall&, cudaStream_t);
}  // namespace heddle
