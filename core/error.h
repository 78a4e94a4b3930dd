#pragma once
#include <exception>
#include <string>

#include "core/check.h"

namespace heddle {

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

std::string join(const Part* parts, size_t count);

template <class... Parts> std::string concat(const Parts&... parts) {
  const Part all[] = {parts...};
  return join(all, sizeof...(parts));
}

}  // namespace heddle
