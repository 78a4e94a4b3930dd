#include "ops/mask.h"

#include "core/cpu_context.h"
#include "core/registry.h"
#include "cpu/walk.h"

namespace heddle {
namespace HEDDLE_ISA_NAMESPACE {
namespace {

// Where an element of a strided tensor stands, by its index per dimension
template <class T, class... Index> T at(const Tensor& tensor, Index... index) {
  int64_t offset = 0;
  int i = 0;
  ((offset += index * tensor.strides[i++]), ...);
  return tensor.as<T>()[offset];
}

void run(const MaskPack& op, CpuContext& context) {
  const int64_t heads = op.blocks.shape[1], rows = op.blocks.shape[2], words = op.blocks.shape[3];
  const int64_t lines = op.blocks.shape[0] * heads * rows;
  // A thread owns a row of blocks, so that no two write a word; the flat lists of a head stay with
  // its first row
  context.parallel(lines, [&](int64_t line, int) {
    const int64_t r = line % rows, h = line / rows % heads, b = line / rows / heads;
    int32_t* bits = op.blocks.as<int32_t>() + line * words;
    const auto list = [&](const char* argument, int64_t c) {
      HEDDLE_CHECK(c >= 0 && c < op.columns, kArgument, argument, argument,
                   " must be from 0 to below ", op.columns, " where it is counted, got ", c,
                   " at [", b, ", ", h, ", ", r, "]");
      bits[c / 32] |= static_cast<int32_t>(1u << c % 32);
    };
    if (op.dense)
      for (int64_t c = 0; c < op.columns; ++c)
        if (at<uint8_t>(op.dense, b, h, r, c)) list("dense", c);
    for (int64_t c = 0; op.bits && c < op.columns; ++c) {
      const bool wide = op.bits.dtype == DType::kI64;
      const int64_t word =
          wide ? at<int64_t>(op.bits, b, h, r, c / 64) : at<int32_t>(op.bits, b, h, r, c / 32);
      if (word >> c % (wide ? 64 : 32) & 1) list("bits", c);
    }
    if (op.count) {
      const int64_t count = at<int32_t>(op.count, b, h, r);
      HEDDLE_CHECK(count >= 0 && count <= op.index.shape[3], kArgument, "count",
                   "count must be from 0 to the width of index, ", op.index.shape[3], ", got ",
                   count, " at [", b, ", ", h, ", ", r, "]");
      for (int64_t i = 0; i < count; ++i) {
        const int64_t first = at<int32_t>(op.index, b, h, r, i);
        list("index", first);
        for (int64_t c = first + 1; c < std::min(first + op.run, op.columns); ++c) list("index", c);
      }
    }
    if (op.row_ptr) {
      const int64_t from = at<int32_t>(op.row_ptr, line), to = at<int32_t>(op.row_ptr, line + 1);
      HEDDLE_CHECK((line > 0 || from == 0) && from <= to && to <= op.column.shape[0], kArgument,
                   "rowPtr", "rowPtr must start at 0, never descend and end inside column, got ",
                   from, " and ", to, " at [", b, ", ", h, ", ", r, "]");
      for (int64_t i = from; i < to; ++i) list("column", at<int32_t>(op.column, i));
    }
    if (op.flat && r == 0)
      for (int64_t i = 0; i < op.flat.shape[2]; ++i) {
        const int64_t pair = at<int32_t>(op.flat, b, h, i);
        if (pair < 0 || pair >= rows * op.columns) continue;
        const int64_t c = pair % op.columns;
        bits[pair / op.columns * words + c / 32] |= static_cast<int32_t>(1u << c % 32);
      }
  });
}

HEDDLE_REGISTER(MaskPack);

}  // namespace

namespace {

void run(const MaskCombine& op, CpuContext& context) {
  const Walk<2> walk({&op.bits, &op.other}, op.bits.rank);
  walk.run(context, 1, [&](int64_t, int64_t count, const auto& at) {
    int32_t* to = op.bits.as<int32_t>() + at[0];
    const int32_t* from = op.other.as<int32_t>() + at[1];
    for (int64_t i = 0; i < count; ++i) {
      int32_t& bits = to[i * walk.stride(0)];
      const int32_t other = from[i * walk.stride(1)];
      bits = op.intersect ? bits & other : bits | other;
    }
  });
}

HEDDLE_REGISTER(MaskCombine);

}  // namespace
}  // namespace HEDDLE_ISA_NAMESPACE
}  // namespace heddle
