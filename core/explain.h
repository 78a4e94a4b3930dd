#pragma once
#include <string>
#include <vector>

namespace heddle {

struct DeviceInfo;

// Which way of running an operator a call would take, and why not the better ones
struct Explanation {
  struct Declined {
    const char *variant, *reason;
  };
  const char* variant = nullptr;  // null when all decline
  std::vector<Declined> declined;
};

// Looks at an operator's filled struct, whose outputs have shapes but no memory
using Explain = Explanation (*)(const void* arguments, const DeviceInfo& device);

// CUDA operators with a table of variants announce it here
bool register_explain(const char* op, Explain explain);
// Null for operators that have one way only
Explain find_explain(const std::string& op);

}  // namespace heddle
