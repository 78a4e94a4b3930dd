#pragma once
#include <exception>
#include <sstream>
#include <string>

namespace heddle {

enum class Code { kShape, kDType, kDevice, kArgument, kUnsupported, kDisposed, kMemory, kCuda };

const char* name_of(Code code);

// What native code throws; binding turns it into a HeddleError in one place. `text` leaves out the
// operator's name, which the caller that knows it fills in.
class Error : public std::exception {
 public:
  Error(Code code, std::string argument, std::string text);
  ~Error() override;
  const char* what() const noexcept override { return text.c_str(); }

  Code code;
  std::string op;
  std::string argument;
  std::string text;
};

[[noreturn]] void fail(Code code, const char* argument, const std::string& text);

template <class... Parts> std::string concat(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace heddle

// The parts after the argument's name make up the message without the operator: "window must be at
// least 1, got ", window
#define HEDDLE_CHECK(condition, code, argument, ...)                                 \
  do {                                                                               \
    if (!(condition)) [[unlikely]]                                                   \
      ::heddle::fail(::heddle::Code::code, argument, ::heddle::concat(__VA_ARGS__)); \
  } while (0)
