#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Vectors of f32 as wide as the instruction set has them. Everything in cpu/ lives in
// namespace heddle::HEDDLE_ISA_NAMESPACE, because each file is compiled once per instruction set.
//
//   Vec x = load(p);               kLanes floats from anywhere; load(p, count) pads with zeros
//   store(p, x * splat(2) + y);    + - * / and comparisons work as on numbers; store(p, x, count)
//   Vec y = x > zero() ? x : -x;   a comparison gives a Mask, which ?: takes
//   float s = reduce_add(exp(x));  also exp2, tanh, sigmoid, max, min, reduce_max
//
//   for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)));
//   if (i < n) store(y + i, f(load(x + i, n - i)), n - i);
//
// half.h has the same load and store for f16, bf16 and fp8.
#ifndef HEDDLE_ISA
#define HEDDLE_ISA 0
#endif
#if HEDDLE_ISA == 2
#define HEDDLE_ISA_NAMESPACE isa_avx512
#elif HEDDLE_ISA == 1
#define HEDDLE_ISA_NAMESPACE isa_avx2
#else
#define HEDDLE_ISA_NAMESPACE isa_baseline
#endif

#define HEDDLE_INLINE inline __attribute__((always_inline))

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {

inline constexpr int kVecBytes = HEDDLE_ISA == 2 ? 64 : HEDDLE_ISA == 1 ? 32 : 16;
inline constexpr int kLanes = kVecBytes / 4;
// How many vectors a kernel can hold
#if defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = HEDDLE_ISA == 2 ? 32 : 16;
#endif

template <class T, int n> struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * n)));
};
using Vec = VectorOf<float, kLanes>::type;
using Int = VectorOf<int32_t, kLanes>::type;
using Mask = Int;  // all bits of a lane set, or none

HEDDLE_INLINE Vec splat(float x) { return x - Vec{}; }
HEDDLE_INLINE Int splat_int(int32_t x) { return x - Int{}; }
HEDDLE_INLINE Vec zero() { return Vec{}; }
// 0, 1, 2, ...
HEDDLE_INLINE Int iota() {
  Int lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

HEDDLE_INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
HEDDLE_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
HEDDLE_INLINE Int load_int(const int32_t* p) {
  Int x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// The first `count` lanes, 0 <= count <= kLanes; nothing else is touched
HEDDLE_INLINE Vec load(const float* p, int64_t count) {
#if HEDDLE_ISA == 2
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  Vec x{};
  std::memcpy(&x, p, static_cast<size_t>(count) * 4);
  return x;
#endif
}
HEDDLE_INLINE void store(float* p, Vec x, int64_t count) {
#if HEDDLE_ISA == 2
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), x);
#else
  std::memcpy(p, &x, static_cast<size_t>(count) * 4);
#endif
}

// If either is NaN the second one comes back
HEDDLE_INLINE Vec max(Vec a, Vec b) {
#if HEDDLE_ISA == 2
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif HEDDLE_ISA == 1
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
HEDDLE_INLINE Vec min(Vec a, Vec b) { return -max(-a, -b); }
HEDDLE_INLINE Vec abs(Vec x) { return std::bit_cast<Vec>(std::bit_cast<Int>(x) & 0x7fffffff); }

using Quad = VectorOf<float, 4>::type;

template <class Combine> HEDDLE_INLINE float reduce(Vec x, Combine combine) {
#if HEDDLE_ISA == 2
  const auto half = combine(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                            __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const auto half = x;
#endif
#if HEDDLE_ISA >= 1
  Quad quad = combine(__builtin_shufflevector(half, half, 0, 1, 2, 3),
                      __builtin_shufflevector(half, half, 4, 5, 6, 7));
#else
  Quad quad = half;
#endif
  quad = combine(quad, __builtin_shufflevector(quad, quad, 2, 3, 0, 1));
  quad = combine(quad, __builtin_shufflevector(quad, quad, 1, 0, 3, 2));
  return quad[0];
}
HEDDLE_INLINE float reduce_add(Vec x) {
  return reduce(x, [](auto a, auto b) { return a + b; });
}
HEDDLE_INLINE float reduce_max(Vec x) {
  return reduce(x, [](auto a, auto b) { return a > b ? a : b; });
}
HEDDLE_INLINE bool any(Mask mask) {
#if HEDDLE_ISA == 2
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif HEDDLE_ISA == 1
  return _mm256_movemask_ps(std::bit_cast<Vec>(mask)) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

// 2^x for x <= 127, within 1.5 ulp; 0 below -126.5, -inf included
HEDDLE_INLINE Vec exp2_to_127(Vec x) {
  x = max(splat(-127.f), x);
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits, here with the
  // exponent's bias
  const Vec shifted = x + 12582912.f + 127.f;
  const Vec fraction = x - (shifted - (12582912.f + 127.f));
  Vec p = splat(1.53533619e-4f);
  p = p * fraction + 1.33988745e-3f;
  p = p * fraction + 9.61843736e-3f;
  p = p * fraction + 5.55033247e-2f;
  p = p * fraction + 2.40226479e-1f;
  p = p * fraction + 6.93147203e-1f;
  p = p * fraction + 1.f;
  return p * std::bit_cast<Vec>(std::bit_cast<Int>(shifted) << 23);
}

// e^x within 2 ulp: subnormal results, overflow to +inf and NaN as they should be
HEDDLE_INLINE Vec exp(Vec x) {
  x = max(splat(-104.f), -max(splat(-89.f), -x));
  const Vec shifted = x * 1.44269504f + 12582912.f;
  const Vec n = shifted - 12582912.f;
  const Vec f = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = splat(1.38145998e-3f);
  p = p * f + 8.36871689e-3f;
  p = p * f + 4.16683880e-2f;
  p = p * f + 1.66665206e-1f;
  p = p * f + 4.99999934e-1f;
  p = p * (f * f) + f + 1.f;
  // In two steps, as 2^n alone may leave the range
  const Int whole = std::bit_cast<Int>(shifted) - 0x4B400000;
  const Int half = whole >> 1;
  p = p * std::bit_cast<Vec>((half + 127) << 23);
  return p * std::bit_cast<Vec>((whole - half + 127) << 23);
}

HEDDLE_INLINE Vec sigmoid(Vec x) { return 1.f / (1.f + exp(-x)); }

// Within 3 ulp, for small x too
HEDDLE_INLINE Vec tanh(Vec x) {
  const Vec magnitude = abs(x), square = x * x;
  Vec p = splat(-5.71704495e-3f);
  p = p * square + 2.06505872e-2f;
  p = p * square - 5.37434981e-2f;
  p = p * square + 1.33314913e-1f;
  p = p * square - 3.33332839e-1f;
  const Vec small = p * square * x + x;
  const Vec large = 1.f - 2.f / (exp(2.f * magnitude) + 1.f);
  const Int sign = std::bit_cast<Int>(x) & INT32_MIN;
  return magnitude < 0.625f ? small : std::bit_cast<Vec>(std::bit_cast<Int>(large) | sign);
}

}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
