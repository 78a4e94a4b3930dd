#include "attention/split_sm90.h"

#include <algorithm>

namespace heddle {
namespace {

template <DType kType> void pick(const SplitCall& call, cudaStream_t stream) {
  const int64_t columns = split_columns(call);
  if (columns == 64) return launch_split_sm90<kType, 64>(call, stream);
  if (columns == 128) return launch_split_sm90<kType, 128>(call, stream);
  launch_split_sm90<kType, 256>(call, stream);
}

}  // namespace

const char* declines_split_sm90(const SplitCall& call) {
  constexpr int64_t kMost = int64_t{1} << 30;  // rows, keys and tiles are counted in 32 bits
  constexpr int64_t kFewRows = 8, kLeastTile = 64;
  if (call.dtype == DType::kE4M3 && std::max(call.d, call.dv) > 128)
    return "d must be at most 128 with float8";
  if (call.dv == 0) return "v must have columns";
  if (call.cu_seqlens_k) return "cuSeqlensK must be left out";
  const int64_t rows = call.sq * (call.hq / call.hk);
  if (!call.block_table && call.sq > kFewRows && rows > kSplitRows && prefers_tiles(call))
    return "k and v must be pages, or q have too few rows for all multiprocessors";
  if (call.block_table && call.page_size < 8) return "the page size must be at least 8";
  // divided, since the product can overflow
  if (rows > kMost || call.sk > kMost || call.pages > kMost ||
      call.sk / kLeastTile + 1 >
          kMost / call.b / call.hk / std::max<int64_t>(split_row_tiles(call), 1))
    return "q and k must have at most 2^30 rows and tiles";
  return declines_addresses_sm90(call, call.block_table ? call.pages : call.b,
                                 call.block_table ? call.page_size : call.sk);
}

void split_sm90(const SplitCall& call, cudaStream_t stream) {
  if (call.dtype == DType::kE4M3)
    return split_columns(call) == 64 ? launch_split_sm90<DType::kF16, 64, true>(call, stream)
                                     : launch_split_sm90<DType::kF16, 128, true>(call, stream);
  call.dtype == DType::kF16 ? pick<DType::kF16>(call, stream) : pick<DType::kBF16>(call, stream);
}

}  // namespace heddle
