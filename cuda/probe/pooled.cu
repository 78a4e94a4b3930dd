#include "probe/pooled.h"

#include "probe/pooled.cuh"

namespace heddle {
namespace {

template <class T> bool moves_wide(const Tensor& x) {
  for (int i = 0; i < 3; ++i)
    if (!Wide<T>::fits(x.data, x.shape[3], x.strides[i])) return false;
  return x.strides[3] == 1;
}

}  // namespace

void run_pooled(const Probe& op, CudaContext& context) {
  const int64_t heads = op.q.shape[0] * op.q.shape[2], depth = (op.q.shape[3] + 3) / 4 * 4;
  const int64_t rows = op.score.shape[2], columns = op.score.shape[3];
  const auto means = [&](const Tensor& x, int64_t block, int64_t blocks) {
    const int64_t count = x.shape[0] * x.shape[2] * blocks * depth;
    return MeanArgs{x, block, depth, context.scratch<float>(static_cast<size_t>(count))};
  };
  const MeanArgs q = means(op.q, op.block_q, rows), k = means(op.k, op.block_k, columns);
  const int64_t ctas_of_q = q.ctas(), ctas_of_means = ctas_of_q + k.ctas();
  HEDDLE_CHECK(ctas_of_means < INT32_MAX, kUnsupported, "block",
               "block gives too many for one call");
  dispatch_float(op.q.dtype, [&]<class T>(T) {
    auto* kernel = moves_wide<T>(op.q) && moves_wide<T>(op.k)
                       ? probe_means_kernel<T, Wide<T>::kCount>
                       : probe_means_kernel<T, 1>;
    kernel<<<static_cast<unsigned>(ctas_of_means), kMeanThreads, 0, context.stream>>>(
        q, k, static_cast<int>(ctas_of_q));
  });
  context.launched("probe_means_kernel");
  const int64_t ctas = heads * ((rows + kTileRows - 1) / kTileRows);
  probe_pooled_kernel<<<static_cast<unsigned>(ctas), kPooledThreads, 0, context.stream>>>(
      {op, depth, q.mean, k.mean});
  context.launched("probe_pooled_kernel");
}

}  // namespace heddle
