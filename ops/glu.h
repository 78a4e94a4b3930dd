#pragma once
#include "core/rules.h"

namespace heddle {

// Gated linear unit: out = activation(gate) * up
struct Glu {
  static constexpr const char* kName = "glu";
  Tensor gate, up;     // [..., d]
  Tensor out;          // [..., d]
  int activation = 0;  // 0: silu, 1: sigmoid, 2: identity

  template <class Schema> static void describe(Schema& schema) {
    schema.input("gate", &Glu::gate, "... d", kFloats);
    schema.input("up", &Glu::up, "... d", like("gate"));
    schema.choice("activation", &Glu::activation, {"silu", "sigmoid", "identity"});
    schema.output("out", &Glu::out, "... d", like("gate"));
  }
};

}  // namespace heddle
