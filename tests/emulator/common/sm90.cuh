#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/sm90_format.h"
#include "core/dtype.h"
#include "cuda_runtime.h"

// The emulator's side of cuda/common/sm90.cuh: the same names, done by emulator.h. Standing in
// front of it on the include path it is all that a kernel notices of not running on a GPU.

namespace heddle::sm90 {

using emulator::cta;
using emulator::TensorMap;

inline uint32_t address_of(const void* smem) { return cta->address_of(smem); }

template <class Smem> Smem& shared_memory() {
  uint8_t* base = cta->smem();
  return *reinterpret_cast<Smem*>(base + (-address_of(base) & (alignof(Smem) - 1)));
}
template <class Smem> constexpr size_t shared_memory_bytes() {
  return sizeof(Smem) + alignof(Smem);
}

inline bool elect_one() { return threadIdx.x % 32 == cta->elected_lane(); }

struct Barrier {
  uint64_t word;

  void init(uint32_t arrivals) { cta->barrier_init(address_of(this), static_cast<int>(arrivals)); }
  void arrive() { cta->barrier_arrive(address_of(this), 0); }
  void arrive_expect(uint32_t bytes) { cta->barrier_arrive(address_of(this), bytes); }
  bool has_ended(uint32_t parity) { return cta->barrier_noticed(address_of(this), parity); }
  void wait(uint32_t parity) { cta->barrier_wait(address_of(this), parity); }
};

// CTAs run one after the other
inline void let_next_begin() {}
inline void await_previous() {}
inline void fence_barrier_init() { cta->barrier_publish(); }
inline void named_barrier_sync(int id, int threads) { cta->named_sync(id, threads); }
inline void named_barrier_arrive(int id, int threads) { cta->named_arrive(id, threads); }

inline void prefetch(const TensorMap&) {}
inline void copy_to_smem(void* smem, const TensorMap& map, Barrier& full, int column, int row,
                         int head, int batch, Keep) {
  cta->copy_in(address_of(smem), map, address_of(&full), column, row, head, batch);
}
inline void copy_to_gmem(const TensorMap& map, const void* smem, int column, int row, int head,
                         int batch, Keep = Keep::kNormal) {
  cta->copy_out(map, address_of(smem), column, row, head, batch);
}
inline void copy_to_smem(void* smem, const void* gmem, uint32_t bytes, Barrier& full) {
  cta->copy_in(address_of(smem), gmem, bytes, address_of(&full));
}
inline void add_to_gmem(float* gmem, const void* smem, uint32_t bytes, Keep) {
  cta->add_out(gmem, address_of(smem), bytes);
}
inline void copy_to_gmem(float* gmem, const void* smem, uint32_t bytes, Keep) {
  cta->copy_out(gmem, address_of(smem), bytes);
}
inline void commit_copies() { cta->copies_commit(); }
template <int kPending> void wait_copies_read() { cta->copies_wait(kPending); }
template <int kPending> void wait_copies() { cta->copies_wait(kPending); }
inline void fence_async_smem() { cta->fence_async(); }
inline void fence_async_gmem() {}

template <DType kType, Major kB, int kRegisters>
void wgmma(float (&acc)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  cta->product(acc, nullptr, {kType, Major::kK, kB, 2 * kRegisters, accumulate, a, b, false});
}
template <DType kType, Major kB, int kRegisters>
void wgmma(float (&acc)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  cta->product(acc, a, {kType, Major::kK, kB, 2 * kRegisters, accumulate, 0, b, true});
}
template <DType kType, Major kB, int kRegisters>
void wgmma_first(float (&acc)[kRegisters], uint64_t a, uint64_t b) {
  wgmma<kType, kB>(acc, a, b, false);
}
template <DType kType, int kRegisters>
void wgmma_transposed(float (&acc)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  cta->product(acc, nullptr,
               {kType, Major::kMN, Major::kMN, 2 * kRegisters, accumulate, a, b, false});
}
template <class T, int kRegisters> void pin(T (&)[kRegisters]) {}
template <int kRegisters> void wgmma_fence(float (&)[kRegisters]) { cta->products_fence(); }
inline void wgmma_fence() { cta->products_fence(); }
inline void wgmma_commit() { cta->products_commit(); }
// inline, so that who asks stands where the kernel waits
template <int kPending, int kRegisters>
[[gnu::always_inline]] inline void wgmma_wait(float (&)[kRegisters]) {
  cta->products_wait(kPending);
}

template <int kCount> void lower_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24);
  cta->set_registers(kCount);
}
template <int kCount> void raise_registers() {
  static_assert(kCount % 8 == 0 && kCount <= 256);
  cta->set_registers(kCount);
}

inline void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const int lane = threadIdx.x % 32;
  const uint32_t values[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    // this lane has two elements of row lane / 4 of each matrix
    const uint32_t row = cta->exchange(address, 8 * i + lane / 4);
    cta->store(row + static_cast<uint32_t>(lane % 4) * 4, &values[i], 4);
  }
  cta->meet_warp();
}

inline void stmatrix_x4_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                   uint32_t d) {
  const int lane = threadIdx.x % 32;
  const uint32_t values[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    // this lane has two elements of column lane / 4 of each matrix
    for (int j = 0; j < 2; ++j) {
      const uint32_t row = cta->exchange(address, 8 * i + lane % 4 * 2 + j);
      const auto bits = static_cast<uint16_t>(values[i] >> (16 * j));
      cta->store(row + static_cast<uint32_t>(lane / 4) * 2, &bits, 2);
    }
  cta->meet_warp();
}

inline void ldmatrix_x4(uint32_t address, uint32_t (&to)[4]) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i)
    // this lane gets two elements of row lane / 4 of each matrix
    cta->load(&to[i],
              cta->exchange(address, 8 * i + lane / 4) + static_cast<uint32_t>(lane % 4) * 4, 4);
  cta->meet_warp();
}

inline void ldmatrix_x4_transposed(uint32_t address, uint32_t (&to)[4]) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    // this lane gets two elements of column lane / 4 of each matrix
    for (int j = 0; j < 2; ++j) {
      const uint32_t row = cta->exchange(address, 8 * i + lane % 4 * 2 + j);
      cta->load(&pair[j], row + static_cast<uint32_t>(lane / 4) * 2, 2);
    }
    std::memcpy(&to[i], pair, 4);
  }
  cta->meet_warp();
}

inline void store_zero(uint32_t address) {
  const uint8_t zeros[16] = {};
  cta->store(address, zeros, 16);
}
inline void store_4_floats(uint32_t address, float a, float b, float c, float d) {
  const float values[4] = {a, b, c, d};
  cta->store(address, values, 16);
}
inline void store_4_words(uint32_t address, uint4 words) { cta->store(address, &words, 16); }
inline uint4 load_4_words(uint32_t address) {
  uint4 words;
  cta->load(&words, address, 16);
  return words;
}
inline void store_4_bytes(uint32_t address, uint32_t bits) { cta->store(address, &bits, 4); }
inline void store_16_bits(uint32_t address, uint16_t bits) { cta->store(address, &bits, 2); }
inline void store_16_bytes(uint32_t address, const void* gmem) { cta->store(address, gmem, 16); }
inline void request_16_bytes(uint32_t address, const void* gmem, bool exists) {
  cta->request(address, exists ? gmem : nullptr);
}
inline void commit_requests() { cta->copies_commit(); }
template <int kPending> void wait_requests() { cta->copies_wait(kPending); }
inline void copy_16_bytes(void* gmem, uint32_t address) { cta->load(gmem, address, 16); }
inline int fetch_add(int* counter, int value) {
  const int before = *counter;
  *counter += value;
  return before;
}
inline int fetch_add_ordered(int* counter, int value) { return fetch_add(counter, value); }
// CTAs run one after the other: what has not been signalled by now never will be
inline void wait_for_signals(const int* counter, int count, const int*) {
  if (*counter != count) emulator::fault("a wait for a CTA that may not have begun");
}
inline int look_at_signals(const int* counter) { return *counter; }
inline void signal(int* counter) { ++*counter; }
inline void fence_gmem() {}
template <class T> T load_fresh(const T* gmem) { return *gmem; }
// flushes what is no normal number
inline float reciprocal_approx(float x) {
  const float y = 1 / (std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x);
  return std::fabs(y) < 0x1p-126f ? std::copysign(0.f, y) : y;
}
inline float exp2_approx(float x) { return std::exp2(x); }
// no better between 1/2 and 2
inline float log2_approx(float x) { return std::nearbyint(std::log2(x) * 0x1p22f) * 0x1p-22f; }
inline float relu(float x) { return x < 0 ? 0 : x; }
inline float saturate(float x) { return x > 0 ? std::fmin(x, 1.f) : 0; }

template <DType kType> uint32_t pack(float low, float high) {
  static_assert(kType == DType::kF16 || kType == DType::kBF16);
  return emulator::encode(kType, low) | static_cast<uint32_t>(emulator::encode(kType, high)) << 16;
}

inline uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t packed = 0;
  for (const float x : {d, c, b, a}) packed = packed << 8 | emulator::encode(DType::kE4M3, x);
  return packed;
}

inline uint32_t unpack_e4m3(uint16_t pair) {
  const auto half = [](int bits) {
    return emulator::encode(DType::kF16, emulator::decode(DType::kE4M3, bits & 0xff));
  };
  return static_cast<uint32_t>(half(pair)) | static_cast<uint32_t>(half(pair >> 8)) << 16;
}

template <DType kType> float unpack(uint16_t bits) { return emulator::decode(kType, bits); }

}  // namespace heddle::sm90
