#pragma once
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "common/context.h"
#include "core/backend.h"

namespace heddle {

// A word in memory that the host and every device see, and what it means once it is set
struct Fault {
  int word;
  bool captured;              // a graph can set it again
  std::atomic<bool> settled;  // all that could set it has run, and did not
  const char* op;
  const char* text;
  Failure failure;  // or this
};

// Hands out fault words at zero. One that comes back may yet be set by a kernel of its former
// owner: it is used again when all that was enqueued until then is done.
class FaultPool : public std::enable_shared_from_this<FaultPool> {
 public:
  ~FaultPool();
  std::shared_ptr<Fault> take(cudaStream_t stream, bool capturing);

 private:
  struct Batch {
    cudaEvent_t done;
    std::vector<Fault*> faults;
  };
  static constexpr size_t kBlock = 256;
  std::mutex mutex_;
  std::vector<void*> blocks_;
  std::vector<Fault*> free_, back_;
  std::deque<Batch> waiting_;
};

// Counters of a stream that kernels find and leave at zero. Graphs may know all that were ever
// handed out, so none is freed before the stream ends.
class Counters {
 public:
  int* take(size_t count);
  void clear(cudaStream_t stream);

 private:
  std::vector<int*> blocks_;  // the last is the largest
  size_t size_ = 0;
};

// Memory that every call of a stream uses anew. Graphs may know all blocks that were ever made.
class Scratch {
 public:
  void restart() { used_ = 0; }
  // Null for what is too large to keep, of one piece or of a call
  void* take(size_t nbytes);
  void clear(cudaStream_t stream);

 private:
  std::vector<void*> blocks_;  // the last is the largest
  size_t size_ = 0, used_ = 0;
};

// The context of a call that a backend enqueues
class CallContext final : public CudaContext {
 public:
  CallContext(cudaStream_t stream, const DeviceInfo& device, bool capturing, FaultPool& pool,
              Counters& counters, Scratch& scratch, KernelGraphs& graphs, const char* op)
      : CudaContext(stream, device.arch, device.processors, capturing ? nullptr : &graphs),
        capturing_(capturing),
        pool_(pool),
        counters_(counters),
        scratch_(scratch),
        op_(op) {
    scratch.restart();
  }
  ~CallContext() override;

  int* fault(const char* text) override;
  int* verdict(const char* text) override;
  int* counters(size_t count) override;

  std::vector<std::shared_ptr<const int>> faults;

 private:
  void* scratch_bytes(size_t nbytes) override;
  const bool capturing_;  // what runs again whenever its graph does
  FaultPool& pool_;
  Counters& counters_;
  Scratch& scratch_;
  const char* op_;
  std::vector<void*> large_;
};

}  // namespace heddle
