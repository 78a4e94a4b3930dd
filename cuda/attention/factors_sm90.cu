#include "attention/factors_sm90.cuh"

#include <algorithm>

#include "attention/factors_sm90.h"
#include "common/elements.cuh"

namespace heddle {
namespace {

void launch_factors(const ForwardCall& call, FactorArgs args, CudaContext& context) {
  auto* kernel = call.dtype == DType::kF16 ? attention_factor_kernel<DType::kF16>
                                           : attention_factor_kernel<DType::kBF16>;
  const int64_t blocks = std::clamp<int64_t>((args.rows * args.lanes + kThreads - 1) / kThreads, 1,
                                             context.processors * 8);
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, context.stream>>>(args);
  context.launched("attention_factor_kernel");
}

int* clear_word(CudaContext& context) {
  int* word = context.scratch<int>(1);
  HEDDLE_CUDA(cudaMemsetAsync(word, 0, sizeof(int), context.stream));
  return word;
}

}  // namespace

const int* row_factors(ForwardCall& call, CudaContext& context) {
  // copied 16 bytes at a time
  const auto whole_row = [](int64_t s) { return (s + 3) / 4 * 4 + 128; };
  int* strange = clear_word(context);
  const auto factors = [&](FactorArgs args) {
    args.factor_row = whole_row(args.s);
    args.factors = context.scratch<float>(static_cast<size_t>(call.b * args.h * args.factor_row));
    args.strange = strange;
    launch_factors(call, args, context);
    return args.factors;
  };
  call.slots.q_factors = factors(q_rows(call));
  call.slots.k_factors = factors(k_rows(call));
  call.slots.q_row = whole_row(call.sq);
  call.slots.k_row = whole_row(call.sk);
  return strange;
}

const int* cosine_rows(const ForwardCall& call, const CosineRows& rows, CudaContext& context) {
  int* strange = clear_word(context);
  const FactorArgs keys = k_units(call, rows);
  auto* kernel = call.dtype == DType::kF16 ? attention_center_kernel<DType::kF16>
                                           : attention_center_kernel<DType::kBF16>;
  const auto heads = static_cast<unsigned>(call.b * call.hk);
  kernel<<<heads, kCenterThreads, 0, context.stream>>>(keys);
  context.launched("attention_center_kernel");
  for (FactorArgs args : {q_units(call, rows), keys}) {
    args.strange = strange;
    launch_factors(call, args, context);
  }
  return strange;
}

}  // namespace heddle
