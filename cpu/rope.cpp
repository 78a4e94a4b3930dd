#include "ops/rope.h"

#include <cmath>
#include <vector>

#include "core/registry.h"
#include "cpu/walk.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

// Cosines and sines of one position, for all heads. Angles are formed in double: a position of a
// million times a frequency near one has no fraction left in f32.
class Table {
 public:
  explicit Table(const Rope& op)
      : op_(op),
        pairs_(op.rotary / 2),
        interleaved_(op.layout == 1),
        exact_(static_cast<size_t>(5 * pairs_)),
        rounded_(static_cast<size_t>(2 * op.rotary)) {
    if (op.cos) return;
    const double step = -2 * std::log(op.theta) / static_cast<double>(op.rotary);
    for (int64_t i = 0; i < pairs_; ++i) {
      const double frequency = std::exp(step * static_cast<double>(i));
      frequencies()[i] = frequency;
      step_cosines()[i] = std::cos(frequency);
      step_sines()[i] = std::sin(frequency);
    }
  }

  // What multiplies a channel, and what multiplies the other channel of its pair. With interleaved
  // pairs an entry per channel, else per pair.
  const float* own() const { return rounded_.data(); }
  const float* other() const { return rounded_.data() + 2 * pairs_; }

  void move_to(int64_t position) {
    if (known_ && position == position_) return;
    if (op_.cos) {
      HEDDLE_CHECK(position >= 0 && position < op_.cos.shape[0], kArgument, "positions",
                   "positions must be at least 0 and below ", op_.cos.shape[0], ", got ", position);
      std::copy_n(op_.cos.as<float>() + position * pairs_, pairs_, cosines());
      std::copy_n(op_.sin.as<float>() + position * pairs_, pairs_, sines());
      // One turn further is four products, and in double a few hundred of them cost nothing
    } else if (known_ && position == position_ + 1 && position % 256 != 0) {
      for (int64_t i = 0; i < pairs_; ++i) {
        const double c = cosines()[i], s = sines()[i];
        cosines()[i] = c * step_cosines()[i] - s * step_sines()[i];
        sines()[i] = s * step_cosines()[i] + c * step_sines()[i];
      }
    } else {
      for (int64_t i = 0; i < pairs_; ++i) {
        const double angle = static_cast<double>(position) * frequencies()[i];
        cosines()[i] = std::cos(angle);
        sines()[i] = std::sin(angle);
      }
    }
    known_ = true;
    position_ = position;
    float *own = rounded_.data(), *other = own + 2 * pairs_;
    for (int64_t i = 0; i < pairs_; ++i) {
      const auto c = static_cast<float>(cosines()[i]), s = static_cast<float>(sines()[i]);
      if (interleaved_) {
        own[2 * i] = own[2 * i + 1] = c;
        other[2 * i] = -s;
        other[2 * i + 1] = s;
      } else {
        own[i] = c;
        other[i] = s;
      }
    }
  }

 private:
  double* frequencies() { return exact_.data(); }
  double* step_cosines() { return exact_.data() + pairs_; }
  double* step_sines() { return exact_.data() + 2 * pairs_; }
  double* cosines() { return exact_.data() + 3 * pairs_; }
  double* sines() { return exact_.data() + 4 * pairs_; }

  const Rope& op_;
  const int64_t pairs_;
  const bool interleaved_;
  std::vector<double> exact_;
  std::vector<float> rounded_;
  bool known_ = false;
  int64_t position_ = 0;
};

HEDDLE_INLINE Vec swap_pairs(Vec x) {
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return __builtin_shufflevector(x, x, (i ^ 1)...);
  }
  (std::make_index_sequence<kLanes>());
}

template <class T> void turn_split(T* out, const T* x, const Table& table, int64_t pairs) {
  const float *cosine = table.own(), *sine = table.other();
  const auto turn = [&](int64_t i, auto... count) {
    const Vec a = load(x + i, count...), b = load(x + pairs + i, count...);
    const Vec c = load(cosine + i, count...), s = load(sine + i, count...);
    store(out + i, a * c - b * s, count...);
    store(out + pairs + i, b * c + a * s, count...);
  };
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes) turn(i);
  if (i < pairs) turn(i, pairs - i);
}

template <class T> void turn_interleaved(T* out, const T* x, const Table& table, int64_t rotary) {
  const auto turn = [&](int64_t i, auto... count) {
    const Vec v = load(x + i, count...);
    store(out + i,
          v * load(table.own() + i, count...) + swap_pairs(v) * load(table.other() + i, count...),
          count...);
  };
  int64_t i = 0;
  for (; i + kLanes <= rotary; i += kLanes) turn(i);
  if (i < rotary) turn(i, rotary - i);
}

template <class T> void rotate(const Rope& op, const CpuContext& context) {
  const int64_t tokens = op.x.shape[1], heads = op.x.shape[2], d = op.x.shape[3];
  const Walk<1> walk({&op.x}, 2);
  walk.run(context, std::max<int64_t>(heads * d, 1),
           [&](int64_t index, int64_t count, const auto& at) {
             Table table(op);
             Scratch<T> buffer(static_cast<size_t>(d));
             for (int64_t token = index; token < index + count; ++token) {
               const int64_t b = token / tokens, s = token % tokens;
               table.move_to(op.positions ? op.positions.as<int32_t>()[b * op.positions.strides[0] +
                                                                       s * op.positions.strides[1]]
                                          : op.offset + s);
               for (int64_t h = 0; h < heads; ++h) {
                 const T* x = gather(
                     op.x.as<T>() + at[0] + (token - index) * walk.stride(0) + h * op.x.strides[2],
                     op.x.strides[3], d, buffer.data());
                 T* out = op.out.as<T>() + (token * heads + h) * d;
                 if (op.layout == 0) {
                   turn_split(out, x, table, op.rotary / 2);
                 } else {
                   turn_interleaved(out, x, table, op.rotary);
                 }
                 std::copy(x + op.rotary, x + d, out + op.rotary);
               }
             }
           });
}

void run(const Rope& op, CpuContext& context) {
  dispatch_float(op.x.dtype, [&]<class T>(T) { rotate<T>(op, context); });
}

HEDDLE_REGISTER(Rope);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
