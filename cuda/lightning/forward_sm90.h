#pragma once
#include <cstdint>

#include "common/launch.h"
#include "core/dtype.h"

namespace heddle {

// Elements from one batch, row and head of a [b, s, h, d] tensor to the next; d is contiguous
struct ScanStrides {
  int64_t batch, row, head;
};

struct ScanCall {
  DType dtype;
  int64_t b, s, d, e;
  int64_t hq, hk, hv, heads, hs;  // heads: of out
  const void *q, *k, *v;          // [b, s, hq, d], [b, s, hk, d], [b, s, hv, e]
  void* out;                      // [b, s, heads, e], contiguous
  ScanStrides q_strides, k_strides, v_strides;
  float scale;
  const float* slopes;  // [hs]
  int64_t slopes_stride;
  const int32_t* cu_seqlens;  // [sequences + 1] or null, then b = 1 and sequences = b
  int64_t cu_stride, sequences;
  const float* initial_state;  // [sequences, hs, d, e] or null
  int64_t initial_strides[4];
  float* state;      // [sequences, hs, d, e], contiguous, or null
  float* summaries;  // as many numbers as the plan says
  int processors;    // multiprocessors, each of which runs one CTA
  int schedule;      // as Lightning has it
  int* fault;
};

// How a call is shared out between CTAs
struct ScanPlan {
  int rows;        // of S that a CTA holds
  int columns;     // of v that it works on
  int slices;      // so many cover e
  int segment;     // tokens that a CTA walks through
  int segments;    // of a sequence; packed sequences have as many as they need
  int parts;       // CTAs that sum up one segment together, before the outputs
  int64_t slots;   // segments of all sequences; packed ones have at most so many
  int64_t summed;  // of these, how many are summed up: all but the last of a sequence

  // How many segments of a sequence run side by side when so many CTAs would take all sequences
  // whole, and how many are worth it
  static int64_t most_segments(const ScanCall& call, int64_t ctas, int64_t shortest);
  static int64_t segments_for(const ScanCall& call, int64_t ctas);
  void cut(const ScanCall& call, int64_t segments_each);
  void cut_every(const ScanCall& call, int64_t tokens);

  int64_t summaries(const ScanCall& call) const { return summed * call.heads * slices * parts; }
  // In numbers, with one more for each that tells that it is there
  int64_t summary_size(const ScanCall& call) const {
    return summaries(call) * (rows * columns + 1);
  }
};
ScanPlan plan_scan_sm90(const ScanCall& call);

// Lightning attention on Hopper's matrix instructions, for calls that are not declined
void scan_sm90(const ScanCall& call, const ScanPlan& plan, cudaStream_t stream);

// Why it cannot take a call, or null
const char* declines_scan_sm90(const ScanCall& call);

// What scan_sm90 picks from, an instantiation file for each size: d up to kD, kE columns of v per
// CTA
template <DType kType, int kD, int kE>
void launch_scan_sm90(const ScanCall& call, const ScanPlan& plan, cudaStream_t stream);

}  // namespace heddle
