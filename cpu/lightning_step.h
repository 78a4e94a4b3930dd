#pragma once
#include <algorithm>

#include "core/cpu_context.h"
#include "cpu/half.h"
#include "ops/lightning.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {

// The state of one slot and head. It is read and written once per token; what the query heads that
// share it need of it is taken on the way.
template <class T> class Step {
 public:
  explicit Step(const LightningDecode& op)
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
    // Without a slot nothing is read
    float* state =
        slot < 0 ? nullptr : op_.states.as<float>() + (slot * heads_.states + head) * size;
    for (int64_t t = 0; t < tokens; ++t) {
      float* copy = op_.all_states ? op_.all_states.as<float>() +
                                         ((b * tokens + t) * heads_.states + head) * size
                                   : nullptr;
      T* out = op_.out.as<T>() + ((b * tokens + t) * heads_.out + first) * e_;
      if (!state) {
        std::fill_n(out, group * e_, T{});
        if (copy) std::fill_n(copy, size, 0.f);
        continue;
      }
      read(k_, op_.k, heads_.k, b, t, first, d_);
      read(v_, op_.v, heads_.v, b, t, first, e_);
      for (int64_t g = 0; g < group; ++g) {
        read(q_.data(), op_.q, heads_.q, b, t, first + g, d_);
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
  void read(float* to, const Tensor& x, int64_t of, int64_t b, int64_t t, int64_t head,
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
      strip<update, kStrip>(state + j, decay, j);
    for (; j + kLanes <= e_; j += kLanes) strip<update, 1>(state + j, decay, j);
    if (j < e_) strip<update, 1>(state + j, decay, j, e_ - j);
  }
  // `count` names the columns of the last strip, if it is no whole vector
  template <bool update, int N, class... Count>
  void strip(float* state, float decay, int64_t j, Count... count) const {
    Vec acc[N] = {}, v[N];
    for (int n = 0; n < N; ++n) v[n] = load(v_ + j + n * kLanes, count...);
    for (int64_t i = 0; i < d_; ++i) {
      float* row = state + i * width_;
      for (int n = 0; n < N; ++n) {
        Vec s = load(row + n * kLanes, count...);
        if (update) {
          s = s * decay + v[n] * k_[i];
          store(row + n * kLanes, s, count...);
        }
        acc[n] += s * q_[i];
      }
    }
    for (int n = 0; n < N; ++n) store(out_ + j + n * kLanes, acc[n], count...);
  }

  // [e, d]: each row gives one output
  template <bool update> void by_columns(float* state, float decay) const {
    for (int64_t i = 0; i < e_; ++i) {
      float* row = state + i * width_;
      const float v = v_[i];
      Vec even = zero(), odd = zero();
      int64_t j = 0;
      const auto step = [&](Vec& acc, auto... count) {
        Vec s = load(row + j, count...);
        if (update) {
          s = s * decay + load(k_ + j, count...) * v;
          store(row + j, s, count...);
        }
        acc += s * load(q_.data() + j, count...);
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

}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
