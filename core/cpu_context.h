#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "core/parallel.h"

namespace heddle {

// What a CPU operator may use while it runs
class CpuContext {
 public:
  explicit CpuContext(const std::atomic<bool>& stop) : stop_(stop) {}

  int threads() const { return thread_count(); }

  void parallel(int64_t count, FunctionRef<void(int64_t index, int worker)> body) const {
    heddle::parallel(count, body, stop_);
  }

 private:
  const std::atomic<bool>& stop_;
};

// Uninitialised memory for as long as the owner lives, aligned for any vector
template <class T> class Scratch {
 public:
  explicit Scratch(size_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  T* data() const { return data_; }
  T& operator[](size_t index) const { return data_[index]; }

 private:
  T* data_;
};

}  // namespace heddle
