#pragma once
#include <algorithm>
#include <cfloat>
#include <vector>

#include "cpu/half.h"
#include "ops/attention.h"

// What both CPU kernels of attention share: where tokens stand, what a row sees, what becomes of
// a score.
//
// Query heads that share a kv head form a group, and a row is one query of one of them: row r of a
// kv head is query r / group of head r % group. Rows of a group thus read the same keys, and
// neighbours see nearly the same ones. Scores are in base 2.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace attention {

inline constexpr int64_t kTileKeys = 64;
inline constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Floats that fill lines of the cache, so that what follows in the same memory starts on one
inline size_t whole_lines(int64_t floats) { return static_cast<size_t>((floats + 15) / 16 * 16); }

// log(1 + x) from z = x / (2 + x), which is at most 1/3 in size
HEDDLE_INLINE Vec log_series(Vec z) {
  const Vec square = z * z;
  Vec p = splat(1.f / 13);
  for (const float term : {1.f / 11, 1.f / 9, 1.f / 7, 1.f / 5, 1.f / 3, 1.f})
    p = p * square + term;
  return 2.f * z * p;
}

// log(1 + exp(x)), within 4 ulp
HEDDLE_INLINE Vec softplus(Vec x) {
  const Vec u = exp(-abs(x));
  return max(zero(), x) + log_series(u / (2.f + u));
}

// Of positive normal numbers, from a mantissa around 1; infinity and NaN stay
HEDDLE_INLINE Vec log2(Vec x) {
  const Int bits = std::bit_cast<Int>(x), exponent = (bits - 0x3f3504f3) >> 23;
  const Vec m = std::bit_cast<Vec>(bits - (exponent << 23)) - 1.f;
  const Vec y = __builtin_convertvector(exponent, Vec) +
                log_series(m / (2.f + m)) * static_cast<float>(kLog2e);
  return x - x == zero() ? y : x;
}

// A row of a length of 1, whatever its size
inline void make_unit(float* x, int64_t n) {
  double square = 0;
  for (int64_t i = 0; i < n; ++i) square += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const double factor = 1 / std::max(std::sqrt(square), 1e-12);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(static_cast<double>(x[i]) * factor);
}

// What row x of n numbers gets where `gradient` is that of the row made unit. A row without a
// length has no direction, and gets nothing.
inline void unit_gradient(float* gradient, const float* x, int64_t n) {
  double square = 0, along = 0;
  for (int64_t i = 0; i < n; ++i) {
    square += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    along += static_cast<double>(x[i]) * static_cast<double>(gradient[i]);
  }
  const double length = std::sqrt(square);
  for (int64_t i = 0; i < n; ++i)
    gradient[i] = length <= 1e-12
                      ? 0
                      : static_cast<float>((static_cast<double>(gradient[i]) -
                                            along / square * static_cast<double>(x[i])) /
                                           length);
}

struct Range {
  int64_t begin, end;
};

// A sequence of the batch, or of a packed batch
struct Sequence {
  int64_t batch, q_begin, sq, k_begin, sk;
  int64_t index;  // among all sequences of the call
  int64_t position(int64_t query) const { return sk - sq + query; }
};

inline int32_t entry(const Tensor& tensor, int64_t i) {
  return tensor.as<int32_t>()[i * tensor.strides[0]];
}

inline void check_cu_seqlens(const Tensor& cu_seqlens, const char* argument, const char* size,
                             int64_t total) {
  const int64_t n = cu_seqlens.shape[0] - 1;
  HEDDLE_CHECK(n >= 0, kShape, argument, argument, " must have at least one entry, got none");
  HEDDLE_CHECK(entry(cu_seqlens, 0) == 0, kArgument, argument, argument, " must start at 0, got ",
               entry(cu_seqlens, 0));
  for (int64_t i = 0; i < n; ++i)
    HEDDLE_CHECK(entry(cu_seqlens, i) <= entry(cu_seqlens, i + 1), kArgument, argument, argument,
                 " must be ascending, got ", entry(cu_seqlens, i), " before ",
                 entry(cu_seqlens, i + 1));
  HEDDLE_CHECK(entry(cu_seqlens, n) == total, kArgument, argument, argument, " must end at ", size,
               " = ", total, ", got ", entry(cu_seqlens, n));
}

// Checks what only the data tells: offsets, lengths and pages
inline std::vector<Sequence> find_sequences(const Attention& op) {
  std::vector<Sequence> sequences;
  if (op.cu_seqlens_q) {
    check_cu_seqlens(op.cu_seqlens_q, "cuSeqlensQ", "sq", op.q.shape[1]);
    for (int64_t i = 0; i + 1 < op.cu_seqlens_q.shape[0]; ++i) {
      const int64_t q = entry(op.cu_seqlens_q, i);
      sequences.push_back({0, q, entry(op.cu_seqlens_q, i + 1) - q, 0, 0, i});
    }
  } else {
    for (int64_t b = 0; b < op.q.shape[0]; ++b) sequences.push_back({b, 0, op.q.shape[1], 0, 0, b});
  }
  if (op.cu_seqlens_k) {
    check_cu_seqlens(op.cu_seqlens_k, "cuSeqlensK", "sk", op.k.shape[1]);
    for (Sequence& sequence : sequences) {
      sequence.k_begin = entry(op.cu_seqlens_k, sequence.index);
      sequence.sk = entry(op.cu_seqlens_k, sequence.index + 1) - sequence.k_begin;
    }
    return sequences;
  }
  const Tensor& table = op.block_table;
  const int64_t page = op.k.shape[1], capacity = table ? table.shape[1] * page : page;
  for (Sequence& sequence : sequences) {
    const int64_t n = sequence.index;
    const int64_t sk = sequence.sk = op.cache_seqlens ? entry(op.cache_seqlens, n) : capacity;
    HEDDLE_CHECK(sk >= 0 && sk <= capacity, kArgument, "cacheSeqlens",
                 "cacheSeqlens must be from 0 to ", capacity, ", got ", sk, " at ", n);
    // nobody looks at pages that no query attends
    for (int64_t i = 0; table && sequence.sq > 0 && i * page < sk; ++i) {
      const int32_t at = table.as<int32_t>()[n * table.strides[0] + i * table.strides[1]];
      HEDDLE_CHECK(at >= 0 && at < op.k.shape[0], kArgument, "blockTable",
                   "blockTable must name one of ", op.k.shape[0],
                   " pages where keys are in use, got ", at, " at [", n, ", ", i, "]");
    }
  }
  return sequences;
}

// Some rows of one kv head over some of its keys: what one thread does at a time
struct Part {
  const Sequence* sequence;
  int64_t head;  // of k and v
  int64_t first_row, rows;
  Range keys;  // all that any of the rows sees, or one split of them
  int split, splits;
  int64_t cost() const { return rows * (keys.end - keys.begin); }
};

// The result of a part, a softmax that is not yet divided: sums over its keys relative to row_max,
// which starts at a large negative finite number, as (-inf) - (-inf) would poison empty rows
struct State {
  float* acc;      // [rows, dv]
  float* row_max;  // [rows]
  float* row_sum;  // [rows]
  static size_t floats(int64_t rows, int64_t dv) { return whole_lines(rows * (dv + 2)); }
  static State at(float* memory, int64_t rows, int64_t dv) {
    return {memory, memory + rows * dv, memory + rows * (dv + 1)};
  }
};

// Where the keys or values of one head and sequence stand
template <class T> struct Tokens {
  const T* data;
  int64_t stride, element, page;  // of a token, inside it, and of a page
  const int32_t* table = nullptr;
  int64_t table_stride = 0;
  int shift = 0;  // log2 of the page size

  Tokens(const Tensor& tensor, const Tensor& block_table, const Sequence& sequence, int64_t head)
      : data(tensor.as<T>() + head * tensor.strides[2]),
        stride(tensor.strides[1]),
        element(tensor.strides[3]),
        page(tensor.strides[0]) {
    if (block_table) {
      table = block_table.as<int32_t>() + sequence.index * block_table.strides[0];
      table_stride = block_table.strides[1];
      shift = std::countr_zero(static_cast<uint64_t>(tensor.shape[1]));
    } else {
      data += sequence.batch * tensor.strides[0] + sequence.k_begin * stride;
    }
  }

  const T* row(int64_t t) const {
    if (!table) return data + t * stride;
    return data + table[(t >> shift) * table_stride] * page +
           (t & ((int64_t{1} << shift) - 1)) * stride;
  }
  // Heads lie between the tokens of one head, a pattern that the hardware does not see through
  void prefetch(Range tokens, int64_t n) const {
    for (int64_t t = tokens.begin; t < tokens.end; ++t)
      for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(row(t) + i * element, 0, 2);
  }
  // Rows of n numbers as f32, `width` apart
  void load(float* to, int64_t width, Range tokens, int64_t n) const {
    for (int64_t t = tokens.begin; t < tokens.end; ++t, to += width)
      load_row(to, row(t), element, n);
  }
};

// One call, with what follows from its options
template <class T> struct Problem {
  const Attention& op;
  const int64_t d = op.q.shape[3], dv = op.v.shape[3], group = op.q.shape[2] / op.k.shape[2];
  // With a soft cap q k is first the argument of tanh and gets its unit after that
  const float q_factor =
      static_cast<float>(op.soft_cap > 0 ? op.scale / op.soft_cap : op.scale * kLog2e);
  const float cap_log2 = static_cast<float>(op.soft_cap * kLog2e);
  const bool shifted = op.shifted();
  const bool lifted = shifted && op.weights != Attention::kSoftmax;
  const bool plain = !(op.soft_cap > 0) && !op.slopes && !op.bias && !lifted;
  const MaskView mask = op.mask_view(op.q.shape[1], op.q.shape[2]);

  Vec score(Vec s, Vec slope_log2, Vec distance) const {
    if (op.soft_cap > 0) s = cap_log2 * tanh(s);
    return op.slopes ? s + slope_log2 * distance : s;
  }

  // What a row knows of its weights besides the scores
  struct Lift {
    float gain_log2 = 0, offset = 0;
  };
  Lift lift_of(const Part& part, int64_t row) const {
    if (!op.level) return {};
    const int64_t n = seen(part, row), token = part.sequence->q_begin + query_of(part, row);
    const float level =
        op.level
            .as<float>()[part.sequence->batch * op.level.strides[0] +
                         head_of(part, row) * op.level.strides[1] + token * op.level.strides[2]];
    return {level == -INFINITY ? level
                               : static_cast<float>(std::log2(static_cast<double>(n)) -
                                                    static_cast<double>(level) * kLog2e),
            n > Attention::kYoungRows ? static_cast<float>(op.offset) : 0};
  }

  // Far below 0 softplus is exp
  Vec log2_softplus(Vec score) const {
    return score < splat(-30.f) ? score : log2(softplus(score * static_cast<float>(kLn2)));
  }
  // The exponent of what a score weighs, both in base 2
  Vec lift(Vec score, Vec gain_log2, Vec offset) const {
    if (op.weights == Attention::kSoftplus) return log2_softplus(score);
    const Vec share = exp2_to_127(log2_softplus(score) + gain_log2), rest = share - offset;
    return rest <= Attention::kReweightedSnap * share ? splat(-INFINITY)
                                                      : static_cast<float>(op.power) * log2(rest);
  }

  // What a score weighs where no maximum is taken off; -inf, which is not seen, weighs nothing
  Vec weight(Vec score) const {
    const Vec s = score * static_cast<float>(kLn2);
    Vec p = op.weights == Attention::kSigmoid    ? sigmoid(s)
            : op.weights == Attention::kSoftplus ? softplus(s)
                                                 : max(zero(), s);
    const Vec factor = p;
    for (int i = 1; i < static_cast<int>(op.power); ++i) p *= factor;
    return score == splat(-INFINITY) ? zero() : p;
  }

  // In base 2, of a row of a part
  float bias_of(const Part& part, int64_t row, int64_t key) const {
    const int64_t at = part.sequence->batch * op.bias.strides[0] +
                       head_of(part, row) * op.bias.strides[1] +
                       query_of(part, row) * op.bias.strides[2] + key * op.bias.strides[3];
    float x = 0;
    dispatch_float(op.bias.dtype, [&]<class B>(B) { load_row(&x, op.bias.as<B>() + at, 1, 1); });
    x *= static_cast<float>(kLog2e);
    return x < Attention::kHidingLog2 ? -INFINITY : x;
  }

  static float log2_of(const Tensor& per_head, int64_t head) {
    return static_cast<float>(per_head.as<float>()[head * per_head.strides[0]] * kLog2e);
  }
  // Of float8
  static float scale_of(const Tensor& per_head, int64_t head) {
    return per_head ? per_head.as<float>()[head * per_head.strides[0]] : 1;
  }
  int64_t query_of(const Part& part, int64_t row) const { return (part.first_row + row) / group; }
  int64_t head_of(const Part& part, int64_t row) const {
    return part.head * group + (part.first_row + row) % group;
  }
  float slope_of(const Part& part, int64_t row) const {
    return op.slopes ? log2_of(op.slopes, head_of(part, row)) : 0;
  }
  int64_t position_of(const Part& part, int64_t row) const {
    return part.sequence->position(query_of(part, row));
  }

  // The keys that a query sees: p - window < t <= p, the upper bound with a window or causal only
  Range visible(const Sequence& sequence, int64_t query) const {
    const int64_t p = sequence.position(query);
    const int64_t end =
        op.causal || op.window > 0 ? std::clamp<int64_t>(p + 1, 0, sequence.sk) : sequence.sk;
    const int64_t begin = op.window > 0 ? std::max<int64_t>(p - op.window + 1, 0) : 0;
    return {std::min(begin, end), end};
  }
  // The same under the mask, of a row of a part
  MaskRow masked(const Part& part, int64_t row) const {
    const Sequence& sequence = *part.sequence;
    const int64_t query = query_of(part, row);
    const int64_t first =
        op.cu_seqlens_q ? first_block_row(sequence.q_begin, sequence.index, mask.block_q) : 0;
    return mask.row(sequence.batch, sequence.index, first, sequence.q_begin, head_of(part, row),
                    query, sequence.position(0), visible(sequence, query).end);
  }
  // How many
  int64_t seen(const Part& part, int64_t row) const {
    const Range all = visible(*part.sequence, query_of(part, row));
    return all.end - all.begin;
  }
  // The same among the keys of a part
  Range visible(const Part& part, int64_t row) const {
    const Range all = visible(*part.sequence, query_of(part, row));
    const int64_t begin = std::clamp(all.begin, part.keys.begin, part.keys.end);
    return {begin, std::clamp(all.end, begin, part.keys.end)};
  }

  // What a score weighs in a row whose weights add up to 2^lse, and how a natural score, or the
  // level of the row, moves it
  struct Weight {
    Vec p, rate, level_rate = zero();
  };
  Weight differentiate(Vec score, Vec lse_log2, Vec gain_log2, Vec offset) const {
    if (!lifted && shifted) {
      const Vec p = exp2_to_127(score - lse_log2);
      return {p, p};
    }
    const Vec s = score * static_cast<float>(kLn2);
    if (lifted) {
      const Vec p = exp2_to_127(lift(score, gain_log2, offset) - lse_log2);
      Vec moved = p;  // by the log of softplus
      if (op.level) {
        const Vec share = exp2_to_127(log2_softplus(score) + gain_log2);
        moved = p == zero() ? p : static_cast<float>(op.power) * p / (share - offset) * share;
      }
      return {p, score < splat(-30.f) ? moved : moved * sigmoid(s) / softplus(s), -moved};
    }
    const Vec share = op.normalise ? exp2_to_127(min(splat(127), -lse_log2)) : splat(1),
              p = share * weight(score);
    if (op.weights == Attention::kSigmoid) return {p, p * (1.f - sigmoid(s))};
    if (op.weights == Attention::kSoftplus) return {p, share * sigmoid(s)};
    Vec rate = share * static_cast<float>(op.power);
    for (int i = 1; i < static_cast<int>(op.power); ++i) rate *= s;
    return {p, s > zero() ? rate : zero()};
  }

  // A row of q as f32, times its factor
  void load_q(float* to, const Part& part, int64_t row) const {
    const Tensor& q = op.q;
    const T* from = q.as<T>() + part.sequence->batch * q.strides[0] +
                    (part.sequence->q_begin + query_of(part, row)) * q.strides[1] +
                    head_of(part, row) * q.strides[2];
    load_row(to, from, q.strides[3], d);
    if (op.cosine) make_unit(to, d);
    const float factor = row_factor(part, row);
    for (int64_t i = 0; i < d; ++i) to[i] *= factor;
  }
  float row_factor(const Part& part, int64_t row) const {
    return q_factor * length_factor(part, row) * scale_of(op.q_scale, head_of(part, row)) *
           scale_of(op.k_scale, part.head);
  }
  float length_factor(const Part& part, int64_t row) const {
    if (op.length_scale == 0) return 1;
    const auto n = static_cast<double>(std::max<int64_t>(seen(part, row), 1));
    return static_cast<float>(op.length_scale * std::log(n));
  }

  // Rows of k as the scores take them
  void finish_k(float* rows, int64_t width, int64_t count) const {
    if (op.cosine)
      for (int64_t t = 0; t < count; ++t) make_unit(rows + t * width, d);
  }

  // The sink enters as a key without a value, once: in the first split
  void start(const Part& part, int64_t row, float& row_max, float& row_sum) const {
    const float sink =
        op.sink && part.split == 0 ? log2_of(op.sink, head_of(part, row)) : -INFINITY;
    row_max = !shifted ? 0 : sink == -INFINITY ? -FLT_MAX : sink;
    row_sum = sink == -INFINITY ? 0.f : 1.f;
  }
};

}  // namespace attention
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
