#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "common/context.h"
#include "core/backend.h"

namespace heddle {

// A word in memory that the host and every device see, and what it means once it is set
struct Fault {
  int word;
  const char* op;
  const char* text;
};

// Hands out fault words. One that comes back is cleared in stream order when it is taken again, so
// a kernel that is still about to set it for its former owner cannot disturb the next.
class FaultPool : public std::enable_shared_from_this<FaultPool> {
 public:
  ~FaultPool();
  std::shared_ptr<Fault> take(cudaStream_t stream);

 private:
  std::mutex mutex_;
  std::vector<void*> blocks_;
  std::vector<Fault*> free_;
};

// The context of a call that a backend enqueues
class CallContext final : public CudaContext {
 public:
  CallContext(cudaStream_t stream, const DeviceInfo& device, FaultPool& pool, int*& tickets,
              const char* op)
      : CudaContext(stream, device.arch, device.processors),
        pool_(pool),
        tickets_(tickets),
        op_(op) {}
  ~CallContext() override;

  int* fault(const char* text) override;
  int* tickets() override;

  std::vector<std::shared_ptr<const int>> faults;

 private:
  void* scratch_bytes(size_t nbytes) override;
  FaultPool& pool_;
  int*& tickets_;
  const char* op_;
  std::vector<void*> scratch_;
};

}  // namespace heddle
