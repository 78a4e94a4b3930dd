#pragma once
#include <cmath>
#include <cstdint>

#include "attention/forward_sm90.h"
#include "common/sm90.cuh"

// One over the lengths of rows of q or k, for cosines. As many threads take a row as it has pieces
// of 16 bytes, and up to the next power of two.
namespace heddle {
namespace {

struct FactorArgs {
  const uint16_t* x;  // [b, s, h, d]
  Strides strides;
  int64_t s, h, rows;
  int d, lanes;
  float* factors;  // [b, h, row]
  int64_t row;
  int* strange;  // set where numbers are such that products of rows may leave the range of f32
};

template <DType kType> __global__ void attention_factor_kernel(FactorArgs p) {
  constexpr float kLeast = 0x1p-30f, kMost = 0x1p30f;
  constexpr int kPiece = 8;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  // whole warps, as they add up together
  const int64_t end = (p.rows * p.lanes + 31) / 32 * 32;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < end;
       i += threads) {
    const int64_t row = i / p.lanes, token = row / p.h, head = row % p.h, batch = token / p.s;
    const int at = static_cast<int>(i % p.lanes) * kPiece;
    float largest = 0, square = 0;
    if (row < p.rows && at < p.d) {
      const uint16_t* x =
          p.x + batch * p.strides.batch + token % p.s * p.strides.row + head * p.strides.head + at;
      const uint4 piece = *reinterpret_cast<const uint4*>(x);
      const uint32_t words[] = {piece.x, piece.y, piece.z, piece.w};
      for (int e = 0; e < kPiece; ++e) {
        const float number = sm90::unpack<kType>(static_cast<uint16_t>(words[e / 2] >> e % 2 * 16));
        largest = fmaxf(largest, fabsf(number));
        square = fmaf(number, number, square);
      }
    }
    for (int step = p.lanes / 2; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      square += __shfl_xor_sync(~0u, square, step);
    }
    if (row >= p.rows || at != 0) continue;
    p.factors[(batch * p.h + head) * p.row + token % p.s] = square == 0 ? 0 : 1 / sqrtf(square);
    if (largest != 0 && (largest < kLeast || largest > kMost)) *p.strange = 1;
  }
}

}  // namespace
}  // namespace heddle
