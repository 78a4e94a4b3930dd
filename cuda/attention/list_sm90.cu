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

// A warp per list, a unit per lane
__global__ void attention_list_kernel(ListArgs p) {
  const UnitLists& lists = p.lists;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  for (int64_t list = blockIdx.x * static_cast<int64_t>(blockDim.x / 32) + threadIdx.x / 32;
       list < p.count; list += warps) {
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
    const UnitView views[kListedWarpgroups] = {{lists, rows, tile, 0}, {lists, rows, tile, 1}};
    const int64_t end = max(views[0].end(), views[1].end());
    int* marks = lists.marks + list * lists.mark_words();
    int units = 0;
    uint32_t marked = 0;
    for (int word = 0; word < lists.words; ++word) {
      const int64_t key = (int64_t{word} * 32 + lane) * kUnitKeys;
      uint32_t visited = 0;
      if (int64_t{word} * 32 * kUnitKeys < end) {
        UnitBits bits[kListedWarpgroups];
#pragma unroll
        for (int w = 0; w < kListedWarpgroups; ++w) {
          const UnitLook look = views[w](key);
          bits[w] = {__ballot_sync(~0u, look.any), __ballot_sync(~0u, look.listed)};
          visited |= bits[w].any;
        }
        if (lane < kListedWarpgroups && visited)
          lists.bits[(list * lists.words + word) * kListedWarpgroups + lane] =
              lane == 0 ? bits[0] : bits[1];
      }
      units += __popc(visited);
      marked |= uint32_t{visited != 0} << word % 32;
      if (word % 32 == 31 || word + 1 == lists.words) {
        if (lane == 0) marks[1 + word / 32] = static_cast<int>(marked);
        marked = 0;
      }
    }
    if (lane == 0) marks[0] = units;
  }
}

}  // namespace

void list_units_sm90(const ForwardCall& call, int64_t count, cudaStream_t stream) {
  constexpr int kThreads = 256, kCtas = 8;  // of a multiprocessor
  const int64_t ctas =
      std::min<int64_t>((count * 32 + kThreads - 1) / kThreads, int64_t{kCtas} * call.processors);
  attention_list_kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(
      {call.lists, count, call.sq, call.sk, call.sequences, call.cu_seqlens_q, call.cu_seqlens_k,
       call.cache_seqlens, call.cu_q_stride, call.cu_k_stride, call.cache_stride, call.causal});
}

}  // namespace heddle
