#pragma once
#include <algorithm>
#include <limits>

#include "attention/forward_sm90.h"
#include "common/sm90_format.h"

namespace heddle {

// A call of the backward; out and lse are inputs, dq, dk and dv contiguous
struct BackwardCall : ForwardCall {
  const void* dout;  // [b, sq, hq, dv]
  Strides dout_strides;
  int64_t lse_batch, lse_head, lse_row;
  void *dq, *dk, *dv_out;  // as q, k and v
  bool deterministic;
  const int* fault;  // not 0 if lengths or offsets are wrong, or null
  // Of each row, [b, hq, sq], for whoever follows; lse is +inf where the row is empty
  float *row_lse, *row_delta;
  // As GradientTiles says
  float *tile_lse_log2, *tile_delta, *dq_sum;  // -delta; dq_sum in a private order
  int* counters;
  float* part_sums;
  float* dslope_parts;  // [b, hq, GradientTiles::dslope_parts()], zeros before; null without slopes
};

constexpr int64_t kMostSlopes = 64;  // query heads of a kv head, where they have slopes

// Whether a masked value that is no number may have spoilt sums. Without a mask there are none.
inline bool leaves_marks(const ForwardCall& call) {
  return call.causal || call.window || call.cache_seqlens || call.masked;
}

// What a call is cut into. Packed sequence i has its tiles of n tokens from offsets[i] / n + i on:
// no sum over the sequences before it, and at most one tile too many each.
struct GradientTiles {
  int64_t queries, keys;           // tokens of a tile
  int64_t row_tiles, key_tiles;    // of one head, or kv head, over the batch or all sequences
  int64_t total_rows, total_keys;  // tiles of all heads
  int64_t columns;                 // of a row of dq_sum
  // Key tiles behind the last whole wave are cut into parts of their rows, which add up
  int64_t split_tiles = 0, parts = 1;

  explicit GradientTiles(const ForwardCall& call) {
    columns = std::max(call.d, call.dv) <= 64 ? 64 : 128;
    queries = columns == 64 ? 128 : 64;
    keys = 128;
    const auto tiles = [&](int64_t tokens, int64_t size) {
      return call.cu_seqlens_q ? tokens / size + call.sequences : (tokens + size - 1) / size;
    };
    row_tiles = tiles(call.sq, queries);
    key_tiles = tiles(call.sk, keys);
    total_rows = row_tiles * call.b * call.hq;
    total_keys = key_tiles * call.b * call.hk;
    if (call.cu_seqlens_q || call.slopes || leaves_marks(call)) return;
    // in steps: a CTA takes 1.2 beside those of its tile, and so does a part to add its sums
    const int64_t left = total_keys % call.processors, steps = row_tiles * (call.hq / call.hk);
    double least = std::numeric_limits<double>::infinity();
    for (int64_t n = 1; n <= std::min<int64_t>(row_tiles, 8); ++n) {
      const int64_t waves = (left * n + call.processors - 1) / call.processors;
      const double time =
          static_cast<double>(waves) * (1.2 + static_cast<double>(steps) / n) + 1.2 * n;
      if (time < least) least = time, parts = n;
    }
    if (parts > 1) split_tiles = left;
  }

  // Sums of each head, those of a warp over a key tile
  int64_t dslope_parts() const { return key_tiles * 8; }
  // A ticket, two turns a row tile, then the marks, and a turn for each tile in parts
  int64_t counters() const { return 1 + 2 * total_rows + total_rows + total_keys + split_tiles; }
  int64_t part_sums() const { return split_tiles * 2 * keys * columns; }
  int64_t ctas() const { return total_keys + split_tiles * (parts - 1); }
  // Tiles with sums that are no numbers, though masked values may be why: row tiles, then key tiles
  int* marks(int* counters) const { return counters + 1 + 2 * total_rows; }
};

// Which packed sequence tile `tile` is of, if of any
HEDDLE_HOST_DEVICE int sequence_of_tile(const int32_t* offsets, int64_t stride, int sequences,
                                        int tokens, int tile) {
  int first = 0, last = sequences - 1;
  while (first < last) {
    const int middle = first + (last - first + 1) / 2;
    if (offsets[middle * stride] / tokens + middle <= tile) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

// Gradients on Hopper's matrix instructions, for calls that are not declined. What it marks is left
// to do once more.
void backward_sm90(const BackwardCall& call, cudaStream_t stream);

// Why it cannot take a call, or null
const char* declines_backward_sm90(const BackwardCall& call);

// What backward_sm90 picks from. `kMapped` is with softCap or slopes, `kListed` under a mask, whose
// instances have files of their own.
template <DType kType, int kD, bool kMapped, bool kListed = false>
void launch_backward_sm90(const BackwardCall& call, cudaStream_t stream);

}  // namespace heddle
