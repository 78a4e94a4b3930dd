#pragma once
#include <cstdint>

#ifndef __CUDACC__
#define HEDDLE_HOST_DEVICE inline
#else
#define HEDDLE_HOST_DEVICE __host__ __device__ __forceinline__
#endif

// Bit patterns that Hopper's instructions take; the kernels write them, the emulator reads them
namespace heddle::sm90 {

// How an operand lies in shared memory: along the reduced dimension or along M or N
enum class Major { kK, kMN };

// How long L2 should keep what a copy reads
enum class Keep : uint64_t {
  kNormal = 0x1000000000000000,
  kShortly = 0x12F0000000000000,
  kLong = 0x14F0000000000000,
};

// Describes an operand with 128-byte swizzle to a matrix instruction. `leading_bytes` lie between
// panels of 64 columns (used by kMN alone), `stride_bytes` between groups of 8 rows.
HEDDLE_HOST_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes,
                                              uint32_t stride_bytes) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | uint64_t{1} << 62;
}

// The operand `bytes` further. The upper half stays, so that it costs one addition.
HEDDLE_HOST_DEVICE uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & ~uint64_t{0xFFFFFFFF}) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

}  // namespace heddle::sm90
