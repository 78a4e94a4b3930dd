#include "core/explain.h"

#include <map>

namespace heddle {
namespace {

std::map<std::string, Explain>& table() {
  static auto* const table = new std::map<std::string, Explain>();  // never destroyed
  return *table;
}

}  // namespace

bool register_explain(const char* op, Explain explain) {
  return table().emplace(op, explain).second;
}

Explain find_explain(const std::string& op) {
  const auto at = table().find(op);
  return at == table().end() ? nullptr : at->second;
}

}  // namespace heddle
