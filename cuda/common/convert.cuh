#pragma once
#include <cuda_fp8.h>

#include "common/elements.cuh"

// Conversions between all dtypes: floats by way of double, which holds every one of them, integers
// by way of int64.
namespace heddle {

__device__ __forceinline__ bool is_integer(DType dtype) { return dtype >= DType::kI32; }

__device__ inline double load_double(const char* p, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return *reinterpret_cast<const float*>(p);
    case DType::kF16:
      return to_float(*reinterpret_cast<const F16*>(p));
    case DType::kBF16:
      return to_float(*reinterpret_cast<const BF16*>(p));
    default: {
      const auto kind = dtype == DType::kE4M3 ? __NV_E4M3 : __NV_E5M2;
      const auto bits = *reinterpret_cast<const __nv_fp8_storage_t*>(p);
      return __half2float(F16(__nv_cvt_fp8_to_halfraw(bits, kind)));
    }
  }
}

__device__ inline int64_t load_integer(const char* p, DType dtype) {
  switch (dtype) {
    case DType::kI32:
      return *reinterpret_cast<const int32_t*>(p);
    case DType::kI64:
      return *reinterpret_cast<const int64_t*>(p);
    case DType::kU8:
      return *reinterpret_cast<const uint8_t*>(p);
    default:
      return *reinterpret_cast<const uint8_t*>(p) != 0;
  }
}

// The nearest number of a format with `e` bits of exponent and `m` of mantissa, ties to even;
// beyond the range infinity, or NaN in the format that has none
__device__ inline uint8_t encode_fp8(double x, int e, int m, bool finite) {
  const int bias = (1 << (e - 1)) - 1;
  const auto sign = static_cast<uint8_t>(signbit(x) ? 0x80 : 0);
  const uint8_t nan = finite ? 0x7f : 0x7e, infinity = finite ? 0x7f : 0x7c;
  if (isnan(x)) return sign | nan;
  const double magnitude = fabs(x);
  if (isinf(magnitude)) return sign | infinity;
  const int exponent = magnitude == 0 ? 1 - bias : max(ilogb(magnitude), 1 - bias);
  const double steps = rint(scalbn(magnitude, m - exponent));  // of the unit in the last place
  // Steps of a normal number count its leading bit, so that a carry moves on to the next exponent
  // by itself
  const int code = static_cast<int>(steps) + ((exponent + bias - 1) << m);
  const int last = finite ? 0x7e : 0x7b;
  return sign | (code > last ? infinity : static_cast<uint8_t>(code));
}

// To f32 such that a second rounding, to fewer digits, decides as if it were the only one
__device__ inline float round_to_odd(double x) {
  const float down = __double2float_rz(x);
  const bool exact = static_cast<double>(down) == x || !isfinite(down);
  return exact ? down : __uint_as_float(__float_as_uint(down) | 1);
}

__device__ inline void store_double(char* p, DType dtype, double x) {
  switch (dtype) {
    case DType::kF32:
      *reinterpret_cast<float*>(p) = static_cast<float>(x);
      return;
    case DType::kF16:
      *reinterpret_cast<F16*>(p) = __float2half_rn(round_to_odd(x));
      return;
    case DType::kBF16:
      *reinterpret_cast<BF16*>(p) = __float2bfloat16_rn(round_to_odd(x));
      return;
    case DType::kE4M3:
      *reinterpret_cast<uint8_t*>(p) = encode_fp8(x, 4, 3, true);
      return;
    case DType::kE5M2:
      *reinterpret_cast<uint8_t*>(p) = encode_fp8(x, 5, 2, false);
      return;
    // Conversions of the device truncate and saturate, but NaN becomes the least number
    case DType::kI32:
      *reinterpret_cast<int32_t*>(p) = isnan(x) ? 0 : __double2int_rz(x);
      return;
    case DType::kI64:
      *reinterpret_cast<int64_t*>(p) = isnan(x) ? 0 : __double2ll_rz(x);
      return;
    case DType::kU8:
      *reinterpret_cast<uint8_t*>(p) =
          isnan(x) ? 0 : static_cast<uint8_t>(__double2int_rz(fmin(fmax(x, 0.0), 255.0)));
      return;
    default:
      *reinterpret_cast<uint8_t*>(p) = x != 0;
      return;
  }
}

__device__ inline void store_integer(char* p, DType dtype, int64_t x) {
  switch (dtype) {
    case DType::kF32:
      *reinterpret_cast<float*>(p) = static_cast<float>(x);
      return;
    case DType::kI32:
      *reinterpret_cast<int32_t*>(p) =
          static_cast<int32_t>(min(max(x, int64_t{INT32_MIN}), int64_t{INT32_MAX}));
      return;
    case DType::kI64:
      *reinterpret_cast<int64_t*>(p) = x;
      return;
    case DType::kU8:
      *reinterpret_cast<uint8_t*>(p) = static_cast<uint8_t>(min(max(x, int64_t{0}), int64_t{255}));
      return;
    case DType::kBool:
      *reinterpret_cast<uint8_t*>(p) = x != 0;
      return;
    default: {
      // by way of f32 rounded to odd, since not even f64 holds every int64
      const float down = __ll2float_rz(x);
      const bool exact = __float2ll_rz(down) == x;
      return store_double(p, dtype, exact ? down : __uint_as_float(__float_as_uint(down) | 1));
    }
  }
}

}  // namespace heddle
