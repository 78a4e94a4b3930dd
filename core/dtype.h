#pragma once
#include <cstddef>
#include <cstdint>

namespace heddle {

// The order is the numbering that crosses the boundary; lib/dtype.ts lists the same names in the
// same order.
enum class DType : uint8_t { kF32, kF16, kBF16, kE4M3, kE5M2, kI32, kI64, kU8, kBool };
inline constexpr int kDTypeCount = 9;

constexpr size_t size_of(DType dtype) {
  constexpr size_t kSizes[kDTypeCount] = {4, 2, 2, 1, 1, 4, 8, 1, 1};
  return kSizes[static_cast<int>(dtype)];
}

// Calls the body with a number that has as many bytes as an element
template <class Body> constexpr void dispatch_size(size_t nbytes, const Body& body) {
  switch (nbytes) {
    case 1:
      return body(uint8_t{});
    case 2:
      return body(uint16_t{});
    case 4:
      return body(uint32_t{});
    default:
      return body(uint64_t{});
  }
}

// As TypeScript spells it
constexpr const char* name_of(DType dtype) {
  constexpr const char* kNames[kDTypeCount] = {"float32",       "float16",     "bfloat16",
                                               "float8_e4m3fn", "float8_e5m2", "int32",
                                               "int64",         "uint8",       "bool"};
  return kNames[static_cast<int>(dtype)];
}

// A set of dtypes, one bit each
struct DTypes {
  uint32_t bits = 0;
  constexpr bool has(DType dtype) const { return bits >> static_cast<int>(dtype) & 1; }
};

constexpr DTypes operator|(DType a, DType b) {
  return {1u << static_cast<int>(a) | 1u << static_cast<int>(b)};
}
constexpr DTypes operator|(DTypes a, DType b) { return {a.bits | 1u << static_cast<int>(b)}; }

inline constexpr DTypes kF32{1u << static_cast<int>(DType::kF32)};
inline constexpr DTypes kI32{1u << static_cast<int>(DType::kI32)};
inline constexpr DTypes kFloats = DType::kF32 | DType::kF16 | DType::kBF16;
inline constexpr DTypes kAny{(1u << kDTypeCount) - 1};

}  // namespace heddle
