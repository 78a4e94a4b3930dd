#include "ops/elementwise.h"

#include "core/registry.h"
#include "cpu/walk.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

void run(const Elementwise& op, CpuContext& context) {
  dispatch_float(op.x.dtype, [&]<class T>(T) {
    const auto each = [&](const auto& f) {
      map<T>(op.x, op.binary() ? op.y : op.x, op.out, context, f);
    };
    switch (op.function) {
      case Elementwise::kAdd:
        return each([](Vec x, Vec y) { return x + y; });
      case Elementwise::kMul:
        return each([](Vec x, Vec y) { return x * y; });
      case Elementwise::kSilu:
        return each([](Vec x, Vec) { return x * sigmoid(x); });
      default:
        return each([](Vec x, Vec) { return sigmoid(x); });
    }
  });
}

HEDDLE_REGISTER(Elementwise);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
