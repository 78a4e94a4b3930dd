#pragma once
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/half.h"

// Conversions between all dtypes, one element at a time.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {

struct Bool {
  uint8_t bits;
};

template <class Body> inline void dispatch_any(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kF32:
      return body(float{});
    case DType::kF16:
      return body(F16{});
    case DType::kBF16:
      return body(BF16{});
    case DType::kE4M3:
      return body(E4M3{});
    case DType::kE5M2:
      return body(E5M2{});
    case DType::kI32:
      return body(int32_t{});
    case DType::kI64:
      return body(int64_t{});
    case DType::kU8:
      return body(uint8_t{});
    default:
      return body(Bool{});
  }
}

// Floats as f32, integers as they are
template <class T> inline auto widen(T x) {
  if constexpr (std::is_arithmetic_v<T>) {
    return x;
  } else if constexpr (std::is_same_v<T, Bool>) {
    return static_cast<uint8_t>(x.bits != 0);
  } else {
    return to_float(x);
  }
}

// Floats round to nearest even, once; integers truncate and saturate, NaN gives 0; bool is x != 0
template <class T, class S> inline T convert(S x) {
  if constexpr (std::is_same_v<T, Bool>) {
    return {static_cast<uint8_t>(x != 0)};
  } else if constexpr (std::is_same_v<T, float>) {
    return static_cast<float>(x);
  } else if constexpr (!std::is_integral_v<T>) {
    // By way of f32, whose rounding is to odd, so that the second rounding decides as if it were
    // the only one
    float single = static_cast<float>(x);
    if constexpr (!std::is_same_v<S, float>) {
      const auto back = static_cast<double>(single), exact = static_cast<double>(x);
      auto bits = std::bit_cast<uint32_t>(single);
      if (back != exact && std::isfinite(single) && !(bits & 1)) {
        const bool away = std::abs(back) > std::abs(exact);
        single = std::bit_cast<float>(bits + (away ? -1u : 1u));
      }
    }
    return from_float<T>(single);
  } else if constexpr (std::is_integral_v<S>) {
    using Limits = std::numeric_limits<T>;
    const auto wide = static_cast<int64_t>(x);
    if (wide < static_cast<int64_t>(Limits::min())) return Limits::min();
    if (wide > static_cast<int64_t>(Limits::max())) return Limits::max();
    return static_cast<T>(wide);
  } else {
    using Limits = std::numeric_limits<T>;
    const auto number = static_cast<double>(x);
    if (std::isnan(number)) return 0;
    if (number <= static_cast<double>(Limits::min())) return Limits::min();
    if (number >= static_cast<double>(Limits::max())) return Limits::max();
    return static_cast<T>(number);
  }
}

}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
