#include "ops/attention.h"

#include "attention/factors_sm90.h"
#include "attention/forward_portable.cuh"
#include "attention/forward_sm90.h"
#include "attention/gather_sm80.h"
#include "attention/gather_sm90.h"
#include "attention/hopper_call.h"
#include "common/variants.h"
#include "core/slot.h"

namespace heddle {

extern template void forward_portable<BF16>(const ForwardArgs&, int64_t, CudaContext&);
extern template void forward_portable<E4M3>(const ForwardArgs&, int64_t, CudaContext&);
extern template void forward_portable<F16>(const ForwardArgs&, int64_t, CudaContext&);
extern template void forward_portable<float>(const ForwardArgs&, int64_t, CudaContext&);

namespace {

// Looks at everything that only the device knows before the kernel relies on it. A single CTA gives
// a verdict, several only set the word.
__global__ void attention_check_kernel(ForwardArgs p, int64_t table_pages, int64_t count) {
  bool good = true;
  HEDDLE_EACH(i, count) {
    if (p.cu_seqlens_q && i <= p.sequences) {
      const auto check = [&](const int32_t* offsets, int64_t stride, int64_t total) {
        const int64_t at = offsets[i * stride];
        if (i == 0) good &= at == 0;
        if (i == p.sequences) good &= at == total;
        if (i > 0) good &= at >= offsets[(i - 1) * stride];
      };
      check(p.cu_seqlens_q, p.cu_q_stride, p.sq);
      if (p.cu_seqlens_k) check(p.cu_seqlens_k, p.cu_k_stride, p.sk);
    }
    if (p.cache_seqlens) {
      // one thread a page
      const int64_t cache = i / max(table_pages, int64_t{1}), page = i - cache * table_pages;
      if (cache < p.caches()) {
        const int64_t keys = p.cache_seqlens[cache * p.cache_stride];
        good &= keys >= 0 && keys <= p.sk;
        const bool attended = !p.cu_seqlens_q || p.cu_seqlens_q[cache * p.cu_q_stride] !=
                                                     p.cu_seqlens_q[(cache + 1) * p.cu_q_stride];
        if (attended && p.block_table && page < table_pages && page * p.page_size < keys) {
          const int64_t entry = p.block_table[cache * p.table_row + page * p.table_column];
          good &= entry >= 0 && entry < p.pages;
        }
      }
    }
  }
  if (gridDim.x == 1) {
    good = __syncthreads_and(good);
    if (threadIdx.x == 0) *p.fault = !good;
  } else if (!good) {
    *p.fault = 1;
  }
}

const int32_t* ints(const Tensor& x) { return x ? x.as<int32_t>() : nullptr; }
const float* floats(const Tensor& x) { return x ? x.as<float>() : nullptr; }

HeadScales scales_of(const Attention& op) {
  return {floats(op.q_scale),    floats(op.k_scale),    floats(op.v_scale),
          op.q_scale.strides[0], op.k_scale.strides[0], op.v_scale.strides[0]};
}

const char* lengths_fault(const Attention& op) {
  if (op.cu_seqlens_k)
    return "cuSeqlensQ and cuSeqlensK must start at 0, never descend and end at the totals";
  if (op.cu_seqlens_q)
    return "cuSeqlensQ must start at 0, never descend and end at sq, and cacheSeqlens and "
           "blockTable be inside the pages";
  return op.block_table ? "cacheSeqlens and blockTable must be inside the pages"
                        : "cacheSeqlens must be from 0 to sk";
}

}  // namespace

const int* check_lengths(const Attention& op, CudaContext& context) {
  // pages of a cache that lacks most of them are none, and nobody looks at those
  if ((!op.cu_seqlens_q && !op.cache_seqlens) || op.recent_k) return nullptr;
  ForwardArgs args = portable_args(op);
  const char* text = lengths_fault(op);
  const int64_t pages = op.block_table ? op.block_table.shape[1] : 0;
  const int64_t count = std::max(args.sequences + 1, args.caches() * std::max<int64_t>(pages, 1));
  // in a graph a word is cleared by a launch, which is long beside a decode step: a few looks need
  // none
  constexpr int kMost = 1024;
  const bool alone = count <= 4 * kMost;
  args.fault = alone ? context.verdict(text) : context.fault(text);
  attention_check_kernel<<<alone ? 1 : blocks_for(count, context), alone ? kMost : kThreads, 0,
                           context.stream>>>(args, pages, count);
  context.launched("attention_check_kernel");
  return args.fault;
}

ForwardArgs portable_args(const Attention& op) {
  const Tensor &q = op.q, &k = op.k, &v = op.v;
  ForwardArgs args{};
  args.q = Heads(q);
  args.k = Heads(k);
  args.v = Heads(v);
  args.cu_seqlens_q = ints(op.cu_seqlens_q);
  args.cu_seqlens_k = ints(op.cu_seqlens_k);
  args.block_table = ints(op.block_table);
  args.cache_seqlens = ints(op.cache_seqlens);
  args.cu_q_stride = op.cu_seqlens_q.strides[0];
  args.cu_k_stride = op.cu_seqlens_k.strides[0];
  args.table_row = op.block_table.strides[0];
  args.table_column = op.block_table.strides[1];
  args.cache_stride = op.cache_seqlens.strides[0];
  args.slopes = floats(op.slopes);
  args.sink = floats(op.sink);
  args.slopes_stride = op.slopes.strides[0];
  args.sink_stride = op.sink.strides[0];
  args.out = op.out.data;
  args.lse = op.lse.as<float>();
  args.b = q.shape[0];
  args.sq = q.shape[1];
  args.hq = q.shape[2];
  args.hk = k.shape[2];
  args.d = static_cast<int>(q.shape[3]);
  args.dv = static_cast<int>(v.shape[3]);
  args.pages = k.shape[0];
  args.page_size = op.block_table ? k.shape[1] : 1;
  args.sk = op.block_table ? op.block_table.shape[1] * args.page_size : k.shape[1];
  args.sequences = op.cu_seqlens_q ? op.cu_seqlens_q.shape[0] - 1 : 0;
  args.window = op.window;
  args.scale = static_cast<float>(op.scale);
  args.soft_cap = static_cast<float>(op.soft_cap);
  args.causal = op.causal;
  args.masked = op.masked;
  args.mask = op.mask_view(args.sq, args.hq);
  args.bias = op.bias ? op.bias.data : nullptr;
  std::copy_n(op.bias.strides, 4, args.bias_strides);
  args.bias_dtype = op.bias.dtype;
  args.weights = op.weights;
  args.level = floats(op.level);
  std::copy_n(op.level.strides, 3, args.level_strides);
  args.length_scale = static_cast<float>(op.length_scale);
  args.power = static_cast<float>(op.power);
  args.offset = static_cast<float>(op.offset);
  args.normalise = op.normalise;
  args.shifted = op.shifted();
  args.cosine = op.cosine;
  args.scales = scales_of(op);
  args.out_dtype = op.out.dtype;
  return args;
}

namespace {

// One that is not contiguous along sk is declined
BiasForm bias_form(const Attention& op) {
  const Tensor& bias = op.bias;
  if (!bias) return BiasForm::kNone;
  if (bias.strides[3] == 0 || bias.shape[3] == 1) return BiasForm::kRow;
  // a word for two keys must not be cut by the end of a row. Factors of keys need its registers.
  bool pairs = bias.dtype != DType::kF32 && !op.cosine && bias.strides[3] == 1 &&
               bias.shape[3] % 2 == 0 && reinterpret_cast<uintptr_t>(bias.data) % 4 == 0;
  for (int i = 0; i < 3; ++i) pairs &= bias.shape[i] == 1 || bias.strides[i] % 2 == 0;
  return pairs ? BiasForm::kPairs : BiasForm::kSingles;
}

Slots slots_of(const Attention& op) {
  Slots slots{};
  slots.weights = op.weights;
  slots.normalise = op.normalise;
  slots.length_scale = static_cast<float>(op.length_scale);
  slots.power = static_cast<float>(op.power);
  slots.offset = static_cast<float>(op.offset);
  slots.cosine = op.cosine;
  slots.bias_form = bias_form(op);
  slots.bias_dtype = op.bias.dtype;
  slots.bias = op.bias ? op.bias.data : nullptr;
  std::copy_n(op.bias.strides, 4, slots.bias_strides);
  slots.level = floats(op.level);
  std::copy_n(op.level.strides, 3, slots.level_strides);
  return slots;
}

}  // namespace

SplitCall hopper_call(const Attention& op, const CudaContext& context) {
  const auto strides = [](const Tensor& x) {
    return Strides{x.strides[0], x.strides[1], x.strides[2]};
  };
  SplitCall call{};
  call.dtype = op.q.dtype;
  call.b = op.q.shape[0];
  call.sq = op.q.shape[1];
  call.hq = op.q.shape[2];
  call.d = op.q.shape[3];
  call.sk = op.k.shape[1];
  call.hk = op.k.shape[2];
  call.dv = op.v.shape[3];
  call.q = op.q.data;
  call.k = op.k.data;
  call.v = op.v.data;
  call.out = op.out.data;
  call.lse = op.lse.as<float>();
  call.q_strides = strides(op.q);
  call.k_strides = strides(op.k);
  call.v_strides = strides(op.v);
  call.out_strides = strides(op.out);
  call.scale = static_cast<float>(op.scale);
  call.soft_cap = static_cast<float>(op.soft_cap);
  call.causal = op.causal;
  call.window = op.window;
  call.masked = op.masked;
  call.lists.mask = op.mask_view(call.sq, call.hq);
  call.slopes = floats(op.slopes);
  call.sink = floats(op.sink);
  call.slopes_stride = op.slopes.strides[0];
  call.sink_stride = op.sink.strides[0];
  call.cu_seqlens_q = ints(op.cu_seqlens_q);
  call.cu_seqlens_k = ints(op.cu_seqlens_k);
  call.cu_q_stride = op.cu_seqlens_q.strides[0];
  call.cu_k_stride = op.cu_seqlens_k.strides[0];
  call.sequences = op.cu_seqlens_q ? op.cu_seqlens_q.shape[0] - 1 : 0;
  call.cache_seqlens = ints(op.cache_seqlens);
  call.cache_stride = op.cache_seqlens.strides[0];
  call.slots = slots_of(op);
  call.processors = context.processors;
  call.graphs = context.graphs;
  call.scales = scales_of(op);
  call.out_dtype = op.out.dtype;
  if (op.block_table) {
    call.block_table = ints(op.block_table);
    call.table_row = op.block_table.strides[0];
    call.table_column = op.block_table.strides[1];
    call.pages = op.k.shape[0];
    call.page_size = op.k.shape[1];
    call.sk = op.block_table.shape[1] * call.page_size;
  }
  return call;
}

void list_units(ForwardCall& call, CudaContext& context) {
  const int64_t lists = size_lists_sm90(call), words = lists * call.lists.words;
  call.lists.bits = context.scratch<UnitBits>(static_cast<size_t>(words * call.lists.warpgroups));
  call.lists.marks = context.scratch<int>(static_cast<size_t>(lists * call.lists.mark_words()));
  list_units_sm90(call, lists, context.stream);
  context.launched("attention_list_kernel");
}

namespace {

const char* declines_recent(const Attention& op) {
  return op.recent_k ? "recentK and recentV must be left out" : nullptr;
}

}  // namespace

const char* declines_hopper(const Attention& op, const CudaContext& context) {
  if (context.arch != 90) return "the GPU must be of compute capability 9.0";
  if (op.lse.size() == 0) return "q must not be empty";
  if (op.q.strides[3] != 1 || op.k.strides[3] != 1 || op.v.strides[3] != 1)
    return "q, k and v must be contiguous along d";
  return declines_recent(op);
}

const char* declines_slots(const Attention& op) {
  if (op.weights != Attention::kSoftmax) return "weights must be of softmax";
  if (op.bias) return "bias must be left out";
  if (op.cosine) return "cosine must be left out";
  if (op.length_scale != 0) return "lengthScale must be left out";
  return nullptr;
}

namespace {

const char* declines_forward(const Attention& op, const CudaContext& context) {
  if (const char* reason = declines_hopper(op, context)) return reason;
  if (op.masked)
    if (const char* reason = declines_slots(op)) return reason;
  if (bias_form(op) == BiasForm::kSingles && op.bias.strides[3] != 1)
    return "bias must be contiguous along sk";
  const SplitCall call = hopper_call(op, context);
  const char* reason = declines_forward_sm90(call);
  // which takes the short ones of packed sequences
  return reason || !op.block_table ? reason : declines_split_sm90(call);
}

const char* declines_split(const Attention& op, const CudaContext& context) {
  if (const char* reason = declines_slots(op)) return reason;
  if (const char* reason = declines_hopper(op, context)) return reason;
  if (op.masked) return "mask must be left out";
  // a step of decoding has no time to ask
  if (op.block_table && op.q.shape[1] > kFewQueries && !declines_forward(op, context))
    return "q must have too few rows for all multiprocessors";
  return declines_split_sm90(hopper_call(op, context));
}

void split(SplitCall& call, CudaContext& context) {
  call.processors = static_cast<int>(split_ctas(call));
  const auto slots = static_cast<size_t>(2 * call.processors * kSplitRows);
  call.part_out = context.scratch<float>(slots * static_cast<size_t>(split_columns(call)));
  call.part_state = context.scratch<float2>(slots);
  call.arrivals = context.counters(static_cast<size_t>(call.processors) + 1);
  if (call.verdict) call.judged = call.arrivals + call.processors;
  split_sm90(call, context.stream);
  context.launched("split_sm90_kernel");
}

void run_split(const Attention& op, CudaContext& context) {
  SplitCall call = hopper_call(op, context);
  // the kernel sees all lengths and pages, and a launch less is much for a short step
  if (op.cache_seqlens && !op.window) {
    call.verdict = context.verdict(lengths_fault(op));
  } else {
    check_lengths(op, context);
  }
  split(call, context);
}

// With `only_if`, a word on the device, only if that is not 0
void run_portable(const Attention& op, CudaContext& context, const int* only_if) {
  const Tensor& q = op.q;
  ForwardArgs args = portable_args(op);
  args.only_if = only_if;
  const int64_t tiles = tile_count(args);
  HEDDLE_CHECK(tiles < INT32_MAX && args.hq <= 65535, kUnsupported, "q",
               "q has too many rows or heads for one call");
  // Few rows over many keys leave most of the chip idle, so their keys are split
  constexpr int64_t kLeastKeys = 256, kMostSplits = 64;
  const int64_t idle = 2 * context.processors / std::max<int64_t>(tiles * args.hq, 1);
  args.splits =
      static_cast<int>(std::clamp<int64_t>(std::min(idle, args.sk / kLeastKeys), 1, kMostSplits));
  if (args.splits > 1) {
    const auto rows = static_cast<size_t>(op.lse.size() * args.splits);
    args.part_out = context.scratch<float>(rows * static_cast<size_t>(args.dv));
    args.part_max = context.scratch<float>(rows);
    args.part_sum = context.scratch<float>(rows);
  }
  // what mostly does nothing should take no time for it
  const int64_t few = std::max<int64_t>(4 * context.processors / (args.hq * args.splits), 1);
  const int64_t columns = only_if ? std::min(tiles, few) : tiles;
  const auto forward = [&]<class T>(T) { forward_portable<T>(args, columns, context); };
  q.dtype == DType::kE4M3 ? forward(E4M3{}) : dispatch_float(q.dtype, forward);
}

void run_forward(const Attention& op, CudaContext& context) {
  check_lengths(op, context);
  SplitCall call = hopper_call(op, context);
  call.tickets = context.counters(2);
  if (call.masked && !lists_itself(call)) list_units(call, context);
  const int* strange = op.cosine ? row_factors(call, context) : nullptr;
  if (call.dtype == DType::kE4M3)
    call.turned = context.scratch<uint8_t>(static_cast<size_t>(turned_bytes(call)));
  forward_sm90(call, context.stream);
  context.launched("forward_sm90_kernel");
  if (op.block_table && op.cu_seqlens_q) {
    call.most_queries = kFewQueries;
    split(call, context);
  }
  if (strange) run_portable(op, context, strange);
}

// Re-weighting over rows of length 1: the sums of its level, then the rest
void run_passes(const Attention& op, CudaContext& context) {
  check_lengths(op, context);
  SplitCall call = hopper_call(op, context);
  call.tickets = context.counters(2);
  const auto lines = static_cast<size_t>(op.lse.size()), d = static_cast<size_t>(call.d);
  const auto heads = static_cast<size_t>(call.b * call.hk);
  const CosineRows rows{context.scratch<uint16_t>(lines * d),
                        context.scratch<uint16_t>(heads * static_cast<size_t>(call.sk) * d),
                        context.scratch<float>(lines), context.scratch<float>(heads * d)};
  const int* strange = cosine_rows(call, rows, context);
  const Passes passes(call, rows, static_cast<float*>(op.level.data),
                      context.scratch<float>(lines));
  forward_sm90(passes.sums, context.stream);
  forward_sm90(passes.rest, context.stream);
  context.launched("forward_sm90_kernel");
  run_portable(op.sums(), context, strange);
  run_portable(op, context, strange);
}

GatherCall gather_call(const Attention& op, const CudaContext& context) {
  return {hopper_call(op, context), lists_of(op)};
}

const char* declines_gather_hopper(const Attention& op, const CudaContext& context) {
  if (const char* reason = declines_gather_sm80(op, context)) return reason;
  if (const char* reason = declines_hopper(op, context)) return reason;
  return declines_gather_sm90(gather_call(op, context));
}

void run_gather_hopper(const Attention& op, CudaContext& context) {
  gather_sm90(gather_call(op, context), context.stream);
  context.launched("gather_sm90_kernel");
}

void run_gather(const Attention& op, CudaContext& context) {
  check_lengths(op, context);
  gather_sm80(op, portable_args(op), context);
}

const char* declines_portable(const Attention& op, const CudaContext&) {
  return declines_recent(op);
}

constexpr Variant<Attention> kVariants[] = {
    {"sm90_split", declines_split, run_split},
    {"sm90_gather", declines_gather_hopper, run_gather_hopper},
    {"sm80_gather", declines_gather_sm80, run_gather},
    {"sm90_wgmma", declines_forward, run_forward},
    {"sm80_simt", declines_portable,
     [](const Attention& op, CudaContext& context) {
       check_lengths(op, context);
       run_portable(op, context, nullptr);
     }},
};

void run(const Attention& op, CudaContext& context) {
  if (op.lse.size() == 0) {
    check_lengths(op, context);
    return;
  }
  if (!op.finds_level()) return run_variants(kVariants, op, context);
  const Attention rest = op.with_level(context.scratch<float>(static_cast<size_t>(op.lse.size())));
  if (!declines_forward(op, context) && takes_units(hopper_call(op, context)))
    return run_passes(rest, context);
  run_variants(kVariants, rest.sums(), context);
  run_variants(kVariants, rest, context);
}

HEDDLE_REGISTER(Attention);
HEDDLE_EXPLAIN(Attention, kVariants);

}  // namespace
}  // namespace heddle
