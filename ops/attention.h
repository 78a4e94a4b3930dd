#pragma once
#include <cmath>
#include <limits>

#include "core/rules.h"
#include "ops/mask.h"

namespace heddle {

struct Attention : MaskArguments {
  static constexpr const char* kName = "attention";
  // What a score weighs: exp(s), 1 / (1 + exp(-s)), max(s, 0)^power, log(1 + exp(s)), and
  // max(n log(1 + exp(s)) / exp(level) - offset, 0)^power in a row that sees n keys
  enum Weights { kSoftmax, kSigmoid, kRelu, kSoftplus, kReweighted };
  static constexpr int64_t kYoungRows = 3;  // rows that see no more keys than this have no offset
  // Differences from offset below this part of it are rounding
  static constexpr float kReweightedSnap = 7.6e-6f;
  // Biases that are lower in base 2 hide their keys as -inf does: rounding leaves nothing of scores
  static constexpr float kHidingLog2 = -0x1p31f;
  Tensor q;              // [b, sq, hq, d]
  Tensor k, v;           // [b, sk, hk, d] and [b, sk, hk, dv], or pages of them; dv may be 0
  Tensor cu_seqlens_q;   // [n + 1] i32: where each packed sequence of q begins, b = 1
  Tensor cu_seqlens_k;   // [n + 1] i32, none where keys stand in pages
  Tensor block_table;    // [b or n, max_pages] i32: which page holds which part of a sequence
  Tensor cache_seqlens;  // [b or n] i32: keys in use
  Tensor slopes;         // [hq] f32: score += slope * (t - p)
  Tensor sink;           // [hq] f32: a logit per head that only the normaliser sees
  Tensor bias;           // [b, hq, sq, sk]: added to the score; strides of 0 broadcast it
  Tensor level;          // [b, hq, sq] f32: lse of `sums`, of reweighted; found where left out
  // Rows of k and v from key recent_from on, which stand apart from those that a mask lists: a
  // window of one sequence, for kernels that gather
  Tensor recent_k, recent_v;
  Tensor q_scale;  // [hq] f32: what q of float8 is multiplied by
  Tensor k_scale;  // [hk] f32
  Tensor v_scale;  // [hk] f32
  Tensor out;      // [b, sq, hq, dv]
  Tensor lse;      // [b, hq, sq] f32, natural log
  double scale = std::numeric_limits<double>::quiet_NaN();  // 1/sqrt(d) when left out
  double soft_cap = 0;                                      // 0 is off
  int64_t window = 0;       // keys a row sees, its own included; 0 is all
  double length_scale = 0;  // not 0: scores are multiplied by it and by the log of the row's keys
  double power = 1;         // of relu and of reweighted
  double offset = 1;        // of reweighted
  int64_t recent_from = 0;
  int weights = kSoftmax;
  int dtype = -1;         // of out; q's when left out, which float8 has to name
  bool cosine = false;    // rows of q and k are divided by their lengths
  bool normalise = true;  // weights are divided by their sum
  bool causal = false;

  template <class Schema> static void describe(Schema& schema) {
    schema.input("q", &Attention::q, "b sq hq d", kFloats | DType::kE4M3);
    schema.input("k", &Attention::k, "b sk hk d", like("q"))
        .when("block_table", "pages page_size hk d");
    schema.input("v", &Attention::v, "b sk hk dv", like("q"))
        .when("block_table", "pages page_size hk dv");
    schema.optional("cu_seqlens_q", &Attention::cu_seqlens_q, "n+1", kI32);
    schema.optional("cu_seqlens_k", &Attention::cu_seqlens_k, "n+1", kI32);
    schema.optional("block_table", &Attention::block_table, "b max_pages", kI32)
        .when("cu_seqlens_q", "n max_pages");
    schema.optional("cache_seqlens", &Attention::cache_seqlens, "b", kI32)
        .when("cu_seqlens_q", "n");
    schema.optional("slopes", &Attention::slopes, "hq", kF32);
    schema.optional("sink", &Attention::sink, "hq", kF32);
    schema.number("scale", &Attention::scale, std::numeric_limits<double>::quiet_NaN());
    schema.number("soft_cap", &Attention::soft_cap, 0).at_least(0);
    schema.integer("window", &Attention::window, 0).at_least(1);
    schema.flag("causal", &Attention::causal);
    schema.optional("bias", &Attention::bias, "b hq sq sk", kFloats);
    schema.choice("weights", &Attention::weights,
                  {"softmax", "sigmoid", "relu", "softplus", "reweighted"});
    schema.number("power", &Attention::power, 1).at_least(1).at_most(64);
    schema.flag("normalise", &Attention::normalise, true);
    schema.flag("cosine", &Attention::cosine);
    schema.number("length_scale", &Attention::length_scale, 0);
    schema.optional("level", &Attention::level, "b hq sq", kF32);
    schema.number("offset", &Attention::offset, 1).at_least(0);
    // With these nothing is packed, whose names of sizes are free for them
    schema.optional("recent_k", &Attention::recent_k, "b n hk d", like("q"));
    schema.optional("recent_v", &Attention::recent_v, "b n hk dv", like("q"));
    schema.integer("recent_from", &Attention::recent_from, 0).at_least(0);
    schema.optional("q_scale", &Attention::q_scale, "hq", kF32);
    schema.optional("k_scale", &Attention::k_scale, "hk", kF32);
    schema.optional("v_scale", &Attention::v_scale, "hk", kF32);
    schema.dtype("dtype", &Attention::dtype, kFloats);
    describe_mask<Attention>(schema);
    schema.output("out", &Attention::out, "b sq hq dv", like("q", "dtype"));
    schema.output("lse", &Attention::lse, "b hq sq", kF32);
  }

  // Whether weights are exponentials of something, relative to its largest in the row
  bool shifted() const { return normalise && weights != kSigmoid && weights != kRelu; }

  bool finds_level() const { return weights == kReweighted && !level; }
  // The same call with its level in so much memory, contiguous
  Attention with_level(float* memory) const {
    Attention found = *this;
    found.level = lse;
    found.level.data = memory;
    return found;
  }
  // The same call with weights of softplus and without values, whose lse is `level`
  Attention sums() const {
    Attention sums = *this;
    sums.weights = kSoftplus;
    sums.power = 1;
    sums.v.shape[3] = sums.out.shape[3] = 0;
    sums.lse = level;
    sums.level = {};
    return sums;
  }

  void validate() {
    const int64_t hq = q.shape[2], hk = k.shape[2], d = q.shape[3], dv = v.shape[3];
    HEDDLE_CHECK(hk > 0 ? hq % hk == 0 : hq == 0, kShape, "k", "hq must be a multiple of hk, got ",
                 hq, " and ", hk);
    HEDDLE_CHECK(d % 8 == 0 && d >= 8 && d <= 256, kShape, "q",
                 "d must be a multiple of 8 up to 256, got ", d);
    HEDDLE_CHECK(dv % 8 == 0 && dv <= 256, kShape, "v",
                 "dv must be a multiple of 8 up to 256, got ", dv);
    const bool float8 = q.dtype == DType::kE4M3;
    const char* scaled = q_scale ? "qScale" : k_scale ? "kScale" : v_scale ? "vScale" : nullptr;
    HEDDLE_CHECK(float8 || !scaled, kArgument, scaled, scaled,
                 " goes with q, k and v of float8_e4m3fn");
    HEDDLE_CHECK(float8 == (dtype >= 0), kArgument, "dtype",
                 "dtype goes with q, k and v of float8_e4m3fn, which need it");
    HEDDLE_CHECK(!cosine || !(q_scale || k_scale), kArgument, scaled, scaled,
                 " cannot be combined with cosine");
    HEDDLE_CHECK(!masked || !cu_seqlens_q || !block_table, kArgument, "mask",
                 "mask must not be of packed sequences with blockTable, got one that is");
    HEDDLE_CHECK(!cu_seqlens_k || !block_table, kArgument, "cuSeqlensK",
                 "cuSeqlensK cannot be combined with blockTable");
    HEDDLE_CHECK(block_table || bool(cu_seqlens_q) == bool(cu_seqlens_k), kArgument, "cuSeqlensQ",
                 "cuSeqlensQ and cuSeqlensK must be given together");
    HEDDLE_CHECK(!cu_seqlens_q || q.shape[0] == 1, kShape, "q", "b must be 1 with cuSeqlensQ, got ",
                 q.shape[0]);
    HEDDLE_CHECK(!block_table || cache_seqlens, kArgument, "cacheSeqlens",
                 "cacheSeqlens must be given with blockTable");
    HEDDLE_CHECK(!cache_seqlens || !cu_seqlens_k, kArgument, "cacheSeqlens",
                 "cacheSeqlens cannot be combined with cuSeqlensK");
    if (block_table) {
      const int64_t page = k.shape[1];
      HEDDLE_CHECK(page >= 1 && page <= 256 && (page & (page - 1)) == 0, kShape, "k",
                   "the page size must be a power of two up to 256, got ", page);
    }
    HEDDLE_CHECK(!masked || window == 0, kArgument, "window",
                 "window cannot be combined with mask");
    validate_mask(q.shape[1], block_table ? block_table.shape[1] * k.shape[1] : k.shape[1], hq, hk,
                  cu_seqlens_q ? cu_seqlens_q.shape[0] - 1 : 0);
    HEDDLE_CHECK(!bias || (!cu_seqlens_q && !block_table), kArgument, "bias",
                 "bias cannot be combined with ", cu_seqlens_q ? "cuSeqlensQ" : "blockTable");
    HEDDLE_CHECK(shifted() || !sink, kArgument, "sink",
                 "sink goes with weights of softmax, softplus if normalised, and reweighted");
    HEDDLE_CHECK(normalise || (weights != kSoftmax && weights != kReweighted), kArgument,
                 "normalise", "normalise goes with weights of sigmoid, relu and softplus");
    HEDDLE_CHECK(weights == kRelu || weights == kReweighted || power == 1, kArgument, "power",
                 "power goes with weights of relu and reweighted");
    HEDDLE_CHECK(weights != kRelu || (power <= 8 && power == std::floor(power)), kArgument, "power",
                 "power must be a whole number up to 8 with weights of relu, got ", power);
    HEDDLE_CHECK(weights == kReweighted || !level, kArgument, "level",
                 "level goes with weights of reweighted");
    HEDDLE_CHECK(bool(recent_k) == bool(recent_v) && (!recent_k || (mask_index && q.shape[0] == 1)),
                 kArgument, "recentK", "recentK and recentV go with lists of one sequence");
    HEDDLE_CHECK(!masked || (!length_scale && weights != kReweighted), kArgument, "mask",
                 "mask cannot be combined with ",
                 length_scale != 0 ? "lengthScale" : "weights of reweighted");
    if (std::isnan(scale)) scale = 1 / std::sqrt(static_cast<double>(d));
    // Factors of scores, which are also counted in base 2
    const auto check_finite = [](const char* name, double number, double factor) {
      HEDDLE_CHECK(std::isfinite(static_cast<float>(factor * 1.4426950408889634)), kArgument, name,
                   name, " must not overflow float32 arithmetic, got ", number);
    };
    check_finite("scale", scale, scale);
    check_finite("offset", offset, offset);
    const double most = 44 * std::abs(length_scale);  // the log of a number of keys is below 44
    check_finite("lengthScale", length_scale, most * std::fmax(1, std::abs(scale)));
    if (soft_cap > 0) {
      const double factor = std::fmax(1, std::abs(scale) * (length_scale == 0 ? 1 : most));
      check_finite("softCap", soft_cap, std::fmax(soft_cap, 2 * factor / soft_cap));
    }
  }
};

// The gradients of a call of attention from the call itself, its results and the gradient of out:
// it has the same options, except that keys do not come in pages. A mask is a constant.
struct AttentionBackward : Attention {
  static constexpr const char* kName = "attention.backward";
  Tensor dout;     // [b, sq, hq, dv], as out
  Tensor dlse;     // [b, hq, sq] f32: the gradient of lse, none if left out
  Tensor dq;       // [b, sq, hq, d]
  Tensor dk, dv;   // [b, sk, hk, d] and [b, sk, hk, dv]
  Tensor dsink;    // [hq] f32, where there is a sink
  Tensor dslopes;  // [hq] f32, where there are slopes
  Tensor dlevel;   // [b, hq, sq] f32, where there is a level
  Tensor biased;   // [bb, bh, bq, bk]: bias before it was broadcast, where its gradient is wanted
  Tensor dbias;    // the same in f32
  bool deterministic = true;  // sums have one order; otherwise it may change from call to call

  template <class Schema> static void describe(Schema& schema) {
    using Op = AttentionBackward;
    schema.input("q", &Op::q, "b sq hq d", kFloats);
    schema.input("k", &Op::k, "b sk hk d", like("q"));
    schema.input("v", &Op::v, "b sk hk dv", like("q"));
    schema.input("out", &Op::out, "b sq hq dv", like("q"));
    schema.input("lse", &Op::lse, "b hq sq", kF32);
    schema.input("dout", &Op::dout, "b sq hq dv", like("q"));
    schema.optional("cu_seqlens_q", &Op::cu_seqlens_q, "n+1", kI32);
    schema.optional("cu_seqlens_k", &Op::cu_seqlens_k, "n+1", kI32);
    schema.optional("cache_seqlens", &Op::cache_seqlens, "b", kI32);
    schema.optional("slopes", &Op::slopes, "hq", kF32);
    schema.optional("sink", &Op::sink, "hq", kF32);
    schema.number("scale", &Op::scale, std::numeric_limits<double>::quiet_NaN());
    schema.number("soft_cap", &Op::soft_cap, 0).at_least(0);
    schema.integer("window", &Op::window, 0).at_least(1);
    schema.flag("causal", &Op::causal);
    schema.flag("deterministic", &Op::deterministic, true);
    schema.optional("bias", &Op::bias, "b hq sq sk", kFloats);
    schema.choice("weights", &Op::weights,
                  {"softmax", "sigmoid", "relu", "softplus", "reweighted"});
    schema.number("power", &Op::power, 1).at_least(1).at_most(64);
    schema.flag("normalise", &Op::normalise, true);
    schema.flag("cosine", &Op::cosine);
    schema.number("length_scale", &Op::length_scale, 0);
    schema.optional("level", &Op::level, "b hq sq", kF32);
    schema.number("offset", &Op::offset, 1).at_least(0);
    schema.optional("dlse", &Op::dlse, "b hq sq", kF32);
    schema.optional("biased", &Op::biased, "...", kFloats);
    describe_mask<Op>(schema);
    schema.output("dq", &Op::dq, "b sq hq d", like("q"));
    schema.output("dk", &Op::dk, "b sk hk d", like("q"));
    schema.output("dv", &Op::dv, "b sk hk dv", like("q"));
    schema.output("dsink", &Op::dsink, "hq", kF32).only_if("sink");
    schema.output("dslopes", &Op::dslopes, "hq", kF32).only_if("slopes");
    schema.output("dlevel", &Op::dlevel, "b hq sq", kF32).only_if("level");
    schema.output("dbias", &Op::dbias, "...", kF32).only_if("biased");
  }

  // dS is summed for each head first, [b, hq, rows or 1, keys or 1], and then over heads and the
  // batch. Where keys share a number rows have sums.
  bool bias_by_key() const { return biased.shape[3] > 1; }
  bool bias_by_row() const { return biased.shape[2] > 1 || !bias_by_key(); }
  int64_t bias_sums() const {
    return q.shape[0] * q.shape[2] * (bias_by_row() ? q.shape[1] : 1) *
           (bias_by_key() ? k.shape[1] : 1);
  }

  void validate() {
    Attention::validate();
    HEDDLE_CHECK(!finds_level(), kArgument, "level",
                 "level must be given with weights of reweighted");
    HEDDLE_CHECK(v.shape[3] > 0, kShape, "v", "v must have columns");
    HEDDLE_CHECK(!dlse || normalise, kArgument, "dlse", "dlse goes with weights that are divided");
    HEDDLE_CHECK(!biased || bias, kArgument, "biased", "biased goes with bias");
    HEDDLE_CHECK(!biased || biased.rank == 4, kShape, "biased", "biased must have four axes, got ",
                 biased);
    for (int i = 0; i < 4 && biased; ++i)
      HEDDLE_CHECK(biased.shape[i] == 1 || biased.shape[i] == bias.shape[i], kShape, "biased",
                   "biased must broadcast to ", bias, ", got ", biased);
  }
};

}  // namespace heddle
