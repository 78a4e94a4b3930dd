#include <algorithm>

#include "attention/forward_sm90.h"
#include "common/check.h"

namespace heddle {
namespace {

struct ListArgs {
  UnitLists lists;
  int64_t count;  // of lists
  int64_t sq, sk, sequences;
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *cache_seqlens;
  int64_t cu_q_stride, cu_k_stride, cache_stride;
  bool causal;
};

__device__ int64_t offset(const int32_t* offsets, int64_t stride, int64_t i, int64_t total) {
  return min(max(int64_t{offsets[i * stride]}, int64_t{0}), total);
}

// A warp per 32 units of a list, a unit per lane
__global__ void attention_list_kernel(ListArgs p) {
  const UnitLists& lists = p.lists;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  for (int64_t at = blockIdx.x * static_cast<int64_t>(blockDim.x / 32) + threadIdx.x / 32;
       at < p.count * lists.words; at += warps) {
    const int64_t list = at / lists.words, word = at % lists.words;
    const int64_t pair = list / lists.tiles, own = pair % lists.mask.heads;
    int64_t tile = list % lists.tiles;
    UnitRows rows{pair / lists.mask.heads,  pair / lists.mask.heads, 0, 0, p.sq, p.sk, p.causal,
                  p.cu_seqlens_q != nullptr};
    rows.head = own * (lists.mask.hq / lists.mask.heads);
    if (rows.packed) {
      // the last sequence whose tiles begin here or before
      int64_t i = 0;
      while (i + 1 < p.sequences &&
             lists.first_tile(offset(p.cu_seqlens_q, p.cu_q_stride, i + 1, p.sq), i + 1) <= tile)
        ++i;
      const auto length = [&](const int32_t* offsets, int64_t stride, int64_t total) {
        return max(offset(offsets, stride, i + 1, total) - offset(offsets, stride, i, total),
                   int64_t{0});
      };
      rows.sequence = i;
      rows.q_begin = offset(p.cu_seqlens_q, p.cu_q_stride, i, p.sq);
      rows.sq = length(p.cu_seqlens_q, p.cu_q_stride, p.sq);
      rows.sk = length(p.cu_seqlens_k, p.cu_k_stride, p.sk);
      tile -= lists.first_tile(rows.q_begin, i);
    } else if (p.cache_seqlens) {
      rows.sk = offset(p.cache_seqlens, p.cache_stride, rows.batch, p.sk);
    }
    uint32_t visited = 0;
    for (int w = 0; w < lists.warpgroups; ++w) {
      UnitLook look{false, false};
      if (tile >= 0) look = look_at_unit(lists, rows, tile, w, word * 32 + lane);
      const UnitBits bits{__ballot_sync(~0u, look.any), __ballot_sync(~0u, look.listed)};
      if (lane == 0) lists.bits[at * lists.warpgroups + w] = bits;
      visited |= bits.any;
    }
    if (lane == 0 && visited) {
      int* marks = lists.marks + list * lists.mark_words();
      atomicAdd(marks, __popc(visited));
      atomicOr(marks + 1 + word / 32, static_cast<int>(1u << word % 32));
    }
  }
}

}  // namespace

void list_units_sm90(const ForwardCall& call, int64_t count, cudaStream_t stream) {
  const auto nbytes = static_cast<size_t>(count * call.lists.mark_words()) * sizeof(int);
  HEDDLE_CUDA(cudaMemsetAsync(call.lists.marks, 0, nbytes, stream));
  const int64_t warps = count * call.lists.words;
  constexpr int kThreads = 256, kCtas = 8;  // of a multiprocessor
  const int64_t ctas =
      std::min<int64_t>((warps * 32 + kThreads - 1) / kThreads, int64_t{kCtas} * call.processors);
  attention_list_kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(
      {call.lists, count, call.sq, call.sk, call.sequences, call.cu_seqlens_q, call.cu_seqlens_k,
       call.cache_seqlens, call.cu_q_stride, call.cu_k_stride, call.cache_stride, call.causal});
}

}  // namespace heddle
