#include "ops/scatter.h"

#include "core/registry.h"
#include "cpu/strided.h"
#include "cpu/walk.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

void run(const Scatter& op, CpuContext& context) {
  const int64_t n = op.indices.size();
  for (int64_t i = 0; i < n; ++i)
    HEDDLE_CHECK(op.index(i) < op.rows(), kArgument, "indices", "indices must be below ", op.rows(),
                 ", the rows there are, got ", op.index(i));
  if (op.from.size() == 0) return;
  const Rows rows(op.from);
  dispatch_size(size_of(op.to.dtype), [&]<class T>(T) {
    for_rows(rows, context, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        if (const int64_t index = op.index(i); index >= 0)
          copy_row(op.to.as<T>() + op.begin(index), op.to.strides[2],
                   op.from.as<T>() + Rows::offset(op.from, i), Rows::stride(op.from), rows.length);
    });
  });
}

HEDDLE_REGISTER(Scatter);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
