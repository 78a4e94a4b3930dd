#include "probe/pooled.h"

#include "probe/pooled.cuh"
#include "probe/pooled_sm90.h"

namespace heddle {
namespace {

template <class T> bool moves_wide(const Tensor& x) {
  for (int i = 0; i < 3; ++i)
    if (!Wide<T>::fits(x.data, x.shape[3], x.strides[i])) return false;
  return x.strides[3] == 1;
}

}  // namespace

Means::Means(const Probe& op, bool in_planes, CudaContext& context, const Means* other)
    : has_k(other) {
  const int64_t depth = (op.q.shape[3] + 3) / 4 * 4;
  const auto means = [&](const Tensor& x, int64_t block) {
    MeanArgs args{x, block, depth};
    args.apart = args.count() * depth;
    const auto size = static_cast<size_t>(args.apart);
    if (in_planes)
      args.planes = context.scratch<uint16_t>(kMeanPlanes * size);
    else
      args.mean = context.scratch<float>(size);
    return args;
  };
  q = means(op.q, op.block_q);
  k = other ? other->k : means(op.k, op.block_k);
}

void run_means(const Means& means, CudaContext& context) {
  const MeanArgs &q = means.q, &k = means.k;
  const int64_t ctas = means.count();
  HEDDLE_CHECK(ctas < INT32_MAX, kUnsupported, "block", "block gives too many for one call");
  dispatch_float(q.x.dtype, [&]<class T>(T) {
    auto* kernel = moves_wide<T>(q.x) && moves_wide<T>(k.x) ? probe_means_kernel<T, Wide<T>::kCount>
                                                            : probe_means_kernel<T, 1>;
    kernel<<<static_cast<unsigned>(ctas), kMeanThreads, 0, context.stream>>>(
        q, k, static_cast<int>(q.count()));
  });
  context.launched("probe_means_kernel");
}

void run_products(const Probe& op, const Means& means, uint32_t* bins, CudaContext& context) {
  const int64_t heads = op.q.shape[0] * op.q.shape[2], rows = op.score.shape[2];
  const PooledArgs args{op, means.q.depth, means.q.mean, means.k.mean, bins};
  const auto ctas = [&](int64_t size) {
    return static_cast<unsigned>(heads * ((rows + size - 1) / size));
  };
  // Large tiles read the means of k less often, and are few
  if (ctas(64) < 2 * static_cast<unsigned>(context.processors))
    probe_pooled_kernel<1><<<ctas(16), kPooledThreads, 0, context.stream>>>(args);
  else
    probe_pooled_kernel<4><<<ctas(64), kPooledThreads, 0, context.stream>>>(args);
  context.launched("probe_pooled_kernel");
}

const char* declines_shares(const Probe& op, const CudaContext& context) {
  if (context.arch != 90) return "the GPU must be of compute capability 9.0";
  if (op.q.shape[3] != 64 && op.q.shape[3] != 128) return "d must be 64 or 128";
  return nullptr;
}

void run_shares(const Probe& op, const Means& means, uint32_t* bins, const int32_t* wanted,
                const int* ready, CudaContext& context) {
  const PooledCall call{op, means.q, means.k, bins, wanted, ready};
  op.q.shape[3] == 128 ? launch_pooled_sm90<128>(call, context.stream)
                       : launch_pooled_sm90<64>(call, context.stream);
  context.launched("probe_pooled_sm90_kernel");
}

}  // namespace heddle
