#pragma once
#include <utility>

#include "cpu/simd.h"

// The inner loop of every matrix product: an acc tile of R rows by N vectors that stays in
// registers while it runs over the reduced dimension,
//
//   acc[r][:] += a[r, k] * b[k, :]
//
// where a is read one number at a time and may stand in either order, and rows of b are contiguous.
// N independent loads of b and R broadcasts feed R * N products, so that the multipliers are the
// limit.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {

// acc, one row of b and one broadcast fill the registers. Rows divide 8, as head sizes are
// multiples of that.
inline constexpr int kTileRows = kRegisters == 32 ? 8 : 4;
inline constexpr int kTileVecs = 3;
inline constexpr int kTileCols = kTileVecs * kLanes;

template <int R, int N> struct Tile { Vec at[R][N]; };

template <int R, int N>
HEDDLE_INLINE void multiply(Tile<R, N>& acc, int64_t depth, const float* a, int64_t row,
                            int64_t step, const float* b, int64_t width) {
  for (int64_t k = 0; k < depth; ++k, a += step, b += width) {
    Vec line[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) line[n] = load(b + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec scalar = splat(a[r * row]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc.at[r][n] += scalar * line[n];
    }
  }
}

template <int s, int half, size_t... j>
HEDDLE_INLINE Vec exchange(Vec a, Vec b, std::index_sequence<j...>) {
  constexpr auto lane = [](int i) {
    return half ? (i & s ? kLanes + i : i + s) : (i & s ? kLanes + i - s : i);
  };
  return __builtin_shufflevector(a, b, lane(j)...);
}
// Swaps the off-diagonal blocks of s by s lanes, then the same inside each block
template <int s> HEDDLE_INLINE void transpose_blocks(Vec (&x)[kLanes]) {
  if constexpr (s > 0) {
    constexpr auto lanes = std::make_index_sequence<kLanes>();
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & s) continue;
      const Vec a = x[i], b = x[i + s];
      x[i] = exchange<s, 0>(a, b, lanes);
      x[i + s] = exchange<s, 1>(a, b, lanes);
    }
    transpose_blocks<s / 2>(x);
  }
}

// to[j, i] = from[i, j] for i < rows and j < cols; both have contiguous rows
inline void transpose(float* to, int64_t to_width, const float* from, int64_t from_width,
                      int64_t rows, int64_t cols) {
  int64_t i = 0;
  for (; i + kLanes <= rows; i += kLanes) {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) block[r] = load(from + (i + r) * from_width + j);
      transpose_blocks<kLanes / 2>(block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(to + (j + r) * to_width + i, block[r]);
    }
    for (; j < cols; ++j)
      for (int r = 0; r < kLanes; ++r) to[j * to_width + i + r] = from[(i + r) * from_width + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) to[j * to_width + i] = from[i * from_width + j];
}

}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
