#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <thread>

#include "core/backend.h"
#include "core/block_cache.h"
#include "core/cpu_context.h"

namespace heddle {
namespace {

// One thread takes work in order; operators spread theirs over the shared pool from there.
class CpuBackend final : public Backend {
 public:
  CpuBackend() : Backend({Device::kCpu, 0}), thread_([this] { serve(); }) {}
  ~CpuBackend() override {
    stop();
    blocks_.clear([](void* block) { std::free(block); });
  }

  void launch(std::shared_ptr<Call> call) override {
    for (const StorageRef& output : call->outputs) output->producer = call->op.name.c_str();
    push([this, call = std::move(call)] {
      if (stopping_) return;
      call->renew_outputs();
      if (Failure failure = call->inherited()) return call->poison_outputs(failure);
      if (call->empty()) return;
      CpuContext context(stopping_);
      try {
        call->op.cpu(call->arguments, context);
      } catch (const Error& error) {
        auto named = std::make_shared<Error>(error);
        named->op = call->op.name;
        call->poison_outputs(named);
      } catch (const std::bad_alloc&) {
        auto error = std::make_shared<Error>(Code::kMemory, "", "ran out of host memory");
        error->op = call->op.name;
        call->poison_outputs(error);
      }
    });
  }

  std::shared_ptr<Mark> mark() override {
    auto mark = std::make_shared<TimeMark>();
    push([mark] { mark->passed = std::chrono::steady_clock::now(); });
    return mark;
  }

  HostBuffer host_buffer(size_t nbytes) override {
    void* data = std::malloc(std::max<size_t>(nbytes, 1));
    HEDDLE_CHECK(data, kMemory, "", "cannot allocate ", nbytes, " bytes of host memory");
    return {data, std::free};
  }

  void upload(StorageRef to, size_t offset, size_t nbytes, HostBuffer from,
              std::shared_ptr<Gate> gate) override {
    push([=, this] {
      if (stopping_) return;
      if (nbytes == to->nbytes) to->renew();
      const Failure failure = gate ? gate->wait() : nullptr;
      if (failure) return to->poison(failure);
      std::memcpy(static_cast<char*>(to->data) + offset, from.get(), nbytes);
    });
  }

  void download(StorageRef from, size_t offset, size_t nbytes, HostBuffer to,
                std::function<void(Failure)> done) override {
    push([=, this, done = std::move(done)]() mutable {
      // Another device may wait for this copy, so it is answered even at the end
      if (stopping_)
        return done(std::make_shared<Error>(Code::kDisposed, "", "the device was closed"));
      const Failure failure = from->failure();
      if (!failure) std::memcpy(to.get(), static_cast<const char*>(from->data) + offset, nbytes);
      from.reset();  // who is answered finds its memory counted
      done(failure);
    });
  }

  void stop() override {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    filled_.notify_one();
    if (thread_.joinable()) thread_.join();
  }

 protected:
  void* allocate_bytes(size_t nbytes) override {
    const int64_t held = memory.bytes.load(std::memory_order_relaxed) +
                         memory.pinned_bytes.load(std::memory_order_relaxed);
    if (!fits_machine(nbytes, held)) return nullptr;
    const size_t kept = blocks_.class_of(nbytes);
    if (kept)
      if (void* block = blocks_.take(kept)) return block;
    const size_t alignment = nbytes >= kHugePage ? kHugePage : 64;
    const size_t size =
        (std::max<size_t>(std::max(kept, nbytes), 1) + alignment - 1) / alignment * alignment;
    void* block = std::aligned_alloc(alignment, size);
#ifdef MADV_HUGEPAGE
    if (block && alignment == kHugePage) madvise(block, size, MADV_HUGEPAGE);
#endif
    return block;
  }
  void release_bytes(void* data, size_t nbytes) noexcept override {
    const size_t kept = blocks_.class_of(nbytes);
    if (!kept || !blocks_.give(data, kept)) std::free(data);
  }

 private:
  struct TimeMark final : Mark {
    double milliseconds_since(const Mark& earlier) const override {
      const auto from = static_cast<const TimeMark&>(earlier).passed;
      return std::chrono::duration<double, std::milli>(passed - from).count();
    }
    std::chrono::steady_clock::time_point passed;
  };

  using Work = std::function<void()>;
  static constexpr size_t kHugePage = size_t{2} << 20;

  void push(Work work) {
    bool asleep;
    {
      std::lock_guard lock(mutex_);
      work_.push_back(std::move(work));
      asleep = asleep_;
      asleep_ = false;
    }
    if (asleep) filled_.notify_one();
  }

  void serve() {
    yield_to_event_loop();
    for (;;) {
      Work work;
      {
        std::unique_lock lock(mutex_);
        while (!stopping_ && work_.empty()) {
          asleep_ = true;
          filled_.wait(lock);
        }
        asleep_ = false;
        if (work_.empty()) return;
        work = std::move(work_.front());
        work_.pop_front();
      }
      work();
    }
  }

  // Memory fresh from the system has to be mapped page by page at its first use
  BlockCache blocks_{size_t{32} << 10, size_t{64} << 20, size_t{128} << 20};
  std::mutex mutex_;
  std::condition_variable filled_;
  std::deque<Work> work_;
  bool asleep_ = false;
  std::atomic<bool> stopping_{false};
  std::thread thread_;  // last: it starts when the rest is there
};

}  // namespace

std::shared_ptr<Backend> make_cpu_backend() { return std::make_shared<CpuBackend>(); }

}  // namespace heddle
