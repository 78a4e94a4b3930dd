#pragma once
#include "core/select.h"
#include "ops/hip.h"

// The search of HiP by a team, for one list: a row of query blocks of one head, of the heads of a
// group, or of all. core/select.h says what a team is; here it also has
//
//   raise(x, y)                  x = max(x, y) of a uint32_t, whoever does it at the same time
//   compact(n, chosen, place)    place(i, at) of the i < n that are chosen, `at` counting them
//
// and a scorer looks at keys, kHipTile at a time:
//
//   load(head)                   takes the queries of a head, which may stand there already
//   score(memory)                memory.best[i] becomes the order of the largest product with key
//                                memory.keys[i], unless that is negative
//
// Products are compared as integers of the same order, 0 is none. Candidates stand in the order of
// their keys all the way, so that choosing keeps them ascending, and nothing is sorted.
namespace heddle {

constexpr int kHipTile = 64;
constexpr uint32_t kNoOrder = 0, kLeastOrder = 0x007fffffu;  // of -inf

// NaN ranks as -inf, -0 as 0
HEDDLE_HD inline uint32_t order_of(float score) {
  const float number = score == 0 ? 0.f : score;
  uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  if (score != score) return kLeastOrder;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Memory that a team shares
struct HipMemory {
  Histogram bins;
  int32_t keys[kHipTile];
  uint32_t best[kHipTile];
  int32_t left[kHipTile], right[kHipTile];  // of a chunk's descent
  uint32_t most[kHipTile];
};

// Keys that a sequence may have
HEDDLE_HD inline int64_t hip_keys(const Hip& op) {
  return op.block_table.data ? op.block_table.shape[1] * op.k.shape[1] : op.k.shape[1];
}

// One list
struct HipPlace {
  int64_t b, head, row;       // of index
  int64_t first_head, heads;  // query heads that share it
  int64_t first, last;        // queries, the last excluded
  int64_t ahead;              // where query 0 stands
  int64_t end;                // behind the last key that can be listed
  int64_t list;               // index of the list among all
};

// Rows of a head in turn, so that its keys stay in the cache; long ones first
HEDDLE_HD inline HipPlace hip_place(const Hip& op, int64_t task) {
  const int64_t lists = op.index.shape[1], rows = op.index.shape[2], hq = op.q.shape[2];
  HipPlace place;
  place.row = rows - 1 - task % rows;
  place.head = task / rows % lists;
  place.b = task / rows / lists;
  place.heads = hq / lists;
  place.first_head = place.head * place.heads;
  place.first = place.row * op.block_q;
  place.last = place.first + op.block_q < op.q.shape[1] ? place.first + op.block_q : op.q.shape[1];
  int64_t keys = hip_keys(op);
  if (op.cache_seqlens.data) {
    const int64_t own =
        static_cast<int32_t*>(op.cache_seqlens.data)[place.b * op.cache_seqlens.strides[0]];
    keys = own < 0 ? 0 : own < keys ? own : keys;
  }
  place.ahead = keys - op.q.shape[1];
  place.end = place.ahead + place.last - op.window;
  place.list = (place.b * lists + place.head) * rows + place.row;
  return place;
}

template <class Team>
HEDDLE_HD uint64_t hip_threshold(const Team& team, const uint32_t* order, int64_t n, int64_t count,
                                 HipMemory& memory) {
  const auto rank = [&](int64_t i) -> uint64_t {
    return order[i] == kNoOrder ? 0
                                : static_cast<uint64_t>(order[i]) << 32 | ~static_cast<uint32_t>(i);
  };
  const auto none = [](int64_t) { return 0ull; };
  return select(team, n, Wanted{false, static_cast<unsigned long long>(count)}, rank, none,
                memory.bins)
      .least;
}

// Writes a list whose i-th entry is start(i), with its bits and its pages
template <class Team, class Start>
HEDDLE_HD void hip_finish(const Team& team, const Hip& op, const HipPlace& place, int64_t count,
                          const Start& start) {
  const int64_t width = op.index.shape[3];
  int32_t* index = static_cast<int32_t*>(op.index.data) + place.list * width;
  team.each(width,
            [&](int64_t i) { index[i] = i < count ? static_cast<int32_t>(start(i)) : INT32_MAX; });
  team.each(1, [&](int64_t) {
    static_cast<int32_t*>(op.count.data)[place.list] = static_cast<int32_t>(count);
  });
  if (op.table.data) {
    // Only the last page may reach beyond what can be listed
    const int64_t sinks = op.sink_tokens / op.block_k, pages = op.table.shape[3];
    int32_t* table = static_cast<int32_t*>(op.table.data) + place.list * pages;
    team.each(pages, [&](int64_t i) {
      const int64_t entry = i - sinks;
      table[i] = static_cast<int32_t>(entry < 0        ? i
                                      : entry >= count ? 0
                                                       : index[entry] / op.block_k);
    });
    team.each(1, [&](int64_t) {
      const int64_t end = place.end > 0 ? place.end : 0;
      int64_t keys = end < op.sink_tokens ? end : op.sink_tokens;
      if (count > 0) {
        const int64_t rest = end - index[count - 1];
        keys += (count - 1) * op.block_k + (rest < op.block_k ? rest : op.block_k);
      }
      static_cast<int32_t*>(op.length.data)[place.list] = static_cast<int32_t>(keys);
    });
  }
  if (!op.blocks.data) return;
  const int64_t words = op.blocks.shape[3];
  int32_t* bits = static_cast<int32_t*>(op.blocks.data) + place.list * words;
  // The first of the entries that fall into a word writes it
  team.each(count, [&](int64_t i) {
    const int64_t word = index[i] / op.block_k / 32;
    if (index[i] < 0 || word >= words) return;
    if (i > 0 && index[i - 1] / op.block_k / 32 == word) return;
    uint32_t found = 0;
    for (int64_t j = i; j < count && index[j] / op.block_k / 32 == word; ++j)
      found |= 1u << (index[j] / op.block_k & 31);
    bits[word] |= static_cast<int32_t>(found);
  });
}

// What `halves` needs of a slot of memory: intervals and their halves
inline int64_t hip_slot(const Hip& op) {
  return op.kind == Hip::kHalves ? 8 * op.index.shape[3] : op.most_chunks();
}

template <class Team, class Scorer>
HEDDLE_HD void hip_halves(const Team& team, const Hip& op, const HipPlace& place, Scorer& scorer,
                          uint32_t* slot, HipMemory& memory) {
  const int64_t width = op.index.shape[3], per_block = op.block_k / op.stride_k;
  const int64_t length = place.end - op.sink_tokens;
  const int64_t blocks = length > 0 ? (length + op.block_k - 1) / op.block_k : 0;
  const auto start = [&](int64_t block) { return op.sink_tokens + block * op.block_k; };
  if (blocks <= width) return hip_finish(team, op, place, blocks, start);

  int32_t* low = reinterpret_cast<int32_t*>(slot);
  int32_t *high = low + width, *from = high + width, *to = from + 2 * width;
  uint32_t* order = reinterpret_cast<uint32_t*>(to + 2 * width);
  team.each(width, [&](int64_t i) {
    low[i] = static_cast<int32_t>(i * blocks / width);
    high[i] = static_cast<int32_t>((i + 1) * blocks / width);
  });
  for (int64_t longest = (blocks + width - 1) / width; longest > 1; longest = (longest + 1) / 2) {
    team.each(2 * width, [&](int64_t i) {
      const int32_t a = low[i / 2], b = high[i / 2], middle = a + (b - a) / 2;
      from[i] = i % 2 ? middle : a;
      to[i] = i % 2 ? b : middle;
      order[i] = from[i] < to[i] ? kLeastOrder : kNoOrder;
    });
    const auto looked_at = [&](int64_t i) {
      return op.representative == Hip::kFirst ? from[i] : from[i] + (to[i] - from[i]) / 2;
    };
    const int64_t keys = 2 * width * per_block;
    for (int64_t head = 0; head < place.heads; ++head) {
      scorer.load(place.first_head + head);
      for (int64_t t = 0; t < keys; t += kHipTile) {
        team.each(kHipTile, [&](int64_t i) {
          const int64_t branch = (t + i) / per_block, offset = (t + i) % per_block;
          memory.keys[i] = -1;
          if (t + i >= keys || order[branch] == kNoOrder) return;
          const int64_t key = start(looked_at(branch)) + (offset + 1) * op.stride_k - 1;
          if (key < place.end) memory.keys[i] = static_cast<int32_t>(key);
        });
        scorer.score(memory);
        team.each(kHipTile, [&](int64_t i) {
          if (memory.keys[i] >= 0) team.raise(order[(t + i) / per_block], memory.best[i]);
        });
      }
    }
    const uint64_t least = hip_threshold(team, order, 2 * width, width, memory);
    team.compact(
        2 * width,
        [&](int64_t i) {
          return order[i] != kNoOrder &&
                 (static_cast<uint64_t>(order[i]) << 32 | ~static_cast<uint32_t>(i)) >= least;
        },
        [&](int64_t i, int64_t at) {
          low[at] = from[i];
          high[at] = to[i];
        });
  }
  hip_finish(team, op, place, width, [&](int64_t i) { return start(low[i]); });
}

// The chunks that a stage looks at
struct HipChunks {
  const int32_t* from;  // null for all of the keys
  int64_t first, size, pieces, count;
  HEDDLE_HD int64_t start(int64_t i) const {
    return from ? from[i / pieces] + i % pieces * size : first + i * size;
  }
};

HEDDLE_HD inline HipChunks hip_chunks(const Hip& op, const HipPlace& place) {
  HipChunks chunks{nullptr, op.sink_tokens, op.block_k, 1, 0};
  const int64_t length = place.end - op.sink_tokens;
  if (length <= 0) return chunks;
  if (!op.from_index.data) {
    chunks.count = (length + op.block_k - 1) / op.block_k;
    return chunks;
  }
  const int64_t rows = op.from_index.shape[2], width = op.from_index.shape[3];
  const int64_t list = place.list / op.index.shape[2] * rows + place.first / op.from_block_q;
  chunks.from = static_cast<int32_t*>(op.from_index.data) + list * width;
  chunks.pieces = op.from_block_k / op.block_k;
  int64_t listed = static_cast<int32_t*>(op.from_count.data)[list];
  listed = listed < 0 ? 0 : listed < width ? listed : width;
  // Those that begin too late are the last ones
  int64_t low = 0, high = listed * chunks.pieces;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (chunks.start(middle) < place.end) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  chunks.count = low;
  return chunks;
}

// Scores this member's share of the chunks, all heads of them, into `order`
template <class Team, class Scorer>
HEDDLE_HD void hip_descend(const Team& team, const Hip& op, const HipPlace& place,
                           const HipChunks& chunks, int64_t member, int64_t members, Scorer& scorer,
                           uint32_t* order, HipMemory& memory) {
  constexpr int kChunks = kHipTile / 2;
  const int64_t tiles = (chunks.count + kChunks - 1) / kChunks;
  for (int64_t item = member; item < tiles * place.heads; item += members) {
    const int64_t head = item / tiles, first = item % tiles * kChunks;
    scorer.load(place.first_head + head);
    team.each(kChunks, [&](int64_t i) {
      const bool exists = first + i < chunks.count;
      const int64_t start = exists ? chunks.start(first + i) : 0, end = start + op.block_k;
      memory.left[i] = static_cast<int32_t>(start);
      memory.right[i] = static_cast<int32_t>(!exists ? start : end < place.end ? end : place.end);
      memory.most[i] = kLeastOrder;
    });
    // The largest of all that a chunk's descent meets counts. A chunk of one key has no halves.
    for (int64_t size = op.block_k;; size /= 2) {
      team.each(kChunks, [&](int64_t i) {
        const int32_t left = memory.left[i], right = memory.right[i], middle = (left + right) / 2;
        const bool halves = right - left > 1;
        const bool single = right - left == 1 && size == op.block_k;
        memory.keys[2 * i] = halves ? (left + middle) / 2 : single ? left : -1;
        memory.keys[2 * i + 1] = halves ? (middle + right) / 2 : -1;
      });
      scorer.score(memory);
      team.each(kChunks, [&](int64_t i) {
        if (memory.keys[2 * i] < 0) return;
        const uint32_t a = memory.best[2 * i];
        const uint32_t b = memory.keys[2 * i + 1] < 0 ? kNoOrder : memory.best[2 * i + 1];
        const uint32_t larger = a < b ? b : a;
        if (larger > memory.most[i]) memory.most[i] = larger;
        const int32_t middle = (memory.left[i] + memory.right[i]) / 2;
        (a >= b ? memory.right[i] : memory.left[i]) = middle;
      });
      if (size <= 2) break;
    }
    team.each(kChunks, [&](int64_t i) {
      if (first + i < chunks.count) team.raise(order[first + i], memory.most[i]);
    });
  }
}

template <class Team>
HEDDLE_HD void hip_keep(const Team& team, const Hip& op, const HipPlace& place,
                        const HipChunks& chunks, const uint32_t* order, HipMemory& memory) {
  const int64_t width = op.index.shape[3];
  if (chunks.count <= width)
    return hip_finish(team, op, place, chunks.count, [&](int64_t i) { return chunks.start(i); });
  const uint64_t least = hip_threshold(team, order, chunks.count, width, memory);
  int32_t* index = static_cast<int32_t*>(op.index.data) + place.list * width;
  team.compact(
      chunks.count,
      [&](int64_t i) {
        return (static_cast<uint64_t>(order[i]) << 32 | ~static_cast<uint32_t>(i)) >= least;
      },
      [&](int64_t i, int64_t at) { index[at] = static_cast<int32_t>(chunks.start(i)); });
  hip_finish(team, op, place, width, [&](int64_t i) { return index[i]; });
}

}  // namespace heddle
