#include "attention/forward_sm90.h"

#include <cmath>

namespace heddle {
namespace {

// What a tensor map can describe
bool addressable(const void* data, const Strides& strides, int64_t b, int64_t s, int64_t h) {
  const auto fits = [](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 39);
  };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(b, strides.batch) &&
         fits(s, strides.row) && fits(h, strides.head);
}

template <DType kType> void pick(const ForwardCall& call, cudaStream_t stream) {
  switch (call.d) {
    case 64:
      return launch_forward_sm90<kType, 64>(call, stream);
    case 128:
      return launch_forward_sm90<kType, 128>(call, stream);
    default:
      return launch_forward_sm90<kType, 256>(call, stream);
  }
}

}  // namespace

const char* declines_forward_sm90(const ForwardCall& call) {
  constexpr int64_t kMost = int64_t{1} << 30;  // rows and tiles are counted in 32 bits
  if (call.dtype != DType::kF16 && call.dtype != DType::kBF16)
    return "dtype must be float16 or bfloat16";
  if ((call.d != 64 && call.d != 128 && call.d != 256) || call.dv != call.d)
    return "d must be 64, 128 or 256, and dv the same";
  if (call.sk == 0) return "k must not be empty";
  // row_max is taken before scaling, and a masked score times zero would not be a number
  if (!(std::isnormal(call.scale) && call.scale > 0 && call.scale < 1e30f))
    return "scale must be positive";
  if (call.b == 0 || call.sq == 0 || call.hq == 0) return nullptr;
  // divided, since the product can overflow
  if (call.sq > kMost || call.sk > kMost || call.sq / 64 + 1 > kMost / call.b / call.hq)
    return "q and k must have at most 2^30 rows and tiles";
  if (!addressable(call.q, call.q_strides, call.b, call.sq, call.hq) ||
      !addressable(call.k, call.k_strides, call.b, call.sk, call.hk) ||
      !addressable(call.v, call.v_strides, call.b, call.sk, call.hk) ||
      !addressable(call.out, call.out_strides, call.b, call.sq, call.hq))
    return "q, k, v and out must start at a multiple of 16 bytes, strides must be multiples of 8";
  return nullptr;
}

void forward_sm90(const ForwardCall& call, cudaStream_t stream) {
  if (call.b == 0 || call.sq == 0 || call.hq == 0) return;
  call.dtype == DType::kF16 ? pick<DType::kF16>(call, stream) : pick<DType::kBF16>(call, stream);
}

}  // namespace heddle
