#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "attention/forward_sm90.h"
#include "attention/softmax_sm90.cuh"

// What scores and weights are made of on Hopper beyond softmax of scaled products. With a distance
// of t - p from row to key, scores are
//
//   s = cap(product * scale) + slope * distance + bias
//
// and a tile of them is kept in the unit that its weights take: log2(e) for exponentials, else 1.
// Options are values of the call, each a branch around the loop over the elements of a tile.
//
// Weights are relative to a power of two that each row has, as those of softmax are to its maximum.
// In general they are exponentials of the logarithm of what a score weighs. Where no logarithm has
// to be taken, sums are those of the weights themselves, which costs half the exponentials:
//
//   sigmoid     relative to 2^-15: they are at most 1, and those of 2^-29 still have all digits
//   softplus    relative to ln 2, if the largest weighs between 1/4 and 83
//   reweighted  relative to the largest so far, if the power is whole: x^15 is five products
namespace heddle::sm90 {

// What a row brings to its scores and weights
struct SlotRow {
  float scale;     // of products
  float constant;  // of scores, added to them
  float gain_log2, offset;
  float highest;  // of its scores, if it is above 0
  const uint8_t* bias;
};

// What weights of re-weighted rows are made of, relative to their largest. Beside high scores
// softplus is the score and two terms, and beside higher ones the score alone; the constant of the
// score is in `offset` then.
enum class SoftplusBy { kAny, kLogarithm, kTwoTerms, kScore };
struct Shares {
  float gain[2], offset[2];
  SoftplusBy by;
};

struct SlotMap {
  static constexpr float kSigmoidBase = -15, kSoftplusBase = -0.528766373f;
  const Slots& slots;
  float scale, soft_cap, unit;
  float slope;
  SlotRow row[2];
  const float* columns;  // factors of keys

  __device__ __forceinline__ SlotMap(const Slots& slots, float scale, float soft_cap)
      : slots(slots),
        scale(scale),
        soft_cap(soft_cap),
        unit(slots.weights == Attention::kRelu ? 1 : kLog2e),
        slope(0),
        row{},
        columns(nullptr) {}

  // Sums are those of weights, whatever they are
  __device__ __forceinline__ bool plain_sigmoid() const {
    return slots.weights == Attention::kSigmoid && !slots.normalise;
  }

  // Row `i` of a sequence, which is row `token` of q and sees so many keys
  __device__ __forceinline__ SlotRow row_of(int batch, int head, int hq, int64_t token, int64_t i,
                                            int seen) const {
    const int64_t line = static_cast<int64_t>(batch) * hq + head;
    SlotRow row{scale, 0, 0, 0, 0, nullptr};
    if (slots.units) {
      row.scale = 1;
      row.constant = slots.shifts[line * slots.q_row + token];
    } else {
      if (slots.length_scale != 0)
        row.scale *= slots.length_scale * logf(static_cast<float>(max(seen, 1)));
      if (slots.q_factors) row.scale *= slots.q_factors[line * slots.q_row + token];
      if (soft_cap <= 0) row.scale *= unit;
    }
    if (slots.bias_form != BiasForm::kNone) {
      row.bias = static_cast<const uint8_t*>(slots.bias) +
                 (batch * slots.bias_strides[0] + head * slots.bias_strides[1] +
                  i * slots.bias_strides[2]) *
                     static_cast<int>(size_of(slots.bias_dtype));
      if (slots.bias_form == BiasForm::kRow) row.constant = unit * bias_at(row.bias, 0);
    }
    if (slots.level && seen > 0) {
      const int64_t at = batch * slots.level_strides[0] + head * slots.level_strides[1] +
                         token * slots.level_strides[2];
      const float level = slots.level[at];
      row.gain_log2 = level == -INFINITY ? level : log2f(static_cast<float>(seen)) - level * kLog2e;
      row.offset = seen > Attention::kYoungRows ? slots.offset : 0;
      if (slots.units) row.highest = slots.peaks[at];
    }
    return row;
  }

  __device__ __forceinline__ float bias_at(const uint8_t* row, int64_t t) const {
    if (slots.bias_dtype == DType::kF32) return bias_at<DType::kF32>(row, t);
    if (slots.bias_dtype == DType::kF16) return bias_at<DType::kF16>(row, t);
    return bias_at<DType::kBF16>(row, t);
  }
  template <DType kBias>
  __device__ __forceinline__ static float bias_at(const uint8_t* row, int64_t t) {
    if constexpr (kBias == DType::kF32) {
      return reinterpret_cast<const float*>(row)[t];
    } else {
      return unpack<kBias>(reinterpret_cast<const uint16_t*>(row)[t]);
    }
  }

  // Whether something of every tile is read, one word for two scores
  __device__ __forceinline__ bool reads() const {
    return columns || slots.bias_form == BiasForm::kPairs;
  }
  // Of the pair of columns that begins at key `t`: the biases of row `x`, or the factor of key t +
  // x
  __device__ __forceinline__ uint32_t word(int t, int x, int sk) const {
    if (columns) return std::bit_cast<uint32_t>(columns[t + x]);
    return t < sk ? *reinterpret_cast<const uint32_t*>(row[x].bias + 2 * int64_t{t}) : 0;
  }

  // Scores of products. This lane's first column is key `first`, and `words` has what `word` gives
  // of columns first + 8 g.
  template <int kScores>
  __device__ __forceinline__ void map(float (&acc)[kScores],
                                      const uint32_t (&words)[kScores / 4][2],
                                      const RowBounds& bounds, int first, int sk) const {
    if (columns) {
#pragma unroll
      for (int g = 0; g < kScores / 4; ++g)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const float factor = std::bit_cast<float>(words[g][x]);
          acc[4 * g + x] *= factor;
          acc[4 * g + 2 + x] *= factor;
        }
    }
    const auto from = [&](int r) {
      return fmaf(slope, static_cast<float>(first - bounds.position[r]), row[r].constant);
    };
    map_scores(acc, soft_cap, unit, slope, {row[0].scale, row[1].scale}, {from(0), from(1)});
    if (slots.bias_form <= BiasForm::kRow) return;
    const bool pairs = slots.bias_form == BiasForm::kPairs;
    if (slots.bias_dtype == DType::kF32) {
      add_biases<DType::kF32>(acc, first, sk);
    } else if (slots.bias_dtype == DType::kF16) {
      pairs ? add_pairs<DType::kF16>(acc, words) : add_biases<DType::kF16>(acc, first, sk);
    } else {
      pairs ? add_pairs<DType::kBF16>(acc, words) : add_biases<DType::kBF16>(acc, first, sk);
    }
  }

  template <DType kBias, int kScores>
  __device__ __forceinline__ void add_pairs(float (&acc)[kScores],
                                            const uint32_t (&words)[kScores / 4][2]) const {
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
      const uint32_t pair = words[i / 4][i / 2 % 2];
      acc[i] = fmaf(unpack<kBias>(static_cast<uint16_t>(pair)), unit, acc[i]);
      acc[i + 1] = fmaf(unpack<kBias>(static_cast<uint16_t>(pair >> 16)), unit, acc[i + 1]);
    }
  }
  template <DType kBias, int kScores>
  __device__ __forceinline__ void add_biases(float (&acc)[kScores], int first, int sk) const {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int t = first + i / 4 * 8 + i % 2;
      if (t < sk) acc[i] = fmaf(bias_at<kBias>(row[i / 2 % 2].bias, t), unit, acc[i]);
    }
  }

  // Log2 of what a score weighs, for one product of any row
  __device__ __forceinline__ float exponent_of(const SlotRow& row, float product, int key,
                                               int position) const {
    if (columns) product *= columns[key];
    float score = product * row.scale;
    if (soft_cap > 0) score = unit * cap_score(score, soft_cap);
    score += fmaf(slope, static_cast<float>(key - position), row.constant);
    if (slots.bias_form > BiasForm::kRow) score = fmaf(bias_at(row.bias, key), unit, score);
    return exponent(score, row);
  }

  __device__ __forceinline__ float exponent(float score, const SlotRow& row) const {
    constexpr float kFar = -24;  // weights are exponentials there
    if (slots.weights == Attention::kSoftmax) return score;
    if (slots.weights == Attention::kRelu) return slots.power * log2_approx(relu(score));
    const bool sigmoid = slots.weights == Attention::kSigmoid;
    const float u = exp2_approx(sigmoid ? -score : -fabsf(score));
    if (sigmoid) return score < kFar ? score : -log2_approx(1 + u);
    const float weight_log2 =
        score < kFar ? score : log2_approx(fmaxf(score, 0) + log2_beyond_one(u)) + kSoftplusBase;
    if (slots.weights == Attention::kSoftplus) return weight_log2;
    const float share = exp2_approx(weight_log2 + row.gain_log2), above = share - row.offset;
    return above <= Attention::kReweightedSnap * share ? -INFINITY
                                                       : slots.power * log2_approx(above);
  }

  // Scores become weights; whether sums of before have to shrink
  template <int kScores>
  __device__ __forceinline__ bool weigh(float (&acc)[kScores], RowSoftmax& rows) const {
    if (plain_sigmoid()) {
      weigh_sigmoids(acc, rows);
      return false;
    }
    bool moved = false;
    if (slots.weights == Attention::kSoftplus && weigh_softplus(acc, rows, moved)) return moved;
    if (slots.weights == Attention::kReweighted && reweigh(acc, rows, moved)) return moved;
    if (slots.weights != Attention::kSoftmax) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) acc[i] = exponent(acc[i], row[i / 2 % 2]);
    }
    return rows.update(acc, 1.f);
  }

  // 1 / (1 + exp(-s)), two by one reciprocal of a product where that cannot overflow
  template <int kScores>
  __device__ __forceinline__ void weigh_sigmoids(float (&acc)[kScores], RowSoftmax& rows) const {
    float lowest = acc[0];
#pragma unroll
    for (int i = 1; i < kScores; ++i) lowest = fminf(lowest, acc[i]);
    invert(acc, lowest < -kFarSigmoid, [](float score, int) { return exp2_approx(-score); });
    rows.shrink[0] = rows.shrink[1] = 1;
    rows.add(acc);
  }

  // 1 / (1 + u), relative to what sigmoids are; `far` if some u of this lane is beyond kFarSigmoid
  static constexpr float kFarSigmoid = 60;
  template <int kScores, class Exponential>
  __device__ __forceinline__ static void invert(float (&acc)[kScores], bool far,
                                                const Exponential& u_of) {
    constexpr float kBase = 0x1p-15f;
    static_assert(kSigmoidBase == -15);
    const auto whole = [&](int i) { return fmaf(u_of(acc[i], i), kBase, kBase); };
    if (__any_sync(~0u, far)) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) acc[i] = reciprocal_approx(whole(i));
    } else {
#pragma unroll
      for (int i = 0; i < kScores; i += 2) {
        const float a = whole(i), b = whole(i + 1), both = reciprocal_approx(a * b);
        acc[i] = b * both;
        acc[i + 1] = a * both;
      }
    }
  }

  // The same of products with rows' constants
  template <int kScores>
  __device__ __forceinline__ void make_sigmoids(float (&acc)[kScores], float scale,
                                                RowSoftmax& rows) const {
    constexpr float kBase = 0x1p-15f;
    rows.shrink[0] = rows.shrink[1] = 1;
    // e - e^2 + e^3 within 2^-14 of all, in two terms of which the second is a little less
    constexpr float kLow = -6, kShare = 0.987f;
    bool low = true;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      low &= none_above(acc, r, (kLow - row[r].constant) * reciprocal_approx(scale));
    if (__all_sync(~0u, low)) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const float e = exp2_approx(fmaf(acc[i], scale, row[i / 2 % 2].constant + 15));
        acc[i] = e * fmaf(e, -kShare * kBase, 1.f);
      }
      rows.add(acc);
      return;
    }
    bool far = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float lowest = acc[2 * r];
#pragma unroll
      for (int i = 2 * r; i < kScores; i += 4) lowest = fminf(lowest, fminf(acc[i], acc[i + 1]));
      far |= fmaf(lowest, -row[r].scale, -row[r].constant) > kFarSigmoid;
    }
    invert(acc, far, [&](float product, int i) {
      return exp2_approx(fmaf(product, -row[i / 2 % 2].scale, -row[i / 2 % 2].constant));
    });
    rows.add(acc);
  }

  // Softplus in units of ln 2, of scores that are no larger
  static constexpr float kMostSoftplus = 120;
  __device__ __forceinline__ static float softplus_log2(float score) {
    return log2_approx(1 + exp2_approx(score));
  }

  // Makes softplus relative to ln 2, not if some row's largest is too small or too large
  template <int kScores>
  __device__ __forceinline__ bool move_softplus(const float (&acc)[kScores], RowSoftmax& rows,
                                                bool& moved) const {
    constexpr float kLeast = -1.8f;
    float next[2];
    bool fits = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float highest = rows.highest(acc, r), before = rows.row_max[r];
      const bool none = highest == -INFINITY && before == highest;
      next[r] = none ? before : kSoftplusBase;
      fits &= none || before == kSoftplusBase || (before < kSoftplusBase && highest >= kLeast);
      fits &= highest <= kMostSoftplus;
    }
    if (__any_sync(~0u, !fits)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) moved |= rows.move(r, next[r]);
    return true;
  }

  template <int kScores>
  __device__ __forceinline__ bool weigh_softplus(float (&acc)[kScores], RowSoftmax& rows,
                                                 bool& moved) const {
    if (!move_softplus(acc, rows, moved)) return false;
#pragma unroll
    for (int i = 0; i < kScores; ++i) acc[i] = softplus_log2(acc[i]);
    rows.add(acc);
    moved = __any_sync(~0u, moved) != 0;
    return true;
  }

  // Adds what scores weigh to the sums of rows, and nothing else: of softplus, one logarithm of the
  // product of all 1 + exp(-|s|), which are 2 at most
  template <int kScores>
  __device__ __forceinline__ void sum(float (&acc)[kScores], RowSoftmax& rows,
                                      float (&beyond)[2]) const {
    bool moved;
    const bool adds = slots.weights == Attention::kSoftplus && move_softplus(acc, rows, moved);
    const float before[2] = {rows.row_sum[0], rows.row_sum[1]};
    if (!adds) {
      rows.row_sum[0] = rows.row_sum[1] = 0;
      weigh(acc, rows);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float tile = rows.row_sum[r];
      if (adds) {
        float above, product;
        softplus_parts(acc, r, above, product);
        tile = above + log2_approx(product);
      }
      rows.row_sum[r] = before[r] * rows.shrink[r];
      beyond[r] *= rows.shrink[r];
      add_tile(tile, rows.row_sum[r], beyond[r]);
    }
  }

  // Adds to a sum. Equal tiles round alike, so what that adds is taken from the next one.
  __device__ __forceinline__ static void add_tile(float tile, float& sum, float& beyond) {
    const float more = tile - beyond, next = sum + more;
    beyond = next - sum - more;
    sum = next;
  }

  // The sum of scores above 0, and the product of 1 + exp(-|s|)
  template <int kScores>
  __device__ __forceinline__ static void softplus_parts(const float (&acc)[kScores], int r,
                                                        float& above, float& product) {
    above = 0;
    product = 1;
#pragma unroll
    for (int i = 2 * r; i < kScores; i += 4)
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        above += relu(acc[i + x]);
        product = fmaf(product, exp2_approx(-fabsf(acc[i + x])), product);
      }
  }

  // log2(1 + u), by the series where 1 + u has too few digits of u
  __device__ __forceinline__ static float log2_beyond_one(float u) {
    const float series =
        u * (1 + u * (-0.5f + u * (1 / 3.f + u * (-0.25f + u * (0.2f + u * (-1 / 6.f))))));
    return u < 0.0625f ? series * kLog2e : log2_approx(1 + u);
  }

  // Adds softplus of scores of unit rows, which are `shift` more than products, in units of ln 2,
  // as logarithms of products of 1 + exp(s). `highest` are bits of numbers from 0 on.
  template <int kScores>
  __device__ __forceinline__ static void sum_units(float (&acc)[kScores], const float (&shift)[2],
                                                   RowSoftmax& rows, float (&beyond)[2],
                                                   int (&highest)[2]) {
    constexpr int kChains = kScores / 16;
    constexpr float kLeast = 1, kLarge = 512;
    float products[2][kChains], own[2];
    bool fits = true;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      acc[i] += shift[i / 2 % 2];
      float& product = products[i / 2 % 2][i / 4 % kChains];
      const float u = exp2_approx(acc[i]);
      product = i / 4 < kChains && i % 2 == 0 ? 1 + u : fmaf(product, u, product);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = highest_bits(acc, r, highest[r]);
      own[r] = 0;
#pragma unroll
      for (float product : products[r]) own[r] += log2_approx(product);
      fits &= (own[r] >= kLeast || rows.row_sum[r] >= kLarge) && own[r] < INFINITY;
    }
    if (!__all_sync(~0u, fits)) {
      // some product is too large, or small numbers u lose digits in 1 + u
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = 0, product = 0;  // of 1 + exp(-|s|), less 1
#pragma unroll
        for (int i = 2 * r; i < kScores; i += 4)
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            const float u = exp2_approx(-fabsf(acc[i + x]));
            sum += relu(acc[i + x]);
            product += fmaf(product, u, u);
          }
        own[r] = sum + log2_beyond_one(product);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) add_tile(own[r], rows.row_sum[r], beyond[r]);
  }

  // How a warp's unit rows weigh
  template <bool kTakesHigh>
  __device__ __forceinline__ void open_shares(RowSoftmax& rows, Shares& shares) const {
    constexpr float kLeastGain = 0x1p-20f, kMostGain = 2, kMostOffset = 16;
    bool fits = true, high = kTakesHigh && slots.power == 15, higher = high;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float highest = row[r].highest, gain = exp2_approx(row[r].gain_log2 + kSoftplusBase);
      const float share = gain * softplus_log2(highest), above = share - row[r].offset;
      fits &= highest > 0 && gain >= kLeastGain && gain <= kMostGain;
      const bool none = above <= Attention::kReweightedSnap * share;
      const float inverse = none ? 0 : reciprocal_approx(above);
      shares.gain[r] = gain * inverse;
      shares.offset[r] = -row[r].offset * inverse;
      fits &= shares.offset[r] >= -kMostOffset;
      rows.row_max[r] = none ? -INFINITY : slots.power * log2_approx(above);
      // what two terms lack beside the largest
      const float u = exp2_approx(-highest);
      high &= none || gain * u * u * u * 0x1p17f <= above;
      // weights of such scores, which are beyond the offset by about that, lack 2^-11
      constexpr float kAbout = 12, kLack = 15 * kLog2e * 0x1p11f;
      const float beyond = fmaxf(kAbout - row[r].offset * reciprocal_approx(gain), 1);
      higher &= none || highest >= log2_approx(kLack * reciprocal_approx(beyond));
    }
    fits = __all_sync(~0u, fits);
    high = __all_sync(~0u, high);
    higher = __all_sync(~0u, higher);
    shares.by = !fits     ? SoftplusBy::kAny
                : !high   ? SoftplusBy::kLogarithm
                : !higher ? SoftplusBy::kTwoTerms
                          : SoftplusBy::kScore;
    if (shares.by == SoftplusBy::kTwoTerms || shares.by == SoftplusBy::kScore) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        shares.offset[r] = fmaf(row[r].constant, shares.gain[r], shares.offset[r]);
    }
    if (!fits) rows.clear();
  }

  // Powers of 15 and 3 of scores of unit rows
  template <int kScores>
  __device__ __forceinline__ bool reweigh(float (&acc)[kScores], RowSoftmax& rows,
                                          const Shares& shares) const {
    if (shares.by == SoftplusBy::kAny) {
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        acc[i] = exponent(acc[i] + row[i / 2 % 2].constant, row[i / 2 % 2]);
      return rows.update(acc, 1.f);
    }
    rows.shrink[0] = rows.shrink[1] = 1;
    const auto cube = [](float x) { return x * x * x; };
    const auto fifth = [](float x) {
      const float square = x * x;
      return x * (square * square);
    };
    if (shares.by == SoftplusBy::kScore) {
      // a fourth by the unit of exponentials, which has nothing else to do
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int r = i / 2 % 2;
        const float x = saturate(fmaf(acc[i], shares.gain[r], shares.offset[r]));
        acc[i] = i % 4 == 3 ? exp2_approx(15 * log2_approx(x)) : fifth(cube(x));
      }
      rows.add(acc);
      return false;
    }
    if (shares.by == SoftplusBy::kTwoTerms) {
      // s + log2(1 + u) for u = 2^-s, of which two terms are taken
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int r = i / 2 % 2;
        const float u = exp2_approx(-acc[i] - row[r].constant), first = shares.gain[r] * kLog2e;
        acc[i] = cube(saturate(fmaf(fmaf(u, -0.5f * first, first), u,
                                    fmaf(acc[i], shares.gain[r], shares.offset[r]))));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int r = i / 2 % 2;
        acc[i] = cube(saturate(
            fmaf(softplus_log2(acc[i] + row[r].constant), shares.gain[r], shares.offset[r])));
      }
    }
    if (slots.power == 15) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) acc[i] = fifth(acc[i]);
    }
    rows.add(acc);
    return false;
  }

  // x^power for x = share - offset relative to the largest. Not if that is little beside the
  // offset, as differences have few digits there, or if the mean is too small or too large for
  // softplus.
  template <int kScores>
  __device__ __forceinline__ bool reweigh(float (&acc)[kScores], RowSoftmax& rows,
                                          bool& moved) const {
    constexpr float kLeastGain = 0x1p-20f, kMostGain = 2, kMostOffset = 16;
    const int power = static_cast<int>(slots.power);
    // fifteen is five cubes, which is a product less than bit by bit
    const bool cubes = power % 3 == 0;
    const int times = cubes ? power / 3 : power;
    bool fits = static_cast<float>(power) == slots.power;
    float next[2], gain[2], offset[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      gain[r] = exp2_approx(row[r].gain_log2 + kSoftplusBase);
      const float highest = rows.highest(acc, r), share = gain[r] * softplus_log2(highest);
      const float above = share - row[r].offset, before = rows.row_max[r];
      const float top = above <= Attention::kReweightedSnap * share
                            ? -INFINITY
                            : slots.power * log2_approx(above);
      next[r] = top - before <= 8 ? before : fmaxf(before, top);
      const float inverse =
          next[r] == -INFINITY ? 0 : exp2_approx(-next[r] * reciprocal_approx(slots.power));
      fits &= highest <= kMostSoftplus;
      fits &= gain[r] >= kLeastGain && gain[r] <= kMostGain;
      gain[r] *= inverse;
      offset[r] = -row[r].offset * inverse;
      fits &= offset[r] >= -kMostOffset;
    }
    if (__any_sync(~0u, !fits)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) moved |= rows.move(r, next[r]);
    constexpr int kPart = kScores % 16 == 0 ? 16 : 8;
#pragma unroll
    for (int part = 0; part < kScores; part += kPart) {
      float x[kPart];
#pragma unroll
      for (int i = 0; i < kPart; ++i)
        acc[part + i] = x[i] =
            relu(fmaf(softplus_log2(acc[part + i]), gain[i / 2 % 2], offset[i / 2 % 2]));
      if (cubes) {
#pragma unroll
        for (int i = 0; i < kPart; ++i) acc[part + i] = x[i] = x[i] * x[i] * x[i];
      }
#pragma unroll 1
      for (int bit = 30 - __clz(times); bit >= 0; --bit) {
        const bool odd = times >> bit & 1;
#pragma unroll
        for (int i = 0; i < kPart; ++i) acc[part + i] *= acc[part + i];
        if (odd) {
#pragma unroll
          for (int i = 0; i < kPart; ++i) acc[part + i] *= x[i];
        }
      }
    }
    rows.add(acc);
    moved = __any_sync(~0u, moved) != 0;
    return true;
  }
};

}  // namespace heddle::sm90
