#pragma once
#include "cpu/attention.h"
#include "cpu/product.h"

// Gradients of attention for a tile of keys against panels of rows, with a row in each lane:
//
//   S[t, r]   = sum over d of K[t, d] Q[d, r]
//   dP[t, r]  = sum over e of V[t, e] dO[e, r]
//   P[t, r]   = 2^(score(S) - lse[r])              lse in base 2; or of other weights
//   dS[t, r]  = P' (dP - delta[r]) score'(S)       delta[r] = sum over e of dO[e, r] O[e, r]
//   dV[t, e] += sum over r of P[t, r] dO[r, e]
//   dK[t, d] += sum over r of dS[t, r] Q[r, d]
//   dQ[r, d] += sum over t of dS[t, r] K[t, d]
//
// The tile stays in the cache while the rows pass by, so rows are read once per tile and transposed
// for the first two products. Factors of S that are the same for all rows wait until the end.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace attention {

inline constexpr int64_t kPanelRows = 48;  // whole tiles of columns on every instruction set

// Per row of out, [b, hq, sq]
struct RowStatistics {
  float* lse_log2;  // +inf where lse is -inf: every weight of such a row is then 0
  float* delta;
};

// Where the gradients of one part are summed
struct Gradients {
  float* dq;        // [part.rows, padded(d)]
  float* dk;        // [part.keys, padded(d)]
  float* dv;        // [part.keys, padded(dv)]
  double* dslopes;  // [group]
  float* rows;      // [part.rows, 2]: what the level of a row and a bias for all its keys get
  float* dbias;     // [b, hq, rows or 1, keys] of the call, or null
};

template <class T> class BackwardKernel {
 public:
  static size_t floats(int64_t d, int64_t dv) {
    return whole_lines((2 * kPanelRows + kTileKeys) * (padded(d) + padded(dv)) +
                       2 * kTileKeys * kPanelRows + 11 * kPanelRows);
  }

  BackwardKernel(const Problem<T>& problem, const AttentionBackward& op,
                 const RowStatistics& statistics, float* memory)
      : problem_(problem),
        dout_(op.dout),
        by_row_(op.bias_by_row()),
        statistics_(statistics),
        d_(padded(problem.d)),
        dv_(padded(problem.dv)) {
    std::fill_n(memory, floats(problem.d, problem.dv), 0.f);
    const auto take = [&](int64_t count) { return std::exchange(memory, memory + count); };
    tile_k_ = take(kTileKeys * d_);
    tile_v_ = take(kTileKeys * dv_);
    rows_q_ = take(kPanelRows * d_);
    rows_dout_ = take(kPanelRows * dv_);
    lanes_q_ = take(kPanelRows * d_);
    lanes_dout_ = take(kPanelRows * dv_);
    scores_ = take(kTileKeys * kPanelRows);
    dscores_ = take(kTileKeys * kPanelRows);
    lse_log2_ = take(kPanelRows);
    delta_ = take(kPanelRows);
    slope_log2_ = take(kPanelRows);
    distance_ = take(kPanelRows);
    dslopes_ = take(kPanelRows);
    gain_log2_ = take(kPanelRows);
    offset_ = take(kPanelRows);
    dlevel_ = take(kPanelRows);
    dbias_ = take(kPanelRows);
    low_ = reinterpret_cast<int32_t*>(take(kPanelRows));
    high_ = reinterpret_cast<int32_t*>(take(kPanelRows));
  }

  // Adds what the part's keys and rows give to each other
  void run(const Part& part, const Gradients& gradients) {
    const Tensor none;
    const Tokens<T> k(problem_.op.k, none, *part.sequence, part.head);
    const Tokens<T> v(problem_.op.v, none, *part.sequence, part.head);
    for (int64_t t = part.keys.begin; t < part.keys.end; t += kTileKeys) {
      const Range tile{t, std::min(t + kTileKeys, part.keys.end)};
      count_ = tile.end - tile.begin;
      // Rows of zeros make the tile whole rows of a product
      padded_count_ = (count_ + kTileRows - 1) / kTileRows * kTileRows;
      k.load(tile_k_, d_, tile, problem_.d);
      problem_.finish_k(tile_k_, d_, count_);
      v.load(tile_v_, dv_, tile, problem_.dv);
      std::fill_n(tile_k_ + count_ * d_, (padded_count_ - count_) * d_, 0.f);
      std::fill_n(tile_v_ + count_ * dv_, (padded_count_ - count_) * dv_, 0.f);
      const int64_t at = t - part.keys.begin;
      Gradients here = gradients;
      here.dk += at * d_;
      here.dv += at * dv_;
      for (int64_t row = 0; row < part.rows; row += kPanelRows) step(part, row, tile, here);
    }
  }

 private:
  enum class Seen { kNothing, kSome, kEverything };

  void step(const Part& part, int64_t row, Range tile, const Gradients& to) {
    const int64_t rows = std::min(kPanelRows, part.rows - row);
    lanes_ = padded(rows);
    const Seen seen = look(part, row, rows, tile);
    if (seen == Seen::kNothing) return;
    const bool masked = seen == Seen::kSome;
    load_rows(part, row, rows, tile);

    product(scores_, kPanelRows, padded_count_, lanes_, problem_.d, tile_k_, d_, 1, lanes_q_,
            kPanelRows, nullptr);
    product(dscores_, kPanelRows, padded_count_, lanes_, problem_.dv, tile_v_, dv_, 1, lanes_dout_,
            kPanelRows, nullptr);
    differentiate(part, row, rows, tile, masked, to);
    if (problem_.op.slopes)
      for (int64_t r = 0; r < rows; ++r)
        to.dslopes[(part.first_row + row + r) % problem_.group] += static_cast<double>(dslopes_[r]);
    for (int64_t r = 0; to.rows && r < rows; ++r) {
      to.rows[2 * (row + r)] += dlevel_[r];
      to.rows[2 * (row + r) + 1] += dbias_[r];
    }

    float* dq = to.dq + row * d_;
    if (masked && !all_finite()) return add_visible(rows, dq, to);
    const float keep = 1;
    product(to.dv, dv_, count_, dv_, lanes_, scores_, kPanelRows, 1, rows_dout_, dv_, &keep);
    product(to.dk, d_, count_, d_, lanes_, dscores_, kPanelRows, 1, rows_q_, d_, &keep);
    product(dq, d_, rows, d_, count_, dscores_, 1, kPanelRows, tile_k_, d_, &keep);
  }

  // Notes which keys of the tile the rows of the panel see; lanes past the last one see none
  Seen look(const Part& part, int64_t row, int64_t rows, Range tile) {
    // Bounds never descend from one row to the next
    const Range low = problem_.visible(part, row), high = problem_.visible(part, row + rows - 1);
    if (high.end <= tile.begin || low.begin >= tile.end || high.end == low.begin)
      return Seen::kNothing;
    const uint64_t whole = bit_range(0, count_);
    uint64_t any = 0, all = whole;
    for (int64_t r = 0; r < lanes_; ++r) {
      uint64_t word = 0;
      if (r < rows && problem_.op.masked) {
        word = problem_.mask.seen(problem_.masked(part, row + r), tile.begin) & whole;
      } else if (r < rows) {
        const Range keys = problem_.visible(part, row + r);
        word = bit_range(keys.begin - tile.begin, keys.end - tile.begin) & whole;
      }
      low_[r] = static_cast<int32_t>(word);
      high_[r] = static_cast<int32_t>(word >> 32);
      any |= word;
      if (r < rows) all &= word;
    }
    return !any ? Seen::kNothing : all == whole ? Seen::kEverything : Seen::kSome;
  }

  // Lanes past the last row hold zeros and weigh nothing
  void load_rows(const Part& part, int64_t row, int64_t rows, Range tile) {
    const Sequence& sequence = *part.sequence;
    const Tensor &lse = problem_.op.lse, &q = problem_.op.q;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = problem_.head_of(part, row + r);
      const int64_t token = sequence.q_begin + problem_.query_of(part, row + r);
      problem_.load_q(rows_q_ + r * d_, part, row + r);
      load_row(rows_dout_ + r * dv_,
               dout_.as<T>() + sequence.batch * dout_.strides[0] + token * dout_.strides[1] +
                   head * dout_.strides[2],
               dout_.strides[3], problem_.dv);
      const int64_t at = (sequence.batch * q.shape[2] + head) * lse.shape[2] + token;
      lse_log2_[r] = statistics_.lse_log2[at];
      delta_[r] = statistics_.delta[at];
      slope_log2_[r] = problem_.slope_of(part, row + r);
      distance_[r] = static_cast<float>(tile.begin - problem_.position_of(part, row + r));
      const auto lift = problem_.lift_of(part, row + r);
      gain_log2_[r] = lift.gain_log2;
      offset_[r] = lift.offset;
    }
    for (int64_t r = rows; r < lanes_; ++r) {
      std::fill_n(rows_q_ + r * d_, d_, 0.f);
      std::fill_n(rows_dout_ + r * dv_, dv_, 0.f);
      lse_log2_[r] = INFINITY;
      delta_[r] = slope_log2_[r] = distance_[r] = gain_log2_[r] = offset_[r] = 0;
    }
    transpose(lanes_q_, kPanelRows, rows_q_, d_, lanes_, problem_.d);
    transpose(lanes_dout_, kPanelRows, rows_dout_, dv_, lanes_, problem_.dv);
  }

  // Turns S and dP into P and dS; sums what of each row its slope, its level and its bias get
  void differentiate(const Part& part, int64_t row, int64_t rows, Range tile, bool masked,
                     const Gradients& to) {
    const Attention& op = problem_.op;
    for (int64_t at = 0; at < lanes_; at += kLanes) {
      const Vec lse = load(lse_log2_ + at), delta = op.normalise ? load(delta_ + at) : zero();
      const Vec slope = load(slope_log2_ + at), distance = load(distance_ + at);
      const Vec gain_log2 = load(gain_log2_ + at), offset = load(offset_ + at);
      Vec dslope = zero(), dlevel = zero(), dbias = zero();
      for (int64_t t = 0; t < count_; ++t) {
        float* const score = scores_ + t * kPanelRows + at;
        float* const dscore = dscores_ + t * kPanelRows + at;
        Vec s = load(score), derivative = splat(1);
        if (op.soft_cap > 0) {
          const Vec bent = tanh(s);
          derivative = 1.f - bent * bent;
          s = problem_.cap_log2 * bent;
        }
        const Vec apart = distance + static_cast<float>(t);
        if (op.slopes) s += slope * apart;
        if (op.bias)
          for (int64_t i = 0; i < std::min<int64_t>(kLanes, rows - at); ++i)
            s[i] += problem_.bias_of(part, row + at + i, tile.begin + t);
        auto [p, rate, level_rate] = problem_.differentiate(s, lse, gain_log2, offset);
        const Vec dp = load(dscore) - delta;
        Vec ds = rate * dp;
        if (masked) {
          const Int word = load_int((t < 32 ? low_ : high_) + at);
          const Mask sees = (word >> static_cast<int>(t & 31) & 1) != 0;
          p = sees ? p : zero();
          ds = sees ? ds : zero();
          level_rate = sees ? level_rate : zero();
        }
        if (op.slopes) dslope += ds * apart;
        if (op.level) dlevel += level_rate * dp;
        dbias += ds;
        if (to.dbias)
          for (int64_t i = 0; i < std::min<int64_t>(kLanes, rows - at); ++i)
            *bias_sum(part, row + at + i, tile.begin + t, to.dbias) += ds[i];
        store(score, p);
        store(dscore, op.soft_cap > 0 ? ds * derivative : ds);
      }
      store(dslopes_ + at, dslope);
      store(dlevel_ + at, dlevel);
      store(dbias_ + at, dbias);
    }
  }

  float* bias_sum(const Part& part, int64_t row, int64_t key, float* sums) const {
    const Attention& op = problem_.op;
    int64_t at = part.sequence->batch * op.q.shape[2] + problem_.head_of(part, row);
    if (by_row_) at = at * op.q.shape[1] + problem_.query_of(part, row);
    return sums + at * op.k.shape[1] + key;
  }

  // A masked pair has P = dS = 0, but 0 * NaN would leak from what it must not see
  bool all_finite() const {
    return finite(tile_k_, count_ * d_) && finite(rows_q_, lanes_ * d_) &&
           finite(rows_dout_, lanes_ * dv_);
  }
  static bool finite(const float* p, int64_t count) {
    Vec sum = zero();
    for (int64_t i = 0; i < count; i += kLanes) sum += load(p + i) * 0.f;
    return reduce_add(sum) == 0;
  }

  // The last three products over visible pairs alone
  void add_visible(int64_t rows, float* dq, const Gradients& to) const {
    const auto add = [](float* acc, float factor, const float* line, int64_t width) {
      for (int64_t i = 0; i < width; i += kLanes)
        store(acc + i, load(acc + i) + factor * load(line + i));
    };
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < count_; ++t) {
        if (!((t < 32 ? low_ : high_)[r] >> (t & 31) & 1)) continue;
        const float p = scores_[t * kPanelRows + r], ds = dscores_[t * kPanelRows + r];
        add(to.dv + t * dv_, p, rows_dout_ + r * dv_, dv_);
        add(to.dk + t * d_, ds, rows_q_ + r * d_, d_);
        add(dq + r * d_, ds, tile_k_ + t * d_, d_);
      }
  }

  const Problem<T>& problem_;
  const Tensor& dout_;
  const bool by_row_;  // whether rows have a bias of their own
  const RowStatistics statistics_;
  const int64_t d_, dv_;
  int64_t count_ = 0, padded_count_ = 0;  // keys of the tile
  int64_t lanes_ = 0;                     // rows of the panel, in whole vectors
  float *tile_k_, *tile_v_;               // [kTileKeys, d_] and [kTileKeys, dv_]
  float *rows_q_, *rows_dout_;            // [kPanelRows, d_] and [kPanelRows, dv_]
  float *lanes_q_, *lanes_dout_;          // the same transposed
  float *scores_, *dscores_;              // [kTileKeys, kPanelRows]
  float *lse_log2_, *delta_, *slope_log2_, *distance_, *gain_log2_, *offset_;
  float *dslopes_, *dlevel_, *dbias_;
  int32_t *low_, *high_;  // a bit for each key of the tile that a row sees
};

}  // namespace attention
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
