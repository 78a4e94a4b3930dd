#pragma once
#include "core/dtype.h"

// What a variant of a program is compiled for
namespace heddle {

#ifndef HEDDLE_D
#define HEDDLE_D 64
#endif
#ifndef HEDDLE_DTYPE
#define HEDDLE_DTYPE kBF16
#endif
constexpr int kD = HEDDLE_D;
constexpr DType kType = DType::HEDDLE_DTYPE;

}  // namespace heddle
