#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention/backward_sm90.h"
#include "attention/softmax_sm90.cuh"
#include "common/lanes.cuh"
#include "common/launch.h"
#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "common/tile.cuh"

// Gradients of softmax attention in f16 or bf16, with off = sk - sq of each sequence:
//
//   P  = exp(S - lse)      dP = dout V^T     delta = dout . out
//   dS = P (dP - delta)    dv = P^T dout     dk = scale dS^T Q     dq = scale dS K
//
// A CTA owns 128 keys of a kv head and walks the query tiles that see them from the last one on,
// the query heads of the group inside of each. Each of two computing warpgroups has 64 of the keys
// and sums of dk and dv in registers. Scores are transposed, so that packed P^T is operand A of dv
// as it stands, and packed dS^T that of dk. For dq dS passes through shared memory; sums over key
// tiles are f32 numbers in global memory, in the order in which threads hold them. Warp 0 loads,
// warps 1 and 2 add up dq, one for each warpgroup.
//
// One step takes a query tile. Warpgroups take turns with P, half a step apart, so that one has
// products to run while the other has none; dq, which needs dS of both, is one step late:
//
//   issue S(i)                | await own turn
//   issue dv(i), dq(i - 1)    | P(i) by halves, the second under dv(i) of the first and dq(i - 1)
//                             | hand dq(i - 1) over under the rest of dv(i)
//   issue dP(i) - delta       | dS(i), write it
//   issue dk(i)
//
// A kernel before prepares what rows need, one behind scales and converts dq. Each of the three
// lets the next one begin when what was before itself has ended.
//
// Under a mask the query tiles come from the lists that the forward has (list_sm90.h), read across:
// lanes look at one row tile and head each, and a vote finds the next that sees some key. Warp 3
// does so for all others, counts in the row tile's list whose turn it is, and looks up the pairs of
// what the mask cuts.
namespace heddle {
namespace {

template <int kD> struct GradientShape {
  static constexpr int kKeys = 128;
  // dq of a tile is 32 registers: of 64 rows, or of 64 columns, to a warpgroup
  static constexpr int kQueries = kD == 64 ? 128 : 64;
  static constexpr int kQStages = 3, kOStages = 2;
  static constexpr int kThreads = 384, kLoadRegisters = 24, kComputeRegisters = 240;
  static constexpr uint32_t kSums = kQueries * kD;  // of dq
};

// A key tile as every role needs it
struct GradientWork {
  int first_key;  // or -1 where there is nothing to do
  int kv_head, batch;
  int q_begin, k_begin, sq, sk, off;
  int row_tile;                // first of the sequence
  int key_tile;                // this one, of all sequences
  int begin, end;              // query tiles, visited from the last one on
  int whole_begin, whole_end;  // those in which no pair is masked
  int part, parts, slot;       // of the tile, and which of the tiles in parts it is
  __device__ __forceinline__ int tiles() const { return end - begin; }
};

// What is visited next under a mask
struct alignas(16) GradientStep {
  int m, head;      // a query tile of the sequence, or -1 after the last, and a head of q
  uint32_t masked;  // bit w: warpgroup w masks pairs; bit 2 + w: it has none and passes by
  int turn;         // of this key tile at the row tile
};

template <int kD, bool kListed> struct GradientSmem {
  using Shape = GradientShape<kD>;
  using Keys = sm90::Tile<Shape::kKeys, kD>;
  using Rows = sm90::Tile<Shape::kQueries, kD>;
  using Pairs = sm90::Tile<Shape::kQueries, Shape::kKeys>;
  Keys k, v;  // later dk and dv
  Rows q[Shape::kQStages], dout[Shape::kOStages];
  Pairs ds[2];
  alignas(128) float dq[2][Shape::kSums / 2];  // of each warpgroup, in its threads' order
  alignas(16) float lse_log2[Shape::kQStages][Shape::kQueries];
  alignas(16) float delta[Shape::kOStages][Shape::kQueries];  // with the other sign
  float dslopes[8][kMostSlopes];  // of each computing warp, of the heads of the group
  GradientWork work;
  // a step is published before the one ahead of it is looked up, and read until its dq is added up,
  // five steps later
  static constexpr int kSteps = kListed ? 8 : 0, kLooks = kListed ? Shape::kQStages : 0;
  GradientStep steps[kSteps];
  // of each computing warp's 16 keys those that a query sees
  alignas(4) uint16_t pairs[kLooks][8][Shape::kQueries];
  sm90::Barrier step_full[kSteps], look_full[kLooks];
  sm90::Barrier k_full, v_full;
  sm90::Barrier q_full[Shape::kQStages], q_empty[Shape::kQStages];
  sm90::Barrier dout_full[Shape::kOStages], dout_empty[Shape::kOStages];
  sm90::Barrier ds_full[2];
  sm90::Barrier dq_full[2], dq_empty[2];
};

struct GradientArgs {
  int b, sq, sk, hq, hk, d, dv;
  int row_tiles, key_tiles;  // of a head over the batch's entry, or all sequences
  int sections;              // of pairs of kv head and batch
  int whole_tiles, parts;    // those behind them come in parts
  bool causal;               // or windowed
  int window;                // 0 is all
  bool deterministic, checks;
  float scale, scale_log2;
  float cap_log2, bend;  // of softCap: a score is cap tanh(bend / 2 log2(e) * product)
  const float* slopes;   // [hq] or null
  int64_t slopes_stride;
  float* dslope_parts;
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *cache_seqlens;
  int64_t cu_q_stride, cu_k_stride, cache_stride;
  int sequences;
  const uint16_t *out, *dout;
  Strides out_strides, dout_strides;
  const float* lse;
  int64_t lse_batch, lse_head, lse_row;
  float *row_lse, *row_delta, *tile_lse_log2, *tile_delta, *dq_sum;
  int *ticket, *turns, *row_marks, *key_marks, *part_turns;
  float* part_sums;  // of dk and dv, in the order of threads
  const int* fault;  // of packed sequences with wrong offsets, which may leave out tiles
  int64_t counters;
  uint16_t *dq, *dk, *dv_out;
  UnitLists lists;
};

// Where the packed sequence `i` lies among `total` tokens; nothing is out of bounds, whatever
// offsets say
struct Span {
  int begin, size;
  __device__ __forceinline__ Span(const int32_t* offsets, int64_t stride, int i, int total) {
    begin = min(max(offsets[i * stride], 0), total);
    size = max(min(offsets[(i + 1) * stride], total) - begin, 0);
  }
};

// The key tiles that are seen by rows from `row` of a sequence on
template <int kQueries, int kKeys> struct KeyTiles {
  int begin, end;
  __device__ __forceinline__ int count() const { return max(end - begin, 0); }
  __device__ __forceinline__ KeyTiles(const GradientArgs& args, int row, int sq, int sk) {
    const int position = row + sk - sq;
    const int keys = args.causal ? min(max(position + kQueries, 0), sk) : sk;
    begin = args.window ? max(position + 1 - args.window, 0) / kKeys : 0;
    end = (keys + kKeys - 1) / kKeys;
  }
};

template <int kQueries, int kKeys>
__device__ __forceinline__ GradientWork gradient_work(const GradientArgs& args, int index) {
  GradientWork work{};
  const int behind = max(index - args.whole_tiles, 0);
  work.slot = behind / args.parts;
  work.part = behind % args.parts;
  index = min(index, args.whole_tiles) + work.slot;
  work.parts = index < args.whole_tiles ? 1 : args.parts;
  // in a section tiles of all its heads take turns; the first keys are seen by most rows, so what
  // takes long begins early
  const int64_t pairs = static_cast<int64_t>(args.b) * args.hk;
  const auto begin = [&](int64_t section) {
    return static_cast<int>(section * pairs / args.sections);
  };
  const int64_t section = ((index / args.key_tiles + int64_t{1}) * args.sections - 1) / pairs;
  const int first = begin(section), width = begin(section + 1) - first;
  const int inside = index - first * args.key_tiles;
  const int pair = first + inside % width;
  int tile = inside / width;
  work.key_tile = tile;
  work.kv_head = pair % args.hk;
  work.batch = pair / args.hk;
  work.sq = args.sq;
  work.sk = args.sk;
  int keys = args.sk;  // that have gradients
  if (args.cu_seqlens_k) {
    const int i =
        sequence_of_tile(args.cu_seqlens_k, args.cu_k_stride, args.sequences, kKeys, tile);
    const Span q(args.cu_seqlens_q, args.cu_q_stride, i, args.sq);
    const Span k(args.cu_seqlens_k, args.cu_k_stride, i, args.sk);
    tile -= k.begin / kKeys + i;
    work.q_begin = q.begin;
    work.k_begin = k.begin;
    work.sq = q.size;
    work.sk = keys = k.size;
    work.row_tile = q.begin / kQueries + i;
  } else if (args.cache_seqlens) {
    work.sk = min(max(args.cache_seqlens[work.batch * args.cache_stride], 0), args.sk);
  }
  work.first_key = tile * kKeys;
  if (tile < 0 || work.first_key >= keys) {
    work.first_key = -1;
    return work;
  }
  work.off = work.sk - work.sq;
  // key t is seen by rows from t - off on, and by a window of them
  const int first_row = work.first_key - work.off, beyond = first_row + kKeys - 1 + args.window;
  work.end = work.first_key < work.sk ? (work.sq + kQueries - 1) / kQueries : 0;
  if (args.window) work.end = min(work.end, (max(beyond, 0) + kQueries - 1) / kQueries);
  work.begin = args.causal ? min(max(first_row, 0) / kQueries, work.end) : 0;
  if (work.first_key + kKeys <= work.sk) {
    work.whole_begin = args.causal ? (max(first_row + kKeys - 1, 0) + kQueries - 1) / kQueries : 0;
    work.whole_end = args.window ? max(first_row + args.window, 0) / kQueries : work.end;
  }
  const int rows = work.tiles(), end = work.end;
  work.end = end - rows * work.part / work.parts;
  work.begin = end - rows * (work.part + 1) / work.parts;
  return work;
}

// What the lists say of a row tile of a sequence and head
template <int kQueries> struct RowUnits {
  static constexpr int kHalves = kQueries / 64, kKeys = 2 * kUnitKeys, kTiles = 16;  // of a word
  const UnitBits* bits;
  const int* marks;
  int words;

  // The sequence's first row tile is number `row_tile` of all
  __device__ __forceinline__ RowUnits(const GradientArgs& args, int batch, int head, int q_begin,
                                      int row_tile, int m) {
    const int first = row_tile - q_begin / kQueries + q_begin / (64 * kListedWarpgroups);
    const int64_t list = args.lists.index(batch, head, first + m / (2 / kHalves));
    words = args.lists.words;
    bits = args.lists.bits + list * words * kListedWarpgroups + m % (2 / kHalves);
    marks = args.lists.marks + list * args.lists.mark_words() + 1;
  }
  __device__ __forceinline__ bool marked(int word) const {
    return marks[word / 32] >> word % 32 & 1;
  }
  // Of each 64 rows four bits: which of a key tile's two units some row sees, then which are listed
  __device__ __forceinline__ uint32_t seen(int tile) const {
    const int word = tile / kTiles, shift = tile % kTiles * 2;
    uint32_t seen = 0;
    if (marked(word))
      for (int half = 0; half < kHalves; ++half) {
        const UnitBits its = bits[word * kListedWarpgroups + half];
        seen |= ((its.any >> shift & 3) | (its.listed >> shift & 3) << 2) << 4 * half;
      }
    return seen;
  }
  // How many of the key tiles below `tile` are seen, by a warp
  __device__ __forceinline__ int tiles_below(int tile, int lane) const {
    uint32_t count = 0;
    for (int word = lane; word * kTiles < tile; word += 32) {
      if (!marked(word)) continue;
      uint32_t any = 0;
      for (int half = 0; half < kHalves; ++half) any |= bits[word * kListedWarpgroups + half].any;
      const uint32_t tiles = (any | any >> 1) & 0x55555555;
      count += __popc(tiles & static_cast<uint32_t>(bit_range(0, 2 * (tile - word * kTiles))));
    }
    return static_cast<int>(__reduce_add_sync(~0u, count));
  }
};

// The steps of a key tile from the last rows to the first, for a warp
template <int kQueries> struct StepWalk {
  const GradientArgs& args;
  const GradientWork& work;
  int lane;
  int from;  // pairs of a query tile and a head of the group below this one were not looked at
  uint32_t its_seen = 0, left = 0;  // by this lane's pair, and of which lanes
  uint32_t seen = 0;                // by the step

  __device__ __forceinline__ StepWalk(const GradientArgs& args, const GradientWork& work, int group,
                                      int lane)
      : args(args), work(work), lane(lane), from(work.end * group) {}

  __device__ __forceinline__ RowUnits<kQueries> units(int m, int head) const {
    return {args, work.batch, head, work.q_begin, work.row_tile, m};
  }
  __device__ __forceinline__ GradientStep next() {
    const int group = args.hq / args.hk, tile = work.first_key / RowUnits<kQueries>::kKeys;
    // heads in the order that they have without lists
    const auto step = [&](int pair) {
      return GradientStep{pair / group, (work.kv_head + 1) * group - 1 - pair % group, 0, 0};
    };
    while (left == 0) {
      if (from <= work.begin * group) return {-1, 0, 0, 0};
      from -= 32;
      its_seen = 0;
      if (from + lane >= work.begin * group) {
        const GradientStep its = step(from + lane);
        its_seen = units(its.m, its.head).seen(tile);
      }
      left = __ballot_sync(~0u, its_seen != 0);
    }
    const int highest = 31 - __clz(static_cast<int>(left));
    left ^= 1u << highest;
    seen = __shfl_sync(~0u, its_seen, highest);
    GradientStep next = step(from + highest);
    // a warpgroup masks nothing if its unit is listed for each 64 rows and below what the first row
    // sees last
    const int end = args.causal ? min(next.m * kQueries + work.off + 1, work.sk) : work.sk;
    const uint32_t listed = seen >> 2 & (kQueries == 64 ? 3 : seen >> 6);
    const uint32_t any = kQueries == 64 ? seen : seen | seen >> 4;
    // where packed rows end both have work in shared memory
    const bool ends = args.cu_seqlens_q && (next.m + 1) * kQueries > work.sq;
    for (int i = 0; i < 2; ++i)
      if (!(any >> i & 1) && !ends) {
        next.masked |= 4 << i;
      } else if (!(listed >> i & 1) || work.first_key + (i + 1) * kUnitKeys > end) {
        next.masked |= 1 << i;
      }
    if (args.deterministic) next.turn = units(next.m, next.head).tiles_below(tile, lane);
    return next;
  }

  // Which pairs of a step meet, for the warpgroups that mask some; `seen` is as it was then
  __device__ __forceinline__ void look(const GradientStep& step, uint32_t seen,
                                       uint16_t (&pairs)[8][kQueries]) const {
    const bool packed = args.cu_seqlens_q != nullptr;
    const UnitRows rows{work.batch,   packed ? work.row_tile - work.q_begin / kQueries : work.batch,
                        work.q_begin, step.head,
                        work.sq,      work.sk,
                        args.causal,  packed};
#pragma unroll 1
    for (int i = lane; i < 2 * kQueries; i += 32) {
      const int its = i / kQueries, r = i % kQueries, row = step.m * kQueries + r;
      if (!(step.masked >> its & 1)) continue;
      const uint32_t unit = seen >> (r / 64 * 4 + its);
      const int64_t key = work.first_key + its * kUnitKeys;
      uint64_t sees = 0;
      if ((unit & 1) && row < work.sq) {
        const MaskRow mask_row = rows.row(args.lists.mask, row);
        sees = unit & 4 ? bit_range(0, mask_row.end - key) : args.lists.mask.seen(mask_row, key);
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) pairs[its * 4 + w][r] = static_cast<uint16_t>(sees >> 16 * w);
    }
  }
};

template <DType kType, int kD, bool kMapped, bool kListed>
__global__ void __launch_bounds__((GradientShape<kD>::kThreads), 1)
    backward_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_q,
                         const __grid_constant__ sm90::TensorMap gmem_dout,
                         const __grid_constant__ sm90::TensorMap gmem_k,
                         const __grid_constant__ sm90::TensorMap gmem_v,
                         const __grid_constant__ sm90::TensorMap gmem_dk,
                         const __grid_constant__ sm90::TensorMap gmem_dv, const GradientArgs args) {
  using namespace sm90;
  using Shape = GradientShape<kD>;
  constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys;
  using Smem = GradientSmem<kD, kListed>;
  using Frag = uint32_t[kQueries / 16][4];
  auto& smem = shared_memory<Smem>();
  // the same in all lanes, which the compiler cannot know of threadIdx
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) {
    smem.k_full.init(1);
    smem.v_full.init(1);
    for (int stage = 0; stage < Shape::kQStages; ++stage) {
      smem.q_full[stage].init(1);
      smem.q_empty[stage].init(8);
    }
    for (int stage = 0; stage < Smem::kSteps; ++stage) smem.step_full[stage].init(1);
    for (int stage = 0; stage < Smem::kLooks; ++stage) smem.look_full[stage].init(1);
    for (int stage = 0; stage < Shape::kOStages; ++stage) {
      smem.dout_full[stage].init(1);
      smem.dout_empty[stage].init(8);
    }
    for (int i = 0; i < 2; ++i) {
      smem.ds_full[i].init(8);
      smem.dq_full[i].init(4);
      smem.dq_empty[i].init(1);
    }
    fence_barrier_init();
  }
  await_previous();
  let_next_begin();
  if (threadIdx.x == 0) {
    // who waits for a turn waits for CTAs that have begun
    const bool waits = args.deterministic || args.parts > 1;
    const int index = waits ? fetch_add(args.ticket, 1) : blockIdx.x;
    smem.work = gradient_work<kQueries, kKeys>(args, index);
  }
  __syncthreads();
  const GradientWork& work = smem.work;
  const int first_key = __shfl_sync(~0u, work.first_key, 0);
  if (first_key < 0) return;
  const int group = args.hq / args.hk, tiles = __shfl_sync(~0u, work.tiles(), 0);

  if (warpgroup == 0) {
    lower_registers<Shape::kLoadRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if constexpr (kListed) {
      if (tiles > 0 && warp == 3) {
        StepWalk<kQueries> walk(args, work, group, threadIdx.x % 32);
        uint32_t i = 0;
        auto publish = [&](const GradientStep& step) {
          const auto stage = Turn<Smem::kSteps>(i++).stage;
          if (walk.lane != 0) return;
          smem.steps[stage] = step;
          smem.step_full[stage].arrive();
        };
        GradientStep next = walk.next();
        publish(next);
        while (next.m >= 0) {
          const GradientStep step = next;
          const uint32_t seen = walk.seen;
          const Turn<Shape::kQStages> q(i - 1);
          next = walk.next();
          publish(next);
          smem.q_empty[q.stage].wait(q.parity ^ 1);
          if (step.masked & 3) walk.look(step, seen, smem.pairs[q.stage]);
          __syncwarp();
          if (walk.lane == 0) smem.look_full[q.stage].arrive();
        }
        return;
      }
    }
    if (tiles == 0 || warp > 2 || !elect_one()) return;
    // where rows of the tile, and its sums, are
    auto row_tile = [&](int head, int m) {
      return static_cast<int64_t>(work.batch * args.hq + head) * args.row_tiles + work.row_tile + m;
    };
    auto each_step = [&](const auto& take) {
      if constexpr (kListed) {
        for (uint32_t i = 0;; ++i) {
          const Turn<Smem::kSteps> turn(i);
          smem.step_full[turn.stage].wait(turn.parity);
          const GradientStep step = smem.steps[turn.stage];
          if (step.m < 0) break;
          take(step);
        }
      } else {
        const int first_head = work.kv_head * group;
        for (int m = work.end - 1; m >= work.begin; --m)
          for (int head = first_head; head < first_head + group; ++head)
            take(GradientStep{m, head, 0, 0});
      }
    };
    if (warp == 0) {
      auto load_keys = [&] {
        smem.k_full.arrive_expect(smem.k.kBytes);
        smem.k.load(gmem_k, smem.k_full, work.k_begin + first_key, work.kv_head, work.batch,
                    Keep::kShortly);
      };
      if (!kListed) load_keys();
      uint32_t step = 0;
      each_step([&](const GradientStep& next) {
        const int row = work.q_begin + next.m * kQueries;
        const int64_t vectors = row_tile(next.head, next.m) * kQueries;
        constexpr uint32_t kVectorBytes = kQueries * sizeof(float);
        if (kListed && step == 0) load_keys();
        const Turn<Shape::kQStages> q(step);
        smem.q_empty[q.stage].wait(q.parity ^ 1);
        smem.q_full[q.stage].arrive_expect(smem.q[0].kBytes + kVectorBytes);
        smem.q[q.stage].load(gmem_q, smem.q_full[q.stage], row, next.head, work.batch, Keep::kLong);
        copy_to_smem(smem.lse_log2[q.stage], args.tile_lse_log2 + vectors, kVectorBytes,
                     smem.q_full[q.stage]);
        if (step == 0) {
          smem.v_full.arrive_expect(smem.v.kBytes);
          smem.v.load(gmem_v, smem.v_full, work.k_begin + first_key, work.kv_head, work.batch,
                      Keep::kShortly);
        }
        const Turn<Shape::kOStages> o(step);
        smem.dout_empty[o.stage].wait(o.parity ^ 1);
        smem.dout_full[o.stage].arrive_expect(smem.dout[0].kBytes + kVectorBytes);
        smem.dout[o.stage].load(gmem_dout, smem.dout_full[o.stage], row, next.head, work.batch,
                                Keep::kLong);
        copy_to_smem(smem.delta[o.stage], args.tile_delta + vectors, kVectorBytes,
                     smem.dout_full[o.stage]);
        ++step;
      });
    } else {
      const int its = warp - 1;
      uint32_t parity = 0;
      each_step([&](const GradientStep& next) {
        const int64_t tile = row_tile(next.head, next.m);
        int* turn = args.turns + tile * 2 + its;
        float* sums = args.dq_sum + tile * Shape::kSums + its * (Shape::kSums / 2);
        int before = next.turn;  // how many key tiles
        // the turn has mostly come before the sums have, and asking takes time
        if (args.deterministic) {
          if constexpr (!kListed) {
            const KeyTiles<kQueries, kKeys> seen(args, next.m * kQueries, work.sq, work.sk);
            before = first_key / kKeys - seen.begin;
          }
          wait_for_signals(turn, before, args.fault);
          fence_async_gmem();
        }
        smem.dq_full[its].wait(parity);
        const bool first = args.deterministic && before == 0;
        first ? copy_to_gmem(sums, smem.dq[its], sizeof(smem.dq[0]), Keep::kLong)
              : add_to_gmem(sums, smem.dq[its], sizeof(smem.dq[0]), Keep::kLong);
        commit_copies();
        wait_copies_read<0>();
        smem.dq_empty[its].arrive();
        if (args.deterministic) {
          wait_copies<0>();
          fence_async_gmem();
          signal(turn);
        }
        parity ^= 1;
      });
      wait_copies<0>();
    }
    return;
  }

  raise_registers<Shape::kComputeRegisters>();
  const int own = warpgroup - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int own_key = own * 64 + warp * 16;  // first of this warp's keys in the tile
  const int column = 2 * (lane % 4);         // of an accumulator, a query
  float acc_dk[kD / 2], acc_dv[kD / 2];
  Frag frag_p, frag_ds;
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) acc_dk[i] = acc_dv[i] = 0;

  auto release = [&](Barrier& barrier) {
    __syncwarp();
    if (lane == 0) barrier.arrive();
  };
  // x^T = keys rows^T, of K and Q, or added to what is there, of V and dout
  auto issue_scores = [&](float(&acc)[kQueries / 2], const typename Smem::Keys& keys,
                          const typename Smem::Rows& rows, bool adds) {
    const uint64_t a = keys.k_major(own * 64, 0), b = rows.k_major(0, 0);
    if (adds) {
      wgmma_fence(acc);
      wgmma<kType, Major::kK>(acc, a, b, true);
    } else {
      wgmma_fence();
      wgmma_first<kType, Major::kK>(acc, a, b);
    }
#pragma unroll
    for (int d = 16; d < kD; d += 16)
      wgmma<kType, Major::kK>(acc, advance(a, keys.k_step(d)), advance(b, rows.k_step(d)), true);
    wgmma_commit();
  };
  // dv of P and dout, or dk of dS and q, of one half of the rows
  auto issue_sums = [&](float(&acc)[kD / 2], const Frag& frag, const typename Smem::Rows& rows,
                        int half) {
    const uint64_t b = rows.mn_major(0);
    wgmma_fence(acc);
#pragma unroll
    for (int from = 0; from < kQueries / 2; from += 16) {
      const int k = from + half * kQueries / 2;
      wgmma<kType, Major::kMN>(acc, frag[k / 16], advance(b, k * 128), true);
    }
    wgmma_commit();
  };
  // kD = 128: all rows and 64 columns; kD = 64: 64 rows and all columns
  auto issue_dq = [&](float(&acc)[32], int step) {
    const auto& ds = smem.ds[step & 1];
    const uint64_t a = ds.k_major(kQueries == 128 ? own * 64 : 0, 0);
    const uint64_t b = advance(smem.k.mn_major(0), kD == 128 ? own * smem.k.kPanelBytes : 0);
    wgmma_fence();
    wgmma_first<kType, Major::kMN>(acc, a, b);
#pragma unroll
    for (int k = 16; k < kKeys; k += 16)
      wgmma<kType, Major::kMN>(acc, advance(a, ds.k_step(k)), advance(b, k * 128), true);
    wgmma_commit();
  };
  // scores of pairs that do not meet
  auto mask = [&](float(&acc)[kQueries / 2], int m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = work.first_key + own_key + lane / 4 + 8 * r;
      // queries of this thread, counted from its first one, that see the key
      const int sees = key - work.off - m * kQueries - column;
      const int begin = key >= work.sk ? kQueries : args.causal ? sees : 0;
#pragma unroll
      for (int i = 2 * r; i < kQueries / 2; i += 4) {
        if (i / 4 * 8 < begin) acc[i] = -INFINITY;
        if (i / 4 * 8 + 1 < begin) acc[i + 1] = -INFINITY;
      }
      if (args.window) {
#pragma unroll
        for (int i = 2 * r; i < kQueries / 2; i += 4) {
          if (i / 4 * 8 >= sees + args.window) acc[i] = -INFINITY;
          if (i / 4 * 8 + 1 >= sees + args.window) acc[i + 1] = -INFINITY;
        }
      }
    }
  };
  auto mask_unseen = [&](float(&acc)[kQueries / 2], const uint16_t(&pairs)[8][kQueries]) {
    const auto* mine = reinterpret_cast<const uint32_t*>(pairs[own * 4 + warp]) + lane % 4;
#pragma unroll
    for (int i = 0; i < kQueries / 2; i += 4) {
      const uint32_t seen = mine[i] >> lane / 4;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (!(seen >> (j % 2 * 16 + j / 2 * 8) & 1)) acc[i + j] = -INFINITY;
    }
  };
  // how far the key of acc[i + j] is from its query, from what it is for acc[0]
  auto distance = [](float near, int i, int j) {
    return near + static_cast<float>(8 * (j / 2) - 2 * i - j % 2);
  };
  // P from a product of q and k, which with `rest_log2` is the exponent; `rate` is that of softCap
  auto weight = [&](bool capped, float product, float rest_log2, float& rate) {
    if (!capped) return exp2_approx(fmaf(product, args.scale_log2, rest_log2));
    // tanh(x) = 1 - 2 / (exp(2x) + 1), its derivative is 1 - tanh(x)^2
    const float half = reciprocal_approx(exp2_approx(product * args.bend) + 1);
    rate = 4 * half * (1 - half);
    const float score_log2 = fmaf(half, -2 * args.cap_log2, args.cap_log2);
    return product == -INFINITY ? 0 : exp2_approx(score_log2 + rest_log2);
  };
  // acc becomes P, times the rate of softCap; frag_p is P. Of one half of the rows.
  auto weigh = [&](bool capped, float(&acc)[kQueries / 2], const float* lse_log2, float near,
                   float slope_log2, int half) {
#pragma unroll
    for (int from = 0; from < kQueries / 4; from += 4) {
      const int i = from + half * kQueries / 4;
      const float2 lse = *reinterpret_cast<const float2*>(lse_log2 + i * 2 + column);
      float rate[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float its = j % 2 ? lse.y : lse.x;
        const float rest_log2 =
            kMapped && args.slopes ? fmaf(slope_log2, distance(near, i, j), -its) : -its;
        acc[i + j] = weight(capped, acc[i + j], rest_log2, rate[j]);
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2)
        frag_p[i / 8][(i / 2 + j / 2) % 4] = pack<kType>(acc[i + j], acc[i + j + 1]);
      if (capped) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i + j] *= rate[j];
      }
    }
  };
  // what dP begins with, -delta of each query
  auto begin_gradients = [&](float(&acc_dp)[kQueries / 2], const float* deltas) {
#pragma unroll
    for (int i = 0; i < kQueries / 2; i += 2) {
      const float2 delta = *reinterpret_cast<const float2*>(deltas + i / 4 * 8 + column);
      acc_dp[i] = delta.x;
      acc_dp[i + 1] = delta.y;
    }
  };
  auto weigh_gradients = [&](const float(&acc_p)[kQueries / 2],
                             const float(&acc_dp)[kQueries / 2]) {
#pragma unroll
    for (int i = 0; i < kQueries / 2; i += 2)
      frag_ds[i / 8][i / 2 % 4] = pack<kType>(acc_p[i] * acc_dp[i], acc_p[i + 1] * acc_dp[i + 1]);
  };
  // what the slope of head `head` of the group gets from a step, which a warp keeps
  auto add_dslope = [&](const float(&acc_dp)[kQueries / 2], float near, int head) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kQueries / 2; i += 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t pair = frag_p[i / 8][(i / 2 + j / 2) % 4];
        const float p = unpack<kType>(static_cast<uint16_t>(j % 2 ? pair >> 16 : pair));
        const float ds = p * acc_dp[i + j];
        // a masked value may be no number
        sum = p == 0 ? sum : fmaf(ds, distance(near, i, j), sum);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) smem.dslopes[own * 4 + warp][head] += sum;
  };
  // registers hold [key][query], shared memory gets [query][key]
  auto write_ds = [&](int step) {
    const uint32_t to =
        smem.ds[step & 1].address(lane / 16 * 8 + lane % 8, own_key + lane / 8 % 2 * 8);
#pragma unroll
    for (int s = 0; s < kQueries / 16; ++s)
      stmatrix_x4_transposed(to + s * 2048, frag_ds[s][0], frag_ds[s][1], frag_ds[s][2],
                             frag_ds[s][3]);
  };
  // shows what write_ds wrote
  auto share_ds = [&](int step) {
    if (step < 0) return;
    fence_async_smem();
    release(smem.ds_full[step & 1]);
  };
  // until both warpgroups have
  auto await_ds = [&](int step) {
    if (step >= 0) smem.ds_full[step & 1].wait(step >> 1 & 1);
  };
  // one warpgroup at a time does, for the exponentials of both take twice as long
  auto begin_weighing = [&] { named_barrier_sync(4 + own, 256); };
  auto end_weighing = [&] { named_barrier_arrive(5 - own, 256); };
  // 32 sums a thread for the warp that adds them up
  auto write_dq = [&](const float(&acc)[32], int step) {
    smem.dq_empty[own].wait((step & 1) ^ 1);
    const uint32_t to = address_of(smem.dq[own]) + thread * 16;
#pragma unroll
    for (int i = 0; i < 32; i += 4)
      store_4_floats(to + i * 512, acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
  };
  auto hand_over = [&] {
    fence_async_smem();
    release(smem.dq_full[own]);
  };
  // rows behind the last one belong to somebody else and may be anything: weights of zero don't
  // silence what is not a number
  auto clear_beyond = [&](auto& tile, int rows, int count) {
    for (int i = threadIdx.x - 128; i < max(count - rows, 0) * (kD / 8); i += 256)
      store_zero(tile.address(rows + i / (kD / 8), i % (kD / 8) * 8));
    fence_async_smem();
    named_barrier_sync(1, 256);
  };

  if (kMapped && args.slopes) {
    for (int head = lane; head < group; head += 32) smem.dslopes[own * 4 + warp][head] = 0;
    __syncwarp();
  }
  bool any = tiles > 0;
  if constexpr (kListed) {
    if (any) {
      smem.step_full[0].wait(0);
      any = __shfl_sync(~0u, smem.steps[0].m, 0) >= 0;
    }
  }
  if (any) {
    int steps = kListed ? INT32_MAX : group * tiles;
    int m = work.end - 1, head = 0;
    smem.k_full.wait(0);
    smem.v_full.wait(0);
    if (args.cu_seqlens_k || args.cache_seqlens) {
      clear_beyond(smem.k, work.sk - first_key, kKeys);
      clear_beyond(smem.v, work.sk - first_key, kKeys);
    }
    const int whole_begin = __shfl_sync(~0u, work.whole_begin, 0);
    const int whole_end = __shfl_sync(~0u, work.whole_end, 0);
    if (own == 1) end_weighing();
    Turn<Shape::kQStages> q(0);
    // the first step multiplies what nobody has written and drops it: two copies of the loop's body
    // would not fit the registers
#pragma unroll 1
    for (int i = 0; i < steps; ++i, q.advance()) {
      float acc_s[kQueries / 2], acc_dp[kQueries / 2], acc_dq[32];
      const int before = i - 1;
      const Turn<Shape::kOStages> o(i);
      uint32_t masked = 0;
      if constexpr (kListed) {
        const Turn<Smem::kSteps> turn(i);
        smem.step_full[turn.stage].wait(turn.parity);
        m = __shfl_sync(~0u, smem.steps[turn.stage].m, 0);
        if (m < 0) {
          steps = i;
          break;
        }
        masked = __shfl_sync(~0u, smem.steps[turn.stage].masked >> own, 0);
        if (masked & 4) {
          // nothing but its share of dq(i - 1), and zeros for those of i
          smem.q_full[q.stage].wait(q.parity);
          share_ds(before);
          await_ds(before);
          issue_dq(acc_dq, before);
          wgmma_wait<0>(acc_dq);
          pin(acc_dk);
          if (i > 0) {
            release(smem.q_empty[q.before(1)]);
            write_dq(acc_dq, before);
            hand_over();
          }
#pragma unroll
          for (int s = 0; s < kQueries / 16; ++s)
#pragma unroll
            for (int r = 0; r < 4; ++r) frag_ds[s][r] = 0;
          write_ds(i);
          release(smem.dout_empty[o.stage]);
          begin_weighing();
          end_weighing();
          continue;
        }
      }
      // packed rows behind the last one
      const bool clears = args.cu_seqlens_q && (m + 1) * kQueries > work.sq;
      smem.q_full[q.stage].wait(q.parity);
      if (clears) clear_beyond(smem.q[q.stage], work.sq - m * kQueries, kQueries);
      issue_scores(acc_s, smem.k, smem.q[q.stage], false);
      share_ds(before);
      wgmma_wait<0>(acc_s);
      pin(acc_dk);
      if (i > 0) release(smem.q_empty[q.before(1)]);
      if constexpr (kListed) {
        smem.look_full[q.stage].wait(q.parity);
        if (masked & 1) mask_unseen(acc_s, smem.pairs[q.stage]);
      } else if (m < whole_begin || m >= whole_end) {
        mask(acc_s, m);
      }
      const float near =
          static_cast<float>(first_key + own_key + lane / 4 - work.off - m * kQueries - column);
      float slope_log2 = 0;
      if (kMapped && args.slopes)
        slope_log2 = args.slopes[(work.kv_head * group + head) * args.slopes_stride] * kLog2e;
      smem.dout_full[o.stage].wait(o.parity);
      if (clears) clear_beyond(smem.dout[o.stage], work.sq - m * kQueries, kQueries);
      begin_weighing();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == 1) {
          await_ds(before);
          issue_dq(acc_dq, before);
        }
        if (kMapped && args.cap_log2 > 0) {
          weigh(true, acc_s, smem.lse_log2[q.stage], near, slope_log2, half);
        } else {
          weigh(false, acc_s, smem.lse_log2[q.stage], near, slope_log2, half);
        }
        issue_sums(acc_dv, frag_p, smem.dout[o.stage], half);
      }
      end_weighing();
      wgmma_wait<1>(acc_dq);
      if (i > 0) write_dq(acc_dq, before);
      // the fence waits for all stores, which dP covers; where P, as dv reads it, does not fit the
      // registers beside dP, what is left of dv does
      if constexpr (kD == 64) {
        if (i > 0) hand_over();
        wgmma_wait<0>(acc_dv);
      }
      begin_gradients(acc_dp, smem.delta[o.stage]);
      issue_scores(acc_dp, smem.v, smem.dout[o.stage], true);
      if (kD == 128 && i > 0) hand_over();
      wgmma_wait<0>(acc_dp);
      pin(acc_dv);
      weigh_gradients(acc_s, acc_dp);
      if (kMapped && args.slopes) add_dslope(acc_dp, near, head);
      release(smem.dout_empty[o.stage]);
      // the other warpgroup has passed dq(i - 2), the last to read this buffer, for it has written
      // dS(i - 1), which this one has waited for
      write_ds(i);
#pragma unroll
      for (int half = 0; half < 2; ++half) issue_sums(acc_dk, frag_ds, smem.q[q.stage], half);

      if (!kListed && ++head == group) {
        head = 0;
        --m;
      }
    }
    float acc_dq[32];
    const int last = steps - 1;
    share_ds(last);
    await_ds(last);
    issue_dq(acc_dq, last);
    wgmma_wait<0>(acc_dq);
    pin(acc_dk);
    write_dq(acc_dq, last);
    hand_over();
    if (own == 0) begin_weighing();
  }

  if (kMapped && args.slopes) {
    __syncwarp();
    for (int head = lane; head < group; head += 32) {
      const int64_t its = work.batch * args.hq + work.kv_head * group + head;
      args.dslope_parts[(its * args.key_tiles + work.key_tile) * 8 + own * 4 + warp] =
          smem.dslopes[own * 4 + warp][head];
    }
  }
  if (args.checks) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) total += acc_dk[i] + acc_dv[i];
    if (total != total)
      args.key_marks[(work.batch * args.hk + work.kv_head) * args.key_tiles + work.key_tile] = 1;
  }
  // parts add up one after the other, and the last one has the sums
  if (work.parts > 1) {
    auto* sums = reinterpret_cast<float4*>(args.part_sums) +
                 static_cast<int64_t>(work.slot) * (kKeys * kD / 2) + own * 128 + thread;
    int* turn = args.part_turns + work.slot;
    auto each = [&](const auto& take) {
#pragma unroll
      for (int i = 0; i < kD / 2; i += 4) {
        take(acc_dk + i, sums[i * 64]);
        take(acc_dv + i, sums[(i + kD / 2) * 64]);
      }
    };
    if (work.part > 0) {
      wait_for_signals(turn, work.part, nullptr);
      each([](float* acc, const float4& sum) {
        const float4 before = load_fresh(&sum);
        acc[0] += before.x, acc[1] += before.y, acc[2] += before.z, acc[3] += before.w;
      });
    }
    if (work.part + 1 < work.parts) {
      each([](const float* acc, float4& sum) { sum = {acc[0], acc[1], acc[2], acc[3]}; });
      named_barrier_sync(1, 256);
      if (threadIdx.x == 128) signal(turn);
      return;
    }
  }
  // both have read k and v for the last time
  named_barrier_sync(1, 256);
  auto stage_out = [&](const float(&acc)[kD / 2], const typename Smem::Keys& to, float factor) {
#pragma unroll
    for (int i = 0; i < kD / 2; i += 8)
      stmatrix_x4(to.address(own_key + lane % 16, i * 2 + lane / 16 * 8),
                  pack<kType>(acc[i] * factor, acc[i + 1] * factor),
                  pack<kType>(acc[i + 2] * factor, acc[i + 3] * factor),
                  pack<kType>(acc[i + 4] * factor, acc[i + 5] * factor),
                  pack<kType>(acc[i + 6] * factor, acc[i + 7] * factor));
  };
  stage_out(acc_dv, smem.v, 1);
  stage_out(acc_dk, smem.k, args.scale);
  fence_async_smem();
  named_barrier_sync(2 + own, 128);
  // the keys behind the last one may be those of another sequence
  const int own_first = first_key + own * 64;
  if (args.cu_seqlens_k && own_first + 64 > work.sk) {
    auto write = [&](uint16_t* to, const typename Smem::Keys& from, int columns) {
      for (int i = thread; i < 64 * kD / 8; i += 128) {
        const int r = i / (kD / 8), at = i % (kD / 8) * 8;
        if (own_first + r < work.sk && at < columns)
          copy_16_bytes(
              to +
                  (static_cast<int64_t>(work.k_begin + own_first + r) * args.hk + work.kv_head) *
                      columns +
                  at,
              from.address(own * 64 + r, at));
      }
    };
    write(args.dk, smem.k, args.d);
    write(args.dv_out, smem.v, args.dv);
  } else if (thread == 0) {
    for (int at = 0; at < kD; at += 64) {
      const int row = work.k_begin + own_first;
      copy_to_gmem(gmem_dk, smem.k.panel(at) + own * 64 * 128, at, row, work.kv_head, work.batch);
      copy_to_gmem(gmem_dv, smem.v.panel(at) + own * 64 * 128, at, row, work.kv_head, work.batch);
    }
    commit_copies();
    wait_copies_read<0>();
  }
}

// A tile of rows of one head, for the kernels before and behind
template <int kQueries> struct GradientRows {
  int head, batch, first, rows;  // `rows` of them exist
  int row, sq, sk;               // the first one's number in its sequence

  __device__ __forceinline__ GradientRows(const GradientArgs& args, int index) {
    int tile = index % args.row_tiles;
    head = index / args.row_tiles % args.hq;
    batch = index / args.row_tiles / args.hq;
    int begin = 0;
    sq = args.sq;
    sk = args.sk;
    if (args.cu_seqlens_q) {
      const int i =
          sequence_of_tile(args.cu_seqlens_q, args.cu_q_stride, args.sequences, kQueries, tile);
      const Span q(args.cu_seqlens_q, args.cu_q_stride, i, args.sq);
      begin = q.begin;
      sq = q.size;
      sk = Span(args.cu_seqlens_k, args.cu_k_stride, i, args.sk).size;
      tile -= begin / kQueries + i;
    } else if (args.cache_seqlens) {
      sk = min(max(args.cache_seqlens[batch * args.cache_stride], 0), args.sk);
    }
    row = tile * kQueries;
    first = begin + row;
    rows = tile < 0 ? 0 : min(max(sq - row, 0), kQueries);
  }
  // what the lists say of tile `index`
  __device__ __forceinline__ RowUnits<kQueries> units(const GradientArgs& args, int index) const {
    const int tile = row / kQueries;
    return {args, batch, head, first - row, index % args.row_tiles - tile, tile};
  }
};

constexpr int kRowCta = 256;

// delta and lse of each row, and zeros where the next kernel adds or counts
template <DType kType, int kD>
__global__ void __launch_bounds__(kRowCta) backward_rows_sm90_kernel(const GradientArgs args) {
  using namespace sm90;
  constexpr int kQueries = GradientShape<kD>::kQueries, kSums = GradientShape<kD>::kSums;
  constexpr int kPieces = kD / 8;  // of 8 elements, a thread each
  constexpr int kStep = kRowCta / kPieces, kRounds = kQueries / kStep;
  const int thread = threadIdx.x;
  await_previous();
  let_next_begin();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRowCta + thread; i < args.counters;
       i += static_cast<int64_t>(gridDim.x) * kRowCta)
    args.ticket[i] = 0;
  const GradientRows<kQueries> tile(args, blockIdx.x);
  if (tile.rows == 0) return;
  const int column = thread % kPieces * 8;
  const auto piece = [&](const uint16_t* x, const Strides& strides, int64_t row) {
    return *reinterpret_cast<const uint4*>(x + tile.batch * strides.batch + row * strides.row +
                                           tile.head * strides.head + column);
  };
  // all loads are on their way before the first result is needed
  uint4 outs[kRounds], douts[kRounds];
  float lses[kRounds];  // infinite where rows are empty or do not exist: all their weights are 0
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int r = thread / kPieces + i * kStep;
    const int64_t row = tile.first + r;
    outs[i] = douts[i] = uint4{};
    lses[i] = INFINITY;
    if (r >= tile.rows) continue;
    if (column < args.dv) {
      outs[i] = piece(args.out, args.out_strides, row);
      douts[i] = piece(args.dout, args.dout_strides, row);
    }
    if (column == 0)
      lses[i] =
          args.lse[tile.batch * args.lse_batch + tile.head * args.lse_head + row * args.lse_row];
  }
  // in turns nobody adds before the first one has stored
  auto* sums = reinterpret_cast<float4*>(args.dq_sum + static_cast<int64_t>(blockIdx.x) * kSums);
  if (!args.deterministic) {
#pragma unroll
    for (int i = 0; i < kSums / 4; i += kRowCta) sums[i + thread] = make_float4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int r = thread / kPieces + i * kStep;
    float delta = 0;
    const auto add = [&](uint32_t a, uint32_t b) {
#pragma unroll
      for (int shift = 0; shift < 32; shift += 16) {
        // out of an empty row is 0, whatever dout holds
        const float x = unpack<kType>(static_cast<uint16_t>(a >> shift));
        const float y = unpack<kType>(static_cast<uint16_t>(b >> shift));
        delta = x == 0 ? delta : fmaf(x, y, delta);
      }
    };
    add(outs[i].x, douts[i].x);
    add(outs[i].y, douts[i].y);
    add(outs[i].z, douts[i].z);
    add(outs[i].w, douts[i].w);
    delta = warp_sum(delta, kPieces);
    if (column != 0) continue;
    const float lse = lses[i] == -INFINITY ? INFINITY : lses[i];
    if (r < tile.rows) {
      const int64_t at =
          static_cast<int64_t>(tile.batch * args.hq + tile.head) * args.sq + tile.first + r;
      args.row_lse[at] = lse;
      args.row_delta[at] = delta;
    }
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kQueries + r;
    args.tile_lse_log2[at] = lse * kLog2e;
    args.tile_delta[at] = -delta;
  }
}

// dq from its sums. In turns a tile is complete when all have had theirs: most are converted while
// the last key tiles still run.
template <DType kType, int kD, bool kListed>
__global__ void __launch_bounds__(kRowCta) backward_dq_sm90_kernel(const GradientArgs args) {
  using namespace sm90;
  constexpr int kQueries = GradientShape<kD>::kQueries, kSums = GradientShape<kD>::kSums;
  constexpr int kRounds = kSums / 4 / kRowCta;
  auto& staged = shared_memory<Tile<kQueries, kD>>();
  const int thread = threadIdx.x;
  const GradientRows<kQueries> tile(args, blockIdx.x);
  // wrong offsets of packed sequences may leave out tiles, whose turns would never come
  const bool early = args.deterministic && !args.cu_seqlens_q;
  if (!early) await_previous();
  if (tile.rows == 0) return;
  int turns = 0;
  if constexpr (kListed) {
    if (args.deterministic)
      turns = tile.units(args, blockIdx.x).tiles_below(args.lists.words * 16, thread % 32);
  } else {
    turns = KeyTiles<kQueries, GradientShape<kD>::kKeys>(args, tile.row, tile.sq, tile.sk).count();
  }
  if (early) {
    if (thread < 2)
      wait_for_signals(args.turns + static_cast<int64_t>(blockIdx.x) * 2 + thread, turns, nullptr);
    __syncthreads();
  }
  // where nobody has had the first turn there are no sums
  const bool any = !args.deterministic || turns > 0;
  const auto* sums =
      reinterpret_cast<const float4*>(args.dq_sum + static_cast<int64_t>(blockIdx.x) * kSums);
  float4 own[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) own[i] = any ? sums[i * kRowCta + thread] : float4{};
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    // as hand_over has it: of a warpgroup, a quarter of an accumulator, a thread
    const int i = round * kRowCta + thread;
    const int its = i / 1024, part = i / 128 % 8, its_thread = i % 128;
    const int row = its_thread / 32 * 16 + its_thread % 32 / 4 + (kQueries == 128 ? 64 * its : 0);
    const int column = part * 8 + its_thread % 4 * 2 + (kD == 128 ? 64 * its : 0);
    const float4 sum = own[round];
    auto store = [&](int row, float x, float y) {
      store_4_bytes(staged.address(row, column) + column % 8 * 2,
                    pack<kType>(x * args.scale, y * args.scale));
    };
    store(row, sum.x, sum.y);
    store(row + 8, sum.z, sum.w);
    const float total = sum.x + sum.y + sum.z + sum.w;
    // behind the rows that exist weights are 0 and so are sums
    if (args.checks && total != total) args.row_marks[blockIdx.x] = 1;
  }
  __syncthreads();
  constexpr int kPieces = kD / 8;
#pragma unroll
  for (int i = thread; i < kQueries * kPieces; i += kRowCta) {
    const int r = i / kPieces, column = i % kPieces * 8;
    const int64_t row = static_cast<int64_t>(tile.batch) * args.sq + tile.first + r;
    if (r < tile.rows && column < args.d)
      copy_16_bytes(args.dq + (row * args.hq + tile.head) * args.d + column,
                    staged.address(r, column));
  }
  // what runs behind this kernel waits for it alone
  if (early && blockIdx.x + 1 == gridDim.x) await_previous();
}

template <DType kType, int kD, bool kMapped, bool kListed>
void launch_backward(const BackwardCall& call, cudaStream_t stream) {
  using Shape = GradientShape<kD>;
  const GradientTiles tiles(call);
  const int64_t pairs = call.b * call.hk, group = call.hq / call.hk;
  GradientArgs args{};
  args.b = static_cast<int>(call.b);
  args.sq = static_cast<int>(call.sq);
  args.sk = static_cast<int>(call.sk);
  args.hq = static_cast<int>(call.hq);
  args.hk = static_cast<int>(call.hk);
  args.d = static_cast<int>(call.d);
  args.dv = static_cast<int>(call.dv);
  args.row_tiles = static_cast<int>(tiles.row_tiles);
  args.key_tiles = static_cast<int>(tiles.key_tiles);
  args.causal = call.causal || call.window;
  args.whole_tiles = static_cast<int>(tiles.total_keys - tiles.split_tiles);
  args.parts = static_cast<int>(tiles.parts);
  // As many heads take turns as have q, dout and sums of dq that L2 keeps, but enough for two tiles
  // a multiprocessor, else a last section would leave most of them idle beside its longest tile,
  // and with steps as short as those of d = 64, or few rows at a key tile as under lists, so many
  // that few tiles of a head meet at a row tile. Where nobody waits and all tiles are equal, or
  // lists decide, those of a head run side by side.
  constexpr int64_t kSectionBytes = 40'000'000, kSectionTiles = 256, kSectionHeads = 16;
  const int64_t bytes = call.sq * group * kD * 8;
  const int64_t most = std::max({kSectionBytes / bytes, kSectionTiles / tiles.key_tiles,
                                 (kListed ? call.deterministic : kD == 64) ? kSectionHeads : 1});
  args.sections = static_cast<int>(
      args.causal || call.deterministic || kListed ? pairs / std::min(most, pairs) : pairs);
  args.window = static_cast<int>(std::min<int64_t>(call.window, INT32_MAX / 2));
  args.deterministic = call.deterministic;
  args.fault = call.cu_seqlens_q ? call.fault : nullptr;
  args.checks = leaves_marks(call);
  args.scale = call.scale;
  args.scale_log2 = call.scale * sm90::kLog2e;
  args.cap_log2 = call.soft_cap * sm90::kLog2e;
  args.bend = call.soft_cap > 0 ? 2 * args.scale_log2 / call.soft_cap : 0;
  args.slopes = call.slopes;
  args.slopes_stride = call.slopes_stride;
  args.dslope_parts = call.dslope_parts;
  args.cu_seqlens_q = call.cu_seqlens_q;
  args.cu_seqlens_k = call.cu_seqlens_k;
  args.cache_seqlens = call.cache_seqlens;
  args.cu_q_stride = call.cu_q_stride;
  args.cu_k_stride = call.cu_k_stride;
  args.cache_stride = call.cache_stride;
  args.sequences = static_cast<int>(call.sequences);
  args.out = static_cast<const uint16_t*>(call.out);
  args.dout = static_cast<const uint16_t*>(call.dout);
  args.out_strides = call.out_strides;
  args.dout_strides = call.dout_strides;
  args.lse = call.lse;
  args.lse_batch = call.lse_batch;
  args.lse_head = call.lse_head;
  args.lse_row = call.lse_row;
  args.row_lse = call.row_lse;
  args.row_delta = call.row_delta;
  args.tile_lse_log2 = call.tile_lse_log2;
  args.tile_delta = call.tile_delta;
  args.dq_sum = call.dq_sum;
  args.counters = tiles.counters();
  args.ticket = call.counters;
  args.turns = call.counters + 1;
  args.row_marks = tiles.marks(call.counters);
  args.key_marks = args.row_marks + tiles.total_rows;
  args.part_turns = args.key_marks + tiles.total_keys;
  args.part_sums = call.part_sums;
  args.dq = static_cast<uint16_t*>(call.dq);
  args.dk = static_cast<uint16_t*>(call.dk);
  args.dv_out = static_cast<uint16_t*>(call.dv_out);
  args.lists = call.lists;
  const auto map = [&](const void* data, int64_t d, int64_t s, int64_t h, const Strides& strides,
                       int rows) {
    return make_tensor_map(kType, data, {d, s, h, call.b, strides.row, strides.head, strides.batch},
                           rows);
  };
  const auto result = [&](const void* data, int64_t d) {
    return map(data, d, call.sk, call.hk, {call.sk * call.hk * d, call.hk * d, d}, 64);
  };
  const int row_ctas = static_cast<int>(tiles.total_rows);
  launch<backward_rows_sm90_kernel<kType, kD>>({row_ctas, kRowCta, 0, stream, true}, args);
  launch<backward_sm90_kernel<kType, kD, kMapped, kListed>>(
      {static_cast<int>(tiles.ctas()), Shape::kThreads,
       sm90::shared_memory_bytes<GradientSmem<kD, kListed>>(), stream, true},
      map(call.q, call.d, call.sq, call.hq, call.q_strides, Shape::kQueries),
      map(call.dout, call.dv, call.sq, call.hq, call.dout_strides, Shape::kQueries),
      map(call.k, call.d, call.sk, call.hk, call.k_strides, Shape::kKeys),
      map(call.v, call.dv, call.sk, call.hk, call.v_strides, Shape::kKeys), result(call.dk, call.d),
      result(call.dv_out, call.dv), args);
  launch<backward_dq_sm90_kernel<kType, kD, kListed>>(
      {row_ctas, kRowCta, sm90::shared_memory_bytes<sm90::Tile<Shape::kQueries, kD>>(), stream,
       true},
      args);
}

}  // namespace

template <DType kType, int kD, bool kMapped, bool kListed>
void launch_backward_sm90(const BackwardCall& call, cudaStream_t stream) {
  launch_backward<kType, kD, kMapped, kListed>(call, stream);
}

}  // namespace heddle
