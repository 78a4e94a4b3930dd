#include "binding/environment.h"

#include <cstdlib>

namespace heddle {
namespace {
constexpr uint64_t kSlots = 1 << 26;  // more tensors than this never live at once
}

Environment::Environment(napi_env env) : env_(env) {
  napi_value name;
  napi_create_string_utf8(env, "heddle", NAPI_AUTO_LENGTH, &name);
  napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, this, settle,
                                  &done_);
  napi_unref_threadsafe_function(env, done_);
  napi_add_env_cleanup_hook(env, close, this);
}

Environment::~Environment() = default;

// The CPU goes first: the copies it still answers open gates that CUDA streams wait for
void Environment::close(void* data) {
  auto* self = static_cast<Environment*>(data);
  if (self->cpu_) self->cpu_->stop();
  for (auto& backend : self->cuda_)
    if (backend) backend->stop();
  napi_release_threadsafe_function(self->done_, napi_tsfn_abort);
  self->entries_.clear();
  self->recording.reset();
  self->graphs.clear();
  self->spans.clear();
}

Napi::Float64Array Environment::share_memory(Napi::Env env) {
  if (!shared) {
    auto array = Napi::Float64Array::New(
        env, std::max(kMostOutputs * (3 + kMaxRank), 2 * Schema::kMostArguments));
    shared_memory_ = Napi::Persistent(array);
    shared = array.Data();
  }
  return shared_memory_.Value();
}

void Environment::not_recording() const {
  HEDDLE_CHECK(
      !recording, kUnsupported, "",
      "a graph cannot hold this, as it happens outside of the device's queue; do it before "
      "or after graph()");
}

double Environment::add(StorageRef storage, const Tensor& view, bool owns) {
  uint32_t slot;
  if (free_.empty()) {
    slot = static_cast<uint32_t>(entries_.size());
    HEDDLE_CHECK(slot < kSlots, kMemory, "", "too many tensors are alive");
    entries_.emplace_back();
  } else {
    slot = free_.back();
    free_.pop_back();
  }
  TensorEntry& entry = entries_[slot];
  const double weight = storage->pinned ? 1 : storage->backend->weight;
  entry.accounted = owns ? static_cast<int64_t>(static_cast<double>(storage->nbytes) * weight) : 0;
  entry.storage = std::move(storage);
  entry.view = view;
  account(entry.accounted);
  return static_cast<double>(slot + kSlots * entry.generation);
}

TensorEntry& Environment::entry(double handle) {
  if (handle >= 0 && handle <= 9007199254740991.0) {
    const auto number = static_cast<uint64_t>(handle), slot = number % kSlots;
    if (slot < entries_.size() && static_cast<double>(number) == handle) {
      TensorEntry& entry = entries_[slot];
      if (entry.storage && entry.generation == number / kSlots) return entry;
    }
  }
  fail(Code::kDisposed, "", "this tensor was disposed");
}

void Environment::release(double handle) {
  TensorEntry& entry = this->entry(handle);
  account(-entry.accounted);
  entry.storage.reset();
  entry.generation = (entry.generation + 1) & 0x1ffffff;
  free_.push_back(static_cast<uint32_t>(&entry - entries_.data()));
}

void Environment::account(int64_t bytes) {
  constexpr int64_t kLeast = int64_t{1} << 20;
  unreported_ += bytes;
  if (std::abs(unreported_) < kLeast) return;
  Napi::MemoryManagement::AdjustExternalMemory(env_, unreported_);
  unreported_ = 0;
}

Backend& Environment::backend(Device device) {
  if (device.kind == Device::kCpu) {
    if (!cpu_) cpu_ = make_cpu_backend();
    return *cpu_;
  }
  const auto index = static_cast<size_t>(device.index);
  if (index >= cuda_.size() || !cuda_[index]) {
    const CudaStatus status = cuda_status();
    HEDDLE_CHECK(status.reason.empty(), kDevice, "device", "device ", text_of(device),
                 " cannot be used: ", status.reason, "; ", status.remedy);
    HEDDLE_CHECK(index < status.devices.size(), kDevice, "device",
                 "device must be cpu or cuda:0 to cuda:", status.devices.size() - 1, ", got ",
                 text_of(device));
    if (index >= cuda_.size()) cuda_.resize(index + 1);
    cuda_[index] = make_cuda_backend(device.index);
  }
  return *cuda_[index];
}

Environment::Pending* Environment::defer(Napi::Promise::Deferred deferred) {
  if (pending_++ == 0) napi_ref_threadsafe_function(env_, done_);
  return new Pending(*this, deferred);
}

void Environment::Pending::post(Settle settle) {
  settle_ = std::move(settle);
  if (napi_call_threadsafe_function(owner_.done_, this, napi_tsfn_nonblocking) != napi_ok)
    delete this;
}

void Environment::settle(napi_env env, napi_value, void* data, void* posted) {
  const std::unique_ptr<Pending> pending(static_cast<Pending*>(posted));
  if (!env) return;  // the environment is going away
  auto* self = static_cast<Environment*>(data);
  if (--self->pending_ == 0) napi_unref_threadsafe_function(env, self->done_);
  Napi::HandleScope scope(env);
  try {
    pending->settle_(env, pending->deferred_);
  } catch (const Napi::Error& error) {
    try {
      pending->deferred_.Reject(error.Value());
    } catch (const Napi::Error&) {
      // a worker that is being terminated takes no answer
    }
  }
}

Napi::Error Environment::to_js(const Error& error) {
  const Napi::Env env(env_);
  const std::string message = (error.op.empty() ? "tensor" : error.op) + ": " + error.text;
  Napi::Object details = Napi::Object::New(env);
  details["op"] = error.op.empty() ? "tensor" : error.op;
  if (!error.argument.empty()) details["argument"] = error.argument;
  return Napi::Error(env, error_class.New({Napi::String::New(env, name_of(error.code)),
                                           Napi::String::New(env, message), details}));
}

}  // namespace heddle
