#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace heddle {

inline constexpr int kMaxRank = 8;

struct Device {
  enum Kind : uint8_t { kCpu, kCuda };
  Kind kind = kCpu;
  int index = 0;
  bool operator==(const Device&) const = default;
};

// What a kernel sees: a strided view of memory that somebody else keeps alive. Strides count
// elements. A default tensor stands for an argument that was left out.
struct Tensor {
  void* data = nullptr;
  int64_t shape[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};
  int rank = -1;
  DType dtype = DType::kF32;
  Device device;

  explicit operator bool() const { return rank >= 0; }
  template <class T> T* as() const { return static_cast<T*>(data); }

  int64_t size() const {
    int64_t size = 1;
    for (int i = 0; i < rank; ++i) size *= shape[i];
    return size;
  }

  bool contiguous() const {
    int64_t expected = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }

  // Whether every element of so many bytes is one of its own, in whatever order
  bool covers(size_t nbytes) const {
    int64_t run = 1;
    for (int turn = 0; turn < rank; ++turn)
      for (int i = 0; i < rank; ++i)
        if (shape[i] > 1 && strides[i] == run) run *= shape[i];
    return run == size() && static_cast<size_t>(run) * size_of(dtype) == nbytes;
  }
};

}  // namespace heddle
