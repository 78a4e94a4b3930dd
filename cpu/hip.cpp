#include "core/hip.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/cpu_context.h"
#include "core/registry.h"
#include "cpu/half.h"
#include "cpu/product.h"
#include "cpu/team.h"

// A list per task. Queries stand in the lanes and keys are gathered a tile at a time.
namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

// A team of one, which is its own squad
struct HipTeam : Alone {
  static constexpr bool kHasPeers = false;
  HipTile& tile;

  template <class X> X take(X& x) const { return std::atomic_ref(x).fetch_add(1); }
  void put(int32_t& x, int32_t value) const { std::atomic_ref(x).store(value); }
  template <class Body> void share(int64_t n, const Body& body) const {
    each(n, [&](int64_t i) { body(*this, i); });
  }
  template <class Chosen> int64_t how_many(int64_t n, const Chosen& chosen) const {
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) found += chosen(i);
    return found;
  }
};

template <class T> class Scorer {
 public:
  Scorer(const Hip& op, const HipPlace& place)
      : op_(op),
        place_(place),
        d_(op.q.shape[3]),
        page_(op.block_table ? op.k.shape[1] : 1),
        q_(static_cast<size_t>(d_ * padded(op.block_q))),
        lines_(static_cast<size_t>(d_ * padded(op.block_q))),
        k_(static_cast<size_t>(d_ * kHipTile)),
        scores_(static_cast<size_t>(kHipTile * padded(op.block_q))) {}

  static constexpr bool kNear = true;
  int64_t heads() const { return 1; }
  void load(int64_t head, int64_t) {
    if (head == head_) return;
    head_ = head;
    limits_.clear();
    std::fill(lines_.begin(), lines_.end(), 0.f);
    const T* q = op_.q.as<T>() + place_.b * op_.q.strides[0] + head * op_.q.strides[2];
    const auto line = [&] { return lines_.data() + static_cast<int64_t>(limits_.size()) * d_; };
    const auto load_q = [&](float* to, int64_t query) {
      load_row(to, q + (place_.first_query + query) * op_.q.strides[1], op_.q.strides[3], d_);
    };
    const int64_t stride = op_.stride_q;
    if (op_.kind == Hip::kHalves) {
      const auto take = [&](int64_t query) {
        load_q(line(), query);
        limits_.push_back(place_.ahead + query - op_.window);
      };
      for (int64_t i = place_.first + stride - 1; i < place_.last; i += stride) take(i);
      if (limits_.empty()) take(place_.last - 1);
    } else {
      std::vector<float> own(static_cast<size_t>(d_));
      for (int64_t i = place_.first; i < place_.last; i += stride) {
        const int64_t end = std::min(i + stride, place_.last);
        float* mean = line();
        for (int64_t query = i; query < end; ++query) {
          load_q(own.data(), query);
          turn(own.data(), hip_query_position(op_, place_, query));
          for (int64_t e = 0; e < d_; ++e) mean[e] += own[static_cast<size_t>(e)];
        }
        for (int64_t e = 0; e < d_; ++e)
          mean[e] = to_float(from_float<T>(mean[e] / static_cast<float>(end - i)));
        limits_.push_back(place_.end);
      }
    }
    width_ = padded(static_cast<int64_t>(limits_.size()));
    transpose(q_.data(), width_, lines_.data(), d_, width_, d_);
    k_head_ = op_.k.as<T>() + head / (op_.q.shape[2] / op_.k.shape[2]) * op_.k.strides[2];
  }

  void score(const HipTeam& team, int64_t) {
    HipTile& tile = team.tile;
    int64_t slots[kHipTile], count = 0;
    for (int64_t i = 0; i < kHipTile; ++i) {
      if (tile.keys[i] < 0) continue;
      float* row = k_.data() + count * d_;
      load_row(row, key(tile.keys[i], tile.best[i]), op_.k.strides[3], d_);
      if (op_.cos) {
        turn(row, tile.positions[i]);
        for (int64_t e = 0; e < d_; ++e) row[e] = to_float(from_float<T>(row[e]));
      }
      slots[count++] = i;
    }
    product(scores_.data(), width_, count, width_, d_, k_.data(), d_, 1, q_.data(), width_,
            nullptr);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t best = kLeastOrder;
      for (size_t r = 0; r < limits_.size(); ++r)
        if (tile.keys[slots[i]] <= limits_[r])
          best = std::max(best, order_of(scores_[static_cast<size_t>(i * width_) + r]));
      tile.best[slots[i]] = best;
    }
  }

 private:
  // Rotary embedding, of i with i + d / 2
  void turn(float* row, int64_t position) const {
    if (!op_.cos) return;
    const int64_t half = d_ / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float c = op_.cos.as<float>()[position * half + i];
      const float s = op_.sin.as<float>()[position * half + i];
      const float a = row[i], b = row[half + i];
      row[i] = a * c - b * s;
      row[half + i] = b * c + a * s;
    }
  }
  // A slot is one nearby
  const T* key(int64_t t, uint32_t slot) const {
    if (op_.near && ~slot) return op_.near.as<T>() + slot * d_;
    if (!op_.block_table)
      return k_head_ + place_.b * op_.k.strides[0] + (place_.first_key + t) * op_.k.strides[1];
    const Tensor& table = op_.block_table;
    const int64_t page =
        table.as<int32_t>()[place_.b * table.strides[0] + t / page_ * table.strides[1]];
    HEDDLE_CHECK(page >= 0 && page < op_.k.shape[0], kArgument, "blockTable",
                 "blockTable must name one of ", op_.k.shape[0],
                 " pages where keys are in use, got ", page);
    return k_head_ + page * op_.k.strides[0] + t % page_ * op_.k.strides[1];
  }

  const Hip& op_;
  const HipPlace& place_;
  const int64_t d_, page_;
  std::vector<float> q_, lines_, k_, scores_;
  std::vector<int64_t> limits_;  // of a query: the last key that it may be scored with
  int64_t head_ = -1, width_ = 0;
  const T* k_head_ = nullptr;
};

template <class T> void search(const Hip& op, int64_t task) {
  HipTile tile;
  const HipTeam team{{}, tile};
  HipPlace place = hip_place(op, task);
  Scorer<T> scorer(op, place);
  std::vector<uint32_t> slot(static_cast<size_t>(hip_slot(op)));
  if (op.kind == Hip::kHalves) return hip_halves(team, op, place, scorer, slot.data());
  const HipChunks chunks = hip_chunks(op, place);
  place.chunks = chunks.count;
  if (chunks.count > op.index.shape[3])
    hip_descend(team, op, place, chunks, 0, 1, scorer, slot.data());
  hip_keep(team, op, place, chunks, slot.data());
}

void run(const Hip& op, CpuContext& context) {
  if (op.cache_seqlens)
    for (int64_t b = 0; b < op.q.shape[0]; ++b) {
      const int32_t keys = op.cache_seqlens.as<int32_t>()[b * op.cache_seqlens.strides[0]];
      HEDDLE_CHECK(keys >= op.q.shape[1] && keys <= op.keys(), kArgument, "cacheSeqlens",
                   "cacheSeqlens must be from sq = ", op.q.shape[1], " to ", op.keys(), ", got ",
                   keys, " at ", b);
    }
  context.parallel(op.count.size(), [&](int64_t task, int) {
    dispatch_float(op.q.dtype, [&]<class T>(T) { search<T>(op, task); });
  });
}

void run(const HipPlaces& op, CpuContext& context) {
  context.parallel(op.count.size(), [&](int64_t list, int) { hip_place_slots(Alone{}, op, list); });
}

HEDDLE_REGISTER(Hip);
HEDDLE_REGISTER(HipPlaces);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
