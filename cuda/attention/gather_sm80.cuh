#pragma once
#include <cuda_pipeline.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "attention/gather_keys.cuh"
#include "common/lanes.cuh"
#include "common/sm80.cuh"

// Attention of blocks of queries over lists of short key blocks, on any GPU from sm_80 on:
//
//   out[i] = sum over t in sinks, list and window of exp(s[i, t] - m[i]) v[t] / l[i]
//
// A CTA of 4 warps owns 64 rows that share a list: queries of a head, or those of several heads if
// a block has few. Sink tokens, listed blocks and window stand one after the other as one sequence
// of keys, 64 to a tile, so that only the last tile is not full. Rows of k and v are gathered 16
// bytes at a time, a tile ahead of the products; a warp has 16 rows, whose queries, scores and sums
// stay in registers.
//
// Where there are few lists, as in a decode step, CTAs share the tiles of one. Each leaves its sums
// in memory, and the last to arrive adds them up in the order of the keys.
namespace heddle {

constexpr int kGatherTile = 64, kGatherThreads = 128;
constexpr float kGatherLog2e = 1.4426950408889634f;

struct GatherArgs {
  ForwardArgs call;
  GatherLists lists;
  int page_size_log2;
  int block_q;     // rows of a head in a CTA
  int heads;       // of a kv head, in a CTA
  int head_tiles;  // CTAs that share the heads of a kv head
  float least;     // below what is compared, and finite when it is scaled
  // Where keys of the window stand, from recent_from on, if not with the others; of shared lists
  Heads recent_k, recent_v;
  int recent_from, recents;
  // CTAs that share the keys of a list, and for each its sums: [units, splits, block_q * heads, d]
  int splits;
  float* part_out;
  float2* part_state;  // maximum in base 2 and sum, without d
  int* arrivals;       // [units]
};

// CTAs of a call, without splits: x counts tiles of rows, y heads, z the batch
struct GatherGrid {
  int64_t row_tiles, heads, b;
  int64_t units() const { return row_tiles * heads * b; }
};

// Shapes are there; fills in what a CTA has of them
inline GatherGrid plan_gather(GatherArgs& args) {
  const ForwardArgs& call = args.call;
  const int64_t block_q = std::min<int64_t>(call.mask.block_q, kGatherTile);
  // Heads can share a tile if they share its list
  const int64_t group = call.hq / call.hk;
  const int64_t heads =
      args.lists.lists > call.hk ? 1 : std::min<int64_t>(group, kGatherTile / block_q);
  const int64_t head_tiles = (group + heads - 1) / heads;
  args.page_size_log2 = std::countr_zero(static_cast<uint64_t>(call.page_size));
  args.block_q = static_cast<int>(block_q);
  args.heads = static_cast<int>(heads);
  args.head_tiles = static_cast<int>(head_tiles);
  const float unit = call.soft_cap > 0 ? call.soft_cap : std::fabs(call.scale);
  args.least = -1e30f / std::clamp(unit, 1e-8f, 1e30f);
  return {(call.sq + block_q - 1) / block_q, call.hk * head_tiles, call.b};
}

template <class T, int kD> struct GatherSmem {
  static constexpr int kPieces = kD / 8;  // of 16 bytes, swizzled by their row
  alignas(16) T k[2][kGatherTile * kD];
  alignas(16) T v[2][kGatherTile * kD];
  struct alignas(16) Rows {
    const T *k, *v;
  };
  // Of the tiles in work and the next two: positions, -1 for none, and where their rows stand
  int32_t keys[4][kGatherTile];
  Rows rows[4][kGatherTile];
  int32_t starts[2][kGatherTile];  // of their blocks, of the tiles after that
  bool last;                       // of the CTAs that share a list

  static __device__ int at(int row, int piece) { return row * kD + (piece ^ row % 8) * 8; }
};

// What a CTA works on
template <class T, bool kSplit> struct GatherPlace {
  const GatherArgs& args;
  const ForwardArgs& p;
  const int64_t batch = blockIdx.z;
  const int group, kv_head, head0, splits, row_tile, sq, row0, ahead;
  const GatherKeys keys;

  __device__ explicit GatherPlace(const GatherArgs& args)
      : args(args),
        p(args.call),
        group(static_cast<int>(p.hq / p.hk)),
        kv_head(static_cast<int>(blockIdx.y) / args.head_tiles),
        head0(static_cast<int>(blockIdx.y) % args.head_tiles * args.heads),
        splits(kSplit ? args.splits : 1),
        row_tile(static_cast<int>(blockIdx.x) / splits),
        sq(static_cast<int>(p.sq)),
        row0(row_tile * args.block_q),
        ahead(static_cast<int>(p.cache_seqlens
                                   ? clamp_to(p.cache_seqlens[batch * p.cache_stride], 0, p.sk)
                                   : p.sk) -
              sq),
        keys(args.lists, p.mask, batch, kv_head * group + head0, p.hq, row0,
             min(row0 + args.block_q, sq), ahead, 1) {}

  __device__ int head_of(int row) const { return kv_head * group + head0 + row / args.block_q; }
  // -1 if there is none
  __device__ int query_of(int row) const {
    const int sub = row / args.block_q, query = row0 + row % args.block_q;
    return sub >= args.heads || head0 + sub >= group || query >= sq ? -1 : query;
  }
  // Where the n-th key, which is t, stands in k or v and in their recent part, null if nowhere
  __device__ const T* row_of(int n, int t, const Heads& x, const Heads& recent_x) const {
    int64_t block = t < 0 ? -1 : batch;
    int row = t;
    if (p.block_table && t >= 0) {
      row &= (1 << args.page_size_log2) - 1;
      block =
          p.block_table[batch * p.table_row + int64_t{t >> args.page_size_log2} * p.table_column];
      if (block >= p.pages) block = -1;
    }
    bool recent = false;
    if constexpr (kSplit) {
      recent = args.recent_k.data && n >= keys.listed && t >= 0;
      if (recent) {
        row = t - args.recent_from;
        block = row >= 0 && row < args.recents ? 0 : -1;
      }
    }
    const Heads& its = recent ? recent_x : x;
    return block < 0 ? nullptr
                     : static_cast<const T*>(its.data) + block * its.batch + row * its.token +
                           kv_head * its.head;
  }
};

// Row `row` of the CTA, which came out as no number, from the keys alone that it sees: others'
// values may have done that. Apart, so that it takes no registers of what is usual.
template <class T, int kD, bool kSplit>
__device__ __noinline__ void gather_again(const GatherArgs& args, int row, float max, float sum) {
  const GatherPlace<T, kSplit> place(args);
  const ForwardArgs& p = args.call;
  const int lane = threadIdx.x % 32, query = place.query_of(row), head = place.head_of(row);
  const T* q = static_cast<const T*>(p.q.data) + place.batch * p.q.batch + query * p.q.token +
               head * p.q.head;
  const float factor = sum == 0 ? 0 : 1 / sum;
  float values[kD / 32] = {};
  attend_again(
      values, place.keys, place.ahead + query,
      [&](int n, int t) {
        const T* k = place.row_of(n, t, p.k, args.recent_k);
        float s = 0;
        for (int e = 0; k && e < kD; ++e) s = fmaf(to_float(q[e]), to_float(k[e]), s);
        s = p.soft_cap > 0 ? p.soft_cap * tanhf(s * p.scale / p.soft_cap) : s * p.scale;
        return exp2_approx(fmaf(s, kGatherLog2e, -max)) * factor;
      },
      [&](int n, int t, int column) {
        const T* v = place.row_of(n, t, p.v, args.recent_v);
        return v ? to_float(v[column]) : 0;
      });
  T* out = static_cast<T*>(p.out) + ((place.batch * p.sq + query) * p.hq + head) * kD;
  __syncwarp();  // other lanes have written there
#pragma unroll
  for (int c = 0; c < kD / 32; ++c) out[32 * c + lane] = from_float<T>(values[c]);
}

template <class T, int kD, bool kSplit>
__device__ __forceinline__ void gather_attention(const GatherArgs& args, GatherSmem<T, kD>& smem) {
  using Smem = GatherSmem<T, kD>;
  const ForwardArgs& p = args.call;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const GatherPlace<T, kSplit> place(args);
  const GatherKeys& keys = place.keys;
  const int64_t batch = place.batch;
  const int splits = place.splits, row_tile = place.row_tile, ahead = place.ahead;
  // Two rows of a thread
  int query[2], head[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp * 16 + lane / 4 + i * 8;
    head[i] = place.head_of(row);
    query[i] = place.query_of(row);
  }

  const int tiles = (keys.count + kGatherTile - 1) / kGatherTile;
  const int split = static_cast<int>(blockIdx.x) % splits;
  const int begin = tiles * split / splits, end = tiles * (split + 1) / splits;

  // A thread finds a key of a tile; what its list says is asked for a tile ahead
  const auto look_up = [&](int tile) {
    const int32_t* start =
        thread < kGatherTile ? keys.start_of(tile * kGatherTile + thread) : nullptr;
    if (start) __pipeline_memcpy_async(&smem.starts[tile % 2][thread], start, sizeof *start);
  };
  const auto find = [&](int tile) {
    if (thread >= kGatherTile) return;
    const int n = tile * kGatherTile + thread, slot = tile % 4;
    const int t = keys.at(n, smem.starts[tile % 2][thread]);
    const T *k = place.row_of(n, t, p.k, args.recent_k),
            *v = place.row_of(n, t, p.v, args.recent_v);
    smem.keys[slot][thread] = t;
    smem.rows[slot][thread] = {k, v};
  };
  // Of a thread's pieces of rows, which are multiples of eight apart: they are swizzled alike
  constexpr int kRowsAtOnce = kGatherThreads / Smem::kPieces;
  const int piece = thread % Smem::kPieces, own_row = thread / Smem::kPieces;
  const int to = Smem::at(own_row, piece);
  const auto gather = [&](int tile) {
    constexpr int kAhead = 4;  // rows that are looked up at the same time
#pragma unroll 1
    for (int first = 0; first < kGatherTile; first += kAhead * kRowsAtOnce) {
      typename Smem::Rows rows[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        rows[i] = smem.rows[tile % 4][own_row + first + i * kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        // Zeros instead of what nobody sees, which may hold NaN
        const bool exists = rows[i].k;
        const int at = to + (first + i * kRowsAtOnce) * kD;
        copy_or_zero(smem.k[tile % 2] + at, rows[i].k + piece * 8, exists);
        copy_or_zero(smem.v[tile % 2] + at, rows[i].v + piece * 8, exists);
      }
    }
  };

  look_up(begin);
  look_up(begin + 1);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  find(begin);
  find(begin + 1);
  __syncthreads();
  look_up(begin + 2);
  if (begin < end) gather(begin);
  __pipeline_commit();
  // A share has few tiles, whose copies would each wait for the one before
  if (kSplit && begin + 1 < end) gather(begin + 1);
  if (kSplit) __pipeline_commit();

  // Scores are compared before they are scaled, so that a scale is positive, and a score of -inf
  // stays one
  const uint32_t signs = p.scale < 0 ? 0x80008000u : 0;
  const float scale = fmaxf(fabsf(p.scale), 1e-30f);
  uint32_t frag_q[kD / 16][4];
#pragma unroll
  for (int step = 0; step < kD / 16; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* q = static_cast<const T*>(p.q.data) + batch * p.q.batch + query[i % 2] * p.q.token +
                   head[i % 2] * p.q.head + step * 16 + i / 2 * 8 + lane % 4 * 2;
      frag_q[step][i] = query[i % 2] < 0 ? 0 : *reinterpret_cast<const uint32_t*>(q) ^ signs;
    }

  constexpr float kLn2 = 0.6931471805599453f;
  // A capped score is cap * tanh(q . k * scale / cap) and has no other scale
  const float scale_log2 = (p.soft_cap > 0 ? p.soft_cap : scale) * kGatherLog2e;
  const float into_cap = scale / p.soft_cap;
  // row_max starts at a large negative finite number: (-inf) - (-inf) would poison empty rows
  float row_max[2] = {args.least, args.least}, row_sum[2] = {};
  float acc_o[kD / 8][4] = {};

  for (int tile = begin; tile < end; ++tile) {
    const bool both = kSplit && tile == begin;  // this tile and the next are on their way
    if (both) {
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    // The tile is there for all, and nobody needs the one before it any more
    __syncthreads();
    find(tile + 2);
    look_up(tile + 3);
    if (tile + 1 < end && !both) gather(tile + 1);
    __pipeline_commit();
    if (kSplit && warp * 16 >= args.block_q * args.heads) continue;  // it has no rows

    float acc_s[kGatherTile / 8][4] = {};
    const int matrix = lane / 8, line = lane % 8;
    const uint32_t smem_k = smem_address(smem.k[tile % 2]), smem_v = smem_address(smem.v[tile % 2]);
#pragma unroll
    for (int step = 0; step < kD / 16; ++step)
#pragma unroll
      for (int n = 0; n < kGatherTile / 8; n += 2) {
        uint32_t frag_k[4];
        load_matrices<false>(
            smem_k + 2 * Smem::at((n + matrix / 2) * 8 + line, step * 2 + matrix % 2), frag_k);
        multiply<T>(acc_s[n], frag_q[step], frag_k[0], frag_k[1]);
        multiply<T>(acc_s[n + 1], frag_q[step], frag_k[2], frag_k[3]);
      }

    const int n0 = tile * kGatherTile;
    const int32_t* own = smem.keys[tile % 4];
    const auto for_all = [&](int c) {
      const int t = own[c];
      return t >= 0 && keys.sees(keys.first, n0 + c, t) && keys.sees(keys.last, n0 + c, t);
    };
    const bool whole = __all_sync(~0u, for_all(lane) && for_all(lane + 32));
    const auto each_score = [&](const auto& body) {
#pragma unroll
      for (int n = 0; n < kGatherTile / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) body(acc_s[n][i], n * 8 + lane % 4 * 2 + i % 2, i / 2);
    };
    if (p.soft_cap > 0) each_score([&](float& s, int, int) { s = tanhf(s * into_cap); });
    if (!whole)
      each_score([&](float& s, int c, int row) {
        const int t = own[c];
        if (t < 0 || !keys.sees(ahead + query[row], n0 + c, t)) s = -INFINITY;
      });
    float top[2] = {row_max[0], row_max[1]};
    each_score([&](float& s, int, int row) { top[row] = fmaxf(top[row], s); });
#pragma unroll
    for (int i = 0; i < 2; ++i) top[i] = quad_max(top[i]);
    // A maximum that has not grown by more than a factor of 256 serves as well
    const auto grows = [&](int i) { return (top[i] - row_max[i]) * scale_log2 > 8; };
    if (__any_sync(~0u, grows(0) || grows(1)))
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float correction = exp2_approx((row_max[i] - top[i]) * scale_log2);
        row_max[i] = top[i];
        row_sum[i] *= correction;
#pragma unroll
        for (int f = 0; f < kD / 8; ++f) {
          acc_o[f][2 * i] *= correction;
          acc_o[f][2 * i + 1] *= correction;
        }
      }
    const float shift[2] = {row_max[0] * scale_log2, row_max[1] * scale_log2};
    each_score([&](float& s, int, int row) {
      s = exp2_approx(fmaf(s, scale_log2, -shift[row]));
      row_sum[row] += s;
    });

#pragma unroll
    for (int step = 0; step < kGatherTile / 16; ++step) {
      uint32_t frag_p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* s = acc_s[2 * step + i / 2] + i % 2 * 2;
        frag_p[i] = pack_pair<T>(s[0], s[1]);
      }
#pragma unroll
      for (int f = 0; f < kD / 8; f += 2) {
        uint32_t frag_v[4];
        load_matrices<true>(
            smem_v + 2 * Smem::at(step * 16 + matrix % 2 * 8 + line, f + matrix / 2), frag_v);
        multiply<T>(acc_o[f], frag_p, frag_v[0], frag_v[1]);
        multiply<T>(acc_o[f + 1], frag_p, frag_v[2], frag_v[3]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row_sum[i] = quad_sum(row_sum[i]);
    row_max[i] *= scale_log2;
  }
  const auto out_of = [&](int query, int head) {
    return static_cast<T*>(p.out) + ((batch * p.sq + query) * p.hq + head) * kD;
  };
  const auto write_lse = [&](int query, int head, float max, float sum) {
    p.lse[(batch * p.hq + head) * p.sq + query] = sum == 0 ? -INFINITY : fmaf(max, kLn2, logf(sum));
  };

  if constexpr (!kSplit) {
    uint32_t poisoned = 0;  // of the warp's rows
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (query[i] < 0) continue;
      const float factor = row_sum[i] == 0 ? 0 : 1 / row_sum[i];
      T* out = out_of(query[i], head[i]) + lane % 4 * 2;
      float total = 0;
#pragma unroll
      for (int f = 0; f < kD / 8; ++f) {
        const float a = acc_o[f][2 * i] * factor, b = acc_o[f][2 * i + 1] * factor;
        total += a + b;
        *reinterpret_cast<uint32_t*>(out + f * 8) = pack_pair<T>(a, b);
      }
      if (total != total) poisoned |= 1u << (lane / 4 + 8 * i);
      if (lane % 4 == 0) write_lse(query[i], head[i], row_max[i], row_sum[i]);
    }
    poisoned = __reduce_or_sync(~0u, poisoned);
    for (; poisoned != 0; poisoned &= poisoned - 1) {
      const int its = __ffs(static_cast<int>(poisoned)) - 1, i = its / 8, from = its % 8 * 4;
      const auto of = [&](auto(&x)[2]) { return __shfl_sync(~0u, i ? x[1] : x[0], from); };
      gather_again<T, kD, kSplit>(args, warp * 16 + its, of(row_max), of(row_sum));
    }
  } else {
    const int rows = args.block_q * args.heads;
    const int64_t row_tiles = gridDim.x / splits;
    const int64_t unit = (batch * gridDim.y + blockIdx.y) * row_tiles + row_tile;
    const int64_t first = unit * splits * rows;  // of the sums of this unit
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (query[i] < 0) continue;
      const int64_t at = first + split * rows + warp * 16 + lane / 4 + i * 8;
#pragma unroll
      for (int f = 0; f < kD / 8; ++f)
        *reinterpret_cast<float2*>(args.part_out + at * kD + f * 8 + lane % 4 * 2) = {
            acc_o[f][2 * i], acc_o[f][2 * i + 1]};
      if (lane % 4 == 0) args.part_state[at] = {row_max[i], row_sum[i]};
    }
    // All have written before the arrival says so, and the last reads what the others wrote
    __threadfence();
    __syncthreads();
    if (thread == 0) smem.last = atomicAdd(args.arrivals + unit, 1) == splits - 1;
    __syncthreads();
    if (!smem.last) return;
    __threadfence();
    if (thread == 0) args.arrivals[unit] = 0;
    // A warp has a row, of which a lane has pairs
    for (int row = warp; row < rows; row += kGatherThreads / 32) {
      const int query = place.query_of(row), head = place.head_of(row);
      if (query < 0) continue;
      const auto at = [&](int from) { return first + from * rows + row; };
      float max = -1e30f, sum = 0;
      for (int from = lane; from < splits; from += 32)
        max = fmaxf(max, args.part_state[at(from)].x);
      max = warp_max(max);
      // With it none waits for the one before, so that many are on their way at the same time
      constexpr int kAhead = 16;
      float2 total[kD / 64] = {};
#pragma unroll 1
      for (int from = 0; from < splits; from += kAhead) {
        float2 states[kAhead], parts[kAhead][kD / 64];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const bool exists = from + i < splits;
          states[i] = exists ? args.part_state[at(from + i)] : float2{-INFINITY, 0};
#pragma unroll
          for (int f = 0; f < kD / 64; ++f)
            parts[i][f] = exists ? *reinterpret_cast<const float2*>(
                                       args.part_out + at(from + i) * kD + f * 64 + lane * 2)
                                 : float2{};
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const float weight = exp2_approx(states[i].x - max);
          sum = fmaf(states[i].y, weight, sum);
#pragma unroll
          for (int f = 0; f < kD / 64; ++f) {
            total[f].x = fmaf(parts[i][f].x, weight, total[f].x);
            total[f].y = fmaf(parts[i][f].y, weight, total[f].y);
          }
        }
      }
      const float factor = sum == 0 ? 0 : 1 / sum;
      bool poisoned = false;
#pragma unroll
      for (int f = 0; f < kD / 64; ++f) {
        const float a = total[f].x * factor, b = total[f].y * factor;
        poisoned |= a != a || b != b;
        *reinterpret_cast<uint32_t*>(out_of(query, head) + f * 64 + lane * 2) = pack_pair<T>(a, b);
      }
      if (lane == 0) write_lse(query, head, max, sum);
      if (__any_sync(~0u, poisoned)) gather_again<T, kD, kSplit>(args, row, max, sum);
    }
  }
}

}  // namespace heddle
