#pragma once
#include "emulator.h"

// Copies of 4 and 16 bytes arrive when their thread waits for them, and until then there is no
// number
struct PipelineCopies {
  struct Copy {
    void* to;
    const void* from;
    size_t nbytes;
  };
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> committed;
};
inline PipelineCopies& pipeline_copies() {
  static std::array<PipelineCopies, 1024> all;
  return all[static_cast<size_t>(threadIdx.x)];
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t nbytes) {
  std::memset(to, 0x7f, nbytes);
  pipeline_copies().open.push_back({to, from, nbytes});
  if (nbytes != 4 && nbytes != 16) heddle::emulator::fault("copies are of 4 or 16 bytes here");
}
inline void __pipeline_commit() {
  auto& [open, committed] = pipeline_copies();
  committed.push_back(std::move(open));
  open.clear();
}
inline void __pipeline_wait_prior(size_t pending) {
  auto& committed = pipeline_copies().committed;
  const size_t done = committed.size() - std::min(pending, committed.size());
  for (size_t i = 0; i < done; ++i)
    for (const auto& [to, from, nbytes] : committed[i]) std::memcpy(to, from, nbytes);
  committed.erase(committed.begin(), committed.begin() + static_cast<ptrdiff_t>(done));
}
