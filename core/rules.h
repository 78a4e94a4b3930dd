#pragma once
#include <limits>

#include "core/check.h"
#include "core/tensor.h"

// What `describe` and `validate` of an operator's struct are written with
namespace heddle {

// What dtype an argument may have: one of a set, or the same as an earlier argument's.
struct DTypeRule {
  DTypes any;
  const char* like = nullptr;
  const char* option = nullptr;  // outputs only: a dtype option that overrides `like`
  DTypeRule(DTypes any) : any(any) {}
  DTypeRule(const char* like, const char* option) : like(like), option(option) {}
};
inline DTypeRule like(const char* argument) { return {argument, nullptr}; }
inline DTypeRule like(const char* argument, const char* option) { return {argument, option}; }

}  // namespace heddle
