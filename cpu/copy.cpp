#include "ops/copy.h"

#include "core/registry.h"
#include "cpu/convert.h"
#include "cpu/walk.h"

// Conversions to a float round once, to nearest even. Beyond the range float16, bfloat16 and
// float8_e5m2 give infinity; float8_e4m3fn has none and gives NaN, as casts in PyTorch do. Floats
// and wider integers saturate when they become integers.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

template <class T> constexpr bool kIsFloat = !std::is_integral_v<T> && !std::is_same_v<T, Bool>;

// Integers above 2^53 lose their low bits on the way through double; the last one that remains
// says whether any was set, so that ties stay ties and nothing else becomes one
template <class T, class S> S prepared(S x) {
  if constexpr (std::is_same_v<S, int64_t> && kIsFloat<T> && !std::is_same_v<T, float>) {
    if (x >= int64_t{1} << 53 || x <= -(int64_t{1} << 53))
      return (x & ~int64_t{2047}) | (x & 2047 ? 2048 : 0);
  }
  return x;
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

// Same shapes; overlapping regions are the caller's fault
void copy(const Tensor& to, const Tensor& x, const CpuContext& context) {
  const Walk<2> walk({&to, &x}, to.rank);
  const auto each = [&]<class T, class S>(T*, S*, const auto& row) {
    walk.run(context, 1, [&](int64_t, int64_t count, const auto& at) {
      row(to.as<T>() + at[0], walk.stride(0), x.as<S>() + at[1], walk.stride(1), count);
    });
  };
  if (x.dtype == to.dtype) {
    return dispatch_size(size_of(to.dtype), [&]<class T>(T) {
      each(static_cast<T*>(nullptr), static_cast<T*>(nullptr), copy_row<T>);
    });
  }
  dispatch_any(x.dtype, [&]<class S>(S) {
    dispatch_any(to.dtype, [&]<class T>(T) {
      if constexpr (!std::is_same_v<T, S>)
        each(static_cast<T*>(nullptr), static_cast<S*>(nullptr), convert_row<T, S>);
    });
  });
}

// Rows of one side may be columns of the other. Then each row would touch a cache line per element;
// in stripes a few rows wide both sides use the whole of their lines. Wider ones would not fit the
// ways of a cache when strides are powers of two.
constexpr int64_t kStripe = 8;

// The dimension along which the side lies that does not lie along the last one, or -1
int crosswise(const Tensor& to, const Tensor& x) {
  const int last = to.rank - 1;
  if (to.rank < 2 || to.rank == kMaxRank || to.shape[last] < kStripe) return -1;
  if ((to.strides[last] == 1) == (x.strides[last] == 1)) return -1;
  const Tensor& other = to.strides[last] == 1 ? x : to;
  for (int i = 0; i < last; ++i)
    if (other.strides[i] == 1 && to.shape[i] >= kStripe) return i;
  return -1;
}

// `size` places of one dimension from `begin` on
Tensor part(Tensor tensor, int dimension, int64_t begin, int64_t size) {
  tensor.data = tensor.as<char>() +
                begin * tensor.strides[dimension] * static_cast<int64_t>(size_of(tensor.dtype));
  tensor.shape[dimension] = size;
  return tensor;
}

// The places of one dimension in stripes, whose inside comes last
Tensor striped(Tensor tensor, int dimension) {
  tensor.shape[tensor.rank] = kStripe;
  tensor.strides[tensor.rank] = tensor.strides[dimension];
  ++tensor.rank;
  tensor.shape[dimension] /= kStripe;
  tensor.strides[dimension] *= kStripe;
  return tensor;
}

void run(const Copy& op, CpuContext& context) {
  const int along = crosswise(op.to, op.x);
  if (along < 0) return copy(op.to, op.x, context);
  const int64_t size = op.to.shape[along], whole = size / kStripe * kStripe;
  const auto stripes = [&](const Tensor& x) { return striped(part(x, along, 0, whole), along); };
  copy(stripes(op.to), stripes(op.x), context);
  copy(part(op.to, along, whole, size - whole), part(op.x, along, whole, size - whole), context);
}

HEDDLE_REGISTER(Copy);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
