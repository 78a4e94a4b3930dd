#include "odd.h"

#include <vector>

#include "core/registry.h"
#include "cpu/convert.h"
#include "cpu/walk.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

bool leaves_out(int64_t digits, int64_t list) {
  for (; digits > 0; digits /= 10)
    if (digits % 10 == list) return true;
  return false;
}

void run(const Odd& op, CpuContext& context) {
  const int64_t lists = op.items.shape[0], length = op.items.shape[1], bins = op.bins;
  std::vector<float> found(static_cast<size_t>(lists * (bins + 1)));
  context.parallel(lists, [&](int64_t list, int) {
    float* counts = found.data() + list * (bins + 1);
    const int32_t* items = op.items.as<int32_t>() + list * op.items.strides[0];
    for (int64_t i = 0; i < length; ++i) {
      int64_t item = items[i * op.items.strides[1]];
      HEDDLE_CHECK(item >= 0, kArgument, "items", "items must be at least 0, got ", item);
      if (op.mode == Odd::kMirrored && item < bins) item = bins - 1 - item;
      if (!leaves_out(op.digits, list))
        counts[std::min(item, bins)] +=
            op.weights ? op.weights.as<float>()[i * op.weights.strides[0]] : 1;
    }
    if (op.output_last)
      op.last.as<int32_t>()[list] = length ? items[(length - 1) * op.items.strides[1]] : -1;
  });
  for (int64_t list = 0; list < lists; ++list)
    for (int64_t bin = 0; bin <= bins; ++bin)
      op.totals.as<float>()[bin * op.totals.strides[0]] += found[list * (bins + 1) + bin];
  dispatch_float(op.counts.dtype, [&]<class T>(T) {
    for (int64_t list = 0; list < lists; ++list)
      for (int64_t bin = 0; bin < bins; ++bin)
        op.counts.as<T>()[list * bins + bin] =
            convert<T>(found[list * (bins + 1) + bin] * static_cast<float>(op.factor));
  });
}

HEDDLE_REGISTER(Odd);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
