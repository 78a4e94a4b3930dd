#pragma once
#include "common/elements.cuh"
#include "cuda_pipeline.h"

// The emulator's side of cuda/common/sm80.cuh
namespace heddle {

template <class T>
void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static uint32_t all[32][32][6];  // of a warp and lane
  auto& lanes = all[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::copy_n(own, 6, lanes[lane]);
  __syncwarp();
  const auto half = [&](uint32_t word, int i) {
    return to_float(T{static_cast<uint16_t>(word >> 16 * i)});
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2, below = i / 2;
    for (int k = 0; k < 16; ++k)
      acc[i] += half(lanes[row * 4 + k % 8 / 2][k / 8 * 2 + below], k % 2) *
                half(lanes[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
  }
  __syncwarp();
}

inline uint32_t smem_address(const void* pointer) { return emulator::cta->address_of(pointer); }

inline void copy_or_zero(void* smem, const void* from, bool exists) {
  static const uint4 zero{};
  __pipeline_memcpy_async(smem, exists ? from : &zero, 16);
}

template <bool kTransposed> void load_matrices(uint32_t address, uint32_t (&to)[4]) {
  static uint32_t all[32][32];  // of a warp and lane
  auto& lines = all[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  if (address % 16 != 0) emulator::fault("lines of a matrix are aligned to 16 bytes");
  lines[lane] = address;
  __syncwarp();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int along = lane % 4 * 2 + i, own = lane / 4;
      const int line = kTransposed ? along : own, column = kTransposed ? own : along;
      emulator::cta->load(&pair[i],
                          lines[matrix * 8 + line] + static_cast<uint32_t>(column) * sizeof pair[i],
                          sizeof pair[i]);
    }
    std::memcpy(&to[matrix], pair, sizeof pair);
  }
  __syncwarp();
}

inline float exp2_approx(float x) { return std::exp2(x); }

template <class T> uint32_t pack_pair(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  std::memcpy(&word, pair, sizeof word);
  return word;
}

inline float to_tf32(float x) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffffe000u);
}

inline void multiply_tf32(float (&acc)[4], const float (&a)[4], float b0, float b1) {
  static float all[32][32][6];  // of a warp and lane
  auto& lanes = all[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const float own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::transform(own, own + 6, lanes[lane], to_tf32);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2, below = i / 2;
    for (int k = 0; k < 8; ++k)
      acc[i] += lanes[row * 4 + k % 4][k / 4 * 2 + below] * lanes[column * 4 + k % 4][4 + k / 4];
  }
  __syncwarp();
}

}  // namespace heddle
