#include "ops/probe.h"

#include <algorithm>
#include <bit>

#include "common/elements.cuh"
#include "common/lanes.cuh"
#include "common/variants.h"
#include "core/slot.h"
#include "probe/lines.h"
#include "probe/pooled.h"
#include "probe/rows_sm90.h"

// Probe scores on any GPU, in f32, of all but pooled blocks: a CTA per row of blocks and head.
// Probabilities take two walks over the keys, one for the normaliser of each sampled row and one
// for the sums. Whoever owns a column adds up its keys and rows in their order, so that nothing
// depends on timing.
namespace heddle {
namespace {

constexpr int kMostSampled = 1024;

template <class T> struct Row {
  const Probe& op;
  const T *q, *k;
  int per;
  int64_t d, sq, sk, first, last, keys, visible, sampled;
  float* score;

  __device__ Row(const Probe& op, int64_t index) : op(op), per(op.per) {
    const int64_t heads = op.score.shape[1], rows = op.score.shape[2];
    const int64_t head = index % heads, b = index / heads / rows;
    int64_t row = rows - 1 - index / heads % rows;
    score =
        static_cast<float*>(op.score.data) + ((b * heads + head) * rows + row) * op.score.shape[3];
    if (op.per == Probe::kLine) {
      per = row % 2 == 0 ? Probe::kKey : Probe::kDistance;
      row /= 2;
    }
    d = op.q.shape[3];
    sq = op.q.shape[1];
    sk = op.k.shape[1];
    q = static_cast<T*>(op.q.data) + b * op.q.strides[0] + head * op.q.strides[2];
    k = static_cast<T*>(op.k.data) + b * op.k.strides[0] +
        head / (op.q.shape[2] / op.k.shape[2]) * op.k.strides[2];
    first = row * op.block_q;
    last = min(first + op.block_q, sq);
    keys = sk - sq + last;
    visible = per == Probe::kBlock ? (keys + op.block_k - 1) / op.block_k : keys;
    sampled = (last - first + op.stride - 1) / op.stride;
  }

  __device__ int64_t query(int64_t i) const { return min(first + (i + 1) * op.stride, last) - 1; }
  __device__ int64_t position(int64_t i) const { return sk - sq + query(i); }
  __device__ int64_t sampled_key(int64_t t) const { return min((t + 1) * op.stride, keys) - 1; }

  __device__ float dot(int64_t i, int64_t t) const {
    const T *x = q + i * op.q.strides[1], *y = k + t * op.k.strides[1];
    float sum = 0;
    for (int64_t e = 0; e < d; ++e)
      sum = fmaf(to_float(x[e * op.q.strides[3]]), to_float(y[e * op.k.strides[3]]), sum);
    return sum;
  }
  // Of sampled row i with key t, or of a group of rows with a group of keys along antidiagonals
  __device__ float pair(int64_t i, int64_t t) const {
    const auto scale = static_cast<float>(op.scale);
    if (op.kind != Probe::kAntidiagonal) return scale * dot(query(i), t);
    float sum = 0;
    for (int64_t s = 0; s < op.stride; ++s) {
      const int64_t x = first + i * op.stride + op.stride - 1 - s, y = t * op.stride + s;
      if (x < last && y < keys) sum += dot(x, y);
    }
    return sum * scale / static_cast<float>(op.stride);
  }
  // Keys, or groups of them, that sampled row i sees
  __device__ int64_t end(int64_t i) const {
    if (op.kind != Probe::kAntidiagonal) return position(i) + 1;
    const int64_t groups = (keys + op.stride - 1) / op.stride;
    return min((sk - sq + first + (i + 1) * op.stride - 1) / op.stride + 1, groups);
  }
};

// Sums of probabilities over the columns of a row
template <class T> __device__ void sum_probabilities(const Row<T>& row) {
  __shared__ float row_max[kMostSampled], row_sum[kMostSampled];
  const Probe& op = row.op;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int64_t i = warp; i < row.sampled; i += warps) {
    float most = -3e38f, sum = 0;
    for (int64_t t = lane; t < row.end(i); t += 32) {
      const float own = row.pair(i, t), next = fmaxf(most, own);
      sum = sum * expf(most - next) + expf(own - next);
      if (isnan(own)) sum = own;
      most = next;
    }
    const float top = warp_max(most);
    sum = warp_sum(sum * expf(most - top));
    if (lane == 0) {
      row_max[i] = top;
      row_sum[i] = sum;
    }
  }
  __syncthreads();
  const float share = 1.f / static_cast<float>(row.sampled);
  const auto probability = [&](int64_t i, int64_t t) {
    return expf(row.pair(i, t) - row_max[i]) / row_sum[i] * share;
  };
  if (row.per == Probe::kBlock) {
    const int64_t unit = op.kind == Probe::kAntidiagonal ? op.stride : 1;
    for (int64_t c = warp; c < row.visible; c += warps) {
      float sum = 0;
      for (int64_t i = 0; i < row.sampled; ++i) {
        const int64_t to = min((c + 1) * op.block_k / unit, row.end(i));
        for (int64_t t = c * op.block_k / unit + lane; t < to; t += 32) sum += probability(i, t);
      }
      sum = warp_sum(sum);
      if (lane == 0) row.score[c] = sum;
    }
    return;
  }
  for (int64_t c = threadIdx.x; c < row.visible; c += blockDim.x) {
    float sum = 0;
    for (int64_t i = 0; i < row.sampled; ++i) {
      const int64_t t = row.per == Probe::kKey ? c : row.position(i) - c;
      if (t >= 0 && t < row.end(i)) sum += probability(i, t);
    }
    row.score[c] = sum;
  }
}

// The largest score of sampled rows and keys
template <class T> __device__ void scan_strided(const Row<T>& row) {
  const Probe& op = row.op;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t count = (row.keys + op.stride - 1) / op.stride;
  for (int64_t c = warp; c < row.visible; c += warps) {
    float best = -INFINITY;
    bool poisoned = false;
    for (int64_t t = c * op.block_k / op.stride + lane; t < count; t += 32) {
      const int64_t key = row.sampled_key(t);
      if (key / op.block_k > c) break;
      for (int64_t i = 0; key / op.block_k == c && i < row.sampled; ++i) {
        if (key > row.position(i)) continue;
        const float own = row.pair(i, key);
        best = fmaxf(best, own);
        poisoned |= isnan(own);
      }
    }
    best = warp_max(best);
    poisoned = __any_sync(~0u, poisoned);
    if (lane == 0) row.score[c] = poisoned ? NAN : best;
  }
}

__device__ void normalise(float* score, int64_t count) {
  __shared__ float most, sum;
  if (threadIdx.x < 32) {
    float top = -INFINITY, total = 0;
    for (int64_t c = threadIdx.x; c < count; c += 32) top = fmaxf(top, score[c]);
    top = warp_max(top);
    for (int64_t c = threadIdx.x; c < count; c += 32)
      if (score[c] != -INFINITY) total += expf(score[c] - top);
    total = warp_sum(total);
    if (threadIdx.x == 0) {
      most = top;
      sum = total;
    }
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < count; c += blockDim.x)
    if (score[c] != -INFINITY) score[c] = expf(score[c] - most) / sum;
}

template <class T> __global__ void __launch_bounds__(kThreads) probe_kernel(Probe op) {
  const Row<T> row(op, blockIdx.x);
  for (int64_t c = row.visible + threadIdx.x; c < op.score.shape[3]; c += blockDim.x)
    row.score[c] = -INFINITY;
  if (op.kind == Probe::kStrided) {
    scan_strided(row);
  } else {
    sum_probabilities(row);
  }
  __syncthreads();
  if (op.softmax) normalise(row.score, row.visible);
}

void run_plain(const Probe& op, CudaContext& context) {
  HEDDLE_CHECK(op.block_q / op.stride < kMostSampled, kUnsupported, "blockQ",
               "blockQ must be less than ", kMostSampled, " strides, got ", op.block_q);
  const int64_t ctas = op.score.shape[0] * op.score.shape[1] * op.score.shape[2];
  HEDDLE_CHECK(ctas < INT32_MAX, kUnsupported, "score", "score has too many rows for one call");
  dispatch_float(op.q.dtype, [&]<class T>(T) {
    probe_kernel<T><<<static_cast<unsigned>(ctas), kThreads, 0, context.stream>>>(op);
  });
  context.launched("probe_kernel");
}

const char* declines_rows_sm90(const Probe& op, const CudaContext& context) {
  const RowsPlan plan(op);
  const int64_t sq = op.q.shape[1], sk = op.k.shape[1];
  if (context.arch != 90) return "the GPU must be of compute capability 9.0";
  if (op.score.size() == 0) return "score must not be empty";
  if (std::max(op.block_q, op.block_k) > kMostBlock) return "a block must be at most 2^20 long";
  if (op.per != Probe::kBlock || op.softmax || (op.kind != Probe::kRows && !plan.groups))
    return "it takes blocks of rows and antidiagonals, without softmax";
  if (!(op.scale > 0)) return "scale must be positive";
  if (op.q.shape[3] > 128) return "d must be at most 128";
  if (plan.phases > kMostPhases) return "stride must be at most 16 with antidiagonals";
  if (op.block_q % op.stride != 0 || !std::has_single_bit(static_cast<uint64_t>(plan.block_rows)) ||
      plan.block_rows < 4 || plan.block_rows > 128)
    return "a block must have 4 to 128 sampled queries, a power of two";
  if (plan.block_columns % plan.part != 0)
    return "a block must have a multiple of 64 keys, or of 8 groups with antidiagonals";
  if (sq < op.stride) return "q must have as many rows as a stride";
  constexpr int64_t kMost = int64_t{1} << 30;  // rows, columns and tiles are counted in 32 bits
  if (std::max(op.q.strides[1], op.k.strides[1]) >= int64_t{1} << 32)
    return "rows must be less than 2^32 elements apart";
  if (sk > kMost || plan.tiles() > kMost / op.q.shape[0] / op.q.shape[2])
    return "q and k must have at most 2^30 rows and tiles";
  const char* reason = declines_wide(op);
  return reason ? reason : declines_copies(op);
}

void run_rows_sm90(const Probe& op, CudaContext& context) {
  const RowsPlan plan(op);
  // of very long rows fewer CTAs, so that what they keep is 4 GB at most
  constexpr int64_t kMostParts = int64_t{1} << 30;
  const auto ctas = static_cast<int>(
      std::min({plan.tiles() * op.q.shape[0] * op.q.shape[2], int64_t{context.processors},
                std::max<int64_t>(kMostParts / plan.parts(), 1)}));
  const RowsCall call{op, plan, ctas,
                      context.scratch<float>(static_cast<size_t>(ctas * plan.parts()))};
  const auto launch = [&]<DType kType, int kD> {
    plan.groups ? launch_rows_sm90<kType, kD, true>(call, context.stream)
                : launch_rows_sm90<kType, kD, false>(call, context.stream);
  };
  dispatch_copied(op, launch);
  context.launched("probe_rows_sm90_kernel");
}

constexpr Variant<Probe> kVariants[] = {
    {"sm90_rows", declines_rows_sm90, run_rows_sm90},
    {"sm90_lines", declines_lines_sm90,
     [](const Probe& op, CudaContext& context) {
       const LinesCall call = lines_sm90(op, {}, false, context);
       run_stats_sm90(call, context);
       run_lines_sm90(call, context);
       add_distances(op, call.strips, context);
     }},
    {"sm80_lines", declines_lines, run_lines},
    {"pooled",
     [](const Probe& op, const CudaContext&) -> const char* {
       return op.kind == Probe::kPooled ? nullptr : "kind must be pooled";
     },
     [](const Probe& op, CudaContext& context) {
       const Means means(op, false, context);
       run_means(means, context);
       run_products(op, means, nullptr, context);
     }},
    {"portable", [](const Probe&, const CudaContext&) -> const char* { return nullptr; },
     run_plain}};

void run(const Probe& op, CudaContext& context) {
  if (op.score.size() > 0) run_variants(kVariants, op, context);
}

HEDDLE_REGISTER(Probe);
HEDDLE_EXPLAIN(Probe, kVariants);

}  // namespace
}  // namespace heddle
