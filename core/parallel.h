#pragma once
#include <atomic>
#include <cstdint>

namespace heddle {

// A call-back without ownership: the callee must outlive the call
template <class Signature> class FunctionRef;
template <class... Args> class FunctionRef<void(Args...)> {
 public:
  template <class F>
  FunctionRef(const F& f)
      : object_(&f),
        call_([](const void* object, Args... args) { (*static_cast<const F*>(object))(args...); }) {
  }
  void operator()(Args... args) const { call_(object_, args...); }

 private:
  const void* object_;
  void (*call_)(const void*, Args...);
};

// Threads that take part in one parallel region, the caller included: HEDDLE_THREADS, else the
// number of cores
int thread_count();

// Calls body(index, worker) for every index below count, several at a time; worker is below
// thread_count() and names no two running calls at once. Returns when all are done, or early once
// `stop` is set. The first exception is rethrown. Regions of several callers may overlap; they
// share one process-wide set of threads.
void parallel(int64_t count, FunctionRef<void(int64_t index, int worker)> body,
              const std::atomic<bool>& stop);

// Lowers the calling thread's claim to a core, so that the thread of the event loop is served first
void yield_to_event_loop();

}  // namespace heddle
