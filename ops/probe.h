#pragma once
#include <cmath>
#include <limits>

#include "core/rules.h"

namespace heddle {

// Proxy scores of blocks, keys or distances, causal, by a few rows of the whole map. Rows of blocks
// count from the first query, R(r) are the sampled queries of row r, p(i) = sk - sq + i.
struct Probe {
  static constexpr const char* kName = "probe";
  enum Kind { kPooled, kStrided, kRows, kAntidiagonal };
  enum Per { kBlock, kKey, kDistance, kLine };
  Tensor q;      // [b, sq, hq, d]
  Tensor k;      // [b, sk, hk, d]
  Tensor score;  // [b, hq, rows, columns] f32; -inf where the row sees nothing of the column. Of
                 // lines, row 2r is per key and row 2r + 1 per distance
  int64_t block_q = 128, block_k = 128;
  int64_t stride = 1;  // every stride-th query (and key, if strided) is looked at, the last of each
  int kind = kPooled, per = kBlock;
  bool softmax = false;  // a row of pooled or strided scores sums to 1
  double scale = std::numeric_limits<double>::quiet_NaN();  // 1/sqrt(d) when left out

  template <class Schema> static void describe(Schema& schema) {
    schema.input("q", &Probe::q, "b sq hq d", kFloats);
    schema.input("k", &Probe::k, "b sk hk d", like("q"));
    schema.inout("score", &Probe::score, "b hq rows columns", kF32);
    schema.integer("block_q", &Probe::block_q, 128).at_least(1);
    schema.integer("block_k", &Probe::block_k, 128).at_least(1);
    schema.integer("stride", &Probe::stride, 1).at_least(1).at_most(64);
    schema.choice("kind", &Probe::kind, {"pooled", "strided", "rows", "antidiagonal"});
    schema.choice("per", &Probe::per, {"block", "key", "distance", "line"});
    schema.flag("softmax", &Probe::softmax);
    schema.number("scale", &Probe::scale, std::numeric_limits<double>::quiet_NaN());
  }

  void validate() {
    const int64_t sq = q.shape[1], sk = k.shape[1], hq = q.shape[2], hk = k.shape[2];
    HEDDLE_CHECK(hk > 0 && hq % hk == 0, kShape, "k", "hq must be a multiple of hk, got ", hq,
                 " and ", hk);
    HEDDLE_CHECK(q.shape[3] >= 1 && q.shape[3] <= 256, kShape, "q", "d must be from 1 to 256, got ",
                 q.shape[3]);
    HEDDLE_CHECK(sq <= sk, kShape, "q", "sq must be at most sk, got ", sq, " and ", sk);
    HEDDLE_CHECK(score.contiguous(), kShape, "score",
                 "score must be contiguous; call contiguous() first");
    HEDDLE_CHECK(per == kBlock || kind == kRows, kArgument, "per", "per goes with kind rows");
    HEDDLE_CHECK(kind != kAntidiagonal || (block_q % stride == 0 && block_k % stride == 0),
                 kArgument, "stride", "stride must divide the blocks, got ", stride);
    // No block that is seen is left without a key
    HEDDLE_CHECK(kind != kStrided || stride <= block_k, kArgument, "stride",
                 "stride must be at most a block of keys, ", block_k, ", got ", stride);
    const int64_t rows = (sq + block_q - 1) / block_q * (per == kLine ? 2 : 1),
                  columns = per == kBlock ? (sk + block_k - 1) / block_k : sk;
    HEDDLE_CHECK(score.shape[2] == rows && score.shape[3] == columns, kShape, "score",
                 "score must have ", rows, " rows and ", columns, " columns, got ", score);
    if (std::isnan(scale)) scale = 1 / std::sqrt(static_cast<double>(q.shape[3]));
    HEDDLE_CHECK(std::isfinite(scale), kArgument, "scale", "scale must be finite, got ", scale);
  }
};

}  // namespace heddle
