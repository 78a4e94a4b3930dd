#pragma once
#include "lightning/decode_call.h"

namespace heddle {

constexpr int kDecodeSlab = 64, kDecodeThreads = 256;  // columns of v in a tile, its threads

// What 256 threads hold of a state: 64 columns of v, each thread up to kPieces pieces of four
// numbers along a row. kPieces cover d: 16 times as many rows of a state that is [d, e], and if it
// is [e, d] 64 columns for every four. Numbers behind d and e are zero and stay so.
template <int kPieces, bool kTransposed> struct DecodeTile {
  static constexpr int kAcross = kDecodeSlab / 4,
                       kDown = kDecodeThreads / kAcross;        // threads along a row, rows
  static constexpr int kAlong = kTransposed ? kPieces / 4 : 1;  // pieces of a thread in one row
  using Sums = float4[kDecodeThreads / 32][kAcross];

  int rows, columns, thread, lane, line, slab;
  float acc[kPieces][4] = {};

  __device__ __forceinline__ DecodeTile(int d, int e, int slab, int thread)
      : rows(kTransposed ? e : d),
        columns(kTransposed ? d : e),
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
  template <class Body> __device__ __forceinline__ void each(const Body& body) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int row = row_of(i), column = column_of(i);
      if (row < rows && column < columns)
        body(acc[i], min(columns - column, 4), row * columns + column);
    }
  }
  // With rows that are aligned to 16 bytes
  __device__ __forceinline__ void load_vectors(const float* state) {
    each([&](float(&piece)[4], int, int at) {
      const float4 x = *reinterpret_cast<const float4*>(state + at);
      piece[0] = x.x, piece[1] = x.y, piece[2] = x.z, piece[3] = x.w;
    });
  }
  __device__ __forceinline__ void store_vectors(float* state) {
    each([&](const float(&piece)[4], int, int at) {
      *reinterpret_cast<float4*>(state + at) = float4{piece[0], piece[1], piece[2], piece[3]};
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

  // write(f, q S[.., f]) on one thread for each f of the slab; `meet` joins all that share `sums`
  template <class Meet, class Write>
  __device__ __forceinline__ void project(const float* smem_q, Sums& sums, const Meet& meet,
                                          const Write& write) const {
    if constexpr (kTransposed) {
#pragma unroll
      for (int i = 0; i < kPieces; i += kAlong) {
        float sum = 0;
#pragma unroll
        for (int along = i; along < i + kAlong; ++along)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum = fmaf(smem_q[column_of(along) + j], acc[along][j], sum);
#pragma unroll
        for (int mask = kAcross / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
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
      meet();
      if (thread < kDecodeSlab) {
        float sum = 0;
        for (int warp = 0; warp < kDecodeThreads / 32; ++warp)
          sum += reinterpret_cast<const float*>(sums[warp])[thread];
        write(slab + thread, sum);
      }
    }
  }
};

}  // namespace heddle
