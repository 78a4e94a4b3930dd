#pragma once
#include <algorithm>

#include "common/launch.h"
#include "core/host_device.h"
#include "ops/probe.h"
#include "probe/means.h"

namespace heddle {

// Masses of distances, of `count` strips of `length` keys for each head: of a strip length + 128,
// farthest first, the last that of query 127 to the strip's first key
struct LineStrips {
  float* distances;
  int64_t length, count;

  HEDDLE_HD float* of(int64_t head, int64_t strip) const {
    return distances + (head * count + strip) * (length + 128);
  }
  // The mass at the distance from which query 0 would see key `from`, which may be negative: in one
  // strip, or in that and the next
  struct Parts {
    const float* first;
    bool two;
    int64_t apart;

    HEDDLE_HD float second() const { return first[two ? apart : 0]; }
    HEDDLE_HD float sum(float first, float second) const { return first + (two ? second : 0); }
  };
  HEDDLE_HD Parts parts(int64_t head, int64_t from) const {
    // Keys have fewer than 2^32 numbers, which makes dividing them cheap. A strip has no fewer than
    // 128, so that two have all of a distance.
    const uint32_t begin = from > 0 ? static_cast<uint32_t>(from) : 0;
    const int64_t s = begin / static_cast<uint32_t>(length), end = (s + 1) * length;
    return {of(head, s) + end - from, s + 1 < count && end < from + 128, 2 * length + 128};
  }
  HEDDLE_HD float sum(int64_t head, int64_t from) const {
    const Parts own = parts(head, from);
    return own.sum(*own.first, own.second());
  }
};

// How heads and keys are shared out: a warp has a strip of `strip` keys, 16 at a time, and a CTA 8
// strips of each of two heads, or 16 of one
struct LinesPlan {
  bool shared;              // two heads of a CTA have the same keys
  int items;                // heads or pairs of them
  int strip = 0, ctas = 0;  // of an item
  int parts;                // of a head, eight strips each
  int averaging;            // CTAs that average blocks, of `averaged` bytes

  LinesPlan(const Probe& op, int processors, int64_t averaged)
      : shared(op.q.shape[2] / op.k.shape[2] % 2 == 0),
        items(static_cast<int>(op.q.shape[0] * op.q.shape[2] / (shared ? 2 : 1))) {
    // bytes that a processor reads in the time in which another has a key of a head in both walks
    constexpr int64_t kRead = 900;
    const int64_t walked = kRead * op.q.shape[0] * op.q.shape[2] * op.k.shape[1];
    averaging = averaged == 0 ? 0
                              : static_cast<int>(std::clamp<int64_t>(
                                    processors * averaged / (averaged + walked), 1, processors));
    const int walking = std::max(processors - averaging, 1);
    // what a CTA spends on its beginning and end, in turns of 16 keys a warp, and the fewest turns
    constexpr int64_t kIdle = 4, kLeast = 8;
    const int64_t turn = shared ? 128 : 256, turns = (op.k.shape[1] + turn - 1) / turn;
    int64_t best = INT64_MAX;
    for (int64_t n = 1; n <= walking; ++n) {
      const int64_t each = std::max((turns + n - 1) / n, kLeast), used = (turns + each - 1) / each;
      const int64_t waves = (items * used + walking - 1) / walking;
      if (waves * (each + kIdle) >= best) continue;
      best = waves * (each + kIdle);
      strip = static_cast<int>(each * 16);
      ctas = static_cast<int>(used);
    }
    parts = shared ? ctas : 2 * ctas;
    // those that are left
    if (averaging > 0) averaging = std::max(averaging, processors - items * ctas);
  }
};

struct LinesCall {
  Probe op;
  LinesPlan plan;
  float2* stats;            // [b hq, parts, 128] largest score and sum, in powers of 2
  LineStrips strips;        // eight of a part
  MeanArgs mean_q, mean_k;  // whose blocks are averaged, if any
};

// Masses of keys, and of the distances of every strip; an instantiation file for each size
template <DType kType, int kD> void launch_lines_sm90(const LinesCall& call, cudaStream_t stream);

}  // namespace heddle
