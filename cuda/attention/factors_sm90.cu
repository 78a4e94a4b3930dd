#include "attention/factors_sm90.cuh"

#include <algorithm>

#include "attention/factors_sm90.h"

namespace heddle {
namespace {

void launch_factors(const ForwardCall& call, const FactorArgs& q, const FactorArgs& k,
                    CudaContext& context) {
  auto* kernel = call.dtype == DType::kF16 ? attention_factor_kernel<DType::kF16>
                                           : attention_factor_kernel<DType::kBF16>;
  const auto blocks = [&](const FactorArgs& args) {
    const int64_t all = (args.rows * args.lanes + kFactorThreads - 1) / kFactorThreads;
    return static_cast<int>(std::clamp<int64_t>(all, 1, context.processors * 4));
  };
  const int of_q = blocks(q);
  kernel<<<static_cast<unsigned>(of_q + blocks(k)), kFactorThreads, 0, context.stream>>>(q, k,
                                                                                         of_q);
  context.launched("attention_factor_kernel");
}

}  // namespace

const int* row_factors(ForwardCall& call, CudaContext& context) {
  // copied 16 bytes at a time
  const auto whole_row = [](int64_t s) { return (s + 3) / 4 * 4 + 128; };
  int* strange = context.scratch<int>(1);
  HEDDLE_CUDA(cudaMemsetAsync(strange, 0, sizeof(int), context.stream));
  const auto factors = [&](FactorArgs args) {
    args.factor_row = whole_row(args.s);
    args.factors = context.scratch<float>(static_cast<size_t>(call.b * args.h * args.factor_row));
    args.strange = strange;
    return args;
  };
  const FactorArgs q = factors(q_rows(call)), k = factors(k_rows(call));
  launch_factors(call, q, k, context);
  call.slots.q_factors = q.factors;
  call.slots.k_factors = k.factors;
  call.slots.q_row = q.factor_row;
  call.slots.k_row = k.factor_row;
  return strange;
}

const int* cosine_rows(const ForwardCall& call, const CosineRows& rows, CudaContext& context) {
  FactorArgs q = q_units(call, rows), k = k_units(call, rows);
  q.strange = k.strange = context.scratch<int>(1);
  auto* kernel = call.dtype == DType::kF16 ? attention_center_kernel<DType::kF16>
                                           : attention_center_kernel<DType::kBF16>;
  kernel<<<static_cast<unsigned>(call.b * call.hk), kCenterThreads, 0, context.stream>>>(k);
  context.launched("attention_center_kernel");
  launch_factors(call, q, k, context);
  return k.strange;
}

}  // namespace heddle
