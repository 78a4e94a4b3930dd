// Blocks by rows of a map and by antidiagonals on the emulator, against float64
#include "probe/rows_sm90.cuh"

#include <cmath>
#include <vector>

#include "random_rows.h"

#ifndef HEDDLE_GROUPS
#define HEDDLE_GROUPS false
#endif

namespace heddle {
namespace {

struct Case {
  int64_t b, sq, sk, hq, hk, block_q, block_k, stride;
  int ctas;
  double scale = 0.2;
  double slope = 0;  // keys grow, or shrink, by so much from the first to the last
  int64_t poisoned_q = -1, poisoned_k = -1;  // rows that are no numbers
  int64_t hidden = -1;                       // a key that all scores of are -inf
};

constexpr bool kGroups = HEDDLE_GROUPS;

// Blocks of a few rows and of half a tile, of one part of columns and of several; rows that are
// many tiles, end in the middle of a stride and stand behind a prefix; scores that rise and fall
const Case kCases[] = {
    {.b = 1,
     .sq = 16,
     .sk = 16,
     .hq = 1,
     .hk = 1,
     .block_q = 16,
     .block_k = 64,
     .stride = 2,
     .ctas = 1},
    {.b = 1,
     .sq = 300,
     .sk = 300,
     .hq = 2,
     .hk = 1,
     .block_q = 64,
     .block_k = 64,
     .stride = 2,
     .ctas = 2},
    {.b = 2,
     .sq = 131,
     .sk = 531,
     .hq = 2,
     .hk = 2,
     .block_q = 64,
     .block_k = 128,
     .stride = 4,
     .ctas = 3},
    {.b = 1,
     .sq = 700,
     .sk = 732,
     .hq = 1,
     .hk = 1,
     .block_q = 128,
     .block_k = 128,
     .stride = kGroups ? 2 : 1,
     .ctas = 2},
    {.b = 1,
     .sq = 1100,
     .sk = 1100,
     .hq = 2,
     .hk = 1,
     .block_q = 32,
     .block_k = 64,
     .stride = 8,
     .ctas = 1},
    {.b = 1,
     .sq = 257,
     .sk = 1025,
     .hq = 1,
     .hk = 1,
     .block_q = 128,
     .block_k = 64,
     .stride = 2,
     .ctas = 1,
     .scale = 2,
     .slope = 8},
    {.b = 1,
     .sq = 255,
     .sk = 1023,
     .hq = 1,
     .hk = 1,
     .block_q = 64,
     .block_k = 128,
     .stride = 4,
     .ctas = 1,
     .scale = 2,
     .slope = -8},
    {.b = 1,
     .sq = 200,
     .sk = 400,
     .hq = 2,
     .hk = 2,
     .block_q = 64,
     .block_k = 64,
     .stride = 2,
     .ctas = 2,
     .poisoned_q = 131},
    {.b = 1,
     .sq = 200,
     .sk = 400,
     .hq = 2,
     .hk = 2,
     .block_q = 64,
     .block_k = 64,
     .stride = 2,
     .ctas = 2,
     .poisoned_k = 333},
    // behind no whole strides, of blocks that are whole and one that is not
    {.b = 2,
     .sq = 333,
     .sk = 646,
     .hq = 2,
     .hk = 1,
     .block_q = 64,
     .block_k = 128,
     .stride = 4,
     .ctas = 2},
    {.b = 1,
     .sq = 260,
     .sk = 263,
     .hq = 1,
     .hk = 1,
     .block_q = 128,
     .block_k = 128,
     .stride = 8,
     .ctas = 1},
    // rows of a tile that are none, beside a key without weight
    {.b = 1,
     .sq = 130,
     .sk = 130,
     .hq = 1,
     .hk = 1,
     .block_q = 64,
     .block_k = 64,
     .stride = 2,
     .ctas = 1,
     .hidden = 100},
};

double check(const Case& c, emulator::Random& random) {
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  Rows q(c.b, c.sq, c.hq, random), k(c.b, c.sk, c.hk, random, c.slope);
  const auto poison = [](const Tensor& x, int64_t row) {
    if (row >= 0) std::fill_n(x.as<uint16_t>() + row * x.strides[1], kD, 0x7fff);
  };
  poison(q.tensor, c.poisoned_q);
  poison(k.tensor, c.poisoned_k);
  if (c.hidden >= 0) {
    k.tensor.as<uint16_t>()[c.hidden * k.tensor.strides[1]] = emulator::encode(kType, -INFINITY);
    for (int64_t i = 0; i < c.sq; ++i)
      q.tensor.as<uint16_t>()[i * q.tensor.strides[1]] = emulator::encode(kType, 1);
  }
  const int64_t rows = (c.sq + c.block_q - 1) / c.block_q,
                columns = (c.sk + c.block_k - 1) / c.block_k;
  std::vector<float> score(size(c.b * c.hq * rows * columns + 1), NAN);
  Probe op;
  op.q = q.tensor;
  op.k = k.tensor;
  op.kind = kGroups ? Probe::kAntidiagonal : Probe::kRows;
  op.block_q = c.block_q;
  op.block_k = c.block_k;
  op.stride = c.stride;
  op.scale = c.scale;
  const int64_t shape[] = {c.b, c.hq, rows, columns};
  std::copy_n(shape, 4, op.score.shape);
  op.score.data = score.data();
  const RowsPlan plan(op);
  std::vector<float> parts(size(c.ctas * plan.parts()), NAN);
  launch_rows_sm90<kType, kD, kGroups>({op, plan, c.ctas, parts.data()}, nullptr);

  double worst = 0;
  const int64_t s = c.stride, unit = kGroups ? s : 1;
  for (int64_t at = 0; at < c.b * c.hq * rows; ++at) {
    const int64_t r = at % rows, h = at / rows % c.hq, b = at / rows / c.hq;
    const int64_t first = r * c.block_q, last = std::min(first + c.block_q, c.sq),
                  keys = c.sk - c.sq + last, sampled = (last - first + s - 1) / s;
    const auto dot = [&](int64_t i, int64_t t) {
      double sum = 0;
      for (int64_t e = 0; e < kD; ++e)
        sum += q.value(b, i, h, e) * k.value(b, t, h / (c.hq / c.hk), e);
      return sum;
    };
    std::vector<double> expected(size(columns), -INFINITY);
    for (int64_t i = 0; i * c.block_k < keys; ++i) expected[size(i)] = 0;
    for (int64_t i = 0; i < sampled; ++i) {
      const int64_t query = std::min(first + (i + 1) * s, last) - 1;
      std::vector<double> row;
      double top = -INFINITY, sum = 0;
      for (int64_t t = 0; t * unit < keys; ++t) {
        double x = 0;
        if (!kGroups) {
          if (t > c.sk - c.sq + query) break;
          x = dot(query, t);
        } else {
          if (t > (c.sk - c.sq + first + (i + 1) * s - 1) / s) break;
          for (int64_t p = 0; p < s; ++p) {
            const int64_t own = first + i * s + s - 1 - p, key = t * s + p;
            if (own < last && key < keys) x += dot(own, key) / static_cast<double>(s);
          }
        }
        row.push_back(x * c.scale);
        top = std::fmax(top, row.back());
      }
      for (double& x : row) sum += x = std::exp(x - top);
      for (size_t t = 0; t < row.size(); ++t)
        expected[t * size(unit) / size(c.block_k)] += row[t] / sum / static_cast<double>(sampled);
    }
    for (int64_t i = 0; i < columns; ++i) {
      const double actual = score[size(at * columns + i)], wanted = expected[size(i)];
      if (actual == wanted || (std::isnan(actual) && std::isnan(wanted))) continue;
      const double error = std::fabs(actual - wanted) / (0x1p-12 * wanted + 0x1p-40);
      worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
    }
  }
  return std::isnan(score.back()) ? worst : INFINITY;
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  return heddle::emulator::run_cases(heddle::kCases, argc, argv, heddle::check);
}
