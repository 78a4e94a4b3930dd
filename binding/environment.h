#pragma once
#include <napi.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "core/backend.h"

namespace heddle {

// A tensor as JavaScript holds it: memory and a view of it
struct TensorEntry {
  StorageRef storage;
  Tensor view;
  int64_t accounted = 0;  // bytes that the garbage collector is told of
  uint32_t generation = 0;
};

// Everything one JavaScript environment (the main thread or a worker) owns. Made when the addon is
// loaded there, closed by a cleanup hook before any finalizer runs; nothing of it is shared with
// other environments.
class Environment {
 public:
  explicit Environment(napi_env env);
  ~Environment();
  static Environment& of(Napi::Env env) { return *env.GetInstanceData<Environment>(); }

  // Handles are numbers: a slot, and how often it was used before, so that a stale one is noticed
  double add(StorageRef storage, const Tensor& view, bool owns);
  TensorEntry& entry(double handle);
  void release(double handle);

  Backend& backend(Device device);

  // A promise that a call-back from another thread settles. `settle` runs on the JavaScript thread.
  // The event loop stays alive meanwhile.
  using Settle = std::function<void(Napi::Env, Napi::Promise::Deferred)>;
  class Pending {
   public:
    void post(Settle settle);

   private:
    friend class Environment;
    Pending(Environment& owner, Napi::Promise::Deferred deferred)
        : owner_(owner), deferred_(deferred) {}
    Environment& owner_;
    Napi::Promise::Deferred deferred_;
    Settle settle_;
  };
  Pending* defer(Napi::Promise::Deferred deferred);

  Napi::Error to_js(const Error& error);

  Napi::FunctionReference error_class;
  // Memory that JavaScript sees. It leaves positions and handles of a call's tensors there, and the
  // call what it made: of each output its handle, dtype, rank and shape, or -1 if it was not asked
  // for
  static constexpr size_t kMostOutputs = 16;
  Napi::Float64Array share_memory(Napi::Env env);
  double* shared = nullptr;
  // The calls of a graph that is being made, and tensors that are made with it, until a call
  // writes them
  struct Recording {
    std::vector<std::shared_ptr<Call>> calls;
    std::set<StorageRef> made;
  };
  std::optional<Recording> recording;
  // Refuses what only happens once while a graph is being made
  void not_recording() const;
  std::map<double, std::unique_ptr<Graph>> graphs;
  // Where measured spans began
  struct Span {
    Device device;
    std::shared_ptr<Mark> from;
  };
  std::map<double, Span> spans;

 private:
  static void close(void* self);
  // The garbage collector is told of memory that was made or freed once it is much
  void account(int64_t bytes);
  static void settle(napi_env env, napi_value, void* self, void* pending);

  napi_env env_;
  Napi::Reference<Napi::Float64Array> shared_memory_;
  napi_threadsafe_function done_ = nullptr;
  size_t pending_ = 0;
  std::shared_ptr<Backend> cpu_;
  std::vector<std::shared_ptr<Backend>> cuda_;
  std::vector<TensorEntry> entries_;
  std::vector<uint32_t> free_;
  int64_t unreported_ = 0;
};

}  // namespace heddle
