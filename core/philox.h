#pragma once
#include <cmath>
#include <cstdint>

#include "core/host_device.h"

// Random numbers that depend on a seed and an index alone, the same on every device:
//
//   element i of a tensor in row-major order, whatever its strides
//   words    = philox(i / 4, seed), the counter in words 0 and 1 of four, the seed as the key
//   u, angle = words 0 and 1 when i % 4 < 2, else words 2 and 3:
//              u = (word + 1/2) 2^-32, angle = 2 pi (word + 1/2) 2^-32
//   normal   = sqrt(-2 log u) times cos(angle) for even i, sin(angle) for odd i
//
// all in double and rounded once to the dtype of the tensor. Devices differ by the last bits of
// their log, sin and cos in double, which is less than the rounding can show but for rare ties.
namespace heddle {

struct Philox {
  uint32_t word[4];
};

// Philox 4x32-10 (Salmon et al., 2011): ten rounds that mix a 128-bit counter under a 64-bit key
HEDDLE_HD inline Philox philox(uint64_t counter, uint64_t key) {
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// Elements 2 * pair and 2 * pair + 1
HEDDLE_HD inline void standard_normals(uint64_t pair, uint64_t seed, double (&normals)[2]) {
  const Philox bits = philox(pair / 2, seed);
  const uint32_t first = bits.word[pair % 2 * 2], second = bits.word[pair % 2 * 2 + 1];
  const double u = (first + 0.5) * 0x1p-32,
               angle = (second + 0.5) * (0x1p-31 * 3.14159265358979323846);
  const double radius = sqrt(-2 * log(u));
  normals[0] = radius * cos(angle);
  normals[1] = radius * sin(angle);
}

// Element `index`
HEDDLE_HD inline double standard_normal(uint64_t index, uint64_t seed) {
  double normals[2];
  standard_normals(index / 2, seed, normals);
  return normals[index % 2];
}

}  // namespace heddle
