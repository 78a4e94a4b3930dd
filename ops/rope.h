#pragma once
#include "core/rules.h"

namespace heddle {

// Rotary position embedding: each pair (a, b) of a head turns by angle position *
// theta^(-2i/rotary), (a cos - b sin, b cos + a sin). Pairs are (i, i + rotary/2) or (2i, 2i + 1);
// channels from `rotary` on stay as they are. Tables of one's own stand for the angles of `theta`.
struct Rope {
  static constexpr const char* kName = "rope";
  Tensor x;          // [b, s, h, d]
  Tensor positions;  // [b, s] i32; offset + row when left out
  Tensor cos, sin;   // [rows, pairs] f32, a row for every position
  Tensor out;        // [b, s, h, d]
  double theta = 10000;
  int64_t offset = 0;
  int64_t rotary = 0;  // channels that turn; when 0, those that the tables have, or d
  int layout = 0;      // 0: half-split, 1: interleaved

  template <class Schema> static void describe(Schema& schema) {
    schema.input("x", &Rope::x, "b s h d", kFloats);
    schema.optional("positions", &Rope::positions, "b s", kI32);
    schema.optional("cos", &Rope::cos, "rows pairs", kF32);
    schema.optional("sin", &Rope::sin, "rows pairs", kF32);
    schema.number("theta", &Rope::theta, 10000).above(0);
    schema.integer("offset", &Rope::offset, 0).at_least(0);
    schema.integer("rotary", &Rope::rotary, 0).at_least(2);
    schema.choice("layout", &Rope::layout, {"half-split", "interleaved"});
    schema.output("out", &Rope::out, "b s h d", like("x"));
  }

  void validate() {
    const int64_t d = x.shape[3];
    if (rotary == 0) rotary = cos ? 2 * cos.shape[1] : d;
    HEDDLE_CHECK(rotary % 2 == 0 && rotary <= d, kArgument, "rotary",
                 "rotary must be even and at most d = ", d, ", got ", rotary);
    HEDDLE_CHECK(bool(cos) == bool(sin), kArgument, "cos", "cos and sin must be given together");
    if (cos)
      HEDDLE_CHECK(cos.shape[1] * 2 == rotary && cos.contiguous() && sin.contiguous() &&
                       (positions || offset + x.shape[1] <= cos.shape[0]),
                   kShape, "cos", "cos must be contiguous, with ", rotary / 2,
                   " columns and a row for every position, got ", cos);
  }
};

}  // namespace heddle
