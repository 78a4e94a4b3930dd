#include "core/schema.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <sstream>

namespace heddle {

std::string camel_case(const char* snake_case) {
  std::string out;
  for (const char* c = snake_case; *c; ++c) {
    if (*c == '_' && c[1]) {
      out += static_cast<char>(std::toupper(*++c));
    } else {
      out += *c;
    }
  }
  return out;
}

std::vector<std::string> split_words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

std::string text_of(const Tensor& tensor) {
  std::string out = "[";
  for (int i = 0; i < tensor.rank; ++i) out += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return out + "]";
}

std::string text_of(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.words.size(); ++i) out += (i ? ", " : "") + shape.words[i];
  return out + "]";
}

std::string text_of(Device device) {
  return device.kind == Device::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

Argument& Argument::when(const char* argument, const char* other) {
  condition = camel_case(argument);
  conditional_shape.words = split_words(other);
  return *this;
}

Argument& Argument::only_if(const char* argument) {
  wanted = camel_case(argument);
  return *this;
}

Argument& Schema::add(const char* name, Argument::Kind kind, size_t offset) {
  HEDDLE_CHECK(arguments.size() < kMostArguments, kUnsupported, "", "an operator has at most ",
               kMostArguments, " arguments");
  Argument& argument = arguments.emplace_back();
  argument.name = camel_case(name);
  argument.kind = kind;
  argument.offset = offset;
  return argument;
}

int Schema::index_of(const std::string& name) const {
  for (size_t i = 0; i < arguments.size(); ++i)
    if (arguments[i].name == name) return static_cast<int>(i);
  return -1;
}

void Schema::finish() {
  const auto position = [this](const std::string& name) {
    const auto at = std::find(sizes.begin(), sizes.end(), name);
    if (at == sizes.end()) {
      HEDDLE_CHECK(sizes.size() < kMostSizes, kUnsupported, "", "shapes have at most ", kMostSizes,
                   " sizes");
      sizes.push_back(name);
      return static_cast<int>(sizes.size()) - 1;
    }
    return static_cast<int>(at - sizes.begin());
  };
  const auto parse = [&](Shape& shape) {
    shape.open = !shape.words.empty() && shape.words[0] == "...";
    for (size_t i = shape.open; i < shape.words.size(); ++i) {
      const std::string& word = shape.words[i];
      Shape::Term& term = shape.terms.emplace_back();
      const size_t plus = word.find('+'), bar = word.find('|');
      if (std::isdigit(static_cast<unsigned char>(word[0]))) {
        term.plus = std::atoll(word.c_str());
      } else if (bar != std::string::npos) {
        term.size = position(word.substr(0, bar));
        term.other = position(word.substr(bar + 1));
      } else {
        term.size = position(word.substr(0, plus));
        if (plus != std::string::npos) term.plus = std::atoll(word.c_str() + plus + 1);
      }
    }
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    Argument& argument = arguments[i];
    const uint64_t bit = uint64_t{1} << i;
    if (argument.is_output()) outputs |= bit;
    if (!argument.is_output() && !argument.may_be_absent() && argument.wanted.empty())
      required |= bit;
    parse(argument.shape);
    parse(argument.conditional_shape);
    if (argument.dtype.like) argument.like = index_of(camel_case(argument.dtype.like));
    if (argument.dtype.option) argument.dtype_option = index_of(camel_case(argument.dtype.option));
    argument.condition_at = index_of(argument.condition);
    argument.wanted_at = index_of(argument.wanted);
  }
}

void Schema::set_defaults(void* arguments) const {
  for (const Argument& argument : this->arguments) {
    const auto set = [&]<class T>(T value) {
      *reinterpret_cast<T*>(static_cast<std::byte*>(arguments) + argument.offset) = value;
    };
    switch (argument.kind) {
      case Argument::kNumber:
        set(argument.initial);
        break;
      case Argument::kInteger:
        set(static_cast<int64_t>(argument.initial));
        break;
      case Argument::kFlag:
        set(argument.initial != 0);
        break;
      case Argument::kChoice:
      case Argument::kDType:
        set(static_cast<int>(argument.initial));
        break;
      default:
        break;
    }
  }
}

void Sizes::match(const Argument& argument, const Shape& shape, const Tensor& tensor) {
  const auto mismatch = [&](const std::string& why) {
    fail(Code::kShape, argument.name.c_str(),
         concat(argument.name, " must be ", text_of(shape), ", got ", text_of(tensor), " (", why,
                ")"));
  };
  const int named = static_cast<int>(shape.terms.size()), leading = tensor.rank - named;
  if (shape.open ? leading < 0 : leading != 0)
    mismatch(concat("it has ", tensor.rank, " dimensions instead of ",
                    shape.open ? "at least " : "", named));
  if (shape.open) {
    if (!leading_source_) {
      leading_source_ = &argument;
      leading_rank_ = leading;
      std::copy_n(tensor.shape, leading, leading_);
    } else if (leading != leading_rank_ ||
               !std::equal(leading_, leading_ + leading, tensor.shape)) {
      mismatch("the leading sizes differ from those of " + leading_source_->name);
    }
  }
  for (int i = 0; i < named; ++i) {
    const Shape::Term& term = shape.terms[i];
    const int64_t value = tensor.shape[leading + i] - term.plus;
    if (term.size < 0) {
      if (value != 0)
        mismatch(concat("dimension ", leading + i, " is ", tensor.shape[leading + i]));
      continue;
    }
    Size& known = sizes_[term.size];
    if (known.source) {
      if (known.value != value)
        mismatch(concat(schema_.sizes[term.size], " is ", value, ", but ", known.source->name,
                        " has ", schema_.sizes[term.size], " = ", known.value));
    } else {
      if (value < 0) mismatch(concat("dimension ", leading + i, " must be at least ", term.plus));
      known = {value, &argument};
    }
  }
}

void Sizes::fill(const Argument& argument, const Shape& shape, Tensor& tensor) const {
  const size_t rank = (shape.open ? leading_rank_ : 0) + shape.terms.size();
  HEDDLE_CHECK(rank <= kMaxRank, kShape, argument.name.c_str(), argument.name,
               " must have at most ", kMaxRank, " dimensions, got ", rank);
  tensor.rank = 0;
  const auto push = [&](int64_t size) { tensor.shape[tensor.rank++] = size; };
  if (shape.open)
    for (int i = 0; i < leading_rank_; ++i) push(leading_[i]);
  for (const Shape::Term& term : shape.terms) {
    const int64_t value = term.size < 0 ? 0 : sizes_[term.size].value;
    push((term.other < 0 ? value : std::max(value, sizes_[term.other].value)) + term.plus);
  }
  int64_t stride = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    tensor.strides[i] = stride;
    stride *= tensor.shape[i];
  }
}

}  // namespace heddle
