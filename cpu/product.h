#pragma once
#include "cpu/multiply.h"

// Small matrix products in f32 whose operands stay in the cache.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {

// The next width that is whole vectors
inline int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

template <int R, int N>
inline void product_block(float* out, int64_t out_width, int64_t depth, const float* a, int64_t row,
                          int64_t step, const float* b, int64_t b_width, const float* keep) {
  Tile<R, N> acc;
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n)
      acc.at[r][n] = keep ? load(out + r * out_width + n * kLanes) * *keep : zero();
  multiply(acc, depth, a, row, step, b, b_width);
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(out + r * out_width + n * kLanes, acc.at[r][n]);
}

template <int R>
inline void product_rows(float* out, int64_t out_width, int64_t columns, int64_t depth,
                         const float* a, int64_t row, int64_t step, const float* b, int64_t b_width,
                         const float* keep) {
  int64_t n = 0;
  for (; n + kTileCols <= columns; n += kTileCols)
    product_block<R, kTileVecs>(out + n, out_width, depth, a, row, step, b + n, b_width, keep);
  if (n + 2 * kLanes <= columns) {
    product_block<R, 2>(out + n, out_width, depth, a, row, step, b + n, b_width, keep);
    n += 2 * kLanes;
  }
  if (n < columns)
    product_block<R, 1>(out + n, out_width, depth, a, row, step, b + n, b_width, keep);
}

// out[r, n] = (keep ? *keep * out[r, n] : 0) + sum over k of a[r * row + k * step] * b[k, n];
// columns are whole vectors
inline void product(float* out, int64_t out_width, int64_t rows, int64_t columns, int64_t depth,
                    const float* a, int64_t row, int64_t step, const float* b, int64_t b_width,
                    const float* keep) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    product_rows<kTileRows>(out + r * out_width, out_width, columns, depth, a + r * row, row, step,
                            b, b_width, keep);
  for (; r < rows; ++r)
    product_rows<1>(out + r * out_width, out_width, columns, depth, a + r * row, row, step, b,
                    b_width, keep);
}

}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
