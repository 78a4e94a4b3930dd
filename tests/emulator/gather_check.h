#pragma once
#include <cmath>
#include <vector>

#include "attention/gather_keys.cuh"
#include "common/elements.cuh"

// Attention over lists of short blocks on the emulator, against its definition in float64
namespace heddle {

struct GatherCase {
  int64_t b = 1, sq = 1, sk = 300, hq = 1, hk = 1, lists = 1;
  int64_t block_q = 1, block_k = 8, window = 16, sink_tokens = 8, width = 8;
  bool cached = false;  // cacheSeqlens, of which the first is sk
  int64_t page_size = 0;
  float soft_cap = 0;
  int splits = 1;
  int64_t poisoned = -1;  // this key and its value are not numbers
  bool hides = false;     // products with the first key are infinite, of the first query -inf
};

// Calls `run(call, lists)` and gives the error as a multiple of what is allowed
template <class T, DType kType, class Run>
double check_gather(const GatherCase& c, int64_t d, emulator::Random& random, const Run& run) {
  constexpr uint16_t kNaN = 0x7fff;
  const int64_t page = c.page_size ? c.page_size : c.sk, pages = (c.sk + page - 1) / page;
  const int64_t row = c.hk * d + 8, batch = page * row + 8;
  const auto number = [&] {
    return emulator::encode(kType, (static_cast<float>(random.below(2001)) - 1000) / 500);
  };
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  std::vector<uint16_t> q(size(c.b * c.sq * c.hq * d + 16)),
      k(size((c.b * pages + 2) * batch), kNaN);
  std::vector<uint16_t> v = k, out(size(c.b * c.sq * c.hq * d), kNaN);
  std::vector<float> lse(size(c.b * c.hq * c.sq), NAN);
  const auto aligned = [](std::vector<uint16_t>& x) {
    uint16_t* data = x.data();
    while (reinterpret_cast<uintptr_t>(data) % 16) ++data;
    return data;
  };
  for (uint16_t& x : q) x = number();
  std::vector<int32_t> table, lengths;
  for (int64_t i = 0; i < c.b * pages; ++i)
    table.push_back(static_cast<int32_t>(c.b * pages - 1 - i));
  for (int64_t b = 0; b < c.b; ++b)
    lengths.push_back(static_cast<int32_t>(
        c.sk - (b > 0 ? random.below(static_cast<uint32_t>(c.sk - c.sq + 1)) : 0)));
  if (!c.cached) std::fill(lengths.begin(), lengths.end(), static_cast<int32_t>(c.sk));
  const auto at = [&](std::vector<uint16_t>& x, int64_t b, int64_t t, int64_t head) {
    const int64_t block = c.page_size ? table[size(b * pages + t / page)] : b;
    return aligned(x) + block * batch + t % page * row + head * d;
  };
  // What is behind the last key is no number
  for (auto* x : {&k, &v})
    for (int64_t b = 0; b < c.b; ++b)
      for (int64_t t = 0; t < lengths[size(b)]; ++t)
        for (int64_t i = 0; i < c.hk * d; ++i) at(*x, b, t, 0)[i] = number();

  if (c.poisoned >= 0)
    for (auto* x : {&k, &v})
      for (int64_t b = 0; b < c.b; ++b) std::fill_n(at(*x, b, c.poisoned, 0), c.hk * d, kNaN);
  if (c.hides) {
    aligned(q)[0] = emulator::encode(kType, 1);
    *at(k, 0, 0, 0) = emulator::encode(kType, -INFINITY);
  }

  std::vector<int32_t> indices, counts;
  const int64_t rows = (c.sq + c.block_q - 1) / c.block_q;
  for (int64_t list = 0; list < c.b * c.lists * rows; ++list) {
    int64_t start = c.sink_tokens;
    int32_t n = 0;
    for (int64_t i = 0; i < c.width; ++i) {
      start += c.block_k * random.below(4);
      const bool listed = start < c.sk && n == i && random.below(20) > 0;
      indices.push_back(listed ? static_cast<int32_t>(start) : INT32_MAX);
      n += listed;
      start += c.block_k;
    }
    counts.push_back(n);
  }

  ForwardArgs call{};
  call.q.data = aligned(q);
  call.q.batch = c.sq * c.hq * d;
  call.q.token = c.hq * d;
  call.q.head = d;
  call.q.element = 1;
  call.k = call.q;
  call.k.batch = batch;
  call.k.token = row;
  call.v = call.k;
  call.k.data = aligned(k);
  call.v.data = aligned(v);
  call.out = out.data();
  call.lse = lse.data();
  call.b = c.b;
  call.sq = c.sq;
  call.sk = c.page_size ? pages * page : c.sk;
  call.hq = c.hq;
  call.hk = c.hk;
  call.d = call.dv = static_cast<int>(d);
  call.pages = c.b * pages;
  call.page_size = c.page_size ? page : 1;
  if (c.page_size) call.block_table = table.data();
  call.table_row = pages;
  call.table_column = 1;
  if (c.cached || c.page_size) call.cache_seqlens = lengths.data();
  call.cache_stride = 1;
  call.scale = 0.2f;
  call.soft_cap = c.soft_cap;
  call.causal = call.masked = true;
  call.mask.block_q = c.block_q;
  call.mask.block_k_log2 = std::countr_zero(static_cast<uint64_t>(c.block_k));
  call.mask.window = c.window;
  call.mask.sink_tokens = c.sink_tokens;
  run(call, GatherLists{indices.data(), counts.data(), c.lists, rows, c.width});

  double worst = 0;
  const auto judge = [&](double actual, double expected, double allowed) {
    const bool same = actual == expected || (std::isnan(actual) && std::isnan(expected));
    const double error = same ? 0 : std::fabs(actual - expected) / allowed;
    worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
  };
  const double unit = kType == DType::kBF16 ? 0x1p-8 : 0x1p-11;
  for (int64_t b = 0; b < c.b; ++b)
    for (int64_t h = 0; h < c.hq; ++h)
      for (int64_t i = 0; i < c.sq; ++i) {
        const int64_t position = lengths[size(b)] - c.sq + i, kv = h / (c.hq / c.hk);
        const int64_t list = (b * c.lists + h / (c.hq / c.lists)) * rows + i / c.block_q;
        const int32_t* index = indices.data() + list * c.width;
        const int64_t line = (b * c.sq + i) * c.hq + h;
        const uint16_t* own = aligned(q) + line * d;
        std::vector<std::pair<int64_t, double>> seen;
        double top = -INFINITY, sum = 0;
        for (int64_t t = 0; t <= position; ++t) {
          bool sees = t < c.sink_tokens || position - t < c.window;
          for (int32_t n = 0; n < counts[size(list)]; ++n)
            sees |= t >= index[n] && t < index[n] + c.block_k;
          if (!sees) continue;
          double score = 0;
          for (int64_t e = 0; e < d; ++e)
            score += double{emulator::decode(kType, own[e])} *
                     emulator::decode(kType, at(k, b, t, kv)[e]);
          score *= double{call.scale};
          if (c.soft_cap > 0) score = c.soft_cap * std::tanh(score / c.soft_cap);
          seen.emplace_back(t, score);
          top = std::max(top, score);
        }
        for (auto& [t, score] : seen)
          sum += score = top == -INFINITY && !std::isnan(score) ? 0 : std::exp(score - top);
        judge(lse[size((b * c.hq + h) * c.sq + i)], sum == 0 ? -INFINITY : top + std::log(sum),
              1e-4);
        for (int64_t e = 0; e < d; ++e) {
          double value = 0, terms = 0;
          for (const auto& [t, weight] : seen) {
            const double term =
                (sum == 0 ? 0 : weight / sum) * emulator::decode(kType, at(v, b, t, kv)[e]);
            value += term;
            terms += std::fabs(term);
          }
          // weights and result are each rounded once
          judge(emulator::decode(kType, out[size(line * d + e)]), value,
                2 * unit * (terms + std::fabs(value)) + 1e-6);
        }
      }
  return worst;
}

}  // namespace heddle
