#include "ops/glu.h"

#include "core/registry.h"
#include "cpu/walk.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

void run(const Glu& op, CpuContext& context) {
  dispatch_float(op.gate.dtype, [&]<class T>(T) {
    const auto each = [&](const auto& f) { map<T>(op.gate, op.up, op.out, context, f); };
    switch (op.activation) {
      case 0:
        return each([](Vec gate, Vec up) { return gate * sigmoid(gate) * up; });
      case 1:
        return each([](Vec gate, Vec up) { return sigmoid(gate) * up; });
      default:
        return each([](Vec gate, Vec up) { return gate * up; });
    }
  });
}

HEDDLE_REGISTER(Glu);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
