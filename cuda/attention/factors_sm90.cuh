#pragma once
#include <cmath>
#include <cstdint>

#include "attention/forward_sm90.h"
#include "common/sm90.cuh"

// One over the lengths of rows of q or k, for cosines, or the rows themselves at length 1. As many
// threads take a row as it has pieces of 16 bytes, and up to the next power of two.
namespace heddle {
namespace {

struct FactorArgs {
  const uint16_t* x;  // [b, s, h, d]
  Strides strides;
  int64_t s;
  int h;
  float scale, length_scale;  // of units, the second with the log of how many keys a row sees
  SeenKeys seen;
  int64_t rows = 0;  // of all
  int d = 0, lanes = 0;
  float* factors = nullptr;  // [b, h, factor_row], or
  int64_t factor_row = 0;
  uint16_t* units = nullptr;  // [b, s, h, d] in f16
  int* strange =
      nullptr;  // set where numbers are such that products of rows may leave the range of f32
};

inline FactorArgs q_rows(const ForwardCall& call) {
  return {static_cast<const uint16_t*>(call.q),
          call.q_strides,
          call.sq,
          static_cast<int>(call.hq),
          call.scale * 1.44269504f,
          call.slots.length_scale,
          SeenKeys(call)};
}
inline FactorArgs k_rows(const ForwardCall& call) {
  FactorArgs args = q_rows(call);
  args.x = static_cast<const uint16_t*>(call.k);
  args.strides = call.k_strides;
  args.s = call.sk;
  args.h = static_cast<int>(call.hk);
  args.scale = 1;
  args.length_scale = 0;
  return args;
}

// Of numbers that mostly have 32 bits, as 64 take several times as long
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  return a >> 32 ? a / b : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

template <DType kType> __global__ void attention_factor_kernel(FactorArgs p) {
  constexpr float kLeast = 0x1p-30f, kMost = 0x1p30f;
  constexpr int kPiece = 8;
  const int threads = static_cast<int>(blockDim.x), together = threads / p.lanes;
  const int thread = static_cast<int>(threadIdx.x), at = thread % p.lanes * kPiece;
  // in the order in which they mostly lie, the lanes of a row behind the last one too
  for (int64_t first = int64_t{blockIdx.x} * together; first < p.rows;
       first += int64_t{gridDim.x} * together) {
    const int64_t row = first + thread / p.lanes, line = divide(row, p.h);
    const int head = static_cast<int>(row - line * p.h);
    const int batch = static_cast<int>(divide(line, p.s));
    const int64_t token = line - batch * p.s;
    const bool reads = row < p.rows && at < p.d;
    float numbers[kPiece] = {}, largest = 0, square = 0;
    if (reads) {
      const uint4 piece = *reinterpret_cast<const uint4*>(
          p.x + batch * p.strides.batch + token * p.strides.row + head * p.strides.head + at);
      const uint32_t words[] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
      for (int e = 0; e < kPiece; ++e) {
        numbers[e] = sm90::unpack<kType>(static_cast<uint16_t>(words[e / 2] >> e % 2 * 16));
        largest = fmaxf(largest, fabsf(numbers[e]));
        square = fmaf(numbers[e], numbers[e], square);
      }
    }
    for (int lane = p.lanes / 2; lane > 0; lane /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lane));
      square += __shfl_xor_sync(~0u, square, lane);
    }
    if (!reads) continue;
    float factor = square == 0 ? 0 : 1 / sqrtf(square);
    if (p.units) {
      factor *= p.scale;
      if (p.length_scale != 0)
        factor *=
            p.length_scale * logf(static_cast<float>(p.seen.count(batch, static_cast<int>(token))));
      uint32_t units[kPiece / 2];
#pragma unroll
      for (int e = 0; e < kPiece; e += 2)
        units[e / 2] = sm90::pack<DType::kF16>(numbers[e] * factor, numbers[e + 1] * factor);
      *reinterpret_cast<uint4*>(p.units + row * p.d + at) = {units[0], units[1], units[2],
                                                             units[3]};
    } else if (at == 0) {
      p.factors[(int64_t{batch} * p.h + head) * p.factor_row + token] = factor;
    }
    if (at == 0 && largest != 0 && (largest < kLeast || largest > kMost)) *p.strange = 1;
  }
}

}  // namespace
}  // namespace heddle
