#pragma once
#include <cmath>

#include "core/rules.h"

namespace heddle {

// The best columns of every row of a score, or the best pairs of its whole map, as bits of a mask.
// A coverage takes the fewest whose mass reaches `coverage` of the row's, or of the map's.
struct Keep {
  static constexpr const char* kName = "keep";
  enum Rule { kTop, kCoverage, kThreshold };
  Tensor score;                          // [b, heads, rows, columns] f32; -inf is invisible
  Tensor blocks;                         // [b, heads, rows, words] i32; what is kept is added
  int64_t top = 0, least = 0, most = 0;  // numbers of columns; `most` of 0 is no limit
  double coverage = 1, threshold = 0;
  int rule = kTop;
  bool over_map = false;  // the rule holds for the map of a head instead of each row
  // Taken first, inside the budget, which is not a coverage: the first columns, and the blocks of
  // the row's own positions with those before them
  int64_t force_first = 0, force_diagonal = 0;
  int64_t block_q = 128, block_k = 128, sq = 0, ahead = 0;  // where rows stand: p = ahead + query

  template <class Schema> static void describe(Schema& schema) {
    schema.input("score", &Keep::score, "b heads rows columns", kF32);
    schema.inout("blocks", &Keep::blocks, "b heads rows words", kI32);
    schema.integer("top", &Keep::top, 0).at_least(0);
    schema.integer("least", &Keep::least, 0).at_least(0);
    schema.integer("most", &Keep::most, 0).at_least(0);
    schema.number("coverage", &Keep::coverage, 1).at_least(0);
    schema.number("threshold", &Keep::threshold, 0);
    schema.choice("rule", &Keep::rule, {"top", "coverage", "threshold"});
    schema.flag("over_map", &Keep::over_map);
    schema.integer("force_first", &Keep::force_first, 0).at_least(0);
    schema.integer("force_diagonal", &Keep::force_diagonal, 0).at_least(0);
    schema.integer("block_q", &Keep::block_q, 128).at_least(1);
    schema.integer("block_k", &Keep::block_k, 128).at_least(1);
    schema.integer("sq", &Keep::sq, 0).at_least(0);
    schema.integer("ahead", &Keep::ahead, 0).at_least(0);
  }

  void validate() {
    // Scores are f32: of these the least that reaches it
    const auto near = static_cast<float>(threshold);
    threshold = near < threshold ? std::nextafterf(near, INFINITY) : near;
    HEDDLE_CHECK(score.contiguous() && blocks.contiguous(), kShape, "score",
                 "score must be contiguous; call contiguous() first");
    HEDDLE_CHECK(blocks.shape[3] * 32 >= score.shape[3], kShape, "blocks",
                 "blocks must have a bit for every column, got ", blocks);
    HEDDLE_CHECK(score.shape[2] * score.shape[3] < INT32_MAX, kUnsupported, "score",
                 "score must have fewer than 2^31 entries per head, got ", score);
  }
};

}  // namespace heddle
