#pragma once
#include "common/sm90.cuh"

namespace heddle::sm90 {

// A tile of 16-bit elements in shared memory, as copies write it and matrix instructions read it:
// panels of 64 columns, a row of a panel is 128 bytes, and its 16-byte pieces are swizzled (piece
// number xor row % 8). Rows come in multiples of 8, so that every panel starts on 1024 bytes.
template <int kRows, int kColumns> struct alignas(1024) Tile {
  static_assert(kRows % 8 == 0 && kColumns % 64 == 0);
  static constexpr uint32_t kPanelBytes = kRows * 128;
  static constexpr uint32_t kBytes = kPanelBytes * (kColumns / 64);
  uint8_t bytes[kBytes];

  // The panel that column `column` begins
  __device__ __forceinline__ uint8_t* panel(int column) {
    return bytes + column / 64 * kPanelBytes;
  }

  // One thread, from row `to` of the tile on; `full` has to expect kBytes of all loads
  __device__ __forceinline__ void load(const TensorMap& map, Barrier& full, int row, int head,
                                       int batch, Keep keep, int to = 0) {
#pragma unroll
    for (int column = 0; column < kColumns; column += 64)
      copy_to_smem(panel(column) + to * 128, map, full, column, row, head, batch, keep);
  }

  // Rows are M or N, columns are reduced: the operand that starts at row `row` and column `k`
  __device__ __forceinline__ uint64_t k_major(int row, int k) const {
    return matrix_descriptor(address_of(bytes), 0, 1024) + ((k_step(k) + row * 128) >> 4);
  }

  // Bytes from there to where column `k` would be
  static constexpr uint32_t k_step(int k) { return k / 64 * kPanelBytes + k % 64 * 2; }

  // Columns are N, rows are reduced: the operand that starts at row `k` and the panel of `column`
  __device__ __forceinline__ uint64_t mn_major(int k, int column = 0) const {
    return matrix_descriptor(address_of(bytes), kPanelBytes, 1024) +
           ((column / 64 * kPanelBytes + k * 128) >> 4);
  }

  // Address of the 8 elements of `row` that start at `column`
  __device__ __forceinline__ uint32_t address(int row, int column) const {
    return address_of(bytes) + column / 64 * kPanelBytes + row * 128 +
           ((column % 64 / 8 ^ row % 8) << 4);
  }
};

// Where the n-th use of a ring stands. Derived from a count, so that no path can forget to flip it.
template <int kStages> struct Turn {
  uint32_t stage, parity;
  __device__ __forceinline__ explicit Turn(uint32_t count)
      : stage(count % kStages), parity(count / kStages & 1) {}
  // The next use, where a division a use would take too long
  __device__ __forceinline__ void advance() {
    stage = stage + 1 == kStages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
  // The stage `uses` before
  __device__ __forceinline__ uint32_t before(uint32_t uses) const {
    return stage < uses ? stage + kStages - uses : stage - uses;
  }
};

}  // namespace heddle::sm90
