#pragma once
#include "core/rules.h"

namespace heddle {

// out[..., :] = table[ids[...], :]; an id outside the table fails the tensor
struct Embed {
  static constexpr const char* kName = "embed";
  Tensor ids;    // [...] i32, i64 or u8
  Tensor table;  // [vocabulary, d]
  Tensor out;    // [..., d]

  template <class Schema> static void describe(Schema& schema) {
    schema.input("ids", &Embed::ids, "...", DType::kI32 | DType::kI64 | DType::kU8);
    schema.input("table", &Embed::table, "vocabulary d", kFloats);
    schema.output("out", &Embed::out, "... d", like("table"));
  }
};

}  // namespace heddle
