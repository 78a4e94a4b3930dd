#pragma once
#include "common/launch.h"
#include "common/sm90.cuh"
#include "lightning/decode_sm90.h"
#include "lightning/decode_tile.cuh"

// Many states, one after the other in every CTA: a warp copies whole states into shared memory as
// far ahead as it has room, so that reading never stops while other threads compute and write. They
// hold a state in registers from the first token to the last and write it straight back.
namespace heddle {

constexpr int kDecodeSize = 128;  // of d and e at most
constexpr int kCopiers =
    128;  // a warpgroup, as registers are handed over between warpgroups; one thread works
struct DecodeSmem {
  static constexpr int kNumbers = 3 * kDecodeSize * kDecodeSize, kMostStages = 12;
  alignas(128) float states[kNumbers];
  float q[kDecodeSize], k[kDecodeSize], v[kDecodeSize];
  DecodeTile<8, false>::Sums sums[2];
  sm90::Barrier full[kMostStages], empty[kMostStages];
};

// The place of a state among those that shared memory has room for
struct DecodeTurn {
  int stages, stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

template <DType kType>
__device__ __forceinline__ float decode_element(const void* data, int64_t i) {
  if constexpr (kType == DType::kF32) {
    return static_cast<const float*>(data)[i];
  } else {
    return sm90::unpack<kType>(static_cast<const uint16_t*>(data)[i]);
  }
}

template <DType kType, bool kTransposed>
__global__ void __launch_bounds__(2 * kDecodeThreads + kCopiers, 1)
    lightning_decode_sm90_kernel(const DecodeCall p) {
  using namespace sm90;
  using Tile = DecodeTile<8, kTransposed>;
  auto& smem = shared_memory<DecodeSmem>();
  const int consumers = static_cast<int>(blockDim.x) - kCopiers;
  const int size = p.d * p.e, tasks = static_cast<int>(p.batch) * p.heads_state;
  const int group = p.heads / p.heads_state, thread = threadIdx.x;
  const auto slot_of = [&](int task) {
    const int slot = p.slots[task / p.heads_state * p.slots_stride];
    return slot < p.pool ? slot : -1;
  };
  const auto state_of = [&](int64_t slot, int task) {
    return p.states + (slot * p.heads_state + task % p.heads_state) * size;
  };
  DecodeTurn turn{min(DecodeSmem::kNumbers / size, DecodeSmem::kMostStages)};
  if (thread == 0) {
    for (int stage = 0; stage < turn.stages; ++stage) {
      smem.full[stage].init(1);
      smem.empty[stage].init(consumers / 32);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (thread >= consumers) {
    lower_registers<32>();  // what the others take: more would leave one waiting for registers
    if (thread >= consumers + 32) return;
    if (blockIdx.x == 0) {
      const bool bad = __any_sync(~0u, p.finds_bad(thread % 32, 32));
      if (thread % 32 == 0) *p.fault = bad;
    }
    if (thread % 32 != 0) return;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x, turn.next()) {
      const int slot = slot_of(task);
      smem.empty[turn.stage].wait(turn.parity ^ 1);
      if (slot < 0) {
        smem.full[turn.stage].arrive();
        continue;
      }
      const uint32_t bytes = static_cast<uint32_t>(size) * 4;
      smem.full[turn.stage].arrive_expect(bytes);
      copy_to_smem(smem.states + turn.stage * size, state_of(slot, task), bytes,
                   smem.full[turn.stage]);
    }
    return;
  }

  raise_registers<112>();
  const int own = thread / kDecodeThreads;  // which slab of 64 columns of v
  Tile tile(p.d, p.e, own * kDecodeSlab, thread % kDecodeThreads);
  const auto meet = [&] { named_barrier_sync(1, consumers); };
  // A number of q and of v, or one of k; zeros behind the last
  struct Numbers {
    float first, second;
  };
  const auto read = [&](int task, int t, int member) {
    const int64_t b = task / p.heads_state;
    const int head = task % p.heads_state * group + member, i = thread % kDecodeSize;
    const auto element = [&](const DecodeRows& x, int heads, int count) {
      return i < count ? decode_element<kType>(x.data, x.offset(b, t, head / (p.heads / heads), i))
                       : 0.f;
    };
    if (thread >= 2 * kDecodeSize) return Numbers{0, 0};
    if (thread >= kDecodeSize) return Numbers{element(p.k, p.heads_k, p.d), 0};
    return Numbers{element(p.q, p.heads_q, p.d), element(p.v, p.heads_v, p.e)};
  };
  // What the first token of a task needs is read while the task before is computed
  struct Task {
    int slot = -1;
    float slope = 0;
    Numbers numbers{0, 0};
  };
  const auto prepare = [&](int task) {
    return task < tasks ? Task{slot_of(task), p.slopes[task % p.heads_state * p.slopes_stride],
                               read(task, 0, 0)}
                        : Task{};
  };
  Task coming = prepare(blockIdx.x);
  for (int task = blockIdx.x; task < tasks; task += gridDim.x, turn.next()) {
    const Task now = coming;
    coming = prepare(task + static_cast<int>(gridDim.x));
    const bool skipped = now.slot < 0;
    const float decay = expf(-now.slope);
    const int64_t b = task / p.heads_state;
    const int state_head = task % p.heads_state;
    smem.full[turn.stage].wait(turn.parity);
    if (skipped) {
#pragma unroll
      for (auto& piece : tile.acc) piece[0] = piece[1] = piece[2] = piece[3] = 0;
    } else {
      tile.load_vectors(smem.states + turn.stage * size);
    }
    __syncwarp();
    if (thread % 32 == 0) smem.empty[turn.stage].arrive();
    for (int t = 0; t < p.tokens; ++t)
      for (int member = 0; member < group; ++member) {
        const Numbers numbers = t == 0 && member == 0 ? now.numbers : read(task, t, member);
        meet();  // those before were used
        if (thread < kDecodeSize) {
          smem.q[thread] = numbers.first;
          smem.v[thread] = skipped ? 0 : numbers.second;
        } else if (thread < 2 * kDecodeSize) {
          smem.k[thread - kDecodeSize] = numbers.first;
        }
        meet();
        if (member == 0) {
          tile.advance(decay, smem.k, smem.v);
          if (p.all_states)
            tile.store_vectors(p.all_states +
                               ((b * p.tokens + t) * p.heads_state + state_head) * size);
        }
        const int64_t row = ((b * p.tokens + t) * p.heads + state_head * group + member) * p.e;
        tile.project(smem.q, smem.sums[own], meet, [&](int f, float sum) {
          if (f >= p.e) return;
          const float x = skipped ? 0 : p.scale * sum;
          if constexpr (kType == DType::kF32) {
            static_cast<float*>(p.out)[row + f] = x;
          } else {
            static_cast<uint16_t*>(p.out)[row + f] = static_cast<uint16_t>(pack<kType>(x, 0));
          }
        });
      }
    if (!skipped) tile.store_vectors(state_of(now.slot, task));
  }
}

template <DType kType, bool kTransposed>
void launch_decode_sm90(const DecodeCall& call, cudaStream_t stream) {
  const int64_t tasks = call.batch * call.heads_state;
  const int slabs = (call.e + kDecodeSlab - 1) / kDecodeSlab;
  launch<lightning_decode_sm90_kernel<kType, kTransposed>>(
      {static_cast<int>(std::min<int64_t>(tasks, call.processors)),
       slabs * kDecodeThreads + kCopiers, sm90::shared_memory_bytes<DecodeSmem>(), stream},
      call);
}

}  // namespace heddle
