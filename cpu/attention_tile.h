#pragma once
#include "cpu/attention_keys.h"
#include "cpu/multiply.h"

// Attention of many rows at a time, with a row in each lane:
//
//   S[t, r] = sum over d of K[t, d] Q[d, r]        keys times rows, K read one number at a time
//   P[t, r] = 2^(S[t, r] - max[r])
//   O[e, r] = sum over t of V[t, e] P[t, r]        V read one number at a time
//
// Both products read K and V as they stand and leave rows in lanes, so that maxima, sums and masks
// need no exchange between lanes; only Q and O are transposed, once. A part's rows form panels of
// kTileCols, which share each loaded tile of keys but look at it on their own: on the diagonal a
// panel stops at the last key that it sees. Keys is the iteration space, a policy of
// attention_keys.h.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace attention {

template <class T, class Keys> class TileKernel {
 public:
  static size_t floats(int64_t rows, int64_t d, int64_t dv) {
    const int64_t padded = (rows + kTileCols - 1) / kTileCols * kTileCols;
    return whole_lines(padded * (d + dv + 5) +
                       kTileCols * (std::max(d, dv) + kTileKeys + kTileRows + 3) +
                       (kTileKeys + kTileRows) * d + kTileKeys * dv);
  }

  TileKernel(const Problem<T>& problem, const Part& part, float* memory)
      : problem_(problem), part_(part), keys_(problem, part), d_(problem.d), dv_(problem.dv) {
    const auto take = [&](int64_t count) { return std::exchange(memory, memory + count); };
    for (int64_t row = 0; row < part.rows; row += kTileCols) {
      Panel& panel = panels_.emplace_back();
      panel.first = row;
      panel.rows = std::min<int64_t>(part.rows - row, kTileCols);
      panel.vecs = static_cast<int>((panel.rows + kLanes - 1) / kLanes);
      panel.q = take(kTileCols * d_);
      panel.acc = take(kTileCols * dv_);
      panel.row_max = take(kTileCols);
      panel.row_sum = take(kTileCols);
      panel.slope = take(kTileCols);
      panel.gain_log2 = take(kTileCols);
      panel.offset = take(kTileCols);
    }
    rows_ = take(kTileCols * std::max(d_, dv_));
    // The last step over keys may read a few rows past the tile, whose scores nobody uses
    tile_k_ = take((kTileKeys + kTileRows) * d_);
    tile_v_ = take(kTileKeys * dv_);
    scores_ = take((kTileKeys + kTileRows) * kTileCols);
    distance_ = take(kTileCols);
    low_ = reinterpret_cast<int32_t*>(take(kTileCols));
    high_ = reinterpret_cast<int32_t*>(take(kTileCols));
  }

  void run(const State& state) {
    const Problem<T>& problem = problem_;
    const Tokens<T> k(problem.op.k, problem.op.block_table, *part_.sequence, part_.head);
    const Tokens<T> v(problem.op.v, problem.op.block_table, *part_.sequence, part_.head);
    for (Panel& panel : panels_) start(panel);
    keys_.each([&](const KeyTile& tile, Range next) {
      load_tile(k, tile_k_, d_, tile);
      problem.finish_k(tile_k_, d_, tile.count());
      load_tile(v, tile_v_, dv_, tile);
      k.prefetch(next, d_);
      v.prefetch(next, dv_);
      for (Panel& panel : panels_) {
        if (panel.vecs == 3) step<3>(panel, tile);
        if (panel.vecs == 2) step<2>(panel, tile);
        if (panel.vecs == 1) step<1>(panel, tile);
      }
    });
    for (Panel& panel : panels_) {
      transpose(state.acc + panel.first * dv_, dv_, panel.acc, panel.vecs * kLanes, dv_,
                panel.rows);
      std::copy_n(panel.row_max, panel.rows, state.row_max + panel.first);
      std::copy_n(panel.row_sum, panel.rows, state.row_sum + panel.first);
    }
  }

 private:
  struct Panel {
    int64_t first = 0, rows = 0;
    int vecs = 0;
    float *q = nullptr, *acc = nullptr;  // [d, vecs * kLanes], [dv, vecs * kLanes]
    // [vecs * kLanes]
    float *row_max = nullptr, *row_sum = nullptr, *slope = nullptr;
    float *gain_log2 = nullptr, *offset = nullptr;
    typename Keys::Panel keys;
    int64_t position[kTileCols];
  };

  static void load_tile(const Tokens<T>& tokens, float* to, int64_t width, const KeyTile& tile) {
    if (!tile.list) return tokens.load(to, width, tile.range, width);
    for (int64_t i = 0; i < tile.count(); ++i, to += width)
      tokens.load(to, width, {tile.list[i], tile.list[i] + 1}, width);
  }

  // Lanes past the last row repeat its bounds and have a q of zeros
  int64_t row_of(const Panel& panel, int64_t lane) const {
    return panel.first + std::min(lane, panel.rows - 1);
  }

  void start(Panel& panel) {
    const int64_t width = panel.vecs * kLanes;
    std::fill_n(rows_, width * d_, 0.f);
    for (int64_t i = 0; i < panel.rows; ++i)
      problem_.load_q(rows_ + i * d_, part_, panel.first + i);
    transpose(panel.q, width, rows_, d_, width, d_);
    std::fill_n(panel.acc, width * dv_, 0.f);
    int64_t rows[kTileCols];
    for (int64_t i = 0; i < width; ++i) {
      rows[i] = row_of(panel, i);
      problem_.start(part_, rows[i], panel.row_max[i], panel.row_sum[i]);
      panel.slope[i] = problem_.slope_of(part_, rows[i]);
      panel.position[i] = problem_.position_of(part_, rows[i]);
      const auto lift = problem_.lift_of(part_, rows[i]);
      panel.gain_log2[i] = lift.gain_log2;
      panel.offset[i] = lift.offset;
    }
    keys_.start(panel.keys, rows, width);
  }

  // Takes the keys of the tile that the panel sees into its sums; N is panel.vecs
  template <int N> void step(Panel& panel, const KeyTile& tile) {
    uint64_t words[kTileCols];
    const Look look = keys_.look(panel.keys, tile, N * kLanes, words);
    const int64_t count = look.last - look.first;
    if (count <= 0) return;
    const float* tile_k = tile_k_ + look.first * d_;
    const float* tile_v = tile_v_ + look.first * dv_;
    const bool masked = look.masked;

    compute_scores<N>(scores_, tile_k, panel.q, count, d_);
    if (masked || !problem_.plain) finish_scores<N>(panel, tile, look, words);

    Vec row_max[N], sum[N];
    float factor[N * kLanes];
    for (int n = 0; n < N; ++n) row_max[n] = load(panel.row_max + n * kLanes);
    for (int64_t t = 0; t < count && problem_.shifted; ++t)
      for (int n = 0; n < N; ++n)
        row_max[n] = max(row_max[n], load(scores_ + (t * N + n) * kLanes));
    for (int n = 0; n < N; ++n) {
      const Vec shrink = exp2_to_127(load(panel.row_max + n * kLanes) - row_max[n]);
      sum[n] = load(panel.row_sum + n * kLanes) * shrink;
      store(panel.row_max + n * kLanes, row_max[n]);
      store(factor + n * kLanes, shrink);
    }
    for (int64_t t = 0; t < count; ++t)
      for (int n = 0; n < N; ++n) {
        float* at = scores_ + (t * N + n) * kLanes;
        const Vec s = load(at);
        const Vec p = problem_.shifted ? exp2_to_127(s - row_max[n]) : problem_.weight(s);
        sum[n] += p;
        store(at, p);
      }
    for (int n = 0; n < N; ++n) store(panel.row_sum + n * kLanes, sum[n]);

    const bool apart = masked && !finite(tile_v, count * dv_);
    accumulate<N>(panel.acc, factor, tile_v, scores_, apart ? 0 : count, dv_);
    if (apart) accumulate_visible<N>(panel, count, tile_v);
  }

  // The two products stay out of line: inside step their accumulators would share the registers
  template <int N>
  [[gnu::noinline]] static void compute_scores(float* scores, const float* tile_k, const float* q,
                                               int64_t count, int64_t d) {
    for (int64_t t = 0; t < count; t += kTileRows) {
      Tile<kTileRows, N> acc_s{};
      multiply(acc_s, d, tile_k + t * d, d, 1, q, N * kLanes);
      for (int r = 0; r < kTileRows; ++r)
        for (int n = 0; n < N; ++n) store(scores + ((t + r) * N + n) * kLanes, acc_s.at[r][n]);
    }
  }

  template <int N>
  [[gnu::noinline]] static void accumulate(float* acc, const float* factor, const float* tile_v,
                                           const float* p, int64_t count, int64_t dv) {
    for (int64_t e = 0; e < dv; e += kTileRows, acc += kTileRows * N * kLanes) {
      Tile<kTileRows, N> acc_o;
      for (int r = 0; r < kTileRows; ++r)
        for (int n = 0; n < N; ++n)
          acc_o.at[r][n] = load(acc + (r * N + n) * kLanes) * load(factor + n * kLanes);
      multiply(acc_o, count, tile_v + e, 1, dv, p, N * kLanes);
      for (int r = 0; r < kTileRows; ++r)
        for (int n = 0; n < N; ++n) store(acc + (r * N + n) * kLanes, acc_o.at[r][n]);
    }
  }

  // Soft cap, slopes, bias, lift and mask; leaves in low_ and high_ which keys each row sees, from
  // look.first on
  template <int N>
  void finish_scores(const Panel& panel, const KeyTile& tile, const Look& look,
                     const uint64_t* words) {
    const int64_t start = tile.key(look.first);
    for (int64_t i = 0; i < N * kLanes; ++i) {
      if (look.masked) {
        low_[i] = static_cast<int32_t>(words[i] >> look.first);
        high_[i] = static_cast<int32_t>(words[i] >> look.first >> 32);
      }
      distance_[i] = static_cast<float>(start - panel.position[i]);
    }
    for (int64_t t = 0; t < look.last - look.first; ++t) {
      const auto step = static_cast<float>(tile.key(look.first + t) - start);
      for (int n = 0; n < N; ++n) {
        float* at = scores_ + (t * N + n) * kLanes;
        Vec s = load(at);
        if (!problem_.plain)
          s = problem_.score(s, load(panel.slope + n * kLanes),
                             load(distance_ + n * kLanes) + step);
        if (problem_.op.bias)
          for (int64_t i = 0; i < kLanes; ++i)
            s[i] +=
                problem_.bias_of(part_, row_of(panel, n * kLanes + i), tile.key(look.first + t));
        if (problem_.lifted)
          s = problem_.lift(s, load(panel.gain_log2 + n * kLanes), load(panel.offset + n * kLanes));
        store(at, look.masked ? (sees(t, n) ? s : splat(-INFINITY)) : s);
      }
    }
  }

  Mask sees(int64_t t, int n) const {
    const Int word = load_int((t < 32 ? low_ : high_) + n * kLanes);
    return (word >> static_cast<int>(t & 31) & 1) != 0;
  }

  // A masked key has p = 0, but 0 * NaN would leak from its value
  template <int N> void accumulate_visible(const Panel& panel, int64_t count, const float* tile_v) {
    for (int64_t t = 0; t < count; ++t)
      for (int n = 0; n < N; ++n) {
        const Mask mask = sees(t, n);
        const Vec p = load(scores_ + (t * N + n) * kLanes);
        for (int64_t e = 0; e < dv_; ++e) {
          float* acc = panel.acc + (e * N + n) * kLanes;
          store(acc, mask ? load(acc) + p * tile_v[t * dv_ + e] : load(acc));
        }
      }
  }

  static bool finite(const float* p, int64_t count) {
    Vec sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes)
      for (int n = 0; n < 4; ++n) sum[n] += load(p + i + n * kLanes) * 0.f;
    float rest = reduce_add(sum[0] + sum[1] + (sum[2] + sum[3]));
    for (; i < count; ++i) rest += p[i] * 0.f;
    return rest == 0;
  }

  const Problem<T>& problem_;
  const Part& part_;
  Keys keys_;
  const int64_t d_, dv_;
  std::vector<Panel> panels_;
  float *rows_, *tile_k_, *tile_v_, *scores_, *distance_;
  int32_t *low_, *high_;
};

}  // namespace attention
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
