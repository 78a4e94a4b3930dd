#pragma once
#include "core/fetch.h"
#include "core/mask.h"
#include "core/select.h"
#include "ops/hip.h"

// The search of HiP by a team, for one list: a row of query blocks of one head, of the heads of a
// group, or of all. A team consists of squads: a CTA of warps, or one thread of the CPU of itself.
//
//   each(n, body)               calls body(i) for i < n, shared among its threads, and waits
//   share(n, body)              calls body(squad, i) for i < n, each by a squad, and waits; a squad
//                               has `each`, and `tile` to itself
//   raise(x, y)                 x = max(x, y) of a uint32_t, whoever does it at the same time
//   how_many(n, chosen)         are chosen of the i < n
//   compact(n, chosen, place)   place(i, at) of the i < n that are chosen, `at` counting them
//   kHasPeers                   whether teams search lists of the same rows side by side, of heads
//                               one after the other: then it has peers(), how many there are,
//                               peer(), which it is, and meet(), which waits for all; slots of
//                               peers stand one after the other, and their scorer is the same
//
// A scorer looks at keys, kHipTile at a time:
//
//   kNear                       whether rows may stand nearby, which it then looks for
//   heads()                     of how many heads it holds queries
//   load(head, n)               takes those of n heads from `head` on, unless they stand there
//   score(squad, i)             best[j] of the squad's tile becomes the order of the largest
//                               product of the i-th of those heads with keys[j], unless that is
//                               negative
//   score_each(squad, n, put)   the same for n heads: put(i, j, order)
//
// Where rows of k stand nearby, squads look them up, for which they also have `take`, as
// core/fetch.h says, and `put(x, value)`: x = value, as others may do at the same time.
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

struct HipTile {
  int32_t keys[kHipTile];
  int32_t positions[kHipTile];  // of keys that turn
  // Before a key is scored, where it stands nearby, ~0 for a key that does not
  uint32_t best[kHipTile];
  int32_t left[kHipTile / 2], right[kHipTile / 2];  // of a chunk's descent
  uint32_t most[kHipTile / 2];
};

// Of a power of two
HEDDLE_HD inline int hip_log2(int64_t x) {
  int bits = 0;
  while (x >> bits > 1) ++bits;
  return bits;
}

// Keys that a sequence may have
HEDDLE_HD inline int64_t hip_keys(const Hip& op) {
  return op.block_table.data ? op.block_table.shape[1] * op.k.shape[1] : op.k.shape[1];
}

// One list
struct HipPlace {
  int64_t b, head, row;       // of index
  int64_t first_head, heads;  // query heads that share it
  int64_t sequence;           // of those that are packed, and where it begins
  int64_t first_query, first_key;
  int64_t first, last;  // queries, the last excluded
  int64_t ahead;        // where query 0 stands
  int64_t end;          // behind the last key that can be listed
  int64_t list;         // index of the list among all
  int64_t chunks;       // that a stage looks at
};

// The packed sequence that a row belongs to, and how many queries and keys it has; of a row that
// none has use of, queries end before it
HEDDLE_HD inline void hip_sequence(const Hip& op, HipPlace& place, int64_t& queries,
                                   int64_t& keys) {
  const auto offset = [](const Tensor& cu, int64_t i, int64_t total) {
    const int64_t own = static_cast<int32_t*>(cu.data)[i];
    return own < 0 ? 0 : own < total ? own : total;
  };
  const auto begins = [&](int64_t i) { return offset(op.cu_seqlens_q, i, queries); };
  int64_t from = 0, to = op.cu_seqlens_q.shape[0] - 1;
  while (to - from > 1) {
    const int64_t middle = (from + to) / 2;
    (first_block_row(begins(middle), middle, op.block_q) <= place.row ? from : to) = middle;
  }
  place.sequence = from;
  place.first_query = begins(from);
  place.first_key = offset(op.cu_seqlens_k, from, keys);
  place.first = (place.row - first_block_row(place.first_query, from, op.block_q)) * op.block_q;
  queries = begins(from + 1) - place.first_query;
  keys = offset(op.cu_seqlens_k, from + 1, keys) - place.first_key;
  // The caller's tables have a row for each key of the longest; offsets that are wrong end there
  if (op.cos.data && keys > op.cos.shape[0]) keys = op.cos.shape[0];
}

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
  place.sequence = place.first_query = place.first_key = 0;
  int64_t keys = hip_keys(op), queries = op.q.shape[1];
  if (op.cu_seqlens_q.data) hip_sequence(op, place, queries, keys);
  place.last = place.first + op.block_q < queries ? place.first + op.block_q : queries;
  if (op.cache_seqlens.data) {
    const int64_t own =
        static_cast<int32_t*>(op.cache_seqlens.data)[place.b * op.cache_seqlens.strides[0]];
    keys = own < 0 ? 0 : own < keys ? own : keys;
  }
  place.ahead = keys - queries;
  place.end = place.first < place.last ? place.ahead + place.last - op.window : 0;
  place.list = (place.b * lists + place.head) * rows + place.row;
  place.chunks = 0;
  return place;
}

// Ranks are all different: of equal scores the lower index comes first. 0 is none.
HEDDLE_HD inline uint64_t hip_rank(uint32_t order, int64_t i) {
  return order == kNoOrder ? 0 : static_cast<uint64_t>(order) << 32 | ~static_cast<uint32_t>(i);
}

// Where a query is taken to stand when it turns
HEDDLE_HD inline int64_t hip_query_position(const Hip& op, const HipPlace& place, int64_t query) {
  const int64_t stands = place.ahead + query, most = place.chunks + op.window;
  const int64_t own = stands > 0 ? stands : 0;  // lengths may be wrong
  switch (op.positions) {
    case Hip::kStreaming:
      return own < most ? own : most;
    case Hip::kRelative:
      return op.window + 1;
    case Hip::kInfllm:
      return op.window;
    default:
      return own;
  }
}

// And where a key does, which stands for the left or right half of what is left of a chunk
template <class Op>
HEDDLE_HD int64_t hip_key_position(const Op& op, const HipPlace& place, int64_t key, int64_t chunk,
                                   bool right) {
  constexpr int64_t kNear = 8192, kGroup = 16;  // self_extend: keys that stay, keys that are one
  const int64_t first = place.ahead + place.first, last = place.ahead + place.last - 1;
  const int64_t away = last - key, near = op.context / 4;
  switch (op.positions) {
    case Hip::kStreaming:
      return chunk;
    case Hip::kRelative:
      return right;
    case Hip::kInfllm:
      return 0;
    case Hip::kSelfExtend: {
      if (away <= kNear || last <= op.context) return key;
      // Rounded down, where a key stands before the block as well
      const int64_t grouped = first - (first - key + kGroup - 1) / kGroup;
      return grouped > 0 ? grouped : 0;
    }
    case Hip::kDynamicExtend:
      // The distance to the first key becomes the context
      if (away <= near || last <= op.context) return key;
      return last - near - (away - near) * (op.context - near) / (last - near);
    default:
      return key;
  }
}

// The rank that `wanted` of the n reach, found bit by bit; scores without ties take few of them
template <class Team>
HEDDLE_HD uint64_t hip_threshold(const Team& team, const uint32_t* order, int64_t n,
                                 int64_t wanted) {
  uint32_t score = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t next = score | uint32_t{1} << bit;
    const int64_t found = team.how_many(n, [&](auto i) { return order[i] >= next; });
    if (found >= wanted) score = next;
    if (found == wanted) return uint64_t{score} << 32;
  }
  if (score == kNoOrder) return 0;
  uint64_t least = uint64_t{score} << 32;
  for (int bit = 31; bit >= 0; --bit) {
    const uint64_t next = least | uint64_t{1} << bit;
    const int64_t found = team.how_many(n, [&](auto i) { return hip_rank(order[i], i) >= next; });
    if (found >= wanted) least = next;
    if (found == wanted) break;
  }
  return least;
}

// Writes a list whose i-th entry is start(i), with its bits and its pages
template <class Team, class Start>
HEDDLE_HD void hip_finish(const Team& team, const Hip& op, const HipPlace& place, int64_t count,
                          const Start& start) {
  const int64_t width = op.index.shape[3], sinks = op.sink_tokens / op.block_k;
  const int64_t pages = op.table.data ? op.table.shape[3] : 0;
  const int64_t words = op.blocks.data ? op.blocks.shape[3] : 0;
  const int shift = hip_log2(op.block_k);
  int32_t* index = static_cast<int32_t*>(op.index.data) + place.list * width;
  int32_t* table = static_cast<int32_t*>(op.table.data) + place.list * pages;
  int32_t* bits = static_cast<int32_t*>(op.blocks.data) + place.list * words;
  if (words > 0) team.each(words, [&](int64_t i) { bits[i] = 0; });
  const auto word_of = [&](int64_t i) { return static_cast<int64_t>(start(i)) >> shift >> 5; };
  team.each(pages > width ? pages : width, [&](int64_t i) {
    if (i < width) index[i] = i < count ? static_cast<int32_t>(start(i)) : INT32_MAX;
    // Only the last page may reach beyond what can be listed
    if (i < pages) {
      const int64_t entry = i - sinks;
      table[i] = static_cast<int32_t>(entry < 0 ? i : entry < count ? start(entry) >> shift : 0);
    }
    // The first of the entries that fall into a word writes it
    const int64_t word = i < count ? word_of(i) : words;
    if (word >= 0 && word < words && (i == 0 || word_of(i - 1) != word)) {
      uint32_t found = 0;
      for (int64_t j = i; j < count && word_of(j) == word; ++j)
        found |= 1u << (static_cast<int64_t>(start(j)) >> shift & 31);
      bits[word] = static_cast<int32_t>(found);
    }
    if (i > 0) return;
    static_cast<int32_t*>(op.count.data)[place.list] = static_cast<int32_t>(count);
    if (pages == 0) return;
    const int64_t end = place.end > 0 ? place.end : 0;
    int64_t keys = end < op.sink_tokens ? end : op.sink_tokens;
    if (count > 0) {
      const int64_t rest = end - start(count - 1);
      keys += (count - 1) * op.block_k + (rest < op.block_k ? rest : op.block_k);
    }
    static_cast<int32_t*>(op.length.data)[place.list] = static_cast<int32_t>(keys);
  });
}

// Which of a tile's keys stand nearby
template <class Squad> HEDDLE_HD void hip_look_up(const Squad& squad, const Hip& op, int64_t head) {
  if (!op.near.data) return;
  const int64_t hk = op.k.shape[2], kv = head / (op.q.shape[2] / hk);
  auto* counts = static_cast<unsigned long long*>(op.near_counts.data);
  auto* missed = static_cast<int32_t*>(op.missed.data);
  squad.each(kHipTile, [&](int64_t i) {
    const int64_t key = squad.tile.keys[i];
    if (key < 0) return;
    const auto row = static_cast<int32_t>(key * hk + kv);
    const int32_t slot = static_cast<int32_t*>(op.near_places.data)[row];
    const bool stands = slot >= 0 && slot < op.near.shape[0];
    squad.tile.best[i] = stands ? static_cast<uint32_t>(slot) : ~0u;
    if (stands) {
      squad.put(static_cast<FetchSlot*>(op.near_slots.data)[slot].wanted,
                static_cast<int32_t>(counts[Fetch::kTime]));
      squad.take(counts[Fetch::kFound]);
    } else {
      const int64_t at = squad.take(missed[0]);
      if (at >= 0 && at < op.near.shape[0]) missed[1 + at] = row;
    }
  });
}

// What `halves` needs of a slot of memory: intervals and their halves
constexpr int64_t kHalvesWords = 6;  // for each block of a list
inline int64_t hip_slot(const Hip& op) {
  return op.kind == Hip::kHalves ? kHalvesWords * op.index.shape[3] : op.most_chunks();
}

// Of blocks
struct HipInterval {
  int32_t from, to;
};

template <class Team, class Scorer>
HEDDLE_HD void hip_halves(const Team& team, const Hip& op, const HipPlace& place, Scorer& scorer,
                          uint32_t* slot) {
  const int64_t width = op.index.shape[3];
  const int block_log2 = hip_log2(op.block_k), per_block = hip_log2(op.block_k / op.stride_k);
  const int64_t length = place.end - op.sink_tokens;
  const int64_t blocks = length > 0 ? (length + op.block_k - 1) / op.block_k : 0;
  const auto start = [&](int64_t block) { return op.sink_tokens + block * op.block_k; };
  if (blocks <= width) return hip_finish(team, op, place, blocks, start);

  HipInterval *kept = reinterpret_cast<HipInterval*>(slot), *next = kept + width;
  uint32_t* order = slot + 4 * width;
  team.each(width, [&](int64_t i) {
    kept[i] = {static_cast<int32_t>(i * blocks / width),
               static_cast<int32_t>((i + 1) * blocks / width)};
  });
  // Peers begin with the same intervals: each looks at its share of them for all
  bool shares = Team::kHasPeers;
  for (int64_t longest = (blocks + width - 1) / width; longest > 1; longest = (longest + 1) / 2) {
    const auto half = [&](auto i) {
      const HipInterval whole = kept[i / 2];
      const int32_t middle = whole.from + (whole.to - whole.from) / 2;
      return i % 2 ? HipInterval{middle, whole.to} : HipInterval{whole.from, middle};
    };
    team.each(2 * width, [&](int64_t i) {
      const HipInterval own = half(i);
      order[i] = own.from < own.to ? kLeastOrder : kNoOrder;
    });
    // Keys are below 2^30
    const auto keys = static_cast<int32_t>(2 * width << per_block),
               stride = static_cast<int32_t>(op.stride_k), end = static_cast<int32_t>(place.end),
               skipped = static_cast<int32_t>(op.sink_tokens);
    const int64_t tiles = (keys + kHipTile - 1) / kHipTile;
    for (int64_t head = 0; head < place.heads; head += scorer.heads()) {
      const int64_t rest = place.heads - head, held = rest < scorer.heads() ? rest : scorer.heads();
      int64_t items = tiles * held;
      if constexpr (Team::kHasPeers) {
        if (shares) items = (tiles - team.peer() + team.peers() - 1) / team.peers();
        scorer.load(place.first_head - team.peer(), team.peers());
      } else {
        scorer.load(place.first_head + head, held);
      }
      // Heads that look at the same keys come one after the other
      team.share(items, [&](const auto& squad, int64_t item) {
        int64_t of_tile = held > 1 ? item / held : item, own_head = item - of_tile * held;
        if constexpr (Team::kHasPeers) {
          if (shares) of_tile = team.peer() + item * team.peers();
          own_head = team.peer();
        }
        const int32_t first = static_cast<int32_t>(of_tile) * kHipTile;
        HipTile& tile = squad.tile;
        squad.each(kHipTile, [&](auto i) {
          const int32_t at = first + static_cast<int32_t>(i), branch = at >> per_block;
          tile.keys[i] = -1;
          if (at >= keys || order[branch] == kNoOrder) return;
          const HipInterval own = half(branch);
          const int32_t block =
              op.representative == Hip::kFirst ? own.from : own.from + (own.to - own.from) / 2;
          const int32_t offset = at & ((1 << per_block) - 1);
          const int32_t key = skipped + (block << block_log2) + (offset + 1) * stride - 1;
          if (key < end) tile.keys[i] = key;
        });
        if constexpr (Team::kHasPeers)
          if (shares)
            return scorer.score_each(squad, team.peers(), [&](int i, int j, uint32_t best) {
              uint32_t* to = order + (i - team.peer()) * kHalvesWords * width;
              if (tile.keys[j] >= 0) team.raise(to[(first + j) >> per_block], best);
            });
        if constexpr (Scorer::kNear) hip_look_up(squad, op, place.first_head + head + own_head);
        scorer.score(squad, own_head);
        squad.each(kHipTile, [&](auto i) {
          if (tile.keys[i] >= 0)
            team.raise(order[(first + static_cast<int32_t>(i)) >> per_block], tile.best[i]);
        });
      });
    }
    if constexpr (Team::kHasPeers)
      if (shares) team.meet();
    shares = false;
    const uint64_t least = hip_threshold(team, order, 2 * width, width);
    team.compact(
        2 * width,
        [&](int64_t i) { return order[i] != kNoOrder && hip_rank(order[i], i) >= least; },
        [&](int64_t i, int64_t at) { next[at] = half(i); });
    HipInterval* const old = kept;
    kept = next;
    next = old;
  }
  hip_finish(team, op, place, width, [&](int64_t i) { return start(kept[i].from); });
}

// The chunks that a stage looks at
struct HipChunks {
  const int32_t* from;  // null for all of the keys
  int64_t first, size, count;
  int pieces;  // log2 of how many a listed one is cut into
  HEDDLE_HD int64_t start(int64_t i) const {
    return from ? from[i >> pieces] + (i & ((int64_t{1} << pieces) - 1)) * size : first + i * size;
  }
};

HEDDLE_HD inline HipChunks hip_chunks(const Hip& op, const HipPlace& place) {
  HipChunks chunks{nullptr, op.sink_tokens, op.block_k, 0, 0};
  const int64_t length = place.end - op.sink_tokens;
  if (length <= 0) return chunks;
  if (!op.from_index.data) {
    chunks.count = (length + op.block_k - 1) / op.block_k;
    return chunks;
  }
  const int64_t rows = op.from_index.shape[2], width = op.from_index.shape[3];
  const int64_t begins = first_block_row(place.first_query, place.sequence, op.from_block_q);
  const int64_t list =
      place.list / op.index.shape[2] * rows + begins + place.first / op.from_block_q;
  chunks.from = static_cast<int32_t*>(op.from_index.data) + list * width;
  chunks.pieces = hip_log2(op.from_block_k / op.block_k);
  int64_t listed = static_cast<int32_t*>(op.from_count.data)[list];
  listed = listed < 0 ? 0 : listed < width ? listed : width;
  // Those that begin too late are the last ones, and few
  chunks.count = listed << chunks.pieces;
  while (chunks.count > 0 && chunks.start(chunks.count - 1) >= place.end) --chunks.count;
  return chunks;
}

// Scores this member's share of the chunks, all heads of them, into `order`
template <class Team, class Scorer>
HEDDLE_HD void hip_descend(const Team& team, const Hip& op, const HipPlace& place,
                           const HipChunks& chunks, int64_t member, int64_t members, Scorer& scorer,
                           uint32_t* order) {
  constexpr int kChunks = kHipTile / 2;
  const int64_t tiles = (chunks.count + kChunks - 1) / kChunks;
  // Members take different heads, and share their chunks where they are more
  const int64_t most = scorer.heads(), sets = (place.heads + most - 1) / most;
  const int64_t ways = members < sets ? 1 : members / sets, way = member % ways;
  for (int64_t set = member / ways; set < sets; set += members / ways) {
    const int64_t rest = place.heads - set * most, held = rest < most ? rest : most;
    scorer.load(place.first_head + set * most, held);
    team.share((tiles * held - way + ways - 1) / ways, [&](const auto& squad, int64_t i) {
      const int64_t item = way + i * ways, first = item / held * kChunks;
      HipTile& tile = squad.tile;
      squad.each(kChunks, [&](int64_t i) {
        const bool exists = first + i < chunks.count;
        const int64_t start = exists ? chunks.start(first + i) : 0, end = start + op.block_k;
        tile.left[i] = static_cast<int32_t>(start);
        tile.right[i] = static_cast<int32_t>(!exists ? start : end < place.end ? end : place.end);
        tile.most[i] = kLeastOrder;
      });
      // The largest of all that a chunk's descent meets counts. A chunk of one key has no halves.
      for (int64_t size = op.block_k;; size /= 2) {
        squad.each(kChunks, [&](int64_t i) {
          const int32_t left = tile.left[i], right = tile.right[i], middle = (left + right) / 2;
          const bool halves = right - left > 1;
          const bool single = right - left == 1 && size == op.block_k;
          tile.keys[2 * i] = halves ? (left + middle) / 2 : single ? left : -1;
          tile.keys[2 * i + 1] = halves ? (middle + right) / 2 : -1;
          for (int side = 0; op.cos.data && side < 2; ++side)
            tile.positions[2 * i + side] = static_cast<int32_t>(
                hip_key_position(op, place, tile.keys[2 * i + side], first + i, side == 1));
        });
        if constexpr (Scorer::kNear)
          hip_look_up(squad, op, place.first_head + set * most + item % held);
        scorer.score(squad, item % held);
        squad.each(kChunks, [&](int64_t i) {
          if (tile.keys[2 * i] < 0) return;
          const uint32_t a = tile.best[2 * i];
          const uint32_t b = tile.keys[2 * i + 1] < 0 ? kNoOrder : tile.best[2 * i + 1];
          const uint32_t larger = a < b ? b : a;
          if (larger > tile.most[i]) tile.most[i] = larger;
          const int32_t middle = (tile.left[i] + tile.right[i]) / 2;
          (a >= b ? tile.right[i] : tile.left[i]) = middle;
        });
        if (size <= 2) break;
      }
      squad.each(kChunks, [&](int64_t i) {
        if (first + i < chunks.count) team.raise(order[first + i], tile.most[i]);
      });
    });
  }
}

template <class Team>
HEDDLE_HD void hip_keep(const Team& team, const Hip& op, const HipPlace& place,
                        const HipChunks& chunks, const uint32_t* order) {
  const int64_t width = op.index.shape[3];
  if (chunks.count <= width)
    return hip_finish(team, op, place, chunks.count, [&](int64_t i) { return chunks.start(i); });
  const uint64_t least = hip_threshold(team, order, chunks.count, width);
  int32_t* index = static_cast<int32_t*>(op.index.data) + place.list * width;
  team.compact(
      chunks.count, [&](int64_t i) { return hip_rank(order[i], i) >= least; },
      [&](int64_t i, int64_t at) { index[at] = static_cast<int32_t>(chunks.start(i)); });
  hip_finish(team, op, place, width, [&](int64_t i) { return index[i]; });
}

// One list as HipPlaces has it
template <class Team>
HEDDLE_HD void hip_place_slots(const Team& team, const HipPlaces& op, int64_t list) {
  const int64_t rows = op.index.shape[2], width = op.index.shape[3], pages = op.table.shape[3];
  const int64_t sinks = op.sink_tokens / op.block_k, slots = pages * op.block_k;
  const int shift = hip_log2(op.block_k);
  const int32_t* index = static_cast<const int32_t*>(op.index.data) + list * width;
  const int64_t given = static_cast<const int32_t*>(op.count.data)[list];
  const int64_t count = given < 0 ? 0 : given < width ? given : width;
  HipPlace place{};
  place.first = list % rows * op.block_q;
  place.last = place.first + op.block_q < op.sq ? place.first + op.block_q : op.sq;
  place.ahead = op.sk - op.sq;
  const int64_t first = place.ahead + place.first;  // of the block's queries

  int32_t* table = static_cast<int32_t*>(op.table.data) + list * pages;
  team.each(pages, [&](int64_t i) {
    const int64_t page = i < sinks ? i : i - sinks < count ? index[i - sinks] >> shift : 0;
    // Nobody sees one that does not exist as a whole
    table[i] = static_cast<int32_t>((page + 1) << shift <= op.sk ? page : 0);
  });
  int32_t* places = static_cast<int32_t*>(op.places.data) + list * slots;
  team.each(slots, [&](int64_t i) {
    const int64_t key = (int64_t{table[i >> shift]} << shift) + (i & (op.block_k - 1));
    int64_t at = 0;
    if (op.positions == Hip::kStreaming) {
      at = i + first - op.window + 1 - op.sink_tokens - (count << shift);
    } else if (op.positions == Hip::kInfllm) {
      at = first - op.window;
    } else {
      at = hip_key_position(op, place, key, 0, false);
    }
    places[i] = static_cast<int32_t>(i < op.sink_tokens + (count << shift) && at > 0 ? at : 0);
  });
  int32_t* bounds = static_cast<int32_t*>(op.bounds.data) + list * op.block_q * 2;
  team.each(op.block_q, [&](int64_t i) {
    const int64_t end = place.first + i < place.last ? first + i - op.window + 1 : 0;
    int64_t seen = end <= 0 ? 0 : end < op.sink_tokens ? end : op.sink_tokens, listed = count;
    while (listed > 0 && index[listed - 1] >= end) --listed;
    if (listed > 0) {
      const int64_t rest = end - index[listed - 1];
      seen += ((listed - 1) << shift) + (rest < op.block_k ? rest : op.block_k);
    }
    bounds[2 * i] = 0;
    bounds[2 * i + 1] = static_cast<int32_t>(seen);
  });
}

}  // namespace heddle
