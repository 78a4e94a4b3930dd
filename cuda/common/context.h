#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/explain.h"

// Turns a CUDA error into ours, with the call that met it
#define HEDDLE_CUDA(call)                                           \
  do {                                                              \
    if (const cudaError_t status_ = (call); status_ != cudaSuccess) \
      ::heddle::fail_cuda(status_, #call);                          \
  } while (0)

namespace heddle {

[[noreturn]] void fail_cuda(cudaError_t status, const char* call);

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

// What a CUDA operator may use while it enqueues its kernels. It lives for one call.
class CudaContext {
 public:
  CudaContext(cudaStream_t stream, const DeviceInfo& device, FaultPool& pool, int*& tickets,
              const char* op)
      : stream(stream),
        arch(device.arch),
        processors(device.processors),
        pool_(pool),
        tickets_(tickets),
        op_(op) {}
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  // Device memory until the kernels enqueued by this call are done
  template <class T> T* scratch(size_t count) {
    return static_cast<T*>(scratch_bytes(count * sizeof(T)));
  }

  // A word that a kernel sets to 1 when it meets data it cannot use. The outputs then fail with
  // this text on read, as does everything computed from them.
  int* fault(const char* text);

  // Two counters of the stream. A kernel finds them at zero and leaves them so.
  int* tickets();

  // After a launch: a configuration that the device refuses throws here, with the kernel's name
  void launched(const char* kernel) const;

  const cudaStream_t stream;
  const int arch;        // 90 for compute capability 9.0
  const int processors;  // multiprocessors
  std::vector<std::shared_ptr<const int>> faults;

 private:
  void* scratch_bytes(size_t nbytes);
  FaultPool& pool_;
  int*& tickets_;
  const char* op_;
  std::vector<void*> scratch_;
};

// One way to run an operator, of a table that lists them best first. `declines` returns why it
// can't take a call, or null.
template <class Op> struct Variant {
  const char* name;
  const char* (*declines)(const Op& op, const CudaContext& context);
  void (*run)(const Op& op, CudaContext& context);
};

// Runs the first variant that does not decline; if all do, the error lists every reason
template <class Op, size_t N>
void run_variants(const Variant<Op> (&table)[N], const Op& op, CudaContext& context) {
  std::string reasons;
  for (const Variant<Op>& variant : table) {
    const char* reason = variant.declines(op, context);
    if (!reason) return variant.run(op, context);
    reasons += concat(reasons.empty() ? "" : "; ", variant.name, ": ", reason);
  }
  fail(Code::kUnsupported, "",
       concat("no kernel takes this call on sm_", context.arch, " (", reasons, ")"));
}

// Which variant of a table would run, without a stream: nothing is enqueued or allocated
template <class Op, const auto& kTable>
Explanation explain_variants(const void* arguments, const DeviceInfo& device) {
  FaultPool pool;
  int* tickets = nullptr;
  const CudaContext context(nullptr, device, pool, tickets, Op::kName);
  Explanation explanation;
  for (const Variant<Op>& variant : kTable) {
    const char* reason = variant.declines(*static_cast<const Op*>(arguments), context);
    if (!reason) {
      explanation.variant = variant.name;
      break;
    }
    explanation.declined.push_back({variant.name, reason});
  }
  return explanation;
}

}  // namespace heddle

// Lets `explain` see a table of variants, beside HEDDLE_REGISTER
#define HEDDLE_EXPLAIN(Op, table)                                           \
  [[maybe_unused]] static const bool HEDDLE_JOIN(explained_, __COUNTER__) = \
      ::heddle::register_explain(Op::kName, ::heddle::explain_variants<Op, table>)
