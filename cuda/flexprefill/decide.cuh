#pragma once
#include "common/sm90.cuh"
#include "common/team.cuh"
#include "core/flexprefill.h"
#include "probe/lines_sm90.h"
#include "probe/stats_sm90.cuh"

// Which way each head goes, before masses of single keys are known and before there is a map, of
// which it needs only one. The first walk leaves a sum of weights for each of the last 128 queries
// and both bands of distances that a tile of 128 keys has for it:
//
//   V[t]    = mean(i) of both sums of tile t      O[o] = mean(i) of near[nk-1-o] + far[nk-2-o]
//
// A warp has some tiles of a head, for which it also multiplies the mean of k by that of the last
// queries, in steps of kDecideTiles; the last CTA of a head to arrive decides.
namespace heddle {

constexpr int kDecideThreads = 256, kDecideWarps = kDecideThreads / 32, kDecideTiles = 2,
              kDecideQueries = 128, kDecideCtas = 4;  // of a multiprocessor

struct DecideArgs {
  FlexTask task;
  const float2* stats;  // [heads, parts, 128] largest score and sum
  int parts;
  const float* bands;     // [heads, nk, 128, 2] logarithms of sums
  MeanArgs mean_k, last;  // as planes
  int32_t* kinds;         // [heads]
  float* halves;          // [heads, 2, nk] masses that are near and far
  int* arrivals;          // [heads], at zero and left so
  int* signals;           // [signal_count], set to zero
  int signal_count;
  float scale;
  int steps;  // of a warp

  HEDDLE_HD int64_t ctas_of_head() const {
    const int64_t own = kDecideWarps * kDecideTiles * steps;
    return (task.nk + own - 1) / own;
  }
};

struct DecideShared {
  static constexpr int64_t kHeld = 1024;  // blocks of a head that there is room for
  float lse[kDecideQueries], query[128], sums[kDecideWarps];
  float estimate[kHeld], vertical[kHeld];
  bool last;
};

// Four elements of a mean from `at` on
__device__ inline void load_mean(float (&to)[4], const MeanArgs& args, int64_t at) {
  for (float& x : to) x = 0;
#pragma unroll
  for (int plane = 0; plane < kMeanPlanes; ++plane) {
    const auto words = *reinterpret_cast<const uint2*>(args.planes + plane * args.apart + at);
    const uint32_t both[2] = {words.x, words.y};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[i] += sm90::unpack<DType::kBF16>(static_cast<uint16_t>(both[i / 2] >> 16 * (i % 2)));
  }
}

// A number of every thread becomes that of all
template <class Both>
__device__ float decide_reduce(float own, DecideShared& memory, const Both& both) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int step = 16; step > 0; step /= 2) own = both(own, __shfl_xor_sync(~0u, own, step));
  __syncthreads();
  if (lane == 0) memory.sums[warp] = own;
  __syncthreads();
  float all = memory.sums[0];
  for (int i = 1; i < kDecideWarps; ++i) all = both(all, memory.sums[i]);
  return all;
}

__device__ inline void flexprefill_decide_cta(const DecideArgs& args, int64_t ctas, int64_t cta,
                                              DecideShared& memory) {
  const FlexTask& task = args.task;
  const int64_t nk = task.nk, head = cta / ctas, hq = task.op.q.shape[2],
                kv_head = head / (hq / task.op.k.shape[2]);  // over the batch as well
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const auto depth = static_cast<int>(args.last.depth), element = lane * 4;
  float* vertical = task.work + head * 3 * (nk + 1);
  float* slash = vertical + nk + 1;
  float* near = args.halves + head * 2 * nk;
  float* far = near + nk;
  float* estimate = task.estimate + head * nk;
  for (int i = thread; cta == 0 && i < args.signal_count; i += kDecideThreads) args.signals[i] = 0;

  // All that waits for memory at once
  float4 sums[kDecideTiles][2];
  float keys[kDecideTiles][4];
  const auto load = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < kDecideTiles; ++i) {
      const int64_t t = min(first + i, nk - 1);
      const float* from = args.bands + ((head * nk + t) * kDecideQueries + element) * 2;
      sums[i][0] = *reinterpret_cast<const float4*>(from);
      sums[i][1] = *reinterpret_cast<const float4*>(from + 4);
      load_mean(keys[i], args.mean_k, (kv_head * nk + t) * depth + (element < depth ? element : 0));
    }
  };
  const int64_t begin = (cta % ctas * kDecideWarps + warp) * args.steps * kDecideTiles;
  load(begin);
  if (thread < kDecideQueries) {
    memory.lse[thread] =
        lse_of_parts(args.stats + head * args.parts * kDecideQueries + thread, args.parts);
  } else if (warp == kDecideWarps - 1) {
    float query[4];
    load_mean(query, args.last, head * depth + (element < depth ? element : 0));
    for (int i = 0; i < 4; ++i) memory.query[element + i] = element < depth ? query[i] : 0;
  }
  __syncthreads();

#pragma unroll 1
  for (int step = 0; step < args.steps; ++step) {
    const int64_t first = begin + step * kDecideTiles;
    if (step > 0) load(first);
#pragma unroll
    for (int i = 0; i < kDecideTiles; ++i) {
      float own[3] = {};  // near, far, score
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float4& x = sums[i][j];
        const float* lse = &memory.lse[element + 2 * j];
        own[0] += exp2f(x.x - lse[0]) + exp2f(x.z - lse[1]);
        own[1] += exp2f(x.y - lse[0]) + exp2f(x.w - lse[1]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) own[2] += memory.query[element + j] * keys[i][j];
      for (int other = 16; other > 0; other /= 2)
#pragma unroll
        for (float& x : own) x += __shfl_xor_sync(~0u, x, other);
      const int64_t t = first + i;
      if (lane != 0 || t >= nk) continue;
      near[t] = own[0] / kDecideQueries;
      far[t] = own[1] / kDecideQueries;
      vertical[t] = (own[0] + own[1]) / kDecideQueries;
      estimate[t] = own[2] * args.scale;
    }
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    memory.last = atomicAdd(&args.arrivals[head], 1) == ctas - 1;
    if (memory.last) args.arrivals[head] = 0;
  }
  __syncthreads();
  if (!memory.last) return;
  __threadfence();

  // In shared memory, if there is room
  const bool held = nk <= DecideShared::kHeld;
  float *scores = held ? memory.estimate : estimate, *masses = held ? memory.vertical : vertical;
  const auto each = [&](const auto& body) {
#pragma unroll 4
    for (int64_t t = thread; t < nk; t += kDecideThreads) body(t);
  };
  float top = -INFINITY, sum = 0, apart = 0;
  each([&](int64_t t) {
    const float score = estimate[t], mass = vertical[t],
                band = near[nk - 1 - t] + (t + 1 < nk ? far[nk - 2 - t] : 0);
    slash[t] = band;
    scores[t] = score;
    masses[t] = mass;
    top = fmaxf(top, score);
    // no number if one of them is none
    sum += score - score + (mass - mass) + (band - band);
  });
  top = decide_reduce(top, memory, [](float a, float b) { return fmaxf(a, b); });
  each([&](int64_t t) {
    const float own = expf(scores[t] - top);
    sum += own;
    scores[t] = own;
  });
  sum = decide_reduce(sum, memory, [](float a, float b) { return a + b; });
  each([&](int64_t t) {
    const float share = scores[t] / sum;
    estimate[t] = share;
    apart += flexprefill_apart(task.op, share, masses[t]);
  });
  apart = decide_reduce(apart, memory, [](float a, float b) { return a + b; });
  if (thread != 0) return;
  const float distance = flexprefill_distance(apart);
  static_cast<float*>(task.op.divergence.data)[head] = distance;
  args.kinds[head] = flexprefill_kind(task.op, distance, sum - sum == 0);
}

}  // namespace heddle
