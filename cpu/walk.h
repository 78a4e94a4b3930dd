#pragma once
#include <algorithm>
#include <array>
#include <cstring>

#include "core/cpu_context.h"
#include "core/tensor.h"
#include "cpu/half.h"

// Walking over tensors of one shape and any strides, in row-major order.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {

// The leading `rank` dimensions of a few tensors, joined into as few as the strides of all of them
// allow: tensors without gaps become one long row.
template <int N> class Walk {
 public:
  using Offsets = std::array<int64_t, N>;

  Walk(const std::array<const Tensor*, N>& tensors, int rank) {
    for (int i = rank - 1; i >= 0; --i) {
      const int64_t length = tensors[0]->shape[i];
      size_ *= length;
      if (length == 1) continue;
      Offsets strides;
      for (int n = 0; n < N; ++n) strides[n] = tensors[n]->strides[i];
      Dimension* inner = rank_ ? &dimensions_[rank_ - 1] : nullptr;
      bool joins = inner != nullptr;
      for (int n = 0; joins && n < N; ++n) joins = strides[n] == inner->strides[n] * inner->length;
      if (joins) {
        inner->length *= length;
      } else {
        dimensions_[rank_++] = {length, strides};
      }
    }
    if (rank_ == 0) rank_ = 1;
  }

  int64_t size() const { return size_; }
  int64_t stride(int tensor) const { return dimensions_[0].strides[tensor]; }

  // Calls body(index, count, offsets) for pieces of rows: `count` positions from `index` on, which
  // begin at these offsets and go on by stride(). Threads share the work when there is enough of
  // it; `cost` is how many elements a position stands for.
  template <class Body> void run(const CpuContext& context, int64_t cost, const Body& body) const {
    if (size_ == 0) return;
    const int64_t pieces = std::clamp<int64_t>(size_ * cost / kPiece, 1,
                                               std::min<int64_t>(size_, 4 * context.threads()));
    // Threads that write the same cache line would slow each other down
    const int64_t grain = cost == 1 ? 64 : 1;
    const auto edge = [&](int64_t piece) {
      return piece == pieces ? size_ : size_ / grain * piece / pieces * grain;
    };
    context.parallel(pieces, [&](int64_t piece, int) { part(edge(piece), edge(piece + 1), body); });
  }

 private:
  // Less than two of these are not worth waking another thread
  static constexpr int64_t kPiece = 32768;

  struct Dimension {
    int64_t length = 1;
    Offsets strides{};
  };

  template <class Body> void part(int64_t first, int64_t last, const Body& body) const {
    int64_t at[kMaxRank];
    Offsets offsets{};
    for (int64_t i = 0, rest = first; i < rank_; ++i) {
      at[i] = rest % dimensions_[i].length;
      rest /= dimensions_[i].length;
      for (int n = 0; n < N; ++n) offsets[n] += at[i] * dimensions_[i].strides[n];
    }
    while (first < last) {
      const int64_t count = std::min(dimensions_[0].length - at[0], last - first);
      body(first, count, offsets);
      first += count;
      for (int n = 0; n < N; ++n) offsets[n] -= at[0] * dimensions_[0].strides[n];
      at[0] = 0;
      for (int i = 1; i < rank_; ++i) {
        const bool carry = ++at[i] == dimensions_[i].length;
        for (int n = 0; n < N; ++n)
          offsets[n] += (carry ? 1 - at[i] : 1) * dimensions_[i].strides[n];
        if (!carry) break;
        at[i] = 0;
      }
    }
  }

  Dimension dimensions_[kMaxRank];  // innermost first
  int rank_ = 0;
  int64_t size_ = 1;
};

// n elements `stride` apart as contiguous ones: where they are, or copied to `buffer`
template <class T>
HEDDLE_INLINE const T* gather(const T* from, int64_t stride, int64_t n, T* buffer) {
  if (stride == 1) return from;
  for (int64_t i = 0; i < n; ++i) buffer[i] = from[i * stride];
  return buffer;
}

// Copies elements of one size whatever they are
template <class T>
HEDDLE_INLINE void copy_row(T* to, int64_t to_stride, const T* from, int64_t from_stride,
                            int64_t n) {
  if (to_stride == 1 && from_stride == 1) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
  }
}

// out = f(x, y) for every element; out has no gaps
template <class T, class F>
void map(const Tensor& x, const Tensor& y, const Tensor& out, const CpuContext& context,
         const F& f) {
  constexpr int64_t kBlock = 512;
  const Walk<2> walk({&x, &y}, x.rank);
  walk.run(context, 1, [&](int64_t index, int64_t count, const auto& at) {
    T left[kBlock], right[kBlock];
    for (int64_t done = 0; done < count; done += kBlock) {
      const int64_t n = std::min(kBlock, count - done);
      const T* a = gather(x.as<T>() + at[0] + done * walk.stride(0), walk.stride(0), n, left);
      const T* b = gather(y.as<T>() + at[1] + done * walk.stride(1), walk.stride(1), n, right);
      T* to = out.as<T>() + index + done;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(to + i, f(load(a + i), load(b + i)));
      if (i < n) store(to + i, f(load(a + i, n - i), load(b + i, n - i)), n - i);
    }
  });
}

}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
