#include "ops/rope.h"

#include <cmath>

#include "common/elements.cuh"
#include "core/slot.h"

namespace heddle {
namespace {

// One thread per pair of one token turns it in every head. Angles are formed in double: a position
// of a million times a frequency near one has no fraction left in f32.
template <class T>
__global__ void rope_kernel(Strided x, Strided positions, T* out, bool given, int64_t offset,
                            int64_t rotary, double step, bool split, const float* cosines,
                            const float* sines, int64_t rows, int* fault) {
  const int64_t tokens = x.shape[0] * x.shape[1], heads = x.shape[2], d = x.shape[3];
  const int64_t pairs = rotary / 2, slots = pairs + (d - rotary);
  HEDDLE_EACH(index, tokens * slots) {
    const int64_t token = index / slots, slot = index % slots;
    const int64_t b = token / x.shape[1], s = token % x.shape[1];
    const T* from = reinterpret_cast<const T*>(x.data) + b * x.strides[0] + s * x.strides[1];
    T* to = out + token * heads * d;
    if (slot >= pairs) {
      const int64_t i = rotary + slot - pairs;
      for (int64_t h = 0; h < heads; ++h) to[h * d + i] = from[h * x.strides[2] + i * x.strides[3]];
      continue;
    }
    const int64_t position = given ? positions.at<int32_t>(token) : offset + s;
    float c, n;
    if (!cosines) {
      double sine, cosine;
      sincos(static_cast<double>(position) * exp(step * static_cast<double>(slot)), &sine, &cosine);
      c = static_cast<float>(cosine);
      n = static_cast<float>(sine);
    } else if (position >= 0 && position < rows) {
      c = cosines[position * pairs + slot];
      n = sines[position * pairs + slot];
    } else {
      *fault = 1;
      continue;
    }
    const int64_t first = split ? slot : 2 * slot, second = split ? slot + pairs : 2 * slot + 1;
    for (int64_t h = 0; h < heads; ++h) {
      const float a = to_float(from[h * x.strides[2] + first * x.strides[3]]);
      const float e = to_float(from[h * x.strides[2] + second * x.strides[3]]);
      to[h * d + first] = from_float<T>(a * c - e * n);
      to[h * d + second] = from_float<T>(e * c + a * n);
    }
  }
}

void run(const Rope& op, CudaContext& context) {
  if (op.x.size() == 0) return;
  const int64_t count = op.x.size() / op.x.shape[2];
  int* fault = op.cos ? context.fault("positions must be inside the tables") : nullptr;
  const double step = -2.0 / static_cast<double>(op.rotary) * std::log(op.theta);
  dispatch_float(op.x.dtype, [&]<class T>(T) {
    rope_kernel<T><<<blocks_for(count, context), kThreads, 0, context.stream>>>(
        Strided(op.x), Strided(op.positions ? op.positions : op.x), op.out.as<T>(),
        bool(op.positions), op.offset, op.rotary, step, op.layout == 0, op.cos.as<float>(),
        op.sin.as<float>(), op.cos ? op.cos.shape[0] : 0, fault);
  });
  context.launched("rope_kernel");
}

HEDDLE_REGISTER(Rope);

}  // namespace
}  // namespace heddle
