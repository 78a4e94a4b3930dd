#include "probe/rows_sm90.cuh"

namespace heddle {
template void launch_rows_sm90<DType::kBF16, 64, false>(const RowsCall&, cudaStream_t);
template void launch_rows_sm90<DType::kBF16, 128, false>(const RowsCall&, cudaStream_t);
template void launch_rows_sm90<DType::kF16, 64, false>(const RowsCall&, cudaStream_t);
template void launch_rows_sm90<DType::kF16, 128, false>(const RowsCall&, cudaStream_t);
}  // namespace heddle
