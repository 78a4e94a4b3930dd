#pragma once
#include "attention/forward_args.cuh"
#include "attention/gather_lists.h"

// The keys of queries that share a list of short blocks
namespace heddle {

constexpr int64_t kMostGathered = 1 << 30;  // keys of a sequence

// Sink tokens, listed blocks and window one after the other, as one sequence of keys. The window of
// a row begins where its sink tokens and list end, so no key counts twice.
struct GatherKeys {
  const int32_t* index;
  int first, last;           // positions of its rows
  int window, window_begin;  // of a row, and where that of the first row begins
  int sinks, listed, count;  // keys from `sinks` on are listed, those from `listed` on in a window
  int block_k_log2;

  // Of queries from row0 to before `end` of a head, where query 0 stands at `ahead`. Sink tokens
  // are filled up to whole units: nobody sees more of them for it.
  __device__ GatherKeys(const GatherLists& lists, const MaskView& mask, int64_t batch, int64_t head,
                        int64_t hq, int row0, int end, int ahead, int unit) {
    const int64_t list =
        (batch * lists.lists + head / (hq / lists.lists)) * lists.rows + row0 / mask.block_q;
    index = lists.index + list * lists.width;
    first = ahead + row0;
    last = ahead + end - 1;
    window = static_cast<int>(min(mask.window, kMostGathered));
    window_begin = max(first - window + 1, 0);
    block_k_log2 = mask.block_k_log2;
    sinks = static_cast<int>(clamp_to(last - window + 1, 0, mask.sink_tokens));
    sinks = (sinks + unit - 1) / unit * unit;
    const auto blocks = static_cast<int>(clamp_to(lists.count[list], 0, lists.width));
    listed = sinks + (blocks << block_k_log2);
    count = listed + max(last + 1 - window_begin, 0);
  }
  // Where the list has the block of the n-th key, null if the key is none of it
  __device__ const int32_t* start_of(int n) const {
    return n < sinks || n >= listed ? nullptr : index + ((n - sinks) >> block_k_log2);
  }
  // The n-th key, or -1 where no row sees one
  __device__ int at(int n) const {
    const int32_t* start = start_of(n);
    return at(n, start ? *start : 0);
  }
  // The same of one whose block starts there
  __device__ int at(int n, int start) const {
    if (n >= count) return -1;
    if (n >= listed) return window_begin + n - listed;
    if (n < sinks) return n;
    const int t = start + ((n - sinks) & ((1 << block_k_log2) - 1));
    return start >= 0 && t <= last - window ? t : -1;
  }
  // Whether the row at `position` sees the n-th key, which is `t`
  __device__ bool sees(int position, int n, int t) const {
    return n < listed ? t <= position - window : t > position - window && t <= position;
  }
};

// Values of columns lane, lane + 32, ... of the row at `position` once more, by a warp and from the
// keys alone that it sees: a weight of zero doesn't silence a masked value that is no number.
// weight(n, t) is that of the n-th key, which is t, and value(n, t, column) what it has.
template <int kColumns, class Weight, class Value>
__device__ void attend_again(float (&values)[kColumns], const GatherKeys& keys, int position,
                             const Weight& weight, const Value& value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int n0 = 0; n0 < keys.count; n0 += 32) {
    const int own = keys.at(n0 + lane);
    float its_weight = -1;  // of keys that are not seen
    if (own >= 0 && keys.sees(position, n0 + lane, own)) its_weight = weight(n0 + lane, own);
    for (int i = 0; i < 32; ++i) {
      const float shared = __shfl_sync(~0u, its_weight, i);
      const int t = __shfl_sync(~0u, own, i);
      if (shared < 0) continue;
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        values[c] = fmaf(shared, value(n0 + i, t, 32 * c + lane), values[c]);
    }
  }
}

}  // namespace heddle
