#include "binding/graph.h"

#include "binding/environment.h"

namespace heddle {
namespace {

double handle_of(const Napi::Value& value) { return value.As<Napi::Number>().DoubleValue(); }

}  // namespace

Napi::Value begin_graph(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  HEDDLE_CHECK(!environment.recording, kArgument, "body", "body must not make a graph itself");
  environment.recording.emplace();
  return info.Env().Undefined();
}

Napi::Value end_graph(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  HEDDLE_CHECK(environment.recording, kArgument, "body", "there is no graph to end");
  auto calls = std::move(environment.recording->calls);
  environment.recording.reset();
  if (!info[0].ToBoolean().Value()) return info.Env().Undefined();
  HEDDLE_CHECK(!calls.empty(), kArgument, "body", "body must call an operator");
  const auto device_of = [](const Call& call) { return call.outputs.at(0)->backend->device; };
  const Device device = device_of(*calls[0]);
  for (const auto& call : calls) {
    const Device other = device_of(*call);
    HEDDLE_CHECK(other == device, kDevice, "body", "body must stay on one device, got ",
                 text_of(device), " and ", text_of(other));
  }
  static std::atomic<int64_t> count{0};
  const auto handle = static_cast<double>(++count);
  environment.graphs.emplace(handle, environment.backend(device).capture(std::move(calls)));
  return Napi::Number::New(info.Env(), handle);
}

Napi::Value replay_graph(const Napi::CallbackInfo& info) {
  Environment& environment = Environment::of(info.Env());
  environment.not_recording();
  const auto found = environment.graphs.find(handle_of(info[0]));
  HEDDLE_CHECK(found != environment.graphs.end(), kDisposed, "", "this graph was disposed");
  found->second->replay();
  return info.Env().Undefined();
}

Napi::Value release_graph(const Napi::CallbackInfo& info) {
  Environment::of(info.Env()).graphs.erase(handle_of(info[0]));
  return info.Env().Undefined();
}

}  // namespace heddle
