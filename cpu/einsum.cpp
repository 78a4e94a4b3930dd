#include "ops/einsum.h"

#include <algorithm>

#include "core/cpu_context.h"
#include "core/einsum.h"
#include "core/registry.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

void run(const Einsum& op, CpuContext& context) {
  const int64_t* words = op.program.as<int64_t>() + op.start;
  const int64_t count = op.program.shape[0] - op.start;
  const int64_t pieces = std::min<int64_t>(op.count, 8 * context.threads());
  context.parallel(pieces, [&](int64_t piece, int) {
    const int64_t last = op.count * (piece + 1) / pieces;
    for (int64_t i = op.count * piece / pieces; i < last; ++i)
      HEDDLE_CHECK(einsum::run(words, count, i, op.step, op.work.as<float>(), op.work.shape[0]),
                   kArgument, "program", "program must be a statement");
  });
}

HEDDLE_REGISTER(Einsum);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
