#include "core/keep.h"

#include <algorithm>

#include "common/elements.cuh"
#include "common/team.cuh"
#include "core/slot.h"

namespace heddle {
namespace {

// A CTA per row, or per head where the rule holds for its map
template <int kCta> __global__ void __launch_bounds__(kCta) keep_kernel(Keep op) {
  __shared__ KeepMemory memory;
  const int64_t rows = op.score.shape[2], parts = op.over_map ? 1 : rows;
  keep_part(CtaTeam{}, op, blockIdx.x / parts, blockIdx.x % parts, rows / parts, memory);
}

// The largest of a row, by a warp whose lanes have kLine of its columns each: the least of them is
// found bit by bit, and of those that equal it the first are taken
template <int kLine>
__global__ void __launch_bounds__(kThreads) keep_top_kernel(Keep op, uint32_t wanted) {
  const int64_t columns = op.score.shape[3], rows = op.score.shape[2];
  const int64_t row = blockIdx.x * int64_t{kThreads / 32} + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= op.score.shape[0] * op.score.shape[1] * rows) return;
  const float* score = static_cast<const float*>(op.score.data) + row * columns;
  const KeepForced forced(op, row % rows);
  uint32_t order[kLine];
#pragma unroll
  for (int i = 0; i < kLine; ++i) {
    const int c = 32 * i + lane;
    order[i] = c < columns ? order_of(score[c], forced.has(c)) : 0;
  }
  const auto count = [&](uint32_t least) {
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kLine; ++i) own += order[i] >= least;
    return __reduce_add_sync(~0u, own);
  };
  uint32_t least = 0, found = count(1);
  const bool all = found <= wanted;
  if (all) least = 1;
  for (uint32_t bit = uint32_t{1} << 31; bit != 0 && found != wanted && !all; bit >>= 1) {
    const uint32_t own = count(least | bit);
    if (own < wanted) continue;
    least |= bit;
    found = own;
  }
  // Of those that equal it so many are too many, the last ones
  uint32_t left = 0;
  if (!all && found > wanted) left = wanted - count(least + 1);
  int32_t* bits = static_cast<int32_t*>(op.blocks.data) + row * op.blocks.shape[3];
#pragma unroll
  for (int i = 0; i < kLine; ++i) {
    bool own = order[i] >= least;
    if (!all && found > wanted) {
      const uint32_t equal = __ballot_sync(~0u, order[i] == least);
      own = order[i] > least ||
            (order[i] == least && __popc(equal & ((1u << lane) - 1)) < static_cast<int>(left));
      left -= min(left, static_cast<uint32_t>(__popc(equal)));
    }
    const uint32_t word = __ballot_sync(~0u, own);
    if (lane == i % 32 && word != 0) bits[i] |= static_cast<int32_t>(word);
  }
}

constexpr int kMostLine = 64;

template <int kLine = 8> void run_top(const Keep& op, CudaContext& context) {
  if constexpr (kLine < kMostLine)
    if (op.score.shape[3] > 32 * kLine) return run_top<2 * kLine>(op, context);
  const int64_t rows = op.score.shape[0] * op.score.shape[1] * op.score.shape[2];
  int64_t wanted = std::max(op.top, op.least);
  if (op.most > 0) wanted = std::min(wanted, op.most);
  const int64_t ctas = (rows + kThreads / 32 - 1) / (kThreads / 32);
  keep_top_kernel<kLine><<<static_cast<unsigned>(ctas), kThreads, 0, context.stream>>>(
      op, static_cast<uint32_t>(std::min<int64_t>(wanted, op.score.shape[3])));
  context.launched("keep_top_kernel");
}

void run(const Keep& op, CudaContext& context) {
  if (op.score.size() == 0) return;
  const int64_t parts = op.over_map ? 1 : op.score.shape[2];
  const int64_t ctas = op.score.shape[0] * op.score.shape[1] * parts;
  HEDDLE_CHECK(ctas < INT32_MAX, kUnsupported, "score", "score has too many rows for one call");
  if (op.rule == Keep::kTop && !op.over_map && op.score.shape[3] <= 32 * kMostLine)
    return run_top(op, context);
  // of long lines there are few
  constexpr int kMany = 1024;
  constexpr int64_t kLong = 8 * kThreads;
  if (op.score.shape[2] / parts * op.score.shape[3] > kLong)
    keep_kernel<kMany><<<static_cast<unsigned>(ctas), kMany, 0, context.stream>>>(op);
  else
    keep_kernel<kThreads><<<static_cast<unsigned>(ctas), kThreads, 0, context.stream>>>(op);
  context.launched("keep_kernel");
}

HEDDLE_REGISTER(Keep);

}  // namespace
}  // namespace heddle
