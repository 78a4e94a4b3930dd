#pragma once
#include "core/schema.h"

namespace heddle {

// An operator that no mechanism needs, with one argument of every kind: counts, for each list of an
// integer tensor, how often each of `bins` values occurs, adds the counts to running totals and
// scales a table by them.
struct Odd {
  static constexpr const char* kName = "odd.count";
  enum Mode { kPlain, kMirrored };
  Tensor items;    // [n, length] i32
  Tensor weights;  // [length] f32, ones when left out
  Tensor totals;   // [bins + 1] f32, updated in place; the last one counts what fits no bin
  Tensor counts;   // [n, bins]
  Tensor last;     // [n] i32: the last item of each list; only when asked for
  double factor = 1;
  int64_t bins = 4;
  int64_t digits = 0;  // decimal digits name the lists to leave out: 13 leaves out 1 and 3
  int mode = kPlain;
  int dtype = -1;  // of counts; f32 when left out
  bool output_last = false;

  template <class Schema> static void describe(Schema& schema) {
    schema.number("factor", &Odd::factor, 1).above(0).at_most(8);
    schema.input("items", &Odd::items, "n length", kI32);
    schema.integer("bin_count", &Odd::bins, 4).at_least(1).at_most(64);
    schema.optional("weights", &Odd::weights, "length", kF32);
    schema.inout("totals", &Odd::totals, "bins+1", kF32);
    schema.integer("left_out", &Odd::digits, 0).at_least(0);
    schema.choice("mode", &Odd::mode, {"plain", "mirrored"});
    schema.dtype("dtype", &Odd::dtype, kFloats);
    schema.flag("output_last", &Odd::output_last);
    schema.output("last", &Odd::last, "n", kI32).only_if("output_last");
    schema.output("counts", &Odd::counts, "n bins", like("totals", "dtype"));
  }

  void validate() const {
    HEDDLE_CHECK(totals.shape[0] == bins + 1, kShape, "totals",
                 "totals must have one entry per bin and one more, ", bins + 1, ", got ",
                 totals.shape[0]);
    HEDDLE_CHECK(mode == kPlain || !weights, kArgument, "weights",
                 "weights cannot be combined with mirrored");
  }
};

}  // namespace heddle
