#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention/head_scales.h"
#include "attention/list_sm90.h"
#include "common/launch.h"
#include "core/dtype.h"
#include "core/host_device.h"
#include "ops/attention.h"

namespace heddle {

// Elements from one batch, row and head of a [b, s, h, d] tensor to the next; d is contiguous
struct Strides {
  int64_t batch, row, head;
};

// How a bias is read: one number a row, two neighbours of 16 bits at once, or one by one
enum class BiasForm { kNone, kRow, kPairs, kSingles };

// Weights and terms of scores besides soft caps and slopes, as ops/attention.h has them
struct Slots {
  int weights = Attention::kSoftmax;
  bool normalise = true, cosine = false;
  float length_scale = 0, power = 1, offset = 0;
  BiasForm bias_form = BiasForm::kNone;
  DType bias_dtype = DType::kF32;
  const void* bias = nullptr;
  int64_t bias_strides[4] = {};
  const float* level = nullptr;
  int64_t level_strides[3] = {};
  // With cosine, one over the lengths of rows: [b, hq, q_row] and [b, hk, k_row], with 128 numbers
  // behind the last that are read and not used
  const float *q_factors = nullptr, *k_factors = nullptr;
  int64_t q_row = 0, k_row = 0;
  // Rows of q and k are f16: of length 1, those of k less what keys have in common and those of q
  // by all that scores are multiplied by in log2 units. See Passes, and what goes with them, [b,
  // hq, sq]:
  bool units = false;
  const float* shifts = nullptr;  // by how much scores are more than products
  float* peaks = nullptr;         // the highest score of a row, if it is above 0

  // Whether it is more than softmax of products, capped or sloped
  bool used() const {
    return weights != Attention::kSoftmax || length_scale != 0 || cosine ||
           bias_form != BiasForm::kNone;
  }
  // Whether a row whose scores are at most that sees nothing, unless one is no number
  HEDDLE_HD bool hides(float top_log2) const {
    return bias_form != BiasForm::kNone && top_log2 < Attention::kHidingLog2;
  }
};

// Head sizes up to this go through them, as if they were so large
inline constexpr int kSlotColumns = 128;

struct ForwardCall {
  DType dtype;
  int64_t b, sq, sk, hq, hk, d, dv;
  const void *q, *k, *v;  // [b, sq, hq, d], [b, sk, hk, d], [b, sk, hk, dv]
  void* out;              // [b, sq, hq, dv]
  float* lse;             // [b, hq, sq], contiguous
  Strides q_strides, k_strides, v_strides, out_strides;
  float scale, soft_cap;
  bool causal;
  int64_t window;              // 0 is all
  const float *slopes, *sink;  // [hq] or null
  int64_t slopes_stride, sink_stride;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [sequences + 1] or null, b = 1
  int64_t cu_q_stride, cu_k_stride, sequences;
  const int32_t* cache_seqlens;  // [b] or null: keys in use
  int64_t cache_stride;
  // [b, max_pages] or null; k and v are [pages, page_size, hk, d] then, and sk what the table
  // holds. Packed sequences of q have a row of it and a length of their cache each.
  const int32_t* block_table;
  int64_t table_row, table_column, pages, page_size;
  Slots slots;
  bool masked;           // by `lists.mask`
  UnitLists lists;       // sized by size_lists_sm90
  int processors;        // multiprocessors, each of which runs one CTA
  KernelGraphs* graphs;  // or null
  int* tickets;          // two counters at zero, which the kernel leaves at zero
  // Of keys and values that L2 keeps while they are needed
  int64_t section_bytes = int64_t{33} << 20;
  // Of float8
  HeadScales scales;
  DType out_dtype;
  uint8_t* turned;  // turned_bytes() of scratch
};

// How many tiles of so many rows q has of one head and sequence, or at most has if it is packed
inline int64_t forward_row_tiles(const ForwardCall& call, int64_t rows) {
  return call.cu_seqlens_q ? call.sq / rows + call.sequences : (call.sq + rows - 1) / rows;
}

// Float8 has its values transposed before, in tiles [d, 128] of so many keys. Each sequence begins
// with a tile of its own.
constexpr int turned_keys(int d) { return d == 64 ? 96 : 128; }
inline int64_t turned_tiles(const ForwardCall& call, int d) {
  const int keys = turned_keys(d);
  return call.cu_seqlens_k ? call.sk / keys + call.sequences : (call.sk + keys - 1) / keys;
}
inline int64_t turned_bytes(const ForwardCall& call) {
  const int d = call.d <= 64 && call.dv <= 64 ? 64 : 128;
  return call.b * call.hk * turned_tiles(call, d) * d * 128;
}

// Over pages sequences of so many queries and fewer are left to split_sm90.h, which takes less time
// for them
inline constexpr int kFewQueries = 96;

// Attention on Hopper's matrix instructions, for calls that are not declined
void forward_sm90(const ForwardCall& call, cudaStream_t stream);

// Sets the sizes of a masked call's lists and returns how many there are
inline int64_t size_lists_sm90(ForwardCall& call) {
  UnitLists& lists = call.lists;
  lists.warpgroups = kListedWarpgroups;
  lists.tiles = static_cast<int>(forward_row_tiles(call, 64 * lists.warpgroups));
  lists.words = static_cast<int>((call.sk + 32 * kUnitKeys - 1) / (32 * kUnitKeys));
  return call.b * lists.mask.heads * lists.tiles;
}

// Whether the kernel of a masked call finds out by itself what lists would say, and sets their
// sizes
inline bool lists_itself(ForwardCall& call) {
  size_lists_sm90(call);
  return BlockUnits::take(call.lists.mask);
}

// Enqueues what writes so many lists, before a masked call
void list_units_sm90(const ForwardCall& call, int64_t count, cudaStream_t stream);

// Why it cannot take a call, or null
const char* declines_forward_sm90(const ForwardCall& call);

// What no Hopper kernel can load, or null; k and v are `blocks` blocks of `rows` rows
const char* declines_addresses_sm90(const ForwardCall& call, int64_t blocks, int64_t rows);

// What a kernel of the forward knows of scores and weights when it is compiled
enum class Form {
  kPlain,       // softmax of products by a positive scale
  kMapped,      // the same through soft caps and slopes, and of kSlotColumns columns any slots
  kSloped,      // softmax with slopes
  kBiased,      // softmax with a bias for every pair, of the dtype of q and aligned to 16 bytes
  kSigmoid,     // sigmoids as they are, with a constant for each row
  kReweighted,  // re-weighted softplus of rows of length 1, with level and peaks
};

// Whether products may be compared before they are scaled, and what is left between them is a
// number
inline bool scales_products(const ForwardCall& call) {
  return call.scale > 1e-30f && call.scale < 1e30f;
}

// Whether re-weighting, whose level is yet to be found, may take both passes over such rows: scores
// are cosines by a factor, which bounds them, and nothing else
inline constexpr float kMostCosine = 69;  // exp of it and of less is a normal number
inline bool takes_units(const ForwardCall& call) {
  const Slots& slots = call.slots;
  const float length =
      slots.length_scale != 0 ? slots.length_scale * std::log(static_cast<float>(call.sk)) : 1;
  return call.dv > 0 && slots.weights == Attention::kReweighted &&
         (slots.power == 15 || slots.power == 3) && slots.cosine &&
         slots.bias_form == BiasForm::kNone && call.soft_cap == 0 && !call.slopes &&
         !call.cu_seqlens_q && call.scale > 0 && length >= 0 && call.scale * length <= kMostCosine;
}

// How many keys a row of q sees, or 1 where it sees none
struct SeenKeys {
  int sq, sk, window;  // 0 is all
  bool causal;         // or windowed
  const int32_t* cache_seqlens;
  int64_t cache_stride;
  explicit SeenKeys(const ForwardCall& call)
      : sq(static_cast<int>(call.sq)),
        sk(static_cast<int>(call.sk)),
        window(static_cast<int>(std::min<int64_t>(call.window, INT32_MAX))),
        causal(call.causal || call.window),
        cache_seqlens(call.cache_seqlens),
        cache_stride(call.cache_stride) {}
  // How many a sequence has
  HEDDLE_HD int of(int batch) const {
    if (!cache_seqlens) return sk;
    const int used = cache_seqlens[batch * cache_stride];
    return used < 0 ? 0 : used < sk ? used : sk;
  }
  HEDDLE_HD int count(int batch, int row) const {
    int keys = of(batch);
    if (causal) keys += row + 1 - sq;
    if (window && keys > window) keys = window;
    return keys > 1 ? keys : 1;
  }
};

// Rows of both passes of such a call, as Slots has them
struct CosineRows {
  uint16_t *q, *k;  // [b, sq, hq, d], [b, sk, hk, d]
  float* shifts;    // [b, hq, sq]
  float* centers;   // [b, hk, d]: what keys have in common
};

// The two passes of such a call: sums, which find level and peaks, and the rest
struct Passes {
  ForwardCall sums, rest;
  Passes(const ForwardCall& call, const CosineRows& rows, float* level, float* peaks) : rest(call) {
    const auto whole = [&](int64_t s, int64_t h) {
      return Strides{s * h * call.d, h * call.d, call.d};
    };
    rest.q = rows.q;
    rest.k = rows.k;
    rest.q_strides = whole(call.sq, call.hq);
    rest.k_strides = whole(call.sk, call.hk);
    rest.slots.units = true;
    rest.slots.q_factors = rest.slots.k_factors = nullptr;
    rest.slots.shifts = rows.shifts;
    rest.slots.q_row = call.sq;
    rest.slots.peaks = peaks;
    sums = rest;
    rest.slots.level = level;
    const int64_t strides[] = {call.hq * call.sq, call.sq, 1};
    std::copy_n(strides, 3, rest.slots.level_strides);
    sums.slots.weights = Attention::kSoftplus;
    sums.lse = level;
    sums.dv = 0;
  }
};

// The most special one that takes a call without a mask
inline Form form_of(const ForwardCall& call) {
  const Slots& slots = call.slots;
  if (!slots.used() && call.soft_cap == 0 && scales_products(call))
    return !call.slopes ? Form::kPlain : call.scale > 1e-6f ? Form::kSloped : Form::kMapped;
  if (slots.units) return Form::kReweighted;
  if (slots.cosine || slots.length_scale != 0 || call.slopes || call.soft_cap != 0 ||
      !scales_products(call))
    return Form::kMapped;
  if (slots.weights == Attention::kSigmoid && !slots.normalise && slots.bias_form <= BiasForm::kRow)
    return Form::kSigmoid;
  bool copied = slots.bias_dtype == call.dtype && !call.cu_seqlens_q &&
                slots.bias_strides[2] != 0 && reinterpret_cast<uintptr_t>(slots.bias) % 16 == 0;
  for (int i = 0; i < 3; ++i) copied &= slots.bias_strides[i] % 8 == 0;
  return slots.weights == Attention::kSoftmax && slots.bias_form == BiasForm::kPairs && copied
             ? Form::kBiased
             : Form::kMapped;
}

// body.operator()<form>() of the form of a call
template <class Body> void dispatch_form(const ForwardCall& call, const Body& body) {
  switch (form_of(call)) {
    case Form::kPlain:
      return body.template operator()<Form::kPlain>();
    case Form::kMapped:
      return body.template operator()<Form::kMapped>();
    case Form::kSloped:
      return body.template operator()<Form::kSloped>();
    case Form::kBiased:
      return body.template operator()<Form::kBiased>();
    case Form::kSigmoid:
      return body.template operator()<Form::kSigmoid>();
    case Form::kReweighted:
      return body.template operator()<Form::kReweighted>();
  }
}

// How rows of q and keys are shared out
enum class Layout {
  kEven,    // tiles of q as long as those of keys, or of three warpgroups where exponentials bound
  kTall,    // three warpgroups on shorter key tiles, which are read less often: without a window
  kListed,  // keys come from lists, in which the rows of a tile mostly see the same,
  kApart,   // or those of either warpgroup what the other does not
  kPaged,   // those of kEven, whose keys stand in pages
};

// Whether tiles of rows take less time than splitting keys would
bool prefers_tiles(const ForwardCall& call);

// What forward_sm90 picks from, an instantiation file for each size, and for each dtype where there
// are slots
template <DType kType, int kD, int kDv, Form kForm, Layout kLayout = Layout::kEven>
void launch_forward_sm90(const ForwardCall& call, cudaStream_t stream);
// Of v without columns, up to kSlotColumns columns of q; with `kUnits` rows are such, and kF16
template <DType kType, bool kUnits>
void launch_sums_sm90(const ForwardCall& call, cudaStream_t stream);
template <int kD> void launch_float8_sm90(const ForwardCall& call, cudaStream_t stream);

}  // namespace heddle
