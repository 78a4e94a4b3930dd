#pragma once
#include "attention/forward_sm90.h"

namespace heddle {

// A call of the kernel that splits keys among CTAs: few rows of q, or keys and values in pages
struct SplitCall : ForwardCall {
  int64_t most_queries;  // packed sequences of more are left out; 0 is none
  // For runs of keys that are not all of a row's, two a CTA
  float* part_out;     // [2 * processors, 64, split_columns()]
  float2* part_state;  // [2 * processors, 64]: row_max in log2 units and row_sum
  // [processors], at zero and left so: those of a unit belong to its CTAs but the first, which may
  // be another's last
  int* arrivals;
  // A word that says afterwards whether lengths or pages were out of range, and a counter that is
  // at zero and left so; or null. A window leaves out pages, which are then not looked at.
  int *verdict, *judged;
};

inline constexpr int kSplitRows = 64;

// Rows of q that share a kv head, and how many CTAs' worth of 64 they are, or at most are if they
// are packed
inline int64_t split_row_tiles(const ForwardCall& call) {
  const int64_t rows = call.sq * (call.hq / call.hk);
  return call.cu_seqlens_q ? rows / kSplitRows + call.sequences
                           : (rows + kSplitRows - 1) / kSplitRows;
}

// How many CTAs there are: where d is at most 64 two of a multiprocessor, as copies of one are too
// few, once each has some tiles of 128 keys
inline constexpr int kSplitCtas = 2;
inline int64_t split_ctas(const ForwardCall& call) {
  const int64_t tiles = call.b * call.hk * split_row_tiles(call) * ((call.sk + 127) / 128);
  const bool shared =
      call.dtype != DType::kE4M3 && std::max(call.d, call.dv) <= 64 && tiles >= 6 * call.processors;
  return call.processors * (shared ? kSplitCtas : 1);
}

// Of the tiles that an instance has
inline int64_t split_columns(const ForwardCall& call) {
  const int64_t size = std::max(call.d, call.dv);
  return size <= 64 ? 64 : size <= 128 ? 128 : 256;
}

// Softmax attention on Hopper's matrix instructions, bound by reading the keys once
void split_sm90(const SplitCall& call, cudaStream_t stream);

// Why it cannot take a call, or null
const char* declines_split_sm90(const SplitCall& call);

// What split_sm90 picks from; with kFloat8, and kF16, q, k and v are e4m3
template <DType kType, int kD, bool kFloat8 = false>
void launch_split_sm90(const SplitCall& call, cudaStream_t stream);

}  // namespace heddle
