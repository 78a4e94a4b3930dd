#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/cpu_context.h"
#include "cpu/half.h"
#include "cpu/multiply.h"

// One chunk of m tokens of one state, in f32:
//
//   P[i, j] = scale * lambda^(i - j) * Q[i, :] . K[j, :]       where j <= i
//   O[i, :] = P[i, :] V + scale * lambda^(i + 1) * Q[i, :] S
//   X       = (lambda^(m - 1 - j) K[j, :])^T V                 S becomes lambda^m S + X
//
// Every power of lambda has an exponent from 0 on, so that nothing overflows however fast a head
// decays. Tiles end at the diagonal: a row never multiplies a later key, whatever that may hold.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {

// Widths of rows are whole vectors, which are whole tiles of rows too
static_assert(kLanes % kTileRows == 0);
inline int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// The powers of one lambda, highest first, and zeros where a key would be later than its query
class Powers {
 public:
  Powers(double log2_lambda, int64_t chunk)
      : chunk_(chunk), values_(static_cast<size_t>(chunk + 2 * kLanes + 1)) {
    for (int64_t i = 0; i <= chunk; ++i) {
      const auto power = static_cast<float>(std::exp2(log2_lambda * static_cast<double>(i)));
      // Subnormal numbers are slow and no result depends on them
      values_[static_cast<size_t>(chunk - i)] =
          power < std::numeric_limits<float>::min() ? 0 : power;
    }
  }
  float operator[](int64_t i) const { return from(i)[0]; }
  // lambda^i, lambda^(i - 1), ..., 1, 0, ...
  const float* from(int64_t i) const { return values_.data() + chunk_ - i; }

 private:
  int64_t chunk_;
  std::vector<float> values_;
};

// Calls body.operator()<N>(column) for groups of N vectors. None has one vector if it can be
// avoided: a tile so narrow waits for its loads.
template <class Body> HEDDLE_INLINE void for_columns(int64_t columns, const Body& body) {
  for (int64_t at = 0; at < columns;) {
    const int64_t left = (columns - at) / kLanes;
    if (left >= 3 && left != 4) {
      body.template operator()<3>(at);
      at += 3 * kLanes;
    } else if (left >= 2) {
      body.template operator()<2>(at);
      at += 2 * kLanes;
    } else {
      body.template operator()<1>(at);
      at += kLanes;
    }
  }
}

// acc[r] += a[r, j] * b[j] for the j up to r
template <int R, int N>
HEDDLE_INLINE void multiply_triangle(Tile<R, N>& acc, const float* a, int64_t row, const float* b,
                                     int64_t width) {
#pragma GCC unroll 8
  for (int j = 0; j < R; ++j) {
    Vec line[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) line[n] = load(b + j * width + n * kLanes);
#pragma GCC unroll 8
    for (int r = j; r < R; ++r) {
      const Vec scalar = splat(a[r * row + j]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc.at[r][n] += scalar * line[n];
    }
  }
}

// The operands of a chunk in f32, with the buffers that a thread needs to work on them
class Chunk {
 public:
  Chunk(int64_t tokens, int64_t d, int64_t e)
      : d_(d),
        e_(e),
        wide_d_(padded(d)),
        wide_e_(padded(e)),
        tokens_(tokens),
        memory_(static_cast<size_t>(tokens * (2 * wide_d_ + wide_e_) + (d + tokens) * tokens)) {
    const auto total = tokens * (2 * wide_d_ + wide_e_) + (d + tokens) * tokens;
    std::fill_n(memory_.data(), total, 0.f);
    q_ = memory_.data();
    k_ = q_ + tokens * wide_d_;
    v_ = k_ + tokens * wide_d_;
    keys_ = v_ + tokens * wide_e_;
    pairs_ = keys_ + d * tokens;
  }

  // How many numbers a state has here: rows of whole vectors, and whole tiles of rows
  static int64_t state_size(int64_t d, int64_t e) { return padded(d) * padded(e); }

  // m tokens; strides go from one token to the next and from one number to the next
  template <class T>
  void load_keys(int64_t m, const T* k, const int64_t (&k_strides)[2], const T* v,
                 const int64_t (&v_strides)[2]) {
    m_ = m;
    load_rows(k_, wide_d_, k, k_strides, d_);
    load_rows(v_, wide_e_, v, v_strides, e_);
  }

  // Makes ready for attend(), before advance() changes the keys
  void arrange_keys() { transpose(keys_, tokens_, k_, wide_d_, padded(m_), d_); }

  // The output of one head of queries; `state` is the one before this chunk
  template <class T>
  void attend(const T* q, const int64_t (&q_strides)[2], const float* state, const Powers& powers,
              float scale, T* out, int64_t out_stride) {
    load_rows(q_, wide_d_, q, q_strides, d_);
    for (int64_t i = 0; i < m_; i += kTileRows)
      for_columns(padded(i + kTileRows), [&]<int N>(int64_t j) {
        Tile<kTileRows, N> acc{};
        multiply(acc, d_, q_ + i * wide_d_, wide_d_, 1, keys_ + j, tokens_);
        for (int r = 0; r < kTileRows; ++r)
          for (int n = 0; n < N; ++n)
            store(pairs_ + (i + r) * tokens_ + j + n * kLanes,
                  acc.at[r][n] * load(powers.from(i + r) + j + n * kLanes) * scale);
      });
    for (int64_t i = 0; i < m_; ++i) {
      float* row = q_ + i * wide_d_;
      const float factor = scale * powers[i + 1];
      for (int64_t c = 0; c < wide_d_; c += kLanes) store(row + c, load(row + c) * factor);
    }
    for_columns(wide_e_, [&]<int N>(int64_t c) {
      for (int64_t i = 0; i < m_; i += kTileRows) {
        Tile<kTileRows, N> acc{};
        multiply(acc, d_, q_ + i * wide_d_, wide_d_, 1, state + c, wide_e_);
        multiply(acc, i, pairs_ + i * tokens_, tokens_, 1, v_ + c, wide_e_);
        multiply_triangle(acc, pairs_ + i * tokens_ + i, tokens_, v_ + i * wide_e_ + c, wide_e_);
        for (int64_t r = 0; r < std::min<int64_t>(kTileRows, m_ - i); ++r)
          for (int n = 0; n < N; ++n) {
            T* to = out + (i + r) * out_stride + c + n * kLanes;
            const int64_t rest = e_ - c - n * kLanes;
            if (rest >= kLanes) {
              store(to, acc.at[r][n]);
            } else if (rest > 0) {
              store(to, acc.at[r][n], rest);
            }
          }
      }
    });
  }

  // to = lambda^m from + X
  void advance(float* to, const float* from, const Powers& powers) { sum(to, from, powers); }
  // to = X
  void summarise(float* to, const Powers& powers) { sum(to, nullptr, powers); }

 private:
  template <class T>
  void load_rows(float* to, int64_t width, const T* from, const int64_t (&strides)[2], int64_t n) {
    for (int64_t i = 0; i < m_; ++i) load_row(to + i * width, from + i * strides[0], strides[1], n);
    // Tiles read whole vectors of tokens
    std::fill(to + m_ * width, to + padded(m_) * width, 0.f);
  }

  void sum(float* to, const float* from, const Powers& powers) {
    for (int64_t j = 0; j < m_; ++j) {
      float* row = k_ + j * wide_d_;
      for (int64_t c = 0; c < wide_d_; c += kLanes)
        store(row + c, load(row + c) * powers[m_ - 1 - j]);
    }
    const float keep = powers[m_];
    for_columns(wide_e_, [&]<int N>(int64_t c) {
      for (int64_t i = 0; i < wide_d_; i += kTileRows) {
        Tile<kTileRows, N> acc{};
        multiply(acc, m_, k_ + i, 1, wide_d_, v_ + c, wide_e_);
        for (int r = 0; r < kTileRows; ++r)
          for (int n = 0; n < N; ++n) {
            const int64_t at = (i + r) * wide_e_ + c + n * kLanes;
            store(to + at, from ? load(from + at) * keep + acc.at[r][n] : acc.at[r][n]);
          }
      }
    });
  }

  int64_t d_, e_, wide_d_, wide_e_, tokens_, m_ = 0;
  Scratch<float> memory_;
  float *q_, *k_, *v_, *keys_, *pairs_;  // keys_ are k_ transposed
};

}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
