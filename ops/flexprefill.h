#pragma once
#include "core/rules.h"

namespace heddle {

// The decisions of FlexPrefill, per head: which pattern, how many vertical and slash blocks, which
// pairs. What it decides on are probes of the last queries and of pooled blocks.
struct FlexPrefill {
  static constexpr const char* kName = "flexprefill";
  Tensor lines;     // [b, hq, 2, sk] f32: mass of each key for the last queries, of each distance
  Tensor estimate;  // [b, hq, 1, nk] f32: the pooled distribution of blocks for them
  Tensor map;       // [b, hq, nq, nk] f32: the pooled distribution of every row of blocks
  Tensor blocks;    // [b, hq, nq, words] i32: what is selected
  Tensor work;      // [b, hq, 3, nk + 1] f32: masses of columns and of bands, then which are listed
  Tensor divergence;  // [b, hq] f32: square root of the Jensen-Shannon divergence
  double gamma = 0.9, tau = 0.1;
  int64_t least = 8, most = 0;  // blocks of a budget; `most` of 0 is no limit
  int64_t block = 128, sq = 0;
  bool coverage = false;  // the mode: budgets by the mass of blocks, diagonals instead of bands

  template <class Schema> static void describe(Schema& schema) {
    schema.input("lines", &FlexPrefill::lines, "b hq 2 sk", kF32);
    schema.input("estimate", &FlexPrefill::estimate, "b hq 1 nk", kF32);
    schema.input("map", &FlexPrefill::map, "b hq nq nk", kF32);
    schema.inout("blocks", &FlexPrefill::blocks, "b hq nq words", kI32);
    schema.inout("work", &FlexPrefill::work, "b hq 3 nk+1", kF32);
    schema.number("gamma", &FlexPrefill::gamma, 0.9).above(0);
    schema.number("tau", &FlexPrefill::tau, 0.1).at_least(0).at_most(1);
    schema.integer("least", &FlexPrefill::least, 8).at_least(1);
    schema.integer("most", &FlexPrefill::most, 0).at_least(0);
    schema.integer("block", &FlexPrefill::block, 128).at_least(16).at_most(128);
    schema.integer("sq", &FlexPrefill::sq, 0).at_least(1);
    schema.flag("coverage", &FlexPrefill::coverage);
    schema.output("divergence", &FlexPrefill::divergence, "b hq", kF32);
  }

  void validate() const {
    for (const Tensor* tensor : {&lines, &map, &blocks, &work})
      HEDDLE_CHECK(tensor->contiguous(), kShape, "lines", "lines must be contiguous");
    HEDDLE_CHECK(estimate.strides[3] == 1, kShape, "estimate",
                 "blocks of estimate must be adjacent");
    HEDDLE_CHECK(map.shape[2] == (sq + block - 1) / block &&
                     map.shape[3] == (lines.shape[3] + block - 1) / block &&
                     blocks.shape[3] * 32 >= map.shape[3],
                 kShape, "map", "map must have a row and a column per block, got ", map);
    HEDDLE_CHECK(map.shape[2] * blocks.shape[3] <= INT32_MAX &&
                     map.shape[2] * map.shape[3] <= int64_t{1} << 32,
                 kUnsupported, "map",
                 "map must have at most 2^31 words and 2^32 pairs per head, got ", map);
  }
};

}  // namespace heddle
