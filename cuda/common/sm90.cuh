#pragma once
#include <cuda.h>

#include <cstdint>

#include "common/sm90_format.h"
#include "core/dtype.h"

// Hopper's instructions behind plain names. A Hopper kernel reaches barriers, bulk copies and
// matrix instructions only through this file; tests/emulator puts its own in front of it on the
// include path and runs the same kernel on a CPU.
namespace heddle::sm90 {

using TensorMap = CUtensorMap;

__device__ __forceinline__ uint32_t address_of(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

// Dynamic shared memory as the struct that the kernel keeps there
template <class Smem> __device__ __forceinline__ Smem& shared_memory() {
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  return *reinterpret_cast<Smem*>(dynamic_smem + (-address_of(dynamic_smem) & (alignof(Smem) - 1)));
}
template <class Smem> constexpr size_t shared_memory_bytes() {
  return sizeof(Smem) + alignof(Smem);
}

// One lane of a converged warp
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}\n"
               : "=r"(elected));
  return elected != 0;
}

// A phase ends when all its arrivals came and all bytes that they announced were copied. Waiting on
// a fresh barrier for parity 1 returns at once: the phase before the first counts as over.
struct Barrier {
  uint64_t word;

  __device__ __forceinline__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(this)), "r"(arrivals)
                 : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(this)) : "memory");
  }
  // One arrival, which also makes this phase wait for `bytes`
  __device__ __forceinline__ void arrive_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(this)),
                 "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ bool try_wait(uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(address_of(this)), "r"(parity)
        : "memory");
    return done != 0;
  }
  // Unlike the above, which may sleep for a while, this one answers at once
  __device__ __forceinline__ bool has_ended(uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(address_of(this)), "r"(parity)
        : "memory");
    return done != 0;
  }
  __device__ __forceinline__ void wait(uint32_t parity) {
#ifdef HEDDLE_DEBUG
    // a printf here would make the compiler serialise the matrix instructions
    for (uint32_t tries = 0; !try_wait(parity);) {
      if (++tries == 1u << 24) __trap();
    }
#else
    while (!try_wait(parity)) {
    }
#endif
  }
};

// After init and before the first use by other threads or by copies
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Kernels launched behind this one with `overlaps` may begin once all of its CTAs came here or
// ended
__device__ __forceinline__ void let_next_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// Until the kernel before has ended and its results are seen. A kernel launched with `overlaps`
// gets here in some CTA at least: what is launched behind it waits for it alone.
__device__ __forceinline__ void await_previous() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Barriers between whole warps, numbered 0 to 15; __syncthreads is number 0
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the map's box at these coordinates; what lies outside the tensor arrives as zero and
// counts
__device__ __forceinline__ void copy_to_smem(void* smem, const TensorMap& map, Barrier& full,
                                             int column, int row, int head, int batch, Keep keep) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(address_of(smem)),
      "l"(&map), "r"(address_of(&full)), "r"(column), "r"(row), "r"(head), "r"(batch),
      "l"(static_cast<uint64_t>(keep))
      : "memory");
}

// The other way; what lies outside the tensor is left out
__device__ __forceinline__ void copy_to_gmem(const TensorMap& map, const void* smem, int column,
                                             int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(address_of(smem)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
__device__ __forceinline__ void copy_to_gmem(const TensorMap& map, const void* smem, int column,
                                             int row, int head, int batch, Keep keep) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint"
      " [%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(&map),
      "r"(address_of(smem)), "r"(column), "r"(row), "r"(head), "r"(batch),
      "l"(static_cast<uint64_t>(keep))
      : "memory");
}

// Without a map and without swizzling: `bytes` is a multiple of 16, and both addresses are
__device__ __forceinline__ void copy_to_smem(void* smem, const void* gmem, uint32_t bytes,
                                             Barrier& full) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(address_of(smem)),
      "l"(gmem), "r"(bytes), "r"(address_of(&full))
      : "memory");
}

// Adds f32 numbers from shared to global memory, in no order beside other CTAs
__device__ __forceinline__ void add_to_gmem(float* gmem, const void* smem, uint32_t bytes,
                                            Keep keep) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32"
      " [%0], [%1], %2, %3;" ::"l"(gmem),
      "r"(address_of(smem)), "r"(bytes), "l"(static_cast<uint64_t>(keep))
      : "memory");
}
// Without a map and without swizzling
__device__ __forceinline__ void copy_to_gmem(float* gmem, const void* smem, uint32_t bytes,
                                             Keep keep) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(gmem),
      "r"(address_of(smem)), "r"(bytes), "l"(static_cast<uint64_t>(keep))
      : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until at most kPending groups of this thread still read shared memory
template <int kPending> __device__ __forceinline__ void wait_copies_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until at most kPending groups of this thread are unfinished
template <int kPending> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Makes this thread's writes to shared memory visible to copies and matrix instructions
__device__ __forceinline__ void fence_async_smem() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Between copies to or from global memory and other accesses to it
__device__ __forceinline__ void fence_async_gmem() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// acc[64, N] (+)= A[64, K] B[K, N] for one warpgroup, N = 2 * kRegisters and K = 16, or 32 of e4m3,
// of which B is kK. A is a descriptor of a kK operand or four registers. common/wgmma.cuh has the
// shapes in use.
template <DType kType, Major kB, int kRegisters>
__device__ void wgmma(float (&acc)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kRegisters < 0, "add this shape to common/generate-wgmma.mjs");
}
template <DType kType, Major kB, int kRegisters>
__device__ void wgmma(float (&acc)[kRegisters], const uint32_t (&a)[4], uint64_t b,
                      bool accumulate) {
  static_assert(kRegisters < 0, "add this shape to common/generate-wgmma.mjs");
}

// The same where A is a kMN operand too
template <DType kType, int kRegisters>
__device__ void wgmma_transposed(float (&acc)[kRegisters], uint64_t a, uint64_t b,
                                 bool accumulate) {
  static_assert(kRegisters < 0, "add this shape to common/generate-wgmma.mjs");
}

// acc = A B: what `acc` held is not even read, so that its registers are free until here
template <DType kType, Major kB, int kRegisters>
__device__ void wgmma_first(float (&acc)[kRegisters], uint64_t a, uint64_t b) {
  static_assert(kRegisters < 0, "add this shape to common/generate-wgmma.mjs");
}

// Keeps the compiler from moving uses of these registers across this point
template <int kRegisters> __device__ __forceinline__ void pin(float (&acc)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}
template <int kRegisters> __device__ __forceinline__ void pin(uint32_t (&pairs)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+r"(pairs[i])::"memory");
}

// Before the first matrix instruction that uses registers which were touched since the last wait
template <int kRegisters> __device__ __forceinline__ void wgmma_fence(float (&acc)[kRegisters]) {
  pin(acc);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// The same where all of them are only written
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending groups are unfinished; `acc` belongs to one that is finished then
template <int kPending, int kRegisters>
__device__ __forceinline__ void wgmma_wait(float (&acc)[kRegisters]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  pin(acc);
}

// Registers per thread, given back by one role and taken by another; all warps of a warpgroup call
// it
template <int kCount> __device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount> __device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Stores four 8x8 matrices of 16-bit elements; lane l gives the address of row
// l % 8 of matrix l / 8
__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                            uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// The same with each matrix transposed on its way
__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t address, uint32_t a, uint32_t b,
                                                       uint32_t c, uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

// Loads four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8
// and gets two elements of row l / 4 of each
__device__ __forceinline__ void ldmatrix_x4(uint32_t address, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// Loads four 8x8 matrices of 16-bit elements transposed; lane l gives the address of row
// l % 8 of matrix l / 8
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t address, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void store_zero(uint32_t address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

__device__ __forceinline__ void store_4_floats(uint32_t address, float a, float b, float c,
                                               float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}

__device__ __forceinline__ void store_4_words(uint32_t address, uint4 words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

__device__ __forceinline__ uint4 load_4_words(uint32_t address) {
  uint4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

__device__ __forceinline__ void store_4_bytes(uint32_t address, uint32_t bits) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(bits) : "memory");
}

__device__ __forceinline__ void store_16_bits(uint32_t address, uint16_t bits) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(bits) : "memory");
}

// From global to shared memory, both aligned
__device__ __forceinline__ void store_16_bytes(uint32_t address, const void* gmem) {
  uint32_t a, b, c, d;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "l"(gmem));
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// The same some time later, or zeros where there is nothing. Groups of a thread end in their order.
__device__ __forceinline__ void request_16_bytes(uint32_t address, const void* gmem, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(gmem),
               "r"(exists ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_requests() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most kPending groups of this thread are unfinished
template <int kPending> __device__ __forceinline__ void wait_requests() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// From shared to global memory, both aligned
__device__ __forceinline__ void copy_16_bytes(void* gmem, uint32_t address) {
  uint32_t a, b, c, d;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(address)
               : "memory");
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(gmem), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// Adds for all CTAs to see, returns what was there before
__device__ __forceinline__ int fetch_add(int* counter, int value) {
  return atomicAdd(counter, value);
}

// The same between CTAs that tell each other something by it: what they did before they added is
// seen after this, as is by them what this one did
__device__ __forceinline__ int fetch_add_ordered(int* counter, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

// How often other CTAs have signalled; what they did before is seen
__device__ __forceinline__ int look_at_signals(const int* counter) {
  int seen;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  return seen;
}
// Until other CTAs have signalled so many times, and all they did before is seen; or no longer,
// where a fault says that they may never
__device__ __forceinline__ void wait_for_signals(const int* counter, int count, const int* fault) {
  while (look_at_signals(counter) != count &&
         !(fault && *static_cast<const volatile int*>(fault))) {
  }
}
__device__ __forceinline__ void signal(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// Orders this thread's accesses to global memory for all CTAs
__device__ __forceinline__ void fence_gmem() { __threadfence(); }

// What another CTA wrote, not what an older look at it left in the cache
template <class T> __device__ __forceinline__ T load_fresh(const T* gmem) { return __ldcg(gmem); }

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN stays
__device__ __forceinline__ float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

// Between 0 and 1, and 0 for NaN, which costs nothing behind a sum
__device__ __forceinline__ float saturate(float x) { return __saturatef(x); }

// Two elements in one register, `low` in the lower half
template <DType kType> __device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(kType == DType::kF16 || kType == DType::kBF16);
  uint32_t packed;
  // the first source goes to the upper half
  if constexpr (kType == DType::kBF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// Four of e4m3, `a` in the lowest byte; what is beyond 448 becomes 448
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

// Two of e4m3 as f16
__device__ __forceinline__ uint32_t unpack_e4m3(uint16_t pair) {
  uint32_t both;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"(pair));
  return both;
}

template <DType kType> __device__ __forceinline__ float unpack(uint16_t bits) {
  static_assert(kType == DType::kF16 || kType == DType::kBF16 || kType == DType::kE4M3);
  if constexpr (kType == DType::kE4M3) {
    uint32_t pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(bits));
    return unpack<DType::kF16>(static_cast<uint16_t>(pair));
  } else if constexpr (kType == DType::kBF16) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
}

}  // namespace heddle::sm90

#include "common/wgmma.cuh"
