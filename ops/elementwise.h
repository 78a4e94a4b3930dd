#pragma once
#include "core/rules.h"

namespace heddle {

// One function of one or two tensors of the same shape, which strides of 0 may have broadcast
struct Elementwise {
  static constexpr const char* kName = "elementwise";
  enum Function { kAdd, kMul, kSilu, kSigmoid };
  Tensor x, y;  // [...]; y for add and mul
  Tensor out;   // [...]
  int function = kAdd;

  template <class Schema> static void describe(Schema& schema) {
    schema.choice("function", &Elementwise::function, {"add", "mul", "silu", "sigmoid"});
    schema.input("x", &Elementwise::x, "...", kFloats);
    schema.optional("y", &Elementwise::y, "...", like("x"));
    schema.output("out", &Elementwise::out, "...", like("x"));
  }

  bool binary() const { return function == kAdd || function == kMul; }
  void validate() const {
    HEDDLE_CHECK(bool(y) == binary(), kArgument, "y", "y goes with add and mul alone");
  }
};

}  // namespace heddle
