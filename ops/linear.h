#pragma once
#include "core/rules.h"

namespace heddle {

// out = x weight^T + bias; accumulates in f32
struct Linear {
  static constexpr const char* kName = "linear";
  Tensor x;        // [..., i]
  Tensor weight;   // [o, i], as checkpoints store it
  Tensor bias;     // [o]
  Tensor out;      // [..., o]
  int dtype = -1;  // of out; x's when left out

  template <class Schema> static void describe(Schema& schema) {
    schema.input("x", &Linear::x, "... i", kFloats);
    schema.input("weight", &Linear::weight, "o i", like("x"));
    schema.optional("bias", &Linear::bias, "o", like("x"));
    schema.dtype("dtype", &Linear::dtype, kFloats);
    schema.output("out", &Linear::out, "... o", like("x", "dtype"));
  }
};

}  // namespace heddle
