// Scores of pooled blocks on the emulator, against float64
#include "probe/pooled.cuh"

#include <cmath>
#include <vector>

namespace heddle {
namespace {

#ifndef HEDDLE_ELEMENT
#define HEDDLE_ELEMENT BF16
#endif
using T = HEDDLE_ELEMENT;

struct Case {
  int64_t b, sq, sk, hq, hk, d, block_q, block_k;
  bool softmax;
  int count;  // elements that are read at once
};

constexpr int kWide = 16 / sizeof(T);

// Several tiles of rows and of columns, blocks and depths that end in the middle
const Case kCases[] = {
    {1, 1, 1, 1, 1, 16, 16, 16, true, kWide},    {2, 100, 217, 2, 1, 72, 7, 3, true, kWide},
    {1, 90, 300, 3, 1, 131, 2, 2, true, 1},      {1, 65, 65, 2, 2, 6, 1, 1, false, 1},
    {1, 700, 700, 2, 1, 64, 20, 5, true, kWide}, {1, 256, 256, 1, 1, 256, 8, 8, false, kWide},
};

struct Rows {
  Rows(int64_t b, int64_t s, int64_t h, int64_t d, emulator::Random& random)
      : values(static_cast<size_t>(b * s * h * d + 16)) {
    tensor.rank = 4;
    const int64_t shape[] = {b, s, h, d}, strides[] = {s * h * d, h * d, d, 1};
    std::copy_n(shape, 4, tensor.shape);
    std::copy_n(strides, 4, tensor.strides);
    size_t shift = 0;
    while (reinterpret_cast<uintptr_t>(&values[shift]) % 16 != 0) ++shift;
    tensor.data = &values[shift];
    for (int64_t i = 0; i < tensor.size(); ++i)
      tensor.as<T>()[i] = from_float<T>(static_cast<float>(random.below(4096)) / 1024 - 2);
  }
  // Mean of a block, in float64
  std::vector<double> mean(int64_t b, int64_t h, int64_t first, int64_t end) const {
    const Tensor& x = tensor;
    std::vector<double> mean(static_cast<size_t>(x.shape[3]));
    for (int64_t i = first; i < end; ++i)
      for (size_t e = 0; e < mean.size(); ++e)
        mean[e] += to_float(x.as<T>()[b * x.strides[0] + i * x.strides[1] + h * x.strides[2] +
                                      static_cast<int64_t>(e)]) /
                   static_cast<double>(end - first);
    return mean;
  }

  std::vector<T> values;
  Tensor tensor;
};

double check(const Case& c, emulator::Random& random) {
  const Rows q(c.b, c.sq, c.hq, c.d, random), k(c.b, c.sk, c.hk, c.d, random);
  const int64_t rows = (c.sq + c.block_q - 1) / c.block_q,
                columns = (c.sk + c.block_k - 1) / c.block_k, depth = (c.d + 3) / 4 * 4;
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  std::vector<float> score(size(c.b * c.hq * rows * columns), NAN);
  std::vector<float4> means(size((c.b * c.hq * rows + c.b * c.hk * columns) * depth / 4),
                            {NAN, NAN, NAN, NAN});
  Probe op;
  op.q = q.tensor;
  op.k = k.tensor;
  op.score.data = score.data();
  op.score.shape[2] = rows;
  op.score.shape[3] = columns;
  op.block_q = c.block_q;
  op.block_k = c.block_k;
  op.softmax = c.softmax;
  op.scale = 0.7;
  auto* mean_q = reinterpret_cast<float*>(means.data());
  const MeanArgs of_q{q.tensor, c.block_q, depth, mean_q};
  const MeanArgs of_k{k.tensor, c.block_k, depth, mean_q + c.b * c.hq * rows * depth};
  const auto ctas_of_q = static_cast<int>(of_q.count());
  emulator::launch(ctas_of_q + static_cast<int>(of_k.count()), kMeanThreads, 0, [&] {
    c.count == 1 ? probe_means_kernel<T, 1>(of_q, of_k, ctas_of_q)
                 : probe_means_kernel<T, kWide>(of_q, of_k, ctas_of_q);
  });
  std::vector<uint32_t> bins(size(c.b * c.hq * kShareBins)), counted(bins.size());
  const bool large = random.below(2) == 0, counts = random.below(2) == 0;
  const int64_t size_of_tile = large ? 64 : 16;
  const int64_t ctas = c.b * c.hq * ((rows + size_of_tile - 1) / size_of_tile);
  const PooledArgs args{op, depth, of_q.mean, of_k.mean, counts ? bins.data() : nullptr};
  emulator::launch(static_cast<int>(ctas), kPooledThreads, 0,
                   [&] { large ? probe_pooled_kernel<4>(args) : probe_pooled_kernel<1>(args); });

  double worst = 0;
  for (int64_t at = 0; at < c.b * c.hq * rows; ++at) {
    const int64_t r = at % rows, h = at / rows % c.hq, b = at / rows / c.hq;
    const int64_t end = std::min((r + 1) * c.block_q, c.sq), keys = c.sk - c.sq + end;
    const std::vector<double> x = q.mean(b, h, r * c.block_q, end);
    std::vector<double> expected(size(columns), -INFINITY);
    double sum = 0;
    for (int64_t i = 0; i * c.block_k < keys; ++i) {
      const std::vector<double> y =
          k.mean(b, h / (c.hq / c.hk), i * c.block_k, std::min((i + 1) * c.block_k, c.sk));
      double dot = 0;
      for (size_t e = 0; e < x.size(); ++e) dot += x[e] * y[e];
      expected[size(i)] = dot * op.scale;
      sum += std::exp(dot * op.scale);
    }
    for (int64_t i = 0; counts && c.softmax && i * c.block_k < keys; ++i)
      ++counted[size(at / rows * kShareBins + share_bin(score[size(at * columns + i)]))];
    for (int64_t i = 0; i < columns; ++i) {
      const double actual = score[size(at * columns + i)], own = expected[size(i)];
      if (counts && own == -INFINITY) continue;
      const double wanted = c.softmax ? (own == -INFINITY ? own : std::exp(own) / sum) : own;
      if (actual == wanted) continue;
      const double error = std::fabs(actual - wanted) /
                           (c.softmax ? 0x1p-15 * wanted : 0x1p-18 * (1 + std::fabs(wanted)));
      worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
    }
  }
  return bins == counted ? worst : INFINITY;
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  return heddle::emulator::run_cases(heddle::kCases, argc, argv, heddle::check);
}
