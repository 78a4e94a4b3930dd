#include "cpu/attention_backward.h"

#include <cstring>
#include <numeric>

#include "core/cpu_context.h"
#include "core/registry.h"

// dq, dk, dv and what a sink and slopes get, from q, k, v, out, lse and dout. A part is some keys
// of a kv head against some rows; parts run in parallel and each sums dk and dv of its own keys.
// What parts give to the same rows of dq stands apart until all are done and is added in their
// order, so the result depends on the number of threads and on nothing else.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace attention {
namespace {

// Memory for the sums of dq; beyond it rows take turns
constexpr int64_t kMostFloats = int64_t{1} << 24;

// Parts that share rows: all splits of one kv head
struct Rows {
  const Sequence* sequence;
  int64_t head, first_part, splits;
};

template <class T> class Backward {
 public:
  Backward(const AttentionBackward& op, CpuContext& context)
      : op_(op),
        context_(context),
        problem_{op},
        sequences_(find_sequences(op)),
        d_(padded(problem_.d)),
        dv_(padded(problem_.dv)),
        statistics_(static_cast<size_t>(2 * op.lse.size())),
        dk_(static_cast<size_t>(keys() * op.k.shape[2] * d_)),
        dv_sum_(static_cast<size_t>(keys() * op.k.shape[2] * dv_)) {
    rows_.lse_log2 = statistics_.data();
    rows_.delta = statistics_.data() + op.lse.size();
    std::fill_n(dk_.data(), keys() * op.k.shape[2] * d_, 0.f);
    std::fill_n(dv_sum_.data(), keys() * op.k.shape[2] * dv_, 0.f);
  }

  void run() {
    find_statistics();
    if (op_.sink) find_dsink();
    make_parts();
    std::vector<double> dslopes(parts_.size() * static_cast<size_t>(problem_.group));

    int64_t most_rows = 0;
    for (const Sequence& sequence : sequences_)
      most_rows = std::max(most_rows, sequence.sq * problem_.group);
    // A part whose rows nobody shares needs its sums only while it runs
    const bool shared = parts_.size() > rows_of_parts_.size();
    const int64_t living = shared ? static_cast<int64_t>(parts_.size()) : context_.threads();
    const int64_t panels = std::max<int64_t>(kMostFloats / (living * d_ * kPanelRows), 1);
    const int64_t section = std::min(panels * kPanelRows, most_rows);
    const Scratch<float> dq(static_cast<size_t>(living * section * d_));
    const bool by_key = op_.biased && op_.bias_by_key(), by_row = op_.level || op_.biased;
    const Scratch<float> row_sums(static_cast<size_t>(by_row ? living * section * 2 : 0));
    const bool whole = op_.biased && op_.bias_sums() == op_.dbias.size();
    const Scratch<float> bias_scratch(
        static_cast<size_t>(op_.biased && !whole ? op_.bias_sums() : 0));
    dbias_ = !op_.biased ? nullptr : whole ? op_.dbias.as<float>() : bias_scratch.data();
    if (dbias_) std::fill_n(dbias_, op_.bias_sums(), 0.f);
    const size_t work_floats = BackwardKernel<T>::floats(problem_.d, problem_.dv);
    const Scratch<float> work(static_cast<size_t>(context_.threads()) * work_floats);

    for (int64_t first = 0; first < most_rows; first += section) {
      const auto sum_of = [&](const Scratch<float>& sums, int64_t width, int64_t part, int worker) {
        return sums.data() + (shared ? part : worker) * section * width;
      };
      std::vector<int64_t> order(parts_.size());
      std::iota(order.begin(), order.end(), int64_t{0});
      for (Part& part : parts_) {
        part.first_row = first;
        part.rows = std::clamp<int64_t>(part.sequence->sq * problem_.group - first, 0, section);
      }
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return pairs(parts_[static_cast<size_t>(a)]) > pairs(parts_[static_cast<size_t>(b)]);
      });
      context_.parallel(static_cast<int64_t>(order.size()), [&](int64_t turn, int worker) {
        const int64_t index = order[static_cast<size_t>(turn)];
        const Part& part = parts_[static_cast<size_t>(index)];
        float* const sum = sum_of(dq, d_, index, worker);
        float* const own = by_row ? sum_of(row_sums, 2, index, worker) : nullptr;
        std::fill_n(sum, part.rows * d_, 0.f);
        std::fill_n(own, own ? part.rows * 2 : 0, 0.f);
        const Gradients gradients{sum,
                                  key_sums(dk_, part, d_),
                                  key_sums(dv_sum_, part, dv_),
                                  dslopes.data() + index * problem_.group,
                                  own,
                                  by_key ? dbias_ : nullptr};
        BackwardKernel<T>(problem_, op_, rows_,
                          work.data() + static_cast<size_t>(worker) * work_floats)
            .run(part, gradients);
        if (!shared) store_rows(part, sum, own, 1, 0);
      });
      if (!shared) continue;
      context_.parallel(static_cast<int64_t>(rows_of_parts_.size()), [&](int64_t index, int) {
        const Rows& rows = rows_of_parts_[static_cast<size_t>(index)];
        store_rows(parts_[static_cast<size_t>(rows.first_part)], sum_of(dq, d_, rows.first_part, 0),
                   by_row ? sum_of(row_sums, 2, rows.first_part, 0) : nullptr, rows.splits,
                   section);
      });
    }
    store_keys();
    if (op_.biased && !whole) store_dbias();
    if (op_.slopes) store_dslopes(dslopes);
  }

 private:
  int64_t keys() const { return op_.k.shape[0] * op_.k.shape[1]; }

  void find_statistics() {
    const Tensor &out = op_.out, &dout = op_.dout, &lse = op_.lse;
    const int64_t heads = lse.shape[1], tokens = lse.shape[2];
    context_.parallel(lse.shape[0] * tokens, [&](int64_t index, int) {
      const int64_t batch = index / tokens, token = index % tokens;
      float a[256], b[256];
      for (int64_t head = 0; head < heads; ++head) {
        const auto row = [&](const Tensor& x) {
          return x.as<T>() + batch * x.strides[0] + token * x.strides[1] + head * x.strides[2];
        };
        load_row(a, row(out), out.strides[3], problem_.dv);
        load_row(b, row(dout), dout.strides[3], problem_.dv);
        // out of an empty row is 0, whatever dout holds
        for (int64_t e = 0; e < problem_.dv; ++e) b[e] = a[e] == 0 ? 0 : b[e];
        const int64_t at = (batch * heads + head) * tokens + token;
        const float natural = lse.as<float>()[batch * lse.strides[0] + head * lse.strides[1] +
                                              token * lse.strides[2]];
        const float dlse =
            op_.dlse
                ? op_.dlse.as<float>()[batch * op_.dlse.strides[0] + head * op_.dlse.strides[1] +
                                       token * op_.dlse.strides[2]]
                : 0;
        rows_.lse_log2[at] = natural == -INFINITY
                                 ? INFINITY
                                 : static_cast<float>(static_cast<double>(natural) * kLog2e);
        rows_.delta[at] = natural == -INFINITY ? 0 : dot(a, b, problem_.dv) - dlse;
      }
    });
  }

  // The sink is a key whose value is zero: its dS is -P delta
  void find_dsink() {
    const int64_t heads = op_.lse.shape[1], tokens = op_.lse.shape[2];
    context_.parallel(heads, [&](int64_t head, int) {
      const double sink = Problem<T>::log2_of(op_.sink, head);
      double sum = 0;
      for (int64_t batch = 0; batch < op_.lse.shape[0]; ++batch)
        for (int64_t token = 0; token < tokens; ++token) {
          const int64_t at = (batch * heads + head) * tokens + token;
          sum -= std::exp2(sink - static_cast<double>(rows_.lse_log2[at])) *
                 static_cast<double>(rows_.delta[at]);
        }
      op_.dsink.as<float>()[head] = static_cast<float>(sum);
    });
  }

  // Every kv head of every sequence, its keys cut where there are fewer than every thread wants
  void make_parts() {
    const int64_t heads = op_.k.shape[2];
    const int64_t groups = static_cast<int64_t>(sequences_.size()) * heads;
    const int64_t wanted = groups > 0 ? (4 * context_.threads() - 1) / groups + 1 : 1;
    for (const Sequence& sequence : sequences_)
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t tiles = (sequence.sk + kTileKeys - 1) / kTileKeys;
        const int64_t splits = std::clamp<int64_t>(tiles, 1, wanted);
        rows_of_parts_.push_back({&sequence, head, static_cast<int64_t>(parts_.size()), splits});
        for (int64_t split = 0; split < splits; ++split) {
          const auto bound = [&](int64_t i) {
            return std::min(tiles * i / splits * kTileKeys, sequence.sk);
          };
          parts_.push_back({&sequence,
                            head,
                            0,
                            0,
                            {bound(split), bound(split + 1)},
                            static_cast<int>(split),
                            static_cast<int>(splits)});
        }
      }
  }

  // About how many pairs a part has to look at
  int64_t pairs(const Part& part) const {
    if (part.rows == 0) return 0;
    int64_t sum = 0;
    for (int64_t sample = 0; sample < 8; ++sample) {
      const Range seen = problem_.visible(part, (part.rows - 1) * sample / 7);
      sum += seen.end - seen.begin;
    }
    return sum * part.rows;
  }

  float* key_sums(const Scratch<float>& sums, const Part& part, int64_t width) const {
    const Sequence& sequence = *part.sequence;
    const int64_t tokens = op_.k.shape[1], heads = op_.k.shape[2];
    return sums.data() +
           ((sequence.batch * heads + part.head) * tokens + sequence.k_begin + part.keys.begin) *
               width;
  }

  // Adds up the sums of several splits, `apart` rows from one to the next
  void store_rows(const Part& part, float* sums, const float* own, int64_t splits,
                  int64_t apart) const {
    for (int64_t row = 0; row < part.rows; ++row) {
      const float scale = static_cast<float>(op_.scale) * problem_.length_factor(part, row);
      float* const line = sums + row * d_;
      for (int64_t i = 0; i < d_; i += kLanes) {
        Vec sum = load(line + i);
        for (int64_t split = 1; split < splits; ++split) sum += load(line + split * apart * d_ + i);
        store(line + i, sum * scale);
      }
      const int64_t batch = part.sequence->batch, head = problem_.head_of(part, row),
                    token = part.sequence->q_begin + problem_.query_of(part, row);
      const auto at = [&](const Tensor& x) {
        return x.as<T>() + batch * x.strides[0] + token * x.strides[1] + head * x.strides[2];
      };
      if (op_.cosine) {
        float q[256];
        load_row(q, at(op_.q), op_.q.strides[3], problem_.d);
        unit_gradient(line, q, problem_.d);
      }
      store_row(at(op_.dq), op_.dq.strides[3], line, problem_.d);
      if (!own) continue;
      float level = 0, bias = 0;
      for (int64_t split = 0; split < splits; ++split) {
        level += own[(split * apart + row) * 2];
        bias += own[(split * apart + row) * 2 + 1];
      }
      const int64_t index = (batch * op_.q.shape[2] + head) * op_.q.shape[1] + token;
      if (op_.level) op_.dlevel.as<float>()[index] = level;
      if (dbias_ && !op_.bias_by_key()) dbias_[index] = bias;
    }
  }

  void store_keys() const {
    const int64_t tokens = op_.k.shape[1], heads = op_.k.shape[2];
    // dk was summed over q times its factor
    const auto dk_factor = static_cast<float>(op_.soft_cap > 0 ? op_.soft_cap : kLn2);
    context_.parallel(keys(), [&](int64_t index, int) {
      const int64_t batch = index / tokens, token = index % tokens;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t at = (batch * heads + head) * tokens + token;
        const auto row = [&](const Tensor& x) {
          return x.as<T>() + batch * x.strides[0] + token * x.strides[1] + head * x.strides[2];
        };
        float* const dk = dk_.data() + at * d_;
        for (int64_t i = 0; i < d_; ++i) dk[i] *= dk_factor;
        if (op_.cosine) {
          float k[256];
          load_row(k, row(op_.k), op_.k.strides[3], problem_.d);
          unit_gradient(dk, k, problem_.d);
        }
        store_row(row(op_.dk), op_.dk.strides[3], dk, problem_.d);
        store_row(row(op_.dv), op_.dv.strides[3], dv_sum_.data() + at * dv_, problem_.dv);
      }
    });
  }

  // Adds up the sums over what the bias is broadcast over
  void store_dbias() const {
    const int64_t* shape = op_.dbias.shape;
    const int64_t rows = op_.bias_by_row() ? op_.q.shape[1] : 1;
    const int64_t sizes[] = {op_.q.shape[0], op_.q.shape[2], rows};
    context_.parallel(shape[0] * shape[1] * shape[2], [&](int64_t index, int) {
      const int64_t at[] = {index / shape[2] / shape[1], index / shape[2] % shape[1],
                            index % shape[2]};
      const auto begin = [&](int i) { return shape[i] == 1 ? 0 : at[i]; };
      const auto end = [&](int i) { return shape[i] == 1 ? sizes[i] : at[i] + 1; };
      for (int64_t column = 0; column < shape[3]; ++column) {
        double sum = 0;
        for (int64_t b = begin(0); b < end(0); ++b)
          for (int64_t head = begin(1); head < end(1); ++head)
            for (int64_t row = begin(2); row < end(2); ++row)
              sum += static_cast<double>(
                  dbias_[((b * sizes[1] + head) * rows + row) * shape[3] + column]);
        op_.dbias.as<float>()[index * shape[3] + column] = static_cast<float>(sum);
      }
    });
  }

  void store_dslopes(const std::vector<double>& dslopes) const {
    for (int64_t head = 0; head < op_.q.shape[2]; ++head) {
      double sum = 0;
      for (size_t part = 0; part < parts_.size(); ++part)
        if (parts_[part].head == head / problem_.group)
          sum += dslopes[part * static_cast<size_t>(problem_.group) +
                         static_cast<size_t>(head % problem_.group)];
      op_.dslopes.as<float>()[head] = static_cast<float>(sum);
    }
  }

  const AttentionBackward& op_;
  CpuContext& context_;
  const Problem<T> problem_;
  const std::vector<Sequence> sequences_;
  const int64_t d_, dv_;
  const Scratch<float> statistics_;
  const Scratch<float> dk_, dv_sum_;  // [b, hk, sk, d_] and [b, hk, sk, dv_]
  RowStatistics rows_{};
  float* dbias_ = nullptr;  // sums of dS of each head, as AttentionBackward has them
  std::vector<Part> parts_;
  std::vector<Rows> rows_of_parts_;
};

void run(const AttentionBackward& op, CpuContext& context) {
  if (op.q.shape[2] == 0) {
    for (const Tensor& sum : {op.dk, op.dv, op.dbias})
      if (sum.data) std::memset(sum.data, 0, static_cast<size_t>(sum.size()) * size_of(sum.dtype));
    return;
  }
  dispatch_float(op.q.dtype, [&]<class T>(T) { Backward<T>(op, context).run(); });
}

HEDDLE_REGISTER(AttentionBackward);

}  // namespace
}  // namespace attention
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
