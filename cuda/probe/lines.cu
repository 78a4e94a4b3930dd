#include "probe/lines.h"

#include <cuda_pipeline.h>

#include <algorithm>
#include <type_traits>

#include "common/elements.cuh"
#include "common/lanes.cuh"
#include "common/launch.h"
#include "probe/lines_sm90.h"

// Masses of keys and of distances for up to 128 last queries, from sm_80 on:
//
//   P[i,t] = softmax(scale * q[i] . k)[t]     where t <= p(i)
//   score[0,t] = mean(i) P[i,t]               score[1,e] = mean(i) P[i,p(i)-e]
//
// A CTA has one query head and a chunk of keys, 64 at a time; heads of a group stand next to each
// other, so that they find a tile in L2. Each of 4 warps keeps 32 queries as columns of m16n8k16
// products in registers and takes keys as rows from shared memory. One walk leaves the largest
// score and the sum of each query, one the sums. A thread's scores lie on few diagonals of 8 x 8
// squares: it adds them up in registers, and one thread per distance finishes them. Chunks overlap
// in 127 distances, which are added last. No sum depends on timing.
namespace heddle {
namespace {

constexpr int kLineQueries = 128, kLineKeys = 64, kLineThreads = 128, kLineWarps = 4;
constexpr int64_t kMostLineChunk = 1024;
constexpr int kLineCtas = 3;  // of a multiprocessor, which registers allow
constexpr int kWarpQueries = kLineQueries / kLineWarps, kQueryTiles = kWarpQueries / 8;
// Offsets between squares of a warp's queries and of the tile's keys, and the sums of a row of them
constexpr int kOffsets = kQueryTiles + kLineKeys / 8 - 1, kSums = kOffsets * 8;

struct LineArgs {
  Probe op;
  LineStrips chunks;
  float2* stats;  // [b hq, chunks, 128] largest score and sum, in powers of 2
  float* lse;     // [b hq, 128]
  int* arrivals;  // [b hq]
};

template <class T, int kD> struct LineMemory {
  T k[2][kLineKeys][kD + 8];  // rows of a fragment fall into different banks
  float sums[kLineWarps][8][kSums];
  float columns[kLineWarps][kLineKeys];
  bool last;
  alignas(16) float distances[];  // [chunk + 128]

  static size_t bytes(int64_t chunk) {
    return sizeof(LineMemory) + static_cast<size_t>(chunk + kLineQueries) * sizeof(float);
  }
};

template <class T>
__device__ void multiply(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, BF16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// A 16 x 16 fragment of rows in shared memory
template <class T> __device__ void load_fragment(uint32_t (&a)[4], const T* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address));
}

// Subnormal results count as zero, as they do on the CPU
__device__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T, int kD> struct LineCta {
  static constexpr int kSteps = kD / 16;
  const LineArgs& args;
  LineMemory<T, kD>& memory;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int square = lane / 4, pair = lane % 4 * 2;  // row and first column of a thread in a square
  int64_t head, split, sq, sk, first, end, ahead;
  const T* k;
  float scale_log2;
  uint32_t frag_q[kQueryTiles][kSteps][2];

  __device__ LineCta(const LineArgs& args, LineMemory<T, kD>& memory) : args(args), memory(memory) {
    const Probe& op = args.op;
    const int64_t heads = op.q.shape[2], group = heads / op.k.shape[2];
    const int64_t within = blockIdx.x % group, at = blockIdx.x / group;
    split = at % args.chunks.count;
    head = at / args.chunks.count * group + within;  // over the batch
    sq = op.q.shape[1];
    sk = op.k.shape[1];
    first = split * args.chunks.length;
    end = min(first + args.chunks.length, sk);
    ahead = sk - sq;
    scale_log2 = static_cast<float>(op.scale * 1.4426950408889634);
    const int64_t b = head / heads, h = head % heads;
    const T* q = static_cast<T*>(op.q.data) + b * op.q.strides[0] + h * op.q.strides[2];
    k = static_cast<T*>(op.k.data) + b * op.k.strides[0] + h / group * op.k.strides[2];
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      const int64_t row = warp * kWarpQueries + n * 8 + square;
#pragma unroll
      for (int i = 0; i < kSteps * 2; ++i)
        frag_q[n][i / 2][i % 2] =
            row < sq ? *reinterpret_cast<const uint32_t*>(q + row * op.q.strides[1] + i * 8 + pair)
                     : 0;
    }
  }

  __device__ int query(int n, int j) const { return warp * kWarpQueries + n * 8 + pair + j; }

  __device__ void load(int64_t t0, int stage) const {
    constexpr int kPieces = kD / 8;
#pragma unroll
    for (int i = static_cast<int>(threadIdx.x); i < kLineKeys * kPieces; i += kLineThreads) {
      const int row = i / kPieces, piece = i % kPieces * 8;
      const bool inside = t0 + row < end;
      __pipeline_memcpy_async(&memory.k[stage][row][piece],
                              k + (inside ? t0 + row : first) * args.op.k.strides[1] + piece, 16,
                              inside ? 0 : 16);
    }
    __pipeline_commit();
  }

  // Calls body(tile's first key, half, acc) for 32 keys at a time and finish(t0) after each tile,
  // which all threads have then seen
  template <class Body, class Finish> __device__ void walk(const Body& body, const Finish& finish) {
    load(first, 0);
    for (int64_t t0 = first; t0 < end; t0 += kLineKeys) {
      const int stage = static_cast<int>((t0 - first) / kLineKeys % 2);
      __pipeline_wait_prior(0);
      __syncthreads();
      if (t0 + kLineKeys < end) load(t0 + kLineKeys, stage ^ 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float acc[2][kQueryTiles][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            uint32_t a[4];
            load_fragment(
                a, &memory.k[stage][half * 32 + m * 16 + lane % 16][step * 16 + lane / 16 * 8]);
#pragma unroll
            for (int n = 0; n < kQueryTiles; ++n) multiply<T>(acc[m][n], a, frag_q[n][step]);
          }
        body(t0, half, acc);
      }
      finish(t0);
    }
  }

  // Whether a query of the CTA does not see the whole tile, and whether one sees a key
  __device__ bool cut(int64_t t0) const {
    return sq < kLineQueries || t0 + kLineKeys > min(ahead + 1, end);
  }
  __device__ bool sees(int row, int64_t t) const { return row < sq && t < end && t <= ahead + row; }
};

// The largest scores and sums of a chunk; the last CTA of a head adds those of all chunks
template <class T, int kD>
__global__ void __launch_bounds__(kLineThreads, kLineCtas)
    probe_stats_kernel(const __grid_constant__ LineArgs args) {
  extern __shared__ __align__(16) char smem[];
  auto& memory = *reinterpret_cast<LineMemory<T, kD>*>(smem);
  LineCta<T, kD> cta(args, memory);
  float most[kQueryTiles][2], sum[kQueryTiles][2] = {};
  for (auto& tile : most) tile[0] = tile[1] = -3e38f;
  cta.walk(
      [&](int64_t t0, int half, float(&acc)[2][kQueryTiles][4]) {
        const bool cut = cta.cut(t0);
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float score[4], top = most[n][j];
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // squares of keys
              score[i] = acc[i / 2][n][i % 2 * 2 + j] * cta.scale_log2;
              if (cut && !cta.sees(cta.query(n, j), t0 + half * 32 + i * 8 + cta.square))
                score[i] = -INFINITY;
              top = fmaxf(top, score[i]);
            }
            if (top > most[n][j]) {
              sum[n][j] *= power_of_2(most[n][j] - top);
              most[n][j] = top;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[n][j] += power_of_2(score[i] - top);
          }
      },
      [](int64_t) {});
  float2* stats = args.stats + cta.head * args.chunks.count * kLineQueries;
#pragma unroll
  for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float top = most[n][j];
      for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      float total = sum[n][j] * power_of_2(most[n][j] - top);
      for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
      if (cta.square == 0) stats[cta.split * kLineQueries + cta.query(n, j)] = {top, total};
    }
  __threadfence();
  __syncthreads();
  int* arrivals = args.arrivals + cta.head;
  if (threadIdx.x == 0) {
    memory.last = atomicAdd(arrivals, 1) == args.chunks.count - 1;
    if (memory.last) *arrivals = 0;
  }
  __syncthreads();
  if (!memory.last) return;
  __threadfence();
  float top = -3e38f, total = 0;
  for (int64_t s = 0; s < args.chunks.count; ++s)
    top = fmaxf(top, stats[s * kLineQueries + threadIdx.x].x);
  for (int64_t s = 0; s < args.chunks.count; ++s) {
    const float2 own = stats[s * kLineQueries + threadIdx.x];
    total += own.y * power_of_2(own.x - top);
  }
  args.lse[cta.head * kLineQueries + threadIdx.x] = top + log2f(total);
}

template <class T, int kD>
__global__ void __launch_bounds__(kLineThreads, kLineCtas)
    probe_sums_kernel(const __grid_constant__ LineArgs args) {
  extern __shared__ __align__(16) char smem[];
  auto& memory = *reinterpret_cast<LineMemory<T, kD>*>(smem);
  LineCta<T, kD> cta(args, memory);
  const int64_t lines = args.chunks.length + kLineQueries;
  for (int64_t i = threadIdx.x; i < lines; i += kLineThreads) memory.distances[i] = 0;
  float lse[kQueryTiles][2];
#pragma unroll
  for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) lse[n][j] = args.lse[cta.head * kLineQueries + cta.query(n, j)];
  const float share = 1.f / static_cast<float>(cta.sq);
  float* score = static_cast<float*>(args.op.score.data) + cta.head * 2 * cta.sk;
  float sums[kOffsets][2] = {};
  cta.walk(
      [&](int64_t t0, int half, float(&acc)[2][kQueryTiles][4]) {
        const bool cut = cta.cut(t0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = half * 32 + i * 8 + cta.square;
          float column = 0;
#pragma unroll
          for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              float p = power_of_2(fmaf(acc[i / 2][n][i % 2 * 2 + j], cta.scale_log2, -lse[n][j]));
              if (cut && !cta.sees(cta.query(n, j), t0 + key)) p = 0;
              column += p;
              sums[n - (half * 4 + i) + kLineKeys / 8 - 1][j] += p;
            }
          column = quad_sum(column);
          if (cta.pair == 0) memory.columns[cta.warp][key] = column;
        }
      },
      [&](int64_t t0) {
#pragma unroll
        for (int u = 0; u < kOffsets; ++u) {
          float* to = &memory.sums[cta.warp][cta.square][u * 8 + cta.pair];
          *reinterpret_cast<float2*>(to) = {sums[u][0], sums[u][1]};
          sums[u][0] = sums[u][1] = 0;
        }
        __syncthreads();
        if (threadIdx.x < kLineKeys && t0 + threadIdx.x < cta.end) {
          float column = 0;
          for (int w = 0; w < kLineWarps; ++w) column += memory.columns[w][threadIdx.x];
          score[t0 + threadIdx.x] = column * share;
        }
        // Query minus key inside the tile, from 1 - kLineKeys on
        for (int i = static_cast<int>(threadIdx.x); i < kLineQueries + kLineKeys - 1;
             i += kLineThreads) {
          float sum = 0;
          for (int w = 0; w < kLineWarps; ++w)
#pragma unroll
            for (int s = 0; s < 8; ++s) {
              const int at = i + 1 - 8 + s - w * kWarpQueries;
              if (at >= 0 && at < kSums) sum += memory.sums[w][s][at];
            }
          memory.distances[args.chunks.length - kLineKeys - (t0 - cta.first) + i + 1] += sum;
        }
      });
  __syncthreads();
  float* distances = args.chunks.of(cta.head, cta.split);
  for (int64_t i = threadIdx.x; i < lines; i += kLineThreads) distances[i] = memory.distances[i];
}

// A CTA has some distances of one head
constexpr int64_t kFewDistances = 4 * kThreads;

__global__ void __launch_bounds__(kThreads) probe_distances_kernel(Probe op, LineStrips strips) {
  const int64_t sk = op.k.shape[1], sq = op.q.shape[1];
  const int64_t ctas = (sk + kFewDistances - 1) / kFewDistances, head = blockIdx.x / ctas;
  const int64_t first = blockIdx.x % ctas * kFewDistances, end = min(first + kFewDistances, sk);
  const float share = 1.f / static_cast<float>(sq);
  float* score = static_cast<float*>(op.score.data) + (head * 2 + 1) * sk;
#pragma unroll 4
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads)
    score[i] = strips.sum(head, sk - sq - i) * share;
}

template <class T, int kD> void enqueue(const LineArgs& args, CudaContext& context) {
  const int64_t heads = args.op.q.shape[0] * args.op.q.shape[2];
  const Launch plan{static_cast<int>(heads * args.chunks.count), kLineThreads,
                    LineMemory<T, kD>::bytes(kMostLineChunk), context.stream};
  launch<probe_stats_kernel<T, kD>>(plan, args);
  launch<probe_sums_kernel<T, kD>>(plan, args);
  add_distances(args.op, args.chunks, context);
}

bool whole_rows(const Tensor& x) {
  for (int i = 0; i < 3; ++i)
    if (!Wide<F16>::fits(x.data, x.shape[3], x.strides[i])) return false;
  return x.strides[3] == 1;
}

}  // namespace

void add_distances(const Probe& op, const LineStrips& strips, CudaContext& context) {
  const int64_t heads = op.q.shape[0] * op.q.shape[2], sk = op.k.shape[1];
  const auto ctas = static_cast<unsigned>(heads * ((sk + kFewDistances - 1) / kFewDistances));
  probe_distances_kernel<<<ctas, kThreads, 0, context.stream>>>(op, strips);
  context.launched("probe_distances_kernel");
}

const char* declines_wide(const Probe& op) {
  if (op.q.dtype == DType::kF32) return "dtype must have 16 bits";
  return whole_rows(op.q) && whole_rows(op.k) ? nullptr : "rows must be aligned to 16 bytes";
}

const char* declines_lines(const Probe& op, const CudaContext& context) {
  if (context.arch < 80) return "the GPU must be sm_80 or later";
  if (op.per != Probe::kLine || op.stride != 1) return "it takes lines, and no stride";
  if (op.score.shape[2] != 2 || op.q.shape[1] > kLineQueries)
    return "there must be one row of at most 128 queries";
  if (op.q.shape[3] != 64 && op.q.shape[3] != 128) return "d must be 64 or 128";
  return declines_wide(op);
}

void run_lines(const Probe& op, CudaContext& context) {
  const int64_t heads = op.q.shape[0] * op.q.shape[2], sk = op.k.shape[1];
  // As many chunks as fill whole waves of CTAs, none longer than shared memory has room for
  const int64_t slots = int64_t{kLineCtas} * context.processors;
  const int64_t waves = (sk * heads + kMostLineChunk * slots - 1) / (kMostLineChunk * slots);
  const int64_t wanted = std::max<int64_t>(waves * slots / heads, 1);
  const int64_t chunk =
      std::clamp<int64_t>((sk + wanted * kLineKeys - 1) / (wanted * kLineKeys) * kLineKeys,
                          kLineQueries, kMostLineChunk);
  const int64_t chunks = (sk + chunk - 1) / chunk;
  HEDDLE_CHECK(heads * chunks < INT32_MAX, kUnsupported, "k", "k is too long for one call");
  const auto parts = static_cast<size_t>(heads * chunks);
  const LineArgs args{
      op,
      {context.scratch<float>(parts * static_cast<size_t>(chunk + kLineQueries)), chunk, chunks},
      context.scratch<float2>(parts * kLineQueries),
      context.scratch<float>(static_cast<size_t>(heads) * kLineQueries),
      context.counters(static_cast<size_t>(heads))};
  const bool wide = op.q.shape[3] == 128;
  if (op.q.dtype == DType::kBF16)
    wide ? enqueue<BF16, 128>(args, context) : enqueue<BF16, 64>(args, context);
  else
    wide ? enqueue<F16, 128>(args, context) : enqueue<F16, 64>(args, context);
}

const char* declines_copies(const Probe& op) {
  for (const Tensor* x : {&op.q, &op.k})
    for (int i = 0; i < 3; ++i)
      if (x->shape[i] > 1 && (x->strides[i] <= 0 || x->strides[i] >= int64_t{1} << 38))
        return "strides must be positive";
  return nullptr;
}

const char* declines_lines_sm90(const Probe& op, const CudaContext& context) {
  if (const char* reason = declines_lines(op, context)) return reason;
  if (context.arch != 90) return "the GPU must be of compute capability 9.0";
  constexpr int64_t kMost = int64_t{1} << 30;  // keys and CTAs are counted in 32 bits
  if (op.k.shape[1] > kMost || op.q.shape[0] * op.q.shape[2] > kMost / context.processors)
    return "k must have at most 2^30 rows, and q as many heads";
  return declines_copies(op);
}

LinesCall lines_sm90(const Probe& op, const MeanArgs (&means)[2], bool bands,
                     CudaContext& context) {
  const auto bytes = [](const Tensor& x) { return x.size() * 2; };
  const auto heads = static_cast<size_t>(op.q.shape[0] * op.q.shape[2]);
  const LinesPlan first(op, context.processors,
                        means[0].count() > 0 ? bytes(means[0].x) + bytes(means[1].x) : 0),
      second(op, context.processors);
  const int64_t strips = second.parts * int64_t{8};
  LinesCall call{
      op,
      first,
      second,
      context.scratch<float2>(heads * static_cast<size_t>(first.parts) * kLineQueries),
      {context.scratch<float>(heads * static_cast<size_t>(strips * (second.strip + kLineQueries))),
       second.strip, strips},
      {means[0], means[1]}};
  const auto tiles = static_cast<size_t>(op.k.shape[1] + kLineQueries - 1) / kLineQueries;
  if (bands) call.bands = context.scratch<float>(heads * tiles * kLineQueries * 2);
  return call;
}

void run_stats_sm90(const LinesCall& call, CudaContext& context) {
  dispatch_copied(call.op,
                  [&]<DType kType, int kD> { launch_stats_sm90<kType, kD>(call, context.stream); });
  context.launched("probe_lines_sm90_kernel");
}

void run_lines_sm90(const LinesCall& call, CudaContext& context) {
  dispatch_copied(call.op,
                  [&]<DType kType, int kD> { launch_lines_sm90<kType, kD>(call, context.stream); });
  context.launched("probe_lines_sm90_kernel");
}

}  // namespace heddle
