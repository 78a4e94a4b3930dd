#include "core/parallel.h"

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>
#ifdef __linux__
#include <sched.h>
#endif

namespace heddle {
namespace {

struct Region {
  Region(int64_t count, const FunctionRef<void(int64_t, int)>& body, const std::atomic<bool>& stop)
      : body(body), stop(stop), count(count) {}

  const FunctionRef<void(int64_t, int)>& body;
  const std::atomic<bool>& stop;
  const int64_t count;
  std::atomic<int64_t> next{0};
  int inside = 0;   // threads at work in it; guarded by the pool's mutex
  int workers = 0;  // numbers given out so far; guarded by the pool's mutex
  std::exception_ptr error;
  std::atomic<bool> failed{false};

  bool open() const { return next.load(std::memory_order_relaxed) < count; }

  void work(int worker) {
    try {
      while (!failed.load(std::memory_order_relaxed) && !stop.load(std::memory_order_relaxed)) {
        const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
        if (index >= count) return;
        body(index, worker);
      }
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
    next.store(count, std::memory_order_relaxed);
  }
};

// Never destroyed: at exit its threads sleep on members that must stay valid
class Pool {
 public:
  Pool() {
    for (int i = 1; i < thread_count(); ++i) std::thread([this] { serve(); }).detach();
  }

  void run(Region& region) {
    std::unique_lock lock(mutex_);
    regions_.push_back(&region);
    const int worker = region.workers++;
    lock.unlock();
    wake_.notify_all();
    region.work(worker);
    lock.lock();
    std::erase(regions_, &region);
    done_.wait(lock, [&] { return region.inside == 0; });
  }

 private:
  void serve() {
    yield_to_event_loop();
    std::unique_lock lock(mutex_);
    for (;;) {
      Region* region = nullptr;
      wake_.wait(lock, [&] {
        for (Region* candidate : regions_)
          if (candidate->open() && candidate->workers < thread_count())
            return region = candidate, true;
        return false;
      });
      const int worker = region->workers++;
      ++region->inside;
      lock.unlock();
      region->work(worker);
      lock.lock();
      if (--region->inside == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Region*> regions_;
};

}  // namespace

int thread_count() {
  static const int count = [] {
    const char* text = std::getenv("HEDDLE_THREADS");
    const int wanted = text ? std::atoi(text) : 0;
    int cores = static_cast<int>(std::thread::hardware_concurrency());
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cores = CPU_COUNT(&set);
#endif
    return std::clamp(wanted > 0 ? wanted : cores, 1, 256);
  }();
  return count;
}

void parallel(int64_t count, FunctionRef<void(int64_t, int)> body, const std::atomic<bool>& stop) {
  Region region(count, body, stop);
  if (count <= 1 || thread_count() == 1) {
    region.work(0);
  } else {
    static auto* pool = new Pool;
    pool->run(region);
  }
  if (region.error) std::rethrow_exception(region.error);
}

void yield_to_event_loop() {
#ifdef __linux__
  // Batch threads never preempt a thread that wakes up
  sched_param parameters{};
  sched_setscheduler(0, SCHED_BATCH, &parameters);
#endif
}

}  // namespace heddle
