// The search of HiP on the emulator. Its lists are those that one thread finds with plain products
// of whole numbers, which are exact.
#include "hip/step_sm80.cuh"

#include <vector>

namespace heddle {
namespace {

#ifndef HEDDLE_SCORER
#define HEDDLE_SCORER HipMatrix<BF16, 64>
#define HEDDLE_ELEMENT BF16
#endif
using Scorer = HEDDLE_SCORER;
using T = HEDDLE_ELEMENT;
using SideBySide = std::conditional_t<Scorer::kHasPeers, Scorer, HipMatrix<BF16, 64>>;
constexpr bool kTurns = std::is_same_v<Scorer, HipPlain<T>>;
template <class> constexpr int kColumns = 0;  // of a fragment's keys
template <int kD> constexpr int kColumns<HipMatrix<T, kD>> = kD;

struct Case {
  int kind = Hip::kHalves, representative = Hip::kCenter;
  int64_t b = 1, sq = 1, sk = 300, hq = 1, hk = 1, lists = 1, d = 64;
  int64_t block_q = 1, block_k = 2, stride_q = 1, stride_k = 1;
  int64_t window = 16, sink_tokens = 4, width = 8;
  int64_t from_block_q = 0, from_block_k = 0, from_width = 0;
  int64_t page_size = 0;
  int warps = 1, ctas = 2, members = 1, heads = 1;
  bool shared = true;
  int positions = -1;  // none turns
  int64_t near = 0;    // slots
  uint32_t most = 4;   // of what q and k hold
  bool step = false;   // by the kernel of steps, if it takes such keys
  int peers = 0;       // lists that a CTA searches side by side
  int64_t packed = 0;  // sequences
};

// One thread, which is its own squad
struct Alone {
  static constexpr bool kHasPeers = false;
  HipTile& tile;
  template <class X> X take(X& x) const { return x++; }
  void put(int32_t& x, int32_t value) const { x = value; }
  template <class Body> void each(int64_t n, const Body& body) const {
    for (int64_t i = 0; i < n; ++i) body(i);
  }
  template <class Body> void share(int64_t n, const Body& body) const {
    for (int64_t i = 0; i < n; ++i) body(*this, i);
  }
  void raise(uint32_t& x, uint32_t y) const { x = std::max(x, y); }
  template <class Chosen> int64_t how_many(int64_t n, const Chosen& chosen) const {
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) found += chosen(i);
    return found;
  }
  template <class Chosen, class Place>
  void compact(int64_t n, const Chosen& chosen, const Place& place) const {
    for (int64_t i = 0, at = 0; i < n; ++i)
      if (chosen(i)) place(i, at++);
  }
};

struct Plain {
  const Hip& op;
  HipPlace& place;
  int64_t& looked_at;
  int64_t head = 0;

  static constexpr bool kNear = false;
  int64_t heads() const { return 1; }
  void load(int64_t first, int64_t) { head = first; }
  // Column e of a row that turns
  float turned(const T* row, int64_t e, int64_t position) const {
    const float own = to_float(row[e]);
    if (!op.cos) return own;
    const int64_t half = op.q.shape[3] / 2, at = position * half + e % half;
    const float other = e < half ? -to_float(row[e + half]) : to_float(row[e - half]);
    return own * op.cos.as<float>()[at] + other * op.sin.as<float>()[at];
  }
  const T* k(int64_t t) const {
    int64_t row = place.b * op.k.strides[0] + (place.first_key + t) * op.k.strides[1];
    if (op.block_table) {
      const int64_t size = op.k.shape[1];
      row = op.block_table.as<int32_t>()[place.b * op.block_table.shape[1] + t / size] *
                op.k.strides[0] +
            t % size * op.k.strides[1];
    }
    const int64_t kv = head / (op.q.shape[2] / op.k.shape[2]);
    return op.k.as<T>() + row + kv * op.k.strides[2];
  }
  void score(const Alone& team, int64_t) const {
    const bool halves = op.kind == Hip::kHalves;
    for (int i = 0; i < kHipTile; ++i) {
      const int32_t t = team.tile.keys[i];
      if (t < 0) continue;
      ++looked_at;
      float best = -INFINITY;
      for (int64_t first = place.first; first < place.last; first += op.stride_q) {
        const int64_t end = std::min(first + op.stride_q, place.last);
        // The only rows of a block that is shorter than a stride
        const bool short_of = halves && end - first < op.stride_q && first > place.first;
        if (short_of || (halves && t > place.ahead + end - 1 - op.window)) continue;
        float sum = 0;
        for (int64_t e = 0; e < op.q.shape[3]; ++e) {
          float x = 0;
          for (int64_t i = halves ? end - 1 : first; i < end; ++i)
            x += turned(op.q.as<T>() + place.b * op.q.strides[0] +
                            (place.first_query + i) * op.q.strides[1] + head * op.q.strides[2],
                        e, hip_query_position(op, place, i));
          const float n = halves ? 1.f : static_cast<float>(end - first);
          sum += to_float(from_float<T>(x / n)) * turned(k(t), e, team.tile.positions[i]);
        }
        best = std::max(best, sum);
      }
      team.tile.best[i] = order_of(best);
    }
  }
};

template <class X> Tensor view(std::vector<X>& data, std::vector<int64_t> shape, int64_t gap = 0) {
  Tensor tensor;
  tensor.rank = static_cast<int>(shape.size());
  int64_t size = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    tensor.shape[i] = shape[static_cast<size_t>(i)];
    tensor.strides[i] = size;
    size *= tensor.shape[i];
    if (i == tensor.rank - 1) size += gap;
  }
  data.resize(static_cast<size_t>(size + 16));
  tensor.data = data.data();
  while (reinterpret_cast<uintptr_t>(tensor.data) % 16) tensor.data = tensor.as<X>() + 1;
  return tensor;
}

struct Lists {
  std::vector<int32_t> index, count, blocks, table, length;
  void attach(Hip& op, const Case& c) {
    const int64_t rows = op.rows(c.block_q);
    op.index = view(index, {c.b, c.lists, rows, c.width});
    op.count = view(count, {c.b, c.lists, rows});
    op.blocks = view(blocks, {c.b, c.lists, rows, (op.keys() / c.block_k + 32) / 32});
    std::fill(blocks.begin(), blocks.end(), 77);
    if (c.packed > 0) return;
    op.table = view(table, {c.b, c.lists, rows, c.sink_tokens / c.block_k + c.width});
    op.length = view(length, {c.b, c.lists, rows});
  }
  bool operator==(const Lists&) const = default;
};

double check(const Case& c, emulator::Random& random) {
  std::vector<T> q, k;
  std::vector<int32_t> table, lengths, begins_q, begins_k, from_index, from_count;
  std::vector<float> cosines, sines;
  Hip op;
  op.kind = c.kind;
  op.representative = c.representative;
  op.block_q = c.block_q;
  op.block_k = c.block_k;
  op.stride_q = c.stride_q;
  op.stride_k = c.stride_k;
  op.window = c.window;
  op.sink_tokens = c.sink_tokens;
  op.from_block_q = c.from_block_q;
  op.from_block_k = c.from_block_k;
  op.q = view(q, {c.b, c.sq, c.hq, c.d}, 8);
  op.k = view(k, {c.b, c.sk, c.hk, c.d}, 16);
  if (c.page_size > 0) {
    const int64_t pages = (c.sk + c.page_size - 1) / c.page_size;
    op.k = view(k, {c.b * pages + 3, c.page_size, c.hk, c.d}, 16);
    op.block_table = view(table, {c.b, pages});
    for (int64_t i = 0; i < c.b * pages; ++i)
      table[static_cast<size_t>(i)] = static_cast<int32_t>(c.b * pages + 2 - i);
    op.block_table.data = table.data();
  }
  if (c.packed > 0) {
    op.cu_seqlens_q = view(begins_q, {c.packed + 1});
    op.cu_seqlens_k = view(begins_k, {c.packed + 1});
    auto *of_q = op.cu_seqlens_q.as<int32_t>(), *of_k = op.cu_seqlens_k.as<int32_t>();
    // Some of no queries, and all the keys that are left in the last one
    of_q[0] = of_k[0] = 0;
    for (int64_t i = 1; i <= c.packed; ++i) {
      const auto left = static_cast<uint32_t>(c.sq - of_q[i - 1]),
                 spare = static_cast<uint32_t>(c.sk - of_k[i - 1]) - left;
      const bool last = i == c.packed;
      const uint32_t queries = last ? left : random.below(3) == 0 ? 0 : random.below(left + 1);
      of_q[i] = of_q[i - 1] + static_cast<int32_t>(queries);
      of_k[i] = of_k[i - 1] + static_cast<int32_t>(queries + (last ? spare : random.below(spare)));
    }
  }
  if (c.packed == 0) op.cache_seqlens = view(lengths, {c.b});
  for (int64_t b = 0; op.cache_seqlens && b < c.b; ++b)
    op.cache_seqlens.as<int32_t>()[b] = static_cast<int32_t>(
        c.sk - (b > 0 ? random.below(static_cast<uint32_t>(c.sk - c.sq + 1)) : 0));
  for (auto* numbers : {&q, &k})
    for (T& x : *numbers)
      x = from_float<T>(static_cast<float>(random.below(2 * c.most + 1)) -
                        static_cast<float>(c.most));
  for (int i = 0; i < 5; ++i) k[random.below(static_cast<uint32_t>(k.size()))] = from_float<T>(NAN);
  // Whole numbers instead of angles
  if (c.positions >= 0 && kTurns) {
    for (auto [tensor, numbers] : {std::pair{&op.cos, &cosines}, std::pair{&op.sin, &sines}}) {
      *tensor = view(*numbers, {c.sk + c.window, c.d / 2});
      for (float& x : *numbers) x = static_cast<float>(random.below(3)) - 1;
    }
    op.positions = c.positions;
    op.context = 100;
  }
  if (c.from_width > 0) {
    const int64_t rows = op.rows(c.from_block_q);
    op.from_index = view(from_index, {c.b, c.lists, rows, c.from_width});
    op.from_count = view(from_count, {c.b, c.lists, rows});
    for (int64_t list = 0; list < c.b * c.lists * rows; ++list) {
      int64_t at = c.sink_tokens;
      int32_t n = 0;
      for (; n < c.from_width && at < c.sk; ++n, at += c.from_block_k * (1 + random.below(2)))
        op.from_index.as<int32_t>()[list * c.from_width + n] = static_cast<int32_t>(at);
      op.from_count.as<int32_t>()[list] = n;
    }
  }

  Lists expected, actual;
  expected.attach(op, c);
  const int64_t tasks = op.count.size();
  std::vector<uint32_t> slot(static_cast<size_t>(hip_slot(op)));
  HipTile tile;
  const Alone alone{tile};
  int64_t looked_at = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    HipPlace place = hip_place(op, task);
    Plain plain{op, place, looked_at};
    if (c.kind == Hip::kHalves) {
      hip_halves(alone, op, place, plain, slot.data());
      continue;
    }
    const HipChunks chunks = hip_chunks(op, place);
    place.chunks = chunks.count;
    std::fill(slot.begin(), slot.end(), kNoOrder);
    hip_descend(alone, op, place, chunks, 0, 1, plain, slot.data());
    hip_keep(alone, op, place, chunks, slot.data());
  }

  HipArgs args{};
  // What stands nearby is wrong where it comes from
  std::vector<T> near;
  std::vector<int32_t> places, slot_list, missed;
  std::vector<uint64_t> counts{0, 0, 7, 0};
  if (Scorer::kNear && c.near > 0) {
    const int64_t rows = c.sk * c.hk;
    op.near = view(near, {c.near, c.d});
    op.near_places = view(places, {rows});
    op.near_slots = view(slot_list, {c.near, 2});
    op.missed = view(missed, {c.near + 1});
    op.near_counts.data = counts.data();
    std::fill(places.begin(), places.end(), -1);
    for (int64_t slot = 0; slot < c.near; ++slot) {
      const int64_t row = slot * rows / c.near, at = row / c.hk;
      op.near_places.as<int32_t>()[row] = static_cast<int32_t>(slot);
      T* from = op.k.as<T>() + at * op.k.strides[1] + row % c.hk * op.k.strides[2];
      for (int64_t e = 0; e < c.d; ++e) {
        op.near.as<T>()[slot * c.d + e] = from[e];
        from[e] = from_float<T>(9);
      }
    }
  }
  args.op = op;
  actual.attach(args.op, c);
  int fault = 0;
  args.fault = &fault;
  args.tasks = tasks;
  args.slot = hip_slot(op);
  if (c.step && kColumns < Scorer >> 0) {
    constexpr int kD = std::max(kColumns<Scorer>, 32);
    args.members = static_cast<int>(args.slot) / HipStep(op).chunks() + 1;
    std::vector<uint32_t> slots(static_cast<size_t>(tasks * args.slot), 77);
    std::vector<int> arrivals(static_cast<size_t>(tasks));
    args.slots = slots.data();
    args.arrivals = arrivals.data();
    emulator::launch(static_cast<int>(tasks) * args.members, kStepWarps * 32, 16, [&] {
      if constexpr (kColumns < Scorer >> 0) hip_step<T, kD>(args);
    });
    const bool at_zero = std::count(arrivals.begin(), arrivals.end(), 0) == tasks;
    return fault == 0 && at_zero && actual == expected ? 0 : INFINITY;
  }
  args.members = c.members;
  args.heads = c.heads;
  args.query_bytes = static_cast<size_t>(c.heads) * Scorer::bytes(op);
  const int64_t groups = c.members > 1 ? tasks : std::min<int64_t>(tasks, c.ctas);
  std::vector<uint32_t> slots(static_cast<size_t>(groups * args.slot), c.members > 1 ? 0 : 77);
  std::vector<int> arrivals(static_cast<size_t>(groups));
  if (!c.shared || c.members > 1) args.slots = slots.data();
  args.arrivals = arrivals.data();
  int queue = 0;
  args.queue = &queue;
  const size_t bytes = args.query_bytes + static_cast<size_t>(c.warps) * sizeof(HipTile) +
                       static_cast<size_t>(args.slots ? 0 : args.slot) * sizeof(uint32_t);
  if constexpr (Scorer::kHasPeers)
    if (c.peers > 0) {
      args.query_bytes = static_cast<size_t>(c.peers) * Scorer::bytes(op);
      args.tasks /= c.peers;
      emulator::launch(std::min(static_cast<int>(args.tasks), c.ctas), c.peers * 32,
                       args.query_bytes +
                           static_cast<size_t>(c.peers) *
                               (sizeof(HipTile) + static_cast<size_t>(args.slot) * 4) +
                           16,
                       [&] {
                         char* smem = reinterpret_cast<char*>(emulator::cta->smem());
                         while (reinterpret_cast<uintptr_t>(smem) % 16) ++smem;
                         hip_search_peers<SideBySide>(args, smem);
                       });
      return fault == 0 && queue == 0 && actual == expected ? 0 : INFINITY;
    }
  emulator::launch(static_cast<int>(groups) * c.members, c.warps * 32, bytes + 16, [&] {
    char* smem = reinterpret_cast<char*>(emulator::cta->smem());
    while (reinterpret_cast<uintptr_t>(smem) % 16) ++smem;
    hip_search<Scorer>(args, smem);
  });
  if (op.near) {
    const int64_t gone = op.missed.as<int32_t>()[0], listed = std::min(gone, c.near);
    if (static_cast<int64_t>(counts[0]) + gone != looked_at || counts[0] == 0) return INFINITY;
    for (int64_t i = 0; i < listed; ++i)
      if (op.near_places.as<int32_t>()[op.missed.as<int32_t>()[1 + i]] != -1) return INFINITY;
    int64_t used = 0;
    for (int64_t slot = 0; slot < c.near; ++slot)
      used += op.near_slots.as<int32_t>()[2 * slot + 1] == 7;
    if (used == 0 || used > static_cast<int64_t>(counts[0])) return INFINITY;
  }
  return fault == 0 && queue == 0 && actual == expected ? 0 : INFINITY;
}

constexpr int kStage = Hip::kStage;
constexpr Case turning(int positions, int64_t lists = 1) {
  return {.kind = kStage,
          .sq = 30,
          .sk = 300,
          .hq = 2,
          .hk = 1,
          .lists = lists,
          .d = 8,
          .block_q = 16,
          .block_k = 8,
          .stride_q = 4,
          .sink_tokens = 8,
          .width = 9,
          .positions = positions};
}

const Case kCases[] = {
    {.width = 8},
    {.b = 2,
     .sq = 100,
     .sk = 300,
     .hq = 4,
     .hk = 2,
     .lists = 4,
     .block_q = 32,
     .stride_q = 2,
     .ctas = 3,
     .peers = 2},
    {.sq = 70,
     .sk = 400,
     .hq = 6,
     .hk = 2,
     .lists = 6,
     .d = 40,
     .block_q = 32,
     .block_k = 4,
     .stride_k = 2,
     .width = 5,
     .page_size = 16,
     .ctas = 2,
     .peers = 3},
    {.b = 2, .sq = 70, .sk = 200, .hq = 4, .hk = 2, .lists = 4, .block_q = 32, .stride_q = 2},
    {.sq = 150,
     .sk = 700,
     .hq = 4,
     .hk = 2,
     .lists = 4,
     .block_q = 16,
     .stride_q = 2,
     .ctas = 3,
     .peers = 2,
     .packed = 4},
    {.sq = 100, .sk = 500, .hq = 2, .lists = 2, .block_q = 16, .stride_q = 4, .packed = 3},
    {.kind = kStage,
     .sq = 90,
     .sk = 600,
     .hq = 2,
     .hk = 1,
     .d = 24,
     .block_q = 16,
     .block_k = 8,
     .stride_q = 4,
     .sink_tokens = 8,
     .width = 9,
     .from_block_q = 32,
     .from_block_k = 16,
     .from_width = 12,
     .warps = 2,
     .members = 2,
     .packed = 5},
    {.representative = Hip::kFirst,
     .sq = 20,
     .sk = 260,
     .hq = 4,
     .hk = 2,
     .lists = 2,
     .d = 40,
     .block_q = 16,
     .block_k = 4,
     .stride_k = 2,
     .window = 1,
     .width = 5,
     .warps = 8,
     .heads = 2,
     .shared = false},
    {.sq = 3,
     .sk = 400,
     .hq = 6,
     .hk = 2,
     .lists = 1,
     .block_q = 4,
     .block_k = 1,
     .width = 33,
     .page_size = 16,
     .warps = 2,
     .heads = 6},
    {.kind = kStage,
     .sq = 1,
     .sk = 500,
     .hq = 4,
     .hk = 2,
     .block_k = 32,
     .sink_tokens = 32,
     .width = 3,
     .warps = 2,
     .heads = 4},
    {.kind = kStage,
     .b = 2,
     .sq = 40,
     .sk = 500,
     .hq = 4,
     .hk = 2,
     .lists = 2,
     .block_q = 16,
     .block_k = 8,
     .stride_q = 4,
     .sink_tokens = 8,
     .width = 9,
     .page_size = 32,
     .warps = 12,
     .members = 3,
     .heads = 1},
    {.kind = kStage,
     .sq = 40,
     .sk = 500,
     .hq = 4,
     .hk = 2,
     .lists = 1,
     .d = 24,
     .block_q = 16,
     .block_k = 8,
     .stride_q = 4,
     .sink_tokens = 8,
     .width = 9,
     .from_block_q = 32,
     .from_block_k = 32,
     .from_width = 11,
     .warps = 12,
     .heads = 3},
    {.kind = kStage,
     .sq = 2,
     .sk = 200,
     .hq = 2,
     .hk = 1,
     .lists = 2,
     .block_q = 2,
     .block_k = 1,
     .sink_tokens = 3,
     .width = 20,
     .warps = 2},
    {.sk = 400, .hq = 4, .hk = 2, .lists = 2, .warps = 2, .heads = 2, .near = 300},
    {.kind = kStage,
     .sq = 30,
     .sk = 500,
     .hq = 4,
     .hk = 2,
     .block_q = 16,
     .block_k = 8,
     .stride_q = 4,
     .sink_tokens = 8,
     .width = 9,
     .warps = 3,
     .members = 2,
     .heads = 2,
     .near = 400},
    // A kv head of a list, one of two, all of three, and keys in pages; half a chunk at the end
    {.kind = kStage, .sk = 700, .hq = 6, .hk = 3, .lists = 6, .block_k = 16, .step = true},
    {.kind = kStage,
     .b = 2,
     .sk = 600,
     .hq = 10,
     .hk = 2,
     .lists = 2,
     .d = 40,
     .block_k = 8,
     .width = 7,
     .step = true},
    {.kind = kStage,
     .sq = 3,
     .sk = 500,
     .hq = 12,
     .hk = 3,
     .block_q = 4,
     .block_k = 32,
     .stride_q = 4,
     .sink_tokens = 32,
     .width = 5,
     .page_size = 32,
     .step = true},
    {.kind = kStage,
     .sk = 500,
     .hq = 10,
     .hk = 10,
     .block_k = 8,
     .sink_tokens = 8,
     .width = 9,
     .from_block_q = 1,
     .from_block_k = 32,
     .from_width = 11,
     .step = true},
    // Scores of several warps, few of which are equal
    {.kind = kStage, .sk = 700, .hq = 2, .width = 60, .most = 60, .step = true},
    {.kind = kStage, .sk = 90, .hq = 8, .block_k = 1, .sink_tokens = 3, .width = 20, .step = true},
    {.kind = kStage, .sk = 90, .hq = 8, .block_k = 8, .sink_tokens = 8, .width = 20, .step = true},
    turning(Hip::kOwn, 2),
    turning(Hip::kStreaming),
    turning(Hip::kRelative),
    turning(Hip::kDynamicExtend),
};

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  return heddle::emulator::run_cases(heddle::kCases, argc, argv, heddle::check);
}
