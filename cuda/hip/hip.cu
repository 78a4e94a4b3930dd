#include "core/hip.h"

#include <cuda_pipeline.h>

#include <algorithm>

#include "common/elements.cuh"
#include "common/sm80.cuh"
#include "common/team.cuh"
#include "core/registry.h"

// The search of HiP on any GPU from sm_80 on. A CTA of 8 warps takes one list after the other: the
// queries of a head stay in shared memory, 64 keys at a time are gathered beside them, and
//
//   best[key] = max over queries that may see it of q . k
//
// comes out of m16n8k16 products with keys as rows (f32 has no such products and multiplies
// plainly). A stage of few lists splits their chunks among CTAs, the last of which to finish
// chooses.
namespace heddle {
namespace {

constexpr int kMostQueries = 128;

struct HipArgs {
  Hip op;
  uint32_t* slots;
  int64_t slot, tasks;
  int members;
  int* arrivals;
  int* fault;
  bool wide;  // rows of q and k may be copied 16 bytes at a time
};

// A row of shared memory: rows of a fragment fall into different banks
template <class T> HEDDLE_HD constexpr int row_width(int64_t d) {
  return static_cast<int>((d + 15) / 16 * 16) + (sizeof(T) == 2 ? 8 : 1);
}
HEDDLE_HD inline int padded_queries(const Hip& op) {
  return static_cast<int>((op.block_q / op.stride_q + 7) / 8 * 8);
}

template <class T> class Scorer {
 public:
  __device__ Scorer(const HipArgs& args, const HipPlace& place, char* smem)
      : args_(args), op_(args.op), place_(place), width_(row_width<T>(args.op.q.shape[3])) {
    smem_k_ = reinterpret_cast<T*>(smem);   // [64, width]
    smem_q_ = smem_k_ + kHipTile * width_;  // [queries, width]
    limits_ = reinterpret_cast<int32_t*>(smem_q_ + padded_queries(op_) * width_);
  }
  static size_t bytes(const Hip& op) {
    return static_cast<size_t>((kHipTile + padded_queries(op)) * row_width<T>(op.q.shape[3])) *
               sizeof(T) +
           static_cast<size_t>(padded_queries(op)) * sizeof(int32_t);
  }

  __device__ void load(int64_t head) {
    if (head == head_) return;
    head_ = head;
    const int d = static_cast<int>(op_.q.shape[3]), padded = padded_queries(op_);
    const int64_t stride = op_.stride_q, queries = place_.last - place_.first;
    const bool halves = op_.kind == Hip::kHalves;
    rows_ = static_cast<int>(halves ? max(queries / stride, int64_t{1})
                                    : (queries + stride - 1) / stride);
    const T* q =
        static_cast<T*>(op_.q.data) + place_.b * op_.q.strides[0] + head * op_.q.strides[2];
    const auto number = [&](int64_t query, int e) {
      return to_float(q[query * op_.q.strides[1] + e * op_.q.strides[3]]);
    };
    const auto last_of = [&](int r) { return min(place_.first + (r + 1) * stride, place_.last); };
    // Columns and rows beyond those there are count as zeros
    for (int i = threadIdx.x; i < padded * (width_ - kGap); i += blockDim.x) {
      const int r = i / (width_ - kGap), e = i % (width_ - kGap);
      float x = 0;
      if (r < rows_ && e < d) {
        const int64_t end = last_of(r);
        if (halves) {
          x = number(end - 1, e);
        } else {
          const int64_t first = place_.first + r * stride;
          for (int64_t query = first; query < end; ++query) x += number(query, e);
          x /= static_cast<float>(end - first);
        }
      }
      smem_q_[r * width_ + e] = from_float<T>(x);
    }
    for (int r = threadIdx.x; r < padded; r += blockDim.x) {
      const int64_t limit = halves ? place_.ahead + last_of(r) - 1 - op_.window : place_.end;
      limits_[r] = r < rows_ ? static_cast<int32_t>(limit) : INT32_MIN;
    }
    k_head_ =
        static_cast<T*>(op_.k.data) + head / (op_.q.shape[2] / op_.k.shape[2]) * op_.k.strides[2];
    __syncthreads();
  }

  __device__ void score(HipMemory& memory) {
    gather(memory);
    if (threadIdx.x < kHipTile) memory.best[threadIdx.x] = kLeastOrder;
    __syncthreads();
    if constexpr (sizeof(T) == 2) {
      multiply_tile(memory);
    } else {
      multiply_plainly(memory);
    }
    __syncthreads();
  }

 private:
  static constexpr int kGap = sizeof(T) == 2 ? 8 : 1;

  __device__ const T* key(int64_t t) const {
    if (!op_.block_table.data) return k_head_ + place_.b * op_.k.strides[0] + t * op_.k.strides[1];
    const Tensor& table = op_.block_table;
    const int64_t size = op_.k.shape[1];
    const int64_t page = static_cast<int32_t*>(
        table.data)[place_.b * table.strides[0] + t / size * table.strides[1]];
    if (page < 0 || page >= op_.k.shape[0]) {
      *args_.fault = 1;
      return nullptr;
    }
    return k_head_ + page * op_.k.strides[0] + t % size * op_.k.strides[1];
  }

  __device__ void gather(const HipMemory& memory) {
    const int d = static_cast<int>(op_.k.shape[3]);
    // Whole pieces of 16 bytes of a row by as many threads as it has
    const int pieces = args_.wide ? d * static_cast<int>(sizeof(T)) / 16 : width_ - kGap;
    for (int i = threadIdx.x; i < kHipTile * pieces; i += blockDim.x) {
      const int slot = i / pieces, piece = i % pieces;
      const T* from = memory.keys[slot] < 0 ? nullptr : key(memory.keys[slot]);
      if (!from) continue;
      if (args_.wide) {
        constexpr int kElements = 16 / sizeof(T);
        __pipeline_memcpy_async(smem_k_ + slot * width_ + piece * kElements,
                                from + piece * kElements, 16);
      } else {
        smem_k_[slot * width_ + piece] =
            piece < d ? from[piece * op_.k.strides[3]] : from_float<T>(0.f);
      }
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }

  // Four warps have 16 keys each, the other four the same keys and the other half of the queries
  __device__ void multiply_tile(HipMemory& memory) {
    constexpr int kTiles = kMostQueries / 8 / 2;
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    const int warp = threadIdx.x / 32, first_key = warp % 4 * 16, half = warp / 4;
    const int tiles = padded_queries(op_) / 8, depth = width_ - kGap;
    float acc[kTiles][4] = {};
    const auto word = [](const T* x) { return *reinterpret_cast<const uint32_t*>(x); };
    for (int e = 0; e < depth; e += 16) {
      const T* k = smem_k_ + (first_key + group) * width_ + e + pair;
      const uint32_t a[4] = {word(k), word(k + 8 * width_), word(k + 8), word(k + 8 * width_ + 8)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (2 * n + half >= tiles) break;
        const T* q = smem_q_ + ((2 * n + half) * 8 + group) * width_ + e + pair;
        multiply<T>(acc[n], a, word(q), word(q + 8));
      }
    }
    uint32_t best[2] = {kLeastOrder, kLeastOrder};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (2 * n + half >= tiles) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = (2 * n + half) * 8 + pair + i % 2;
        if (memory.keys[first_key + group + i / 2 * 8] <= limits_[query])
          best[i / 2] = max(best[i / 2], order_of(acc[n][i]));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      best[i] = max(best[i], __shfl_xor_sync(~0u, best[i], 1));
      best[i] = max(best[i], __shfl_xor_sync(~0u, best[i], 2));
      if (lane % 4 == 0) atomicMax(&memory.best[first_key + group + i * 8], best[i]);
    }
  }

  __device__ void multiply_plainly(HipMemory& memory) {
    const int slot = threadIdx.x % kHipTile, depth = static_cast<int>(op_.q.shape[3]);
    uint32_t best = kLeastOrder;
    for (int r = threadIdx.x / kHipTile; r < rows_; r += blockDim.x / kHipTile) {
      if (memory.keys[slot] < 0 || memory.keys[slot] > limits_[r]) continue;
      float sum = 0;
      for (int e = 0; e < depth; ++e)
        sum = fmaf(to_float(smem_k_[slot * width_ + e]), to_float(smem_q_[r * width_ + e]), sum);
      best = max(best, order_of(sum));
    }
    atomicMax(&memory.best[slot], best);
  }

  const HipArgs& args_;
  const Hip& op_;
  const HipPlace& place_;
  const int width_;
  T *smem_k_, *smem_q_;
  int32_t* limits_;  // of a query: the last key that it may be scored with
  int64_t head_ = -1;
  int rows_ = 0;
  const T* k_head_ = nullptr;
};

// Whether all other members are through, whose scores can then be read
__device__ bool arrives_last(int* arrivals, int members) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrivals, 1) == members - 1;
  __syncthreads();
  __threadfence();
  return last;
}

template <class T>
__global__ void __launch_bounds__(kThreads) hip_kernel(const __grid_constant__ HipArgs args) {
  extern __shared__ __align__(16) char smem[];
  __shared__ HipMemory memory;
  const Hip& op = args.op;
  const CtaTeam team;
  const int64_t group = blockIdx.x / args.members, member = blockIdx.x % args.members;
  uint32_t* slot = args.slots + group * args.slot;
  for (int64_t task = group; task < args.tasks; task += gridDim.x / args.members) {
    const HipPlace place = hip_place(op, task);
    if (op.cache_seqlens.data && threadIdx.x == 0) {
      const int32_t keys =
          static_cast<int32_t*>(op.cache_seqlens.data)[place.b * op.cache_seqlens.strides[0]];
      if (keys < op.q.shape[1] || keys > hip_keys(op)) *args.fault = 1;
    }
    Scorer<T> scorer(args, place, smem);
    if (op.kind == Hip::kHalves) {
      hip_halves(team, op, place, scorer, slot, memory);
      continue;
    }
    const HipChunks chunks = hip_chunks(op, place);
    if (chunks.count > op.index.shape[3]) {
      if (args.members == 1) team.each(chunks.count, [&](int64_t i) { slot[i] = kNoOrder; });
      hip_descend(team, op, place, chunks, member, args.members, scorer, slot, memory);
      if (args.members > 1 && !arrives_last(args.arrivals + group, args.members)) continue;
    } else if (member > 0) {
      continue;
    }
    hip_keep(team, op, place, chunks, slot, memory);
  }
}

template <class T> bool copies_wide(const Hip& op) {
  constexpr int64_t kElements = 16 / sizeof(T);
  const int64_t* strides = op.k.strides;
  return sizeof(T) == 2 && strides[3] == 1 && op.k.shape[3] % 16 == 0 &&
         reinterpret_cast<uintptr_t>(op.k.data) % 16 == 0 && strides[0] % kElements == 0 &&
         strides[1] % kElements == 0 && strides[2] % kElements == 0;
}

template <class T> void search(HipArgs args, CudaContext& context) {
  const Hip& op = args.op;
  const size_t bytes = Scorer<T>::bytes(op);
  auto* kernel = hip_kernel<T>;
  HEDDLE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)));
  int resident = 0;
  HEDDLE_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, bytes));
  HEDDLE_CHECK(resident > 0, kUnsupported, "q", "block and d need ", bytes,
               " bytes of shared memory, more than this GPU has");
  const int64_t groups = std::min<int64_t>(args.tasks, int64_t{resident} * context.processors);
  const int64_t tiles = (op.most_chunks() + kHipTile / 2 - 1) / (kHipTile / 2);
  const int64_t items = tiles * (op.q.shape[2] / op.index.shape[1]);
  args.members = 1;
  if (op.kind == Hip::kStage && groups == args.tasks)
    args.members = static_cast<int>(std::clamp<int64_t>(
        int64_t{resident} * context.processors / args.tasks, 1, std::max<int64_t>(items, 1)));
  args.slot = hip_slot(op);
  const auto words = static_cast<size_t>(groups * args.slot);
  args.slots = context.scratch<uint32_t>(words + static_cast<size_t>(groups));
  args.arrivals = reinterpret_cast<int*>(args.slots + words);
  if (args.members > 1)
    HEDDLE_CUDA(cudaMemsetAsync(
        args.slots, 0, (words + static_cast<size_t>(groups)) * sizeof(uint32_t), context.stream));
  args.wide = copies_wide<T>(op);
  const auto ctas = static_cast<unsigned>(groups * args.members);
  kernel<<<ctas, kThreads, bytes, context.stream>>>(args);
  context.launched("hip_kernel");
}

void run(const Hip& op, CudaContext& context) {
  HipArgs args{};
  args.op = op;
  args.tasks = op.count.size();
  if (args.tasks == 0) return;
  args.fault = context.fault("cacheSeqlens must be from sq to sk, and blockTable must name pages");
  dispatch_float(op.q.dtype, [&]<class T>(T) { search<T>(args, context); });
}

HEDDLE_REGISTER(Hip);

}  // namespace
}  // namespace heddle
