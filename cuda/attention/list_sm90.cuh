#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "attention/forward_sm90.h"
#include "common/launch.h"
#include "common/sm90.cuh"

namespace heddle {
namespace {

constexpr int kListThreads = 256;

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

// A warp per list. A lane takes 32 units at once where rows differ in nothing but where they end,
// else it looks at one.
__global__ void __launch_bounds__(kListThreads, 2)
    attention_list_kernel(const __grid_constant__ ListArgs p) {
  sm90::let_next_begin();
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
    UnitBits* to = lists.bits + list * lists.words * kListedWarpgroups;
    int* marks = lists.marks + list * lists.mark_words();
    const bool plain = views[0].plain() && views[1].plain();
    int units = 0;
    uint32_t odd = 0;  // bit c: of class c, as UnitPairs has them
    for (int group = 0; group < lists.words; group += 32) {
      UnitBits bits[kListedWarpgroups]{};
      if (plain) {
#pragma unroll
        for (int w = 0; w < kListedWarpgroups; ++w) bits[w] = views[w].units(group + lane);
      } else {
        for (int word = 0; word < 32; ++word) {
          const int64_t key = (int64_t{group + word} * 32 + lane) * kUnitKeys;
          if (key - lane * kUnitKeys >= end) break;
#pragma unroll
          for (int w = 0; w < kListedWarpgroups; ++w) {
            const UnitLook look = views[w](key);
            const UnitBits found{__ballot_sync(~0u, look.any), __ballot_sync(~0u, look.listed)};
            if (lane == word) bits[w] = found;
          }
        }
      }
      const uint32_t first = bits[0].any, second = bits[1].any, visited = first | second;
      odd ^= (__popc(first & ~second) & 1) << 1 | (__popc(second & ~first) & 1) << 2 |
             (__popc(first & second) & 1) << 3;
      if (visited != 0)
#pragma unroll
        for (int w = 0; w < kListedWarpgroups; ++w)
          to[(group + lane) * kListedWarpgroups + w] = bits[w];
      units += __popc(visited);
      const uint32_t marked = __ballot_sync(~0u, visited != 0);
      if (lane == 0) marks[1 + group / 32] = static_cast<int>(marked);
    }
    units = static_cast<int>(__reduce_add_sync(~0u, static_cast<uint32_t>(units)));
    odd = __reduce_xor_sync(~0u, odd);
    if (lane == 0) marks[0] = units << 4 | static_cast<int>(odd);
  }
}

}  // namespace

inline void launch_list_sm90(const ForwardCall& call, int64_t count, cudaStream_t stream) {
  constexpr int kCtas = 2;  // of a multiprocessor
  const int64_t ctas = std::min<int64_t>((count * 32 + kListThreads - 1) / kListThreads,
                                         int64_t{kCtas} * call.processors);
  launch<attention_list_kernel>(
      {static_cast<int>(ctas), kListThreads, 0, stream},
      ListArgs{call.lists, count, call.sq, call.sk, call.sequences, call.cu_seqlens_q,
               call.cu_seqlens_k, call.cache_seqlens, call.cu_q_stride, call.cu_k_stride,
               call.cache_stride, call.causal});
}

}  // namespace heddle
