#pragma once
#include "cpu/attention.h"

// Attention of few rows, as in decoding, with channels in the lanes for both products and keys in
// the lanes between them. Reading k and v is what takes the time. A row visits exactly the keys
// that it sees.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace attention {

template <class T> class RowKernel {
 public:
  // With more rows than this the lanes of TileKernel are full enough
  static constexpr int64_t kMaxRows = kLanes / 4;

  static int64_t padded(int64_t d) { return (d + kLanes - 1) / kLanes * kLanes; }
  static size_t floats(int64_t d, int64_t dv) {
    return whole_lines(kMaxRows * (padded(d) + padded(dv)) +
                       kTileKeys * (padded(d) + padded(dv) + 1));
  }

  RowKernel(const Problem<T>& problem, const Part& part, float* memory)
      : problem_(problem),
        part_(part),
        d_(padded(problem.d)),
        dv_(padded(problem.dv)),
        q_(memory),
        acc_(q_ + kMaxRows * d_),
        tile_k_(acc_ + kMaxRows * dv_),
        tile_v_(tile_k_ + kTileKeys * d_),
        scores_(tile_v_ + kTileKeys * dv_) {
    std::fill_n(memory, floats(problem.d, problem.dv), 0.f);
  }

  void run(const State& state) {
    const Attention& op = problem_.op;
    const Tokens<T> k(op.k, op.block_table, *part_.sequence, part_.head);
    const Tokens<T> v(op.v, op.block_table, *part_.sequence, part_.head);
    for (int64_t row = 0; row < part_.rows; ++row) {
      problem_.load_q(q_ + row * d_, part_, row);
      problem_.start(part_, row, state.row_max[row], state.row_sum[row]);
    }
    for (int64_t t = part_.keys.begin; t < part_.keys.end; t += kTileKeys) {
      const Range tile{t, std::min(t + kTileKeys, part_.keys.end)};
      k.load(tile_k_, d_, tile, problem_.d);
      problem_.finish_k(tile_k_, d_, tile.end - tile.begin);
      v.load(tile_v_, dv_, tile, problem_.dv);
      const Range next{tile.end, std::min(tile.end + kTileKeys, part_.keys.end)};
      k.prefetch(next, problem_.d);
      v.prefetch(next, problem_.dv);
      for (int64_t row = 0; row < part_.rows; ++row) {
        const Range seen = problem_.visible(part_, row);
        const Range keys{std::max(seen.begin, tile.begin), std::min(seen.end, tile.end)};
        if (keys.begin < keys.end) step(row, keys, tile, state);
      }
    }
    for (int64_t row = 0; row < part_.rows; ++row)
      std::copy_n(acc_ + row * dv_, problem_.dv, state.acc + row * problem_.dv);
  }

 private:
  void step(int64_t row, Range keys, Range tile, const State& state) {
    const int64_t count = keys.end - keys.begin;
    const float* tile_k = tile_k_ + (keys.begin - tile.begin) * d_;
    const float* tile_v = tile_v_ + (keys.begin - tile.begin) * dv_;
    for (int64_t t = 0; t < count; ++t) scores_[t] = dot(q_ + row * d_, tile_k + t * d_, d_);

    const Vec slope = splat(problem_.slope_of(part_, row));
    const float distance = static_cast<float>(keys.begin - problem_.position_of(part_, row));
    const auto lift = problem_.lift_of(part_, row);
    Vec lanes_max = splat(-FLT_MAX);
    for (int64_t t = 0; t < count; t += kLanes) {
      const Int lane = iota() + static_cast<int32_t>(t);
      Vec s =
          problem_.score(load(scores_ + t), slope, distance + __builtin_convertvector(lane, Vec));
      if (problem_.op.bias)
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - t); ++i)
          s[i] += problem_.bias_of(part_, row, keys.begin + t + i);
      if (problem_.lifted) s = problem_.lift(s, splat(lift.gain_log2), splat(lift.offset));
      s = lane < static_cast<int32_t>(count) ? s : splat(-INFINITY);
      store(scores_ + t, s);
      lanes_max = max(lanes_max, s);
    }
    const float before = state.row_max[row],
                row_max = problem_.shifted ? std::max(before, reduce_max(lanes_max)) : 0;
    Vec sum = zero();
    for (int64_t t = 0; t < count; t += kLanes) {
      const Vec s = load(scores_ + t);
      const Vec p = problem_.shifted ? exp2_to_127(s - row_max) : problem_.weight(s);
      sum += p;
      store(scores_ + t, p);
    }
    const float factor = exp2_to_127(splat(before - row_max))[0];
    state.row_max[row] = row_max;
    state.row_sum[row] = state.row_sum[row] * factor + reduce_add(sum);

    float* acc = acc_ + row * dv_;
    int64_t e = 0;
    for (; e + 4 * kLanes <= dv_; e += 4 * kLanes)
      accumulate<4>(acc + e, factor, tile_v + e, count);
    for (; e < dv_; e += kLanes) accumulate<1>(acc + e, factor, tile_v + e, count);
  }

  template <int N> void accumulate(float* acc, float factor, const float* tile_v, int64_t count) {
    Vec sum[N];
    for (int n = 0; n < N; ++n) sum[n] = load(acc + n * kLanes) * factor;
    for (int64_t t = 0; t < count; ++t)
      for (int n = 0; n < N; ++n) sum[n] += scores_[t] * load(tile_v + t * dv_ + n * kLanes);
    for (int n = 0; n < N; ++n) store(acc + n * kLanes, sum[n]);
  }

  const Problem<T>& problem_;
  const Part& part_;
  const int64_t d_, dv_;  // padded to whole vectors with zeros
  float *q_, *acc_, *tile_k_, *tile_v_, *scores_;
};

}  // namespace attention
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
