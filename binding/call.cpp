#include "binding/call.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "binding/environment.h"
#include "core/explain.h"

namespace heddle {
namespace {

constexpr const char* kKindNames[] = {"input",   "optional", "inout",  "output", "number",
                                      "integer", "flag",     "choice", "dtype"};

std::string join(const std::vector<std::string>& words) {
  std::string out;
  for (size_t i = 0; i < words.size(); ++i)
    out += (i == 0 ? "" : i + 1 == words.size() ? " or " : ", ") + words[i];
  return out;
}

std::string text_of(DTypes dtypes) {
  std::vector<std::string> names;
  for (int i = 0; i < kDTypeCount; ++i)
    if (dtypes.has(static_cast<DType>(i))) names.push_back(name_of(static_cast<DType>(i)));
  return join(names);
}

// How a message shows a JavaScript value
std::string text_of(const Napi::Value& value) {
  if (value.IsString()) {
    std::u16string text = value.As<Napi::String>().Utf16Value();
    if (text.size() > 60) text = text.substr(0, 57) + u"…";
    return "\"" + Napi::String::New(value.Env(), text).Utf8Value() + "\"";
  }
  if (value.IsBigInt()) return value.ToString().Utf8Value() + "n";
  if (value.IsNumber() || value.IsBoolean() || value.IsNull()) return value.ToString().Utf8Value();
  return value.IsFunction() ? "a function"
         : value.IsArray()  ? "an array"
         : value.IsSymbol() ? "a symbol"
                            : "an object";
}

int find_word(const std::vector<std::string>& words, const Napi::Value& value) {
  if (!value.IsString()) return -1;
  const std::string text = value.As<Napi::String>().Utf8Value();
  for (size_t i = 0; i < words.size(); ++i)
    if (words[i] == text) return static_cast<int>(i);
  return -1;
}

// Fills an operator's struct from JavaScript values by its schema
class Marshal {
 public:
  Marshal(Environment& environment, const Operator& op, const Napi::CallbackInfo& info)
      : environment_(environment),
        op_(op),
        info_(info),
        call_(std::make_shared<Call>(op)),
        sizes_(op.schema) {}

  Napi::Value run() {
    read_arguments();
    return launch();
  }

  Napi::Value explain() {
    read_arguments();
    for (const Argument& argument : op_.schema.arguments)
      if (argument.is_output() && is_wanted(argument)) describe_output(argument);
    Explanation explanation;
    const Explain variants = device_.kind == Device::kCuda ? find_explain(op_.name) : nullptr;
    if (variants) {
      const CudaStatus status = cuda_status();
      explanation =
          variants(call_->arguments, status.devices.at(static_cast<size_t>(device_.index)));
    } else {
      check_implemented();
      explanation.variant = device_.kind == Device::kCpu ? kIsaNames[op_.cpu.isa] : "cuda";
    }
    const Napi::Env env = info_.Env();
    Napi::Array declined = Napi::Array::New(env);
    for (const auto& [variant, reason] : explanation.declined) {
      Napi::Object entry = Napi::Object::New(env);
      entry["variant"] = variant;
      entry["reason"] = reason;
      declined[declined.Length()] = entry;
    }
    Napi::Object result = Napi::Object::New(env);
    result["variant"] = explanation.variant
                            ? Napi::Value(Napi::String::New(env, explanation.variant))
                            : env.Undefined();
    result["declined"] = declined;
    return result;
  }

 private:
  // After the operator comes how many tensors there are, whose positions in its schema and handles
  // stand in shared memory, and then positions of other arguments, each with a value
  void read_arguments() {
    const std::vector<Argument>& arguments = op_.schema.arguments;
    const size_t tensors = info_[1].As<Napi::Number>().Uint32Value();
    HEDDLE_CHECK(tensors <= Schema::kMostArguments, kArgument, "", "there are not so many tensors");
    std::array<double, Schema::kMostArguments> handles;
    std::array<napi_value, Schema::kMostArguments> values;
    uint64_t present = 0;
    const auto add = [&](double position, bool is_tensor) {
      HEDDLE_CHECK(position >= 0 && position < static_cast<double>(arguments.size()), kArgument, "",
                   "there is no argument ", position);
      const auto at = static_cast<size_t>(position);
      HEDDLE_CHECK(arguments[at].is_tensor() == is_tensor && !arguments[at].is_output(), kArgument,
                   "", "argument ", at, is_tensor ? " is no input" : " is a tensor");
      present |= uint64_t{1} << at;
      return at;
    };
    for (size_t i = 0; i < tensors; ++i)
      handles[add(environment_.shared[2 * i], true)] = environment_.shared[2 * i + 1];
    for (size_t i = 2; i + 1 < info_.Length(); i += 2)
      values[add(info_[i].As<Napi::Number>().DoubleValue(), false)] = info_[i + 1];
    for_each(op_.schema.required & ~present, [](const Argument& argument) {
      fail(Code::kArgument, argument.name.c_str(), argument.name + " is missing");
    });
    call_->inputs.reserve(tensors);
    for_each(present, [&](const Argument& argument) {
      const auto at = static_cast<size_t>(&argument - arguments.data());
      argument.is_tensor() ? read_tensor(argument, handles[at])
                           : read_value(argument, Napi::Value(info_.Env(), values[at]));
    });
    // what a shape depends on may come behind it
    for_each(present, [&](const Argument& argument) {
      if (argument.is_tensor()) sizes_.match(argument, shape_of(argument), tensor(argument));
    });
    if (op_.validate) op_.validate(call_->arguments);
  }

  // The arguments of a set, in their order
  template <class Body> void for_each(uint64_t set, const Body& body) const {
    for (; set; set &= set - 1) body(op_.schema.arguments[std::countr_zero(set)]);
  }

  Tensor& tensor(const Argument& argument) { return call_->member<Tensor>(argument.offset); }

  const Shape& shape_of(const Argument& argument) {
    const int by = argument.condition_at;
    return by >= 0 && tensor(op_.schema.arguments[by]) ? argument.conditional_shape
                                                       : argument.shape;
  }

  void read_value(const Argument& argument, const Napi::Value& value) {
    const std::string& name = argument.name;
    const auto reject = [&](const std::string& rule) {
      fail(Code::kArgument, name.c_str(),
           concat(name, " must be ", rule, ", got ", text_of(value)));
    };
    switch (argument.kind) {
      case Argument::kFlag:
        if (!value.IsBoolean()) reject("a boolean");
        call_->member<bool>(argument.offset) = value.As<Napi::Boolean>();
        return;
      case Argument::kChoice: {
        const int chosen = find_word(argument.choices, value);
        if (chosen < 0) reject(join(argument.choices));
        call_->member<int>(argument.offset) = chosen;
        return;
      }
      case Argument::kDType: {
        for (int i = 0; i < kDTypeCount; ++i)
          if (argument.dtype.any.has(static_cast<DType>(i)) && value.IsString() &&
              value.As<Napi::String>().Utf8Value() == name_of(static_cast<DType>(i))) {
            call_->member<int>(argument.offset) = i;
            return;
          }
        reject(text_of(argument.dtype.any));
        return;
      }
      default:
        break;
    }
    const bool integer = argument.kind == Argument::kInteger;
    const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : std::nan("");
    if (!std::isfinite(number) || (integer && number != std::floor(number)))
      reject(integer ? "an integer" : "a finite number");
    if (integer && std::abs(number) > 9007199254740991.0)
      reject("an integer from -(2^53 - 1) to 2^53 - 1");
    if (number < argument.least || (argument.open && number == argument.least))
      reject(concat(argument.open ? "above " : "at least ", argument.least));
    if (number > argument.most) reject(concat("at most ", argument.most));
    if (integer) {
      call_->member<int64_t>(argument.offset) = static_cast<int64_t>(number);
    } else {
      call_->member<double>(argument.offset) = number;
    }
  }

  void read_tensor(const Argument& argument, double handle) {
    const char* name = argument.name.c_str();
    const TensorEntry& entry = environment_.entry(handle);
    const Tensor& view = entry.view;
    if (!device_from_) {
      device_from_ = name;
      device_ = view.device;
    }
    HEDDLE_CHECK(view.device == device_, kDevice, name, name, " is on ",
                 heddle::text_of(view.device), ", but ", device_from_, " is on ",
                 heddle::text_of(device_), "; move it with ", name, ".to('",
                 heddle::text_of(device_), "')");
    if (argument.like >= 0) {
      const Argument& like = op_.schema.arguments[argument.like];
      const DType expected = tensor(like).dtype;
      HEDDLE_CHECK(view.dtype == expected, kDType, name, name, " must be ", name_of(expected),
                   ", got ", name_of(view.dtype), " (", like.name, " is ", name_of(expected), ")");
    } else {
      HEDDLE_CHECK(argument.dtype.any.has(view.dtype), kDType, name, name, " must be ",
                   text_of(argument.dtype.any), ", got ", name_of(view.dtype));
    }
    tensor(argument) = view;
    if (argument.kind == Argument::kInout) {
      // what is made of its own elements does not begin anew
      if (argument.is_filled && view.covers(entry.storage->nbytes) &&
          std::ranges::find(call_->inputs, entry.storage) == call_->inputs.end())
        call_->begun |= uint64_t{1} << call_->updated;
      call_->outputs.push_back(entry.storage);
      ++call_->updated;
    } else {
      call_->inputs.push_back(entry.storage);
    }
  }

  DType output_dtype(const Argument& argument) {
    const DTypeRule& rule = argument.dtype;
    if (argument.dtype_option >= 0) {
      const int chosen = call_->member<int>(op_.schema.arguments[argument.dtype_option].offset);
      if (chosen >= 0) return static_cast<DType>(chosen);
    }
    if (argument.like >= 0) return tensor(op_.schema.arguments[argument.like]).dtype;
    for (int i = 0;; ++i)
      if (rule.any.has(static_cast<DType>(i))) return static_cast<DType>(i);
  }

  bool is_wanted(const Argument& output) {
    if (output.wanted_at < 0) return true;
    const Argument& by = op_.schema.arguments[output.wanted_at];
    return by.is_tensor() ? bool(tensor(by)) : call_->member<bool>(by.offset);
  }

  void check_implemented() const {
    const bool cpu = device_.kind == Device::kCpu;
    HEDDLE_CHECK(cpu ? bool(op_.cpu) : bool(op_.cuda), kUnsupported, "",
                 "there is no implementation for ", heddle::text_of(device_));
  }

  // Its shape, without memory
  Tensor& describe_output(const Argument& argument) {
    Tensor& view = tensor(argument);
    sizes_.fill(argument, shape_of(argument), view);
    view.dtype = output_dtype(argument);
    view.device = device_;
    return view;
  }

  Napi::Value launch() {
    check_implemented();
    Backend& backend = environment_.backend(device_);
    const uint64_t outputs = op_.schema.outputs;
    const auto count = static_cast<size_t>(std::popcount(outputs));
    HEDDLE_CHECK(count <= Environment::kMostOutputs, kUnsupported, "", "an operator has at most ",
                 Environment::kMostOutputs, " outputs");
    call_->outputs.reserve(call_->updated + count);
    for_each(outputs, [&](const Argument& argument) {
      if (!is_wanted(argument)) return;
      Tensor& view = describe_output(argument);
      const StorageRef& storage = call_->outputs.emplace_back(
          backend.allocate(static_cast<size_t>(view.size()) * size_of(view.dtype)));
      view.data = storage->data;
    });
    auto& recording = environment_.recording;
    for (size_t i = 0; recording && i < call_->updated; ++i)
      if (recording->made.erase(call_->outputs[i])) call_->begun |= uint64_t{1} << i;
    backend.launch(call_);
    if (recording) recording->calls.push_back(call_);

    // Read before the next call: making a JavaScript array of them would cost more than the launch
    double* next = environment_.shared;
    const StorageRef* made = call_->outputs.data() + call_->updated;
    for_each(outputs, [&](const Argument& argument) {
      if (!is_wanted(argument)) {
        *next++ = -1;
        return;
      }
      const Tensor& view = tensor(argument);
      *next++ = environment_.add(*made++, view, true);
      *next++ = static_cast<int>(view.dtype);
      *next++ = view.rank;
      for (int i = 0; i < view.rank; ++i) *next++ = static_cast<double>(view.shape[i]);
    });
    return Napi::Number::New(info_.Env(), static_cast<double>(count));
  }

  Environment& environment_;
  const Operator& op_;
  const Napi::CallbackInfo& info_;
  std::shared_ptr<Call> call_;
  Sizes sizes_;
  Device device_;
  const char* device_from_ = nullptr;
};

}  // namespace

Napi::Value operators_to_js(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto words = [&](const std::vector<std::string>& list) {
    Napi::Array array = Napi::Array::New(env, list.size());
    for (size_t i = 0; i < list.size(); ++i) array[static_cast<uint32_t>(i)] = list[i];
    return array;
  };
  Napi::Array list = Napi::Array::New(env);
  for (const Operator* op : operators()) {
    Napi::Array arguments = Napi::Array::New(env);
    for (const Argument& argument : op->schema.arguments) {
      Napi::Object entry = Napi::Object::New(env);
      entry["name"] = argument.name;
      entry["kind"] = kKindNames[argument.kind];
      if (argument.is_tensor()) {
        entry["shape"] = words(argument.shape.words);
        entry["dtype"] = argument.like >= 0 ? "like " + op->schema.arguments[argument.like].name
                                            : text_of(argument.dtype.any);
      }
      if (argument.kind == Argument::kChoice) entry["choices"] = words(argument.choices);
      arguments[arguments.Length()] = entry;
    }
    Napi::Object entry = Napi::Object::New(env);
    entry["name"] = op->name;
    entry["arguments"] = arguments;
    entry["cpu"] = op->cpu ? kIsaNames[op->cpu.isa] : "";
    entry["cuda"] = bool(op->cuda);
    list[list.Length()] = entry;
  }
  return list;
}

namespace {

template <class Body> Napi::Value marshalled(const Napi::CallbackInfo& info, const Body& body) {
  const uint32_t index = info[0].As<Napi::Number>().Uint32Value();
  const auto& all = operators();
  HEDDLE_CHECK(index < all.size(), kArgument, "", "there is no such operator");
  try {
    return body(Marshal(Environment::of(info.Env()), *all[index], info));
  } catch (Error& error) {
    if (error.op.empty()) error.op = all[index]->name;
    throw;
  }
}

}  // namespace

Napi::Value run(const Napi::CallbackInfo& info) {
  return marshalled(info, [](Marshal&& call) { return call.run(); });
}

Napi::Value explain(const Napi::CallbackInfo& info) {
  return marshalled(info, [](Marshal&& call) { return call.explain(); });
}

}  // namespace heddle
