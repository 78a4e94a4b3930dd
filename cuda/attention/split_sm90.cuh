#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "attention/pages_sm90.cuh"
#include "attention/softmax_sm90.cuh"
#include "attention/split_sm90.h"
#include "common/lanes.cuh"
#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "common/tile.cuh"

// Softmax attention for few rows over many keys, contiguous or in pages; the equation is that of
// forward_sm90.cuh. Reading k and v once is the floor, so the rows of q that share a kv head, all
// heads of its group and all queries, stand together in one operand of 64 rows.
//
// A unit is one such operand; its key tiles are numbered, and so are those of all units one after
// another. Each CTA takes an equal run of these numbers, whatever the lengths on the device are:
// one warp loads through a ring of stages, one warpgroup computes. Of a unit that several CTAs
// share each leaves its sums in memory, and the last to arrive adds them up in the order of the
// keys.
namespace heddle {
namespace {

template <int kD, bool kFloat8> struct SplitTile {
  static constexpr int kKeys = kD <= 128 ? 128 : 64;
  // What a tile's products and exponentials wait for each other takes as long as copies of 64 KB
  static constexpr int kCtas = kD == 64 && !kFloat8 ? kSplitCtas : 1;  // of a multiprocessor
  static constexpr int kStages = kFloat8 ? 2 : 3;                      // 192 KB on their way
  static constexpr int kRaw = kFloat8 ? 2 : 0;                         // stages of e4m3
  // a warpgroup computes, a warp behind it loads, and a last warpgroup converts
  static constexpr int kThreads = kFloat8 ? 384 : 160;
  static constexpr int kWorks = 2;
};

// A run of key tiles of one unit, as the loading warp describes it
struct SplitWork {
  int sequence;                // or -1 after the last run
  int kv_head;                 // of the unit
  int first_row, rows;         // likewise, counted from the first of q on
  int sk, off;                 // keys of its sequence, and the position of q's first query in it
  int key_tile, key_tiles;     // of this run
  int unit_begin, unit_tiles;  // those that its rows see, counted over all units
};

// Stages of keys and values of e4m3, 128 columns wide
template <int kStages> struct SplitRaw {
  sm90::Tile<128, 64> k[kStages], v[kStages];
  sm90::Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};
template <> struct SplitRaw<0> {};

template <int kD, bool kFloat8> struct SplitSmem {
  using Shape = SplitTile<kD, kFloat8>;
  sm90::Tile<kSplitRows, kD> q;
  sm90::Tile<Shape::kKeys, kD> k[Shape::kStages], v[Shape::kStages];
  SplitRaw<Shape::kRaw> raw;
  SplitWork work[Shape::kWorks];
  sm90::Barrier work_full[Shape::kWorks], work_empty[Shape::kWorks];
  sm90::Barrier k_full[Shape::kStages], k_empty[Shape::kStages];
  sm90::Barrier v_full[Shape::kStages], v_empty[Shape::kStages];
  int poisoned[kSplitRows];  // rows that came out as no number
  int arrived;
};

struct SplitArgs {
  // what is looked at before the first copy, in one line of the cache of arguments
  int sequences, sq, sk, hk, group, most_queries;
  int window;      // 0 is all
  int box, boxes;  // a copy moves `box` rows, of which so many are a tile
  const int32_t *cache_seqlens, *block_table, *cu_seqlens_q;

  int hq, d, dv;
  float scale_log2, scale, soft_cap;
  bool causal;  // or windowed
  const float *slopes, *sink;
  int64_t slopes_stride, sink_stride;
  HeadScales scales;  // of e4m3
  bool half;          // out of e4m3 is f16
  int64_t cache_stride, table_row, table_column, cu_q_stride;
  int pages, page_log2;  // of 2^page_log2 keys
  const uint16_t *q, *k, *v;
  uint16_t* out;
  Strides q_strides, k_strides, v_strides, out_strides;
  float* lse;
  float* part_out;
  float2* part_state;
  int* arrivals;
  int *verdict, *judged;  // null, or where it is said whether lengths and pages are out of range

  // nothing is out of bounds, whatever lengths and offsets are
  __device__ __forceinline__ int keys(int sequence) const {
    return cache_seqlens ? min(max(cache_seqlens[sequence * cache_stride], 0), sk) : sk;
  }
  __device__ __forceinline__ int q_begin(int sequence) const {
    return cu_seqlens_q ? min(max(cu_seqlens_q[sequence * cu_q_stride], 0), sq) : 0;
  }
  // What products of a query head are multiplied by
  __device__ __forceinline__ float scale_of(int head) const {
    return scale * scales.score(head, head / group);
  }
};

// A sequence as a warp numbers the key tiles of its units: `tiles` each from `begin` on
struct SplitSequence {
  int q_begin, sq, sk, row_tiles, first_tile, tiles, begin;
};

// Which key tiles of which unit a CTA takes
template <int kKeys> struct SplitPlan {
  const SplitArgs& args;

  // From the first tile that a row sees to the last
  __device__ __forceinline__ SplitSequence sequence(int i) const {
    SplitSequence its{};
    if (i >= args.sequences) return its;
    its.q_begin = args.q_begin(i);
    its.sq = args.cu_seqlens_q ? args.q_begin(i + 1) - its.q_begin : args.sq;
    its.sk = args.keys(i);
    its.row_tiles =
        its.sq > args.most_queries ? 0 : (its.sq * args.group + kSplitRows - 1) / kSplitRows;
    its.first_tile = args.window ? max(its.sk - its.sq - args.window + 1, 0) / kKeys : 0;
    // one without keys visits a tile all the same, fully masked
    its.tiles = max((its.sk + kKeys - 1) / kKeys - its.first_tile, 1);
    return its;
  }
  __device__ __forceinline__ int size(const SplitSequence& its) const {
    return its.tiles * its.row_tiles * args.hk;
  }
  // Of all units, by a warp; none where sequences overlap
  __device__ __forceinline__ int total(int lane) const {
    if (!args.cache_seqlens) return args.sequences * size(sequence(0));
    int sum = 0;
    bool apart = true;
    for (int i = lane; i < args.sequences; i += 32) {
      const SplitSequence its = sequence(i);
      sum += size(its);
      apart &= its.sq >= 0;
    }
    sum = warp_sum(sum);
    return __all_sync(~0u, apart) ? sum : 0;
  }
  // The sequences from `first` on, one for each lane of a warp, whose tiles are numbered from
  // `next` on; returns the number behind the last
  __device__ __forceinline__ int look(SplitSequence& its, int first, int next, int lane) const {
    if (args.sequences == 1) {
      its = sequence(0);
      return size(its);
    }
    its = sequence(first + lane);
    const int until = sum_so_far(size(its), lane);
    its.begin = next + until - size(its);
    return next + __shfl_sync(~0u, until, 31);
  }
  // The tiles of a unit of this sequence that a row of it sees, among its own
  __device__ __forceinline__ int2 seen(const SplitSequence& its, int row_tile) const {
    if (!args.causal || its.row_tiles == 1) return {0, its.tiles};
    const int first = row_tile * kSplitRows, off = its.sk - its.sq,
              last = min(first + kSplitRows, its.sq * args.group) - 1;
    const int from = args.window ? max(first / args.group + off - args.window + 1, 0) / kKeys : 0,
              until = (min(last / args.group + off + 1, its.sk) + kKeys - 1) / kKeys;
    return {from - its.first_tile, max(until, from + 1) - its.first_tile};
  }
  // CTA c of n begins at tile begin(c), which is total * c / n; tile x belongs to CTA owner(x)
  __device__ __forceinline__ static int begin(int total, int c, int n) {
    // of 32 bits, as everything waits for the first copy
    const unsigned each = static_cast<unsigned>(total) / n;
    return each * c + (total - each * n) * c / n;
  }
  __device__ __forceinline__ static int owner(int total, int x, int n) {
    return static_cast<int>(((x + int64_t{1}) * n - 1) / total);
  }
};

// Rows of k or v of one kv head and sequence, through the block table if there is one
template <class Element> struct SplitRows {
  const SplitArgs& args;
  const Element* data;
  const Strides& strides;
  int sequence, kv_head;
  __device__ __forceinline__ const Element* operator()(int key) const {
    int64_t block = sequence;
    if (args.block_table) {
      const PageRows<SplitArgs, Element> table{args, sequence, data, strides};
      block = table.page_inside(key);
      key = table.row(key);
    }
    return data + block * strides.batch + key * strides.row + kv_head * strides.head;
  }
};

// A tile of e4m3 as f16, by a warpgroup
template <int kD, class Raw, class Tile>
__device__ __forceinline__ void convert_tile(const Raw& from, const Tile& to) {
  constexpr int kPieces = kD / 16;
  const int thread = threadIdx.x % 128;
#pragma unroll 4
  for (int i = thread; i < 128 * kPieces; i += 128) {
    const int row = i / kPieces, piece = i % kPieces;
    const uint4 bits = sm90::load_4_words(from.address(row, piece * 8));
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    uint32_t pairs[8];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      pairs[j] = sm90::unpack_e4m3(static_cast<uint16_t>(words[j / 2] >> j % 2 * 16));
      // lanes of both panels write to other banks
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int half = (j + piece / 4) % 2;
      const uint4 its = half ? uint4{pairs[4], pairs[5], pairs[6], pairs[7]}
                             : uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
      sm90::store_4_words(to.address(row, piece * 16 + half * 8), its);
    }
  }
}

template <DType kType, int kD, bool kFloat8>
__global__ void __launch_bounds__((SplitTile<kD, kFloat8>::kThreads),
                                  (SplitTile<kD, kFloat8>::kCtas))
    split_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_k,
                      const __grid_constant__ sm90::TensorMap gmem_v, const SplitArgs args) {
  using namespace sm90;
  using Shape = SplitTile<kD, kFloat8>;
  using Element = std::conditional_t<kFloat8, uint8_t, uint16_t>;  // of q, k and v
  constexpr int kKeys = Shape::kKeys, kStages = Shape::kStages, kWorks = Shape::kWorks;
  auto& smem = shared_memory<SplitSmem<kD, kFloat8>>();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kWorks; ++i) {
      smem.work_full[i].init(1);
      smem.work_empty[i].init(kFloat8 ? 8 : 4);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      smem.k_full[stage].init(kFloat8 ? 4 : 1);
      smem.v_full[stage].init(kFloat8 ? 4 : 1);
      smem.k_empty[stage].init(4);
      smem.v_empty[stage].init(4);
    }
    if constexpr (kFloat8) {
      for (int stage = 0; stage < Shape::kRaw; ++stage) {
        smem.raw.k_full[stage].init(1);
        smem.raw.v_full[stage].init(1);
        smem.raw.k_empty[stage].init(4);
        smem.raw.v_empty[stage].init(4);
      }
    }
    fence_barrier_init();
    prefetch(gmem_k);
    prefetch(gmem_v);
  }
  __syncthreads();
  // a step is short, so what precedes the first look at memory runs under the end of what is before
  let_next_begin();
  await_previous();

  const SplitPlan<kKeys> plan{args};
  const int total = plan.total(lane);
  // no CTA without tiles stands between two that share a unit
  const int ctas = min(static_cast<int>(gridDim.x), max(total, 1));

  // its instructions come first, as all others wait for its copies
  if (kFloat8 ? warp / 4 == 1 : warp == 4) [[likely]] {
    if constexpr (kFloat8) {
      lower_registers<96>();
      if (warp > 4) return;
    }
    const int edge = plan.begin(total, min(static_cast<int>(blockIdx.x) + lane % 2, ctas), ctas);
    const int end = __shfl_sync(~0u, edge, 1);
    int at = __shfl_sync(~0u, edge, 0);
    SplitSequence each;
    int first_sequence = 0, until = plan.look(each, 0, 0, lane);
    uint32_t visit = 0, loaded = 0;
    bool bad = args.sequences == 0;
    auto publish = [&](const SplitWork& work) {
      const Turn<kWorks> turn(visit++);
      if (lane == 0) {
        smem.work_empty[turn.stage].wait(turn.parity ^ 1);
        smem.work[turn.stage] = work;
        smem.work_full[turn.stage].arrive();
      }
      __syncwarp();
    };
    while (at < end) {
      if (at >= until) {
        first_sequence += 32;
        until = plan.look(each, first_sequence, until, lane);
        continue;
      }
      const int place = __popc(__ballot_sync(~0u, each.begin + plan.size(each) <= at));
      const auto of = [&](int value) { return __shfl_sync(~0u, value, place); };
      const SplitSequence its{of(each.q_begin),   of(each.sq),         of(each.sk),
                              of(each.row_tiles), of(each.first_tile), of(each.tiles),
                              of(each.begin)};
      const int inside = static_cast<unsigned>(at - its.begin) / its.tiles;
      const int unit_begin = its.begin + inside * its.tiles, ends = unit_begin + its.tiles;
      SplitWork work;
      work.sequence = first_sequence + place;
      // a division is a tenth of a microsecond
      work.kv_head = its.row_tiles == 1 ? inside : inside / its.row_tiles;
      int row_tile = inside - work.kv_head * its.row_tiles;
      // late rows see more keys than early ones, of which every CTA gets as many
      if (args.causal) row_tile = row_tile % 2 ? its.row_tiles - 1 - row_tile / 2 : row_tile / 2;
      const int2 seen = plan.seen(its, row_tile);
      const int from = max(at - unit_begin, seen.x), to = min(min(end, ends) - unit_begin, seen.y);
      at = min(end, ends);
      if (from >= to) continue;
      work.first_row = its.q_begin * args.group + row_tile * kSplitRows;
      work.rows = min(its.sq * args.group - row_tile * kSplitRows, kSplitRows);
      work.sk = its.sk;
      work.off = its.sk - its.sq - its.q_begin;
      work.key_tile = its.first_tile + from;
      work.key_tiles = to - from;
      work.unit_begin = unit_begin + seen.x;
      work.unit_tiles = seen.y - seen.x;
      // a lane copies one box of a tile; 32 of them ask for as many pages at once
      const int its_row = lane * args.box;
      const PageRows<SplitArgs, Element> table{args, work.sequence, nullptr, args.k_strides};
      int pages = 0;
      for (int j = 0; j < work.key_tiles; ++j, ++loaded) {
        const Turn<kFloat8 ? Shape::kRaw : kStages> turn(loaded);
        const int key = (work.key_tile + j) * kKeys + its_row;
        int block = work.sequence, row = key;
        if (args.block_table) {
          const int asked = j * args.boxes % 32;
          if (asked == 0) {
            // what lies outside arrives as zeros: pages behind the last key are not looked at
            pages = key < its.sk ? table.page(key) : args.pages;
            bad |= key < its.sk && (pages < 0 || pages >= args.pages);
          }
          block = __shfl_sync(~0u, pages, asked + lane);
          row = table.row(key);
        }
        auto load = [&](auto& tile, Barrier& full, Barrier& empty, const TensorMap& map) {
          empty.wait(turn.parity ^ 1);
          if (lane == 0) full.arrive_expect(tile.kBytes);
          __syncwarp();
          if (its_row >= kKeys) return;
          for (uint32_t at = 0; at < tile.kBytes; at += tile.kPanelBytes)
            copy_to_smem(tile.bytes + at + its_row * 128, map, full,
                         static_cast<int>(at / tile.kPanelBytes) * 64, row, work.kv_head, block,
                         its.row_tiles > 1 ? Keep::kNormal : Keep::kShortly);
        };
        auto load_both = [&](auto& to) {
          load(to.k[turn.stage], to.k_full[turn.stage], to.k_empty[turn.stage], gmem_k);
          load(to.v[turn.stage], to.v_full[turn.stage], to.v_empty[turn.stage], gmem_v);
        };
        if constexpr (kFloat8) {
          load_both(smem.raw);
        } else {
          load_both(smem);
        }
        if (j == 0) publish(work);
      }
    }
    SplitWork last{};
    last.sequence = -1;
    publish(last);
    if (args.verdict) {
      // every page was looked at by who loads it, every length by all; the last CTA says it
      for (int i = lane; i < args.sequences; i += 32) {
        const int keys = args.cache_seqlens[i * args.cache_stride];
        bad |= keys < 0 || keys > args.sk;
        if (!args.cu_seqlens_q) continue;
        const int begins = args.cu_seqlens_q[i * args.cu_q_stride],
                  ends = args.cu_seqlens_q[(i + 1) * args.cu_q_stride];
        bad |= begins > ends || (i == 0 && begins != 0) ||
               (i == args.sequences - 1 && ends != args.sq);
      }
      bad = __any_sync(~0u, bad);
      if (lane == 0) {
        constexpr int kBad = 1 << 16;
        const int sum = fetch_add(args.judged, bad ? kBad + 1 : 1) + (bad ? kBad + 1 : 1);
        if (sum % kBad == static_cast<int>(gridDim.x)) {
          *args.judged = 0;
          *args.verdict = sum >= kBad;
        }
      }
    }
    return;
  }

  auto release = [&](Barrier& empty) {
    if (lane == 0) empty.arrive();
  };
  if constexpr (kFloat8) {
    if (warp >= 8) {
      uint32_t converted = 0;
      for (uint32_t visit = 0;; ++visit) {
        const Turn<kWorks> turn(visit);
        smem.work_full[turn.stage].wait(turn.parity);
        const int sequence = smem.work[turn.stage].sequence;
        const int key_tiles = smem.work[turn.stage].key_tiles;
        __syncwarp();
        release(smem.work_empty[turn.stage]);
        if (sequence < 0) return;
        for (int j = 0; j < key_tiles; ++j, ++converted) {
          const Turn<Shape::kRaw> from(converted);
          const Turn<kStages> to(converted);
          auto convert = [&](const auto& raw, Barrier& raw_full, Barrier& raw_empty,
                             const auto& tile, Barrier& full, Barrier& empty) {
            raw_full.wait(from.parity);
            empty.wait(to.parity ^ 1);
            convert_tile<kD>(raw, tile);
            fence_async_smem();
            __syncwarp();
            release(full);
            release(raw_empty);
          };
          convert(smem.raw.k[from.stage], smem.raw.k_full[from.stage], smem.raw.k_empty[from.stage],
                  smem.k[to.stage], smem.k_full[to.stage], smem.k_empty[to.stage]);
          convert(smem.raw.v[from.stage], smem.raw.v_full[from.stage], smem.raw.v_empty[from.stage],
                  smem.v[to.stage], smem.v_full[to.stage], smem.v_empty[to.stage]);
        }
      }
    }
    raise_registers<240>();
  }

  const int thread = threadIdx.x;
  float acc_s[kKeys / 2], acc_o[kD / 2];
  uint32_t frag_p[kKeys / 16][4] = {};
  RowSoftmax rows;
  RowBounds bounds;
  ScoreMap map[2] = {{args.scale, args.soft_cap, 0}, {args.scale, args.soft_cap, 0}};
  const bool mapped = args.soft_cap > 0 || args.slopes || (!kFloat8 && !(args.scale_log2 > 0));
  // mapped scores are in log2 units already, and those of e4m3, of which each row has its scale
  const float to_log2 = mapped || kFloat8 ? 1.f : args.scale_log2;

  auto sync = [&] { named_barrier_sync(1, 128); };

  uint32_t used = 0;
  for (uint32_t visit = 0;; ++visit) {
    const Turn<kWorks> turn(visit);
    smem.work_full[turn.stage].wait(turn.parity);
    const SplitWork work = smem.work[turn.stage];
    __syncwarp();
    release(smem.work_empty[turn.stage]);
    if (work.sequence < 0) break;
    const int key_tiles = __shfl_sync(~0u, work.key_tiles, 0);

    const int rows_here = work.rows, batch = args.cu_seqlens_q ? 0 : work.sequence;
    auto query_of = [&](int row) { return (work.first_row + row) / args.group; };
    auto head_of = [&](int row) {
      return work.kv_head * args.group + (work.first_row + row) % args.group;
    };
    auto q_of = [&](int row) {
      return reinterpret_cast<const Element*>(args.q) + batch * args.q_strides.batch +
             query_of(row) * args.q_strides.row + head_of(row) * args.q_strides.head;
    };
    auto out_of = [&](int row) {
      return args.out + batch * args.out_strides.batch + query_of(row) * args.out_strides.row +
             head_of(row) * args.out_strides.head;
    };
    auto lse_of = [&](int row) {
      return args.lse + (static_cast<int64_t>(batch) * args.hq + head_of(row)) * args.sq +
             query_of(row);
    };
    auto position_of = [&](int row) { return query_of(row) + work.off; };
    auto sink_of = [&](int row) {
      return args.sink ? args.sink + head_of(row) * args.sink_stride : nullptr;
    };
    auto map_of = [&](int row) {
      return ScoreMap{kFloat8 ? args.scale_of(head_of(row)) : args.scale, args.soft_cap,
                      args.slopes ? args.slopes[head_of(row) * args.slopes_stride] * kLog2e : 0};
    };

    // the run before has done its products with q, and all have read `arrived`
    sync();
    for (int i = thread; i < kSplitRows * kD / 8; i += 128) {
      const int row = i / (kD / 8), column = i % (kD / 8) * 8;
      const uint32_t to = smem.q.address(row, column);
      if (row >= rows_here || column >= args.d) {
        store_zero(to);
      } else if constexpr (kFloat8) {
        const auto bits = *reinterpret_cast<const uint2*>(q_of(row) + column);
        const auto pair = [](uint32_t word, int i) {
          return unpack_e4m3(static_cast<uint16_t>(word >> 16 * i));
        };
        store_4_words(to,
                      uint4{pair(bits.x, 0), pair(bits.x, 1), pair(bits.y, 0), pair(bits.y, 1)});
      } else {
        // all on their way together
        request_16_bytes(to, q_of(row) + column, true);
      }
    }
    if constexpr (!kFloat8) {
      commit_requests();
      wait_requests<0>();
    }
    if (thread < kSplitRows) smem.poisoned[thread] = 0;
    fence_async_smem();
    sync();

    // a warp whose rows don't exist only takes part in the products
    const bool idle = warp * 16 >= rows_here;
    const int row = warp * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int mine = min(row + 8 * r, rows_here - 1);
      bounds.position[r] = position_of(mine);
      bounds.until[r] = args.causal ? min(work.sk, bounds.position[r] + 1) : work.sk;
      if (mapped || kFloat8) map[r] = map_of(mine);
    }
    rows.clear();
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) acc_o[i] = 0;
    // who shares the unit, divided out while the first keys are on their way
    const bool whole = key_tiles == work.unit_tiles;
    int first_cta = 0, last_cta = 0, late = 0;
    if (!whole) {
      first_cta = plan.owner(total, work.unit_begin, ctas);
      last_cta = plan.owner(total, work.unit_begin + work.unit_tiles - 1, ctas);
      // a CTA that begins inside of a unit or with it leaves its sums in its first place; only the
      // unit's first CTA may have begun with another one
      late = work.unit_begin > plan.begin(total, first_cta, ctas) ? 1 : 0;
      asm volatile("" : "+r"(first_cta), "+r"(last_cta), "+r"(late));  // not when they are needed
    }
    // keys that every row sees
    const int seen_end = args.causal ? min(work.sk, position_of(0) + 1) : work.sk;
    const int seen_begin = args.window ? position_of(rows_here - 1) - args.window + 1 : 0;

#pragma unroll 1
    for (int j = 0; j < key_tiles; ++j, ++used) {
      const Turn<kStages> stage(used);
      const int key = (work.key_tile + j) * kKeys;
      smem.k_full[stage.stage].wait(stage.parity);
      wgmma_fence(acc_s);
#pragma unroll
      for (int d = 0; d < kD; d += 16)
        wgmma<kType, Major::kK>(acc_s, smem.q.k_major(0, d), smem.k[stage.stage].k_major(0, d),
                                d > 0);
      wgmma_commit();
      wgmma_wait<0>(acc_s);
      release(smem.k_empty[stage.stage]);
      if (!idle) {
        if (mapped) {
#pragma unroll
          for (int i = 0; i < kKeys / 2; ++i) {
            const int t = key + i / 4 * 8 + lane % 4 * 2 + i % 2, r = i / 2 % 2;
            acc_s[i] = map[r](acc_s[i], t - bounds.position[r]);
          }
        } else if (kFloat8) {
#pragma unroll
          for (int i = 0; i < kKeys / 2; ++i) acc_s[i] *= map[i / 2 % 2].scale * kLog2e;
        }
        if (key < seen_begin || key + kKeys > seen_end)
          mask_scores(acc_s, bounds, key, args.window, lane);
        if (rows.update(acc_s, to_log2)) {
#pragma unroll
          for (int i = 0; i < kD / 2; ++i) acc_o[i] *= rows.shrink[i / 2 % 2];
        }
        pack_weights<kType>(frag_p, acc_s);
      }
      smem.v_full[stage.stage].wait(stage.parity);
      // a cache may hold anything behind its last key, and zero weights don't silence NaN
      const int left = max(work.sk - key, 0);
      if (args.cache_seqlens && left < kKeys) {
        for (int i = thread; i < (kKeys - left) * (kD / 8); i += 128)
          store_zero(smem.v[stage.stage].address(left + i / (kD / 8), i % (kD / 8) * 8));
        fence_async_smem();
        sync();
      }
      wgmma_fence(acc_o);
#pragma unroll
      for (int k = 0; k < kKeys; k += 16)
        wgmma<kType, Major::kMN>(acc_o, frag_p[k / 16], smem.v[stage.stage].mn_major(k), true);
      wgmma_commit();
      wgmma_wait<0>(acc_o);
      release(smem.v_empty[stage.stage]);
    }

    // Two elements of a row that is done
    const float value_scale = kFloat8 ? args.scales.value(work.kv_head) : 1;
    auto pack_out = [&](float a, float b) {
      return kFloat8 && !args.half ? pack<DType::kBF16>(a, b) : pack<kType>(a, b);
    };
    auto write = [&](int to, int column, float a, float b, const RowEnd& end) {
      const float factor = end.factor * value_scale;
      a = end.factor == 0 ? 0 : a * factor;
      b = end.factor == 0 ? 0 : b * factor;
      if (args.causal && (a != a || b != b)) smem.poisoned[to] = 1;
      const uint32_t both = pack_out(a, b);
      *reinterpret_cast<uint32_t*>(out_of(to) + column) = both;
      if (column == 0) *lse_of(to) = end.lse_log2 * kLn2;
    };

    float top_log2[2], sums[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top_log2[r] = rows.row_max[r] * to_log2;
      sums[r] = rows.total(r);
    }
    auto slot_of = [&](int cta) { return 2 * cta + (cta == first_cta ? late : 0); };
    // so many looks at memory are on their way together: those of a unit where eight share the chip
    constexpr int kLooks = 18, kPieces = kD / 4;
    const int parts = last_cta - first_cta + 1;
    // Sums of many rows, or of many CTAs, are added up in pairs: whoever of two neighbours comes
    // later adds both, the earlier keys first whoever that is, and goes on with the next two.
    const auto add_pairs = [&] {
      const int share = static_cast<int>(blockIdx.x) - first_cta;
#pragma unroll 1
      for (int level = 0; 1 << level < parts; ++level) {
        const int block = share >> level, other = block ^ 1;
        if (other << level >= parts) continue;
        int* arrivals = args.arrivals + first_cta + ((block | 1) << level);
        const auto place_of = [&](int block) { return slot_of(first_cta + (block << level)); };
        const auto out_at = [&](int block) {
          return reinterpret_cast<float4*>(args.part_out) +
                 int64_t{place_of(block)} * (kSplitRows * kD / 4) + thread;
        };
        const auto state_at = [&](int block, int r) {
          return args.part_state + place_of(block) * kSplitRows + row + 8 * r;
        };
        // all have read `arrived`
        sync();
        if (thread == 0) smem.arrived = look_at_signals(arrivals);
        sync();
        if (smem.arrived == 0) {
          if (!idle) {
#pragma unroll
            for (int r = 0; r < 2; ++r)
              if (lane % 4 == 0) *state_at(block, r) = {top_log2[r], sums[r]};
#pragma unroll
            for (int i = 0; i < kD / 2; i += 4)
              out_at(block)[i * 32] = {acc_o[i], acc_o[i + 1], acc_o[i + 2], acc_o[i + 3]};
          }
          // all have written before the arrival says so
          sync();
          if (thread == 0) smem.arrived = fetch_add_ordered(arrivals, 1);
          sync();
          if (smem.arrived == 0) return false;
        }
        if (thread == 0) *arrivals = 0;
        if (idle) continue;
        const bool later = block & 1;  // of the keys
        float own[2], its[2];          // weights
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 state = load_fresh(state_at(other, r));
          const float higher = fmaxf(top_log2[r], state.x), base = higher == -INFINITY ? 0 : higher;
          own[r] = sm90::exp2_approx(top_log2[r] - base);
          its[r] = sm90::exp2_approx(state.x - base);
          sums[r] = later ? fmaf(own[r], sums[r], its[r] * state.y)
                          : fmaf(its[r], state.y, own[r] * sums[r]);
          top_log2[r] = higher;
        }
        constexpr int kAhead = 32;
#pragma unroll
        for (int from = 0; from < kD / 2; from += kAhead) {
          float4 values[kAhead / 4];
#pragma unroll
          for (int i = 0; i < kAhead; i += 4)
            values[i / 4] = load_fresh(out_at(other) + (from + i) * 32);
#pragma unroll
          for (int i = 0; i < kAhead; i += 4) {
            const float4& four = values[i / 4];
            const float value[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int x = 0; x < 4; ++x) {
              float& sum = acc_o[from + i + x];
              const int r = x / 2;
              sum = later ? fmaf(own[r], sum, its[r] * value[x])
                          : fmaf(its[r], value[x], own[r] * sum);
            }
          }
        }
      }
      return true;
    };
    // The last to arrive adds up what all have left, each row without the columns that v lacks.
    // Places are those of pairs: other units may have such.
    const auto part_at = [&](int place, int row) {
      return args.part_out + place * (kSplitRows * kD) + row * args.dv;
    };
    const auto add_all = [&] {
      const int slot = slot_of(static_cast<int>(blockIdx.x));
      if (!idle) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int mine = row + 8 * r;
          if (mine >= rows_here) continue;
          if (lane % 4 == 0) args.part_state[slot * kSplitRows + mine] = {top_log2[r], sums[r]};
#pragma unroll
          for (int i = 2 * r; i < kD / 2; i += 4) {
            const int column = i / 4 * 8 + lane % 4 * 2;
            if (column < args.dv)
              *reinterpret_cast<float2*>(part_at(slot, mine) + column) = {acc_o[i], acc_o[i + 1]};
          }
        }
      }
      // all have written before the arrival says so, and the last reads what the others wrote; the
      // unit's second CTA has no other such unit
      int* arrivals = args.arrivals + first_cta + 1;
      sync();
      if (thread == 0) smem.arrived = fetch_add_ordered(arrivals, 1);
      sync();
      if (smem.arrived != parts - 1) return;
      if (thread == 0) *arrivals = 0;
      for (int i = thread; i < rows_here * kPieces; i += 128) {
        const int mine = i / kPieces, column = i % kPieces * 4;
        if (column >= args.dv) continue;
        float top = -INFINITY, sum = 0;
        float4 total_v{};
        // Nothing may depend on a look but sums, or it is not made before that is decided.
        for (int from = first_cta; from <= last_cta; from += kLooks) {
          float2 state[kLooks];
          float4 values[kLooks];
#pragma unroll
          for (int i = 0; i < kLooks; ++i) {
            // only the first of all may have the later place
            const int its = min(from + i, last_cta), place = i ? 2 * its : slot_of(its);
            state[i] = load_fresh(args.part_state + place * kSplitRows + mine);
            values[i] = load_fresh(reinterpret_cast<const float4*>(part_at(place, mine) + column));
          }
          float higher = top;
#pragma unroll
          for (int i = 0; i < kLooks; ++i) higher = fmaxf(higher, state[i].x);
          // none of these parts has keys
          const float base = higher == -INFINITY ? 0 : higher,
                      shrink = sm90::exp2_approx(top - base);
          top = higher;
          sum *= shrink;
          total_v = {total_v.x * shrink, total_v.y * shrink, total_v.z * shrink,
                     total_v.w * shrink};
#pragma unroll
          for (int i = 0; i < kLooks; ++i) {
            // not by a weight of zero, as values may be infinite
            if (from + i > last_cta) continue;
            const float weight = sm90::exp2_approx(state[i].x - base);
            sum = fmaf(weight, state[i].y, sum);
            total_v.x = fmaf(weight, values[i].x, total_v.x);
            total_v.y = fmaf(weight, values[i].y, total_v.y);
            total_v.z = fmaf(weight, values[i].z, total_v.z);
            total_v.w = fmaf(weight, values[i].w, total_v.w);
          }
        }
        const RowEnd end(top, sum, sink_of(mine));
        write(mine, column, total_v.x, total_v.y, end);
        write(mine, column + 2, total_v.z, total_v.w, end);
      }
    };
    const int rounds = (rows_here * kPieces + 127) / 128 * ((parts + kLooks - 1) / kLooks),
              levels = 32 - __clz(parts - 1);
    bool writes = whole;
    if (!whole && rounds > 2 * levels) {
      writes = add_pairs();
    } else if (!whole) {
      add_all();
    }
    if (writes && !idle) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int mine = row + 8 * r;
        const RowEnd end(top_log2[r], sums[r], mine < rows_here ? sink_of(mine) : nullptr);
        if (mine >= rows_here) continue;
#pragma unroll
        for (int i = 2 * r; i < kD / 2; i += 4) {
          const int column = i / 4 * 8 + lane % 4 * 2;
          if (column < args.dv) write(mine, column, acc_o[i], acc_o[i + 1], end);
        }
      }
    }

    if (args.causal) {
      sync();
      for (int mine = warp; mine < rows_here; mine += 4) {
        if (!smem.poisoned[mine]) continue;
        const int position = position_of(mine);
        const ScoreMap its_map = map_of(mine);
        float values[kD / 32] = {};
        const auto rows_of = [&](const uint16_t* x, const Strides& strides) {
          return SplitRows<Element>{args, reinterpret_cast<const Element*>(x), strides,
                                    work.sequence, work.kv_head};
        };
        attend_seen<kFloat8 ? DType::kE4M3 : kType>(
            values, q_of(mine), rows_of(args.k, args.k_strides), rows_of(args.v, args.v_strides),
            args.d, args.dv, args.window ? max(position - args.window + 1, 0) : 0,
            min(work.sk, position + 1), [](int) { return true; },
            [&](float product, int key) {
              return mapped    ? its_map(product, key - position)
                     : kFloat8 ? product * (its_map.scale * kLog2e)
                               : product * args.scale_log2;
            },
            *lse_of(mine) * kLog2e, lane);
#pragma unroll
        for (int c = 0; c < kD / 32; ++c)
          if (32 * c + lane < args.dv)
            out_of(mine)[32 * c + lane] =
                static_cast<uint16_t>(pack_out(values[c] * value_scale, 0));
      }
    }
  }
}

template <DType kType, int kD, bool kFloat8>
void launch_split(const SplitCall& call, cudaStream_t stream) {
  using Shape = SplitTile<kD, kFloat8>;
  SplitArgs args{};
  args.sequences = static_cast<int>(call.cu_seqlens_q ? call.sequences : call.b);
  args.sq = static_cast<int>(call.sq);
  args.sk = static_cast<int>(call.sk);
  args.hq = static_cast<int>(call.hq);
  args.hk = static_cast<int>(call.hk);
  args.group = static_cast<int>(call.hq / call.hk);
  args.most_queries = call.most_queries ? static_cast<int>(call.most_queries) : INT32_MAX;
  args.d = static_cast<int>(call.d);
  args.dv = static_cast<int>(call.dv);
  args.scale_log2 = call.scale * sm90::kLog2e;
  args.scale = call.scale;
  args.soft_cap = call.soft_cap;
  args.causal = call.causal || call.window;
  args.window = static_cast<int>(std::min<int64_t>(call.window, INT32_MAX / 2));
  args.slopes = call.slopes;
  args.sink = call.sink;
  args.slopes_stride = call.slopes_stride;
  args.sink_stride = call.sink_stride;
  args.scales = call.scales;
  args.half = call.out_dtype == DType::kF16;
  args.cache_seqlens = call.cache_seqlens;
  args.block_table = call.block_table;
  args.cu_seqlens_q = call.cu_seqlens_q;
  args.cu_q_stride = call.cu_q_stride;
  args.cache_stride = call.cache_stride;
  args.table_row = call.table_row;
  args.table_column = call.table_column;
  args.pages = static_cast<int>(call.pages);
  args.page_log2 = std::countr_zero(static_cast<uint64_t>(call.page_size));
  args.box = call.block_table ? static_cast<int>(std::min<int64_t>(call.page_size, Shape::kKeys))
                              : Shape::kKeys;
  args.boxes = Shape::kKeys / args.box;
  args.q = static_cast<const uint16_t*>(call.q);
  args.k = static_cast<const uint16_t*>(call.k);
  args.v = static_cast<const uint16_t*>(call.v);
  args.out = static_cast<uint16_t*>(call.out);
  args.q_strides = call.q_strides;
  args.k_strides = call.k_strides;
  args.v_strides = call.v_strides;
  args.out_strides = call.out_strides;
  args.lse = call.lse;
  args.part_out = call.part_out;
  args.part_state = call.part_state;
  args.arrivals = call.arrivals;
  args.verdict = call.verdict;
  args.judged = call.judged;
  const auto map = [&](const void* data, int64_t d, const Strides& strides) {
    const int64_t rows = call.block_table ? call.page_size : call.sk;
    const int64_t blocks = call.block_table ? call.pages : call.b;
    // numbers of e4m3 are copied as pairs
    constexpr int kOne = kFloat8 ? 2 : 1;
    return make_tensor_map(kFloat8 ? DType::kE4M3 : kType, data,
                           {d / kOne, rows, call.hk, blocks, strides.row / kOne,
                            strides.head / kOne, strides.batch / kOne},
                           args.box);
  };
  launch<split_sm90_kernel<kType, kD, kFloat8>>(
      {call.processors, Shape::kThreads, sm90::shared_memory_bytes<SplitSmem<kD, kFloat8>>(),
       stream, true},
      map(call.k, call.d, call.k_strides), map(call.v, call.dv, call.v_strides), args);
}

}  // namespace

template <DType kType, int kD, bool kFloat8>
void launch_split_sm90(const SplitCall& call, cudaStream_t stream) {
  launch_split<kType, kD, kFloat8>(call, stream);
}

}  // namespace heddle
