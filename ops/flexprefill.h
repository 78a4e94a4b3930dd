#pragma once
#include <cmath>
#include <limits>

#include "core/rules.h"

namespace heddle {

// The blocks that FlexPrefill selects: per head which pattern, how many vertical and slash blocks,
// which pairs. It decides on probes of the last `block` queries and of pooled blocks.
struct FlexPrefill {
  static constexpr const char* kName = "flexprefill";
  Tensor q;           // [b, sq, hq, d]
  Tensor k;           // [b, sk, hk, d]
  Tensor blocks;      // [b, hq, rows, words] i32: what is selected, a row per block of queries
  Tensor divergence;  // [b, hq] f32: square root of the Jensen-Shannon divergence
  double gamma = 0.9, tau = 0.1;
  int64_t least = 8, most = 0;  // blocks of a budget; `most` of 0 is no limit
  int64_t block = 128;
  bool coverage = false;  // the mode: budgets by the mass of blocks, diagonals instead of bands
  double scale = std::numeric_limits<double>::quiet_NaN();  // of the probes, 1/sqrt(d) if left out

  int64_t rows() const { return (q.shape[1] + block - 1) / block; }
  int64_t columns() const { return (k.shape[1] + block - 1) / block; }

  template <class Schema> static void describe(Schema& schema) {
    schema.input("q", &FlexPrefill::q, "b sq hq d", kFloats);
    schema.input("k", &FlexPrefill::k, "b sk hk d", like("q"));
    schema.inout("blocks", &FlexPrefill::blocks, "b hq rows words", kI32);
    schema.number("gamma", &FlexPrefill::gamma, 0.9).above(0);
    schema.number("tau", &FlexPrefill::tau, 0.1).at_least(0).at_most(1);
    schema.integer("least", &FlexPrefill::least, 8).at_least(1);
    schema.integer("most", &FlexPrefill::most, 0).at_least(0);
    schema.integer("block", &FlexPrefill::block, 128).at_least(16).at_most(128);
    schema.flag("coverage", &FlexPrefill::coverage);
    schema.number("scale", &FlexPrefill::scale, std::numeric_limits<double>::quiet_NaN());
    schema.output("divergence", &FlexPrefill::divergence, "b hq", kF32);
  }

  void validate() {
    const int64_t sq = q.shape[1], sk = k.shape[1], hq = q.shape[2], hk = k.shape[2];
    HEDDLE_CHECK(hk > 0 && hq % hk == 0, kShape, "k", "hq must be a multiple of hk, got ", hq,
                 " and ", hk);
    HEDDLE_CHECK(q.shape[3] >= 1 && q.shape[3] <= 256, kShape, "q", "d must be from 1 to 256, got ",
                 q.shape[3]);
    HEDDLE_CHECK(sq >= 1 && sq <= sk, kShape, "q", "sq must be from 1 to sk, got ", sq, " and ",
                 sk);
    HEDDLE_CHECK(
        blocks.contiguous() && blocks.shape[2] == rows() && blocks.shape[3] * 32 >= columns(),
        kShape, "blocks", "blocks must have a bit for every pair, got ", blocks);
    HEDDLE_CHECK(rows() * blocks.shape[3] <= INT32_MAX && rows() * columns() <= int64_t{1} << 32,
                 kUnsupported, "blocks",
                 "blocks must have at most 2^31 words and 2^32 pairs per head, got ", blocks);
    if (std::isnan(scale)) scale = 1 / std::sqrt(static_cast<double>(q.shape[3]));
    HEDDLE_CHECK(std::isfinite(scale), kArgument, "scale", "scale must be finite, got ", scale);
  }
};

}  // namespace heddle
