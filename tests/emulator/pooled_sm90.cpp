// Shares of pooled blocks on the emulator, against float64
#include "probe/pooled_sm90.cuh"

#include <cmath>
#include <vector>

#include "probe/means.cuh"
#include "variant.h"

namespace heddle {
namespace {

struct Case {
  int64_t b, sq, sk, hq, hk, block_q, block_k;
  double scale = 0.5;
};

// One block, several tiles of rows and columns that end in the middle, rows behind a prefix
const Case kCases[] = {
    {1, 1, 1, 1, 1, 16, 16},
    {2, 140, 300, 2, 1, 1, 2, -0.5},
    {1, 500, 500, 4, 2, 2, 2},
    {1, 129, 129, 1, 1, 1, 1},
};

double check(const Case& c, emulator::Random& random) {
  Probe op;
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  const auto set = [](Tensor& x, std::initializer_list<int64_t> shape) {
    x.rank = 4;
    std::copy(shape.begin(), shape.end(), x.shape);
  };
  const int64_t rows = (c.sq + c.block_q - 1) / c.block_q,
                columns = (c.sk + c.block_k - 1) / c.block_k, heads = c.b * c.hq;
  set(op.q, {c.b, c.sq, c.hq, kD});
  set(op.k, {c.b, c.sk, c.hk, kD});
  set(op.score, {c.b, c.hq, rows, columns});
  op.block_q = c.block_q;
  op.block_k = c.block_k;
  op.scale = c.scale;
  std::vector<float> score(size(heads * rows * columns), NAN);
  op.score.data = score.data();
  std::vector<uint16_t> planes[2];
  std::vector<float> means[2];
  const auto fill = [&](bool of_k) {
    MeanArgs args{of_k ? op.k : op.q, of_k ? c.block_k : c.block_q, kD};
    args.apart = args.count() * kD;
    planes[of_k].assign(size(args.apart * kMeanPlanes + 8), 0x7fff);
    size_t shift = 0;
    while (reinterpret_cast<uintptr_t>(&planes[of_k][shift]) % 16 != 0) ++shift;
    args.planes = &planes[of_k][shift];
    for (int64_t i = 0; i < args.apart; ++i) {
      // Few are not zero, so that what sums round is less than what the last planes add
      means[of_k].push_back(
          random.below(4) > 0 ? 0 : static_cast<float>(random.below(1 << 22)) * 0x1p-20f - 2);
      store_mean(args, i, means[of_k].back());
    }
    return args;
  };
  std::vector<uint32_t> bins(size(heads * kShareBins), 1), counted(bins.size(), 1);
  // A head that nobody asks for, of those cases that have several
  std::vector<int32_t> wanted(size(heads), 1);
  if (heads > 2) wanted[1] = 2;
  // Of tiles of rows all means are there
  std::vector<int> ready;
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t row = 0; row < rows; row += 128)
      ready.push_back(static_cast<int>(std::min<int64_t>(128, rows - row)));
  const PooledCall call{
      op, fill(false), fill(true), bins.data(), heads > 2 ? wanted.data() : nullptr, ready.data()};
  launch_pooled_sm90<kD>(call, nullptr);

  double worst = 0;
  for (int64_t at = 0; at < heads * rows; ++at) {
    const int64_t r = at % rows, h = at / rows % c.hq, b = at / rows / c.hq;
    const int64_t keys = c.sk - c.sq + std::min((r + 1) * c.block_q, c.sq);
    std::vector<double> expected;
    double sum = 0;
    for (int64_t i = 0; i * c.block_k < keys; ++i) {
      double dot = 0;
      for (int64_t e = 0; e < kD; ++e)
        dot += static_cast<double>(means[0][size(at * kD + e)]) *
               means[1][size(((b * c.hk + h / (c.hq / c.hk)) * columns + i) * kD + e)];
      expected.push_back(std::exp(dot * c.scale));
      sum += expected.back();
    }
    for (int64_t i = 0; i < columns; ++i) {
      const float own = score[size(at * columns + i)];
      if (size(i) >= expected.size() || (call.wanted && wanted[size(at / rows)] != 1)) {
        if (!std::isnan(own)) worst = INFINITY;
        continue;
      }
      ++counted[size(at / rows * kShareBins + share_bin(own))];
      const double share = expected[size(i)] / sum,
                   error = std::fabs(own - share) / (0x1p-17 * share + 0x1p-110);
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
