#pragma once
#include <cstdint>

#include "core/mask.h"

// Which keys a tile of queries visits under a mask: units of 64 keys, two bits for each and for
// each computing warpgroup, which has 64 of the tile's rows. They are written before the forward
// kernel needs them and serve all query heads that share them, or BlockUnits finds them there.
namespace heddle {

inline constexpr int kUnitKeys = 64;
// Which compute, with 64 rows of q each
inline constexpr int kListedWarpgroups = 2;

// 32 units as the 64 rows of one warpgroup see them
struct alignas(8) UnitBits {
  uint32_t any;     // some row sees some key
  uint32_t listed;  // every row sees all keys up to where causality and the sequence end its keys
};

// The lists of a call, one for each sequence, head of the mask and tile of queries
struct UnitLists {
  MaskView mask;
  UnitBits* bits;  // [lists, words, warpgroups], null if the forward kernel finds them by itself
  // [lists, mark_words]: how many units are seen, times 16, and which classes of UnitPairs have an
  // odd number, then a bit per word that has any
  int* marks;
  int tiles;  // per head: of one sequence, or of all that are packed
  int words;  // of 32 units
  int warpgroups;

  HEDDLE_HD int mark_words() const { return 1 + (words + 31) / 32; }

  // Packed sequences have their tiles where they have their block rows
  HEDDLE_HD int64_t first_tile(int64_t q_begin, int64_t sequence) const {
    return first_block_row(q_begin, sequence, kUnitKeys * warpgroups);
  }
  HEDDLE_HD int64_t index(int64_t batch, int64_t head, int64_t tile) const {
    const int64_t own = mask.heads == 1 ? 0 : head / (mask.hq / mask.heads);
    return (batch * mask.heads + own) * tiles + tile;
  }
};

// A sequence of a call and the head whose rows are looked at
struct UnitRows {
  int64_t batch, sequence, q_begin, head, sq, sk;
  bool causal, packed;

  HEDDLE_HD MaskRow row(const MaskView& mask, int64_t i) const {
    const int64_t ahead = sk - sq, end = causal ? ahead + i + 1 : sk;
    return mask.row(batch, sequence, packed ? first_block_row(q_begin, sequence, mask.block_q) : 0,
                    q_begin, head, i, ahead, end < sk ? end : sk);
  }
};

struct UnitLook {
  bool any, listed;
};

// What the rows of one warpgroup of a tile, which may have none, see of units
struct UnitView {
  const MaskView& mask;
  const UnitRows& rows;
  int64_t first, last;
  bool alike;  // rows differ only in where they stand
  MaskRow low, high;

  HEDDLE_HD UnitView(const UnitLists& lists, const UnitRows& rows, int64_t tile, int warpgroup)
      : mask(lists.mask),
        rows(rows),
        first((tile * lists.warpgroups + warpgroup) * 64),
        last((first + 64 < rows.sq ? first + 64 : rows.sq) - 1),
        alike(false) {
    if (tile < 0 || first > last) {
      last = first - 1;
      return;
    }
    alike = !mask.bounds && first / mask.block_q == last / mask.block_q;
    low = rows.row(mask, first);
    high = rows.row(mask, last);
  }

  // The keys that causality and the sequence leave
  HEDDLE_HD int64_t end() const { return first > last ? 0 : high.end; }

  // Whether whole units are named, by blocks, or runs of keys
  HEDDLE_HD bool plain() const {
    return first > last ||
           (alike && !low.columns && !low.diagonals && (!low.blocks || mask.block_k_log2 >= 6));
  }

  // If so: of units 32 * word to 32 * word + 31
  HEDDLE_HD UnitBits units(int64_t word) const {
    const int64_t key = word * 32 * kUnitKeys;
    if (key >= end()) return {0, 0};
    uint64_t some = 0, all = 0;
    if (low.blocks) {
      const int64_t log2 = mask.block_k_log2 - 6;
      const uint64_t listed = bits_at(low.blocks, mask.block_words, word * 32 >> log2);
      some = all = log2 >= 5 ? 0 - (listed & 1) : repeat_bits(listed, static_cast<int>(log2));
    }
    // keys that some rows see and keys that all see, as far as the keys go
    const auto name = [&](int64_t from, int64_t all_from, int64_t all_to, int64_t to) {
      some |= bit_range((from - key) >> 6, (to - key + 63) >> 6);
      all |= bit_range((all_from - key + 63) >> 6, all_to >= high.end ? 64 : (all_to - key) >> 6);
    };
    if (mask.sink_tokens > 0) name(0, 0, mask.sink_tokens, mask.sink_tokens);
    if (mask.window > 0)
      name(low.position - mask.window + 1, high.position - mask.window + 1, window_end(),
           high.position + 1);
    const uint64_t inside = bit_range(0, (high.end - key + 63) >> 6);
    return {static_cast<uint32_t>(some & inside), static_cast<uint32_t>(some & all & inside)};
  }

  // Of the unit that begins at key `t0`
  HEDDLE_HD UnitLook operator()(int64_t t0) const {
    if (first > last || t0 >= rows.sk) return {false, false};
    if (alike) {
      // what differs between rows only grows or only moves
      const uint64_t inside = bit_range(-t0, high.end - t0);
      if (!inside) return {false, false};
      const uint64_t named = mask.common(low, t0);
      uint64_t some = named, all = named;
      if (mask.window > 0) {
        some |= bit_range(low.position - mask.window + 1 - t0, high.position + 1 - t0);
        all |= bit_range(high.position - mask.window + 1 - t0, window_end() - t0);
      }
      UnitLook look{(some & inside) != 0, (inside & ~all) == 0};
      if (low.diagonals) {
        // rows and keys are runs, and so are the distances between them: two words of bits
        const int64_t until = t0 + kUnitKeys < high.end ? t0 + kUnitKeys : high.end;
        const int64_t least = low.position - until + 1, count = high.position - t0 - least + 1;
        // a causal row sees no key behind it
        const int64_t from = rows.causal ? -least : 0;
        bool slashed = true;
        for (int64_t i = 0; i < 128; i += 64) {
          const uint64_t distances = bits_at(low.diagonals, mask.token_words, least + i);
          look.any |= (distances & bit_range(0, count - i)) != 0;
          slashed &= (bit_range(from - i, count - i) & ~distances) == 0;
        }
        look.listed |= slashed;
      }
      return look;
    }
    UnitLook look{false, true};
    for (int64_t i = first; i <= last; ++i) {
      const MaskRow row = rows.row(mask, i);
      const uint64_t seen = mask.seen(row, t0);
      const int64_t end = rows.causal && row.position + 1 < rows.sk ? row.position + 1 : rows.sk;
      look.any |= seen != 0;
      look.listed &= seen == bit_range(-t0, end - t0);
    }
    look.listed &= look.any;
    return look;
  }

 private:
  // A causal row ends where its window does
  HEDDLE_HD int64_t window_end() const { return (rows.causal ? high.position : low.position) + 1; }
};

// Units of a tile of queries where nothing but blocks of whole units is listed, and no warpgroup
// has rows of two of them: so little work that the forward kernel does it by itself
struct BlockUnits {
  const int32_t* blocks[kListedWarpgroups];
  int end[kListedWarpgroups];  // of the keys of each
  int words, log2;             // of a row of blocks; units of a block

  static bool take(const MaskView& mask) {
    return mask.blocks && !mask.columns && !mask.diagonals && !mask.bounds && mask.window == 0 &&
           mask.sink_tokens == 0 && mask.block_k_log2 >= 6 && mask.block_q % 64 == 0;
  }

  BlockUnits() = default;
  // From row `row` of a sequence on
  HEDDLE_HD BlockUnits(const MaskView& mask, const UnitRows& rows, int row)
      : words(static_cast<int>(mask.block_words)), log2(mask.block_k_log2 - 6) {
    const int sq = static_cast<int>(rows.sq), sk = static_cast<int>(rows.sk);
    const int block_q = static_cast<int>(mask.block_q), heads = static_cast<int>(mask.heads);
    const int own = static_cast<int>(rows.head) / (static_cast<int>(mask.hq) / heads);
    const int first =
        rows.packed ? static_cast<int>(rows.q_begin) / block_q + static_cast<int>(rows.sequence)
                    : 0;
    for (int w = 0; w < kListedWarpgroups; ++w, row += 64) {
      const int64_t line = (rows.batch * heads + own) * mask.block_rows + first + row / block_q;
      blocks[w] = mask.blocks + line * words;
      end[w] = row >= sq ? 0 : rows.causal ? sk - sq + (row + 64 < sq ? row + 64 : sq) : sk;
    }
  }

  // What warpgroup `w` sees of units 32 * word to 32 * word + 31
  HEDDLE_HD uint32_t operator()(int word, int w) const {
    const int units = (end[w] + kUnitKeys - 1) / kUnitKeys - word * 32;
    const int at = word * 32 >> log2;  // all are in one word of blocks
    if (units <= 0 || at / 32 >= words) return 0;
    uint32_t seen = static_cast<uint32_t>(blocks[w][at / 32]) >> at % 32;
    if (log2 >= 5) seen = 0 - (seen & 1);
    for (int i = 0; i < log2 && log2 < 5; ++i) {
      seen = (seen & 0xff) | (seen & 0xff00) << 8;
      seen = (seen | seen << 4) & 0x0f0f0f0f;
      seen = (seen | seen << 2) & 0x33333333;
      seen = (seen | seen << 1) & 0x55555555;
      seen |= seen << 1;
    }
    return units >= 32 ? seen : seen & ((1u << units) - 1);
  }
};

}  // namespace heddle
