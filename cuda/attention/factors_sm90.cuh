#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "attention/forward_sm90.h"
#include "common/sm90.cuh"

// One over the lengths of rows of q or k, for cosines, or the rows themselves at length 1. As many
// threads take a row as it has pieces of 16 bytes, and up to the next power of two.
namespace heddle {
namespace {

constexpr int kPiece = 8;  // numbers of 16 bits

struct FactorArgs {
  const uint16_t* x;  // [b, s, h, d]
  Strides strides;
  int64_t s;
  int h;
  float scale, length_scale;  // of units, the second with the log of how many keys a row sees
  SeenKeys seen;
  int64_t rows;  // of all
  int d, lanes;
  bool keys = false;
  float* factors = nullptr;  // [b, h, factor_row], or
  int64_t factor_row = 0;
  uint16_t* units = nullptr;  // [b, s, h, d] in f16
  float* centers = nullptr;   // [b, h / group, d], taken from those of k, and
  int group = 1;
  float* shifts = nullptr;  // [b, h, s]: what that takes from scores of rows of q
  // set where keys in use or queries have numbers of which products may leave the range of f32
  int* strange = nullptr;
};

inline FactorArgs q_rows(const ForwardCall& call) {
  return {static_cast<const uint16_t*>(call.q),
          call.q_strides,
          call.sq,
          static_cast<int>(call.hq),
          call.scale * 1.44269504f,
          call.slots.length_scale,
          SeenKeys(call),
          call.b * call.sq * call.hq,
          static_cast<int>(call.d),
          static_cast<int>(std::bit_ceil(static_cast<uint64_t>(call.d / kPiece)))};
}
inline FactorArgs k_rows(const ForwardCall& call) {
  FactorArgs args = q_rows(call);
  args.x = static_cast<const uint16_t*>(call.k);
  args.strides = call.k_strides;
  args.s = call.sk;
  args.h = static_cast<int>(call.hk);
  args.rows = call.b * call.sk * call.hk;
  args.scale = 1;
  args.length_scale = 0;
  args.keys = true;
  return args;
}
inline FactorArgs q_units(const ForwardCall& call, const CosineRows& rows) {
  FactorArgs args = q_rows(call);
  args.units = rows.q;
  args.shifts = rows.shifts;
  args.centers = rows.centers;
  args.group = static_cast<int>(call.hq / call.hk);
  return args;
}
inline FactorArgs k_units(const ForwardCall& call, const CosineRows& rows) {
  FactorArgs args = k_rows(call);
  args.units = rows.k;
  args.centers = rows.centers;
  return args;
}

// Of numbers that mostly have 32 bits, as 64 take several times as long
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  return a >> 32 ? a / b : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// A thread's piece of a row, and of all pieces together the largest and the sum of the squares
struct RowPiece {
  float numbers[kPiece] = {}, largest = 0, square = 0;
  template <DType kType> __device__ __forceinline__ void load(const uint16_t* from) {
    const uint4 piece = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int e = 0; e < kPiece; ++e) {
      numbers[e] = sm90::unpack<kType>(static_cast<uint16_t>(words[e / 2] >> e % 2 * 16));
      largest = fmaxf(largest, fabsf(numbers[e]));
      square = fmaf(numbers[e], numbers[e], square);
    }
  }
  __device__ __forceinline__ void meet(int lanes) {
    for (int lane = lanes / 2; lane > 0; lane /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lane));
      square += __shfl_xor_sync(~0u, square, lane);
    }
  }
  __device__ __forceinline__ float factor() const { return square == 0 ? 0 : 1 / sqrtf(square); }
};

// What the first keys of a head have in common: one in sixteen of all, at most sixteen. What a row
// gets depends on no key behind both it and them.
constexpr int kCentered = 16, kCenterThreads = kCentered * kSlotColumns / kPiece;
template <DType kType> __global__ void attention_center_kernel(FactorArgs p) {
  __shared__ float units[kCentered][kSlotColumns];
  const int head = static_cast<int>(blockIdx.x) % p.h, batch = static_cast<int>(blockIdx.x) / p.h;
  const int thread = static_cast<int>(threadIdx.x), at = thread % p.lanes * kPiece;
  const int row = thread / p.lanes, count = min(p.seen.of(batch) / kCentered, kCentered);
  RowPiece piece;
  if (row < count && at < p.d)
    piece.load<kType>(p.x + batch * p.strides.batch + row * p.strides.row + head * p.strides.head +
                      at);
  piece.meet(p.lanes);
  // not of rows that are no numbers
  const float factor = piece.square < INFINITY ? piece.factor() : 0;
#pragma unroll
  for (int e = 0; e < kPiece; ++e)
    if (row < kCentered && at < p.d)
      units[row][at + e] = factor == 0 ? 0 : piece.numbers[e] * factor;
  __syncthreads();
  for (int i = thread; i < p.d; i += kCenterThreads) {
    float sum = 0;
    for (int j = 0; j < count; ++j) sum += units[j][i];
    p.centers[int64_t{blockIdx.x} * p.d + i] = count == 0 ? 0 : sum / static_cast<float>(count);
  }
}

template <DType kType> __global__ void attention_factor_kernel(FactorArgs p) {
  constexpr float kLeast = 0x1p-30f, kMost = 0x1p30f;
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
    const int64_t own = int64_t{batch} * p.h + head;
    RowPiece piece;
    if (reads)
      piece.load<kType>(p.x + batch * p.strides.batch + token * p.strides.row +
                        head * p.strides.head + at);
    piece.meet(p.lanes);
    float factor = piece.factor();
    if (p.units) {
      factor *= p.scale;
      if (reads && p.length_scale != 0)
        factor *=
            p.length_scale * logf(static_cast<float>(p.seen.count(batch, static_cast<int>(token))));
      float numbers[kPiece] = {}, shift = 0;
      if (reads) {
        const float* center = p.centers + divide(own, p.group) * p.d + at;
#pragma unroll
        for (int e = 0; e < kPiece; ++e) {
          numbers[e] = piece.numbers[e] * factor;
          if (p.keys)
            numbers[e] -= center[e];
          else
            shift = fmaf(numbers[e], center[e], shift);
        }
        uint32_t units[kPiece / 2];
#pragma unroll
        for (int e = 0; e < kPiece; e += 2)
          units[e / 2] = sm90::pack<DType::kF16>(numbers[e], numbers[e + 1]);
        *reinterpret_cast<uint4*>(p.units + row * p.d + at) = {units[0], units[1], units[2],
                                                               units[3]};
      }
      if (!p.keys) {
        for (int lane = p.lanes / 2; lane > 0; lane /= 2)
          shift += __shfl_xor_sync(~0u, shift, lane);
        // of a row that is no number products are none; what is masked of it stays so
        if (reads && at == 0) p.shifts[own * p.s + token] = shift == shift ? shift : 0;
      }
    } else if (reads && at == 0) {
      p.factors[own * p.factor_row + token] = factor;
    }
    const bool outside = piece.largest != 0 && (piece.largest < kLeast || piece.largest > kMost);
    if (reads && at == 0 && outside && (!p.keys || token < p.seen.of(batch))) *p.strange = 1;
  }
}

}  // namespace
}  // namespace heddle
