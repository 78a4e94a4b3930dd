#pragma once
#include "core/rules.h"

namespace heddle {

// RMS norm over the last dimension: out = x / sqrt(mean(x^2) + eps) * weight
struct Norm {
  static constexpr const char* kName = "norm";
  Tensor x;       // [..., d]
  Tensor weight;  // [d]
  Tensor out;     // [..., d]
  double eps = 1e-5;

  template <class Schema> static void describe(Schema& schema) {
    schema.input("x", &Norm::x, "... d", kFloats);
    schema.optional("weight", &Norm::weight, "d", like("x"));
    schema.number("eps", &Norm::eps, 1e-5).at_least(0);
    schema.output("out", &Norm::out, "... d", like("x"));
  }
};

}  // namespace heddle
