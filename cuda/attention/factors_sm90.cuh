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
  int64_t s;
  int h, pairs;  // of batch and head
  int d, lanes;
  float* factors;  // [b, h, row]
  int64_t row;
  int* strange;  // set where numbers are such that products of rows may leave the range of f32
};

// A multiple of `pairs` CTAs
template <DType kType> __global__ void attention_factor_kernel(FactorArgs p) {
  constexpr float kLeast = 0x1p-30f, kMost = 0x1p30f;
  constexpr int kPiece = 8;
  const int block = static_cast<int>(blockIdx.x), threads = static_cast<int>(blockDim.x);
  const int pair = block % p.pairs, rows = threads / p.lanes;
  const int thread = static_cast<int>(threadIdx.x), at = thread % p.lanes * kPiece;
  const uint16_t* x = p.x + pair / p.h * p.strides.batch + pair % p.h * p.strides.head + at;
  // the lanes of a row add up together, behind the last one too
  const int64_t step = static_cast<int>(gridDim.x) / p.pairs * int64_t{rows};
  for (int64_t first = block / p.pairs * int64_t{rows}; first < p.s; first += step) {
    const int64_t token = first + thread / p.lanes;
    float largest = 0, square = 0;
    if (token < p.s && at < p.d) {
      const uint4 piece = *reinterpret_cast<const uint4*>(x + token * p.strides.row);
      const uint32_t words[] = {piece.x, piece.y, piece.z, piece.w};
      for (int e = 0; e < kPiece; ++e) {
        const float number = sm90::unpack<kType>(static_cast<uint16_t>(words[e / 2] >> e % 2 * 16));
        largest = fmaxf(largest, fabsf(number));
        square = fmaf(number, number, square);
      }
    }
    for (int lane = p.lanes / 2; lane > 0; lane /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lane));
      square += __shfl_xor_sync(~0u, square, lane);
    }
    if (token >= p.s || at != 0) continue;
    p.factors[pair * p.row + token] = square == 0 ? 0 : 1 / sqrtf(square);
    if (largest != 0 && (largest < kLeast || largest > kMost)) *p.strange = 1;
  }
}

}  // namespace
}  // namespace heddle
