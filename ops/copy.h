#pragma once
#include "core/rules.h"

namespace heddle {

// to[...] = x[...], converted to the dtype of `to`; the regions must not overlap. Floats round to
// nearest even; to integers they truncate and saturate, NaN gives 0; to bool is x != 0.
struct Copy {
  static constexpr const char* kName = "copy";
  Tensor x;   // [...]
  Tensor to;  // [...]

  template <class Schema> static void describe(Schema& schema) {
    schema.input("x", &Copy::x, "...", kAny);
    schema.inout("to", &Copy::to, "...", kAny).filled();
  }
};

}  // namespace heddle
