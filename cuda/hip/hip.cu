#include <algorithm>

#include "common/launch.h"
#include "core/slot.h"
#include "hip/step_sm80.cuh"

namespace heddle {
namespace {

template <class Scorer>
__global__ void __launch_bounds__(kHipWarps * 32) hip_kernel(const __grid_constant__ HipArgs args) {
  extern __shared__ __align__(16) char smem[];
  hip_search<Scorer>(args, smem);
}

template <class Scorer>
__global__ void __launch_bounds__(kMostPeers * 32, kHipWarps / kMostPeers)
    hip_peers_kernel(const __grid_constant__ HipArgs args) {
  extern __shared__ __align__(16) char smem[];
  hip_search_peers<Scorer>(args, smem);
}

// What a CTA may have of shared memory, without a little for variables that are static
size_t most_shared_memory() {
  int device = 0, bytes = 0;
  HEDDLE_CUDA(cudaGetDevice(&device));
  HEDDLE_CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<size_t>(bytes) - 1024;
}

// How many CTAs of `bytes` of it, at most that much, a multiprocessor has at the same time
template <class Kernel> int resident_ctas(Kernel* kernel, int warps, size_t bytes) {
  int ctas = 0;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
  HEDDLE_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, kernel, warps * 32, bytes));
  return ctas;
}

// Lists of a kv head's heads side by side, if there are many, and as many fit as otherwise
template <class Scorer> bool search_peers(HipArgs args, CudaContext& context) {
  const Hip& op = args.op;
  auto* kernel = hip_peers_kernel<Scorer>;
  const auto bytes = [&](int peers) {
    return static_cast<size_t>(peers) *
           (Scorer::bytes(op) + sizeof(HipTile) + static_cast<size_t>(hip_slot(op)) * 4);
  };
  const auto warps = [&](int peers) { return resident_ctas(kernel, peers, bytes(peers)) * peers; };
  const int64_t group = op.q.shape[2] / op.k.shape[2];
  int peers = kMostPeers;
  while (peers > 1 && group % peers != 0) --peers;
  if (op.kind != Hip::kHalves || op.near || op.index.shape[1] != op.q.shape[2] || peers == 1 ||
      bytes(peers) > most_shared_memory() ||
      args.tasks < int64_t{2} * kHipWarps * context.processors)
    return false;
  const int alone = warps(1), resident = warps(peers);
  if (resident < alone) return false;
  args.query_bytes = static_cast<size_t>(peers) * Scorer::bytes(op);
  args.heads = args.members = 1;
  args.slot = hip_slot(op);
  args.tasks /= peers;
  args.queue = context.counters(1);
  const int64_t ctas = std::min<int64_t>(args.tasks, resident / peers * context.processors);
  kernel<<<static_cast<unsigned>(ctas), peers * 32, bytes(peers), context.stream>>>(args);
  context.launched("hip_peers_kernel");
  return true;
}

template <class Scorer> void search(HipArgs args, CudaContext& context) {
  if constexpr (Scorer::kHasPeers)
    if (search_peers<Scorer>(args, context)) return;
  constexpr size_t kSharedSlot = size_t{48} << 10, kSharedQueries = size_t{64} << 10;
  const Hip& op = args.op;
  auto* kernel = hip_kernel<Scorer>;
  const bool halves = op.kind == Hip::kHalves;
  const int64_t heads = op.q.shape[2] / op.index.shape[1], tasks = args.tasks;
  const size_t per_head = Scorer::bytes(op);
  // Heads of a group look at the same keys
  const int64_t group = std::min(heads, op.q.shape[2] / op.k.shape[2]);
  args.heads = static_cast<int>(
      std::clamp<int64_t>(static_cast<int64_t>(kSharedQueries / per_head), 1, group));
  args.query_bytes = static_cast<size_t>(args.heads) * per_head;
  args.slot = hip_slot(op);

  // Halves choose in every pass, and a warp of its own waits for nobody, if there are enough lists.
  // Stages choose once; larger CTAs share their queries and leave more of the L1 to keys.
  int warps = halves ? 1 : args.query_bytes > kSharedQueries / 2 ? kHipWarps : 4;
  while (halves && warps < kHipWarps && tasks * warps < kHipWarps * context.processors)
    warps = std::min(2 * warps, kHipWarps);
  const auto resident = [&](size_t bytes) {
    return int64_t{resident_ctas(kernel, warps, bytes)} * context.processors;
  };
  size_t bytes = args.query_bytes + static_cast<size_t>(warps) * sizeof(HipTile);
  const size_t limit = most_shared_memory();
  HEDDLE_CHECK(bytes <= limit, kUnsupported, "q", "block and d need ", bytes,
               " bytes of shared memory, more than this GPU has");
  int64_t ctas = resident(bytes);
  args.members = 1;
  if (!halves) {
    // Lists are shared until there are eight CTAs for each that fits, for none to be late
    const int64_t tiles = (op.most_chunks() + kHipTile / 2 - 1) / (kHipTile / 2);
    const int64_t most = (tiles * heads + warps - 1) / warps;
    args.members =
        static_cast<int>(std::clamp<int64_t>(8 * ctas / tasks, 1, std::max<int64_t>(most, 1)));
  }
  const size_t slot_bytes = static_cast<size_t>(args.slot) * sizeof(uint32_t);
  const bool shared = args.members == 1 && slot_bytes <= kSharedSlot && bytes + slot_bytes <= limit;
  if (shared) ctas = resident(bytes += slot_bytes);
  const int64_t groups = args.members == 1 ? std::min(tasks, ctas) : tasks;
  args.queue = context.counters(1);
  if (!shared) {
    const auto words = static_cast<size_t>(groups * args.slot);
    const size_t all = words + static_cast<size_t>(groups);
    args.slots = context.scratch<uint32_t>(all);
    args.arrivals = reinterpret_cast<int*>(args.slots + words);
    HEDDLE_CUDA(cudaMemsetAsync(args.slots, 0, all * sizeof(uint32_t), context.stream));
  }
  kernel<<<static_cast<unsigned>(groups * args.members), warps * 32, bytes, context.stream>>>(args);
  context.launched("hip_kernel");
}

template <class T, int kD>
__global__ void __launch_bounds__(kStepWarps * 32, 2)
    hip_step_kernel(const __grid_constant__ HipArgs args) {
  hip_step<T, kD>(args);
}

// Scores of all lists have room of their own, which those of a long prompt would not find
bool is_step(const Hip& op) {
  constexpr int64_t kMostScores = int64_t{16} << 20;
  return op.kind == Hip::kStage && op.block_q == op.stride_q && !op.near && !op.cu_seqlens_q &&
         op.k.shape[3] <= 128 && HipStep(op).group <= kStepHeads &&
         op.count.size() * hip_slot(op) <= kMostScores;
}

template <class T, int kD> void search_step(HipArgs args, CudaContext& context) {
  const Hip& op = args.op;
  args.slot = hip_slot(op);
  const int64_t chunks = HipStep(op).chunks();
  const int64_t members = std::max<int64_t>((args.slot + chunks - 1) / chunks, 1);
  args.members = static_cast<int>(members);
  args.slots = context.scratch<uint32_t>(static_cast<size_t>(args.tasks * args.slot));
  args.arrivals = context.counters(static_cast<size_t>(args.tasks));
  hip_step_kernel<T, kD>
      <<<static_cast<unsigned>(args.tasks * members), kStepWarps * 32, 0, context.stream>>>(args);
  context.launched("hip_step_kernel");
}

// Whether rows can be read 16 bytes at a time
bool reads_wide(const Tensor& x) {
  const auto whole = [](int64_t n) { return n % 8 == 0; };
  return whole(x.shape[3]) && x.strides[3] == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         whole(x.strides[0]) && whole(x.strides[1]) && whole(x.strides[2]);
}

template <class T> void choose(const HipArgs& args, CudaContext& context) {
  if constexpr (sizeof(T) == 2) {
    const Tensor& k = args.op.k;
    if (reads_wide(args.op.q) && reads_wide(k) && !args.op.cos) {
      if (is_step(args.op) && k.shape[3] <= 64) return search_step<T, 64>(args, context);
      if (is_step(args.op)) return search_step<T, 128>(args, context);
      const int64_t d = args.op.near ? 256 : k.shape[3];
      if (d <= 64) return search<HipMatrix<T, 64>>(args, context);
      if (d <= 128) return search<HipMatrix<T, 128>>(args, context);
      return search<HipMatrix<T, 256>>(args, context);
    }
  }
  search<HipPlain<T>>(args, context);
}

constexpr const char* kTooMany = "there are too many lists for one call";

void run(const Hip& op, CudaContext& context) {
  HipArgs args{};
  args.op = op;
  args.tasks = op.count.size();
  if (args.tasks == 0) return;
  HEDDLE_CHECK(args.tasks < INT32_MAX, kUnsupported, "index", kTooMany);
  // Lists that are made again for ever would collect words that nobody looks at
  if (op.cache_seqlens)
    args.fault =
        context.fault("cacheSeqlens must be from sq to sk, and blockTable must name pages");
  dispatch_float(op.q.dtype, [&]<class T>(T) { choose<T>(args, context); });
}

__global__ void __launch_bounds__(kThreads)
    hip_places_kernel(const __grid_constant__ HipPlaces op) {
  hip_place_slots(CtaTeam{}, op, blockIdx.x);
}

void run(const HipPlaces& op, CudaContext& context) {
  const int64_t lists = op.count.size();
  if (lists == 0) return;
  HEDDLE_CHECK(lists < INT32_MAX, kUnsupported, "index", kTooMany);
  hip_places_kernel<<<static_cast<unsigned>(lists), kThreads, 0, context.stream>>>(op);
  context.launched("hip_places_kernel");
}

HEDDLE_REGISTER(Hip);
HEDDLE_REGISTER(HipPlaces);

}  // namespace
}  // namespace heddle
