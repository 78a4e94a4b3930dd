#include "attention/backward_sm90.h"

#include <cmath>

namespace heddle {
namespace {

template <DType kType, bool kMapped, bool kListed = false>
void pick(const BackwardCall& call, cudaStream_t stream) {
  const auto launch = GradientTiles(call).columns == 64
                          ? launch_backward_sm90<kType, 64, kMapped, kListed>
                          : launch_backward_sm90<kType, 128, kMapped, kListed>;
  launch(call, stream);
}

template <DType kType> void pick(const BackwardCall& call, cudaStream_t stream) {
  call.masked                        ? pick<kType, false, true>(call, stream)
  : call.soft_cap > 0 || call.slopes ? pick<kType, true>(call, stream)
                                     : pick<kType, false>(call, stream);
}

}  // namespace

const char* declines_backward_sm90(const BackwardCall& call) {
  constexpr int64_t kMost = int64_t{1} << 28;  // rows and tiles are counted in 32 bits
  if (call.d > 128 || call.dv > 128) return "d and dv must be at most 128";
  if (call.masked && (call.soft_cap > 0 || call.slopes))
    return "softCap and slopes must be left out under a mask";
  if (call.slopes && call.hq > kMostSlopes * call.hk)
    return "slopes must be of at most 64 query heads for each kv head";
  // masked scores are -inf before scaling
  if (!std::isnormal(call.scale) || call.scale < 0 || call.scale > 1e30f)
    return "scale must be positive";
  // divided, since the product can overflow
  if (call.sq > kMost || call.sk > kMost ||
      std::max(call.sq, call.sk) / 64 + call.sequences + 1 > kMost / call.b / call.hq)
    return "q and k must have at most 2^28 rows and tiles";
  if (const char* reason = declines_addresses_sm90(call, call.b, call.sk)) return reason;
  // dout is read like out
  ForwardCall gradient = call;
  gradient.out = const_cast<void*>(call.dout);
  gradient.out_strides = call.dout_strides;
  if (declines_addresses_sm90(gradient, call.b, call.sk))
    return "dout must start at a multiple of 16 bytes, strides must be multiples of 8";
  return nullptr;
}

void backward_sm90(const BackwardCall& call, cudaStream_t stream) {
  call.dtype == DType::kF16 ? pick<DType::kF16>(call, stream) : pick<DType::kBF16>(call, stream);
}

}  // namespace heddle
