#include "ops/copy.h"

#include <cstring>

#include "core/registry.h"
#include "cpu/convert.h"
#include "cpu/walk.h"

// Conversions to a float round once, to nearest even. Beyond the range float16, bfloat16 and
// float8_e5m2 give infinity; float8_e4m3fn has none and gives NaN, as casts in PyTorch do. Floats
// and wider integers saturate when they become integers.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

template <class T>
constexpr bool kIsFloat = !std::is_integral_v<T> && !std::is_same_v<T, Bool>;

// Integers above 2^53 lose their low bits on the way through double; the last one that remains
// says whether any was set, so that ties stay ties and nothing else becomes one
template <class T, class S> S prepared(S x) {
  if constexpr (std::is_same_v<S, int64_t> && kIsFloat<T> && !std::is_same_v<T, float>) {
    if (x >= int64_t{1} << 53 || x <= -(int64_t{1} << 53))
      return (x & ~int64_t{2047}) | (x & 2047 ? 2048 : 0);
  }
  return x;
}

// Copies elements of one size whatever they are
template <class T>
void copy_row(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t n) {
  if (to_stride == 1 && from_stride == 1) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
  }
}

template <class T, class S>
void convert_row(T* to, int64_t to_stride, const S* from, int64_t from_stride, int64_t n) {
  const auto one = [](S x) { return convert<T>(prepared<T>(widen(x))); };
  if (to_stride != 1 || from_stride != 1) {
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = one(from[i * from_stride]);
  } else if constexpr (kIsFloat<T> && kIsFloat<S>) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i, n - i), n - i);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = one(from[i]);
  }
}

template <class Body> void dispatch_size(size_t nbytes, const Body& body) {
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

void run(const Copy& op, CpuContext& context) {
  const Walk<2> walk({&op.to, &op.x}, op.to.rank);
  const auto each = [&]<class T, class S>(T*, S*, const auto& row) {
    walk.run(context, 1, [&](int64_t, int64_t count, const auto& at) {
      row(op.to.as<T>() + at[0], walk.stride(0), op.x.as<S>() + at[1], walk.stride(1), count);
    });
  };
  if (op.x.dtype == op.to.dtype) {
    return dispatch_size(size_of(op.to.dtype), [&]<class T>(T) {
      each(static_cast<T*>(nullptr), static_cast<T*>(nullptr), copy_row<T>);
    });
  }
  dispatch_any(op.x.dtype, [&]<class S>(S) {
    dispatch_any(op.to.dtype, [&]<class T>(T) {
      if constexpr (!std::is_same_v<T, S>)
        each(static_cast<T*>(nullptr), static_cast<S*>(nullptr), convert_row<T, S>);
    });
  });
}

HEDDLE_REGISTER(Copy);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
