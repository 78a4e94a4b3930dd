#pragma once
#include <cmath>
#include <functional>
#include <numbers>
#include <vector>

#include "attention/list_sm90.cuh"
#include "attention/split_sm90.h"
#include "common/sm90.cuh"

// A Hopper attention kernel on the emulator, against its definition in float64
namespace heddle {

struct Sequence {
  int64_t sq, sk;
};

// A random mask of a case
struct CaseMask {
  int64_t block_q = 0, block_k = 0, heads = 1;
  int percent = 0;  // of the blocks are listed
  int64_t window = 0, sink_tokens = 0;
  int columns = 0, diagonals = 0;  // so many of each head
  int64_t document = 0;            // its tokens, or 0
};

// Terms and weights of a case beyond those of softmax
struct CaseSlots {
  int weights = Attention::kSoftmax;
  bool normalise = true;
  float power = 1, offset = 1, length_scale = 0;
  bool cosine = false, sloped = false;
  float shift = 0;  // added to all scores, as a bias that is one number, or
  BiasForm bias = BiasForm::kNone;
  DType bias_dtype = DType::kF32;
  bool shared = false;  // the bias, by all batches, heads and queries
  // So many last keys, or first keys if it is negative, have biases that are as low as can be, or
  int64_t hidden = 0;
  float low = -0x1.fep127f;
  float tilt = 0;     // by how much biases fall from key to key, or
  int64_t every = 1;  // from so many keys to as many
};

struct Case {
  int64_t b, sq, sk, hq, hk;
  bool causal = false;
  int64_t window = 0;
  bool mapped = false, sink = false;
  int64_t narrower = 0;               // by how much d and dv are smaller than the kernel's
  std::vector<Sequence> packed = {};  // cuSeqlens, with pages of q alone, or
  std::vector<int64_t> cached = {};   // cacheSeqlens
  int processors = 1;
  int64_t poisoned = -1;  // this key and its value are not numbers
  int64_t infinite = -1;  // the value of this key begins with infinity
  int64_t lost = -1;      // this query is no number
  int64_t page_size = 0;  // k and v lie in pages of this size
  CaseMask mask = {};     // with block_q
  bool scaled = false;    // heads of float8 have scales, some of which are below or at zero
  float scale = 0;        // or `spread` over the root of d
  float spread = 1;
  float values = 1;              // about so large
  float cap = 3, slope = 0.01f;  // of what is mapped
  float noise = 0;               // keys are one of their head and this much of their own, or
  CaseSlots slots = {};
};

// A spread of scores of which maxima rise by more than weights may
constexpr float steep(DType type) { return type == DType::kF16 ? 11 : 30; }

// The lists of a mask as sets of bits, and the same as a table of bools
struct MaskBits {
  int64_t words;
  std::vector<bool> table;  // [lines, 32 * words]
  std::vector<int32_t> bits;

  MaskBits(int64_t lines, int64_t columns)
      : words((columns + 31) / 32),
        table(static_cast<size_t>(lines * words * 32)),
        bits(static_cast<size_t>(lines * words)) {}
  void set(int64_t line, int64_t column) {
    table[static_cast<size_t>(line * words * 32 + column)] = true;
    bits[static_cast<size_t>(line * words + column / 32)] |=
        static_cast<int32_t>(1u << column % 32);
  }
  bool get(int64_t line, int64_t column) const {
    return column >= 0 && column < words * 32 &&
           table[static_cast<size_t>(line * words * 32 + column)];
  }
};

// One more row and head than the kernel may touch, all of it NaN
template <DType kType> struct HeadArray {
  using Element = std::conditional_t<size_of(kType) == 1, uint8_t, uint16_t>;
  static constexpr auto kNaN = static_cast<Element>(0x7fff);

  HeadArray(int64_t b, int64_t s, int64_t h, int64_t d, int64_t gap)
      : strides{(s + 1) * (h + 1) * (d + gap), (h + 1) * (d + gap), d + gap},
        bits(static_cast<size_t>(b * strides.batch + 16), kNaN) {
    while (reinterpret_cast<uintptr_t>(bits.data() + shift) % 16 != 0) ++shift;
  }
  Element& at(int64_t b, int64_t s, int64_t h, int64_t i) {
    return data()[b * strides.batch + s * strides.row + h * strides.head + i];
  }
  float value(int64_t b, int64_t s, int64_t h, int64_t i) {
    return emulator::decode(kType, at(b, s, h, i));
  }
  Element* data() { return bits.data() + shift; }

  Strides strides;
  std::vector<Element> bits;
  size_t shift = 0;
};

// The mask of a case, and its lists
struct DrawnMask {
  const Case& c;
  const CaseMask& m;
  int64_t block_q, block_k, rows_each, lines;
  MaskBits blocks, columns, diagonals;
  std::vector<int32_t> bounds;
  std::vector<UnitBits> unit_bits;
  std::vector<int> unit_marks;

  DrawnMask(const Case& c, emulator::Random& random)
      : c(c),
        m(c.mask),
        block_q(std::max<int64_t>(m.block_q, 1)),
        block_k(std::max<int64_t>(m.block_k, 1)),
        rows_each(c.packed.empty() ? (c.sq + block_q - 1) / block_q
                                   : c.sq / block_q + static_cast<int64_t>(c.packed.size())),
        lines((c.packed.empty() ? c.b : static_cast<int64_t>(c.packed.size())) * m.heads),
        blocks(c.b * m.heads * rows_each, (c.sk + block_k - 1) / block_k),
        columns(lines, c.sk),
        diagonals(lines, c.sk) {
    if (!m.block_q) return;
    for (int64_t line = 0; line < c.b * m.heads * rows_each; ++line)
      for (int64_t column = 0; column < (c.sk + block_k - 1) / block_k; ++column)
        if (random.below(100) < static_cast<uint32_t>(m.percent)) blocks.set(line, column);
    for (int64_t line = 0; line < lines; ++line) {
      for (int i = 0; i < m.columns; ++i)
        columns.set(line, random.below(static_cast<uint32_t>(c.sk)));
      for (int i = 0; i < m.diagonals; ++i)
        diagonals.set(line, random.below(static_cast<uint32_t>(c.sk)));
    }
    for (int64_t i = 0; m.document && i < c.b * c.sq; ++i) {
      const int64_t begin = (c.sk - c.sq + i % c.sq) / m.document * m.document;
      bounds.push_back(static_cast<int32_t>(begin));
      bounds.push_back(static_cast<int32_t>(begin + m.document));
    }
  }

  // Puts it into a call and lists its units
  void list(ForwardCall& call) {
    if (!m.block_q) return;
    call.masked = true;
    MaskView& view = call.lists.mask;
    view.blocks = m.percent ? blocks.bits.data() : nullptr;
    view.columns = m.columns ? columns.bits.data() : nullptr;
    view.diagonals = m.diagonals ? diagonals.bits.data() : nullptr;
    view.bounds = m.document ? bounds.data() : nullptr;
    view.heads = m.heads;
    view.block_rows = rows_each;
    view.block_words = blocks.words;
    view.token_words = columns.words;
    view.hq = c.hq;
    view.sq = c.sq;
    view.block_q = m.block_q;
    view.window = m.window;
    view.sink_tokens = m.sink_tokens;
    while (1 << view.block_k_log2 < m.block_k) ++view.block_k_log2;
    const int64_t count = size_lists_sm90(call);
    unit_bits.resize(static_cast<size_t>(count * call.lists.words * call.lists.warpgroups));
    unit_marks.resize(static_cast<size_t>(count * call.lists.mark_words()));
    call.lists.bits = unit_bits.data();
    call.lists.marks = unit_marks.data();
    launch_list_sm90(call, count, nullptr);
  }

  // Whether row `i` of a sequence, whose first is row `q0` of q, sees key `t` of it
  bool sees(int64_t sequence, int64_t q0, int64_t h, int64_t i, int64_t position, int64_t t) const {
    if (!m.block_q) return true;
    const int64_t batch = c.packed.empty() ? sequence : 0, own = h / (c.hq / m.heads);
    const int64_t first = c.packed.empty() ? 0 : q0 / block_q + sequence;
    if (m.document) {
      const int64_t at = 2 * (batch * c.sq + q0 + i);
      if (t < bounds[static_cast<size_t>(at)] || t >= bounds[static_cast<size_t>(at + 1)])
        return false;
    }
    const int64_t line = sequence * m.heads + own;
    return (m.percent &&
            blocks.get((batch * m.heads + own) * rows_each + first + i / block_q, t / block_k)) ||
           (m.columns && columns.get(line, t)) ||
           (m.diagonals && diagonals.get(line, position - t)) ||
           (t <= position && t > position - m.window) || t < m.sink_tokens;
  }
};

inline float normal(emulator::Random& random) {
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += static_cast<float>(random.below(1 << 16)) / 65536.f;
  return sum - 6;
}

using Run = std::function<void(SplitCall&)>;

// The largest error over what is allowed, which is above 1 when the kernel is wrong
template <DType kType, DType kOut = kType>
double check(const Case& c, int64_t d, int64_t dv, emulator::Random& random, const Run& run) {
  // pages of one sequence after another, in descending order and with one between that nobody uses
  const bool packed = !c.packed.empty(), in_caches = packed && c.page_size;
  std::vector<int64_t> cached = c.cached;
  for (const Sequence& sequence : c.packed)
    if (in_caches) cached.push_back(sequence.sk);
  const int64_t caches = in_caches ? static_cast<int64_t>(cached.size()) : c.b;
  const int64_t pages_each = c.page_size ? (c.sk + c.page_size - 1) / c.page_size : 1;
  const int64_t blocks = c.page_size ? 2 * caches * pages_each : c.b;
  const int64_t block_rows = c.page_size ? c.page_size : c.sk;
  std::vector<int32_t> table;
  for (int64_t i = 0; i < caches * pages_each; ++i)
    table.push_back(static_cast<int32_t>(blocks - 1 - 2 * i));
  const auto block_of = [&](int64_t b, int64_t t) {
    return c.page_size ? table[static_cast<size_t>(b * pages_each + t / c.page_size)] : b;
  };
  using Array = HeadArray<kType>;
  Array q(c.b, c.sq, c.hq, d, 0), k(blocks, block_rows, c.hk, d, 16 / size_of(kType)),
      v(blocks, block_rows, c.hk, dv, 0);
  HeadArray<kOut> out(c.b, c.sq, c.hq, dv, 0);
  const auto key_value = [&](Array & x, int64_t b, int64_t t, int64_t h, int64_t e) -> auto& {
    return x.at(block_of(b, t), t % block_rows, h, e);
  };
  const auto draw = [&](Array& to, int64_t s, int64_t h, int64_t size, float scale) {
    for (int64_t b = 0; b < (&to == &q ? c.b : caches); ++b)
      for (int64_t i = 0; i < (cached.empty() || &to == &q ? s : cached[size_t(b)]); ++i)
        for (int64_t j = 0; j < h; ++j)
          for (int64_t e = 0; e < size; ++e)
            (&to == &q ? q.at(b, i, j, e) : key_value(to, b, i, j, e)) =
                static_cast<Array::Element>(emulator::encode(kType, scale * normal(random)));
  };
  draw(q, c.sq, c.hq, d, 2);
  draw(k, c.sk, c.hk, d, c.noise > 0 ? c.noise : 1);
  for (int64_t j = 0; c.noise > 0 && j < c.hk; ++j)
    for (int64_t e = 0; e < d; ++e) {
      const float common = normal(random);
      for (int64_t b = 0; b < c.b; ++b)
        for (int64_t i = 0; i < c.sk; ++i)
          key_value(k, b, i, j, e) =
              static_cast<Array::Element>(emulator::encode(kType, common + k.value(b, i, j, e)));
    }
  draw(v, c.sk, c.hk, dv, c.values);
  // keys that are not in use have lengths that those in use must not have
  for (int64_t b = 0; c.slots.cosine && b < static_cast<int64_t>(cached.size()); ++b)
    for (int64_t i = cached[size_t(b)]; i < c.sk; ++i)
      for (int64_t j = 0; j < c.hk; ++j)
        for (int64_t e = 0; e < d; ++e)
          key_value(k, b, i, j, e) = static_cast<Array::Element>(emulator::encode(kType, 0x1p100f));
  for (int64_t h = 0; c.lost >= 0 && h < c.hq; ++h) q.at(0, c.lost, h, 0) = Array::kNaN;
  for (int64_t h = 0; c.poisoned >= 0 && h < c.hk; ++h) {
    for (int64_t e = 0; e < d; ++e) key_value(k, 0, c.poisoned, h, e) = Array::kNaN;
    for (int64_t e = 0; e < dv; ++e) key_value(v, 0, c.poisoned, h, e) = Array::kNaN;
  }
  for (int64_t h = 0; c.infinite >= 0 && h < c.hk; ++h)
    key_value(v, 0, c.infinite, h, 0) =
        static_cast<Array::Element>(emulator::encode(kType, INFINITY));
  std::vector<float> lse(static_cast<size_t>(c.b * c.hq * c.sq), NAN);
  std::vector<float> slopes, sink, scales;
  for (int64_t h = 0; h < c.hq; ++h) {
    slopes.push_back(c.slope * static_cast<float>(h + 1));
    sink.push_back(static_cast<float>(h) - 1);
    scales.push_back(c.scaled ? 0.75f - 0.75f * static_cast<float>(h) : 1);
  }
  std::vector<int32_t> cu_q{0}, cu_k{0}, cache;
  for (const Sequence& sequence : c.packed) {
    cu_q.push_back(cu_q.back() + static_cast<int32_t>(sequence.sq));
    cu_k.push_back(cu_k.back() + static_cast<int32_t>(sequence.sk));
  }
  for (const int64_t length : cached) cache.push_back(static_cast<int32_t>(length));
  int tickets[2] = {};

  SplitCall call{};
  call.dtype = kType;
  call.b = c.b;
  call.sq = c.sq;
  call.sk = c.sk;
  call.hq = c.hq;
  call.hk = c.hk;
  call.d = d;
  call.dv = dv;
  call.q = q.data();
  call.k = k.data();
  call.v = v.data();
  call.out = out.data();
  call.lse = lse.data();
  call.q_strides = q.strides;
  call.k_strides = k.strides;
  call.v_strides = v.strides;
  call.out_strides = out.strides;
  call.scale = c.scale != 0 ? c.scale : c.spread / std::sqrt(static_cast<float>(d));
  call.soft_cap = c.mapped ? c.cap : 0.f;
  call.causal = c.causal;
  call.window = c.window;
  call.slopes = c.mapped || c.slots.sloped ? slopes.data() : nullptr;
  call.sink = c.sink ? sink.data() : nullptr;
  call.slopes_stride = call.sink_stride = 1;
  if (packed) {
    call.cu_seqlens_q = cu_q.data();
    call.cu_seqlens_k = in_caches ? nullptr : cu_k.data();
    call.cu_q_stride = call.cu_k_stride = 1;
    call.sequences = static_cast<int64_t>(c.packed.size());
  }
  call.cache_seqlens = cached.empty() ? nullptr : cache.data();
  call.cache_stride = 1;
  call.out_dtype = kOut;
  if (c.scaled) {
    const float* all = scales.data();
    call.scales = {all, all, all, 1, 1, 1};
  }
  call.processors = c.processors;
  std::vector<uint8_t> turned(kType == DType::kE4M3 ? static_cast<size_t>(turned_bytes(call)) : 0,
                              0x7f);
  call.turned = turned.data();
  call.tickets = tickets;
  if (c.page_size) {
    call.block_table = table.data();
    call.table_row = pages_each;
    call.table_column = 1;
    call.pages = blocks;
    call.page_size = c.page_size;
  }
  DrawnMask mask(c, random);
  mask.list(call);
  const CaseSlots& s = c.slots;
  Slots& slots = call.slots;
  slots.weights = s.weights;
  slots.normalise = s.normalise;
  slots.power = s.power;
  slots.offset = s.offset;
  slots.length_scale = s.length_scale;
  // rows of a bias are longer than they have to be, and begin with a whole word, or 16 bytes
  const int64_t bias_row = s.bias == BiasForm::kPairs ? c.sk + 8 - c.sk % 8 : c.sk + 2 - c.sk % 2,
                bias_rows = s.shared ? 1 : c.b * c.hq * c.sq;
  std::vector<float> bias(static_cast<size_t>(bias_rows * bias_row), NAN);
  std::vector<uint16_t> bias_bits(bias.size(), 0x7fff);
  for (int64_t i = 0; s.bias > BiasForm::kRow && i < bias_rows; ++i)
    for (int64_t t = 0; t < c.sk; ++t) {
      float& value = bias[static_cast<size_t>(i * bias_row + t)] =
          (s.hidden < 0 ? t >= -s.hidden : t < c.sk - s.hidden)
              ? normal(random) - s.tilt * static_cast<float>(t / s.every)
              : s.low;
      if (s.bias_dtype == DType::kF32) continue;
      uint16_t& bits = bias_bits[static_cast<size_t>(i * bias_row + t)];
      bits = emulator::encode(s.bias_dtype, value);
      value = emulator::decode(s.bias_dtype, bits);
    }
  slots.bias_form = s.shift != 0 ? BiasForm::kRow : s.bias;
  slots.bias_dtype = s.bias_dtype;
  slots.bias = s.shift != 0                  ? static_cast<const void*>(&s.shift)
               : s.bias_dtype == DType::kF32 ? static_cast<const void*>(bias.data())
                                             : bias_bits.data();
  if (!s.shared && s.shift == 0) {
    slots.bias_strides[2] = bias_row;
    slots.bias_strides[1] = c.sq * bias_row;
    slots.bias_strides[0] = c.hq * c.sq * bias_row;
  }
  const auto length = [&](int64_t size, const auto& value) {
    double sum = 0;
    for (int64_t e = 0; e < size; ++e) sum += double{value(e)} * value(e);
    return std::sqrt(sum);
  };
  const auto q_length = [&](int64_t b, int64_t i, int64_t h) {
    return length(d, [&](int64_t e) { return q.value(b, i, h, e); });
  };
  const auto k_length = [&](int64_t b, int64_t t, int64_t h) {
    return length(d, [&](int64_t e) { return emulator::decode(kType, key_value(k, b, t, h, e)); });
  };
  // for the kernel that writes them
  std::vector<float> q_factors, k_factors;
  if (s.cosine) {
    slots.cosine = true;
    slots.q_row = c.sq;
    slots.k_row = (c.sk + 3) / 4 * 4 + 128;
    q_factors.assign(static_cast<size_t>(c.b * c.hq * slots.q_row), NAN);
    k_factors.assign(static_cast<size_t>(c.b * c.hk * slots.k_row), NAN);
    slots.q_factors = q_factors.data();
    slots.k_factors = k_factors.data();
  }

  struct Row {
    int64_t token, index, position, from, until;  // sees keys `from` to below `until` at most
    int64_t cache, k0;                            // which of k and v has them, and from where on
    size_t line;                                  // of lse
    std::vector<int64_t> keys;
  };
  const auto each_row = [&](const std::function<void(int64_t, int64_t, const Row&)>& visit) {
    int64_t q0 = 0, k0 = 0;
    const auto count = static_cast<int64_t>(packed ? c.packed.size() : size_t(c.b));
    for (int64_t sequence = 0; sequence < count; ++sequence) {
      const int64_t b = packed ? 0 : sequence;
      const int64_t sq = packed ? c.packed[size_t(sequence)].sq : c.sq;
      const int64_t sk = packed           ? c.packed[size_t(sequence)].sk
                         : cached.empty() ? c.sk
                                          : cached[size_t(sequence)];
      for (int64_t h = 0; h < c.hq; ++h)
        for (int64_t i = 0; i < sq; ++i) {
          Row row{q0 + i,
                  i,
                  i + sk - sq,
                  0,
                  sk,
                  in_caches ? sequence : b,
                  in_caches ? 0 : k0,
                  size_t((b * c.hq + h) * c.sq + q0 + i),
                  {}};
          if (c.causal || c.window) row.until = std::clamp<int64_t>(row.position + 1, 0, sk);
          if (c.window)
            row.from = std::min(row.until, std::max<int64_t>(row.position - c.window + 1, 0));
          for (int64_t t = row.from; t < row.until; ++t)
            if (mask.sees(sequence, q0, h, i, row.position, t)) row.keys.push_back(t);
          visit(b, h, row);
        }
      if (packed) q0 += sq, k0 += sk;
    }
  };
  const auto scores_of = [&](int64_t b, int64_t h, const Row& row) {
    const int64_t head = h / (c.hq / c.hk);
    const auto seen = static_cast<double>(std::max<int64_t>(1, row.until - row.from));
    std::vector<double> scores;
    for (const int64_t t : row.keys) {
      double score = 0;
      for (int64_t e = 0; e < d; ++e)
        score += double{q.value(b, row.token, h, e)} *
                 emulator::decode(kType, key_value(k, row.cache, row.k0 + t, head, e));
      score *= double{call.scale} * scales[size_t(h)] * scales[size_t(head)];
      if (s.cosine) score /= q_length(b, row.token, h) * k_length(row.cache, row.k0 + t, head);
      if (s.length_scale != 0) score *= s.length_scale * std::log(seen);
      if (call.soft_cap > 0) score = double{c.cap} * std::tanh(score / double{c.cap});
      if (call.slopes) score += double{slopes[size_t(h)]} * static_cast<double>(t - row.position);
      const int64_t line = s.shared ? 0 : (b * c.hq + h) * c.sq + row.index;
      double added = s.shift;
      if (s.bias > BiasForm::kRow) added = bias[static_cast<size_t>(line * bias_row + t)];
      scores.push_back(added / std::numbers::ln2 < Attention::kHidingLog2 ? score - INFINITY
                                                                          : score + added);
    }
    return scores;
  };
  const auto softplus = [](double x) {
    return std::max(x, 0.) + std::log1p(std::exp(-std::fabs(x)));
  };
  // The log of what a score weighs; a row's `level` is the log of the sum of softplus of its scores
  const auto exponent_of = [&](double score, float level, int64_t seen) {
    if (s.weights == Attention::kSoftmax) return score;
    if (s.weights == Attention::kSigmoid) return -std::log1p(std::exp(-score));
    if (s.weights == Attention::kRelu)
      return std::isnan(score) ? score : s.power * std::log(std::max(score, 0.));
    if (s.weights == Attention::kSoftplus) return std::log(softplus(score));
    const double share = static_cast<double>(seen) * softplus(score) / std::exp(double{level});
    const double above = share - (seen > Attention::kYoungRows ? s.offset : 0);
    return above <= Attention::kReweightedSnap * share ? -INFINITY : s.power * std::log(above);
  };
  std::vector<float> levels(lse.size(), NAN);
  slots.level = s.weights == Attention::kReweighted ? levels.data() : nullptr;
  const auto find_level = [&](int64_t b, int64_t h, const Row& row) {
    double sum = 0;
    for (const double score : scores_of(b, h, row)) sum += softplus(score);
    if (call.sink) sum += std::exp(static_cast<double>(call.sink[h]));
    levels[row.line] = static_cast<float>(std::log(sum));
  };
  if (slots.level) each_row(find_level);
  slots.level_strides[0] = c.hq * c.sq;
  slots.level_strides[1] = c.sq;
  slots.level_strides[2] = 1;

  // what is not written must not be read
  std::vector<float> part_out(
      static_cast<size_t>(2 * c.processors * kSplitRows * split_columns(call)), NAN);
  std::vector<float2> part_state(static_cast<size_t>(2 * c.processors * kSplitRows), {NAN, NAN});
  std::vector<int> arrivals(static_cast<size_t>(c.processors), 0);
  call.part_out = part_out.data();
  call.part_state = part_state.data();
  call.arrivals = arrivals.data();
  run(call);

  const auto unit_of = [](DType type) {
    return type == DType::kE4M3 ? 0x1p-5 : type == DType::kBF16 ? 0x1p-8 : 0x1p-11;
  };
  // beyond its least normal number a weight of e4m3, which is of up to 2^8, has a fixed step
  const double step = kType == DType::kE4M3 ? 0x1p-18 : 0;
  const auto zero = [](int counter) { return counter == 0; };
  const bool left = std::ranges::all_of(tickets, zero) && std::ranges::all_of(arrivals, zero);
  double worst = left ? 0 : INFINITY;
  const auto judge = [&](double actual, double expected, double allowed) {
    const bool same = actual == expected || (std::isnan(actual) && std::isnan(expected));
    const double error = same ? 0 : std::fabs(actual - expected) / allowed;
    // otherwise NaN counts as wrong
    worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
  };
  double errors = 0, squares = 0;
  each_row([&](int64_t b, int64_t h, const Row& row) {
    const std::vector<double> scores = scores_of(b, h, row);
    const float level = levels[row.line];
    const int64_t head = h / (c.hq / c.hk);
    std::vector<double> weights;
    double top = c.sink ? sink[size_t(h)] : -INFINITY;
    for (const double score : scores) {
      weights.push_back(exponent_of(score, level, row.until - row.from));
      top = std::max(top, weights.back());
    }
    double sum = c.sink ? std::exp(sink[size_t(h)] - top) : 0;
    for (double& weight : weights)
      sum += weight = top == -INFINITY && !std::isnan(weight) ? 0 : std::exp(weight - top);
    // what is left of a share has fewer digits than the share, and its power fewer still; rows of
    // length 1 are rounded to f16, both of q and k
    const double share_blur = takes_units(call) ? 0x1p-10 : 4e-6;
    const double blur =
        s.weights == Attention::kReweighted
            ? share_blur * s.power * (1 + s.offset / std::exp(top / double{s.power}))
            : 0;
    judge(lse[row.line], sum == 0 ? -INFINITY : top + std::log(sum), 1e-4 + blur);
    const double factor = sum == 0 ? 0 : s.normalise ? 1 / sum : std::exp(top);
    for (int64_t e = 0; e < dv; ++e) {
      double value = 0, size = 0, all = 0;
      for (size_t i = 0; i < weights.size(); ++i) {
        const double at =
            double{scales[size_t(head)]} *
            emulator::decode(kType, key_value(v, row.cache, row.k0 + row.keys[i], head, e));
        const double term = weights[i] * factor * at;
        value += term;
        size += std::fabs(term);
        all += std::fabs(at);
      }
      const double got = out.value(b, row.token, h, e);
      errors += (got - value) * (got - value);
      squares += value * value;
      // weights and result are each rounded once
      judge(got, value,
            2 * (unit_of(kType) * size + unit_of(kOut) * std::fabs(value)) + blur * size +
                step / sum * all + 1e-6);
    }
  });
  if (c.noise > 0 && squares > 0) judge(std::sqrt(errors / squares), 0, 3e-3);
  // nothing beside the rows that exist was written
  for (int64_t b = 0; b < c.b; ++b)
    for (int64_t i = 0; i <= c.sq; ++i)
      for (int64_t h = 0; h <= c.hq; ++h)
        if ((i == c.sq || h == c.hq) && out.at(b, i, h, 0) != 0x7fff) worst = INFINITY;
  return worst;
}

#ifdef HEDDLE_CHECKED  // attention_check.cpp has them
extern template double check<DType::kF16>(const Case&, int64_t, int64_t, emulator::Random&,
                                          const Run&);
extern template double check<DType::kBF16>(const Case&, int64_t, int64_t, emulator::Random&,
                                           const Run&);
extern template double check<DType::kE4M3, DType::kF16>(const Case&, int64_t, int64_t,
                                                        emulator::Random&, const Run&);
extern template double check<DType::kE4M3, DType::kBF16>(const Case&, int64_t, int64_t,
                                                         emulator::Random&, const Run&);
#endif

// Runs cases with the random seed that the command line names; what main returns
template <DType kType, DType kOut = kType, size_t N>
int check_all(const Case (&cases)[N], int d, int dv, int argc, char** argv,
              const std::function<void(const Case&, SplitCall&)>& run) {
  emulator::goes_together = true;
  return emulator::run_cases(cases, argc, argv, [&](const Case& c, emulator::Random& random) {
    return check<kType, kOut>(c, d - c.narrower, std::max<int64_t>(dv - c.narrower, 0), random,
                              [&](SplitCall& call) { run(c, call); });
  });
}

}  // namespace heddle
