#pragma once
#include <cstddef>
#include <initializer_list>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/rules.h"

namespace heddle {

// A shape as a schema writes it, taken apart once: each dimension is a named size, or the larger of
// two, plus a constant.
struct Shape {
  struct Term {
    int size = -1, other = -1;  // positions in Schema::sizes, -1 for none
    int64_t plus = 0;
  };
  std::vector<std::string> words;
  std::vector<Term> terms;
  bool open = false;  // starts with "..."
};

// One member of an operator's struct with the rules it obeys.
struct Argument {
  enum Kind { kInput, kOptional, kInout, kOutput, kNumber, kInteger, kFlag, kChoice, kDType };

  std::string name;  // as TypeScript spells it
  Kind kind = kInput;
  size_t offset = 0;  // of the member in the operator's struct
  Shape shape;
  DTypeRule dtype = kAny;
  int like = -1;          // position of the argument whose dtype this one has
  std::string condition;  // the shape below holds when this argument is present
  Shape conditional_shape;
  std::string wanted;  // what is written only if this flag is set or this tensor is given
  int condition_at = -1, wanted_at = -1, dtype_option = -1;  // where these and the dtype option are
  double initial = 0, least = -std::numeric_limits<double>::infinity(),
         most = std::numeric_limits<double>::infinity();
  bool open = false;       // `least` itself is excluded
  bool is_filled = false;  // every element is written, and none read
  std::vector<std::string> choices;

  bool is_tensor() const { return kind <= kOutput; }
  bool is_output() const { return kind == kOutput; }
  bool may_be_absent() const { return kind == kOptional || !is_tensor(); }

  // With another argument present, the shape is this one instead
  Argument& when(const char* argument, const char* shape);
  Argument& only_if(const char* argument);
  Argument& at_least(double value) { return least = value, *this; }
  Argument& above(double value) { return least = value, open = true, *this; }
  Argument& at_most(double value) { return most = value, *this; }
  Argument& filled() { return is_filled = true, *this; }
};

// The list of an operator's members. Shapes are size names separated by spaces; "n+1" is one more
// than n, "hq|hv" the larger of two (outputs only), a number is itself, and a leading "..." stands
// for any number of leading sizes that agree wherever it is used. The first tensor that mentions a
// size fixes it.
class Schema {
 public:
  std::vector<Argument> arguments;
  std::vector<std::string> sizes;
  static constexpr size_t kMostArguments = 64, kMostSizes = 16;
  uint64_t required = 0, outputs = 0;  // which arguments these are, a bit for each

  // Resolves names into positions, once all members are described
  void finish();
  // Sets what is no tensor in an operator's struct to what it is when left out
  void set_defaults(void* arguments) const;
  int index_of(const std::string& name) const;

 protected:
  Argument& add(const char* name, Argument::Kind kind, size_t offset);
};

// The sizes of one call while it is checked
class Sizes {
 public:
  explicit Sizes(const Schema& schema) : schema_(schema) {}
  // Checks a tensor against the shape its argument must have and learns the sizes that it is the
  // first to mention.
  void match(const Argument& argument, const Shape& shape, const Tensor& tensor);
  // The shape of an output, all of whose sizes are known by now
  void fill(const Argument& argument, const Shape& shape, Tensor& tensor) const;

 private:
  struct Size {
    int64_t value = 0;
    const Argument* source = nullptr;  // the argument that fixed it
  };
  const Schema& schema_;
  Size sizes_[Schema::kMostSizes];
  int64_t leading_[kMaxRank];
  int leading_rank_ = 0;
  const Argument* leading_source_ = nullptr;
};

std::string camel_case(const char* snake_case);
std::string text_of(const Tensor& tensor);  // [2, 4096, 8, 64]
std::string text_of(const Shape& shape);    // [b, sk, hk, d]
std::string text_of(Device device);

// Turns members into offsets; `Op::describe` runs over it once at load.
template <class Op> class SchemaOf : public Schema {
 public:
  SchemaOf() {
    Op::describe(*this);
    finish();
  }

  Argument& input(const char* name, Tensor Op::*member, const char* shape, DTypeRule dtype) {
    return tensor(name, Argument::kInput, member, shape, dtype);
  }
  Argument& optional(const char* name, Tensor Op::*member, const char* shape, DTypeRule dtype) {
    return tensor(name, Argument::kOptional, member, shape, dtype);
  }
  // Read and written in place; comes from the caller
  Argument& inout(const char* name, Tensor Op::*member, const char* shape, DTypeRule dtype) {
    return tensor(name, Argument::kInout, member, shape, dtype);
  }
  Argument& output(const char* name, Tensor Op::*member, const char* shape, DTypeRule dtype) {
    return tensor(name, Argument::kOutput, member, shape, dtype);
  }
  Argument& number(const char* name, double Op::*member, double initial) {
    return value(name, Argument::kNumber, member, initial);
  }
  Argument& integer(const char* name, int64_t Op::*member, int64_t initial) {
    return value(name, Argument::kInteger, member, static_cast<double>(initial));
  }
  Argument& flag(const char* name, bool Op::*member, bool initial = false) {
    return value(name, Argument::kFlag, member, initial);
  }
  // The member holds the index of the chosen word, the first one by default
  Argument& choice(const char* name, int Op::*member, std::initializer_list<const char*> words) {
    Argument& argument = value(name, Argument::kChoice, member, 0);
    argument.choices.assign(words.begin(), words.end());
    return argument;
  }
  // A dtype by name; the member is -1 when it was left out
  Argument& dtype(const char* name, int Op::*member, DTypes any) {
    Argument& argument = value(name, Argument::kDType, member, -1);
    argument.dtype = any;
    return argument;
  }

 private:
  template <class Member> static size_t offset(Member Op::*member) {
    static const Op op{};
    return static_cast<size_t>(reinterpret_cast<const char*>(&(op.*member)) -
                               reinterpret_cast<const char*>(&op));
  }
  template <class Member>
  Argument& value(const char* name, Argument::Kind kind, Member Op::*member, double initial) {
    Argument& argument = add(name, kind, offset(member));
    argument.initial = initial;
    return argument;
  }
  Argument& tensor(const char* name, Argument::Kind kind, Tensor Op::*member, const char* shape,
                   DTypeRule dtype);
};

std::vector<std::string> split_words(const char* text);

template <class Op>
Argument& SchemaOf<Op>::tensor(const char* name, Argument::Kind kind, Tensor Op::*member,
                               const char* shape, DTypeRule dtype) {
  Argument& argument = add(name, kind, offset(member));
  argument.shape.words = split_words(shape);
  argument.dtype = dtype;
  return argument;
}

}  // namespace heddle
