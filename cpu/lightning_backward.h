#pragma once
#include <memory>
#include <utility>

#include "cpu/lightning_scan.h"

// The gradients of a scan, in two sweeps over the chunks of a sequence that do not need each other.
// With D[i, j] = lambda^(i - j) where j <= i, and A = scale (dO V^T) D, P = scale (Q K^T) D:
//
//   from the first chunk to the last, S as in the scan:
//     dQ = A K + scale lambda^(i + 1) dO S^T
//   from the last chunk to the first, R the gradient of the state behind the chunk:
//     dK = A^T Q + lambda^(m - 1 - j) V R^T
//     dV = P^T dO + lambda^(m - 1 - j) K R
//     R  = lambda^m R + (scale lambda^(i + 1) Q)^T dO
//
// Output heads that share keys are worked on together, so that every gradient is summed in f32 and
// rounded once. All sums are in an order that no thread count changes.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {

// Rows of f32 numbers, as wide as whole vectors, for a chunk of tokens or a state
struct Rows {
  float* data;
  int64_t width;
  float* row(int64_t i) const { return data + i * width; }
};

// to[i, :] (+)= sum over k in range(i) of a[i, k] b[k, :], where a[i, k] is a[i * row + k * step].
// range gets the first of a tile's rows.
template <class Range>
void multiply_rows(Rows to, int64_t rows, bool add, const float* a, int64_t row, int64_t step,
                   Rows b, const Range& range) {
  for_columns(to.width, [&]<int N>(int64_t c) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const auto [begin, end] = range(i);
      Tile<kTileRows, N> acc{};
      multiply(acc, end - begin, a + i * row + begin * step, row, step, b.row(begin) + c, b.width);
      for (int r = 0; r < kTileRows; ++r)
        for (int n = 0; n < N; ++n) {
          float* at = to.row(i + r) + c + n * kLanes;
          store(at, add ? load(at) + acc.at[r][n] : acc.at[r][n]);
        }
    }
  });
}

// What one thread needs to work on a chunk
class GradientChunk {
  // ranges for multiply_rows
  auto up_to_row() const {
    return [](int64_t i) { return std::pair<int64_t, int64_t>(0, i + kTileRows); };
  }
  auto from_row() const {
    return [this](int64_t j) { return std::pair<int64_t, int64_t>(j, std::max(j, m_)); };
  }
  static auto all(int64_t depth) {
    return [depth](int64_t) { return std::pair<int64_t, int64_t>(0, depth); };
  }

 public:
  GradientChunk(int64_t tokens, int64_t d, int64_t e)
      : tokens_(tokens), d_(d), e_(e), wide_d_(padded(d)), wide_e_(padded(e)) {
    const int64_t size = tokens * (5 * wide_d_ + 4 * wide_e_) + (wide_d_ + wide_e_) * tokens +
                         2 * tokens * tokens + wide_d_ * wide_e_;
    memory_ = std::make_unique<Scratch<float>>(static_cast<size_t>(size));
    std::fill_n(memory_->data(), size, 0.f);
    float* at = memory_->data();
    const auto take = [&](int64_t rows, int64_t width) {
      return Rows{std::exchange(at, at + rows * width), width};
    };
    for (Rows* rows : {&q, &k, &dq, &dk, &scaled_k_}) *rows = take(tokens, wide_d_);
    for (Rows* rows : {&v, &dout, &dv, &scaled_e_}) *rows = take(tokens, wide_e_);
    columns_k_ = take(wide_d_, tokens);
    columns_v_ = take(wide_e_, tokens);
    pairs_a_ = take(tokens, tokens);
    pairs_p_ = take(tokens, tokens);
    turned_ = take(wide_e_, wide_d_);
  }

  Rows q, k, v, dout;  // the operands
  Rows dq, dk, dv;     // what one output head gives

  void begin(int64_t tokens, float scale) {
    m_ = tokens;
    scale_ = scale;
  }

  template <class T> void load(Rows to, const T* from, const int64_t (&strides)[2], int64_t n) {
    for (int64_t i = 0; i < m_; ++i) load_row(to.row(i), from + i * strides[0], strides[1], n);
    // tiles read whole vectors of tokens
    std::fill(to.row(m_), to.row(padded(m_)), 0.f);
  }

  // dQ of one head; `state` is S^T before this chunk, [e, d]
  void sweep_forward(const Powers& powers, Rows state) {
    weigh(pairs_a_, dout, v, e_, columns_v_, powers);
    multiply_rows(dq, padded(m_), false, pairs_a_.data, tokens_, 1, k, up_to_row());
    scale_rows(scaled_e_, dout, [&](int64_t i) { return scale_ * powers[i + 1]; });
    multiply_rows(dq, padded(m_), true, scaled_e_.data, wide_e_, 1, state, all(e_));
  }

  // S^T behind this chunk
  void advance(const Powers& powers, Rows state) {
    scale_rows(scaled_k_, k, [&](int64_t j) { return powers[m_ - 1 - j]; });
    scale_all(state, wide_e_, powers[m_]);
    multiply_rows(state, wide_e_, true, v.data, 1, wide_e_, scaled_k_, all(m_));
  }

  // dK and dV of one head but for what later chunks add
  void sweep_backward(const Powers& powers) {
    weigh(pairs_a_, dout, v, e_, columns_v_, powers);
    weigh(pairs_p_, q, k, d_, columns_k_, powers);
    multiply_rows(dk, padded(m_), false, pairs_a_.data, 1, tokens_, q, from_row());
    multiply_rows(dv, padded(m_), false, pairs_p_.data, 1, tokens_, dout, from_row());
  }

  // What later chunks add to them; R is [d, e], behind this chunk
  void take_in(const Powers& powers, Rows state) {
    transpose(turned_.data, wide_d_, state.data, wide_e_, wide_d_, wide_e_);
    const auto decay = [&](int64_t j) { return powers[m_ - 1 - j]; };
    scale_rows(scaled_e_, v, decay);
    multiply_rows(dk, padded(m_), true, scaled_e_.data, wide_e_, 1, turned_, all(e_));
    scale_rows(scaled_k_, k, decay);
    multiply_rows(dv, padded(m_), true, scaled_k_.data, wide_d_, 1, state, all(d_));
  }

  // R before this chunk, in two steps, as several heads may have one state
  void decay_state(const Powers& powers, Rows state) { scale_all(state, wide_d_, powers[m_]); }
  void add_to_state(const Powers& powers, Rows state) {
    scale_rows(scaled_k_, q, [&](int64_t i) { return scale_ * powers[i + 1]; });
    multiply_rows(state, wide_d_, true, scaled_k_.data, 1, wide_d_, dout, all(m_));
  }

  // Sum of (first + i) x[i] . y[i]
  double moment(int64_t first, Rows x, Rows y) const {
    double sum = 0;
    for (int64_t i = 0; i < m_; ++i) {
      double product = 0;
      for (int64_t c = 0; c < x.width; ++c)
        product += static_cast<double>(x.row(i)[c]) * y.row(i)[c];
      sum += static_cast<double>(first + i) * product;
    }
    return sum;
  }

  int64_t tokens() const { return m_; }

 private:
  // to[i, j] = scale lambda^(i - j) a[i, :] . b[j, :] where j <= i, else 0
  void weigh(Rows to, Rows a, Rows b, int64_t depth, Rows columns, const Powers& powers) {
    transpose(columns.data, tokens_, b.data, b.width, padded(m_), depth);
    for (int64_t i = 0; i < padded(m_); i += kTileRows)
      for_columns(padded(i + kTileRows), [&]<int N>(int64_t j) {
        Tile<kTileRows, N> acc{};
        multiply(acc, depth, a.row(i), a.width, 1, columns.data + j, tokens_);
        for (int r = 0; r < kTileRows; ++r)
          for (int n = 0; n < N; ++n)
            store(to.row(i + r) + j + n * kLanes,
                  acc.at[r][n] * HEDDLE_ISA_NAMESPACE::load(powers.from(i + r) + j + n * kLanes) *
                      scale_);
      });
  }

  template <class Factor> void scale_rows(Rows to, Rows from, const Factor& factor) const {
    for (int64_t i = 0; i < padded(m_); ++i) {
      const float by = i < m_ ? factor(i) : 0;
      for (int64_t c = 0; c < from.width; c += kLanes)
        store(to.row(i) + c, HEDDLE_ISA_NAMESPACE::load(from.row(i) + c) * by);
    }
  }
  static void scale_all(Rows state, int64_t rows, float by) {
    for (int64_t i = 0; i < rows * state.width; i += kLanes)
      store(state.data + i, HEDDLE_ISA_NAMESPACE::load(state.data + i) * by);
  }

  int64_t tokens_, d_, e_, wide_d_, wide_e_, m_ = 0;
  float scale_ = 1;
  std::unique_ptr<Scratch<float>> memory_;
  Rows scaled_k_, scaled_e_, columns_k_, columns_v_, pairs_a_, pairs_p_, turned_;
};

template <class T> class Gradients {
 public:
  Gradients(const LightningBackward& op, const std::vector<ScanSequence>& sequences,
            const std::vector<Powers>& powers, const CpuContext& context)
      : op_(op),
        context_(context),
        heads_(op.q, op.k, op.v, op.slopes),
        sequences_(sequences),
        powers_(powers),
        d_(op.q.shape[3]),
        e_(op.v.shape[3]),
        group_(heads_.group()),
        states_(group_ > 0 && heads_.states == heads_.out ? group_ : 1),
        workers_(static_cast<size_t>(context.threads())) {}

  void run() {
    const auto count = static_cast<int64_t>(sequences_.size());
    // of each sequence, state and sweep
    std::vector<double> moments(static_cast<size_t>(2 * count * heads_.states));
    context_.parallel(2 * count * heads_.k, [&](int64_t task, int worker) {
      const bool back = task % 2;
      const int64_t index = task / 2 / heads_.k, key_head = task / 2 % heads_.k;
      double* moment = moments.data() + 2 * index * heads_.states + back;
      Worker& own = workers_[static_cast<size_t>(worker)];
      if (!own.chunk) own = Worker(op_.chunk_size, d_, e_, states_);
      back ? sweep_backward(own, sequences_[static_cast<size_t>(index)], key_head, moment)
           : sweep_forward(own, sequences_[static_cast<size_t>(index)], key_head, moment);
    });
    if (!op_.dslopes) return;
    for (int64_t state = 0; state < heads_.states; ++state) {
      double sum = 0;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t back = 0; back < 2; ++back)
          sum += moments[static_cast<size_t>(2 * (i * heads_.states + state) + back)];
      op_.dslopes.as<float>()[state] = static_cast<float>(-sum);
    }
  }

 private:
  struct Worker {
    Worker() = default;
    Worker(int64_t tokens, int64_t d, int64_t e, int64_t states)
        : chunk(std::make_unique<GradientChunk>(tokens, d, e)),
          state(std::make_unique<Scratch<float>>(
              static_cast<size_t>(states * Chunk::state_size(d, e)))),
          sums(std::make_unique<Scratch<float>>(
              static_cast<size_t>(tokens * std::max(padded(d), padded(e)) * 2))) {}
    std::unique_ptr<GradientChunk> chunk;
    std::unique_ptr<Scratch<float>> state, sums;  // sums over the heads of a group
  };

  int64_t chunks(const ScanSequence& sequence) const {
    return (sequence.length() + op_.chunk_size - 1) / op_.chunk_size;
  }
  int64_t first_token(int64_t chunk) const { return chunk * op_.chunk_size; }
  int64_t state_of(int64_t key_head, int64_t member) const {
    return heads_.of(heads_.states, key_head * group_ + member);
  }
  const Powers& powers(int64_t state) const { return powers_[static_cast<size_t>(state)]; }

  // Where the first token of a chunk stands in the head of x that goes with an output head
  T* row(const Tensor& x, int64_t of, int64_t head, const ScanSequence& sequence,
         int64_t chunk) const {
    return x.as<T>() + sequence.batch * x.strides[0] +
           (sequence.begin + first_token(chunk)) * x.strides[1] +
           heads_.of(of, head) * x.strides[2];
  }
  void load(GradientChunk& work, Rows to, const Tensor& x, int64_t of, int64_t head,
            const ScanSequence& sequence, int64_t chunk) const {
    work.load<T>(to, row(x, of, head, sequence, chunk), {x.strides[1], x.strides[3]}, x.shape[3]);
  }
  void store(const Tensor& x, int64_t of, int64_t head, const ScanSequence& sequence, int64_t chunk,
             Rows from, int64_t m) const {
    T* to = row(x, of, head, sequence, chunk);
    for (int64_t i = 0; i < m; ++i)
      store_row(to + i * x.strides[1], x.strides[3], from.row(i), x.shape[3]);
  }

  // A gradient of one head, or with others the sum, which the last one stores
  void gather(const Tensor& x, int64_t of, int64_t member, int64_t head,
              const ScanSequence& sequence, int64_t chunk, Rows own, float* sum, int64_t m) const {
    if (of == heads_.out) return store(x, of, head, sequence, chunk, own, m);
    for (int64_t i = 0; i < m * own.width; i += kLanes) {
      const Vec before = member == 0 ? zero() : HEDDLE_ISA_NAMESPACE::load(sum + i);
      HEDDLE_ISA_NAMESPACE::store(sum + i, before + HEDDLE_ISA_NAMESPACE::load(own.data + i));
    }
    if (member + 1 == group_) store(x, of, head, sequence, chunk, {sum, own.width}, m);
  }

  // Reads a state as [d, e], or with rows and columns exchanged
  void load_state(Rows to, const Tensor& from, const ScanSequence& sequence, int64_t state,
                  bool turned) const {
    std::fill_n(to.data, Chunk::state_size(d_, e_), 0.f);
    if (!from) return;
    const int64_t* strides = from.strides;
    const float* data = from.as<float>() + sequence.index * strides[0] + state * strides[1];
    for (int64_t i = 0; i < (turned ? e_ : d_); ++i)
      load_row(to.row(i), data + i * strides[turned ? 3 : 2], strides[turned ? 2 : 3],
               turned ? d_ : e_);
  }

  void sweep_forward(Worker& own, const ScanSequence& sequence, int64_t key_head, double* moment) {
    GradientChunk& work = *own.chunk;
    const auto state = [&](int64_t i) {
      return Rows{own.state->data() + i * Chunk::state_size(d_, e_), padded(d_)};
    };
    for (int64_t i = 0; i < states_; ++i)
      load_state(state(i), op_.initial_state, sequence, state_of(key_head, i), true);
    for (int64_t chunk = 0; chunk < chunks(sequence); ++chunk) {
      const int64_t m = std::min(op_.chunk_size, sequence.length() - first_token(chunk));
      work.begin(m, static_cast<float>(op_.scale));
      load(work, work.k, op_.k, heads_.k, key_head * group_, sequence, chunk);
      for (int64_t member = 0; member < group_; ++member) {
        const int64_t head = key_head * group_ + member, i = states_ > 1 ? member : 0;
        const int64_t at = state_of(key_head, member);
        load(work, work.v, op_.v, heads_.v, head, sequence, chunk);
        load(work, work.dout, op_.dout, heads_.out, head, sequence, chunk);
        work.sweep_forward(powers(at), state(i));
        if (op_.dslopes) {
          load(work, work.q, op_.q, heads_.q, head, sequence, chunk);
          moment[2 * at] += work.moment(first_token(chunk) + 1, work.q, work.dq);
        }
        gather(op_.dq, heads_.q, member, head, sequence, chunk, work.dq, own.sums->data(), m);
        if (states_ > 1 || member + 1 == group_) work.advance(powers(at), state(i));
      }
    }
    if (!op_.dslopes || !op_.dstate) return;
    for (int64_t i = 0; i < states_; ++i) {
      const int64_t at = state_of(key_head, i);
      const int64_t* strides = op_.dstate.strides;
      const float* gradient =
          op_.dstate.as<float>() + sequence.index * strides[0] + at * strides[1];
      double sum = 0;
      for (int64_t row = 0; row < d_; ++row)
        for (int64_t column = 0; column < e_; ++column)
          sum += static_cast<double>(state(i).row(column)[row]) *
                 gradient[row * strides[2] + column * strides[3]];
      moment[2 * at] += static_cast<double>(sequence.length()) * sum;
    }
  }

  void sweep_backward(Worker& own, const ScanSequence& sequence, int64_t key_head, double* moment) {
    GradientChunk& work = *own.chunk;
    const auto state = [&](int64_t i) {
      return Rows{own.state->data() + i * Chunk::state_size(d_, e_), padded(e_)};
    };
    float* const sum_k = own.sums->data();
    float* const sum_v = sum_k + op_.chunk_size * std::max(padded(d_), padded(e_));
    for (int64_t i = 0; i < states_; ++i)
      load_state(state(i), op_.dstate, sequence, state_of(key_head, i), false);
    for (int64_t chunk = chunks(sequence) - 1; chunk >= 0; --chunk) {
      const int64_t m = std::min(op_.chunk_size, sequence.length() - first_token(chunk));
      work.begin(m, static_cast<float>(op_.scale));
      load(work, work.k, op_.k, heads_.k, key_head * group_, sequence, chunk);
      for (int64_t member = 0; member < group_; ++member) {
        const int64_t head = key_head * group_ + member, i = states_ > 1 ? member : 0;
        const int64_t at = state_of(key_head, member);
        load(work, work.q, op_.q, heads_.q, head, sequence, chunk);
        load(work, work.v, op_.v, heads_.v, head, sequence, chunk);
        load(work, work.dout, op_.dout, heads_.out, head, sequence, chunk);
        work.sweep_backward(powers(at));
        // heads that share a state share what comes back through it
        if (states_ > 1 || member == 0) {
          work.take_in(powers(at), state(i));
          work.decay_state(powers(at), state(i));
        }
        work.add_to_state(powers(at), state(i));
        if (op_.dslopes) moment[2 * at] -= work.moment(first_token(chunk) + 1, work.k, work.dk);
        gather(op_.dk, heads_.k, member, head, sequence, chunk, work.dk, sum_k, m);
        gather(op_.dv, heads_.v, member, head, sequence, chunk, work.dv, sum_v, m);
      }
    }
    if (!op_.dinitial_state) return;
    for (int64_t i = 0; i < states_; ++i) {
      float* to = op_.dinitial_state.as<float>() +
                  (sequence.index * heads_.states + state_of(key_head, i)) * d_ * e_;
      for (int64_t r = 0; r < d_; ++r) std::copy_n(state(i).row(r), e_, to + r * e_);
    }
  }

  const LightningBackward& op_;
  const CpuContext& context_;
  const LightningHeads heads_;
  const std::vector<ScanSequence>& sequences_;
  const std::vector<Powers>& powers_;
  const int64_t d_, e_;
  const int64_t group_, states_;  // output heads per key head, and states of those
  std::vector<Worker> workers_;
};

}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
