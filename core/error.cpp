#include "core/error.h"

#include <cstdio>
#include <utility>

#include "core/schema.h"

namespace heddle {

const char* name_of(Code code) {
  constexpr const char* kNames[] = {"ERR_SHAPE",       "ERR_DTYPE",    "ERR_DEVICE", "ERR_ARGUMENT",
                                    "ERR_UNSUPPORTED", "ERR_DISPOSED", "ERR_MEMORY", "ERR_CUDA"};
  return kNames[static_cast<int>(code)];
}

Error::Error(Code code, std::string argument, std::string text)
    : code(code), argument(std::move(argument)), text(std::move(text)) {}
Error::~Error() = default;

std::string join(const Part* parts, size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i) {
    const Part& part = parts[i];
    char number[32];
    if (part.tensor) {
      text += text_of(*part.tensor);
    } else if (part.is_integer) {
      text += std::to_string(part.integer);
    } else if (part.text) {
      text += part.text;
    } else {
      std::snprintf(number, sizeof number, "%g", part.number);
      text += number;
    }
  }
  return text;
}

void fail_with(Code code, const char* argument, const Part* parts, size_t count) {
  throw Error(code, argument, join(parts, count));
}

}  // namespace heddle
