#include "attention/factors_sm90.cuh"

#include <algorithm>
#include <bit>

#include "attention/factors_sm90.h"
#include "common/elements.cuh"

namespace heddle {

const int* row_factors(ForwardCall& call, CudaContext& context) {
  // copied 16 bytes at a time
  const auto whole_row = [](int64_t s) { return (s + 3) / 4 * 4 + 128; };
  int* strange = context.scratch<int>(1);
  HEDDLE_CUDA(cudaMemsetAsync(strange, 0, sizeof(int), context.stream));
  const auto factors = [&](const void* x, const Strides& strides, int64_t s, int64_t h) {
    const int lanes = static_cast<int>(std::bit_ceil(static_cast<uint64_t>(call.d / 8)));
    const int64_t row = whole_row(s), pairs = call.b * h;
    float* out = context.scratch<float>(static_cast<size_t>(pairs * row));
    auto* kernel = call.dtype == DType::kF16 ? attention_factor_kernel<DType::kF16>
                                             : attention_factor_kernel<DType::kBF16>;
    // of one head's rows
    const int64_t blocks = std::clamp<int64_t>(context.processors * 16 / pairs, 1,
                                               (s * lanes + kThreads - 1) / kThreads);
    kernel<<<static_cast<unsigned>(pairs * blocks), kThreads, 0, context.stream>>>(
        {static_cast<const uint16_t*>(x), strides, s, static_cast<int>(h), static_cast<int>(pairs),
         static_cast<int>(call.d), lanes, out, row, strange});
    context.launched("attention_factor_kernel");
    return out;
  };
  call.slots.q_factors = factors(call.q, call.q_strides, call.sq, call.hq);
  call.slots.k_factors = factors(call.k, call.k_strides, call.sk, call.hk);
  call.slots.q_row = whole_row(call.sq);
  call.slots.k_row = whole_row(call.sk);
  return strange;
}

}  // namespace heddle
