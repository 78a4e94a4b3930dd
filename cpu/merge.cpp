#include "ops/merge.h"

#include <cmath>
#include <utility>

#include "core/registry.h"
#include "cpu/walk.h"

// The weights are exp(lse - top) with the larger lse as top, so that nothing overflows:
//
//   out = (wa out_a + wb out_b) / (wa + wb),  lse = top + log(wa + wb)
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

struct Weights {
  float a, b, lse;
};

Weights weigh(float lse_a, float lse_b) {
  const float top = lse_a > lse_b || std::isnan(lse_a) ? lse_a : lse_b;
  if (top == -INFINITY) return {0, 0, -INFINITY};
  const float a = std::exp(lse_a - top), b = std::exp(lse_b - top);
  return {a / (a + b), b / (a + b), top + std::log(a + b)};
}

// out[i] = wa a[i] + wb b[i]; a side without weight is not read, as it may hold anything
template <class T>
void join(T* out, int64_t d, const Weights& weights, const T* a, int64_t stride_a, const T* b,
          int64_t stride_b) {
  constexpr int64_t kBlock = 256;
  T left[kBlock], right[kBlock];
  const Vec wa = splat(weights.a), wb = splat(weights.b);
  for (int64_t at = 0; at < d; at += kBlock) {
    const int64_t n = std::min(kBlock, d - at);
    const T* x = weights.a == 0 ? nullptr : gather(a + at * stride_a, stride_a, n, left);
    const T* y = weights.b == 0 ? nullptr : gather(b + at * stride_b, stride_b, n, right);
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, n - i);
      const auto read = [&](const T* p) { return count == kLanes ? load(p) : load(p, count); };
      Vec sum = zero();
      if (x) sum += wa * read(x + i);
      if (y) sum += wb * read(y + i);
      if (count == kLanes) {
        store(out + at + i, sum);
      } else {
        store(out + at + i, sum, count);
      }
    }
  }
}

template <class T> void merge(const Merge& op, const CpuContext& context) {
  const int64_t d = op.out.shape[3];
  // lse as [b, s, h], in the order of the outputs
  const auto by_token = [](Tensor lse) {
    std::swap(lse.shape[1], lse.shape[2]);
    std::swap(lse.strides[1], lse.strides[2]);
    return lse;
  };
  const Tensor lse_a = by_token(op.lse_a), lse_b = by_token(op.lse_b), lse = by_token(op.lse);
  const Walk<5> walk({&op.out_a, &op.out_b, &lse_a, &lse_b, &lse}, 3);
  walk.run(context, std::max<int64_t>(d, 1), [&](int64_t index, int64_t count, const auto& at) {
    for (int64_t i = 0; i < count; ++i) {
      const auto offset = [&](int n) { return at[n] + i * walk.stride(n); };
      const Weights weights = weigh(lse_a.as<float>()[offset(2)], lse_b.as<float>()[offset(3)]);
      lse.as<float>()[offset(4)] = weights.lse;
      join(op.out.as<T>() + (index + i) * d, d, weights, op.out_a.as<T>() + offset(0),
           op.out_a.strides[3], op.out_b.as<T>() + offset(1), op.out_b.strides[3]);
    }
  });
}

void run(const Merge& op, CpuContext& context) {
  dispatch_float(op.out.dtype, [&]<class T>(T) { merge<T>(op, context); });
}

HEDDLE_REGISTER(Merge);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
