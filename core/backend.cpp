#include "core/backend.h"

#include <unistd.h>

#include <cstring>
#include <new>

namespace heddle {

Storage::~Storage() {
  MemoryCount& memory = backend->memory;
  memory.tensors.fetch_sub(1, std::memory_order_relaxed);
  (pinned ? memory.pinned_bytes : memory.bytes)
      .fetch_sub(static_cast<int64_t>(nbytes), std::memory_order_relaxed);
  if (pinned) {
    backend->release_pinned(data, nbytes);
  } else {
    backend->release_bytes(data, nbytes);
  }
}

Failure Storage::failure() const {
  std::lock_guard lock(mutex_);
  return failure_;
}

void Storage::poison(Failure failure) {
  std::lock_guard lock(mutex_);
  if (!failure_) failure_ = std::move(failure);
}

void Storage::renew() {
  std::lock_guard lock(mutex_);
  failure_ = nullptr;
  faults.clear();
}

namespace {

void* memory_of(const Operator& op) {
  if (void* spare = op.spare.exchange(nullptr)) return spare;
  return ::operator new(op.initial.size(), std::align_val_t(op.alignment));
}

}  // namespace

Call::Call(const Operator& op) : op(op), arguments(memory_of(op)) {
  std::memcpy(arguments, op.initial.data(), op.initial.size());
}

Call::~Call() {
  if (void* older = op.spare.exchange(arguments))
    ::operator delete(older, std::align_val_t(op.alignment));
}

Failure Call::inherited() const {
  for (const StorageRef& input : inputs)
    if (Failure failure = input->failure()) return failure;
  for (size_t i = 0; i < updated; ++i)
    if (Failure failure = outputs[i]->failure()) return failure;
  return nullptr;
}

void Call::renew_outputs() const {
  for (size_t i = 0; i < outputs.size(); ++i)
    if (begins(i)) outputs[i]->renew();
}

void Call::poison_outputs(const Failure& failure) const {
  for (const StorageRef& output : outputs) output->poison(failure);
}

bool Call::empty() const {
  for (const StorageRef& output : outputs)
    if (output->nbytes) return false;
  return true;
}

void Gate::open(Failure failure) {
  {
    std::lock_guard lock(mutex_);
    failure_ = std::move(failure);
    is_open_ = true;
  }
  opened_.notify_all();
}

Failure Gate::wait() {
  std::unique_lock lock(mutex_);
  opened_.wait(lock, [this] { return is_open_; });
  return failure_;
}

StorageRef Backend::allocate(size_t nbytes, bool pinned) {
  void* data = pinned ? allocate_pinned(nbytes) : allocate_bytes(nbytes);
  std::atomic<int64_t>& bytes = pinned ? memory.pinned_bytes : memory.bytes;
  const char* kind = pinned ? " pinned" : "";
  HEDDLE_CHECK(data, kMemory, "", "cannot allocate ", nbytes, kind, " bytes on ", text_of(device),
               ", where ", bytes.load(), kind,
               " bytes are in use; dispose tensors that are no longer needed");
  memory.tensors.fetch_add(1, std::memory_order_relaxed);
  const auto size = static_cast<int64_t>(nbytes);
  const int64_t now = bytes.fetch_add(size, std::memory_order_relaxed) + size;
  if (!pinned && now > memory.peak_bytes.load(std::memory_order_relaxed))
    memory.peak_bytes.store(now);
  return std::make_shared<Storage>(shared_from_this(), data, nbytes, pinned);
}

namespace {

class LaunchGraph final : public Graph {
 public:
  LaunchGraph(std::shared_ptr<Backend> backend, std::vector<std::shared_ptr<Call>> calls)
      : backend_(std::move(backend)), calls_(std::move(calls)) {}
  void replay() override {
    for (const auto& call : calls_) backend_->launch(call);
  }

 private:
  const std::shared_ptr<Backend> backend_;
  const std::vector<std::shared_ptr<Call>> calls_;
};

}  // namespace

std::unique_ptr<Graph> Backend::capture(std::vector<std::shared_ptr<Call>> calls) {
  return std::make_unique<LaunchGraph>(shared_from_this(), std::move(calls));
}

bool fits_machine(size_t nbytes, int64_t held) {
  static const size_t physical =
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return nbytes <= physical && static_cast<size_t>(held) <= physical - nbytes;
}

namespace {
CudaEntry& cuda_entry() {
  static CudaEntry entry{};
  return entry;
}
}  // namespace

bool register_cuda(CudaEntry entry) {
  cuda_entry() = entry;
  return true;
}

CudaStatus cuda_status() {
  if (!cuda_entry().status)
    return {false,
            "ERR_CUDA_NOT_BUILT",
            "this build of the addon has no CUDA kernels",
            "install @heddle/heddle-cuda13-linux-x64, or build from source where nvcc is found",
            0,
            0,
            {}};
  return cuda_entry().status();
}

std::shared_ptr<Backend> make_cuda_backend(int index) { return cuda_entry().make(index); }

}  // namespace heddle
