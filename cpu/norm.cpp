#include "ops/norm.h"

#include <cmath>

#include "core/registry.h"
#include "cpu/walk.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

template <class T> void normalise(const Norm& op, const CpuContext& context) {
  constexpr int64_t kBlock = 2048;
  const int last = op.x.rank - 1;
  const int64_t d = op.x.shape[last], stride = op.x.strides[last];
  Scratch<float> weight(static_cast<size_t>(d));
  if (op.weight) {
    load_row(weight.data(), op.weight.as<T>(), op.weight.strides[0], d);
  } else {
    std::fill_n(weight.data(), d, 1.f);
  }
  const Walk<1> walk({&op.x}, last);
  walk.run(context, std::max<int64_t>(d, 1), [&](int64_t index, int64_t count, const auto& at) {
    Scratch<T> buffer(static_cast<size_t>(d));
    for (int64_t row = 0; row < count; ++row) {
      const T* x = gather(op.x.as<T>() + at[0] + row * walk.stride(0), stride, d, buffer.data());
      T* out = op.out.as<T>() + (index + row) * d;
      // A sum in f32 over many thousands would lose digits
      double squares = 0;
      for (int64_t i = 0; i < d; i += kBlock) squares += dot(x + i, x + i, std::min(kBlock, d - i));
      const auto factor =
          static_cast<float>(1 / std::sqrt(squares / static_cast<double>(d) + op.eps));
      int64_t i = 0;
      for (; i + kLanes <= d; i += kLanes)
        store(out + i, load(x + i) * factor * load(weight.data() + i));
      if (const int64_t rest = d - i)
        store(out + i, load(x + i, rest) * factor * load(weight.data() + i, rest), rest);
    }
  });
}

void run(const Norm& op, CpuContext& context) {
  dispatch_float(op.x.dtype, [&]<class T>(T) { normalise<T>(op, context); });
}

HEDDLE_REGISTER(Norm);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
