#include "ops/probe.h"

#include <algorithm>
#include <vector>

#include "core/cpu_context.h"
#include "core/registry.h"
#include "cpu/half.h"
#include "cpu/multiply.h"

// Scores of a row of blocks, one task per row and head. Sampled queries stand in the lanes, keys
// are taken kTileRows at a time, and all scores of up to kTileCols queries are kept: probabilities
// need the sum over all keys before the first of them is known.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

template <class T> class Row {
 public:
  Row(const Probe& op, int64_t b, int64_t head, int64_t row)
      : op_(op), per_(op.per), d_(op.q.shape[3]), sq_(op.q.shape[1]), sk_(op.k.shape[1]) {
    const int64_t kv_head = head / (op.q.shape[2] / op.k.shape[2]);
    q_ = op.q.as<T>() + b * op.q.strides[0] + head * op.q.strides[2];
    k_ = op.k.as<T>() + b * op.k.strides[0] + kv_head * op.k.strides[2];
    columns_ = op.score.shape[3];
    score_ = op.score.as<float>() +
             ((b * op.score.shape[1] + head) * op.score.shape[2] + row) * columns_;
    if (op.per == Probe::kLine) {
      per_ = row % 2 == 0 ? Probe::kKey : Probe::kDistance;
      row /= 2;
    }
    first_ = row * op.block_q;
    last_ = std::min(first_ + op.block_q, sq_);
    keys_ = position(last_ - 1) + 1;
  }

  void run() {
    // Blocks that begin later than the last query stands, and keys that no query sees
    std::fill_n(score_, columns_, -INFINITY);
    visible_ = per_ == Probe::kBlock ? (keys_ + op_.block_k - 1) / op_.block_k : keys_;
    if (op_.kind == Probe::kPooled) {
      pool();
    } else if (op_.kind == Probe::kStrided) {
      scan_strided();
    } else {
      std::fill_n(score_, visible_, 0.f);
      if (op_.kind == Probe::kRows) sum_rows();
      if (op_.kind == Probe::kAntidiagonal) sum_antidiagonals();
    }
    if (op_.softmax) normalise();
  }

 private:
  int64_t position(int64_t query) const { return sk_ - sq_ + query; }
  void load_q(float* to, int64_t query) const {
    load_row(to, q_ + query * op_.q.strides[1], op_.q.strides[3], d_);
  }
  void load_k(float* to, int64_t key) const {
    load_row(to, k_ + key * op_.k.strides[1], op_.k.strides[3], d_);
  }

  template <class Load> void mean(float* to, int64_t from, int64_t end, const Load& load) const {
    std::vector<float> line(static_cast<size_t>(d_));
    std::fill_n(to, d_, 0.f);
    for (int64_t i = from; i < end; ++i) {
      load(line.data(), i);
      for (int64_t e = 0; e < d_; ++e) to[e] += line[static_cast<size_t>(e)];
    }
    for (int64_t e = 0; e < d_; ++e) to[e] /= static_cast<float>(end - from);
  }

  void pool() {
    std::vector<float> q(static_cast<size_t>(d_)), k(static_cast<size_t>(d_));
    mean(q.data(), first_, last_, [&](float* to, int64_t i) { load_q(to, i); });
    for (int64_t c = 0; c < visible_; ++c) {
      mean(k.data(), c * op_.block_k, std::min((c + 1) * op_.block_k, sk_),
           [&](float* to, int64_t t) { load_k(to, t); });
      float sum = 0;
      for (int64_t e = 0; e < d_; ++e) sum += q[static_cast<size_t>(e)] * k[static_cast<size_t>(e)];
      score_[c] = sum * static_cast<float>(op_.scale);
    }
  }

  // Every stride-th query of the block, the last of each; of a shorter rest its last one
  std::vector<int64_t> sampled() const {
    std::vector<int64_t> rows;
    for (int64_t i = first_; i < last_; i += op_.stride)
      rows.push_back(std::min(i + op_.stride, last_) - 1);
    return rows;
  }

  // Calls body(panel, width, scores, panel's first, count) where scores[t, lane] = q . k for each
  // panel of vectors of `depth` numbers
  template <class LoadQ, class LoadK, class Body>
  void panels(int64_t rows, int64_t keys, int64_t depth, const LoadQ& load_query,
              const LoadK& load_key, const Body& body) {
    const int64_t padded = (keys + kTileRows - 1) / kTileRows * kTileRows;
    const Scratch<float> lines(static_cast<size_t>(kTileCols * depth)),
        q(static_cast<size_t>(kTileCols * depth)), k(static_cast<size_t>(kTileRows * depth)),
        scores(static_cast<size_t>(padded * kTileCols));
    for (int64_t at = 0; at < rows; at += kTileCols) {
      const int64_t count = std::min<int64_t>(rows - at, kTileCols);
      const int vecs = static_cast<int>((count + kLanes - 1) / kLanes);
      const int64_t width = vecs * kLanes;
      std::fill_n(lines.data(), width * depth, 0.f);
      for (int64_t i = 0; i < count; ++i) {
        load_query(lines.data() + i * depth, at + i);
        for (int64_t e = 0; e < depth; ++e)
          lines[static_cast<size_t>(i * depth + e)] *= static_cast<float>(op_.scale);
      }
      transpose(q.data(), width, lines.data(), depth, width, depth);
      std::fill_n(k.data(), kTileRows * depth, 0.f);
      for (int64_t t = 0; t < keys; t += kTileRows) {
        for (int64_t j = 0; j < std::min<int64_t>(kTileRows, keys - t); ++j)
          load_key(k.data() + j * depth, t + j);
        float* to = scores.data() + t * width;
        if (vecs == 3) multiply_keys<3>(to, k.data(), q.data(), depth);
        if (vecs == 2) multiply_keys<2>(to, k.data(), q.data(), depth);
        if (vecs == 1) multiply_keys<1>(to, k.data(), q.data(), depth);
      }
      body(at, count, width, scores.data());
    }
  }
  template <int N>
  static void multiply_keys(float* to, const float* k, const float* q, int64_t depth) {
    Tile<kTileRows, N> acc{};
    multiply(acc, depth, k, depth, 1, q, N * kLanes);
    for (int r = 0; r < kTileRows; ++r)
      for (int n = 0; n < N; ++n) store(to + (r * N + n) * kLanes, acc.at[r][n]);
  }

  // scores[t, lane] of keys below ends[lane] become probabilities over them, 0 elsewhere
  static void to_probabilities(float* scores, int64_t keys, int64_t width, const int64_t* ends) {
    for (int64_t at = 0; at < width; at += kLanes) {
      Int end;
      for (int i = 0; i < kLanes; ++i) end[i] = static_cast<int32_t>(ends[at + i]);
      const auto line = [&](int64_t t) { return scores + t * width + at; };
      const auto seen = [&](int64_t t) { return splat_int(static_cast<int32_t>(t)) < end; };
      Vec most = splat(-3e38f), sum = zero();
      for (int64_t t = 0; t < keys; ++t) most = seen(t) ? max(most, load(line(t))) : most;
      for (int64_t t = 0; t < keys; ++t) {
        const Vec p = seen(t) ? exp(load(line(t)) - most) : zero();
        sum += p;
        store(line(t), p);
      }
      // A sum that is no number is so for what the row sees alone
      const Vec factor = 1.f / sum;
      for (int64_t t = 0; t < keys; ++t) store(line(t), seen(t) ? load(line(t)) * factor : zero());
    }
  }

  void scan_strided() {
    const std::vector<int64_t> rows = sampled();
    const int64_t stride = op_.stride, keys = (keys_ + stride - 1) / stride;
    panels(
        static_cast<int64_t>(rows.size()), keys, d_,
        [&](float* to, int64_t i) { load_q(to, rows[static_cast<size_t>(i)]); },
        [&](float* to, int64_t t) { load_k(to, sampled_key(t)); },
        [&](int64_t at, int64_t count, int64_t width, const float* scores) {
          for (int64_t t = 0; t < keys; ++t)
            for (int64_t i = 0; i < count; ++i) {
              float& best = score_[sampled_key(t) / op_.block_k];
              const float own = scores[t * width + i];
              if (sampled_key(t) <= position(rows[static_cast<size_t>(at + i)]) &&
                  (own > best || std::isnan(own)))
                best = own;
            }
        });
  }
  int64_t sampled_key(int64_t t) const { return std::min((t + 1) * op_.stride, keys_) - 1; }

  void sum_rows() {
    const std::vector<int64_t> rows = sampled();
    const float share = 1.f / static_cast<float>(rows.size());
    panels(
        static_cast<int64_t>(rows.size()), keys_, d_,
        [&](float* to, int64_t i) { load_q(to, rows[static_cast<size_t>(i)]); },
        [&](float* to, int64_t t) { load_k(to, t); },
        [&](int64_t at, int64_t count, int64_t width, float* scores) {
          int64_t ends[kTileCols] = {};
          for (int64_t i = 0; i < count; ++i)
            ends[i] = position(rows[static_cast<size_t>(at + i)]) + 1;
          to_probabilities(scores, keys_, width, ends);
          for (int64_t t = 0; t < keys_; ++t) {
            if (per_ == Probe::kDistance) {
              for (int64_t i = 0; i < count && t < keys_; ++i)
                if (t < ends[i]) score_[ends[i] - 1 - t] += scores[t * width + i] * share;
            } else {
              Vec sum = zero();
              for (int64_t i = 0; i < width; i += kLanes) sum += load(scores + t * width + i);
              score_[per_ == Probe::kKey ? t : t / op_.block_k] += reduce_add(sum) * share;
            }
          }
        });
  }

  // Groups of `stride` queries in reverse order against groups of keys: sums along antidiagonals
  void sum_antidiagonals() {
    const int64_t stride = op_.stride, depth = stride * d_;
    const int64_t rows = (last_ - first_ + stride - 1) / stride,
                  keys = (keys_ + stride - 1) / stride;
    const float share = 1.f / static_cast<float>(rows);
    const auto none = [&](float* to) { std::fill_n(to, d_, 0.f); };
    panels(
        rows, keys, depth,
        [&](float* to, int64_t n) {
          for (int64_t s = 0; s < stride; ++s) {
            const int64_t query = first_ + n * stride + stride - 1 - s;
            query < last_ ? load_q(to + s * d_, query) : none(to + s * d_);
            for (int64_t e = 0; e < d_; ++e) to[s * d_ + e] /= static_cast<float>(stride);
          }
        },
        [&](float* to, int64_t m) {
          for (int64_t s = 0; s < stride; ++s) {
            const int64_t key = m * stride + s;
            key < keys_ ? load_k(to + s * d_, key) : none(to + s * d_);
          }
        },
        [&](int64_t at, int64_t count, int64_t width, float* scores) {
          int64_t ends[kTileCols] = {};
          for (int64_t i = 0; i < count; ++i)
            ends[i] =
                std::min(position(first_ + (at + i) * stride + stride - 1) / stride + 1, keys);
          to_probabilities(scores, keys, width, ends);
          for (int64_t m = 0; m < keys; ++m) {
            Vec sum = zero();
            for (int64_t i = 0; i < width; i += kLanes) sum += load(scores + m * width + i);
            score_[m * stride / op_.block_k] += reduce_add(sum) * share;
          }
        });
  }

  void normalise() {
    float most = -INFINITY, sum = 0;
    for (int64_t c = 0; c < visible_; ++c) most = std::max(most, score_[c]);
    for (int64_t c = 0; c < visible_; ++c)
      if (score_[c] != -INFINITY) sum += score_[c] = std::exp(score_[c] - most);
    for (int64_t c = 0; c < visible_; ++c)
      if (score_[c] != -INFINITY) score_[c] /= sum;
  }

  const Probe& op_;
  int per_;
  const int64_t d_, sq_, sk_;
  const T *q_, *k_;
  int64_t first_, last_, keys_, columns_, visible_ = 0;
  float* score_;
};

void run(const Probe& op, CpuContext& context) {
  const int64_t heads = op.score.shape[1], rows = op.score.shape[2];
  if (op.score.size() == 0) return;
  context.parallel(op.score.shape[0] * heads * rows, [&](int64_t index, int) {
    // Long rows first
    const int64_t row = rows - 1 - index / heads % rows;
    dispatch_float(op.q.dtype,
                   [&]<class T>(T) { Row<T>(op, index / heads / rows, index % heads, row).run(); });
  });
}

HEDDLE_REGISTER(Probe);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
