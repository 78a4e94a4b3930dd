#pragma once
#include <cuda_runtime.h>

#include "core/host_device.h"
#include "ops/probe.h"

namespace heddle {

constexpr int kRowsOfTile = 256, kColumnsOfTile = 128, kMostPhases = 16;
constexpr int64_t kMostBlock = 1 << 20;

// How the map that `rows` and `antidiagonal` look at lies in q and k: its rows and columns are
// sampled queries and keys, or groups of `stride` of either. Query or key p of group i, which is
// row or column i of phase p, stands at i * stride + p. Of blocks of up to kMostBlock.
struct RowsPlan {
  bool groups;
  int stride, phases;
  int rows, columns;              // of the map
  int block_rows, block_columns;  // of it in a block
  int part;  // columns that are added up at once, which divide those of a block

  explicit RowsPlan(const Probe& op)
      : groups(op.kind == Probe::kAntidiagonal),
        stride(static_cast<int>(op.stride)),
        phases(groups ? stride : 1) {
    const int unit = groups ? stride : 1;
    rows = static_cast<int>((op.q.shape[1] + stride - 1) / stride);
    columns = static_cast<int>((op.k.shape[1] + unit - 1) / unit);
    block_rows = static_cast<int>(op.block_q / stride);
    block_columns = static_cast<int>(op.block_k / unit);
    part = part_of(groups);
  }
  static constexpr int part_of(bool groups) { return groups ? 8 : 64; }

  HEDDLE_HD int tiles() const { return (rows + kRowsOfTile - 1) / kRowsOfTile; }
  // Floats that a CTA keeps of a tile
  HEDDLE_HD int64_t parts() const {
    return (int64_t{columns} + kColumnsOfTile - 1) / kColumnsOfTile * (kColumnsOfTile / part) *
           kRowsOfTile;
  }
};

struct RowsCall {
  Probe op;
  RowsPlan plan;
  int ctas;
  float* parts;  // [ctas, plan.parts()]
};

// An instantiation file for rows and one for groups
template <DType kType, int kD, bool kGroups>
void launch_rows_sm90(const RowsCall& call, cudaStream_t stream);

}  // namespace heddle
