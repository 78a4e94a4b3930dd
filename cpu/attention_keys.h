#pragma once
#include <bit>

#include "cpu/attention.h"
#include "cpu/multiply.h"

// The iteration space of TileKernel: which tiles of keys a part visits, and which keys of a tile
// each row sees, one bit per key. A policy has
//
//   each(body)         calls body(tile, next) for every tile to visit; `next` may be prefetched
//   look(rows, tile)   what rows of the part see of the tile
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace attention {

// Up to kTileKeys keys: a run of them, or single ones in ascending order
struct KeyTile {
  Range range;
  const int32_t* list = nullptr;  // null for a run
  int64_t count() const { return range.end - range.begin; }
  int64_t key(int64_t i) const { return list ? list[i] : range.begin + i; }
};

// The keys of a tile that a panel has to visit, and whether some row does not see some of them;
// bit i of a word then tells whether that row sees key i of the tile
struct Look {
  int64_t first, last;
  bool masked;
};

// A run of keys per row: everything, causality, a window
template <class T> class RunKeys {
 public:
  RunKeys(const Problem<T>& problem, const Part& part) : problem_(problem), part_(part) {}

  template <class Body> void each(const Body& body) const {
    const Range keys = part_.keys;
    for (int64_t t = keys.begin; t < keys.end; t += kTileKeys) {
      const int64_t end = std::min(t + kTileKeys, keys.end);
      body(KeyTile{{t, end}}, Range{end, std::min(end + kTileKeys, keys.end)});
    }
  }

  // Bounds of a panel's rows are kept, as they do not depend on the tile
  struct Panel {
    Range any, all;  // keys that at least one row sees; keys that all rows see
    Range seen[kTileCols];
  };
  void start(Panel& panel, const int64_t* rows, int64_t count) const {
    panel.any = {part_.keys.end, part_.keys.begin};
    panel.all = part_.keys;
    for (int64_t i = 0; i < count; ++i) {
      const Range seen = panel.seen[i] = problem_.visible(part_, rows[i]);
      panel.any = {std::min(panel.any.begin, seen.begin), std::max(panel.any.end, seen.end)};
      panel.all = {std::max(panel.all.begin, seen.begin), std::min(panel.all.end, seen.end)};
    }
  }
  Look look(const Panel& panel, const KeyTile& tile, int64_t count, uint64_t* words) const {
    const Range keys{std::max(tile.range.begin, panel.any.begin),
                     std::min(tile.range.end, panel.any.end)};
    const bool masked = keys.begin < panel.all.begin || keys.end > panel.all.end;
    const int64_t t0 = tile.range.begin;
    if (masked && keys.begin < keys.end)
      for (int64_t i = 0; i < count; ++i)
        words[i] = bit_range(panel.seen[i].begin - t0, panel.seen[i].end - t0);
    return {keys.begin - t0, keys.end - t0, masked};
  }

 private:
  const Problem<T>& problem_;
  const Part& part_;
};

// A mask. Tiles that no row of the part sees anything of are not visited; keys that only column
// lists name are gathered, so that their cost is their number and not that of the tiles they stand
// in.
template <class T> class MaskKeys {
 public:
  MaskKeys(const Problem<T>& problem, const Part& part) : part_(part), mask_(problem.mask) {
    for (int64_t row = 0; row < part.rows; ++row) rows_.push_back(problem.masked(part, row));
    // Rows that share their lists, with what bounds them all
    for (const MaskRow& row : rows_) {
      const auto same = [&](const Lists& lists) {
        return lists.row.blocks == row.blocks && lists.row.columns == row.columns &&
               lists.row.diagonals == row.diagonals;
      };
      auto found = std::find_if(lists_.begin(), lists_.end(), same);
      if (found == lists_.end())
        found = lists_.insert(found, {row, {row.position, row.position}, {row.begin, row.end}});
      found->positions = {std::min(found->positions.begin, row.position),
                          std::max(found->positions.end, row.position)};
      found->keys = {std::min(found->keys.begin, row.begin), std::max(found->keys.end, row.end)};
      list_of_.push_back(static_cast<size_t>(found - lists_.begin()));
    }
  }

  template <class Body> void each(const Body& body) {
    const Range keys = part_.keys;
    for (int64_t t = keys.begin; t < keys.end; t += kTileKeys) {
      const Range tile{t, std::min(t + kTileKeys, keys.end)};
      uint64_t columns = 0;
      bool visit = false;
      for (const Lists& lists : lists_) {
        visit |= touches(lists, tile);
        if (lists.row.columns)
          columns |= bits_at(lists.row.columns, mask_.token_words, t) &
                     bit_range(lists.keys.begin - t, std::min(lists.keys.end, tile.end) - t);
      }
      // Most of a tile is cheaper to load as it stands
      if (visit || std::popcount(columns) > kTileKeys / 2) {
        body(KeyTile{tile}, Range{0, 0});
        continue;
      }
      for (; columns; columns &= columns - 1)
        gathered_.push_back(static_cast<int32_t>(t + std::countr_zero(columns)));
    }
    const auto total = static_cast<int64_t>(gathered_.size());
    for (int64_t i = 0; i < total; i += kTileKeys) {
      const int32_t* list = gathered_.data() + i;
      const int64_t count = std::min(kTileKeys, total - i);
      for (Lists& lists : lists_) {
        lists.named = 0;
        for (int64_t j = 0; lists.row.columns && j < count; ++j)
          lists.named |= (bits_at(lists.row.columns, mask_.token_words, list[j]) & 1) << j;
      }
      body(KeyTile{{0, count}, list}, Range{0, 0});
    }
  }

  struct Panel {
    int64_t rows[kTileCols];
  };
  void start(Panel& panel, const int64_t* rows, int64_t count) const {
    std::copy_n(rows, count, panel.rows);
  }
  Look look(const Panel& panel, const KeyTile& tile, int64_t count, uint64_t* words) const {
    const uint64_t whole = bit_range(0, tile.count());
    uint64_t any = 0, all = whole;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = panel.rows[i];
      const MaskRow& mask_row = rows_[static_cast<size_t>(row)];
      words[i] = (tile.list ? gathered(mask_row, lists_[list_of_[static_cast<size_t>(row)]], tile)
                            : mask_.seen(mask_row, tile.range.begin)) &
                 whole;
      any |= words[i];
      all &= words[i];
    }
    if (!any) return {0, 0, false};
    const int64_t first = std::countr_zero(any), last = 64 - std::countl_zero(any);
    const uint64_t visited = bit_range(first, last);
    return {first, last, (all & visited) != visited};
  }

 private:
  struct Lists {
    MaskRow row;
    Range positions;     // first and last
    Range keys;          // that bounds and causality leave to some row
    uint64_t named = 0;  // keys of the gathered tile that stand in its columns
  };

  // Whether a row may see a key of the tile otherwise than by its columns; may say yes too often
  bool touches(const Lists& lists, Range tile) const {
    const Range keys{std::max(lists.keys.begin, tile.begin), std::min(lists.keys.end, tile.end)};
    if (keys.begin >= keys.end) return false;
    const MaskRow& row = lists.row;
    if (keys.begin < mask_.sink_tokens) return true;
    if (mask_.window > 0 && keys.end > lists.positions.begin - mask_.window + 1 &&
        keys.begin <= lists.positions.end)
      return true;
    if (row.blocks && mask_.block_bits(row, tile.begin) &
                          bit_range(keys.begin - tile.begin, keys.end - tile.begin))
      return true;
    if (row.diagonals) {
      const Range distances{std::max<int64_t>(lists.positions.begin - keys.end + 1, 0),
                            lists.positions.end - keys.begin + 1};
      for (int64_t at = distances.begin; at < distances.end; at += 64)
        if (bits_at(row.diagonals, mask_.token_words, at) & bit_range(0, distances.end - at))
          return true;
    }
    return false;
  }

  uint64_t gathered(const MaskRow& row, const Lists& lists, const KeyTile& tile) const {
    const auto below = [&](int64_t key) {
      return std::lower_bound(tile.list, tile.list + tile.count(), key) - tile.list;
    };
    return lists.named & bit_range(below(row.begin), below(row.end));
  }

  const Part& part_;
  const MaskView& mask_;
  std::vector<MaskRow> rows_;
  std::vector<Lists> lists_;
  std::vector<size_t> list_of_;
  std::vector<int32_t> gathered_;
};

}  // namespace attention
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
