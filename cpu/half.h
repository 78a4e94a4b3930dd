#pragma once
#include "core/dtype.h"
#include "core/error.h"
#include "cpu/simd.h"

// Storage formats narrower than f32, as numbers and as vectors.
//
//   float x = to_float(p[i]);               p[i] = from_float<BF16>(x);
//   Vec x = load(p + i);                    store(p + i, x), load(p, count), store(p, x, count)
//   load_row(to, from, stride, n);          n elements as contiguous f32
//   store_row(to, stride, from, n);         and back
//   dispatch_float(tensor.dtype, [&]<class T>(T) { run<T>(op, context); });
//
// T is float, F16 or BF16 in the last line, and E4M3 or E5M2 too elsewhere.
//
// Rounding is to nearest even. Beyond the range f16, bf16 and e5m2 give infinity and e4m3, which
// has none, gives NaN.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
struct E4M3 {
  uint8_t bits;
};
struct E5M2 {
  uint8_t bits;
};

// The codecs are written once: I is int32_t with F = float, or Int with F = Vec.

// A sign, `e` bits of exponent with the usual bias and `m` of mantissa; `finite` formats have no
// infinity, only one NaN
template <int e, int m, bool finite, class F, class I> HEDDLE_INLINE I encode_small(F x) {
  constexpr int bias = (1 << (e - 1)) - 1, shift = 23 - m;
  constexpr int32_t infinity = ((1 << e) - 1) << m,
                    nan = finite ? infinity | ((1 << m) - 1) : infinity;
  const I bits = std::bit_cast<I>(x), magnitude = bits & 0x7fffffff;
  // Adding a number whose last bit is the smallest subnormal rounds to a multiple of that
  constexpr int32_t magic = (127 + 1 - bias - m + 23) << 23;
  const I subnormal =
      std::bit_cast<I>(std::bit_cast<F>(magnitude) + std::bit_cast<float>(magic)) - magic;
  I code =
      (magnitude - ((127 - bias) << 23) + ((1 << (shift - 1)) - 1) + ((magnitude >> shift) & 1)) >>
      shift;
  code = magnitude < ((128 - bias) << 23) ? subnormal : code;
  code = code > nan ? I{} + nan : code;
  if (!finite) {
    // A NaN stays one, quiet and with the leading bits of its payload
    const I quiet = (magnitude >> shift & ((1 << m) - 1)) | infinity | 1 << (m - 1);
    code = magnitude > 0x7f800000 ? quiet : code;
  }
  return code | ((bits >> (31 - e - m)) & (1 << (e + m)));
}

template <int e, int m, bool finite, class F, class I> HEDDLE_INLINE F decode_small(I code) {
  constexpr int bias = (1 << (e - 1)) - 1, shift = 23 - m;
  constexpr int32_t infinity = ((1 << e) - 1) << m;
  const I magnitude = code & ((1 << (e + m)) - 1);
  const I sign = (code & (1 << (e + m))) << (31 - e - m);
  const F scaled =
      std::bit_cast<F>(magnitude << shift) * std::bit_cast<float>((127 + 127 - bias) << 23);
  const I special =
      (magnitude << shift) | 0x7f800000 | (magnitude > infinity ? I{} + 0x400000 : I{});
  const int32_t last_finite = finite ? (infinity | ((1 << m) - 1)) - 1 : infinity - 1;
  const I bits = magnitude > last_finite ? special : std::bit_cast<I>(scaled);
  return std::bit_cast<F>(bits | sign);
}

template <class T> struct Codec;
template <> struct Codec<F16> {
  template <class F, class I> static HEDDLE_INLINE I encode(F x) {
    return encode_small<5, 10, false, F, I>(x);
  }
  template <class F, class I> static HEDDLE_INLINE F decode(I x) {
    return decode_small<5, 10, false, F, I>(x);
  }
};
template <> struct Codec<E5M2> {
  template <class F, class I> static HEDDLE_INLINE I encode(F x) {
    return encode_small<5, 2, false, F, I>(x);
  }
  template <class F, class I> static HEDDLE_INLINE F decode(I x) {
    return decode_small<5, 2, false, F, I>(x);
  }
};
template <> struct Codec<E4M3> {
  template <class F, class I> static HEDDLE_INLINE I encode(F x) {
    return encode_small<4, 3, true, F, I>(x);
  }
  template <class F, class I> static HEDDLE_INLINE F decode(I x) {
    return decode_small<4, 3, true, F, I>(x);
  }
};
template <> struct Codec<BF16> {
  template <class F, class I> static HEDDLE_INLINE I encode(F x) {
    const I bits = std::bit_cast<I>(x);
    const I rounded = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | 0x400000;
    return (((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded) >> 16) & 0xffff;
  }
  template <class F, class I> static HEDDLE_INLINE F decode(I x) {
    return std::bit_cast<F>(x << 16);
  }
};

inline float to_float(float x) { return x; }
template <class T> inline float to_float(T x) {
  return Codec<T>::template decode<float, int32_t>(x.bits);
}

template <class T> inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return {static_cast<decltype(T::bits)>(Codec<T>::template encode<float, int32_t>(x))};
  }
}

template <class T> HEDDLE_INLINE Vec load(const T* p) {
#if HEDDLE_ISA >= 1
  if constexpr (std::is_same_v<T, F16>) {
#if HEDDLE_ISA == 2
    // gcc 12 warns about the unmasked form's undefined operand
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
  }
#endif
  typename VectorOf<decltype(T::bits), kLanes>::type narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  return Codec<T>::template decode<Vec, Int>(__builtin_convertvector(narrow, Int));
}

template <class T> HEDDLE_INLINE void store(T* p, Vec x) {
#if HEDDLE_ISA >= 1
  if constexpr (std::is_same_v<T, F16>) {
#if HEDDLE_ISA == 2
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, x, 0));
#else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0));
#endif
    return;
  }
#endif
  using Narrow = typename VectorOf<decltype(T::bits), kLanes>::type;
  const Narrow narrow = __builtin_convertvector((Codec<T>::template encode<Vec, Int>(x)), Narrow);
  std::memcpy(p, &narrow, sizeof narrow);
}

// The first `count` lanes
template <class T> HEDDLE_INLINE Vec load(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}
template <class T> HEDDLE_INLINE void store(T* p, Vec x, int64_t count) {
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

// n elements `stride` apart to contiguous f32
template <class T> inline void load_row(float* to, const T* from, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride != 1) {
    for (; i < n; ++i) to[i] = to_float(from[i * stride]);
    return;
  }
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, n - i), n - i);
}

template <class T> inline void store_row(T* to, int64_t stride, const float* from, int64_t n) {
  int64_t i = 0;
  if (stride != 1) {
    for (; i < n; ++i) to[i * stride] = from_float<T>(from[i]);
    return;
  }
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, n - i), n - i);
}

// Contiguous rows of any of the formats
template <class A, class B> HEDDLE_INLINE float dot(const A* a, const B* b, int64_t n) {
  Vec even = zero(), odd = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    even += load(a + i) * load(b + i);
    odd += load(a + i + kLanes) * load(b + i + kLanes);
  }
  if (i + kLanes <= n) even += load(a + i) * load(b + i), i += kLanes;
  if (i < n) odd += load(a + i, n - i) * load(b + i, n - i);
  return reduce_add(even + odd);
}

// Calls body(T{}) with the type that a float dtype is stored as
template <class Body> inline void dispatch_float(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kF32:
      return body(float{});
    case DType::kF16:
      return body(F16{});
    case DType::kBF16:
      return body(BF16{});
    default:
      fail(Code::kDType, "dtype", concat("dtype must be a float, got ", name_of(dtype)));
  }
}

}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
