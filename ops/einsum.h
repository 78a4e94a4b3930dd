#pragma once
#include "core/rules.h"

namespace heddle {

// One statement of a cascade, which core/einsum.h reads: lib/cascade/steps.ts writes the program
struct Einsum {
  static constexpr const char* kName = "einsum";
  Tensor program;     // [words] i64
  Tensor work;        // [n] f32: every tensor of the cascade, one after another
  int64_t start = 0;  // word at which the statement begins
  int64_t count = 0;  // coordinates on its left
  int64_t step = 0;   // of the iteration that it belongs to

  template <class Schema> static void describe(Schema& schema) {
    schema.input("program", &Einsum::program, "words", DTypes{1u << int(DType::kI64)});
    schema.inout("work", &Einsum::work, "n", kF32);
    schema.integer("start", &Einsum::start, 0).at_least(0);
    schema.integer("count", &Einsum::count, 0).at_least(0);
    schema.integer("step", &Einsum::step, 0).at_least(0);
  }

  void validate() const {
    HEDDLE_CHECK(program.contiguous() && work.contiguous(), kArgument, "work",
                 "program and work must be contiguous");
    HEDDLE_CHECK(start < program.shape[0], kArgument, "start", "start must be below ",
                 program.shape[0], ", got ", start);
    HEDDLE_CHECK(count <= work.shape[0], kArgument, "count", "count must be at most ",
                 work.shape[0], ", got ", count);
  }
};

}  // namespace heddle
