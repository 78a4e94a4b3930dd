#include "ops/lightning.h"

#include <functional>
#include <memory>
#include <queue>

#include "core/registry.h"
#include "cpu/lightning_chunk.h"

// A scan over chunks has two schedules. With enough states for all threads each goes through its
// sequence alone. Else the chunks of one state are shared out in waves: all the X of a wave at
// once, then the states in front of its chunks, S <- lambda^m S + X, then its outputs. Both do the
// same arithmetic in the same order, so that no number depends on the threads or on the batch.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

double log2_decay(const Tensor& slopes, int64_t head) {
  const float slope = slopes.as<float>()[head * slopes.strides[0]];
  HEDDLE_CHECK(std::isfinite(slope) && slope >= 0, kArgument, "slopes",
               "slopes must be finite and at least 0, got ", slope, " for head ", head);
  return -static_cast<double>(slope) * 1.4426950408889634;
}

struct Sequence {
  int64_t index, batch, begin, end;
  int64_t length() const { return end - begin; }
};

// Long ones first
std::vector<Sequence> sequences_of(const Lightning& op) {
  std::vector<Sequence> sequences;
  const int64_t tokens = op.q.shape[1];
  if (!op.cu_seqlens) {
    for (int64_t b = 0; b < op.q.shape[0]; ++b) sequences.push_back({b, b, 0, tokens});
    return sequences;
  }
  const Tensor& offsets = op.cu_seqlens;
  const auto at = [&](int64_t i) -> int64_t {
    return offsets.as<int32_t>()[i * offsets.strides[0]];
  };
  const int64_t count = offsets.shape[0] - 1;
  HEDDLE_CHECK(at(0) == 0 && at(count) == tokens, kArgument, "cuSeqlens",
               "cuSeqlens must start at 0 and end at ", tokens, ", got ", at(0), " and ",
               at(count));
  for (int64_t i = 0; i < count; ++i) {
    HEDDLE_CHECK(at(i) <= at(i + 1), kArgument, "cuSeqlens", "cuSeqlens must never descend, got ",
                 at(i + 1), " after ", at(i));
    sequences.push_back({i, 0, at(i), at(i + 1)});
  }
  std::stable_sort(sequences.begin(), sequences.end(), [](const Sequence& a, const Sequence& b) {
    return a.length() > b.length();
  });
  return sequences;
}

template <class T> class Scan {
 public:
  Scan(const Lightning& op, const CpuContext& context)
      : op_(op),
        context_(context),
        heads_(op.q, op.k, op.v, op.slopes),
        sequences_(sequences_of(op)),
        d_(op.q.shape[3]),
        e_(op.v.shape[3]),
        size_(Chunk::state_size(d_, e_)),
        workspaces_(static_cast<size_t>(context.threads())) {
    for (int64_t head = 0; head < heads_.states; ++head)
      powers_.emplace_back(log2_decay(op.slopes, head), op.chunk_size);
  }

  void run() {
    if (sequences_.empty() || heads_.states == 0) return;
    if (balanced()) {
      by_state();
    } else {
      by_chunk(chunks(sequences_[0]));
    }
  }

 private:
  int64_t chunks(const Sequence& sequence) const {
    return (sequence.length() + op_.chunk_size - 1) / op_.chunk_size;
  }
  // Whether threads that take one state after the other end at about the same time
  bool balanced() const {
    std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> loads;
    for (int i = 0; i < context_.threads(); ++i) loads.push(0);
    int64_t total = 0, last = 0;
    for (const Sequence& sequence : sequences_)
      for (int64_t head = 0; head < heads_.states; ++head) {
        const int64_t load = loads.top() + chunks(sequence);
        loads.pop();
        loads.push(load);
        total += chunks(sequence);
        last = std::max(last, load);
      }
    return last < 4 || 7 * last * context_.threads() <= 8 * total;
  }
  // The last X is only good for the final state
  bool advances(const Sequence& sequence, int64_t chunk) const {
    return op_.state || chunk + 1 < chunks(sequence);
  }
  const Powers& powers(int64_t head) const { return powers_[static_cast<size_t>(head)]; }

  Chunk& workspace(int worker) {
    auto& workspace = workspaces_[static_cast<size_t>(worker)];
    if (!workspace) workspace = std::make_unique<Chunk>(op_.chunk_size, d_, e_);
    return *workspace;
  }

  void by_state() {
    const auto count = static_cast<int64_t>(sequences_.size());
    std::vector<std::unique_ptr<Scratch<float>>> states(workspaces_.size());
    context_.parallel(count * heads_.states, [&](int64_t index, int worker) {
      const Sequence& sequence = sequences_[static_cast<size_t>(index / heads_.states)];
      const int64_t head = index % heads_.states;
      Chunk& work = workspace(worker);
      auto& state = states[static_cast<size_t>(worker)];
      if (!state) state = std::make_unique<Scratch<float>>(static_cast<size_t>(size_));
      load_state(state->data(), sequence, head);
      for (int64_t chunk = 0; chunk < chunks(sequence); ++chunk) {
        load_keys(work, sequence, head, chunk);
        attend(work, sequence, head, chunk, state->data());
        if (advances(sequence, chunk)) work.advance(state->data(), state->data(), powers(head));
      }
      store_state(state->data(), sequence, head);
    });
  }

  void by_chunk(int64_t longest) {
    const auto count = static_cast<int64_t>(sequences_.size());
    Scratch<float> carried(static_cast<size_t>(count * heads_.states * size_));
    context_.parallel(count * heads_.states, [&](int64_t task, int) {
      load_state(carried.data() + task * size_, sequence_of(task), task % heads_.states);
    });
    const int64_t most = 16 * context_.threads();
    Scratch<float> states(static_cast<size_t>((most + count * heads_.states) * size_));
    int64_t tasks = count * heads_.states;
    for (int64_t first = 0; first < longest;) {
      while (chunks(sequence_of(tasks - 1)) <= first) tasks -= heads_.states;
      const int64_t wave = (most + tasks - 1) / tasks;
      const auto for_chunks = [&](const auto& body) {
        context_.parallel(tasks * wave, [&](int64_t index, int worker) {
          const int64_t task = index / wave, chunk = first + index % wave;
          if (chunk < chunks(sequence_of(task)))
            body(workspace(worker), sequence_of(task), task % heads_.states, chunk,
                 states.data() + index * size_);
        });
      };
      for_chunks([&](Chunk& work, const Sequence& sequence, int64_t head, int64_t chunk, float* x) {
        if (!advances(sequence, chunk)) return;
        load_keys(work, sequence, head, chunk);
        work.summarise(x, powers(head));
      });
      const int64_t rows = padded(d_), width = size_ / rows;
      context_.parallel(tasks * rows / kLanes, [&](int64_t index, int) {
        const int64_t task = index / (rows / kLanes),
                      at = index % (rows / kLanes) * kLanes * width;
        pass_on(sequence_of(task), task % heads_.states, first, wave,
                carried.data() + task * size_ + at, states.data() + task * wave * size_ + at,
                kLanes * width);
      });
      for_chunks([&](Chunk& work, const Sequence& sequence, int64_t head, int64_t chunk,
                     const float* state) {
        load_keys(work, sequence, head, chunk);
        attend(work, sequence, head, chunk, state);
      });
      first += wave;
    }
    context_.parallel(count * heads_.states, [&](int64_t task, int) {
      store_state(carried.data() + task * size_, sequence_of(task), task % heads_.states);
    });
  }

  // Some rows of the state go through a wave: each X makes room for the state before its chunk
  void pass_on(const Sequence& sequence, int64_t head, int64_t first, int64_t wave, float* state,
               float* x, int64_t n) const {
    for (int64_t chunk = first; chunk < std::min(first + wave, chunks(sequence));
         ++chunk, x += size_) {
      const bool last = !advances(sequence, chunk);
      const float keep = powers(head)[tokens_in(sequence, chunk)];
      for (int64_t i = 0; i < n; i += kLanes) {
        const Vec before = load(state + i);
        if (!last) store(state + i, before * keep + load(x + i));
        store(x + i, before);
      }
    }
  }

  const Sequence& sequence_of(int64_t task) const {
    return sequences_[static_cast<size_t>(task / heads_.states)];
  }
  int64_t tokens_in(const Sequence& sequence, int64_t chunk) const {
    return std::min(op_.chunk_size, sequence.length() - chunk * op_.chunk_size);
  }

  // The first token of a chunk in the row of a tensor's head that goes with this head of the output
  const T* row(const Tensor& x, const Sequence& sequence, int64_t of, int64_t head,
               int64_t chunk) const {
    return x.as<T>() + sequence.batch * x.strides[0] +
           (sequence.begin + chunk * op_.chunk_size) * x.strides[1] +
           heads_.of(of, head) * x.strides[2];
  }

  // Output heads that share a state share keys and values too
  int64_t group() const { return heads_.out / heads_.states; }

  void load_keys(Chunk& work, const Sequence& sequence, int64_t state, int64_t chunk) const {
    const int64_t head = state * group();
    work.load_keys<T>(tokens_in(sequence, chunk), row(op_.k, sequence, heads_.k, head, chunk),
                      {op_.k.strides[1], op_.k.strides[3]},
                      row(op_.v, sequence, heads_.v, head, chunk),
                      {op_.v.strides[1], op_.v.strides[3]});
  }

  void attend(Chunk& work, const Sequence& sequence, int64_t state_head, int64_t chunk,
              const float* state) const {
    work.arrange_keys();
    const int64_t token =
        sequence.batch * op_.q.shape[1] + sequence.begin + chunk * op_.chunk_size;
    for (int64_t head = state_head * group(); head < (state_head + 1) * group(); ++head)
      work.attend<T>(row(op_.q, sequence, heads_.q, head, chunk),
                     {op_.q.strides[1], op_.q.strides[3]}, state, powers(state_head),
                     static_cast<float>(op_.scale),
                     op_.out.as<T>() + (token * heads_.out + head) * e_, heads_.out * e_);
  }

  void load_state(float* state, const Sequence& sequence, int64_t head) const {
    std::fill_n(state, size_, 0.f);
    if (!op_.initial_state) return;
    const Tensor& from = op_.initial_state;
    for (int64_t i = 0; i < d_; ++i)
      load_row(state + i * padded(e_),
               from.as<float>() + sequence.index * from.strides[0] + head * from.strides[1] +
                   i * from.strides[2],
               from.strides[3], e_);
  }

  void store_state(const float* state, const Sequence& sequence, int64_t head) const {
    if (!op_.state) return;
    float* to = op_.state.as<float>() + (sequence.index * heads_.states + head) * d_ * e_;
    for (int64_t i = 0; i < d_; ++i) std::copy_n(state + i * padded(e_), e_, to + i * e_);
  }

  const Lightning& op_;
  const CpuContext& context_;
  const LightningHeads heads_;
  const std::vector<Sequence> sequences_;
  const int64_t d_, e_, size_;
  std::vector<Powers> powers_;
  std::vector<std::unique_ptr<Chunk>> workspaces_;  // one per thread
};

void run(const Lightning& op, CpuContext& context) {
  dispatch_float(op.q.dtype, [&]<class T>(T) { Scan<T>(op, context).run(); });
}

// The state of one slot and head. It is read and written once per token; what the query heads that
// share it need of it is taken on the way.
template <class T> class Decode {
 public:
  Decode(const LightningDecode& op)
      : op_(op),
        heads_(op.q, op.k, op.v, op.slopes),
        d_(op.q.shape[3]),
        e_(op.v.shape[3]),
        rows_(op.states.shape[2]),
        width_(op.states.shape[3]),
        q_(static_cast<size_t>(2 * (d_ + e_))),
        k_(q_.data() + d_),
        v_(k_ + d_),
        out_(v_ + e_) {}

  void run(int64_t b, int64_t head, int64_t slot, float decay) const {
    const int64_t tokens = op_.q.shape[1], group = heads_.out / heads_.states;
    const int64_t size = rows_ * width_, first = head * group;
    float* state = op_.states.as<float>() + (slot * heads_.states + head) * size;
    for (int64_t t = 0; t < tokens; ++t) {
      float* copy = op_.all_states
                        ? op_.all_states.as<float>() +
                              ((b * tokens + t) * heads_.states + head) * size
                        : nullptr;
      T* out = op_.out.as<T>() + ((b * tokens + t) * heads_.out + first) * e_;
      if (slot < 0) {
        std::fill_n(out, group * e_, T{});
        if (copy) std::fill_n(copy, size, 0.f);
        continue;
      }
      load(k_, op_.k, heads_.k, b, t, first, d_);
      load(v_, op_.v, heads_.v, b, t, first, e_);
      for (int64_t g = 0; g < group; ++g) {
        load(q_.data(), op_.q, heads_.q, b, t, first + g, d_);
        for (int64_t i = 0; i < d_; ++i) q_[i] *= static_cast<float>(op_.scale);
        if (op_.state_layout == 0) {
          g == 0 ? by_rows<true>(state, decay) : by_rows<false>(state, decay);
        } else {
          g == 0 ? by_columns<true>(state, decay) : by_columns<false>(state, decay);
        }
        store_row(out + g * e_, 1, out_, e_);
      }
      if (copy) std::copy_n(state, size, copy);
    }
  }

 private:
  void load(float* to, const Tensor& x, int64_t of, int64_t b, int64_t t, int64_t head,
            int64_t n) const {
    load_row(to,
             x.as<T>() + b * x.strides[0] + t * x.strides[1] + heads_.of(of, head) * x.strides[2],
             x.strides[3], n);
  }

  // [d, e]: a strip of columns at a time, whose outputs stay in registers
  template <bool update> void by_rows(float* state, float decay) const {
    constexpr int kStrip = 4;
    int64_t j = 0;
    for (; j + kStrip * kLanes <= e_; j += kStrip * kLanes)
      strip<update, kStrip>(state + j, decay, j, kLanes);
    for (; j + kLanes <= e_; j += kLanes) strip<update, 1>(state + j, decay, j, kLanes);
    if (j < e_) strip<update, 1>(state + j, decay, j, e_ - j);
  }
  template <bool update, int N>
  void strip(float* state, float decay, int64_t j, int64_t count) const {
    const auto read = [&](const float* p) {
      return N > 1 || count == kLanes ? HEDDLE_ISA_NAMESPACE::load(p)
                                      : HEDDLE_ISA_NAMESPACE::load(p, count);
    };
    const auto write = [&](float* p, Vec x) {
      if (N > 1 || count == kLanes) {
        store(p, x);
      } else {
        store(p, x, count);
      }
    };
    Vec acc[N] = {}, v[N];
    for (int n = 0; n < N; ++n) v[n] = read(v_ + j + n * kLanes);
    for (int64_t i = 0; i < d_; ++i) {
      float* row = state + i * width_;
      for (int n = 0; n < N; ++n) {
        Vec s = read(row + n * kLanes);
        if (update) {
          s = s * decay + v[n] * k_[i];
          write(row + n * kLanes, s);
        }
        acc[n] += s * q_[i];
      }
    }
    for (int n = 0; n < N; ++n) write(out_ + j + n * kLanes, acc[n]);
  }

  // [e, d]: each row gives one output
  template <bool update> void by_columns(float* state, float decay) const {
    for (int64_t i = 0; i < e_; ++i) {
      float* row = state + i * width_;
      const float v = v_[i];
      Vec even = zero(), odd = zero();
      int64_t j = 0;
      const auto step = [&](Vec& acc, auto... count) {
        Vec s = HEDDLE_ISA_NAMESPACE::load(row + j, count...);
        if (update) {
          s = s * decay + HEDDLE_ISA_NAMESPACE::load(k_ + j, count...) * v;
          store(row + j, s, count...);
        }
        acc += s * HEDDLE_ISA_NAMESPACE::load(q_.data() + j, count...);
        j += kLanes;
      };
      while (j + 2 * kLanes <= d_) {
        step(even);
        step(odd);
      }
      if (j + kLanes <= d_) step(even);
      if (j < d_) step(odd, d_ - j);
      out_[i] = reduce_add(even + odd);
    }
  }

  const LightningDecode& op_;
  const LightningHeads heads_;
  const int64_t d_, e_, rows_, width_;
  const Scratch<float> q_;
  float *const k_, *const v_, *const out_;
};

std::vector<int64_t> slots_of(const LightningDecode& op) {
  const int64_t pool = op.states.shape[0];
  std::vector<int64_t> slots;
  for (int64_t b = 0; b < op.slots.shape[0]; ++b) {
    slots.push_back(op.slots.as<int32_t>()[b * op.slots.strides[0]]);
    HEDDLE_CHECK(slots.back() < pool, kArgument, "slots", "slots must be below ", pool, ", got ",
                 slots.back());
  }
  std::vector<int64_t> sorted = slots;
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 1; i < sorted.size(); ++i)
    HEDDLE_CHECK(sorted[i] < 0 || sorted[i] != sorted[i - 1], kArgument, "slots",
                 "slots must name each state at most once, got ", sorted[i], " twice");
  return slots;
}

void run(const LightningDecode& op, CpuContext& context) {
  const int64_t states = op.states.shape[1];
  const std::vector<int64_t> slots = slots_of(op);
  std::vector<float> decays;
  for (int64_t head = 0; head < states; ++head)
    decays.push_back(static_cast<float>(std::exp2(log2_decay(op.slopes, head))));
  // A state of 128 by 128 takes a few microseconds, about as long as waking a thread
  constexpr int64_t kPiece = 1 << 16;
  const int64_t count = static_cast<int64_t>(slots.size()) * states;
  const int64_t work = count * op.q.shape[1] * op.states.shape[2] * op.states.shape[3];
  const int64_t pieces =
      std::min(count, std::clamp<int64_t>(work / kPiece, 1, 4 * context.threads()));
  dispatch_float(op.q.dtype, [&]<class T>(T) {
    context.parallel(pieces, [&](int64_t piece, int) {
      const Decode<T> decode(op);
      for (int64_t i = count * piece / pieces; i < count * (piece + 1) / pieces; ++i)
        decode.run(i / states, i % states, slots[static_cast<size_t>(i / states)],
                   decays[static_cast<size_t>(i % states)]);
    });
  });
}

HEDDLE_REGISTER(Lightning);
HEDDLE_REGISTER(LightningDecode);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
