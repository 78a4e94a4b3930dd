#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "common/tile.cuh"
#include "lightning/bad_slope.cuh"
#include "lightning/forward_sm90.h"

// Lightning attention in f16 or bf16, by chunks of m = 64 tokens, fewer at the end:
//
//   P = scale lambda^(i - j) Q[i,:] . K[j,:]             where j <= i
//   O = P V + scale lambda^(i + 1) Q S                   S before the chunk
//   S = lambda^m S + (lambda^(m - 1 - j) K[j,:])^T V
//
// A CTA owns one head of the output, kE columns of v and a segment of a sequence. A warp of
// warpgroup 0 loads q, k and v of a chunk at a time into a ring, and another one copies O where two
// warpgroups make it. Warpgroup 1 makes P and O; P of the next chunk is multiplied behind P V of
// this one. Where registers allow it a second one takes turns with it. The others hold S or S^T in
// f32 registers, each a part, and leave its image in 16 bits in shared memory for Q S. Segments but
// the first begin with the summaries of those before, which a kernel that reads k and v alone has
// made. Sizes that are smaller than the tile's are filled with zeros by the copies.
namespace heddle {
namespace {

constexpr int kChunk = 64;

template <int kD, int kE> struct ScanShape {
  // one warpgroup has registers for 64 by 192 numbers of S
  static constexpr int kStateGroups = kD * kE > 192 * 64 ? 2 : 1;
  // of S or S^T that each has, and 64 rows
  static constexpr int kColumns = kD * kE / 64 / kStateGroups;
  static constexpr int kOutGroups = kD == 128 && kE == 64 ? 2 : 1;
  static constexpr int kConsumers = 128 * (1 + kStateGroups);  // of one chunk
  static constexpr int kThreads = 128 * (1 + kOutGroups + kStateGroups);
  // the 512 registers per lane that a CTA has
  static constexpr int kOutRegisters = kOutGroups == 2     ? 160
                                       : kStateGroups == 1 ? 240
                                       : kE == 128         ? 184
                                                           : 144;
  static constexpr int kStateRegisters = kOutGroups == 2     ? 168
                                         : kStateGroups == 1 ? 240
                                         : kE == 128         ? 152
                                                             : 168;
  // as many as fit beside the image and two tiles of out
  static constexpr int kStages = kD == 256 ? 2 : kD + kE <= 192 ? 4 : 3;
};

// Whether S is carried transposed: with more rows than columns fewer values than keys decay, and a
// product has as many columns as S has rows
template <int kD, int kE> constexpr bool kTurned = kD > kE;

template <int kD, int kE> struct ScanSmem {
  using Shape = ScanShape<kD, kE>;
  sm90::Tile<kChunk, kD> q[Shape::kStages], k[Shape::kStages];
  sm90::Tile<kChunk, kE> v[Shape::kStages];
  std::conditional_t<kTurned<kD, kE>, sm90::Tile<kE, kD>, sm90::Tile<kD, kE>> image;
  sm90::Tile<kChunk, kE> out[2];
  sm90::Barrier full[Shape::kStages], empty[Shape::kStages];
};

template <int kD, int kE> struct SummarySmem {
  static constexpr int kGroups = (kTurned<kD, kE> ? kE : kD) / 64;
  static constexpr int kStages = kD == 256 ? 5 : kD + kE <= 192 ? 8 : 6;
  sm90::Tile<kChunk, kD> k[kStages];
  sm90::Tile<kChunk, kE> v[kStages];
  sm90::Barrier full[kStages], empty[kStages];
};

struct ScanArgs {
  int tokens, heads, d, e;
  int share_q, share_k, share_v, share_state;  // heads of out that read the same
  int slices, segment, segments, parts, slots, sequences;
  float scale;
  // the first kernel of its operator, which begins before that of the operator before has ended
  bool first;
  bool fits;  // L2 holds most of q, k and v
  const float* slopes;
  int64_t slopes_stride;
  const int32_t* cu_seqlens;
  int64_t cu_stride;
  const float* initial_state;
  int64_t initial_strides[4];
  float* state;
  float* summaries;  // [slots, heads, slices, parts, kD, kE], a thread's numbers together
  int* made;         // 1 for each of these that is there
  uint16_t* out;
  int* fault;
};

// The segment of a sequence that a CTA works on
struct ScanPlace {
  int sequence, batch, begin, length;  // tokens of the segment
  int segment;
  int sequence_length;
  bool last;     // of its sequence
  int slot;      // -1: there is none
  int distance;  // in slots from one segment of the sequence to the next
};

__device__ __forceinline__ ScanPlace place_of(const ScanArgs& args, int slot) {
  ScanPlace place{0, 0, 0, 0, 0, 0, true, -1, 1};
  int begin = 0, end = args.tokens;
  if (args.cu_seqlens) {
    if (args.first) sm90::await_previous();
    // nothing is out of bounds, whatever the offsets say
    const auto offset = [&](int i) { return args.cu_seqlens[i * args.cu_stride]; };
    bool good = offset(0) == 0 && offset(args.sequences) == args.tokens;
    for (int before = 0, sequence = 0; sequence < args.sequences; ++sequence) {
      good = good && offset(sequence) <= offset(sequence + 1);
      begin = min(max(offset(sequence), 0), args.tokens);
      end = max(min(offset(sequence + 1), args.tokens), begin);
      const int here = max((end - begin + args.segment - 1) / args.segment, 1);
      if (place.slot < 0 && slot < before + here) {
        place.sequence = sequence;
        place.segment = slot - before;
        place.slot = slot;
        break;
      }
      before += here;
    }
    // the last slot has seen all of them
    if (!good && threadIdx.x == 0) *args.fault = 1;
    if (place.slot < 0) return place;
  } else {
    place.sequence = place.batch = slot % args.sequences;
    place.segment = slot / args.sequences;
    place.slot = slot;
    place.distance = args.sequences;
  }
  place.begin = begin + place.segment * args.segment;
  place.length = min(args.segment, end - place.begin);
  place.sequence_length = end - begin;
  place.last = place.begin + place.length == end;
  return place;
}

// Before tensors are read or written. What runs behind this kernel reads them without waiting if it
// is of the same operator, so it begins only after they are there.
__device__ __forceinline__ void begin(const ScanArgs& args) {
  if (args.first) sm90::await_previous();
  sm90::let_next_begin();
}

// Of so many chunks before a place in its sequence, how many that place can still see: what is
// further away has decayed below 2^-48 and is no digit of a number in f32, even if it was 2^24
// times as large
__device__ __forceinline__ int in_sight(float slope_log2, int chunks) {
  const float reach = 48 / (kChunk * fabsf(slope_log2));  // infinite without decay, -0 included
  return reach < static_cast<float>(chunks) ? static_cast<int>(reach) + 1 : chunks;
}

// 64 rows of A^T B, which is carried from chunk to chunk, and A of a chunk as an operand. Of S, A
// are keys and B values, of S^T the other way round.
template <DType kType, int kColumns, bool kPrecise> struct CarriedState {
  // element i is in row i / 2 % 2 * 8 + lane / 4 of the warp's 16 and in column
  // 8 * (i / 4) + 2 * (lane % 4) + i % 2
  float acc[kColumns / 2];
  // element i of step is of tokens 16 * step + 2 * (lane % 4) + i / 2 * 8 + {0, 1}
  uint32_t frag_a[4][4];
  uint32_t rest_a[kPrecise ? 4 : 1][4];  // what rounding takes away from frag_a

  // From where rows_address says
  __device__ __forceinline__ void load(uint32_t a) {
#pragma unroll
    for (int step = 0; step < 4; ++step)
      sm90::ldmatrix_x4_transposed(a + step * 16 * 128, frag_a[step]);
  }

  // factors(step, i) are those of tokens 16 * step + 2 * (lane % 4) + 8 * i + {0, 1}
  template <class Factors> __device__ __forceinline__ void decay(const Factors& factors) {
    using namespace sm90;
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 factor = factors(step, half);
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          uint32_t& pair = frag_a[step][i];
          const float low = low_of(pair) * factor.x, high = high_of(pair) * factor.y;
          pair = pack<kType>(low, high);
          if (kPrecise)
            rest_a[kPrecise ? step : 0][i] = pack<kType>(low - low_of(pair), high - high_of(pair));
        }
      }
  }

  // Adds A^T B as a group of products, with B from column `column` on
  template <int kWidth>
  __device__ __forceinline__ void issue_update(const sm90::Tile<kChunk, kWidth>& b,
                                               int column = 0) {
    using namespace sm90;
    wgmma_fence(acc);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      wgmma<kType, Major::kMN>(acc, frag_a[step], b.mn_major(16 * step, column), true);
      if (kPrecise)
        wgmma<kType, Major::kMN>(acc, rest_a[kPrecise ? step : 0], b.mn_major(16 * step, column),
                                 true);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) acc[i] *= factor;
    // not between products that are issued next, which would have to end first
    sm90::pin(acc);
  }

  // body(number, its row and column); `row0` is this warp's first
  template <class Body> __device__ __forceinline__ void each(int row0, int lane, const Body& body) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i)
      body(acc[i], row0 + lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2);
  }

  // Summaries lie as threads have them, in pieces of four numbers; `summary` is at this thread's
  __device__ __forceinline__ void store_summary(float* summary) const {
#pragma unroll
    for (int i = 0; i < kColumns / 2; i += 4)
      *reinterpret_cast<float4*>(summary + i * 128) =
          float4{acc[i], acc[i + 1], acc[i + 2], acc[i + 3]};
  }
  __device__ __forceinline__ void add_summary(const float* summary, float keep) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(summary + i * 128);
      acc[i] = fmaf(acc[i], keep, x.x);
      acc[i + 1] = fmaf(acc[i + 1], keep, x.y);
      acc[i + 2] = fmaf(acc[i + 2], keep, x.z);
      acc[i + 3] = fmaf(acc[i + 3], keep, x.w);
    }
  }

 private:
  static __device__ __forceinline__ float low_of(uint32_t pair) {
    return sm90::unpack<kType>(static_cast<uint16_t>(pair));
  }
  static __device__ __forceinline__ float high_of(uint32_t pair) {
    return sm90::unpack<kType>(static_cast<uint16_t>(pair >> 16));
  }
};

// lambda^distance(token) of the tokens of a chunk, for CarriedState::decay
struct TokenDecay {
  float2 of[4][2];

  template <class Distance>
  __device__ __forceinline__ TokenDecay(float slope_log2, int lane, const Distance& distance) {
    const auto at = [&](int token) {
      return exp2f(-slope_log2 * static_cast<float>(distance(token)));
    };
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 16 * step + lane % 4 * 2 + 8 * i;
        of[step][i] = float2{at(token), at(token + 1)};
      }
  }
};
// Towards the end of a chunk of `tokens`; those beyond it are zero
__device__ __forceinline__ TokenDecay decay_to_end(float slope_log2, int tokens, int lane) {
  return TokenDecay(slope_log2, lane, [&](int token) { return max(tokens - 1 - token, 0); });
}

// 64 rows of a warpgroup's accumulator, times `factor`, as 16-bit elements of a tile from `row0`
// and `column0` on
template <DType kType, int kRows, int kColumns, int kNumbers>
__device__ __forceinline__ void store_rows(const sm90::Tile<kRows, kColumns>& to, int row0,
                                           const float (&acc)[kNumbers], int warp, int lane,
                                           float factor = 1, int column0 = 0) {
  using namespace sm90;
#pragma unroll
  for (int i = 0; i < kNumbers; i += 8) {
    const auto pair = [&](int j) {
      return pack<kType>(acc[i + j] * factor, acc[i + j + 1] * factor);
    };
    stmatrix_x4(to.address(row0 + warp * 16 + lane % 16, column0 + i * 2 + lane / 16 * 8), pair(0),
                pair(2), pair(4), pair(6));
  }
}
// The same of pairs that are rounded already, from the tile's first element on
template <int kRows, int kColumns>
__device__ __forceinline__ void store_pairs(const sm90::Tile<kRows, kColumns>& to,
                                            const uint32_t (&pairs)[kColumns / 4], int warp,
                                            int lane) {
#pragma unroll
  for (int i = 0; i < kColumns / 4; i += 4)
    sm90::stmatrix_x4(to.address(warp * 16 + lane % 16, i * 4 + lane / 16 * 8), pairs[i],
                      pairs[i + 1], pairs[i + 2], pairs[i + 3]);
}

// The other way: 64 rows of a tile as operands of products that reduce its columns
template <int kColumns>
__device__ __forceinline__ void load_rows(const sm90::Tile<kChunk, kColumns>& from, int warp,
                                          int lane, uint32_t (&frag)[kColumns / 16][4]) {
  // an even piece of a row is as far from the first as its number says, with its bits in turn
  const uint32_t first = from.address(warp * 16 + lane % 16, lane / 16 * 8);
#pragma unroll
  for (int i = 0; i < kColumns; i += 16)
    sm90::ldmatrix_x4((first ^ i % 64 * 2) + i / 64 * from.kPanelBytes, frag[i / 16]);
}

// Of an initial state every token is at least one step away. For its gradient R is held times a
// power of two near 1 / lambda, so that what keys are in f16 does not run out of digits; bf16 has
// the exponents, and nobody sees the last digits of R otherwise.
template <DType kType, bool kPrecise> constexpr bool kLifts = kPrecise&& kType == DType::kF16;
template <DType kType, bool kPrecise> __device__ __forceinline__ float lift_of(float slope_log2) {
  return kLifts<kType, kPrecise> ? exp2f(floorf(min(slope_log2, 64.f))) : 1.f;
}

// Zeros from row `first` on, by `threads` threads together
template <int kRows, int kColumns>
__device__ __forceinline__ void clear_rows(const sm90::Tile<kRows, kColumns>& tile, int first,
                                           int thread, int threads) {
  constexpr int kPieces = kColumns / 8;
#pragma unroll 1
  for (int i = thread; i < (kRows - first) * kPieces; i += threads)
    sm90::store_zero(tile.address(first + i / kPieces, i % kPieces * 8));
}

// Address of this lane's row for CarriedState::load: matrices are 8 tokens by 8 of the warp's 16
// columns, which are rows of A^T
template <int kWidth>
__device__ __forceinline__ uint32_t rows_address(const sm90::Tile<kChunk, kWidth>& a, int column,
                                                 int lane) {
  return a.address(lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8);
}

template <DType kType, int kD, int kE, bool kPrecise>
__global__ void __launch_bounds__((ScanShape<kD, kE>::kThreads), 1)
    lightning_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_q,
                          const __grid_constant__ sm90::TensorMap gmem_k,
                          const __grid_constant__ sm90::TensorMap gmem_v,
                          const __grid_constant__ sm90::TensorMap gmem_out, const ScanArgs args) {
  using namespace sm90;
  using Shape = ScanShape<kD, kE>;
  constexpr int kStages = Shape::kStages, kColumns = Shape::kColumns,
                kConsumers = Shape::kConsumers;
  // with two warpgroups that take turns queries are in registers for both of their products, and a
  // warp copies what they made, which takes one thread a while; one warpgroup alone loses by it
  constexpr bool kQueries = Shape::kOutGroups == 2, kCopier = kQueries;
  constexpr int kOutGroups = Shape::kOutGroups, kStateThread = 128 * (1 + kOutGroups);
  // named barriers: the image holds S before the next chunk, one for each that reads it; it has
  // been read; a buffer of out is written, or copied; rows behind the end are cleared
  constexpr int kImageFull = 1, kImageEmpty = 3, kOut = 4, kCleared = 6, kStates = 7, kCopied = 8;
  auto& smem = shared_memory<ScanSmem<kD, kE>>();
  // the same in all lanes, which the compiler cannot know of threadIdx
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);

  const int slice = blockIdx.x % args.slices;
  int index = blockIdx.x / args.slices;
  if (args.segments > 1) {
    // one head after the other: those that decay fast are mostly the first, and soon summed up
    const int slots = gridDim.x / args.slices / args.heads;
    index = index % slots * args.heads + index / slots;
  }
  const int head = index % args.heads;
  const ScanPlace place = place_of(args, index / args.heads);
  if (place.slot < 0) return;
  const int chunks = (place.length + kChunk - 1) / kChunk, tail = place.length % kChunk;
  const bool wanted = args.state && place.last && head % args.share_state == 0;
  // behind the end of a packed sequence the next one begins
  const bool clears = args.cu_seqlens && tail != 0;

  if (threadIdx.x == 0) {
    prefetch(gmem_k);
    prefetch(gmem_v);
    prefetch(gmem_q);
    prefetch(gmem_out);
    for (int stage = 0; stage < kStages; ++stage) {
      smem.full[stage].init(1);
      smem.empty[stage].init(kConsumers / 32);
    }
    fence_barrier_init();
  }
  __syncthreads();
  begin(args);

  const auto copy_out = [&](int chunk) {
    for (int column = 0; column < kE; column += 64)
      copy_to_gmem(gmem_out, smem.out[chunk % 2].panel(column), slice * kE + column,
                   place.begin + chunk * kChunk, head, place.batch,
                   args.first || args.slices == 1 ? Keep::kShortly : Keep::kNormal);
    commit_copies();
  };
  if (warpgroup == 0) {
    lower_registers<24>();
    if (threadIdx.x < 32 && elect_one()) {
      // lines that L2 lets go first never push out what others left there, and share the few places
      // beside it: only where L2 holds what is read later in the call
      const Keep keep = args.fits ? Keep::kShortly : Keep::kNormal;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const Turn<kStages> turn(chunk);
        smem.empty[turn.stage].wait(turn.parity ^ 1);
        Barrier& full = smem.full[turn.stage];
        full.arrive_expect(2 * smem.k[0].kBytes + smem.v[0].kBytes);
        const int row = place.begin + chunk * kChunk;
        smem.k[turn.stage].load(gmem_k, full, row, head / args.share_k, place.batch, keep);
        for (int column = 0; column < kE; column += 64)
          copy_to_smem(smem.v[turn.stage].panel(column), gmem_v, full, slice * kE + column, row,
                       head / args.share_v, place.batch, Keep::kNormal);
        smem.q[turn.stage].load(gmem_q, full, row, head / args.share_q, place.batch, keep);
      }
    } else if (kCopier && threadIdx.x / 32 == 1) {
      const bool elected = elect_one();
      for (int chunk = 0; chunk < chunks - clears; ++chunk) {
        named_barrier_sync(kOut + chunk % 2, 160);
        if (elected) {
          copy_out(chunk);
          // shared memory must outlive the copies that read it
          wait_copies_read<0>();
        }
        __syncwarp();
        if (chunk + 2 < chunks) named_barrier_arrive(kCopied + chunk % 2, 160);
      }
    }
    return;
  }

  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const float slope = args.slopes[head / args.share_state * args.slopes_stride];
  if (bad_slope(slope) && thread == 0) *args.fault = 1;
  const float slope_log2 = in_log2(slope);
  auto release = [&](uint32_t stage) {
    if (lane == 0) smem.empty[stage].arrive();
  };

  if (warpgroup <= kOutGroups) {
    raise_registers<Shape::kOutRegisters>();
    const int group = kOutGroups == 1 ? 0 : warpgroup - 1;  // has every chunk or every other one
    if (group >= chunks) return;
    float acc_p[kChunk / 2], acc_o[kE / 2];
    // of acc_p, scale included: the same in every chunk. It is also the same 8 rows and columns
    // further, which saves registers and takes time where they are not needed.
    float decay[kQueries ? kChunk / 4 + 2 : kChunk / 2];
    const auto decay_of = [&](int i) -> float& {
      return decay[kQueries ? (i / 4 - i / 2 % 2 + 1) * 2 + i % 2 : i];
    };
    float carried[2];  // what S decays by until a row, scale included
    uint32_t frag_p[4][4];
    uint32_t frag_q[kQueries ? kD / 16 : 1][4];
    const int row = warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const int distance = row + i / 2 % 2 * 8 - (i / 4 * 8 + lane % 4 * 2 + i % 2);
      decay_of(i) =
          distance < 0 ? 0 : args.scale * exp2_approx(-slope_log2 * static_cast<float>(distance));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      carried[r] = args.scale * exp2_approx(-slope_log2 * static_cast<float>(row + 8 * r + 1));

    auto is_late = [&](int chunk) {
      const Turn<kStages> turn(chunk);
      return __any_sync(~0u, !smem.full[turn.stage].has_ended(turn.parity)) != 0;
    };
    const auto queries = [&](uint32_t stage, int d) -> decltype(auto) {
      if constexpr (kQueries)
        return (frag_q[d / 16]);
      else
        return smem.q[stage].k_major(0, d);
    };
    auto issue_scores = [&](int chunk) {
      const Turn<kStages> turn(chunk);
      smem.full[turn.stage].wait(turn.parity);
      if (clears && chunk + 1 == chunks) named_barrier_sync(kCleared, kConsumers);
      if constexpr (kQueries) load_rows(smem.q[turn.stage], warp, lane, frag_q);
      wgmma_fence(acc_p);
#pragma unroll
      for (int d = 0; d < kD; d += 16)
        wgmma<kType, Major::kK>(acc_p, queries(turn.stage, d), smem.k[turn.stage].k_major(0, d),
                                d > 0);
      wgmma_commit();
    };
    // mask, decay and scale are one factor
    auto pack_scores = [&] {
#pragma unroll
      for (int i = 0; i < kChunk / 4; ++i)
        frag_p[i / 4][i % 4] =
            pack<kType>(acc_p[2 * i] * decay_of(2 * i), acc_p[2 * i + 1] * decay_of(2 * i + 1));
    };
    auto step = [&](int chunk, bool more) {
      const Turn<kStages> turn(chunk);
      const bool last = kOutGroups == 1 ? !more : chunk + 1 == chunks;
      // the buffer of out that is written next was read two chunks ago
      if (!kCopier && thread == 0) wait_copies_read<1>();
      if (!kCopier) __syncwarp();
      named_barrier_sync(kImageFull + group, kConsumers);
      wgmma_fence(acc_o);
#pragma unroll
      for (int d = 0; d < kD; d += 16)
        if constexpr (kTurned<kD, kE>)
          wgmma<kType, Major::kK>(acc_o, queries(turn.stage, d), smem.image.k_major(0, d), d > 0);
        else
          wgmma<kType, Major::kMN>(acc_o, queries(turn.stage, d), smem.image.mn_major(d), d > 0);
      wgmma_commit();
      wgmma_wait<0>(acc_o);
      if (!last) named_barrier_arrive(kImageEmpty, kConsumers);
#pragma unroll
      for (int i = 0; i < kE / 2; ++i) acc_o[i] *= carried[i / 2 % 2];
      wgmma_fence(acc_o);
#pragma unroll
      for (int j = 0; j < kChunk; j += 16)
        wgmma<kType, Major::kMN>(acc_o, frag_p[j / 16], smem.v[turn.stage].mn_major(j), true);
      wgmma_commit();
      // a chunk that is done makes room before the next one has come
      const bool late = more && is_late(chunk + kOutGroups);
      if (late) {
        wgmma_wait<0>(acc_o);
        release(turn.stage);
      }
      if (more) {
        issue_scores(chunk + kOutGroups);
        wgmma_wait<1>(acc_o);
      } else {
        wgmma_wait<0>(acc_o);
      }
      if (!late) release(turn.stage);
      auto& staged = smem.out[chunk % 2];
      if (kCopier && chunk >= 2) named_barrier_sync(kCopied + chunk % 2, 160);
      store_rows<kType>(staged, 0, acc_o, warp, lane);
      fence_async_smem();
      const bool by_threads = clears && last;
      if (kCopier && !by_threads)
        named_barrier_arrive(kOut + chunk % 2, 160);
      else
        named_barrier_sync(kOut + (kCopier ? chunk % 2 : 0), 128);
      if (by_threads) {
        const int token = place.begin + chunk * kChunk;
        for (int i = thread; i < tail * kE / 8; i += 128) {
          const int r = i / (kE / 8), column = i % (kE / 8) * 8;
          if (slice * kE + column < args.e)
            copy_16_bytes(args.out +
                              (static_cast<int64_t>(token + r) * args.heads + head) * args.e +
                              slice * kE + column,
                          staged.address(r, column));
        }
      } else if (!kCopier && thread == 0) {
        copy_out(chunk);
      }
      if (!kCopier) __syncwarp();
      if (more) {
        wgmma_wait<0>(acc_p);
        pack_scores();
      }
    };

    issue_scores(group);
    wgmma_wait<0>(acc_p);
    pack_scores();
    int chunk = group;
#pragma unroll 1
    for (; chunk + kOutGroups < chunks; chunk += kOutGroups) step(chunk, true);
    // apart, so that no product is issued under a condition
    step(chunk, false);
    // shared memory must outlive the copies that read it
    if (!kCopier && thread == 0) wait_copies_read<0>();
    return;
  }

  raise_registers<Shape::kStateRegisters>();
  CarriedState<kType, kColumns, kPrecise> carry;
  // what this warpgroup has of S or S^T
  constexpr bool kTurn = kTurned<kD, kE>;
  const int row0 = kTurn ? 0 : (warpgroup - 1 - kOutGroups) * 64;
  const int column0 = kTurn ? (warpgroup - 1 - kOutGroups) * kColumns : 0;
  const int64_t state_head = head / args.share_state;
  // body(number, row and column of S)
  auto each = [&](const auto& body) {
    carry.each(row0 + warp * 16, lane, [&](float& number, int row, int column) {
      kTurn ? body(number, column0 + column, slice * kE + row)
            : body(number, row, slice * kE + column);
    });
  };
  each([&](float& number, int, int) { number = 0; });
  const int whole = args.segment / kChunk;  // chunks of a segment
  // as many segments as can be seen
  int before = (in_sight(slope_log2, place.segment * whole) + whole - 1) / whole;
  if (args.initial_state && before == place.segment) {
    const float* initial = args.initial_state + place.sequence * args.initial_strides[0] +
                           state_head * args.initial_strides[1];
    each([&](float& number, int row, int column) {
      if (row < args.d && column < args.e)
        number = initial[row * args.initial_strides[2] + column * args.initial_strides[3]];
    });
  }
  if (place.segment > 0) {
    const int parts = min(args.parts, in_sight(slope_log2, whole));
    const auto summary_of = [&](int segments_before) {
      const int64_t slot = place.slot - segments_before * place.distance;
      return ((slot * args.heads + head) * args.slices + slice) * args.parts;
    };
    // all CTAs that make summaries have begun before this one
    for (int i = threadIdx.x - kStateThread; i < before * parts; i += kConsumers - 128)
      wait_for_signals(args.made + summary_of(before - i / parts) + i % parts, 1, nullptr);
    named_barrier_sync(kStates, kConsumers - 128);
    const float keep = static_cast<float>(exp(-static_cast<double>(slope) * args.segment));
    for (; before > 0; --before) {
      const float* summary =
          args.summaries + summary_of(before) * (kD * kE) + row0 * kE + column0 * 64 + thread * 4;
#pragma unroll 1
      for (int i = 0; i < parts; ++i, summary += kD * kE)
        carry.add_summary(summary, i == 0 ? keep : 1);
    }
  }
  auto write_image = [&](int chunk) {
    if constexpr (kCopier) {
      // rounded while the image is still read
      uint32_t pairs[kColumns / 4];
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i)
        pairs[i] = pack<kType>(carry.acc[2 * i], carry.acc[2 * i + 1]);
      pin(pairs);
      if (chunk > 0) named_barrier_sync(kImageEmpty, kConsumers);
      store_pairs(smem.image, pairs, warp, lane);
    } else {
      if (chunk > 0) named_barrier_sync(kImageEmpty, kConsumers);
      store_rows<kType>(smem.image, row0, carry.acc, warp, lane, 1, column0);
    }
    // writers fence before the matrix instructions of another warpgroup read
    fence_async_smem();
    named_barrier_arrive(kImageFull + chunk % kOutGroups, kConsumers);
  };
  if (chunks > 0) write_image(0);
  TokenDecay decay = decay_to_end(slope_log2, kChunk, lane);
  float keep = static_cast<float>(exp(-static_cast<double>(slope) * kChunk));
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const bool last = chunk + 1 == chunks;
    const Turn<kStages> turn(chunk);
    smem.full[turn.stage].wait(turn.parity);
    if (last && clears) {
      // zero weights don't silence what is not a number
      clear_rows(smem.k[turn.stage], tail, threadIdx.x - kStateThread, kConsumers - 128);
      clear_rows(smem.v[turn.stage], tail, threadIdx.x - kStateThread, kConsumers - 128);
      fence_async_smem();
      named_barrier_arrive(kCleared, kConsumers);
      named_barrier_sync(kStates, kConsumers - 128);
    }
    if (last && !wanted) break;  // nobody needs S after it
    if (last && tail != 0) {
      decay = decay_to_end(slope_log2, tail, lane);
      keep = static_cast<float>(exp(-static_cast<double>(slope) * tail));
    }
    const auto& k = smem.k[turn.stage];
    const auto& v = smem.v[turn.stage];
    carry.load(kTurn ? rows_address(v, warp * 16, lane) : rows_address(k, row0 + warp * 16, lane));
    carry.scale(keep);
    carry.decay([&](int step, int i) { return decay.of[step][i]; });
    if constexpr (kTurn)
      carry.issue_update(k, column0);
    else
      carry.issue_update(v);
    wgmma_wait<0>(carry.acc);
    release(turn.stage);
    if (!last) write_image(chunk + 1);
  }
  if (wanted)
    each([&](float number, int row, int column) {
      const int64_t state = place.sequence * (args.heads / args.share_state) + state_head;
      if (row < args.d && column < args.e)
        args.state[(state * args.d + row) * args.e + column] = number;
    });
  await_previous();  // what runs behind this kernel waits for it alone
}

// X = sum of lambda^(n - 1 - j) k_j^T v_j over the tokens j of a segment of n. Chunks go from the
// last to the first: decays are powers of their distance from the end, S is never scaled, the
// tokens that the scan begins with are read last and are still in L2, and what is out of sight is
// not read. Parts take turns, so that all of them have as much to do whatever the decay is. What
// the gradient of S carries is the mirror image, the sum of scale lambda^(i + 1) q_i^T dout_i, with
// q and dout as k and v and from the first chunk to the last.
template <DType kType, int kD, int kE, bool kPrecise, bool kReverse = false>
__global__ void __launch_bounds__((128 + 128 * SummarySmem<kD, kE>::kGroups), 1)
    lightning_summary_sm90_kernel(const __grid_constant__ sm90::TensorMap gmem_k,
                                  const __grid_constant__ sm90::TensorMap gmem_v,
                                  const ScanArgs args) {
  using namespace sm90;
  using Smem = SummarySmem<kD, kE>;
  constexpr int kStages = Smem::kStages, kGroups = Smem::kGroups;
  auto& smem = shared_memory<Smem>();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);

  // heads that decay slowly take longest and are mostly the last of a model, so these begin
  const int ctas = gridDim.x / args.heads;  // of a head
  const int head = args.heads - 1 - blockIdx.x / ctas;
  int index = blockIdx.x % ctas;
  const int slice = index % args.slices;
  index /= args.slices;
  const int part = index % args.parts;
  const ScanPlace place = place_of(args, index / args.parts);
  if (place.slot < 0 || (kReverse ? place.segment == 0 : place.last)) {
    if (blockIdx.x == 0) await_previous();  // all may return here
    return;
  }
  const int64_t summary =
      ((static_cast<int64_t>(place.slot) * args.heads + head) * args.slices + slice) * args.parts +
      part;

  if (threadIdx.x == 0) {
    prefetch(gmem_k);
    prefetch(gmem_v);
    for (int stage = 0; stage < kStages; ++stage) {
      smem.full[stage].init(1);
      smem.empty[stage].init(4 * kGroups);
    }
    fence_barrier_init();
    if (!kReverse) {
      // before the scan may begin, which waits for it
      await_previous();
      args.made[summary] = 0;
      fence_gmem();
    }
  }
  __syncthreads();
  begin(args);

  const float slope_log2 = in_log2(args.slopes[head / args.share_state * args.slopes_stride]);
  const int tokens = kReverse ? place.length : args.segment;
  const int all = (tokens + kChunk - 1) / kChunk;
  // the chunk that ends before its 64th token, if any
  const int ragged = args.cu_seqlens && tokens % kChunk != 0 ? all - 1 : -1;
  const int chunks = (in_sight(slope_log2, all) - part + args.parts - 1) / args.parts;
  // in chunks, from the end of the segment
  const auto distance = [&](int chunk) { return chunk * args.parts + part; };
  if (chunks == 0) return;  // nor does the scan read it

  if (warpgroup == 0) {
    if (threadIdx.x < 32 && elect_one()) {
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const Turn<kStages> turn(chunk);
        smem.empty[turn.stage].wait(turn.parity ^ 1);
        Barrier& full = smem.full[turn.stage];
        full.arrive_expect(smem.k[0].kBytes + smem.v[0].kBytes);
        const int row = place.begin + (kReverse ? distance(chunk) * kChunk
                                                : tokens - (distance(chunk) + 1) * kChunk);
        smem.k[turn.stage].load(gmem_k, full, row, head / args.share_k, place.batch, Keep::kNormal);
        for (int column = 0; column < kE; column += 64)
          copy_to_smem(smem.v[turn.stage].panel(column), gmem_v, full, slice * kE + column, row,
                       head / args.share_v, place.batch, Keep::kNormal);
      }
    }
    return;
  }

  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int group = warpgroup - 1;  // has 64 rows of X or X^T
  constexpr bool kTurn = kTurned<kD, kE>;
  constexpr int kColumns = kTurn ? kD : kE;
  CarriedState<kType, kColumns, kPrecise> carry;
  carry.each(0, lane, [](float& number, int, int) { number = 0; });
  const TokenDecay decay = kReverse
                               ? TokenDecay(slope_log2, lane, [](int token) { return token + 1; })
                               : decay_to_end(slope_log2, kChunk, lane);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const Turn<kStages> turn(chunk);
    auto& k = smem.k[turn.stage];
    auto& v = smem.v[turn.stage];
    smem.full[turn.stage].wait(turn.parity);
    if (kReverse && distance(chunk) == ragged) {
      clear_rows(k, tokens % kChunk, threadIdx.x - 128, 128 * kGroups);
      clear_rows(v, tokens % kChunk, threadIdx.x - 128, 128 * kGroups);
      fence_async_smem();
      named_barrier_sync(1, 128 * kGroups);
    }
    carry.load(kTurn ? rows_address(v, group * 64 + warp * 16, lane)
                     : rows_address(k, group * 64 + warp * 16, lane));
    const float factor = (kReverse ? args.scale * lift_of<kType, kPrecise>(slope_log2) : 1) *
                         exp2f(-slope_log2 * static_cast<float>(kChunk * distance(chunk)));
    carry.decay([&](int step, int i) {
      return float2{decay.of[step][i].x * factor, decay.of[step][i].y * factor};
    });
    if constexpr (kTurn)
      carry.issue_update(k);
    else
      carry.issue_update(v);
    wgmma_wait<0>(carry.acc);
    if (lane == 0) smem.empty[turn.stage].arrive();
  }
  carry.store_summary(args.summaries + summary * (kD * kE) + group * 64 * kColumns + thread * 4);
  if (!kReverse) {
    named_barrier_sync(1, 128 * kGroups);
    if (threadIdx.x == 128) signal(args.made + summary);
  }
  await_previous();  // what runs behind this kernel waits for it alone
}

template <DType kType>
sm90::TensorMap scan_map(const ScanCall& call, const void* data, int64_t d, int64_t h,
                         const ScanStrides& strides) {
  return make_tensor_map(kType, data,
                         {d, call.s, h, call.b, strides.row, strides.head, strides.batch}, kChunk);
}

constexpr int64_t kL2Bytes = int64_t{50} << 20;  // of an H200

inline ScanArgs scan_args(const ScanCall& call, const ScanPlan& plan) {
  const auto small = [](int64_t x) { return static_cast<int>(x); };
  ScanArgs args{};
  args.tokens = small(call.s);
  args.heads = small(call.heads);
  args.d = small(call.d);
  args.e = small(call.e);
  args.share_q = small(call.heads / call.hq);
  args.share_k = small(call.heads / call.hk);
  args.share_v = small(call.heads / call.hv);
  args.share_state = small(call.heads / call.hs);
  args.slices = plan.slices;
  args.segment = plan.segment;
  args.segments = plan.segments;
  args.parts = plan.parts;
  args.slots = small(plan.slots);
  args.sequences = small(call.sequences);
  args.fits = plan.slices == 1 &&
              2 * call.b * call.s * (call.hq * call.d + call.hk * call.d + call.hv * call.e) <=
                  kL2Bytes * 3 / 2;
  args.scale = call.scale;
  args.slopes = call.slopes;
  args.slopes_stride = call.slopes_stride;
  args.cu_seqlens = call.cu_seqlens;
  args.cu_stride = call.cu_stride;
  args.initial_state = call.initial_state;
  std::copy_n(call.initial_strides, 4, args.initial_strides);
  args.state = call.state;
  args.summaries = call.summaries;
  args.made =
      reinterpret_cast<int*>(call.summaries + plan.summaries(call) * plan.rows * plan.columns);
  args.out = static_cast<uint16_t*>(call.out);
  args.fault = call.fault;
  return args;
}

template <DType kType, int kD, int kE, bool kPrecise>
void launch_scan(const ScanCall& call, const ScanPlan& plan, cudaStream_t stream) {
  ScanArgs args = scan_args(call, plan);
  args.first = true;
  const auto gmem_q = scan_map<kType>(call, call.q, call.d, call.hq, call.q_strides);
  const auto gmem_k = scan_map<kType>(call, call.k, call.d, call.hk, call.k_strides);
  const auto gmem_v = scan_map<kType>(call, call.v, call.e, call.hv, call.v_strides);
  const int64_t row = call.heads * call.e;
  const auto gmem_out =
      scan_map<kType>(call, call.out, call.e, call.heads, {call.s * row, row, call.e});
  const auto ctas = [&](int64_t each) { return static_cast<int>(call.heads * plan.slices * each); };
  if (plan.summed > 0) {
    launch<lightning_summary_sm90_kernel<kType, kD, kE, kPrecise>>(
        {ctas(plan.summed * plan.parts), 128 + 128 * SummarySmem<kD, kE>::kGroups,
         sm90::shared_memory_bytes<SummarySmem<kD, kE>>(), stream, true},
        gmem_k, gmem_v, args);
    args.first = false;
  }
  Launch main{ctas(plan.slots), ScanShape<kD, kE>::kThreads,
              sm90::shared_memory_bytes<ScanSmem<kD, kE>>(), stream, true};
  // two slices of a head are neighbours on the chip and read q and k at nearly the same time
  if (plan.slices % 2 == 0 && args.first) main.cluster = 2;
  launch<lightning_sm90_kernel<kType, kD, kE, kPrecise>>(main, gmem_q, gmem_k, gmem_v, gmem_out,
                                                         args);
}

}  // namespace

template <DType kType, int kD, int kE>
void launch_scan_sm90(const ScanCall& call, const ScanPlan& plan, cudaStream_t stream) {
  // a state that is handed on keeps its digits, which takes one product more
  call.state ? launch_scan<kType, kD, kE, true>(call, plan, stream)
             : launch_scan<kType, kD, kE, false>(call, plan, stream);
}

}  // namespace heddle
