#pragma once
#include <algorithm>
#include <cstddef>
#include <map>
#include <mutex>
#include <vector>

namespace heddle {

// Freed memory of a device that waits to be used again. All work of a backend is in one queue, so a
// block can change hands at once: whatever its last owner queued comes before the next one's work.
class BlockCache {
 public:
  // Keeps blocks of `smallest` to `largest` bytes, `most` in all
  BlockCache(size_t smallest, size_t largest, size_t most)
      : smallest_(smallest), largest_(largest), most_(most) {}

  // How large a block for so many bytes is: sizes share blocks in at least four steps per power of
  // two. 0 if it is not kept.
  size_t class_of(size_t nbytes) const {
    if (nbytes < smallest_ || nbytes > largest_) return 0;
    size_t step = 512;
    while (step * 8 < nbytes) step *= 2;
    return std::max(nbytes + step - 1, step) / step * step;
  }

  // A block that was given, or null
  void* take(size_t size) {
    std::lock_guard lock(mutex_);
    const auto found = free_.find(size);
    if (found == free_.end() || found->second.empty()) return nullptr;
    void* block = found->second.back();
    found->second.pop_back();
    kept_ -= size;
    return block;
  }

  // Whether it is kept; else the caller frees it
  bool give(void* block, size_t size) {
    std::lock_guard lock(mutex_);
    if (kept_ + size > most_) return false;
    free_[size].push_back(block);
    kept_ += size;
    return true;
  }

  template <class Free> void clear(const Free& free) {
    std::lock_guard lock(mutex_);
    for (auto& [size, blocks] : free_) {
      for (void* block : blocks) free(block);
      blocks.clear();
    }
    kept_ = 0;
  }

 private:
  const size_t smallest_, largest_, most_;
  std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;
  size_t kept_ = 0;
};

}  // namespace heddle
