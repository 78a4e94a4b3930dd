#pragma once
#include "hip/search_sm80.cuh"

// A stage whose lists have one row of queries for each head, as in a decode step. It takes the time
// of reads that come one after the other, two for each halving of a chunk, and so all descents are
// under way at once, in registers.
//
// A warp has 16 of them: of a few chunks, each by the heads of a kv head, which read the same keys
// until they part. The two keys of each are rows of m16n8k16 products whose columns are all of
// these heads; a descent looks at its own. Four lanes have two descents. Warps of a CTA take the
// kv heads of the same chunks, and the last CTA of a list chooses.
namespace heddle {

constexpr int kStepWarps = 8, kStepDescents = 16;
constexpr int kStepHeads = 8;  // of a kv head, at most

// How a CTA takes chunks
struct HipStep {
  int group, heads;  // of a kv head, and as a power of two
  int kv_heads;      // of a list
  int spread;        // warps that share chunks
  HEDDLE_HD explicit HipStep(const Hip& op) {
    const auto hk = static_cast<int>(op.k.shape[2]), hq = static_cast<int>(op.q.shape[2]),
               lists = static_cast<int>(op.index.shape[1]);
    group = hq / (lists > hk ? lists : hk);
    kv_heads = lists < hk ? hk / lists : 1;
    heads = spread = 1;
    while (heads < group) heads *= 2;
    while (spread < kv_heads && spread < kStepWarps) spread *= 2;
  }
  HEDDLE_HD int warp_chunks() const { return kStepDescents / heads; }
  HEDDLE_HD int chunks() const { return warp_chunks() * kStepWarps / spread; }
};

// hip_keep for few chunks, whose scores threads keep: the score that enough reach is found two bits
// at a time, unless others are equal to it
__device__ inline void hip_step_keep(const HipTeam& team, const Hip& op, const HipPlace& place,
                                     const HipChunks& chunks, const uint32_t* order) {
  constexpr int kOwn = 4, kMost = kStepWarps * 32 * kOwn;
  __shared__ int32_t listed[kMost];
  __shared__ uint32_t counts[2][2][kStepWarps];
  const auto n = static_cast<int>(chunks.count), wanted = static_cast<int>(op.index.shape[3]);
  if (n > kMost) return hip_keep(team, op, place, chunks, order);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t own[kOwn];
  int32_t start[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int i = static_cast<int>(threadIdx.x) * kOwn + j;
    own[j] = i < n ? order[i] : kNoOrder;
    start[j] = i < n ? static_cast<int32_t>(chunks.start(i)) : 0;
  }
  uint32_t least = 0;
  int found = n;
  for (int shift = 30, turn = 0; shift >= 0 && found != wanted; shift -= 2, turn ^= 1) {
    uint32_t low = 0, high = 0;  // how many reach the first two of three scores, and the third
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      low += own[j] >= (least | 1u << shift);
      low += own[j] >= (least | 2u << shift) ? 1u << 16 : 0;
      high += own[j] >= (least | 3u << shift);
    }
    low = __reduce_add_sync(~0u, low);
    high = __reduce_add_sync(~0u, high);
    // The next turn writes elsewhere, and the one after it waits for all to be through with this
    if (lane == 0) counts[turn][0][warp] = low;
    if (lane == 0) counts[turn][1][warp] = high;
    __syncthreads();
    low = __reduce_add_sync(~0u, lane < kStepWarps ? counts[turn][0][lane] : 0);
    high = __reduce_add_sync(~0u, lane < kStepWarps ? counts[turn][1][lane] : 0);
    const int reach[3] = {static_cast<int>(low & 0xffff), static_cast<int>(low >> 16),
                          static_cast<int>(high)};
    uint32_t digit = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i)
      if (reach[i] >= wanted) {
        digit = i + 1;
        found = reach[i];
      }
    least |= digit << shift;
  }
  if (found != wanted) return hip_keep(team, op, place, chunks, order);
  int before = 0, all = 0;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const uint32_t chosen = __ballot_sync(~0u, own[j] >= least);
    before += __popc(chosen & ((1u << lane) - 1));
    all += __popc(chosen);
  }
  __shared__ int totals[kStepWarps];
  if (lane == 0) totals[warp] = all;
  __syncthreads();
  for (int other = 0; other < warp; ++other) before += totals[other];
#pragma unroll
  for (int j = 0; j < kOwn; ++j)
    if (own[j] >= least) listed[before++] = start[j];
  __syncthreads();
  hip_finish(team, op, place, wanted, [&](int64_t i) { return listed[i]; });
}

template <class T, int kD> __device__ void hip_step(const HipArgs& args) {
  constexpr int kPieces = kD / 32;  // of four lanes each
  __shared__ uint32_t best[kStepWarps][kStepDescents];
  const Hip& op = args.op;
  const HipStep step(op);
  const HipTeam team{{}, nullptr};
  const int64_t list = blockIdx.x / args.members, member = blockIdx.x % args.members;
  uint32_t* order = args.slots + list * args.slot;
  HipPlace place = hip_place(op, list);
  if (op.cache_seqlens.data && threadIdx.x == 0) {
    const int32_t keys =
        static_cast<int32_t*>(op.cache_seqlens.data)[place.b * op.cache_seqlens.strides[0]];
    if (keys < op.q.shape[1] || keys > hip_keys(op)) *args.fault = 1;
  }
  const HipChunks chunks = hip_chunks(op, place);
  if (chunks.count <= op.index.shape[3]) {
    if (member == 0) hip_keep(team, op, place, chunks, order);
    return;
  }

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int quad = lane / 4, column = lane % 4 * 8, d = static_cast<int>(op.q.shape[3]);
  const int own = quad % step.heads;  // head of both descents, whose product is that of its column
  const HipRows<T, false> rows(args, place);
  const int64_t first =
      member * step.chunks() + warp / step.spread * step.warp_chunks() + quad / step.heads;
  uint32_t most[2] = {kLeastOrder, kLeastOrder};
  for (int kv = warp % step.spread; kv < step.kv_heads; kv += step.spread) {
    const int64_t head = place.first_head + kv * step.group;
    uint4 q[kPieces];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int e = piece * 32 + column;
      q[piece] = uint4{0, 0, 0, 0};
      if (e >= d) continue;
      const auto columns = rows.template read<8>(head + min(own, step.group - 1), 0, e);
      memcpy(&q[piece], &columns, sizeof columns);
    }
    const T* base = rows.keys(head);
    int32_t left[2], right[2];
    for (int j = 0; j < 2; ++j) {
      const int64_t chunk = first + j * step.warp_chunks() / 2;
      const bool exists = chunk < chunks.count;
      const int64_t start = exists ? chunks.start(chunk) : 0, end = start + op.block_k;
      left[j] = static_cast<int32_t>(start);
      right[j] = static_cast<int32_t>(!exists ? start : min(end, place.end));
    }
    for (auto size = static_cast<int>(op.block_k);; size /= 2) {
      int32_t keys[4];
      uint4 k[4][kPieces];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int32_t middle = (left[j] + right[j]) / 2, length = right[j] - left[j];
        const bool single = length == 1 && size == op.block_k;
        keys[2 * j] = length > 1 ? (left[j] + middle) / 2 : single ? left[j] : -1;
        keys[2 * j + 1] = length > 1 ? (middle + right[j]) / 2 : -1;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T* from = keys[i] < 0 ? nullptr : rows.key(base, keys[i], ~0u);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          const int e = piece * 32 + column;
          k[i][piece] =
              from && e < d ? __ldg(reinterpret_cast<const uint4*>(from + e)) : uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float acc[4] = {};
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          const uint4 &above = k[2 * j][piece], &below = k[2 * j + 1][piece];
          multiply<T>(acc, {above.x, below.x, above.y, below.y}, q[piece].x, q[piece].y);
          multiply<T>(acc, {above.z, below.z, above.w, below.w}, q[piece].z, q[piece].w);
        }
        // The lane of the quad that has the column of their head
        const int source = quad * 4 + own / 2;
        const float a = __shfl_sync(~0u, own % 2 ? acc[1] : acc[0], source);
        const float b = __shfl_sync(~0u, own % 2 ? acc[3] : acc[2], source);
        const uint32_t order_a = keys[2 * j] < 0 ? kNoOrder : order_of(a);
        const uint32_t order_b = keys[2 * j + 1] < 0 ? kNoOrder : order_of(b);
        most[j] = max(most[j], max(order_a, order_b));
        const int32_t middle = (left[j] + right[j]) / 2;
        (order_a >= order_b ? right[j] : left[j]) = middle;
      }
      if (size <= 2) break;
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    for (int other = 4; other < 4 * step.heads; other *= 2)
      most[j] = max(most[j], __shfl_xor_sync(~0u, most[j], other));
    if (lane % 4 == 0 && own == 0) best[warp][(8 * j + quad) / step.heads] = most[j];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < step.chunks(); i += blockDim.x) {
    const int64_t chunk = member * step.chunks() + i;
    const int from = i / step.warp_chunks() * step.spread;
    uint32_t largest = kLeastOrder;
    for (int w = 0; w < step.spread; ++w)
      largest = max(largest, best[from + w][i % step.warp_chunks()]);
    if (chunk < chunks.count) order[chunk] = largest;
  }
  if (!arrives_last(args.arrivals + list, args.members)) return;
  if (threadIdx.x == 0) args.arrivals[list] = 0;
  hip_step_keep(team, op, place, chunks, order);
}

}  // namespace heddle
