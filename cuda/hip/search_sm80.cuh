#pragma once
#include <algorithm>

#include "common/elements.cuh"
#include "common/sm80.cuh"
#include "common/team.cuh"
#include "core/hip.h"

// The search of HiP on any GPU from sm_80 on. A CTA takes one list after the other: one warp where
// there are more lists than warps, up to 16 where there are few. Keys of a tile go to a warp, which
// needs no other until a choice is made among all of them:
//
//   best[key] = max over queries that may see it of q . k
//
// 16-bit keys come from global memory as fragments of m16n8k16 products, on their right: a lane
// reads 16 bytes at a time, whose halves are the pairs of registers that two steps take as they
// are, and queries stand in shared memory with their columns in the same order. Nothing of a key
// passes through shared memory, and heads that look at the same keys one after the other find them
// in L1. A stage of few lists splits their chunks among CTAs, the last of which to finish chooses.
namespace heddle {

constexpr int kHipWarps = 12;  // of a CTA, at most
constexpr int kMostPeers = 4;  // of lists that are searched side by side

struct HipArgs {
  Hip op;
  uint32_t* slots;  // null if they stand in shared memory, behind queries and tiles
  int64_t slot, tasks;
  int members, heads;  // CTAs that share a list; heads whose queries shared memory holds
  size_t query_bytes;
  int* arrivals;
  int* queue;  // how many lists were taken after the first of each CTA; of those without members
  int* fault;
};

struct HipWarp {
  HipTile& tile;
  template <class X> __device__ X take(X& x) const { return atomicAdd(&x, X{1}); }
  __device__ void put(int32_t& x, int32_t value) const { x = value; }
  template <class Body> __device__ void each(int n, const Body& body) const {
    // So that the rounds of a constant number are known
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int first = 0; first < n; first += 32)
      if (first + lane < n) body(first + lane);
    __syncwarp();
  }
};

struct HipTeam : CtaTeam {
  static constexpr bool kHasPeers = false;
  HipTile* tiles;

  template <class Body> __device__ void share(int64_t n, const Body& body) const {
    const HipWarp squad{tiles[threadIdx.x / 32]};
    for (int64_t i = threadIdx.x / 32; i < n; i += blockDim.x / 32) body(squad, i);
    __syncthreads();
  }
  template <class Chosen> __device__ int64_t how_many(int64_t n, const Chosen& chosen) const {
    __shared__ uint32_t found[kHipWarps];
    const auto count = static_cast<int>(n), step = static_cast<int>(blockDim.x);
    uint32_t own = 0;
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x); i < count; i += step) own += chosen(i);
    own = __reduce_add_sync(~0u, own);
    if (blockDim.x == 32) return own;
    const uint32_t lane = threadIdx.x % 32;
    if (lane == 0) found[threadIdx.x / 32] = own;
    __syncthreads();
    const uint32_t all = __reduce_add_sync(~0u, lane < blockDim.x / 32 ? found[lane] : 0);
    __syncthreads();
    return all;
  }
};

// Warps of a CTA that search for a list each
struct HipPeers {
  static constexpr bool kHasPeers = true;
  const HipWarp squad;

  __device__ int peers() const { return static_cast<int>(blockDim.x) / 32; }
  __device__ int peer() const { return static_cast<int>(threadIdx.x) / 32; }
  __device__ void meet() const { __syncthreads(); }
  __device__ void raise(uint32_t& x, uint32_t y) const { atomicMax(&x, y); }
  template <class Body> __device__ void each(int64_t n, const Body& body) const {
    squad.each(static_cast<int>(n), body);
  }
  template <class Body> __device__ void share(int64_t n, const Body& body) const {
    for (int i = 0; i < static_cast<int>(n); ++i) body(squad, i);
    __syncwarp();
  }
  template <class Chosen> __device__ int64_t how_many(int64_t n, const Chosen& chosen) const {
    uint32_t own = 0;
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x) % 32; i < static_cast<int>(n); i += 32)
      own += chosen(i);
    return __reduce_add_sync(~0u, own);
  }
  template <class Chosen, class Place>
  __device__ void compact(int64_t n, const Chosen& chosen, const Place& place) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int at = 0;
    for (int first = 0; first < static_cast<int>(n); first += 32) {
      const bool own = first + lane < n && chosen(first + lane);
      const uint32_t mine = __ballot_sync(~0u, own);
      if (own) place(first + lane, at + __popc(mine & ((1u << lane) - 1)));
      at += __popc(mine);
    }
    __syncwarp();
  }
};

// The queries that a list is searched for and where keys stand
template <class T, bool kNear> class HipRows {
 public:
  int count;  // rows of a head: queries, or means of them

  __device__ HipRows(const HipArgs& args, const HipPlace& place)
      : args_(args), op_(args.op), place_(place), halves_(op_.kind == Hip::kHalves) {
    const int64_t queries = place.last - place.first, stride = op_.stride_q;
    count = static_cast<int>(halves_ ? max(queries / stride, int64_t{1})
                                     : (queries + stride - 1) / stride);
  }
  // The last key that row r may be scored with
  __device__ int32_t limit(int r) const {
    const int64_t last = halves_ ? place_.ahead + end(r) - 1 - op_.window : place_.end;
    return static_cast<int32_t>(last);
  }
  // As many columns as one load has
  template <int kCount> struct alignas(kCount * sizeof(T)) Columns { T values[kCount]; };
  // Those of row r from e on, as the dtype rounds their mean
  template <int kCount> __device__ Columns<kCount> read(int64_t head, int r, int e) const {
    const int64_t last = end(r);
    const int64_t first = halves_ ? last - 1 : place_.first + r * op_.stride_q;
    float sum[kCount] = {};
    for (int64_t query = first; query < last; ++query) {
      const T* q = static_cast<T*>(op_.q.data) + place_.b * op_.q.strides[0] +
                   (place_.first_query + query) * op_.q.strides[1] + head * op_.q.strides[2] +
                   e * op_.q.strides[3];
      if constexpr (kCount == 1) {
        sum[0] += turned(q, op_.q.strides[3], e, hip_query_position(op_, place_, query));
      } else {
        const Columns<kCount> own = *reinterpret_cast<const Columns<kCount>*>(q);
        for (int i = 0; i < kCount; ++i) sum[i] += to_float(own.values[i]);
      }
    }
    const auto n = static_cast<float>(last - first);
    Columns<kCount> mean;
    for (int i = 0; i < kCount; ++i) mean.values[i] = from_float<T>(sum[i] / n);
    return mean;
  }
  // Column e of a row, which `x` points to; turned by a position, if any are
  __device__ float turned(const T* x, int64_t stride, int e, int64_t position) const {
    const float own = to_float(*x);
    if (!op_.cos.data) return own;
    const int half = static_cast<int>(op_.q.shape[3]) / 2;
    const float other = e < half ? -to_float(x[half * stride]) : to_float(x[-half * stride]);
    const int64_t at = position * half + e % half;
    return own * static_cast<float*>(op_.cos.data)[at] +
           other * static_cast<float*>(op_.sin.data)[at];
  }
  // Where those of a head begin
  __device__ const T* keys(int64_t head) const {
    const int kv_head = static_cast<int>(head) / static_cast<int>(op_.q.shape[2] / op_.k.shape[2]);
    const int64_t sequence =
        op_.block_table.data ? 0
                             : place_.b * op_.k.strides[0] + place_.first_key * op_.k.strides[1];
    return static_cast<T*>(op_.k.data) + sequence + kv_head * op_.k.strides[2];
  }
  // Columns of several of those at k, of positions or -1, for which there is any row, as for pages
  // that do not exist; nothing branches between them where keys are no pages
  template <int kCount>
  __device__ void find(const T* k, int column, const int32_t (&t)[kCount], const uint32_t* slots,
                       const T* (&to)[kCount]) const {
    const T* any = k + column;
    if (kNear || op_.block_table.data) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const T* row = t[i] < 0 ? nullptr : key(k, t[i], slots[i * 8]);
        to[i] = row ? row + column : any;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) to[i] = any + max(t[i], 0) * op_.k.strides[1];
    }
  }
  // One of those at k, null if a page does not exist; a slot is one nearby
  __device__ const T* key(const T* k, int64_t t, uint32_t slot) const {
    if constexpr (kNear)
      if (op_.near.data && ~slot)
        return static_cast<T*>(op_.near.data) + int64_t{slot} * op_.near.shape[1];
    if (!op_.block_table.data) return k + t * op_.k.strides[1];
    const Tensor& table = op_.block_table;
    const auto size = static_cast<uint32_t>(op_.k.shape[1]), at = static_cast<uint32_t>(t);
    const int64_t page = static_cast<int32_t*>(
        table.data)[place_.b * table.strides[0] + at / size * table.strides[1]];
    if (page < 0 || page >= op_.k.shape[0]) {
      *args_.fault = 1;
      return nullptr;
    }
    return k + page * op_.k.strides[0] + at % size * op_.k.strides[1];
  }

 private:
  __device__ int64_t end(int r) const {
    return min(place_.first + (r + 1) * op_.stride_q, place_.last);
  }

  const HipArgs& args_;
  const Hip& op_;
  const HipPlace& place_;
  const bool halves_;
};

// 16-bit keys of up to kD columns, in whole pieces of 16 bytes
template <class T, int kD> class HipMatrix {
 public:
  // One size for all keys nearby: what comes over the bus takes longer than products with zeros
  static constexpr bool kNear = kD == 256, kHasPeers = true;
  __device__ HipMatrix(const HipArgs& args, const HipPlace& place, char* smem)
      : args_(args),
        d_(static_cast<int>(args.op.q.shape[3])),
        heads_(args.heads),
        rows_(args, place),
        groups_((rows_.count + 15) / 16),
        smem_q_(reinterpret_cast<uint4*>(smem)) {}

  // As query_bytes says, of a head
  static size_t bytes(const Hip& op) {
    return static_cast<size_t>((op.block_q / op.stride_q + 15) / 16 * 16 * kD) * sizeof(T);
  }

  __device__ int64_t heads() const { return heads_; }
  __device__ void load(int64_t head, int64_t n) {
    if (head == head_) return;
    head_ = head;
    // Heads that are held are not more than those of a kv head
    const int most = static_cast<int>(args_.op.q.shape[2] / args_.op.k.shape[2]);
    keys_ = rows_.keys(head);
    next_ = most - static_cast<int>(head) % most;
    // A row beyond the last is the last once more, and adds nothing to a maximum
    for (int i = threadIdx.x; i < n * groups_ * kPieces * 32; i += blockDim.x) {
      const int lane = i % 32, piece = i / 32 % kPieces, group = i / 32 / kPieces;
      const int e = piece * 32 + lane % 4 * 8;
      uint4 rows[2] = {};
      for (int j = 0; e < d_ && j < 2; ++j) {
        const int row = min(group % groups_ * 16 + lane / 4 + j * 8, rows_.count - 1);
        const auto columns = rows_.template read<8>(head + group / groups_, row, e);
        memcpy(&rows[j], &columns, sizeof columns);
      }
      uint4* to = smem_q_ + (i - lane) * 2 + lane;
      to[0] = {rows[0].x, rows[1].x, rows[0].y, rows[1].y};
      to[32] = {rows[0].z, rows[1].z, rows[0].w, rows[1].w};
    }
    __syncthreads();
  }

  __device__ void score(const HipWarp& warp, int64_t head) const {
    look(warp, head, 1, [&](int, int at, uint32_t best) { warp.tile.best[at] = best; });
  }
  template <class Put>
  __device__ void score_each(const HipWarp& warp, int count, const Put& put) const {
    look(warp, 0, count, put);
  }

 private:
  static constexpr int kPieces = kD / 32;     // of four lanes each
  static constexpr int kRows = 2 * 256 / kD;  // of a lane at a time: 64 registers

  // For heads from one on that look at the same keys
  template <class Put>
  __device__ __forceinline__ void look(const HipWarp& warp, int64_t head, int heads,
                                       const Put& put) const {
    const auto lane = static_cast<int>(threadIdx.x % 32);
    const int column = lane % 4 * 8;
    HipTile& tile = warp.tile;
    const T* keys = head < next_ ? keys_ : keys_ + args_.op.k.strides[2];
    // Columns that there are none of stay zeros
    uint4 k[kRows][kPieces] = {};
#pragma unroll 1
    for (int first = 0; first < kHipTile; first += kRows * 8) {
      // Of the keys first, first + 8, ... as many columns as a lane has of a fragment. Nobody asks
      // what one scores that does not exist
      int32_t t[kRows], last_key = -1;
      const T* from[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        t[i] = tile.keys[first + i * 8 + lane / 4];
        last_key = max(last_key, t[i]);
      }
      rows_.find(keys, column, t, tile.best + first + lane / 4, from);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece)
          if (piece * 32 + column < d_)
            k[i][piece] = __ldg(reinterpret_cast<const uint4*>(from[i] + piece * 32));
      const bool all_see = __all_sync(~0u, last_key <= rows_.limit(0));
#pragma unroll 1
      for (int other = 0; other < heads; ++other) {
        const uint4* q = smem_q_ + (head + other) * groups_ * kPieces * 64 + lane;
        float best[2 * kRows];  // of two of every eight keys
#pragma unroll
        for (float& one : best) one = -INFINITY;
#pragma unroll 1
        for (int group = 0; group < groups_; ++group) {
          float acc[kRows][4] = {};
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {
            const uint4* a = q + (group * kPieces + piece) * 64;
            const uint4 left = a[0], right = a[32];
#pragma unroll
            for (int i = 0; i < kRows; ++i)
              multiply<T>(acc[i], {left.x, left.y, left.z, left.w}, k[i][piece].x, k[i][piece].y);
#pragma unroll
            for (int i = 0; i < kRows; ++i)
              multiply<T>(acc[i], {right.x, right.y, right.z, right.w}, k[i][piece].z,
                          k[i][piece].w);
          }
          if (!all_see) hide(tile, first, group, acc);
            // NaN ranks as -inf
#pragma unroll
          for (int i = 0; i < 2 * kRows; ++i)
            best[i] = fmaxf(best[i], fmaxf(acc[i / 2][i % 2], acc[i / 2][i % 2 + 2]));
        }
        // Of eight lanes that have the same keys each hands over half of them, until it has one
        int own = 0;
        constexpr int kLeft = std::max(kRows / 4, 1);
#pragma unroll
        for (int mask = 16, count = 2 * kRows; mask >= 4; mask /= 2) {
          const bool upper = lane & mask;
          if (count == 1) {
            best[0] = fmaxf(best[0], __shfl_xor_sync(~0u, best[0], mask));
            continue;
          }
          count /= 2;
          own = 2 * own + upper;
#pragma unroll
          for (int i = 0; i < count; ++i) {
            const float given = upper ? best[i] : best[i + count];
            best[i] = fmaxf(upper ? best[i + count] : best[i], __shfl_xor_sync(~0u, given, mask));
          }
        }
#pragma unroll
        for (int i = 0; i < kLeft; ++i) {
          const int at = own * kLeft + i;
          put(other, first + at / 2 * 8 + lane % 4 * 2 + at % 2, order_of(best[i]));
        }
      }
    }
    __syncwarp();
  }

  // Products with queries that stand too early for a key
  __device__ void hide(const HipTile& tile, int first, int group, float (&acc)[kRows][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int j = 0; j < 2; ++j) {
      const int32_t limit = rows_.limit(min(group * 16 + lane / 4 + j * 8, rows_.count - 1));
#pragma unroll
      for (int i = 0; i < 2 * kRows; ++i)
        if (tile.keys[first + i / 2 * 8 + lane % 4 * 2 + i % 2] > limit)
          acc[i / 2][j * 2 + i % 2] = -INFINITY;
    }
  }

  const HipArgs& args_;
  const int d_, heads_;
  const HipRows<T, kNear> rows_;
  const int groups_;  // of sixteen rows
  uint4* smem_q_;     // [heads, groups, pieces, 2, lanes]
  int64_t head_ = -1;
  const T* keys_ = nullptr;  // of its kv head
  int next_ = 0;             // the first of the heads that are held that has the keys after these
};

// Any other keys, and those that turn: a lane has one, and eight rows at a time
template <class T> class HipPlain {
 public:
  static constexpr bool kNear = true, kHasPeers = false;
  __device__ HipPlain(const HipArgs& args, const HipPlace& place, char* smem)
      : op_(args.op), rows_(args, place), smem_q_(reinterpret_cast<float*>(smem)) {}

  static size_t bytes(const Hip& op) {
    return static_cast<size_t>(op.block_q / op.stride_q * op.q.shape[3] + 3) / 4 * 16;
  }

  __device__ int64_t heads() const { return 1; }
  __device__ void load(int64_t head, int64_t) {
    if (head == head_) return;
    head_ = head;
    const int d = static_cast<int>(op_.q.shape[3]);
    for (int i = threadIdx.x; i < rows_.count * d; i += blockDim.x) {
      smem_q_[i] = to_float(rows_.template read<1>(head, i / d, i % d).values[0]);
    }
    __syncthreads();
  }

  __device__ void score(const HipWarp& warp, int64_t) const {
    constexpr int kRows = 8;
    const int d = static_cast<int>(op_.q.shape[3]);
    const T* keys = rows_.keys(head_);
    warp.each(kHipTile, [&](int slot) {
      const int32_t t = warp.tile.keys[slot];
      const T* k = t < 0 ? nullptr : rows_.key(keys, t, warp.tile.best[slot]);
      if (!k) return;
      uint32_t best = kLeastOrder;
      for (int first = 0; first < rows_.count; first += kRows) {
        float sum[kRows] = {};
        for (int e = 0; e < d; ++e) {
          const float x = to_float(from_float<T>(rows_.turned(
              k + e * op_.k.strides[3], op_.k.strides[3], e, warp.tile.positions[slot])));
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            sum[r] = fmaf(x, smem_q_[min(first + r, rows_.count - 1) * d + e], sum[r]);
        }
        for (int r = 0; r < kRows; ++r)
          if (t <= rows_.limit(min(first + r, rows_.count - 1))) best = max(best, order_of(sum[r]));
      }
      warp.tile.best[slot] = best;
    });
  }

 private:
  const Hip& op_;
  const HipRows<T, kNear> rows_;
  float* smem_q_;  // [rows, d]
  int64_t head_ = -1;
};

// Whether all other members are through, whose scores can then be read
__device__ inline bool arrives_last(int* arrivals, int members) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrivals, 1) == members - 1;
  __syncthreads();
  __threadfence();
  return last;
}

__device__ inline void check_keys(const HipArgs& args, const HipPlace& place) {
  const Hip& op = args.op;
  const int32_t keys =
      static_cast<int32_t*>(op.cache_seqlens.data)[place.b * op.cache_seqlens.strides[0]];
  if (keys < op.q.shape[1] || keys > hip_keys(op)) *args.fault = 1;
}

// The list that a CTA takes after one, from all that none has; the last to find none clears the
// queue
__device__ inline int64_t next_task(const HipArgs& args, int64_t groups) {
  __shared__ int taken;
  __syncthreads();
  if (threadIdx.x == 0) {
    taken = atomicAdd(args.queue, 1);
    if (taken == args.tasks - 1) *args.queue = 0;
  }
  __syncthreads();
  return groups + taken;
}

// `smem` has query_bytes for queries, a tile for each warp, and a slot if they stand here
template <class Scorer> __device__ void hip_search(const HipArgs& args, char* smem) {
  const Hip& op = args.op;
  const HipTeam team{{}, reinterpret_cast<HipTile*>(smem + args.query_bytes)};
  const int64_t group = blockIdx.x / args.members, member = blockIdx.x % args.members;
  const int64_t groups = gridDim.x / args.members;
  uint32_t* slot = args.slots ? args.slots + group * args.slot
                              : reinterpret_cast<uint32_t*>(team.tiles + blockDim.x / 32);
  const auto next = [&] { return args.members == 1 ? next_task(args, groups) : args.tasks; };
  for (int64_t task = group; task < args.tasks; task = next()) {
    HipPlace place = hip_place(op, task);
    if (op.cache_seqlens.data && threadIdx.x == 0) check_keys(args, place);
    Scorer scorer(args, place, smem);
    if (op.kind == Hip::kHalves) {
      hip_halves(team, op, place, scorer, slot);
      continue;
    }
    const HipChunks chunks = hip_chunks(op, place);
    place.chunks = chunks.count;
    if (chunks.count > op.index.shape[3]) {
      if (args.members == 1) team.each(chunks.count, [&](int64_t i) { slot[i] = kNoOrder; });
      hip_descend(team, op, place, chunks, member, args.members, scorer, slot);
      if (args.members > 1 && !arrives_last(args.arrivals + group, args.members)) continue;
      // A choice looks at every score some twenty times: where queries and tiles stood is room now
      if (args.slots &&
          chunks.count * sizeof(uint32_t) <= args.query_bytes + blockDim.x / 32 * sizeof(HipTile)) {
        auto* near = reinterpret_cast<uint32_t*>(smem);
        team.each(chunks.count, [&](int64_t i) { near[i] = slot[i]; });
        hip_keep(team, op, place, chunks, near);
        continue;
      }
    } else if (member > 0) {
      continue;
    }
    hip_keep(team, op, place, chunks, slot);
  }
}

// Lists of heads in turn, by a warp each. `smem` has queries of all of them, then a tile and a slot
// for each warp.
template <class Scorer> __device__ void hip_search_peers(const HipArgs& args, char* smem) {
  const Hip& op = args.op;
  const int64_t peers = blockDim.x / 32, rows = op.index.shape[2];
  const auto peer = static_cast<int64_t>(threadIdx.x) / 32;
  auto* tiles = reinterpret_cast<HipTile*>(smem + args.query_bytes);
  uint32_t* slot = reinterpret_cast<uint32_t*>(tiles + peers) + peer * args.slot;
  const HipPeers team{{tiles[peer]}};
  for (int64_t task = blockIdx.x; task < args.tasks; task = next_task(args, gridDim.x)) {
    const HipPlace place = hip_place(op, (task / rows * peers + peer) * rows + task % rows);
    if (op.cache_seqlens.data && threadIdx.x == 0) check_keys(args, place);
    Scorer scorer(args, place, smem);
    hip_halves(team, op, place, scorer, slot);
  }
}

}  // namespace heddle
