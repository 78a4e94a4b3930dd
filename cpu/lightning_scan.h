#pragma once
#include <functional>
#include <memory>
#include <queue>

#include "cpu/lightning_chunk.h"
#include "ops/lightning.h"

// A scan over chunks has two schedules. With enough states for all threads each goes through its
// sequence alone. Else the chunks of one state are shared out in waves: all the X of a wave at
// once, then the states in front of its chunks, S <- lambda^m S + X, then its outputs. Both do the
// same arithmetic in the same order, so that no number depends on the threads or on the batch.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {

struct ScanSequence {
  int64_t index, batch, begin, end;
  int64_t length() const { return end - begin; }
};

template <class T> class Scan {
 public:
  Scan(const Lightning& op, const std::vector<ScanSequence>& sequences,
       const std::vector<Powers>& powers, const CpuContext& context)
      : op_(op),
        context_(context),
        heads_(op.q, op.k, op.v, op.slopes),
        sequences_(sequences),
        powers_(powers),
        d_(op.q.shape[3]),
        e_(op.v.shape[3]),
        size_(Chunk::state_size(d_, e_)),
        workspaces_(static_cast<size_t>(context.threads())) {
    for (const ScanSequence& sequence : sequences_) total_ += chunks(sequence) * heads_.states;
  }

  void run() {
    const int64_t all = static_cast<int64_t>(sequences_.size());
    int64_t shared = 0;
    if (!balanced())
      while (shared < all && shares(sequences_[static_cast<size_t>(shared)])) ++shared;
    by_chunk(shared);
    by_state(shared, all);
  }

 private:
  int64_t chunks(const ScanSequence& sequence) const {
    return (sequence.length() + op_.chunk_size - 1) / op_.chunk_size;
  }
  // Whether threads that take one state after the other end at about the same time
  bool balanced() const {
    std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> ends;
    for (int i = 0; i < context_.threads(); ++i) ends.push(0);
    int64_t last = 0;
    for (const ScanSequence& sequence : sequences_)
      for (int64_t head = 0; head < heads_.states; ++head) {
        const int64_t end = ends.top() + chunks(sequence);
        ends.pop();
        ends.push(end);
        last = std::max(last, end);
      }
    return 7 * last * context_.threads() <= 8 * total_;
  }
  // Whether one state of it is a large part of what a thread has to do
  bool shares(const ScanSequence& sequence) const {
    return chunks(sequence) >= 4 && 4 * chunks(sequence) * context_.threads() > total_;
  }
  // The last X is only good for the final state
  bool advances(const ScanSequence& sequence, int64_t chunk) const {
    return op_.state || chunk + 1 < chunks(sequence);
  }
  const Powers& powers(int64_t head) const { return powers_[static_cast<size_t>(head)]; }

  Chunk& workspace(int worker) {
    auto& workspace = workspaces_[static_cast<size_t>(worker)];
    if (!workspace) workspace = std::make_unique<Chunk>(op_.chunk_size, d_, e_);
    return *workspace;
  }

  // A task is one state of one sequence, by sequence first
  const ScanSequence& sequence_of(int64_t task) const {
    return sequences_[static_cast<size_t>(task / heads_.states)];
  }

  // Sequences from `begin` to `end`, each thread with states of its own
  void by_state(int64_t begin, int64_t end) {
    std::vector<std::unique_ptr<Scratch<float>>> states(workspaces_.size());
    context_.parallel((end - begin) * heads_.states, [&](int64_t index, int worker) {
      const ScanSequence& sequence = sequence_of(begin * heads_.states + index);
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

  // The first `count` sequences, all threads on the same states
  void by_chunk(int64_t count) {
    int64_t tasks = count * heads_.states;
    if (tasks == 0) return;
    Scratch<float> carried(static_cast<size_t>(tasks * size_));
    for (int64_t task = 0; task < tasks; ++task)
      load_state(carried.data() + task * size_, sequence_of(task), task % heads_.states);
    const int64_t most = 16 * context_.threads();
    Scratch<float> states(static_cast<size_t>((most + tasks) * size_));
    for (int64_t first = 0, wave; first < chunks(sequences_[0]); first += wave) {
      while (chunks(sequence_of(tasks - 1)) <= first) tasks -= heads_.states;
      wave = (most + tasks - 1) / tasks;
      const auto for_chunks = [&](const auto& body) {
        context_.parallel(tasks * wave, [&](int64_t index, int worker) {
          const int64_t task = index / wave, chunk = first + index % wave;
          if (chunk < chunks(sequence_of(task)))
            body(workspace(worker), sequence_of(task), task % heads_.states, chunk,
                 states.data() + index * size_);
        });
      };
      for_chunks(
          [&](Chunk& work, const ScanSequence& sequence, int64_t head, int64_t chunk, float* x) {
            if (!advances(sequence, chunk)) return;
            load_keys(work, sequence, head, chunk);
            work.summarise(x, powers(head));
          });
      const int64_t rows = padded(d_), width = size_ / rows;
      context_.parallel(tasks * rows / kLanes, [&](int64_t index, int) {
        const int64_t task = index / (rows / kLanes), at = index % (rows / kLanes) * kLanes * width;
        pass_on(sequence_of(task), task % heads_.states, first, wave,
                carried.data() + task * size_ + at, states.data() + task * wave * size_ + at,
                kLanes * width);
      });
      for_chunks([&](Chunk& work, const ScanSequence& sequence, int64_t head, int64_t chunk,
                     const float* state) {
        load_keys(work, sequence, head, chunk);
        attend(work, sequence, head, chunk, state);
      });
    }
    for (int64_t task = 0; task < count * heads_.states; ++task)
      store_state(carried.data() + task * size_, sequence_of(task), task % heads_.states);
  }

  // Some rows of the state go through a wave: each X makes room for the state before its chunk
  void pass_on(const ScanSequence& sequence, int64_t head, int64_t first, int64_t wave,
               float* state, float* x, int64_t n) const {
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

  int64_t tokens_in(const ScanSequence& sequence, int64_t chunk) const {
    return std::min(op_.chunk_size, sequence.length() - chunk * op_.chunk_size);
  }

  // The first token of a chunk in the row of a tensor's head that goes with this head of the output
  const T* row(const Tensor& x, const ScanSequence& sequence, int64_t of, int64_t head,
               int64_t chunk) const {
    return x.as<T>() + sequence.batch * x.strides[0] +
           (sequence.begin + chunk * op_.chunk_size) * x.strides[1] +
           heads_.of(of, head) * x.strides[2];
  }

  // Output heads that share a state share keys and values too
  int64_t group() const { return heads_.out / heads_.states; }

  void load_keys(Chunk& work, const ScanSequence& sequence, int64_t state, int64_t chunk) const {
    const int64_t head = state * group();
    work.load_keys<T>(tokens_in(sequence, chunk), row(op_.k, sequence, heads_.k, head, chunk),
                      {op_.k.strides[1], op_.k.strides[3]},
                      row(op_.v, sequence, heads_.v, head, chunk),
                      {op_.v.strides[1], op_.v.strides[3]});
  }

  void attend(Chunk& work, const ScanSequence& sequence, int64_t state_head, int64_t chunk,
              const float* state) const {
    work.arrange_keys();
    const int64_t token = sequence.batch * op_.q.shape[1] + sequence.begin + chunk * op_.chunk_size;
    for (int64_t head = state_head * group(); head < (state_head + 1) * group(); ++head)
      work.attend<T>(row(op_.q, sequence, heads_.q, head, chunk),
                     {op_.q.strides[1], op_.q.strides[3]}, state, powers(state_head),
                     static_cast<float>(op_.scale),
                     op_.out.as<T>() + (token * heads_.out + head) * e_, heads_.out * e_);
  }

  void load_state(float* state, const ScanSequence& sequence, int64_t head) const {
    std::fill_n(state, size_, 0.f);
    if (!op_.initial_state) return;
    const Tensor& from = op_.initial_state;
    for (int64_t i = 0; i < d_; ++i)
      load_row(state + i * padded(e_),
               from.as<float>() + sequence.index * from.strides[0] + head * from.strides[1] +
                   i * from.strides[2],
               from.strides[3], e_);
  }

  void store_state(const float* state, const ScanSequence& sequence, int64_t head) const {
    if (!op_.state) return;
    float* to = op_.state.as<float>() + (sequence.index * heads_.states + head) * d_ * e_;
    for (int64_t i = 0; i < d_; ++i) std::copy_n(state + i * padded(e_), e_, to + i * e_);
  }

  const Lightning& op_;
  const CpuContext& context_;
  const LightningHeads heads_;
  const std::vector<ScanSequence>& sequences_;  // long ones first
  const std::vector<Powers>& powers_;           // of each state's head
  const int64_t d_, e_, size_;
  int64_t total_ = 0;                               // chunks of all states
  std::vector<std::unique_ptr<Chunk>> workspaces_;  // one per thread
};

}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
