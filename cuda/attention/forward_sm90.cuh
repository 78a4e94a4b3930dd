#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "attention/forward_sm90.h"
#include "attention/pages_sm90.cuh"
#include "attention/slots_sm90.cuh"
#include "attention/softmax_sm90.cuh"
#include "common/lanes.cuh"
#include "common/sm80.cuh"
#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "common/tile.cuh"

// Attention in f16 or bf16. With off = sk - sq of each sequence:
//
//   S[p,t] = map(scale * Q[p,d] * K[t,d])   where t <= p + off if causal or windowed,
//                                                 t > p + off - window if windowed
//   out    = softmax(S) V                   lse = ln(sum(exp(S)))
//
// or what slots_sm90.cuh makes of S in place of exp.
//
// A tile is 64 rows of q per computing warpgroup, 128 or 192 in all, of one head; keys and values
// pass by in tiles of 80 to 128 rows, from the last to the first. Warpgroup 0 loads: it takes the
// next tile from a counter, publishes what the tile is beside its q, and keeps k and v coming
// through rings of two or three stages. The others compute, each on its own rows: the scores of key
// tile j and the values of tile j - 1 are multiplied at the same time, and softmax of tile j runs
// under the second product and under those of the other warpgroups, which take turns at issuing.
// Sizes that are smaller than the tile's are filled with zeros by the copies.
//
// Softmax looks for maxima in tiles that it masks. In others weights are relative to what those of
// before are, as far as that goes: sums tell where it does not, and there a warp multiplies again.
//
// Under a mask a key tile is two units of 64 keys of the list that the tile of q has (list_sm90.h),
// the next two that the same warpgroups see. A warpgroup whose rows see neither passes them by,
// with the values of its last tile yet to multiply, and one whose rows see all of both masks
// nothing. Another warp of warpgroup 0 takes tiles of q, loads q and walks their lists, which it
// makes where blocks alone are listed, some key tiles ahead of the one that loads k and v.
namespace heddle {
namespace {

template <int kD, int kDv, Form kForm, Layout kLayout> struct ForwardTile {
  static constexpr bool kListed = kLayout == Layout::kListed || kLayout == Layout::kApart;
  static constexpr bool kTall = kLayout == Layout::kTall, kPaged = kLayout == Layout::kPaged;
  static constexpr bool kSlots = kForm == Form::kMapped && kD == kSlotColumns;
  // rows of q bring factors, constants or levels
  static constexpr bool kRows = kSlots || kForm == Form::kSigmoid || kForm == Form::kReweighted;
  // exp2 bounds d = 64: a third warpgroup leaves fewer clocks in which no product runs. Lists take
  // registers that three don't have, and more rows would share one. With slopes and of sigmoids
  // three on shorter key tiles hide what one waits for its exponentials.
  static constexpr bool kShort = kForm == Form::kSloped || kForm == Form::kSigmoid;
  static constexpr int kWarpgroups = kListed                       ? kListedWarpgroups
                                     : kD == 64 || kShort || kTall ? 3
                                                                   : 2;
  static constexpr int kQueries = 64 * kWarpgroups;
  // as many as fit into shared memory with two stages. With slots scores have less registers, for
  // what is read of a tile ahead, and with three warpgroups.
  static constexpr int kKeys = kShort       ? 80
                               : kTall      ? (kDv == 96 ? 112 : 80)
                               : kSlots     ? 96
                               : kDv <= 128 ? 128
                               : kDv == 192 ? 112
                                            : 80;
  // with two the next q loads, and the last out is stored, under the work on this one
  static constexpr int kBuffers = kD <= 128 ? 2 : 1;
  // as many as there is room for. With lists values wait for the next tile that their warpgroup
  // sees, and those of the other warpgroup pass by meanwhile.
  static constexpr int kKeyStages = kTall && kD == 128 ? 3 : 2;
  static constexpr int kValueStages = (kTall && kD == 128) || kListed ? 3 : 2;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // sums to the 512 registers per lane that a CTA has; walks over lists and pages take some
  static constexpr int kLoadRegisters = kWarpgroups == 3 ? 32 : kListed || kPaged ? 40 : 24;
  static constexpr int kComputeRegisters = (512 - kLoadRegisters) / kWarpgroups / 8 * 8;
  static constexpr int kKeysOfBox = kListed ? kUnitKeys : kKeys;
};

constexpr int whole_panels(int columns) { return (columns + 63) / 64 * 64; }

// A tile as the loading warp describes it to the others
struct ForwardWork {
  int row;                       // first of its rows, or -1 after the last tile
  int head, batch;               // of q
  int q_begin, k_begin, sq, sk;  // where the sequence lies, and how long it is
  int key_end, key_tiles;        // key tiles key_end - key_tiles to key_end - 1 are visited
  int sequence;                  // packed or not
};

// Two units of a list. A warpgroup has a byte of `seen`: any and listed of the first, then of the
// second, whether some row doesn't see some key, whether a tile of q begins, which may be none, and
// whether only the mask tells which keys a row sees.
struct alignas(16) UnitPair {
  int unit[2];  // ascending, or -1
  uint8_t seen[kListedWarpgroups];
  int buffer;  // where the tile of q is described
  static constexpr uint32_t kAny = 5, kListed = 10, kMasked = 16, kOpens = 32, kCut = 64;
};

__device__ __forceinline__ int highest_bit(uint32_t bits) {
  return 31 - __clz(static_cast<int>(bits));
}

// Makes pairs of units that come in order, from either end: two that the same warpgroups see, so
// that none multiplies for the sake of the other, with what is left over of each class among each
// other. As many as half the units, rounded up.
struct UnitPairs {
  // A unit is of class 1, 2 or 3: seen by the first warpgroup, by the second or by both. The last
  // of a class that has an odd number, whose bit is set here, counts as of class 0.
  uint32_t odd;
  uint32_t waiting[4];  // a unit and what is seen of it, or kNone, of each class
  static constexpr uint32_t kNone = ~0u;

  __device__ __forceinline__ explicit UnitPairs(uint32_t odd) : odd(odd) {
    for (uint32_t& unit : waiting) unit = kNone;
  }

  // Whether a unit completes a pair; `seen` is `any` and `listed` of the first warpgroup, then of
  // the second
  __device__ __forceinline__ bool add(int number, uint32_t seen, UnitPair& pair) {
    const uint32_t unit = static_cast<uint32_t>(number) << 4 | seen;
    uint32_t kind = (seen & 1) | (seen >> 1 & 2), other = kNone;
    if (odd >> kind & 1) {
      odd ^= 1u << kind;
      kind = 0;
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
      if (i == kind) {
        other = waiting[i];
        waiting[i] = other == kNone && (i > 0 || odd != 0) ? unit : kNone;
      }
    const bool alone = other == kNone;
    if (alone && (kind > 0 || odd != 0)) return false;
    if (alone) other = 0;
    const uint32_t lower = alone ? unit : min(unit, other), upper = unit ^ other ^ lower;
    pair.unit[0] = static_cast<int>(lower >> 4);
    pair.unit[1] = alone ? -1 : static_cast<int>(upper >> 4);
    for (int w = 0; w < kListedWarpgroups; ++w)
      pair.seen[w] = static_cast<uint8_t>((lower >> 2 * w & 3) | (upper >> 2 * w & 3) << 2);
    return true;
  }
};

// What a form keeps beside the tiles of q, k and v
template <Form kForm, class Shape> struct FormSmem {};
template <class Shape> struct FormSmem<Form::kBiased, Shape> {
  sm90::Tile<64, Shape::kKeys> bias[Shape::kWarpgroups];
  sm90::Barrier bias_full[Shape::kWarpgroups], bias_empty[Shape::kWarpgroups];
};

template <Form kForm> struct FormMaps {};
template <> struct FormMaps<Form::kBiased> {
  sm90::TensorMap bias;  // [b, hq, sq, sk]
  bool batches, heads;   // or 1 in place of b and hq
};

template <int kD, int kDv, Form kForm, Layout kLayout>
struct ForwardSmem : FormSmem<kForm, ForwardTile<kD, kDv, kForm, kLayout>> {
  using Shape = ForwardTile<kD, kDv, kForm, kLayout>;
  static constexpr bool kListed = Shape::kListed;
  // out passes through q's buffer
  static constexpr int kWide = whole_panels(kD > kDv ? kD : kDv);
  // key tiles that are known ahead
  static constexpr int kPairs = 8;
  sm90::Tile<Shape::kQueries, kWide> q[Shape::kBuffers];
  sm90::Tile<Shape::kKeys, whole_panels(kD)> k[Shape::kKeyStages];
  sm90::Tile<Shape::kKeys, whole_panels(kDv)> v[Shape::kValueStages];
  ForwardWork work[Shape::kBuffers];
  UnitPair pairs[kListed ? kPairs : 1];
  sm90::Barrier q_full[Shape::kBuffers], q_empty[Shape::kBuffers];
  sm90::Barrier k_full[Shape::kKeyStages], k_empty[Shape::kKeyStages];
  sm90::Barrier v_full[Shape::kValueStages], v_empty[Shape::kValueStages];
  sm90::Barrier pair_full[kListed ? kPairs : 1], pair_empty[kListed ? kPairs : 1];
  UnitBits units[kListed ? 32 : 1][kListedWarpgroups];  // a part of a list
  // of each warp, from which of a CTA's key tiles on, where it is not below those of this tile of q
  int wary[Shape::kWarpgroups][4];
};

struct ForwardArgs {
  int b, sq, sk, hq;
  int group;      // query heads per kv head
  int tiles;      // of all heads and sequences; packed sequences have at most so many
  int row_tiles;  // of one head and sequence
  int section;    // pairs of head and batch whose keys and values fit into L2 together
  float scale_log2;
  bool causal;  // or windowed
  int window;   // 0 is all
  float scale, soft_cap;
  const float *slopes, *sink;
  int64_t slopes_stride, sink_stride;
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *cache_seqlens;
  int64_t cu_q_stride, cu_k_stride, cache_stride;
  int sequences;
  int d, dv;
  const uint16_t *q, *k, *v;
  uint16_t* out;
  Strides q_strides, k_strides, v_strides, out_strides;
  float* lse;  // [b, hq, sq]
  int* tickets;
  UnitLists lists;
  Slots slots;
  int short_tiles;  // with lists, the first of row_tiles, which come last, those of all pairs
  bool sweeps;      // keys go up and down in turns, so that L2 still has those of before
  // Of kPaged
  int pages, page_log2;  // of 2^page_log2 keys
  int box;               // a copy moves so many
  const int32_t* block_table;
  int64_t table_row, table_column;
};

// Which tile has which number. Inside of a section tiles go from the last rows to the first, which
// under a causal mask is from the longest to the shortest, and neighbours are of different heads.
// With lists the short ones of all heads come last, so that all CTAs end at about the same time.
template <int kQueries, Layout kLayout = Layout::kEven> struct ForwardOrder {
  static constexpr bool kListed = kLayout == Layout::kListed || kLayout == Layout::kApart;
  static constexpr bool kPaged = kLayout == Layout::kPaged;
  const ForwardArgs& args;
  // packed sequences: where the search for the last tile ended
  int sequence = 0, tiles_before = 0;

  __device__ __forceinline__ int offset(const int32_t* offsets, int64_t stride, int i,
                                        int total) const {
    return min(max(offsets[i * stride], 0), total);  // nothing is out of bounds, whatever they say
  }

  // The packed sequence of a tile, and how many tiles are before it, by a warp whose lanes look at
  // one each; short ones have none here
  __device__ __forceinline__ int look(int tile, ForwardWork& work, int& tiles_here) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int all = 0; sequence < args.sequences; sequence += 32, tiles_before += all) {
      const int i = min(sequence + lane, args.sequences - 1);
      const int begin = offset(args.cu_seqlens_q, args.cu_q_stride, i, args.sq);
      const int size = offset(args.cu_seqlens_q, args.cu_q_stride, i + 1, args.sq) - begin;
      const int own = sequence + lane >= args.sequences || size <= kFewQueries
                          ? 0
                          : (size + kQueries - 1) / kQueries;
      const int until = sum_so_far(own, lane);
      all = __shfl_sync(~0u, until, 31);
      if (tile >= tiles_before + all) continue;
      const int place = __popc(__ballot_sync(~0u, tiles_before + until <= tile));
      work.sequence = sequence + place;
      work.q_begin = __shfl_sync(~0u, begin, place);
      work.sq = __shfl_sync(~0u, size, place);
      tiles_here = __shfl_sync(~0u, own, place);
      return tiles_before + __shfl_sync(~0u, until, place) - tiles_here;
    }
    return 0;
  }

  // Only with increasing numbers. A row of -1 means that there are no more.
  __device__ __forceinline__ ForwardWork at(int index) {
    ForwardWork work{-1, 0, 0, 0, 0, args.sq, args.sk, 0, 0, 0};
    if (index >= args.tiles) return work;
    int row_tile;
    if (args.cu_seqlens_q) {
      const int tile = index / args.hq;
      work.head = index % args.hq;
      int tiles_here = 0;
      if constexpr (kPaged) {
        const int before = look(tile, work, tiles_here);
        if (sequence >= args.sequences) return work;
        row_tile = before + tiles_here - 1 - tile;
        work.sk = offset(args.cache_seqlens, args.cache_stride, work.sequence, args.sk);
      } else {
        for (; sequence < args.sequences; ++sequence, tiles_before += tiles_here) {
          work.q_begin = offset(args.cu_seqlens_q, args.cu_q_stride, sequence, args.sq);
          work.sq =
              offset(args.cu_seqlens_q, args.cu_q_stride, sequence + 1, args.sq) - work.q_begin;
          tiles_here = max((work.sq + kQueries - 1) / kQueries, 0);
          if (tile < tiles_before + tiles_here) break;
        }
        if (sequence == args.sequences) return work;
        work.sequence = sequence;
        row_tile = tiles_before + tiles_here - 1 - tile;
        work.k_begin = offset(args.cu_seqlens_k, args.cu_k_stride, sequence, args.sk);
        work.sk = max(
            offset(args.cu_seqlens_k, args.cu_k_stride, sequence + 1, args.sk) - work.k_begin, 0);
      }
    } else {
      const int pairs = args.hq * args.b;
      int at = index, heads = args.section, tiles = args.row_tiles, first = 0;
      if constexpr (kListed) {
        const int above = tiles - args.short_tiles;
        if (at < pairs * above) {
          tiles = above;
          first = args.short_tiles;
        } else {
          at -= pairs * above;
          heads = pairs;
          tiles = args.short_tiles;
        }
      }
      const int per_section = heads * tiles;
      const int section = at / per_section, inside = at % per_section;
      const int width = min(heads, pairs - section * heads);
      const int pair = section * heads + inside % width;
      row_tile = first + tiles - 1 - inside / width;
      work.head = pair % args.hq;
      work.batch = work.sequence = pair / args.hq;
      if (args.cache_seqlens)
        work.sk = min(max(args.cache_seqlens[work.batch * args.cache_stride], 0), args.sk);
    }
    work.row = row_tile * kQueries;
    return work;
  }
};

// Which key tiles a tile of q visits
template <int kQueries, int kKeys>
__device__ __forceinline__ void find_keys(const ForwardArgs& args, ForwardWork& work) {
  // row i sees keys up to i + diagonal, and no more than a window of them
  const int diagonal = work.sk - work.sq;
  const int seen = args.causal ? min(work.sk, work.row + kQueries + diagonal) : work.sk;
  const int first = args.window ? max(work.row + diagonal - args.window + 1, 0) / kKeys : 0;
  work.key_end = max((seen + kKeys - 1) / kKeys, 1);
  // a tile that sees no key visits one all the same, fully masked
  work.key_tiles = max(work.key_end - first, 1);
}

// The list of a tile of q, as the warp that walks it reads it: where none was written before it
// finds out by itself what the blocks name
template <int kQueries> struct ListReader {
  const UnitLists& lists;
  int64_t list = 0;
  BlockUnits blocks{};

  __device__ __forceinline__ ListReader(const ForwardArgs& args, const ForwardWork& work)
      : lists(args.lists) {
    const bool packed = args.cu_seqlens_q != nullptr;
    if (lists.bits) {
      const int64_t first = packed ? lists.first_tile(work.q_begin, work.sequence) : 0;
      list = lists.index(work.batch, work.head, first + work.row / kQueries);
    } else {
      blocks = BlockUnits(lists.mask,
                          {work.batch, work.sequence, work.q_begin, work.head, work.sq, work.sk,
                           args.causal, packed},
                          work.row);
    }
  }

  // How many units it has, times 16, and which classes of UnitPairs have an odd number
  __device__ __forceinline__ uint32_t count() const {
    if (lists.bits) return static_cast<uint32_t>(lists.marks[list * lists.mark_words()]);
    uint32_t units = 0, odd = 0;
    for (int word = threadIdx.x % 32; word < lists.words; word += 32) {
      const uint32_t first = blocks(word, 0), second = blocks(word, 1);
      units += __popc(first | second);
      odd ^= (__popc(first & ~second) & 1) << 1 | (__popc(second & ~first) & 1) << 2 |
             (__popc(first & second) & 1) << 3;
    }
    return __reduce_add_sync(~0u, units) << 4 | __reduce_xor_sync(~0u, odd);
  }

  // What the warpgroups see of the units of a word, and whether they see any
  __device__ __forceinline__ bool read(int word, UnitBits (&to)[kListedWarpgroups]) const {
    to[0] = to[1] = {0, 0};
    if (!lists.bits) {
      for (int w = 0; w < kListedWarpgroups; ++w) to[w].any = to[w].listed = blocks(word, w);
    } else if (lists.marks[list * lists.mark_words() + 1 + word / 32] >> word % 32 & 1) {
      for (int w = 0; w < kListedWarpgroups; ++w)
        to[w] = lists.bits[(list * lists.words + word) * kListedWarpgroups + w];
    }
    return (to[0].any | to[1].any) != 0;
  }
};

// Where a thread's rows, `row` and the eighth behind it, stand among the keys
__device__ __forceinline__ sm90::RowBounds bounds_of(const ForwardArgs& args,
                                                     const ForwardWork& work, int row) {
  const int diagonal = work.sk - work.sq;
  sm90::RowBounds bounds;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    bounds.position[r] = row + 8 * r + diagonal;
    bounds.until[r] = args.causal ? min(work.sk, bounds.position[r] + 1) : work.sk;
  }
  return bounds;
}

// What row `row` of a sequence, which may be behind its last one, brings to scores
__device__ __forceinline__ sm90::SlotRow slot_row(const ForwardArgs& args, const ForwardWork& work,
                                                  int row, const sm90::SlotMap& slots) {
  const int at = row + work.sk - work.sq;
  const int end = args.causal ? min(max(at + 1, 0), work.sk) : work.sk;
  const int begin = args.window ? max(at - args.window + 1, 0) : 0;
  const int i = min(row, work.sq - 1);
  return slots.row_of(work.batch, work.head, args.hq, work.q_begin + i, i, max(end - begin, 0));
}

// Slots and sums of a thread's rows before their first key
template <Form kForm>
__device__ __forceinline__ void open_rows(const ForwardArgs& args, const ForwardWork& work, int row,
                                          sm90::SlotMap& slots, sm90::RowSoftmax& rows) {
  slots.slope = args.slopes ? args.slopes[work.head * args.slopes_stride] * slots.unit : 0;
  if (args.slots.k_factors)
    slots.columns =
        args.slots.k_factors + work.k_begin +
        (work.batch * (args.hq / args.group) + work.head / args.group) * args.slots.k_row;
  rows.clear();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    slots.row[r] = slot_row(args, work, row + 8 * r, slots);
    // added to -inf, which masked products are by then, it would be no number
    if (kForm == Form::kSigmoid && slots.row[r].constant == INFINITY)
      slots.row[r].constant = 0x1.fffffep127f;
    if (slots.plain_sigmoid()) rows.row_max[r] = slots.kSigmoidBase;
  }
}

// Rows of k or v of one head and sequence
template <class Element> struct KeyRows {
  const Element* first;
  int64_t stride;
  __device__ __forceinline__ const Element* operator()(int key) const {
    return first + key * stride;
  }
};

using ForwardPages = PageRows<ForwardArgs, uint16_t>;

// What a lane copies of a key tile: rows from `at` on, from this row of a page
struct PageBox {
  int at, page, row;
};

template <DType kType, int kD, int kDv, Form kForm, Layout kLayout>
__global__ void __launch_bounds__((ForwardTile<kD, kDv, kForm, kLayout>::kThreads), 1)
    forward_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_q,
                        const __grid_constant__ sm90::TensorMap gmem_k,
                        const __grid_constant__ sm90::TensorMap gmem_v,
                        const __grid_constant__ sm90::TensorMap gmem_out, const ForwardArgs args,
                        const __grid_constant__ FormMaps<kForm> maps) {
  using namespace sm90;
  using Shape = ForwardTile<kD, kDv, kForm, kLayout>;
  constexpr bool kListed = Shape::kListed, kPaged = Shape::kPaged;
  constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys;
  using KeyTurn = Turn<Shape::kKeyStages>;
  using ValueTurn = Turn<Shape::kValueStages>;
  constexpr int kBuffers = Shape::kBuffers, kWarpgroups = Shape::kWarpgroups;
  auto& smem = shared_memory<ForwardSmem<kD, kDv, kForm, kLayout>>();
  // the same in all lanes, which the compiler cannot know of threadIdx
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
      smem.q_full[buffer].init(1);
      // each warp has read what the tile is, and each warpgroup's out was stored
      smem.q_empty[buffer].init(kWarpgroups * 5);
    }
    for (auto& warps : smem.wary)
      for (int& tile : warps) tile = -1;
    for (Barrier& full : smem.k_full) full.init(1);
    for (Barrier& full : smem.v_full) full.init(1);
    for (Barrier& empty : smem.k_empty) empty.init(kWarpgroups * 4);
    for (Barrier& empty : smem.v_empty) empty.init(kWarpgroups * 4);
    if constexpr (kListed)
      for (int i = 0; i < smem.kPairs; ++i) {
        smem.pair_full[i].init(1);
        smem.pair_empty[i].init(1);
      }
    if constexpr (kForm == Form::kBiased) {
      for (int w = 0; w < kWarpgroups; ++w) {
        smem.bias_full[w].init(1);
        smem.bias_empty[w].init(4);
      }
    }
    fence_barrier_init();
  }
  __syncthreads();

  // lists are written meanwhile
  if constexpr (kListed) await_previous();
  if (warpgroup == 0) {
    lower_registers<Shape::kLoadRegisters>();
    auto ask = [&] { return static_cast<int>(gridDim.x) + fetch_add(&args.tickets[0], 1); };
    auto describe = [&](const ForwardWork& work, uint32_t visit) {
      const Turn<kBuffers> q(visit);
      smem.q_empty[q.stage].wait(q.parity ^ 1);
      smem.work[q.stage] = work;
      return q.stage;
    };
    auto load_q = [&](const ForwardWork& work, uint32_t visit) {
      const uint32_t buffer = describe(work, visit);
      smem.q_full[buffer].arrive_expect(whole_panels(kD) * kQueries * 2);
      for (int column = 0; column < kD; column += 64)
        copy_to_smem(smem.q[buffer].panel(column), gmem_q, smem.q_full[buffer], column,
                     work.q_begin + work.row, work.head, work.batch, Keep::kShortly);
    };
    // the last tile of a CTA is none
    auto finish = [&](const ForwardWork& work, uint32_t visit) {
      smem.q_full[describe(work, visit)].arrive();
      // the last CTA leaves the counters as it found them
      if (fetch_add(&args.tickets[1], 1) == static_cast<int>(gridDim.x) - 1)
        args.tickets[0] = args.tickets[1] = 0;
    };
    // the stage of key tile n, once what was there before was read
    auto empty_keys = [&](uint32_t n) {
      const KeyTurn turn(n);
      smem.k_empty[turn.stage].wait(turn.parity ^ 1);
      return turn.stage;
    };
    auto empty_values = [&](uint32_t n) {
      const ValueTurn turn(n);
      smem.v_empty[turn.stage].wait(turn.parity ^ 1);
      return turn.stage;
    };
    if constexpr (kListed) {
      if (threadIdx.x >= 64) return;
      const bool walks = __shfl_sync(~0u, threadIdx.x / 32, 0) == 1, leads = elect_one();
      if (walks) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int leader = __ffs(static_cast<int>(__ballot_sync(~0u, leads))) - 1;
        if (leads) prefetch(gmem_q);
        ForwardOrder<kQueries, kLayout> order{args};
        int index = static_cast<int>(blockIdx.x);
        ForwardWork work = order.at(index);
        uint32_t visit = 0, n = 0;  // tiles of q, and of k and v
        auto push = [&](UnitPair pair, bool opens) {
          const Turn<smem.kPairs> turn(n++);
          pair.buffer = Turn<kBuffers>(visit).stage;
          // keys that the first row of a warpgroup sees before its own, if the lists name them: of
          // that one alone it would have no maximum of a tile before
          const int first = work.row + work.sk - work.sq, end = (pair.unit[1] + 1) * kUnitKeys;
          for (int w = 0; w < kWarpgroups; ++w) {
            const int whole_end = args.causal ? min(first + w * 64, work.sk) : work.sk;
            const bool whole = (pair.seen[w] & UnitPair::kListed) == UnitPair::kListed;
            if (!whole || end > whole_end) pair.seen[w] |= UnitPair::kMasked;
            if (pair.seen[w] & ~(pair.seen[w] >> 1) & UnitPair::kAny)
              pair.seen[w] |= UnitPair::kCut;
            if (opens) pair.seen[w] |= UnitPair::kOpens;
          }
          smem.pair_empty[turn.stage].wait(turn.parity ^ 1);
          smem.pairs[turn.stage] = pair;
          smem.pair_full[turn.stage].arrive();
        };
        for (; work.row >= 0; ++visit) {
          const ListReader<kQueries> list(args, work);
          const uint32_t count = list.count();
          UnitPairs pairs(count & 15);
          bool opens = true;
          if (leads) {
            work.key_tiles = max((static_cast<int>(count >> 4) + 1) / 2, 1);
            load_q(work, visit);
            if (count == 0) push({{-1, -1}, {}, 0}, true);
          }
          const bool rises = kLayout == Layout::kApart && args.sweeps && index / gridDim.x % 2 == 1;
          const auto take = [&](uint32_t& bits) {
            const int bit = rises ? __ffs(static_cast<int>(bits)) - 1 : highest_bit(bits);
            bits ^= 1u << bit;
            return bit;
          };
          const int groups = (args.lists.words + 31) / 32;
          for (int i = 0; i < groups; ++i) {
            const int group = (rises ? i : groups - 1 - i) * 32;
            uint32_t left = __ballot_sync(~0u, list.read(group + lane, smem.units[lane]));
            __syncwarp();
            while (leads && left != 0) {
              const int word = take(left);
              const UnitBits first = smem.units[word][0], second = smem.units[word][1];
              for (uint32_t any = first.any | second.any; any != 0;) {
                const int bit = take(any);
                const auto seen = [&](const UnitBits& its) {
                  return (its.listed >> bit & 1) << 1 | (its.any >> bit & 1);
                };
                UnitPair pair{};
                if (!pairs.add((group + word) * 32 + bit, seen(first) | seen(second) << 2, pair))
                  continue;
                push(pair, opens);
                opens = false;
              }
            }
            __syncwarp();
          }
          index = __shfl_sync(~0u, leads ? ask() : 0, leader);
          work = order.at(index);
        }
        if (leads) {
          finish(work, visit);
          push({}, true);
        }
      } else if (leads) {
        prefetch(gmem_k);
        prefetch(gmem_v);
        // where the units are of the key tile whose values are next
        struct Place {
          int row[2], head, batch;
        } last{};
        auto load = [&](auto& tile, Barrier& full, const TensorMap& map, const Place& place) {
          full.arrive_expect(tile.kBytes);
#pragma unroll
          for (int i = 0; i < 2; ++i)
            tile.load(map, full, place.row[i], place.head, place.batch, Keep::kLong, i * kUnitKeys);
        };
        auto load_keys = [&](uint32_t n, const Place& place) {
          const uint32_t stage = empty_keys(n);
          load(smem.k[stage], smem.k_full[stage], gmem_k, place);
        };
        auto load_values = [&](uint32_t n, const Place& place) {
          const uint32_t stage = empty_values(n);
          load(smem.v[stage], smem.v_full[stage], gmem_v, place);
        };
        int left = 0;  // key tiles of this tile of q
        for (uint32_t n = 0;; ++n) {
          const Turn<smem.kPairs> turn(n);
          smem.pair_full[turn.stage].wait(turn.parity);
          const UnitPair pair = smem.pairs[turn.stage];
          const ForwardWork& work = smem.work[pair.buffer];
          if (work.row < 0) return;
          Place next{{}, work.head / args.group, work.batch};
          for (int i = 0; i < 2; ++i)  // zeros for none
            next.row[i] = pair.unit[i] < 0 ? args.sk : work.k_begin + pair.unit[i] * kUnitKeys;
          load_keys(n, next);
          // who gave back the keys that were there is done with the pair before
          constexpr uint32_t kDone = Shape::kKeyStages + 1;
          if (n >= kDone) smem.pair_empty[(n - kDone) % smem.kPairs].arrive();
          if (left > 0) {
            load_values(n - 1, last);
          } else {
            left = work.key_tiles;
          }
          last = next;
          // the next pair may need the last values before it is there
          if (--left > 0) continue;
          load_values(n, last);
        }
      }
    } else if (threadIdx.x < 32) {
      // one lane does it all, but for pages, of which each copies its own
      const bool leads = elect_one();
      if (!kPaged && !leads) return;
      const int lane = kPaged ? static_cast<int>(threadIdx.x) : 0;
      if (leads) {
        prefetch(gmem_q);
        prefetch(gmem_k);
        prefetch(gmem_v);
      }
      ForwardOrder<kQueries, kLayout> order{args};
      ForwardWork work = order.at(blockIdx.x);
      uint32_t visit = 0, loaded = 0;  // tiles of q, and of k and v
      if (work.row >= 0) find_keys<kQueries, kKeys>(args, work);
      for (; work.row >= 0; ++visit) {
        const int kv_head = work.head / args.group;
        // looked up before there is room for it
        auto find = [&](int j) {
          PageBox box{};
          if constexpr (kPaged) {
            const ForwardPages rows{args, work.sequence, nullptr, args.k_strides};
            box.at = lane * args.box;
            const int key = (work.key_end - 1 - j) * kKeys + box.at;
            // what lies outside arrives as zeros: pages behind the last key are not looked at
            box.page = box.at < kKeys && key < work.sk ? rows.page(key) : args.pages;
            box.row = rows.row(key);
          }
          return box;
        };
        auto load = [&](auto& tile, Barrier& full, const TensorMap& map, int j,
                        const PageBox& box) {
          if (leads) full.arrive_expect(tile.kBytes);
          if constexpr (kPaged) {
            __syncwarp();
            if (box.at >= kKeys) return;
            for (int column = 0; column < kD; column += 64)
              copy_to_smem(tile.panel(column) + box.at * 128, map, full, column, box.row, kv_head,
                           box.page, Keep::kLong);
          } else {
            tile.load(map, full, work.k_begin + (work.key_end - 1 - j) * kKeys, kv_head, work.batch,
                      Keep::kLong);
          }
        };
        auto load_keys = [&](int j) {
          const PageBox box = find(j);
          const uint32_t stage = empty_keys(loaded + j);
          load(smem.k[stage], smem.k_full[stage], gmem_k, j, box);
        };
        auto load_values = [&](int j) {
          const PageBox box = find(j);
          const uint32_t stage = empty_values(loaded + j);
          load(smem.v[stage], smem.v_full[stage], gmem_v, j, box);
        };
        // those of key tile j, as soon as those of the tile before were read
        auto load_bias = [&](int j) {
          if constexpr (kForm == Form::kBiased) {
            for (int w = 0; w < kWarpgroups; ++w) {
              smem.bias_empty[w].wait((loaded + j + 1) & 1);
              smem.bias_full[w].arrive_expect(smem.bias[w].kBytes);
              for (int column = 0; column < kKeys; column += 64)
                copy_to_smem(smem.bias[w].panel(column), maps.bias, smem.bias_full[w],
                             (work.key_end - 1 - j) * kKeys + column, work.row + 64 * w,
                             maps.heads ? work.head : 0, maps.batches ? work.batch : 0,
                             Keep::kNormal);
            }
          }
        };
        load_keys(0);
        if (leads) load_q(work, visit);
        for (int j = 1; j < work.key_tiles; ++j) {
          load_keys(j);
          load_bias(j - 1);
          load_values(j - 1);
        }
        int ticket = leads ? ask() : 0;
        if constexpr (kPaged) ticket = __reduce_add_sync(~0u, ticket);
        load_bias(work.key_tiles - 1);
        load_values(work.key_tiles - 1);
        loaded += work.key_tiles;
        work = order.at(ticket);
        if (work.row >= 0) find_keys<kQueries, kKeys>(args, work);
      }
      if (leads) finish(work, visit);
    }
    return;
  }

  raise_registers<Shape::kComputeRegisters>();
  const int own = warpgroup - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int own_row = own * 64 + warp * 16;  // first of this warp's rows in the tile
  float acc_s[kKeys / 2], acc_o[kDv / 2];
  uint32_t frag_p[kKeys / 16][4];
  RowSoftmax rows;
  RowBounds bounds{};
  constexpr bool kSlots = Shape::kSlots, kRows = Shape::kRows;
  constexpr bool kMapped = kForm == Form::kMapped;
  constexpr DType kScoreType = kForm == Form::kReweighted ? DType::kF16 : kType;  // of q and k
  ScoreMap map{args.scale, args.soft_cap, 0};
  SlotMap slots(args.slots, args.scale, args.soft_cap);
  uint32_t ahead[kSlots ? kKeys / 8 : 1][2];  // what is read while scores are multiplied
  // mapped scores are in log2 units already
  const float to_log2 = kMapped || kForm == Form::kSigmoid || kForm == Form::kReweighted ? 1.f
                        : kForm == Form::kBiased                                         ? kLog2e
                                                 : args.scale_log2;
  // Maxima are looked for in few tiles only, and bf16, which has the range of f32, leaves room
  // above them. Weights are from 2^-40 to 2^20 then, so that values from 2^-86 to 2^90 are
  // multiplied.
  constexpr bool kHopes = kForm == Form::kPlain || kForm == Form::kSloped;
  constexpr int kLag = kType == DType::kF16 ? 12 : kHopes ? 20 : 60;
  // what sums of a tile may be where nobody looks
  constexpr float kMost = kType == DType::kF16 ? 0x1p15f : kHopes ? 0x1p20f : 0x1p60f;
  constexpr int kOwnLag = kHopes || kForm == Form::kBiased ? kLag : 8;
  const float room = kHopes && kType == DType::kBF16 ? 40 / to_log2 : 0;
  // With slopes weights of a thread's two rows are relative to the same score of any key
  constexpr bool kEvenRows = kForm == Form::kSloped && kType == DType::kBF16;
  uint32_t biased = 0;  // tiles of biases
  bool calm = false;    // maxima of the tile before were no news
  float slope = 0;      // in units of products
  Shares shares{};

  // Where a warpgroup sees no key of a half of a tile, behind its last row in the first or before
  // its window in the last, it leaves out what those take, but for their values. In copies of their
  // own, with q in registers: where code is shared with what all tiles do ptxas makes that slower.
  constexpr bool kHalves =
      (kLayout == Layout::kEven || kPaged) && kForm == Form::kPlain && kD == 128;
  constexpr int kHalfKeys = 64;
  using HalfScores = float[kHalfKeys / 2];
  // where the halves of a key tile begin
  struct Halves {
    int lower, upper;
  };
  // With lists rows of q stay in registers: products read less of shared memory
  uint32_t frag_q[kListed || kHalves ? kD / 16 : 1][4];
  auto hold_q = [&](uint32_t buffer) {
#pragma unroll
    for (int d = 0; d < kD; d += 16)
      ldmatrix_x4(smem.q[buffer].address(own_row + lane % 16, d + lane / 16 * 8), frag_q[d / 16]);
  };
  auto issue_scores = [&](uint32_t stage, uint32_t buffer) {
    wgmma_fence(acc_s);
    const uint64_t q = smem.q[buffer].k_major(own * 64, 0), k = smem.k[stage].k_major(0, 0);
#pragma unroll
    for (int d = 0; d < kD; d += 16) {
      const uint64_t its_k = advance(k, smem.k[0].k_step(d));
      if constexpr (kListed)
        wgmma<kType, Major::kK>(acc_s, frag_q[d / 16], its_k, d > 0);
      else
        wgmma<kScoreType, Major::kK>(acc_s, advance(q, smem.q[0].k_step(d)), its_k, d > 0);
    }
    wgmma_commit();
  };
  // Scores of half a tile's keys, from `key` on
  auto issue_half = [&](HalfScores& scores, uint32_t stage, uint32_t buffer, int key) {
    hold_q(buffer);
    wgmma_fence(scores);
    const uint64_t k = smem.k[stage].k_major(key, 0);
#pragma unroll
    for (int d = 0; d < kD; d += 16)
      wgmma<kType, Major::kK>(scores, frag_q[d / 16], advance(k, smem.k[0].k_step(d)), d > 0);
    wgmma_commit();
  };
  auto issue_values = [&](uint32_t stage) {
    wgmma_fence(acc_o);
#pragma unroll
    for (int k = 0; k < kKeys; k += 16)
      wgmma<kType, Major::kMN>(acc_o, frag_p[k / 16], smem.v[stage].mn_major(k), true);
    wgmma_commit();
  };
  auto release = [&](Barrier& empty) {
    if (lane == 0) empty.arrive();
  };
  auto fetch = [&](int key, int sk) {
    if constexpr (kSlots) {
      if (!slots.reads()) return;
#pragma unroll
      for (int g = 0; g < kKeys / 8; ++g)
#pragma unroll
        for (int x = 0; x < 2; ++x) ahead[g][x] = slots.word(key + 8 * g + lane % 4 * 2, x, sk);
    }
  };
  // Products of the tile whose halves are from these keys on, which this tile of q sees whole, by
  // each warp alone
  auto multiply_again = [&](const ForwardWork& work, const auto& tile, int lower, int upper) {
    using Element = std::conditional_t<kType == DType::kF16, F16, BF16>;
    const Strides& strides = args.k_strides;
    const uint16_t* k = args.k + work.head / args.group * strides.head + lane % 4 * 2;
    if constexpr (!kPaged)
      k += work.batch * strides.batch + (work.k_begin + lower + lane / 4) * strides.row;
    const auto row_of = [&](int i) {  // 2 i behind the first
      if constexpr (kPaged) {
        return ForwardPages{args, work.sequence, k, strides}(lower + 2 * i + lane / 4);
      } else {
        const int64_t between = (upper - lower - kKeys / 2) * strides.row;
        return k + 2 * i * strides.row + (i < kKeys / 4 ? 0 : between);
      }
    };
    for (float& x : acc_s) x = 0;
#pragma unroll 1
    for (int d = 0; d < args.d; d += 16, k += 16) {
      uint32_t frag_q[4];
      ldmatrix_x4(tile.address(own_row + lane % 16, d + lane / 16 * 8), frag_q);
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 4) {
        const auto* pairs = reinterpret_cast<const uint32_t*>(row_of(i));
        float products[4] = {acc_s[i], acc_s[i + 1], acc_s[i + 2], acc_s[i + 3]};
        multiply<Element>(products, frag_q, pairs[0], d + 8 < args.d ? pairs[4] : 0);
        for (int x = 0; x < 4; ++x) acc_s[i + x] = products[x];
      }
    }
  };
  // What slopes leave out of row r of a tile, of which this lane's first column is `column`
  const auto base_of = [&](int column, int r) {
    return slope * static_cast<float>(column - bounds.position[r]);
  };
  // acc_s becomes exp(S - row_max); whether what was summed before has to shrink
  auto softmax = [&](const ForwardWork& work, uint32_t buffer, int key, bool masked, float lag) {
    const int column = key + lane % 4 * 2;
    const auto mask = [&] {
      if (masked) mask_scores(acc_s, bounds, key, args.window, lane);
    };
    if constexpr (kForm == Form::kSloped) {
      add_slopes(acc_s, slope);
      mask();
      return rows.update_lazily<kEvenRows>(acc_s, to_log2, {base_of(column, 0), base_of(column, 1)},
                                           lag, room, 8 * slope);
    } else if constexpr (kForm == Form::kBiased) {
      const auto& biases = smem.bias[own];
      smem.bias_full[own].wait(biased++ & 1);
      const auto given_back = [&](bool moved) {
        __syncwarp();
        release(smem.bias_empty[own]);
        return moved;
      };
      // Where maxima are no news none is looked for, which may go wrong
      const bool hopes = calm && !masked;
      if (hopes && rows.add_biased<kType>(acc_s, args.scale_log2, biases, warp * 16, lane, kMost))
        return given_back(false);
      if (hopes) multiply_again(work, smem.q[buffer], key, key + kKeys / 2);
      each_bias<kType, kKeys / 2>(biases, warp * 16, lane, [&](int i, float bias) {
        acc_s[i] = fmaf(acc_s[i], args.scale, bias);
      });
      mask();
      // once it went wrong the next will be relative to the largest
      const bool moved = rows.update_lazily(acc_s, to_log2, {0, 0}, hopes ? 0 : lag);
      // beside what hides keys all others are too large
      constexpr float kHidden = -1024;
      calm = !hopes && !moved && rows.above(kHidden);
      return given_back(moved);
    } else if constexpr (kForm == Form::kSigmoid) {
      mask();
      slots.make_sigmoids(acc_s, args.scale_log2, rows);
      return false;
    } else if constexpr (kForm == Form::kReweighted) {
      mask();
      return slots.reweigh(acc_s, rows, shares);
    } else {
      if constexpr (kSlots) {
        slots.map(acc_s, ahead, bounds, column, work.sk);
      } else if (kMapped) {
        map(acc_s, bounds, column);
      }
      if (masked) mask_scores(acc_s, bounds, key, args.window, lane);
      return kSlots ? slots.weigh(acc_s, rows) : rows.update(acc_s, to_log2, lag, room);
    }
  };
  // What row `row` of a sequence sees under the mask
  auto mask_row = [&](const ForwardWork& work, int row) {
    const UnitRows all{work.batch, work.sequence, work.q_begin, work.head,
                       work.sq,    work.sk,       args.causal,  args.cu_seqlens_q != nullptr};
    return all.row(args.lists.mask, min(row, work.sq - 1));
  };
  // Which keys of a pair of units this thread's two rows see, as mask_scores takes them: of those
  // that the mask cuts. The four lanes that have these rows look at one of the four words each.
  auto look_at_mask = [&](const ForwardWork& work, const UnitPair& pair, uint32_t seen,
                          uint64_t(&words)[2][2]) {
    const auto cut = [&](int i) { return (seen >> 2 * i & 3) == 1; };
    const int i = lane % 2, row = work.row + own_row + lane / 4 + lane % 4 / 2 * 8;
    uint64_t its = 0;
    if (cut(i))
      its =
          args.lists.mask.seen(mask_row(work, row), (i ? pair.unit[1] : pair.unit[0]) * kUnitKeys);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const uint64_t word = __shfl_sync(~0u, its, lane / 4 * 4 + x);
      if (cut(x % 2)) words[x / 2][x % 2] = word >> lane % 4 * 2;
    }
  };
  // and of those that end with the rows
  auto look_at_ends = [&](const UnitPair& pair, uint32_t seen, uint64_t(&words)[2][2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t its = seen >> 2 * i & 3;
        const int beyond = its == 0 ? 0 : bounds.until[r] - pair.unit[i] * kUnitKeys;
        if (its != 1) words[r][i] = bit_range(0, beyond) >> lane % 4 * 2;
      }
  };
  // accumulators of 16 keys, packed in order, are an operand A
  // named barrier 1 + w stands for the turn of computing warpgroup w; from d = 192 on the products
  // are long enough to overlap by themselves
  constexpr bool kTurns = kD <= 128 && kLayout != Layout::kApart;
  auto await_turn = [&] {
    if (kTurns) named_barrier_sync(1 + own, 256);
  };
  auto pass_turn = [&] {
    if (kTurns) named_barrier_arrive(1 + (own + 1) % kWarpgroups, 256);
  };
  // values behind the end of a sequence belong to somebody else and may be anything: zero weights
  // don't silence what is not a number
  auto clear_beyond = [&](uint32_t stage, int rows) {
    constexpr int kPieces = whole_panels(kDv) / 8;
    for (int i = threadIdx.x - 128; i < (kKeys - rows) * kPieces; i += 128 * kWarpgroups)
      store_zero(smem.v[stage].address(rows + i / kPieces, i % kPieces * 8));
    fence_async_smem();
    named_barrier_sync(4, 128 * kWarpgroups);
  };

  // Row `row` of a sequence again, from the keys alone that it sees
  auto write_seen = [&](const ForwardWork& work, int row, float lse_log2, auto& staged) {
    const int at = row + work.sk - work.sq;
    const auto base = [&](const uint16_t* x, const Strides& strides, int head, int64_t begin) {
      return x + work.batch * strides.batch + head * strides.head + begin * strides.row;
    };
    const auto rows_of = [&](const uint16_t* x, const Strides& strides) {
      const int kv_head = work.head / args.group;
      if constexpr (kPaged) {
        return ForwardPages{args, work.sequence, x + kv_head * strides.head, strides};
      } else {
        return KeyRows<uint16_t>{base(x, strides, kv_head, work.k_begin), strides.row};
      }
    };
    SlotRow its{};
    if (kRows || kForm == Form::kBiased) its = slot_row(args, work, row, slots);
    float values[kDv / 32] = {};
    attend_seen<kType, kScoreType>(
        values, base(args.q, args.q_strides, work.head, work.q_begin + row),
        rows_of(args.k, args.k_strides), rows_of(args.v, args.v_strides), args.d, args.dv,
        args.window ? max(at - args.window + 1, 0) : 0,
        args.causal ? min(work.sk, at + 1) : work.sk,
        [&](int key) { return !kListed || (args.lists.mask.seen(mask_row(work, row), key) & 1); },
        [&](float product, int key) {
          return kRows || kForm == Form::kBiased     ? slots.exponent_of(its, product, key, at)
                 : kMapped || kForm == Form::kSloped ? map(product, key - at)
                                                     : product * args.scale_log2;
        },
        kRows && !args.slots.normalise ? 0 : lse_log2, lane);
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kDv / 32; ++c)
      store_16_bits(staged.address(row - work.row, 32 * c + lane / 8 * 8) + lane % 8 * 2,
                    static_cast<uint16_t>(pack<kType>(values[c], 0)));
  };

  // once out has been read from there
  auto release_q = [&](uint32_t visit) {
    if (thread != 0) return;
    wait_copies_read<0>();
    smem.q_empty[Turn<kBuffers>(visit).stage].arrive();
  };

  if (kTurns && own == 0) named_barrier_arrive(1, 256);
  uint32_t visit = 0, used = 0;  // tiles of q, and of k and v
  uint32_t next = 0;             // what this warpgroup sees of the next of a list
  auto look_at = [&](uint32_t n) {
    const Turn<smem.kPairs> turn(n);
    smem.pair_full[turn.stage].wait(turn.parity);
    next = __shfl_sync(~0u, smem.pairs[turn.stage].seen[own], 0);
  };
  if constexpr (kListed) look_at(0);
  for (;; ++visit) {
    const Turn<kBuffers> q(visit);
    smem.q_full[q.stage].wait(q.parity);
    // stays there until out was stored: where registers are scarce it is read when it is needed
    std::conditional_t<kRows || kListed, const ForwardWork&, const ForwardWork> work =
        smem.work[q.stage];
    if (work.row < 0) break;
    __syncwarp();
    release(smem.q_empty[q.stage]);
    if constexpr (kListed) hold_q(q.stage);
    const int row = work.row + own_row + lane / 4, diagonal = work.sk - work.sq;
    const int key_end = __shfl_sync(~0u, work.key_end, 0);
    const int key_tiles = __shfl_sync(~0u, work.key_tiles, 0);
    auto key_of = [&](int j) { return (key_end - 1 - j) * kKeys; };
    auto keys_at = [&](int j) { return KeyTurn(used + j); };
    auto values_at = [&](int j) { return ValueTurn(used + j); };
    if (!kListed) bounds = bounds_of(args, work, row);
    if constexpr (kRows) {
      open_rows<kForm>(args, work, row, slots, rows);
      // weights of f16 have as many digits as what two terms of softplus lack
      if constexpr (kForm == Form::kReweighted)
        slots.open_shares<kType == DType::kBF16>(rows, shares);
    } else {
      rows.clear();
      map.slope_log2 = (kMapped || kForm == Form::kSloped) && args.slopes
                           ? args.slopes[work.head * args.slopes_stride] * kLog2e
                           : 0;
      slope = map.slope_log2 / args.scale_log2;
    }
#pragma unroll
    for (int i = 0; i < kDv / 2; ++i) acc_o[i] = 0;

    auto shrink_values = [&] {
#pragma unroll
      for (int i = 0; i < kDv / 2; ++i) acc_o[i] *= rows.shrink[i / 2 % 2];
    };
    // Scores of tile j and values of tile `last`, which is one before. `soften` makes weights of
    // the scores and says whether sums of before have to shrink, or what `settle` makes of that
    // once values are multiplied.
    auto step = [&](int j, int last, const auto& soften, const auto& settle) {
      const KeyTurn k = keys_at(j);
      const ValueTurn v = values_at(last);
      fetch(key_of(j), work.sk);
      smem.k_full[k.stage].wait(k.parity);
      await_turn();
      issue_scores(k.stage, q.stage);
      smem.v_full[v.stage].wait(v.parity);
      issue_values(v.stage);
      pass_turn();
      wgmma_wait<1>(acc_s);
      release(smem.k_empty[k.stage]);
      const bool softened = soften();
      wgmma_wait<0>(acc_o);
      release(smem.v_empty[v.stage]);
      const bool moved = settle(softened);
      pack_weights<kType>(frag_p, acc_s);
      if (moved) shrink_values();
    };
    const auto settled = [](bool moved) { return moved; };
    // Whether maxima of a tile of q rose by more than there is room for. All warps of the warpgroup
    // hear of it at the same key tile, kHeard behind the first of which one said so: by then keys
    // are there that took the place of what all gave back behind that one.
    constexpr int kHeard = Shape::kKeyStages + 2;
    auto wary = [&](int j) {
      if constexpr (!kHopes) return false;
      const int first = static_cast<int>(used), since = smem.wary[own][lane % 4];
      return __any_sync(~0u, since >= first && since <= first + j) != 0;
    };
    // A step that whole tiles take, of halves from `keys_of(j)` on, until they are wary. Where
    // kHopes nobody looks for a maximum: where one was beyond what weights may be products are made
    // again, and weights are relative to the largest.
    auto step_whole = [&](int j, int last, const auto& meanwhile, const auto& keys_of) {
      if constexpr (kHopes) {
        float sums[2];
        step(
            j, last,
            [&] {
              meanwhile();
              float top[2] = {rows.row_max[0], rows.row_max[1]};
              if constexpr (kForm == Form::kSloped) {
                for (int r = 0; r < 2; ++r) top[r] -= base_of(keys_of(j).lower + lane % 4 * 2, r);
                if constexpr (kEvenRows)
                  return !rows.weigh_sloped(acc_s, to_log2, map.slope_log2, top[0], kMost, sums) ||
                         !rows.even(8 * slope);
                add_slopes(acc_s, slope);
              }
              return !rows.weigh(acc_s, to_log2, top, kMost, sums);
            },
            [&](bool lost) {
              if (!__any_sync(~0u, lost)) {
                rows.join(sums);
                return false;
              }
              // those that saw no key before say nothing of others, unless they never will
              const float all = rows.row_sum[0] + rows.row_sum[1];
              const bool rose =
                  lost && (fminf(rows.row_max[0], rows.row_max[1]) > -INFINITY || all != all);
              const int first = static_cast<int>(used), since = j + kHeard;
              int& its = smem.wary[own][warp];
              if (__any_sync(~0u, rose) && lane == 0 && since < key_tiles && its < first)
                its = first + since;
              const auto [lower, upper] = keys_of(j);
              multiply_again(work, smem.q[q.stage], lower, upper);
              return softmax(work, q.stage, lower, false, 0);
            });
      } else {
        step(
            j, last,
            [&] {
              meanwhile();
              return softmax(work, q.stage, keys_of(j).lower, false, kOwnLag);
            },
            settled);
      }
    };

    // weights of a half, the upper one or not, and zeros for the other
    auto pack_half = [&](const HalfScores& weights, bool upper) {
      constexpr int kParts = kHalfKeys / 16;
      uint32_t half[kParts][4];
      pack_weights<kType>(half, weights);
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i)
#pragma unroll
        for (int x = 0; x < 4; ++x) frag_p[i][x] = i / kParts == upper ? half[i % kParts][x] : 0;
    };
    auto first_half = [&](int j) {
      HalfScores scores;
      const KeyTurn k = keys_at(j);
      smem.k_full[k.stage].wait(k.parity);
      issue_half(scores, k.stage, q.stage, 0);
      wgmma_wait<0>(scores);
      release(smem.k_empty[k.stage]);
      mask_scores(scores, bounds, key_of(j), args.window, lane);
      rows.update(scores, to_log2, kOwnLag, room);
      pack_half(scores, false);
    };
    auto step_half = [&](int j) {
      HalfScores scores;
      const KeyTurn k = keys_at(j);
      const ValueTurn v = values_at(j - 1);
      smem.k_full[k.stage].wait(k.parity);
      await_turn();
      issue_half(scores, k.stage, q.stage, kHalfKeys);
      smem.v_full[v.stage].wait(v.parity);
      issue_values(v.stage);
      pass_turn();
      wgmma_wait<1>(scores);
      release(smem.k_empty[k.stage]);
      mask_scores(scores, bounds, key_of(j) + kHalfKeys, args.window, lane);
      const bool moved = rows.update(scores, to_log2, kOwnLag, room);
      wgmma_wait<0>(acc_o);
      release(smem.v_empty[v.stage]);
      pack_half(scores, true);
      if (moved) shrink_values();
    };
    // `meanwhile` runs beside the product
    auto first = [&](int j, const auto& soften, const auto& meanwhile) {
      const KeyTurn k = keys_at(j);
      fetch(key_of(j), work.sk);
      smem.k_full[k.stage].wait(k.parity);
      issue_scores(k.stage, q.stage);
      meanwhile();
      wgmma_wait<0>(acc_s);
      release(smem.k_empty[k.stage]);
      const bool moved = soften();
      pack_weights<kType>(frag_p, acc_s);
      return moved;
    };
    auto issue_last = [&](int j) {
      const ValueTurn v = values_at(j);
      smem.v_full[v.stage].wait(v.parity);
      issue_values(v.stage);
    };
    auto await_last = [&](int j) {
      wgmma_wait<0>(acc_o);
      release(smem.v_empty[values_at(j).stage]);
    };
    // Gives a tile back unread, once it is there: before, what was in its stage may not have been
    // given back by all
    auto pass_by = [&](int j) {
      const KeyTurn k = keys_at(j);
      const ValueTurn v = values_at(j);
      smem.k_full[k.stage].wait(k.parity);
      __syncwarp();
      release(smem.k_empty[k.stage]);
      smem.v_full[v.stage].wait(v.parity);
      __syncwarp();
      release(smem.v_empty[v.stage]);
    };
    // of a step that is not taken
    auto skip_turn = [&](int j) {
      if (j > 0) await_turn();
      if (j > 0) pass_turn();
    };
    auto clear_tail = [&](int j, int key) {
      if (!args.cu_seqlens_q && !args.cache_seqlens) return;
      const int left = max(work.sk - key, 0);
      const ValueTurn v = values_at(j);
      smem.v_full[v.stage].wait(v.parity);
      if (left < kKeys) clear_beyond(v.stage, left);
    };

    if constexpr (kListed) {
      int last = -1;  // the tile whose values are yet to be multiplied, or none
#pragma unroll 1
      for (int j = 0; j < key_tiles; ++j) {
        // what this warpgroup sees whole takes the same steps as dense, without a branch in them
        if (last >= 0) {
#pragma unroll 1
          for (; next == (UnitPair::kAny | UnitPair::kListed) && !wary(j); last = j++)
            step_whole(
                j, last, [&] { look_at(used + j + 1); },
                [&](int j) {
                  const UnitPair& pair = smem.pairs[Turn<smem.kPairs>(used + j).stage];
                  return Halves{pair.unit[0] * kUnitKeys, pair.unit[1] * kUnitKeys};
                });
          if (j == key_tiles) break;
        }
        const uint32_t its = next;
        // what waits for values of this tile needs the stage
        if (last >= 0 && j - last == Shape::kValueStages &&
            (!(its & UnitPair::kAny) || (its & UnitPair::kMasked))) {
          issue_last(last);
          await_last(last);
          last = -1;
        }
        uint64_t words[2][2];
        const UnitPair& pair = smem.pairs[Turn<smem.kPairs>(used + j).stage];
        // before there are scores, whose registers it takes
        if (its & UnitPair::kCut) look_at_mask(work, pair, its, words);
        // a sequence may end in either
        if (its & UnitPair::kMasked)
          clear_tail(j, (pair.unit[1] < 0 ? pair.unit[0] : pair.unit[1] - 1) * kUnitKeys);
        const auto look = [&] {
          if (!(its & UnitPair::kMasked)) return;
          bounds = bounds_of(args, work, row);
          look_at_ends(pair, its, words);
        };
        const auto look_ahead = [&] {
          // the next tile of q may need the buffer of the one before
          if (j == 0 && visit > 0) release_q(visit - 1);
          look_at(used + j + 1);
        };
        const auto soften = [&] {
          look_ahead();
          if (its & UnitPair::kMasked) mask_scores(acc_s, words);
          return rows.update(acc_s, to_log2, kOwnLag, room);
        };
        if (its & UnitPair::kAny) {
          if (last >= 0) {
            look();
            step(j, last, soften, settled);
          } else {
            skip_turn(j);
            if (first(j, soften, look)) shrink_values();
          }
          last = j;
        } else {
          skip_turn(j);
          look_ahead();
          pass_by(j);
        }
      }
      // in one branch: ptxas serialises matrix instructions that are on their way at its end
      if (last >= 0) {
        issue_last(last);
        await_last(last);
      }
    } else {
      const auto soften = [&](int j, bool masked) {
        return [&, j, masked] { return softmax(work, q.stage, key_of(j), masked, kOwnLag); };
      };
      // where the rows of this warpgroup stand, if it has any, and where the keys end that they see
      const int own_first = work.row + own * 64 + diagonal;
      const int own_end = work.row + own * 64 >= work.sq ? INT32_MIN
                          : args.causal                  ? own_first + 64
                                                         : INT32_MAX;
      int j = 0;
      // tiles behind those, but for one that is visited all the same. Biases are loaded for each.
      if (kForm != Form::kBiased && key_tiles > 1 && key_of(0) >= own_end) {
        clear_tail(0, key_of(0));
        do {
          skip_turn(j);
          pass_by(j);
        } while (++j < key_tiles - 1 && key_of(j) >= own_end);
        skip_turn(j);
      }
      const bool skipped = j > 0;
      if (kHalves && own_end <= key_of(j) + kHalfKeys)
        first_half(j);
      else
        first(j, soften(j, true), [] {});
      if (kBuffers > 1 && visit > 0) release_q(visit - 1);
      if (!skipped) clear_tail(0, key_of(0));
      ++j;
      // Key tiles that the first row sees whole, and where the last row's window begins. Who
      // doesn't look for maxima needs one of a tile before, and in f16, which has little room above
      // it, not the first keys, which often weigh most.
      constexpr bool kFirstApart = kHopes && kType == DType::kF16;
      const int whole_end = (args.causal ? max(own_first + (kHopes ? 0 : 1), 0) : work.sk) / kKeys;
      const int whole_begin =
          args.window ? max(own_first + 64 - args.window + kKeys - 1, 0) / kKeys : kFirstApart;
      if constexpr (kRows || kForm == Form::kBiased) {
        // one copy of all that scores may pass through
#pragma unroll 1
        for (; j < key_tiles; ++j) {
          const int tile = key_end - 1 - j;
          step(j, j - 1, soften(j, tile >= whole_end || tile < whole_begin), settled);
        }
      } else {
#pragma unroll 1
        for (; j < key_tiles && key_end - 1 - j >= whole_end; ++j)
          step(j, j - 1, soften(j, true), settled);
#pragma unroll 1
        for (; j < key_tiles && key_end - 1 - j >= whole_begin && !wary(j); ++j)
          step_whole(
              j, j - 1, [] {},
              [&](int j) {
                return Halves{key_of(j), key_of(j) + kKeys / 2};
              });
        const int halves = kHalves && args.window &&
                           own_first - args.window + 1 >= key_of(key_tiles - 1) + kHalfKeys;
#pragma unroll 1
        for (; j < key_tiles - halves; ++j) step(j, j - 1, soften(j, true), settled);
        if constexpr (kHalves)
          if (j < key_tiles) step_half(j);
      }
      issue_last(key_tiles - 1);
    }

    // sums are complete, while their last values are multiplied
    float lse_log2[2], factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top_log2 = rows.row_max[r] * to_log2, sum = rows.total(r);
      const RowEnd end(top_log2, kRows && args.slots.hides(top_log2) ? 0 * sum : sum,
                       args.sink ? args.sink + work.head * args.sink_stride : nullptr);
      factor[r] = kRows && !args.slots.normalise && end.factor != 0
                      ? sm90::exp2_approx(rows.row_max[r])
                      : end.factor;
      lse_log2[r] = end.lse_log2;
    }
    if constexpr (!kListed) await_last(key_tiles - 1);
    used += key_tiles;

    bool poisoned[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A row without keys gives zero, whatever its masked values were, which poison it below with
      // lists
      if (!kListed && factor[r] == 0) {
#pragma unroll
        for (int i = 2 * r; i < kDv / 2; i += 4) acc_o[i] = acc_o[i + 1] = 0;
      }
      float total[2] = {};
#pragma unroll
      for (int i = 2 * r; i < kDv / 2; i += 4)
#pragma unroll
        for (int x = 0; x < 2; ++x) total[x] += acc_o[i + x] *= factor[r];
      total[0] += total[1];
      poisoned[r] = (kListed || args.causal) && total[0] != total[0] && row + 8 * r < work.sq;
    }
    // a warp's rows of q were read by its own products alone, so out may replace them
    auto& staged = smem.q[q.stage];
#pragma unroll
    for (int i = 0; i < kDv / 2; i += 8)
      stmatrix_x4(staged.address(own_row + lane % 16, i * 2 + lane / 16 * 8),
                  pack<kType>(acc_o[i], acc_o[i + 1]), pack<kType>(acc_o[i + 2], acc_o[i + 3]),
                  pack<kType>(acc_o[i + 4], acc_o[i + 5]), pack<kType>(acc_o[i + 6], acc_o[i + 7]));
    if (__any_sync(~0u, poisoned[0] || poisoned[1])) {
      for (int i = 0; i < 16; ++i) {
        const float its_lse = __shfl_sync(~0u, i < 8 ? lse_log2[0] : lse_log2[1], i % 8 * 4);
        if (__ballot_sync(~0u, i < 8 ? poisoned[0] : poisoned[1]) >> i % 8 * 4 & 15)
          write_seen(work, work.row + own_row + i, its_lse, staged);
      }
    }
    // stored behind the fence below, which would wait for it
    float* const lse = args.lse + work.q_begin + row +
                       (static_cast<int64_t>(work.batch) * args.hq + work.head) * args.sq;
    const int rows_left = work.sq - row;
    const int first_row = work.row + own * 64;
    // the rows behind the last one may be those of another sequence
    const bool ends = args.cu_seqlens_q && first_row + 64 > work.sq;
    // every writer fences, before a copy reads this and before the next q overwrites it
    fence_async_smem();
    named_barrier_sync(8 + own, 128);
    if (ends) {
      uint16_t* out = args.out + work.head * args.out_strides.head;
      for (int i = thread; i < 64 * kDv / 8; i += 128) {
        const int r = i / (kDv / 8), column = i % (kDv / 8) * 8;
        if (first_row + r < work.sq && column < args.dv)
          copy_16_bytes(out + (work.q_begin + first_row + r) * args.out_strides.row + column,
                        staged.address(own * 64 + r, column));
      }
      named_barrier_sync(8 + own, 128);
    } else if (thread == 0) {
      for (int column = 0; column < kDv; column += 64)
        copy_to_gmem(gmem_out, staged.panel(column) + own * 64 * 128, column,
                     work.q_begin + first_row, work.head, work.batch);
      commit_copies();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (lane % 4 == 0 && 8 * r < rows_left) lse[8 * r] = lse_log2[r] * kLn2;
    if (kBuffers == 1) release_q(visit);
  }
  // shared memory must outlive the copies that read it
  if (thread == 0) wait_copies_read<0>();
}

inline ForwardArgs forward_args(const ForwardCall& call, int queries) {
  const int64_t row_tiles = forward_row_tiles(call, queries);
  const int64_t pairs = call.b * call.hq, tiles = row_tiles * pairs;
  // so many pairs have such a number of keys and their values in L2 together
  const auto room = [&](int64_t keys) {
    const auto bytes = static_cast<int64_t>(size_of(call.dtype)) * (call.d + call.dv) * keys;
    return call.section_bytes / std::max<int64_t>(bytes * call.hk / call.hq, 1);
  };
  const auto fit = [&](int64_t keys) { return std::clamp<int64_t>(room(keys), 1, pairs); };
  // tiles that run at the same time under a window see few keys more than it has
  constexpr int64_t kTogether = 1024;
  const bool all =
      call.window && !call.masked && fit(std::min(call.window, call.sk) + kTogether) == pairs;
  ForwardArgs args{};
  args.b = static_cast<int>(call.b);
  args.sq = static_cast<int>(call.sq);
  args.sk = static_cast<int>(call.sk);
  args.hq = static_cast<int>(call.hq);
  args.group = static_cast<int>(call.hq / call.hk);
  args.tiles = static_cast<int>(tiles);
  args.row_tiles = static_cast<int>(row_tiles);
  args.section = static_cast<int>(all ? pairs : fit(call.sk));
  // as many as have keys and values that fit there of all pairs
  if (call.masked && call.causal && call.sk <= call.sq)
    args.short_tiles = static_cast<int>(row_tiles * args.section / pairs);
  args.sweeps = call.masked && !call.causal && room(call.sk) == 0;
  args.scale_log2 = call.scale * 1.44269504f;
  args.causal = call.causal || call.window;
  args.window = static_cast<int>(std::min<int64_t>(call.window, INT32_MAX / 2));
  args.scale = call.scale;
  args.soft_cap = call.soft_cap;
  args.slopes = call.slopes;
  args.sink = call.sink;
  args.slopes_stride = call.slopes_stride;
  args.sink_stride = call.sink_stride;
  args.cu_seqlens_q = call.cu_seqlens_q;
  args.cu_seqlens_k = call.cu_seqlens_k;
  args.cache_seqlens = call.cache_seqlens;
  args.cu_q_stride = call.cu_q_stride;
  args.cu_k_stride = call.cu_k_stride;
  args.cache_stride = call.cache_stride;
  args.sequences = static_cast<int>(call.sequences);
  args.block_table = call.block_table;
  args.table_row = call.table_row;
  args.table_column = call.table_column;
  args.pages = static_cast<int>(call.pages);
  args.page_log2 = std::countr_zero(static_cast<uint64_t>(call.page_size));
  args.d = static_cast<int>(call.d);
  args.dv = static_cast<int>(call.dv);
  args.q = static_cast<const uint16_t*>(call.q);
  args.k = static_cast<const uint16_t*>(call.k);
  args.v = static_cast<const uint16_t*>(call.v);
  args.q_strides = call.q_strides;
  args.k_strides = call.k_strides;
  args.v_strides = call.v_strides;
  args.out = static_cast<uint16_t*>(call.out);
  args.out_strides = call.out_strides;
  args.lse = call.lse;
  args.tickets = call.tickets;
  args.lists = call.lists;
  args.slots = call.slots;
  return args;
}

template <Form kForm> FormMaps<kForm> form_maps(const ForwardCall& call) {
  if constexpr (kForm == Form::kBiased) {
    const Slots& slots = call.slots;
    const bool batches = slots.bias_strides[0] != 0, heads = slots.bias_strides[1] != 0;
    return {make_tensor_map(call.dtype, slots.bias,
                            {call.sk, call.sq, heads ? call.hq : 1, batches ? call.b : 1,
                             slots.bias_strides[2], slots.bias_strides[1], slots.bias_strides[0]},
                            64),
            batches, heads};
  } else {
    return {};
  }
}

template <DType kType, int kD, int kDv, Form kForm, Layout kLayout>
void launch_forward(const ForwardCall& call, cudaStream_t stream) {
  using Shape = ForwardTile<kD, kDv, kForm, kLayout>;
  ForwardArgs args = forward_args(call, Shape::kQueries);
  args.box = Shape::kPaged ? static_cast<int>(std::min<int64_t>(call.page_size, Shape::kKeys))
                           : Shape::kKeysOfBox;
  const auto map = [&](const void* data, int64_t d, int64_t s, int64_t h, const Strides& strides,
                       int rows) {
    return make_tensor_map(kType, data, {d, s, h, call.b, strides.row, strides.head, strides.batch},
                           rows);
  };
  const auto keys = [&](const void* data, int64_t d, const Strides& strides) {
    if (!Shape::kPaged) return map(data, d, call.sk, call.hk, strides, args.box);
    return make_tensor_map(
        kType, data,
        {d, call.page_size, call.hk, call.pages, strides.row, strides.head, strides.batch},
        args.box);
  };
  Launch how{std::min(args.tiles, call.processors), Shape::kThreads,
             sm90::shared_memory_bytes<ForwardSmem<kD, kDv, kForm, kLayout>>(), stream};
  how.overlaps = Shape::kListed;
  how.graphs = Shape::kListed ? nullptr : call.graphs;
  launch<forward_sm90_kernel<kType, kD, kDv, kForm, kLayout>>(
      how, map(call.q, call.d, call.sq, call.hq, call.q_strides, Shape::kQueries),
      keys(call.k, call.d, call.k_strides), keys(call.v, call.dv, call.v_strides),
      map(call.out, call.dv, call.sq, call.hq, call.out_strides, 64), args, form_maps<kForm>(call));
}

}  // namespace

template <DType kType, int kD, int kDv, Form kForm, Layout kLayout>
void launch_forward_sm90(const ForwardCall& call, cudaStream_t stream) {
  launch_forward<kType, kD, kDv, kForm, kLayout>(call, stream);
}

}  // namespace heddle
