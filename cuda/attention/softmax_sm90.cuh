#pragma once
#include <cstdint>

#include "common/lanes.cuh"
#include "common/sm90.cuh"
#include "ops/attention.h"

// What happens to scores between the two products on Hopper. A thread of a warp holds pairs of
// columns of rows lane / 4 and lane / 4 + 8 of its warp's 16: element i of an accumulator is in row
// i / 2 % 2 of the two and in column 8 * (i / 4) + 2 * (lane % 4) + i % 2.
namespace heddle::sm90 {

inline constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// cap * tanh(score / cap), by tanh(x) = 1 - 2 / (exp(2x) + 1)
__device__ __forceinline__ float cap_score(float score, float cap) {
  const float e = exp2_approx(score * (2 * kLog2e / cap));
  return cap * (1 - 2 * reciprocal_approx(e + 1));
}

// Scores become cap(score * scale) * unit, without a cap score * scale, and get
// from + slope * column. Branches are around the loops: inside they cost more than all else.
template <int kScores>
__device__ __forceinline__ void map_scores(float (&acc)[kScores], float soft_cap, float unit,
                                           float slope, const float (&scale)[2],
                                           const float (&from)[2]) {
  float factor[2] = {scale[0], scale[1]};
  if (soft_cap > 0) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) acc[i] = cap_score(acc[i] * scale[i / 2 % 2], soft_cap);
    factor[0] = factor[1] = unit;
  }
  if (slope != 0) {
#pragma unroll
    for (int i = 0; i < kScores; ++i)
      acc[i] = fmaf(acc[i], factor[i / 2 % 2],
                    fmaf(slope, static_cast<float>(i / 4 * 8 + i % 2), from[i / 2 % 2]));
  } else {
#pragma unroll
    for (int i = 0; i < kScores; ++i) acc[i] = fmaf(acc[i], factor[i / 2 % 2], from[i / 2 % 2]);
  }
}

// What slopes add to the products of a tile beside that of this lane's first column
template <int kScores>
__device__ __forceinline__ void add_slopes(float (&acc)[kScores], float slope) {
#pragma unroll
  for (int i = 0; i < kScores; ++i)
    acc[i] = fmaf(slope, static_cast<float>(8 * (i / 4) + i % 2), acc[i]);
}

// body(i, bias) for each element of an accumulator, with the biases of a tile in shared memory of
// which this warp has 16 rows from `row` on
template <DType kType, int kScores, class Tile, class Body>
__device__ __forceinline__ void each_bias(const Tile& tile, int row, int lane, const Body& body) {
#pragma unroll
  for (int i = 0; i < kScores; i += 8) {
    uint32_t pairs[4];  // laid out as accumulators are
    ldmatrix_x4(tile.address(row + lane % 16, i * 2 + lane / 16 * 8), pairs);
#pragma unroll
    for (int x = 0; x < 8; ++x)
      body(i + x, unpack<kType>(static_cast<uint16_t>(pairs[x / 2] >> x % 2 * 16)));
  }
}

// Where a thread's two rows stand among the keys, and where the keys end that they see
struct RowBounds {
  int position[2], until[2];
};

// softCap and slopes, in log2 units; `distance` is from the row to the key
struct ScoreMap {
  float scale, soft_cap, slope_log2;

  __device__ __forceinline__ float operator()(float product, int distance) const {
    float score = product * scale;
    if (soft_cap > 0) score = cap_score(score, soft_cap);
    return fmaf(slope_log2, static_cast<float>(distance), score * kLog2e);
  }
  // A tile of which this lane's first column is key `first`
  template <int kScores>
  __device__ __forceinline__ void operator()(float (&acc)[kScores], const RowBounds& rows,
                                             int first) const {
    const float its = soft_cap > 0 ? scale : scale * kLog2e;
    map_scores(acc, soft_cap, kLog2e, slope_log2, {its, its},
               {slope_log2 * static_cast<float>(first - rows.position[0]),
                slope_log2 * static_cast<float>(first - rows.position[1])});
  }
};

// Scores of keys that a row doesn't see; a window of 0 is all
template <int kScores>
__device__ __forceinline__ void mask_scores(float (&acc)[kScores], const RowBounds& rows, int key,
                                            int window, int lane) {
  static_assert(kScores <= 64);
  // A bit for each key that this lane has of a row, of those before `end`
  const auto before = [](int end) {
    const int from_0 = max(end, 0), bits = min(from_0 / 8 * 2 + min(from_0 % 8, 2), 32);
    return static_cast<uint32_t>((uint64_t{1} << bits) - 1);
  };
  uint32_t seen[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int beyond = rows.until[r] - key - lane % 4 * 2;
    seen[r] = before(beyond) & ~(window ? before(beyond - window) : 0);
  }
  // by 64 columns, of which the warp may see all
#pragma unroll
  for (int part = 0; part < kScores; part += 32) {
    const uint32_t all = kScores - part < 32 ? (1u << (kScores - part) / 2) - 1 : 0xffff;
    if (__all_sync(~0u, (seen[0] & seen[1] & all << part / 2) == all << part / 2)) continue;
#pragma unroll
    for (int i = part; i < min(kScores, part + 32); i += 2) {
      const uint32_t bits = seen[i / 2 % 2] >> i / 4 * 2;
      if (!(bits & 1)) acc[i] = -INFINITY;
      if (!(bits & 2)) acc[i + 1] = -INFINITY;
    }
  }
}

// Scores of two units of 64 keys that begin at `key[0]` and `key[1]`: bit i % 64 of word i / 64 of
// a row tells whether it sees key i, counted from this lane's first column on
template <int kScores>
__device__ __forceinline__ void mask_scores(float (&acc)[kScores], const uint64_t (&seen)[2][2]) {
  static_assert(kScores == 64);
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 2 * r; i < kScores; i += 4) {
      const uint64_t word = seen[r][i / 32] >> i % 32 / 4 * 8;
      if (!(word & 1)) acc[i] = -INFINITY;
      if (!(word & 2)) acc[i + 1] = -INFINITY;
    }
}

// The largest of what this lane has of row r, and of `highest`
template <int kScores>
__device__ __forceinline__ float own_highest(const float (&acc)[kScores], int r, float highest) {
#pragma unroll
  for (int i = 2 * r; i < kScores; i += 4) highest = fmaxf(highest, fmaxf(acc[i], acc[i + 1]));
  return highest;
}

// The largest bits of what this lane has of row r, and of `highest`. Numbers from 0 on have the
// order of their bits, of which three are compared at once.
template <int kScores>
__device__ __forceinline__ int highest_bits(const float (&acc)[kScores], int r, int highest) {
#pragma unroll
  for (int i = 2 * r; i < kScores; i += 4)
    highest = __vimax3_s32(highest, __float_as_int(acc[i]), __float_as_int(acc[i + 1]));
  return highest;
}

// Whether no number that this lane has of row r is above `most`, or that is not known
template <int kScores>
__device__ __forceinline__ bool none_above(const float (&acc)[kScores], int r, float most) {
  return most >= 0 && highest_bits(acc, r, 0) <= __float_as_int(most);
}

// Weights as the operand of the product with values
template <DType kType, int kScores>
__device__ __forceinline__ void pack_weights(uint32_t (&frag)[kScores / 8][4],
                                             const float (&weights)[kScores]) {
#pragma unroll
  for (int i = 0; i < kScores / 2; ++i)
    frag[i / 4][i % 4] = pack<kType>(weights[2 * i], weights[2 * i + 1]);
}

// The softmax of a thread's two rows so far
struct RowSoftmax {
  float row_max[2], row_sum[2];
  float shrink[2];  // of what was summed before the last update

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) row_max[r] = -INFINITY, row_sum[r] = 0;
  }

  // Scores become weights exp2(to_log2 * (score - row_max) + kLift); whether sums of before have to
  // shrink. row_max may lag behind the maximum by `lag` and is set to `room` above it: with weights
  // of 16 bits neither costs digits
  template <int kLift = 0, int kScores>
  __device__ __forceinline__ bool update(float (&acc)[kScores], float to_log2, float lag = 8,
                                         float room = 0) {
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = quad_max(own_highest(acc, r, row_max[r]));
      highest = (highest - row_max[r]) * to_log2 <= lag ? row_max[r] : highest + room;
      // no key so far: (-inf) - (-inf) would poison the row
      const float base_log2 = highest == -INFINITY ? 0 : highest * to_log2;
      const bool same = highest == row_max[r];
      shrink[r] = same ? 1 : exp2_approx(row_max[r] * to_log2 - base_log2);
      moved |= !same;
      add_exponentials(acc, r, to_log2, kLift ? kLift - base_log2 : -base_log2);
      row_max[r] = highest;
    }
    return __any_sync(~0u, moved) != 0;
  }

  // The same of scores that lack the `base` of their row. Lanes look at each other's maxima only
  // where one of the warp is beyond `lag`. With kEven row_max of the second row is set to `apart`
  // below that of the first, unless weights of either would be too small.
  template <bool kEven = false, int kScores>
  __device__ __forceinline__ bool update_lazily(float (&acc)[kScores], float to_log2,
                                                const float (&base)[2], float lag, float room = 0,
                                                float apart = 0) {
    float most[2];
    bool beyond = false, moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r] = own_highest(acc, r, acc[2 * r]) + base[r];
      shrink[r] = 1;
      beyond |= (most[r] - row_max[r]) * to_log2 > lag;
    }
    if (__any_sync(~0u, beyond)) {
      float next[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        next[r] = quad_max(most[r]);
        next[r] = (next[r] - row_max[r]) * to_log2 > lag ? next[r] + room : row_max[r];
        // what is as low hides keys: of exponents relative to it rounding alone would be left
        if (next[r] * to_log2 < Attention::kHidingLog2) next[r] = -INFINITY;
      }
      if constexpr (kEven) {
        constexpr float kMostApart = 40;
        const float other = next[1] + apart;
        if (fabsf(next[0] - other) * to_log2 <= kMostApart) {
          next[0] = fmaxf(next[0], other);
          next[1] = next[0] - apart;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        moved |= next[r] != row_max[r];
        shrink[r] = next[r] == row_max[r] ? 1 : exp2_approx((row_max[r] - next[r]) * to_log2);
        row_max[r] = next[r];
      }
      moved = __any_sync(~0u, moved);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // no key so far: (-inf) - (-inf) would poison the row
      add_exponentials(acc, r, to_log2,
                       row_max[r] == -INFINITY ? 0 : (base[r] - row_max[r]) * to_log2);
    }
    return moved;
  }

  // Scores become weights relative to `top` of their row. Nobody looks for a maximum: if a sum of
  // weights is beyond `most`, or no number, it is false.
  template <int kScores>
  __device__ __forceinline__ static bool weigh(float (&acc)[kScores], float to_log2,
                                               const float (&top)[2], float most,
                                               float (&sums)[2]) {
    bool fits = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sums[r] = 0;
      weigh_row(acc, r, to_log2, -top[r] * to_log2, sums[r]);
      fits &= sums[r] <= most;
    }
    return fits;
  }

  // Whether row_max of the second row is `apart` below that of the first, but for rounding
  __device__ __forceinline__ bool even(float apart) const {
    const float slack = fmaxf(fabsf(row_max[0]), fabsf(apart)) * 0x1p-21f;
    return fabsf(row_max[0] - (row_max[1] + apart)) <= slack;
  }

  // The same of products that lack their slopes, relative to a `top` that both rows have
  template <int kScores>
  __device__ __forceinline__ static bool weigh_sloped(float (&acc)[kScores], float to_log2,
                                                      float slope_log2, float top, float most,
                                                      float (&sums)[2]) {
    const float step = 8 * slope_log2;
    float shift[2] = {-top * to_log2, fmaf(-top, to_log2, slope_log2)};  // of both columns
    sums[0] = sums[1] = 0;
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
#pragma unroll
      for (int x = 0; x < 4; ++x) acc[i + x] = exp2_approx(fmaf(acc[i + x], to_log2, shift[x % 2]));
#pragma unroll
      for (int r = 0; r < 2; ++r) sums[r] += acc[i + 2 * r] + acc[i + 2 * r + 1];
#pragma unroll
      for (int x = 0; x < 2; ++x)
        shift[x] = __fadd_rn(shift[x], step);  // as a multiply-add it would take a move beside it
    }
    return sums[0] <= most && sums[1] <= most;
  }

  // Such weights
  __device__ __forceinline__ void join(const float (&sums)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) row_sum[r] += sums[r];
  }

  // Whether the maxima of all rows of the warp are
  __device__ __forceinline__ bool above(float limit) const {
    return __all_sync(~0u, fminf(row_max[0], row_max[1]) > limit) != 0;
  }

  // Products become weights relative to what those before are, with the biases of a tile in shared
  // memory of which this warp has 16 rows from `row` on. Nobody looks for a maximum: if some sum of
  // weights is beyond `most`, or no number, products are lost and sums are as before.
  template <DType kType, int kScores, class Tile>
  __device__ __forceinline__ bool add_biased(float (&acc)[kScores], float scale_log2,
                                             const Tile& tile, int row, int lane, float most) {
    const float shift[2] = {-row_max[0] * kLog2e, -row_max[1] * kLog2e};
    float sums[2][2] = {};  // of either half, which need not wait for each other
    each_bias<kType, kScores>(tile, row, lane, [&](int i, float bias) {
      const int r = i / 2 % 2;
      acc[i] = exp2_approx(fmaf(acc[i], scale_log2, fmaf(bias, kLog2e, shift[r])));
      if (i % 2) sums[r][i * 2 / kScores] += acc[i - 1] + acc[i];
    });
    bool fits = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) fits &= sums[r][0] + sums[r][1] <= most;
    if (!__all_sync(~0u, fits)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) row_sum[r] += sums[r][0] + sums[r][1];
    return true;
  }

  // The largest of a row's scores in this tile
  template <int kScores>
  __device__ __forceinline__ static float highest(const float (&acc)[kScores], int r) {
    return quad_max(own_highest(acc, r, -INFINITY));
  }

  // Makes weights relative to 2^next from now on; whether they were to something else
  __device__ __forceinline__ bool move(int r, float next) {
    const bool same = next == row_max[r];
    shrink[r] = same ? 1 : exp2_approx(row_max[r] - next);
    row_max[r] = next;
    return !same;
  }

  // Weights that are what they should be already
  template <int kScores> __device__ __forceinline__ void add(const float (&weights)[kScores]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = 0;
#pragma unroll
      for (int i = 2 * r; i < kScores; i += 4) sum += weights[i] + weights[i + 1];
      row_sum[r] = fmaf(row_sum[r], shrink[r], sum);
    }
  }

  // Scores of row r become exp2(to_log2 * score + shift_log2), and join its sum
  template <int kScores>
  __device__ __forceinline__ void add_exponentials(float (&acc)[kScores], int r, float to_log2,
                                                   float shift_log2) {
    float sum = 0;
    weigh_row(acc, r, to_log2, shift_log2, sum);
    row_sum[r] = fmaf(row_sum[r], shrink[r], sum);
  }

  template <int kScores>
  __device__ __forceinline__ static void weigh_row(float (&acc)[kScores], int r, float to_log2,
                                                   float shift_log2, float& sum) {
#pragma unroll
    for (int i = 2 * r; i < kScores; i += 4) {
      acc[i] = exp2_approx(fmaf(acc[i], to_log2, shift_log2));
      acc[i + 1] = exp2_approx(fmaf(acc[i + 1], to_log2, shift_log2));
      sum += acc[i] + acc[i + 1];
    }
  }

  // Over the four threads of a row
  __device__ __forceinline__ float total(int r) const { return quad_sum(row_sum[r]); }
};

// What is left to do with a row's sums
struct RowEnd {
  float lse_log2, factor;  // of the sum of values

  // A sink's logit takes part in the normaliser alone
  __device__ __forceinline__ RowEnd(float top_log2, float sum, const float* sink) {
    // a row without keys gives zero
    const bool empty = sum == 0;
    float share = 1;
    if (empty) top_log2 = -INFINITY;
    if (sink) {
      const float sink_log2 = *sink * kLog2e, top = fmaxf(top_log2, sink_log2);
      share = exp2_approx(top_log2 - top);
      sum = sum * share + exp2_approx(sink_log2 - top);
      top_log2 = top;
    }
    lse_log2 = sum == 0 ? -INFINITY : top_log2 + log2f(sum);
    // no sum is near the ends of f32: its weights are relative to what is near the largest
    factor = empty ? 0 : share * reciprocal_approx(sum);
  }
};

// Values of columns lane, lane + 32, ... of one row, by a warp and from the keys alone that the row
// sees: those from `begin` to below `end` of which `sees` is true. Slow, and only for rows that
// came out as no number: a weight of zero doesn't silence a masked value that is none. `key_at` and
// `value_at` give the rows of k and v.
template <DType kType, DType kScoreType = kType, int kColumns, class Element, class Rows,
          class Sees, class Score>
__device__ __forceinline__ void attend_seen(float (&values)[kColumns], const Element* q,
                                            const Rows& key_at, const Rows& value_at, int d, int dv,
                                            int begin, int end, const Sees& sees,
                                            const Score& score_log2, float lse_log2, int lane) {
  for (int key = begin; key < end; key += 32) {
    float weight = -1;  // of keys that are not seen
    if (key + lane < end && sees(key + lane)) {
      const Element* k = key_at(key + lane);
      float product = 0;
      for (int e = 0; e < d; ++e)
        product = fmaf(unpack<kScoreType>(q[e]), unpack<kScoreType>(k[e]), product);
      weight = exp2_approx(score_log2(product, key + lane) - lse_log2);
    }
    for (int i = 0; i < min(32, end - key); ++i) {
      const float shared = __shfl_sync(~0u, weight, i);
      if (shared < 0) continue;
      const Element* v = value_at(key + i);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (32 * c + lane < dv)
          values[c] = fmaf(shared, unpack<kType>(v[32 * c + lane]), values[c]);
    }
  }
}

}  // namespace heddle::sm90
