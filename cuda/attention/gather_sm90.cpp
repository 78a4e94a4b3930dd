#include "attention/gather_sm90.h"

namespace heddle {

const char* declines_gather_sm90(const GatherCall& call) {
  const int64_t group = call.hq / call.hk, block_k = int64_t{1} << call.lists.mask.block_k_log2;
  if (call.block_table || call.cache_seqlens) return "blockTable and cacheSeqlens must be left out";
  if (call.d != 128) return "d must be 128";
  if (call.blocks.lists > call.hk || group % 2 != 0)
    return "mask must have lists that an even number of heads shares";
  if (block_k < 8 || call.lists.mask.sink_tokens % 8 != 0 || call.lists.mask.block_q % 64 != 0)
    return "mask must have blocks and sink tokens of a multiple of 8 keys, and of 64 queries";
  // divided, since the product can overflow
  const int64_t units = (call.sq + 63) / 64 * (call.hq / 2);
  if (units > INT32_MAX / call.b) return "q must have less than 2^31 parts of 64 rows";
  if (units * call.b < call.processors) return "q must have 128 rows for each multiprocessor";
  return declines_addresses_sm90(call, call.b, call.sk);
}

void gather_sm90(const GatherCall& call, cudaStream_t stream) {
  call.dtype == DType::kF16 ? launch_gather_sm90<DType::kF16, 128>(call, stream)
                            : launch_gather_sm90<DType::kBF16, 128>(call, stream);
}

}  // namespace heddle
