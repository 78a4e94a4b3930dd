#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "core/host_device.h"

// One coordinate of one statement of a cascade, the same on every device. Numbers are f64 while
// they are computed and f32 in memory.
//
// A statement is a list of words: how many variables stand on the left and how many there are with
// the reduced ones, the reducer, what an empty coordinate holds, where its four pieces of code
// begin, seen from the first word (0 for one that it does not have), and the size of each variable.
// Code is for a stack machine. The variables are numbered, and the step of an iteration comes last.
//
// A coordinate without a value is empty: a NaN of its own kind in memory. What reads one is empty,
// reductions skip it.
namespace heddle::einsum {

constexpr int kVariables = 16, kStack = 32;
constexpr int64_t kMostPoints = int64_t{1} << 31;  // of one reduction: a program must end
constexpr uint32_t kEmpty = 0x7fc0e317;

enum Header { kLeft, kAll, kReducer, kHole, kOuter, kInner, kBody, kPlace, kSizes };
enum Hole { kMarked, kZero, kMinusInfinity };  // the latter in results, which nobody reads
enum Reducer { kNone, kSum, kMax, kMin, kProd, kLogSumExp };
// clang-format off
enum Code {
  kEnd, kConstant, kVariable, kLoad, kGather, kClamp, kJump, kJumpIfNot,
  kAdd, kSub, kMul, kDiv, kPow, kMaximum, kMinimum,
  kLess, kLessEqual, kGreater, kGreaterEqual, kEqual, kUnequal,
  kNegate, kNot, kExp, kExp2, kLog, kLog1p, kTanh, kSigmoid, kRelu, kSoftplus, kAbs, kSqrt, kRsqrt,
  kErf, kSin, kCos
};
// clang-format on

HEDDLE_HD inline double apply(int64_t code, double x, double y) {
  switch (code) {
    case kAdd:
      return x + y;
    case kSub:
      return x == -INFINITY && y == -INFINITY ? x : x - y;
    case kMul:
      return x * y;
    case kDiv:
      return x == 0 && y == 0 ? 0 : x / y;
    case kPow:
      return pow(x, y);
    case kMaximum:
      return x > y || std::isnan(x) ? x : y;
    case kMinimum:
      return x < y || std::isnan(x) ? x : y;
    case kLess:
      return x < y;
    case kLessEqual:
      return x <= y;
    case kGreater:
      return x > y;
    case kGreaterEqual:
      return x >= y;
    case kEqual:
      return x == y;
    default:
      return x != y;
  }
}

HEDDLE_HD inline double apply(int64_t code, double x) {
  switch (code) {
    case kNegate:
      return -x;
    case kNot:
      return x == 0;
    case kExp:
      return exp(x);
    case kExp2:
      return exp2(x);
    case kLog:
      return log(x);
    case kLog1p:
      return log1p(x);
    case kTanh:
      return tanh(x);
    case kSigmoid:
      return 1 / (1 + exp(-x));
    case kRelu:
      return x <= 0 ? 0 : x;  // of -0 as well, as in JavaScript
    case kSoftplus:
      return (x < 0 ? 0 : x) + log1p(exp(-fabs(x)));
    case kAbs:
      return fabs(x);
    case kSqrt:
      return sqrt(x);
    case kRsqrt:
      return 1 / sqrt(x);
    case kErf:
      return erf(x);
    case kSin:
      return sin(x);
    default:
      return cos(x);
  }
}

// A statement at one of its coordinates. Whatever the words are, nothing outside them, the work and
// the stack is touched, and code ends, for jumps go ahead: what does not add up only breaks it.
struct Machine {
  const int64_t* words;
  int64_t count;
  float* work;
  int64_t size;
  int64_t at[kVariables + 1] = {};
  double stack[kStack];
  int top = -1;
  bool empty = false, broken = false;

  HEDDLE_HD Machine(const int64_t* words, int64_t count, float* work, int64_t size)
      : words(words), count(count), work(work), size(size) {}

  HEDDLE_HD int64_t fail() {
    broken = true;
    return 0;
  }
  HEDDLE_HD int64_t word(int64_t index) {
    return index >= 0 && index < count ? words[index] : fail();
  }
  HEDDLE_HD double number(int64_t index) { return std::bit_cast<double>(word(index)); }
  HEDDLE_HD int64_t variable(int64_t slot) {
    return slot >= 0 && slot <= kVariables ? at[slot] : fail();
  }
  HEDDLE_HD void push(double x) {
    if (top + 1 < kStack) {
      stack[++top] = x;
    } else {
      fail();
    }
  }
  HEDDLE_HD double pop() { return top >= 0 ? stack[top--] : static_cast<double>(fail()); }
  HEDDLE_HD double load(int64_t offset) {
    if (offset < 0 || offset >= size) return static_cast<double>(fail());
    const float x = work[offset];
    if (std::bit_cast<uint32_t>(x) == kEmpty) empty = true;
    return x;
  }

  // Runs the code that begins at a word
  HEDDLE_HD double run(int64_t next) {
    top = -1;
    while (!broken) {
      const int64_t code = word(next++);
      switch (code) {
        case kEnd:
          return pop();
        case kConstant:
          push(number(next++));
          break;
        case kVariable:
          push(static_cast<double>(variable(word(next++))));
          break;
        case kLoad: {  // offset, n, n times variable and stride
          int64_t offset = word(next++);
          for (int64_t n = word(next++); n > 0 && !broken; --n, next += 2)
            offset += variable(word(next)) * word(next + 1);
          push(load(offset));
          break;
        }
        case kGather: {  // offset, n, n times size and stride; n indices from the stack
          int64_t offset = word(next);
          const int64_t n = word(next + 1);
          bool inside = true;
          if (n < 0 || n > top + 1) return static_cast<double>(fail());
          next += 2 * n + 2;
          for (int64_t i = 1; i <= n; ++i) {
            const double index = pop();
            const int64_t length = word(next - 2 * i);
            if (index >= 0 && index < static_cast<double>(length) && index == floor(index)) {
              offset += static_cast<int64_t>(index) * word(next - 2 * i + 1);
            } else {
              inside = false;
            }
          }
          if (!inside) empty = true;
          push(inside ? load(offset) : 0);
          break;
        }
        case kClamp: {  // least, most
          const double x = pop(), least = number(next++), most = number(next++);
          push(x < least ? least : x > most ? most : x);
          break;
        }
        case kJump:
          next = ahead(next);
          break;
        case kJumpIfNot:
          next = pop() == 0 ? ahead(next) : next + 1;
          break;
        default: {
          const double y = pop();
          push(code < kNegate ? apply(code, pop(), y) : apply(code, y));
        }
      }
    }
    return 0;
  }

  HEDDLE_HD int64_t ahead(int64_t next) {
    const int64_t target = word(next);
    return target > next ? target : fail();
  }
};

struct Total {
  double sum, most;  // of logsumexp: the sum is relative to the largest

  HEDDLE_HD explicit Total(int64_t reducer)
      : sum(reducer == kMax   ? -INFINITY
            : reducer == kMin ? INFINITY
                              : reducer == kProd),
        most(-INFINITY) {}

  HEDDLE_HD void add(int64_t reducer, double x) {
    switch (reducer) {
      case kSum:
        sum += x;
        break;
      case kMax:
        sum = x > sum || std::isnan(x) ? x : sum;
        break;
      case kMin:
        sum = x < sum || std::isnan(x) ? x : sum;
        break;
      case kProd:
        sum *= x;
        break;
      default:
        if (x > most) {
          sum = sum * exp(most - x) + 1;
          most = x;
        } else if (x != -INFINITY) {
          sum += exp(x - most);
        }
    }
  }

  HEDDLE_HD double result(int64_t reducer) const {
    return reducer == kLogSumExp ? most + log(sum) : sum;
  }
};

// Computes and stores the coordinate of this row-major index; false if the statement is none
HEDDLE_HD inline bool run(const int64_t* words, int64_t count, int64_t index, int64_t step,
                          float* work, int64_t size) {
  Machine machine(words, count, work, size);
  const int64_t left = machine.word(kLeft), all = machine.word(kAll);
  const int64_t reducer = machine.word(kReducer), inner = machine.word(kInner);
  const int64_t outer = machine.word(kOuter), body = machine.word(kBody);
  if (left < 0 || left > all || all > kVariables || kSizes + all > count) return false;
  const int64_t* sizes = words + kSizes;
  int64_t* at = machine.at;
  for (int64_t i = left - 1; i >= 0; --i) {
    if (sizes[i] <= 0) return false;
    at[i] = index % sizes[i];
    index /= sizes[i];
  }
  at[all] = step;
  double value = 0;
  bool empty = outer && machine.run(outer) == 0;
  if (!empty && reducer == kNone) {
    machine.empty = false;
    value = machine.run(body);
    empty = machine.empty;
  } else if (!empty) {
    Total total(reducer);
    int64_t points = 1;
    for (int64_t i = left; i < all; ++i) {
      if (sizes[i] < 0 || (sizes[i] > 0 && points > kMostPoints / sizes[i])) return false;
      points *= sizes[i];
    }
    for (; points > 0 && !machine.broken; --points) {
      if (!inner || machine.run(inner) != 0) {
        machine.empty = false;
        const double x = machine.run(body);
        if (!machine.empty) total.add(reducer, x);
      }
      for (int64_t i = all - 1; i >= left && ++at[i] == sizes[i]; --i) at[i] = 0;
    }
    value = total.result(reducer);
  }
  const double place = machine.run(machine.word(kPlace));
  if (machine.broken || !(place >= 0 && place < static_cast<double>(size))) return false;
  const int64_t hole = machine.word(kHole);
  work[static_cast<int64_t>(place)] = !empty                   ? static_cast<float>(value)
                                      : hole == kZero          ? 0
                                      : hole == kMinusInfinity ? -INFINITY
                                                               : std::bit_cast<float>(kEmpty);
  return true;
}

}  // namespace heddle::einsum
