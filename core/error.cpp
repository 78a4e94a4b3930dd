#include "core/error.h"

#include <utility>

namespace heddle {

const char* name_of(Code code) {
  constexpr const char* kNames[] = {"ERR_SHAPE",       "ERR_DTYPE",    "ERR_DEVICE", "ERR_ARGUMENT",
                                    "ERR_UNSUPPORTED", "ERR_DISPOSED", "ERR_MEMORY", "ERR_CUDA"};
  return kNames[static_cast<int>(code)];
}

Error::Error(Code code, std::string argument, std::string text)
    : code(code), argument(std::move(argument)), text(std::move(text)) {}
Error::~Error() = default;

void fail(Code code, const char* argument, const std::string& text) {
  throw Error(code, argument, text);
}

}  // namespace heddle
