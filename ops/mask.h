#pragma once
#include <bit>

#include "core/mask.h"
#include "core/rules.h"

namespace heddle {

// The mask of an operator that attends, as members of its struct. Sets of bits are as core/mask.h
// has them. With packed sequences the block rows of sequence i begin at cu_seqlens_q[i] / block_q +
// i.
struct MaskArguments {
  Tensor mask_blocks;     // [b, hm, block rows, words] i32: listed blocks; hm is 1, hk or hq
  Tensor mask_columns;    // [b, hm, words] i32: keys that every query sees; [n, ...] when packed
  Tensor mask_diagonals;  // the same for distances from query to key
  Tensor mask_index;   // [b, hm, block rows, width] i32: first keys of what mask_blocks lists, for
                       // kernels that gather; none before the sink tokens, none twice
  Tensor mask_count;   // [b, hm, block rows] i32
  Tensor mask_bounds;  // [b, sq, 2] i32: no key before the first or from the second on is seen
  int64_t mask_block_q = 128, mask_block_k = 128;
  int64_t mask_window = 0, mask_sink_tokens = 0;  // seen beside the lists; 0 is none
  bool masked = false;                            // without it every key is listed

  template <class Op, class Schema> static void describe_mask(Schema& schema) {
    schema.optional("mask_blocks", &Op::mask_blocks, "b hm mr mw", kI32);
    schema.optional("mask_index", &Op::mask_index, "b hm mr ml", kI32);
    schema.optional("mask_count", &Op::mask_count, "b hm mr", kI32);
    schema.optional("mask_columns", &Op::mask_columns, "b hm tw", kI32)
        .when("cu_seqlens_q", "n hm tw");
    schema.optional("mask_diagonals", &Op::mask_diagonals, "b hm tw", kI32)
        .when("cu_seqlens_q", "n hm tw");
    schema.optional("mask_bounds", &Op::mask_bounds, "b sq 2", kI32);
    schema.integer("mask_block_q", &Op::mask_block_q, 128).at_least(1).at_most(1024);
    schema.integer("mask_block_k", &Op::mask_block_k, 128).at_least(1).at_most(128);
    schema.integer("mask_window", &Op::mask_window, 0).at_least(0);
    schema.integer("mask_sink_tokens", &Op::mask_sink_tokens, 0).at_least(0);
    schema.flag("masked", &Op::masked);
  }

  // `sequences` is 0 unless they are packed; `sk` counts the keys that a sequence may have
  void validate_mask(int64_t sq, int64_t sk, int64_t hq, int64_t hk, int64_t sequences) const {
    if (!masked) return;
    const auto words = [](int64_t bits) { return (bits + 31) / 32; };
    for (const Tensor* set : {&mask_blocks, &mask_columns, &mask_diagonals}) {
      if (!*set) continue;
      const int64_t heads = set->shape[1];
      HEDDLE_CHECK(heads == 1 || heads == hk || heads == hq, kShape, "mask",
                   "mask must have 1, hk or hq heads, got ", heads, " (hk is ", hk, ", hq is ", hq,
                   ")");
    }
    HEDDLE_CHECK(bool(mask_index) == bool(mask_count) && (!mask_index || mask_blocks), kArgument,
                 "mask", "mask must have lists beside its bits");
    for (const Tensor* tensor :
         {&mask_blocks, &mask_index, &mask_count, &mask_columns, &mask_diagonals, &mask_bounds})
      HEDDLE_CHECK(!*tensor || tensor->contiguous(), kShape, "mask",
                   "mask must not be made of strided tensors, got ", *tensor);
    const auto power = [](int64_t x) { return std::has_single_bit(static_cast<uint64_t>(x)); };
    HEDDLE_CHECK(mask_block_q % 16 == 0 || power(mask_block_q), kArgument, "mask",
                 "mask must have query blocks of a power of two or a multiple of 16, got ",
                 mask_block_q);
    HEDDLE_CHECK(power(mask_block_k), kArgument, "mask",
                 "mask must have key blocks of a power of two, got ", mask_block_k);
    if (mask_blocks) {
      const int64_t rows =
          sequences ? sq / mask_block_q + sequences : (sq + mask_block_q - 1) / mask_block_q;
      HEDDLE_CHECK(mask_blocks.shape[2] == rows, kShape, "mask", "mask must have ", rows,
                   " rows of blocks, got ", mask_blocks.shape[2], " (sq is ", sq, ")");
      const int64_t most = words((sk + mask_block_k - 1) / mask_block_k);
      HEDDLE_CHECK(sequences ? mask_blocks.shape[3] <= most : mask_blocks.shape[3] == most, kShape,
                   "mask", "mask must have ", most, " words in a row of blocks, got ",
                   mask_blocks.shape[3], " (sk is ", sk, ")");
    }
  }

  MaskView mask_view(int64_t sq, int64_t hq) const {
    const Tensor& tokens = mask_columns ? mask_columns : mask_diagonals;
    MaskView view{};
    view.blocks = mask_blocks ? mask_blocks.as<int32_t>() : nullptr;
    view.columns = mask_columns ? mask_columns.as<int32_t>() : nullptr;
    view.diagonals = mask_diagonals ? mask_diagonals.as<int32_t>() : nullptr;
    view.bounds = mask_bounds ? mask_bounds.as<int32_t>() : nullptr;
    view.heads = mask_blocks ? mask_blocks.shape[1] : tokens ? tokens.shape[1] : 1;
    view.block_rows = mask_blocks ? mask_blocks.shape[2] : 0;
    view.block_words = mask_blocks ? mask_blocks.shape[3] : 0;
    view.token_words = tokens ? tokens.shape[2] : 0;
    view.hq = hq;
    view.sq = sq;
    view.block_q = mask_block_q;
    view.window = mask_window;
    view.sink_tokens = mask_sink_tokens;
    view.block_k_log2 = std::countr_zero(static_cast<uint64_t>(mask_block_k));
    return view;
  }
};

// Lists of blocks in any of their formats, as bits of `blocks`; they are added to what it holds
struct MaskPack {
  static constexpr const char* kName = "mask.pack";
  Tensor blocks;  // [b, hm, rows, words] i32
  Tensor dense;   // [b, hm, rows, columns] bool or u8
  Tensor count;   // [b, hm, rows] i32: how many entries of `index` are read
  Tensor
      index;  // [b, hm, rows, width] i32: columns of blocks in any order, each the first of `run`
  Tensor row_ptr;  // [b * hm * rows + 1] i32, of `column`
  Tensor column;   // [listed] i32
  Tensor flat;     // [b, hm, most] i32: row * columns + column; whatever is outside is skipped
  Tensor bits;     // [b, hm, rows, given] i32 or i64: a bit per block, the lowest first
  int64_t columns = 0, run = 1;

  template <class Schema> static void describe(Schema& schema) {
    schema.inout("blocks", &MaskPack::blocks, "b hm rows words", kI32);
    schema.optional("dense", &MaskPack::dense, "b hm rows columns", DType::kU8 | DType::kBool);
    schema.optional("count", &MaskPack::count, "b hm rows", kI32);
    schema.optional("index", &MaskPack::index, "b hm rows width", kI32);
    schema.optional("row_ptr", &MaskPack::row_ptr, "listed+1", kI32);
    schema.optional("column", &MaskPack::column, "nnz", kI32);
    schema.optional("flat", &MaskPack::flat, "b hm most", kI32);
    schema.optional("bits", &MaskPack::bits, "b hm rows given", DType::kI32 | DType::kI64);
    schema.integer("columns", &MaskPack::columns, 0).at_least(0);
    schema.integer("run", &MaskPack::run, 1).at_least(1);
  }

  void validate() const {
    HEDDLE_CHECK(blocks.contiguous() && blocks.shape[3] * 32 >= columns, kShape, "blocks",
                 "blocks must have a bit for every column, got ", blocks);
    HEDDLE_CHECK(bool(count) == bool(index), kArgument, "index",
                 "count and index must be given together");
    HEDDLE_CHECK(bool(row_ptr) == bool(column), kArgument, "column",
                 "rowPtr and column must be given together");
    HEDDLE_CHECK(!dense || dense.shape[3] == columns, kShape, "dense",
                 "dense must have one entry per block, got ", dense);
    const int64_t held = bits ? bits.shape[3] * (bits.dtype == DType::kI64 ? 64 : 32) : columns;
    HEDDLE_CHECK(held >= columns, kShape, "bits", "bits must have a bit for each of ", columns,
                 " blocks, got ", bits);
    const int64_t rows = blocks.shape[0] * blocks.shape[1] * blocks.shape[2];
    HEDDLE_CHECK(!row_ptr || row_ptr.shape[0] == rows + 1, kShape, "rowPtr",
                 "rowPtr must have one entry more than there are rows of blocks, ", rows + 1,
                 ", got ", row_ptr.shape[0]);
  }
};

// Sets of bits of one shape, joined into the first
struct MaskCombine {
  static constexpr const char* kName = "mask.combine";
  Tensor bits, other;  // [...] i32
  bool intersect = false;

  template <class Schema> static void describe(Schema& schema) {
    schema.inout("bits", &MaskCombine::bits, "...", kI32);
    schema.input("other", &MaskCombine::other, "...", kI32);
    schema.flag("intersect", &MaskCombine::intersect);
  }
};

}  // namespace heddle
