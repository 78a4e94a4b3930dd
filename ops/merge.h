#pragma once
#include "core/rules.h"

namespace heddle {

// Joins two attention results over disjoint keys: weights exp(lse_a) and exp(lse_b)
struct Merge {
  static constexpr const char* kName = "merge";
  Tensor out_a, out_b;  // [b, s, h, d]
  Tensor lse_a, lse_b;  // [b, h, s] f32, natural log
  Tensor out;           // [b, s, h, d]
  Tensor lse;           // [b, h, s] f32

  template <class Schema> static void describe(Schema& schema) {
    schema.input("out_a", &Merge::out_a, "b s h d", kFloats);
    schema.input("lse_a", &Merge::lse_a, "b h s", kF32);
    schema.input("out_b", &Merge::out_b, "b s h d", like("out_a"));
    schema.input("lse_b", &Merge::lse_b, "b h s", kF32);
    schema.output("out", &Merge::out, "b s h d", like("out_a"));
    schema.output("lse", &Merge::lse, "b h s", kF32);
  }
};

}  // namespace heddle
