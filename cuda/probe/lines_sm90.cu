#include "probe/lines_sm90.cuh"

namespace heddle {
template void launch_stats_sm90<DType::kBF16, 128>(const LinesCall&, cudaStream_t);
template void launch_stats_sm90<DType::kF16, 128>(const LinesCall&, cudaStream_t);
template void launch_stats_sm90<DType::kBF16, 64>(const LinesCall&, cudaStream_t);
template void launch_stats_sm90<DType::kF16, 64>(const LinesCall&, cudaStream_t);
template void launch_lines_sm90<DType::kBF16, 128>(const LinesCall&, cudaStream_t);
template void launch_lines_sm90<DType::kF16, 128>(const LinesCall&, cudaStream_t);
template void launch_lines_sm90<DType::kBF16, 64>(const LinesCall&, cudaStream_t);
template void launch_lines_sm90<DType::kF16, 64>(const LinesCall&, cudaStream_t);
}  // namespace heddle
