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
    return parts<int64_t>(of(head, 0), begin / static_cast<uint32_t>(length), from);
  }
  // The same in strip s of a head whose strips begin at `own`
  template <class Int> HEDDLE_HD Parts parts(const float* own, Int s, Int from) const {
    const Int each = static_cast<Int>(length), end = (s + 1) * each;
    return {own + s * (each + 128) + end - from,
            s + 1 < static_cast<Int>(count) && end < from + 128, 2 * each + 128};
  }
  HEDDLE_HD float sum(int64_t head, int64_t from) const {
    const Parts own = parts(head, from);
    return own.sum(*own.first, own.second());
  }
};

// How heads and keys of a walk are shared out: a warp has a strip of `strip` keys, 16 at a time,
// and a CTA 8 strips of each of two heads, or 16 of one
struct LinesPlan {
  bool shared;              // two heads of a CTA have the same keys
  int items;                // heads or pairs of them
  int strip = 0, ctas = 0;  // of an item
  int parts;                // of a head, eight strips each
  int averaging = 0;        // CTAs that average blocks, of `averaged` bytes
  int processors;

  explicit LinesPlan(const Probe& op, int processors, int64_t averaged = 0)
      : shared(op.q.shape[2] / op.k.shape[2] % 2 == 0),
        items(static_cast<int>(op.q.shape[0] * op.q.shape[2] / (shared ? 2 : 1))),
        processors(processors) {
    // In turns of 16 keys a warp: what a CTA spends on its beginning and end, the fewest, and what
    // a CTA that averages reads meanwhile
    constexpr int64_t kIdle = 4, kLeast = 8, kRead = 118000;
    const int64_t turn = shared ? 128 : 256, turns = (op.k.shape[1] + turn - 1) / turn;
    int64_t best = INT64_MAX;
    for (int64_t n = 1; n <= processors; ++n) {
      const int64_t each = std::max((turns + n - 1) / n, kLeast), used = (turns + each - 1) / each;
      if (n > 1 && used < n) continue;
      // Rounds of those that walk, who leave the others to those that average
      const int64_t least = (items * used + processors - 1) / processors;
      for (int64_t rounds = least; rounds <= (averaged ? 2 * least + 1 : least); ++rounds) {
        const int64_t walking = (items * used + rounds - 1) / rounds, rest = processors - walking;
        if (averaged && rest < 1 && processors > 1) continue;
        const int64_t others = averaged ? std::max<int64_t>(rest, 1) : 0;
        const int64_t time =
            std::max(rounds * (each + kIdle), averaged ? averaged / (others * kRead) + kIdle : 0);
        if (time >= best) continue;
        best = time;
        strip = static_cast<int>(each * 16);
        ctas = static_cast<int>(used);
        averaging = static_cast<int>(others);
      }
    }
    parts = shared ? ctas : 2 * ctas;
  }
};

struct LinesCall {
  Probe op;
  LinesPlan first, second;  // the two walks
  float2* stats;            // [b hq, first.parts, 128] largest score and sum, in powers of 2
  LineStrips strips;        // eight of a part of the second
  MeanArgs means[2];        // whose blocks the first walk averages, if any
  // [b hq, tiles of 128 keys, 128, 2], or null: of each query the logarithm, base 2, of the sum of
  // weights of keys up to that with its own number, and of those behind. Of 128 last queries the
  // first are in one band of 128 distances and the others in the next.
  float* bands = nullptr;
  // [b hq], or null: heads without a 0 are left out of the second, whose CTAs then average blocks
  // of `later` for heads with a 1, the last first
  const int32_t* kinds = nullptr;
  MeanArgs later{};
  // At zero: how many blocks are taken, and of each head and kReadyBlocks of its blocks how many
  // are there
  int *next = nullptr, *ready = nullptr;
  // Whether every other of those CTAs leaves its multiprocessor to who waits for these
  bool spares = false;
};

// Instantiation files for each size. The first walk finds the largest score and the sum of each
// query, the second masses of keys and of the distances of every strip.
template <DType kType, int kD> void launch_stats_sm90(const LinesCall& call, cudaStream_t stream);
template <DType kType, int kD> void launch_lines_sm90(const LinesCall& call, cudaStream_t stream);

}  // namespace heddle
