#pragma once
#include <cstddef>

// Kernels include what says their operator's rules, so this needs none of the larger headers.
namespace heddle {

struct Tensor;

enum class Code { kShape, kDType, kDevice, kArgument, kUnsupported, kDisposed, kMemory, kCuda };

// A piece of a message, for as long as the expression that it is in
struct Part {
  Part(const char* text) : text(text) {}
  Part(const Tensor& tensor) : tensor(&tensor) {}  // its shape
  Part(char) = delete;                             // would be a number
  Part(double number) : number(number) {}
  Part(int integer) : Part(static_cast<long long>(integer)) {}
  Part(unsigned integer) : Part(static_cast<long long>(integer)) {}
  Part(long integer) : Part(static_cast<long long>(integer)) {}
  Part(unsigned long integer) : Part(static_cast<long long>(integer)) {}
  Part(long long integer) : integer(integer), is_integer(true) {}
  template <class String>
  requires requires(const String& string) { string.c_str(); }
  Part(const String& string) : Part(string.c_str()) {}

  const char* text = nullptr;
  const Tensor* tensor = nullptr;
  double number = 0;
  long long integer = 0;
  bool is_integer = false;
};

[[noreturn]] void fail_with(Code code, const char* argument, const Part* parts, size_t count);

// Throws an Error. The parts make up the message without the operator: "window must be at least 1,
// got ", window
template <class... Parts>
[[noreturn]] void fail(Code code, const char* argument, const Parts&... parts) {
  const Part all[] = {parts...};
  fail_with(code, argument, all, sizeof...(parts));
}

}  // namespace heddle

#define HEDDLE_CHECK(condition, code, argument, ...)               \
  do {                                                             \
    if (!(condition)) [[unlikely]]                                 \
      ::heddle::fail(::heddle::Code::code, argument, __VA_ARGS__); \
  } while (0)
