#include "ops/embed.h"

#include "core/registry.h"
#include "cpu/walk.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

template <class T, class Id> void look_up(const Embed& op, const CpuContext& context) {
  const int64_t vocabulary = op.table.shape[0], d = op.table.shape[1];
  const Walk<1> walk({&op.ids}, op.ids.rank);
  walk.run(context, std::max<int64_t>(d, 1), [&](int64_t index, int64_t count, const auto& at) {
    for (int64_t i = 0; i < count; ++i) {
      const auto id = static_cast<int64_t>(op.ids.as<Id>()[at[0] + i * walk.stride(0)]);
      HEDDLE_CHECK(id >= 0 && id < vocabulary, kArgument, "ids",
                   "ids must be at least 0 and below ", vocabulary, ", got ", id);
      const T* row = op.table.as<T>() + id * op.table.strides[0];
      T* out = op.out.as<T>() + (index + i) * d;
      if (op.table.strides[1] == 1) {
        std::copy_n(row, d, out);
      } else {
        gather(row, op.table.strides[1], d, out);
      }
    }
  });
}

void run(const Embed& op, CpuContext& context) {
  dispatch_float(op.table.dtype, [&]<class T>(T) {
    switch (op.ids.dtype) {
      case DType::kI64:
        return look_up<T, int64_t>(op, context);
      case DType::kI32:
        return look_up<T, int32_t>(op, context);
      default:
        return look_up<T, uint8_t>(op, context);
    }
  });
}

HEDDLE_REGISTER(Embed);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
