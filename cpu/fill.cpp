#include "ops/fill.h"

#include "core/philox.h"
#include "core/registry.h"
#include "cpu/convert.h"
#include "cpu/walk.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

template <class T> void fill_value(const Fill& op, const CpuContext& context) {
  const T value = convert<T>(op.value);
  const Walk<1> walk({&op.to}, op.to.rank);
  walk.run(context, 1, [&](int64_t, int64_t count, const auto& at) {
    T* to = op.to.as<T>() + at[0];
    if (walk.stride(0) == 1) {
      std::fill_n(to, count, value);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i * walk.stride(0)] = value;
    }
  });
}

template <class T> void fill_normal(const Fill& op, const CpuContext& context) {
  const auto seed = static_cast<uint64_t>(op.seed);
  const Walk<1> walk({&op.to}, op.to.rank);
  // A logarithm and a sine each are worth some twenty additions
  walk.run(context, 16, [&](int64_t index, int64_t count, const auto& at) {
    T* to = op.to.as<T>() + at[0];
    double pair[2];
    for (int64_t i = 0; i < count; ++i) {
      const auto element = static_cast<uint64_t>(index + i);
      if (i == 0 || element % 2 == 0) standard_normals(element / 2, seed, pair);
      to[i * walk.stride(0)] = convert<T>(pair[element % 2]);
    }
  });
}

void run(const Fill& op, CpuContext& context) {
  if (op.source == 1)
    return dispatch_float(op.to.dtype, [&]<class T>(T) { fill_normal<T>(op, context); });
  dispatch_any(op.to.dtype, [&]<class T>(T) { fill_value<T>(op, context); });
}

HEDDLE_REGISTER(Fill);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
