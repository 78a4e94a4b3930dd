#pragma once
#include "core/rules.h"

namespace heddle {

// Sets every element: a constant, or normal random numbers that depend on the seed and the
// element's index alone
struct Fill {
  static constexpr const char* kName = "fill";
  Tensor to;  // [...]
  double value = 0;
  int64_t seed = 0;
  int source = 0;  // 0: value, 1: standard normal

  template <class Schema> static void describe(Schema& schema) {
    schema.inout("to", &Fill::to, "...", kAny).filled();
    schema.number("value", &Fill::value, 0);
    schema.integer("seed", &Fill::seed, 0).at_least(0);
    schema.choice("source", &Fill::source, {"value", "normal"});
  }

  void validate() const {
    HEDDLE_CHECK(source == 0 || kFloats.has(to.dtype), kDType, "dtype",
                 "dtype must be float32, float16 or bfloat16 for random numbers, got ",
                 name_of(to.dtype));
  }
};

}  // namespace heddle
