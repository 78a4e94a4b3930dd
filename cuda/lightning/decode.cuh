#pragma once
#include "common/elements.cuh"
#include "common/lanes.cuh"
#include "lightning/bad_slope.cuh"

// S = lambda S + k^T v and o = scale q S for a few tokens, on states that are read and written
// once: 8 d e bytes each, which is all that takes time.
namespace heddle {

// Rows of q, k or v: [b, s, heads, d or e]
struct DecodeRows {
  const void* data;
  int64_t strides[4];
  int share;  // heads of out that read the same

  // Of a head of out
  __device__ int64_t offset(int64_t b, int64_t token, int head, int64_t i) const {
    return b * strides[0] + token * strides[1] + head / share * strides[2] + i * strides[3];
  }
};

struct DecodeCall {
  DecodeRows q, k, v;
  const float* slopes;
  int64_t slopes_stride;
  float* states;
  const int32_t* slots;
  int64_t slots_stride, batch;
  int pool;
  void* out;
  float* all_states;
  int heads, heads_state, tokens, d, e;
  float scale;
  bool transposed;  // states are [e, d]
  bool vectors;     // rows of a state are aligned to 16 bytes
  int* fault;

  // Whether this thread finds a slot or a slope that is none. Threads together look at everything,
  // so that nobody has to clear the word before.
  __device__ bool finds_bad(int thread, int threads) const {
    bool bad = false;
#pragma unroll 1
    for (int64_t i = thread; i < batch; i += threads) bad |= slots[i * slots_stride] >= pool;
#pragma unroll 1
    for (int i = thread; i < heads_state; i += threads) bad |= bad_slope(slopes[i * slopes_stride]);
    return bad;
  }
};

// For one token of d = e = 128, as many heads of everything and states in vectors: a kernel that
// knows its sizes and begins before the kernel before has ended
template <class T> void launch_decode_sm90(const DecodeCall& call, cudaStream_t stream);

namespace {

constexpr int kDecodeSlab = 64;  // columns of v in a tile

// What a CTA's threads hold of a state: 64 columns of v, each thread up to kPieces pieces of four
// numbers along a row. The pieces cover d. Numbers behind d and e are zero and stay so; where both
// are kSize, which is not 0 then, there are none.
template <int kThreads, int kPieces, bool kTransposed, int kSize> struct DecodeTile {
  static constexpr int kAcross = kDecodeSlab / 4, kDown = kThreads / kAcross;  // in a row, rows
  // pieces of a thread in one row
  static constexpr int kAlong = kTransposed ? kPieces * kDown / kDecodeSlab : 1;
  using Sums = float4[kThreads / 32][kAcross];

  int rows, columns, thread, lane, line, slab;
  float acc[kPieces][4] = {};

  __device__ __forceinline__ DecodeTile(int d, int e, int slab, int thread)
      : rows(kSize         ? kSize
             : kTransposed ? e
                           : d),
        columns(kSize         ? kSize
                : kTransposed ? d
                              : e),
        thread(thread),
        lane(thread % kAcross),
        line(thread / kAcross),
        slab(slab) {}

  __device__ __forceinline__ int row_of(int i) const {
    return line + i / kAlong * kDown + (kTransposed ? slab : 0);
  }
  __device__ __forceinline__ int column_of(int i) const {
    return 4 * lane + (kTransposed ? i % kAlong * kDecodeSlab : slab);
  }

  // body(piece, how many of its numbers exist, where they stand)
  template <class Float, class Body>
  __device__ __forceinline__ void each(Float* state, const Body& body) {
    const auto at = [&](int i) { return row_of(i) * columns + column_of(i); };
    Float* const first = state + at(0);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int row = row_of(i), column = column_of(i);
      if (kSize || (row < rows && column < columns))
        // one address and constants behind it, or as few registers as possible
        body(acc[i], min(columns - column, 4), kSize ? first + (at(i) - at(0)) : state + at(i));
    }
  }
  // With rows that are aligned to 16 bytes. L2 lets go of states before anything else: kept as
  // usual they are written back in an order that takes memory twice the time.
  __device__ __forceinline__ void load_vectors(const float* state) {
    each(state, [&](float(&piece)[4], int, const float* at) {
      const float4 x = __ldcs(reinterpret_cast<const float4*>(at));
      piece[0] = x.x, piece[1] = x.y, piece[2] = x.z, piece[3] = x.w;
    });
  }
  __device__ __forceinline__ void store_vectors(float* state) {
    each(state, [&](const float(&piece)[4], int, float* at) {
      __stcs(reinterpret_cast<float4*>(at), {piece[0], piece[1], piece[2], piece[3]});
    });
  }

  // S = decay S + k^T v
  __device__ __forceinline__ void advance(float decay, const float* smem_k, const float* smem_v) {
    const float *by_row = kTransposed ? smem_v : smem_k, *by_column = kTransposed ? smem_k : smem_v;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        acc[i][j] = fmaf(decay, acc[i][j], by_row[row_of(i)] * by_column[column_of(i) + j]);
  }

  // write(f, q S[.., f]) on one thread for each f of the slab
  template <class Write>
  __device__ __forceinline__ void project(const float* smem_q, Sums& sums,
                                          const Write& write) const {
    if constexpr (kTransposed) {
#pragma unroll
      for (int i = 0; i < kPieces; i += kAlong) {
        float sum = 0;
#pragma unroll
        for (int along = i; along < i + kAlong; ++along)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum = fmaf(smem_q[column_of(along) + j], acc[along][j], sum);
        sum = warp_sum(sum, kAcross);
        if (lane == 0) write(row_of(i), sum);
      }
    } else {
      float own[4] = {};
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) own[j] = fmaf(smem_q[row_of(i)], acc[i][j], own[j]);
#pragma unroll
      for (int j = 0; j < 4; ++j) own[j] += __shfl_xor_sync(~0u, own[j], kAcross);
      if (thread % 32 < kAcross) sums[thread / 32][lane] = float4{own[0], own[1], own[2], own[3]};
      __syncthreads();
      if (thread < kDecodeSlab) {
        float sum = 0;
        for (int warp = 0; warp < kThreads / 32; ++warp)
          sum += reinterpret_cast<const float*>(sums[warp])[thread];
        write(slab + thread, sum);
      }
    }
  }
};

}  // namespace
}  // namespace heddle
