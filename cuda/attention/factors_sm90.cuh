#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "attention/forward_sm90.h"
#include "common/lanes.cuh"
#include "common/sm90.cuh"

// One over the lengths of rows of q or k, for cosines, or the rows themselves at length 1. Half as
// many threads take a row as it has pieces of 16 bytes, up to the next power of two.
namespace heddle {
namespace {

constexpr int kPiece = 8, kPieces = 2;  // numbers of 16 bits, and how many of these a thread has

struct FactorArgs {
  const uint16_t* x;  // [b, s, h, d]
  Strides strides;
  int s, h;
  float scale, length_scale;  // of units, the second with the log of how many keys a row sees
  SeenKeys seen;
  int64_t rows;  // of all
  int d, lanes;
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
  const auto pieces = static_cast<uint64_t>(call.d / kPiece);
  return {static_cast<const uint16_t*>(call.q),
          call.q_strides,
          static_cast<int>(call.sq),
          static_cast<int>(call.hq),
          call.scale * 1.44269504f,
          call.slots.length_scale,
          SeenKeys(call),
          call.b * call.sq * call.hq,
          static_cast<int>(call.d),
          static_cast<int>(std::max<uint64_t>(std::bit_ceil(pieces) / kPieces, 1))};
}
inline FactorArgs k_rows(const ForwardCall& call) {
  FactorArgs args = q_rows(call);
  args.x = static_cast<const uint16_t*>(call.k);
  args.strides = call.k_strides;
  args.s = static_cast<int>(call.sk);
  args.h = static_cast<int>(call.hk);
  args.rows = call.b * call.sk * call.hk;
  args.scale = 1;
  args.length_scale = 0;
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

// Where a row is, in the order in which they mostly lie
struct RowPlace {
  int64_t row;
  int batch, token, head;
  __device__ RowPlace(int64_t row, const FactorArgs& p) : row(row) {
    const int64_t line = divide(row, p.h);
    head = static_cast<int>(row - line * p.h);
    batch = static_cast<int>(divide(line, p.s));
    token = static_cast<int>(line - int64_t{batch} * p.s);
  }
  // Farther by as many rows as there are before another place
  __device__ void move(const RowPlace& by, const FactorArgs& p) {
    row += by.row;
    head += by.head;
    const int next_token = head >= p.h;
    head -= next_token * p.h;
    token += by.token + next_token;
    const int next_batch = token >= p.s;
    token -= next_batch * p.s;
    batch += by.batch + next_batch;
  }
};

// A thread's pieces of a row, and of all pieces together the sum of the squares
struct RowPieces {
  uint4 pieces[kPieces];
  float square;

  // Pieces lie apart by those of the other threads of the row
  template <class Body> __device__ static void each(const FactorArgs& p, const Body& body) {
    const int at = static_cast<int>(threadIdx.x) & (p.lanes - 1);
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (const int column = (at + i * p.lanes) * kPiece; column < p.d) body(i, column);
  }
  __device__ __forceinline__ void load(const FactorArgs& p, const RowPlace& at, bool exists) {
#pragma unroll
    for (uint4& piece : pieces) piece = uint4{};
    const uint16_t* row =
        p.x + at.batch * p.strides.batch + at.token * p.strides.row + at.head * p.strides.head;
    if (exists)
      each(p,
           [&](int i, int column) { pieces[i] = *reinterpret_cast<const uint4*>(row + column); });
  }
  template <DType kType> __device__ __forceinline__ float number(int i, int e) const {
    const uint32_t words[] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
    return sm90::unpack<kType>(static_cast<uint16_t>(words[e / 2] >> e % 2 * 16));
  }
  template <DType kType> __device__ __forceinline__ void measure(int lanes) {
    square = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int e = 0; e < kPiece; ++e)
        square = fmaf(number<kType>(i, e), number<kType>(i, e), square);
    square = warp_sum(square, lanes);
  }
  __device__ __forceinline__ float factor() const { return square == 0 ? 0 : 1 / sqrtf(square); }
  // Whether it has numbers and none, or too large ones, whose products f32 surely holds
  __device__ __forceinline__ bool is_strange(int lanes) const {
    uint32_t bits = 0;
#pragma unroll
    for (const uint4& piece : pieces) bits |= piece.x | piece.y | piece.z | piece.w;
    const unsigned row = ((1u << lanes) - 1) << (threadIdx.x % 32 & ~(lanes - 1));
    const bool any = (__ballot_sync(~0u, (bits & 0x7fff7fff) != 0) & row) != 0;
    return any && (square < 0x1p-53f || square > 0x1p60f);
  }
};

// What the first keys of a head have in common: one in sixteen of all, at most sixteen. What a row
// gets depends on no key behind both it and them.
constexpr int kCentered = 16, kCenterThreads = kCentered * kSlotColumns / (kPieces * kPiece);
template <DType kType> __global__ void attention_center_kernel(FactorArgs p) {
  __shared__ float units[kCentered][kSlotColumns];
  const int head = static_cast<int>(blockIdx.x) % p.h, batch = static_cast<int>(blockIdx.x) / p.h;
  const int thread = static_cast<int>(threadIdx.x), row = thread / p.lanes;
  const int count = min(p.seen.of(batch) / kCentered, kCentered);
  if (blockIdx.x == 0 && thread == 0) *p.strange = 0;
  const RowPlace place((int64_t{batch} * p.s + row) * p.h + head, p);
  RowPieces own;
  own.load(p, place, row < count);
  own.measure<kType>(p.lanes);
  // not of rows that are no numbers
  const float factor = own.square < INFINITY ? own.factor() : 0;
  if (row < kCentered)
    RowPieces::each(p, [&](int i, int column) {
#pragma unroll
      for (int e = 0; e < kPiece; ++e)
        units[row][column + e] = factor == 0 ? 0 : own.number<kType>(i, e) * factor;
    });
  __syncthreads();
  for (int i = thread; i < p.d; i += kCenterThreads) {
    float sum = 0;
    for (int j = 0; j < count; ++j) sum += units[j][i];
    p.centers[int64_t{blockIdx.x} * p.d + i] = count == 0 ? 0 : sum / static_cast<float>(count);
  }
}

// Block `block` of `blocks`; two rows of a thread are on their way at a time
template <DType kType, bool kKeys>
__device__ __forceinline__ void write_factors(const FactorArgs& p, int block, int blocks) {
  constexpr int kAhead = 2;
  const int together = static_cast<int>(blockDim.x) / p.lanes;
  const int lane = static_cast<int>(threadIdx.x) & (p.lanes - 1);
  int64_t first = int64_t{block} * together;
  RowPlace place(first + static_cast<int>(threadIdx.x) / p.lanes, p);
  const RowPlace step(int64_t{blocks} * together, p);
  float center[kPieces][kPiece] = {};
  int64_t of_center = -1;
  // the lanes of a row behind the last one, too
  for (; first < p.rows; first += kAhead * step.row) {
    RowPieces rows[kAhead];
    RowPlace places[kAhead]{place, place};
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      places[n] = place;
      rows[n].load(p, place, place.row < p.rows);
      place.move(step, p);
    }
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      RowPieces& row = rows[n];
      const RowPlace& at = places[n];
      const bool exists = at.row < p.rows;
      const int64_t own = int64_t{at.batch} * p.h + at.head;
      row.measure<kType>(p.lanes);
      float factor = row.factor();
      if (row.is_strange(p.lanes) && exists && lane == 0 &&
          (!kKeys || at.token < p.seen.of(at.batch)))
        *p.strange = 1;
      if (!p.units) {
        if (exists && lane == 0) p.factors[own * p.factor_row + at.token] = factor;
        continue;
      }
      factor *= p.scale;
      if (exists && p.length_scale != 0)
        factor *= p.length_scale * logf(static_cast<float>(p.seen.count(at.batch, at.token)));
      const int64_t kept = divide(own, p.group);
      if (exists && kept != of_center) {
        of_center = kept;
        RowPieces::each(p, [&](int i, int column) {
#pragma unroll
          for (int e = 0; e < kPiece; ++e) center[i][e] = p.centers[kept * p.d + column + e];
        });
      }
      float shift = 0;
      if (exists)
        RowPieces::each(p, [&](int i, int column) {
          uint32_t units[kPiece / 2];
#pragma unroll
          for (int e = 0; e < kPiece; e += 2) {
            float pair[] = {row.number<kType>(i, e) * factor, row.number<kType>(i, e + 1) * factor};
#pragma unroll
            for (int x = 0; x < 2; ++x)
              if (kKeys)
                pair[x] -= center[i][e + x];
              else
                shift = fmaf(pair[x], center[i][e + x], shift);
            units[e / 2] = sm90::pack<DType::kF16>(pair[0], pair[1]);
          }
          *reinterpret_cast<uint4*>(p.units + at.row * p.d + column) = {units[0], units[1],
                                                                        units[2], units[3]};
        });
      if constexpr (!kKeys) {
        shift = warp_sum(shift, p.lanes);
        // of a row that is no number products are none; what is masked of it stays so
        if (exists && lane == 0) p.shifts[own * p.s + at.token] = shift == shift ? shift : 0;
      }
    }
  }
}

// The first blocks take queries, the others keys
constexpr int kFactorThreads = 256;
template <DType kType>
__global__ void __launch_bounds__(kFactorThreads, 3)
    attention_factor_kernel(FactorArgs q, FactorArgs k, int blocks_of_q) {
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (block < blocks_of_q)
    write_factors<kType, false>(q, block, blocks_of_q);
  else
    write_factors<kType, true>(k, block - blocks_of_q, blocks - blocks_of_q);
}

}  // namespace
}  // namespace heddle
