#pragma once
#include <algorithm>
#include <cstdint>

#include "core/host_device.h"

// Which keys a query sees under a mask, 64 of them at a time, the same on every device.
//
//   sees(i, t) = begin <= t < end                    causality and bounds of the row
//            and ( blocks[i / bq, t / bk]            a listed block
//               or columns[t] or diagonals[p - t]    single keys and distances
//               or p - t < window or t < sink_tokens )
//
// Lists are sets of bits: 32 to an int32, the lowest first. A bit is found without a search, a key
// counts once however many lists name it, and every order of a list is the same mask.
namespace heddle {

// Bits from..to - 1 of a word, as far as it has them
HEDDLE_HD inline uint64_t bit_range(int64_t from, int64_t to) {
  const int64_t first = from < 0 ? 0 : from, last = to > 64 ? 64 : to;
  if (first >= last) return 0;
  return ~uint64_t{0} >> (64 - (last - first)) << first;
}

// 64 bits of a set from bit `at` on, which may begin before the set or go on behind it
HEDDLE_HD inline uint64_t bits_at(const int32_t* set, int64_t words, int64_t at) {
  const int64_t word = at >> 5;  // rounds down
  const int shift = static_cast<int>(at & 31);
  const auto get = [&](int64_t i) -> uint64_t {
    return i < 0 || i >= words ? 0 : static_cast<uint32_t>(set[i]);
  };
  const uint64_t low = get(word) | get(word + 1) << 32;
  return shift == 0 ? low : low >> shift | get(word + 2) << (64 - shift);
}

HEDDLE_HD inline uint64_t reverse_bits(uint64_t x) {
  x = (x >> 1 & 0x5555555555555555u) | (x & 0x5555555555555555u) << 1;
  x = (x >> 2 & 0x3333333333333333u) | (x & 0x3333333333333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0f0f0f0f0fu) | (x & 0x0f0f0f0f0f0f0f0fu) << 4;
  x = (x >> 8 & 0x00ff00ff00ff00ffu) | (x & 0x00ff00ff00ff00ffu) << 8;
  x = (x >> 16 & 0x0000ffff0000ffffu) | (x & 0x0000ffff0000ffffu) << 16;
  return x >> 32 | x << 32;
}

// Every bit of x, as far as there is room, 2^log2 times in a row
HEDDLE_HD inline uint64_t repeat_bits(uint64_t x, int log2) {
  for (; log2 > 0; --log2) {
    x = (x & 0xffff) | (x & 0xffff0000u) << 16;
    x = (x | x << 8) & 0x00ff00ff00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
    x = (x | x << 2) & 0x3333333333333333u;
    x = (x | x << 1) & 0x5555555555555555u;
    x |= x << 1;
  }
  return x;
}

// What one query of one head sees
struct MaskRow {
  const int32_t *blocks, *columns, *diagonals;  // null where the mask has none
  int64_t position, begin, end;
};

struct MaskView {
  const int32_t *blocks, *columns, *diagonals, *bounds;  // no gaps; null where there is none
  int64_t heads, block_rows, block_words, token_words;   // shapes of the above
  int64_t hq, sq;                                        // of the call
  int64_t block_q, window, sink_tokens;
  int block_k_log2;

  // Query `i` of a sequence whose block rows begin at `first_row`. `batch` is where its blocks and
  // bounds stand, `token` is its first row of q there, `sequence` is where its columns stand.
  // Positions are `ahead` + i, and it sees no key from `end` on.
  HEDDLE_HD MaskRow row(int64_t batch, int64_t sequence, int64_t first_row, int64_t token,
                        int64_t head, int64_t i, int64_t ahead, int64_t end) const {
    // nothing is divided that need not be: kernels ask for rows again and again
    const int64_t own = heads == 1 ? 0 : heads == hq ? head : head / (hq / heads);
    MaskRow row{nullptr, nullptr, nullptr, ahead + i, 0, end};
    if (blocks)
      row.blocks =
          blocks + ((batch * heads + own) * block_rows + first_row + i / block_q) * block_words;
    const int64_t line = (sequence * heads + own) * token_words;
    if (columns) row.columns = columns + line;
    if (diagonals) row.diagonals = diagonals + line;
    if (bounds) {
      const int32_t* bound = bounds + (batch * sq + token + i) * 2;
      row.begin = bound[0] < 0 ? 0 : bound[0];
      row.end = bound[1] < end ? bound[1] : end;
    }
    return row;
  }

  // Bit j is block-wise visibility of key t0 + j
  HEDDLE_HD uint64_t block_bits(const MaskRow& row, int64_t t0) const {
    const int64_t first = t0 >> block_k_log2;
    const uint64_t listed = bits_at(row.blocks, block_words, first);
    if (block_k_log2 < 6) {
      const int skipped = static_cast<int>(t0 & ((1 << block_k_log2) - 1));
      const uint64_t runs = repeat_bits(listed, block_k_log2) >> skipped;
      if (skipped == 0) return runs;
      return runs | repeat_bits(listed >> (64 >> block_k_log2), block_k_log2) << (64 - skipped);
    }
    uint64_t seen = 0;
    for (int64_t c = first; c << block_k_log2 < t0 + 64; ++c)
      if (listed >> (c - first) & 1)
        seen |= bit_range((c << block_k_log2) - t0, ((c + 1) << block_k_log2) - t0);
    return seen;
  }

  // Bit j is whether key t0 + j is named for all rows that have these lists, wherever they stand
  HEDDLE_HD uint64_t common(const MaskRow& row, int64_t t0) const {
    uint64_t named = row.blocks ? block_bits(row, t0) : 0;
    if (row.columns) named |= bits_at(row.columns, token_words, t0);
    if (sink_tokens > 0) named |= bit_range(-t0, sink_tokens - t0);
    return named;
  }

  // Bit j tells whether the row sees key t0 + j
  HEDDLE_HD uint64_t seen(const MaskRow& row, int64_t t0) const {
    const uint64_t inside = bit_range(row.begin - t0, row.end - t0);
    if (!inside) return 0;
    uint64_t seen = common(row, t0);
    if (row.diagonals)
      seen |= reverse_bits(bits_at(row.diagonals, token_words, row.position - t0 - 63));
    if (window > 0) seen |= bit_range(row.position - window + 1 - t0, row.position + 1 - t0);
    return seen & inside;
  }
};

// Packed sequences have unequal numbers of block rows. Those of sequence i begin here, which leaves
// a row unused now and then but needs no sum over the sequences before it.
HEDDLE_HD inline int64_t first_block_row(int64_t q_begin, int64_t sequence, int64_t block_q) {
  return q_begin / block_q + sequence;
}

}  // namespace heddle
