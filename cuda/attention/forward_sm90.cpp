#include "attention/forward_sm90.h"

#include <cmath>

namespace heddle {
namespace {

// What a tensor map can describe
bool addressable(const void* data, const Strides& strides, int64_t b, int64_t s, int64_t h,
                 DType dtype) {
  const auto fits = [&](int64_t size, int64_t stride) {
    const int64_t bytes = stride * static_cast<int64_t>(size_of(dtype));
    return size == 1 || (stride > 0 && bytes % 16 == 0 && stride < int64_t{1} << 39);
  };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(b, strides.batch) &&
         fits(s, strides.row) && fits(h, strides.head);
}

// Whether tiles of 192 rows take less time than those of 128. They take 6 % less for the same rows
// where power bounds the clock, 4.5 % under a causal mask, but more of their rows may be none, and
// they leave out less before a window. Where tiles are about as long as each other multiprocessors
// take whole ones; otherwise the shortest come last. Packed sequences, whose lengths nobody knows
// here, end in the middle of a tile.
bool prefers_tall(const ForwardCall& call) {
  constexpr double kFewKeys = 512;
  constexpr int64_t kShortWindow = 1536;
  const bool packed = call.cu_seqlens_q;
  const bool alike = !call.causal || call.sk >= 2 * (call.window ? call.window : call.sq);
  const double sequences = packed ? static_cast<double>(call.sequences) : 1;
  if (call.window && call.window < kShortWindow) return false;
  if (static_cast<double>(call.sk) <= kFewKeys * sequences) return false;
  const auto pairs = static_cast<double>(call.b * call.hq);
  const auto time = [&](int64_t rows, double share) {
    const double beyond = packed ? sequences / 2 : 0;
    double tiles =
        (static_cast<double>(forward_row_tiles(call, rows)) - beyond) * pairs / call.processors;
    if (alike && !packed) tiles = std::ceil(tiles);
    return share * static_cast<double>(rows) * std::max(alike ? tiles : tiles / 2, 1.);
  };
  return time(192, call.causal ? 0.955 : 0.94) < time(128, 1);
}

template <DType kType, int kD, Form kForm>
void pick_layout(const ForwardCall& call, cudaStream_t stream) {
  if constexpr (kForm == Form::kPlain)
    if (prefers_tall(call))
      return launch_forward_sm90<kType, kD, kD, kForm, Layout::kTall>(call, stream);
  launch_forward_sm90<kType, kD, kD, kForm>(call, stream);
}

template <DType kType, Form kForm> void pick(const ForwardCall& call, cudaStream_t stream) {
  const int64_t size = std::max(call.d, call.dv);
  if (size <= 64) return launch_forward_sm90<kType, 64, 64, kForm>(call, stream);
  if (size <= 96) return pick_layout<kType, 96, kForm>(call, stream);
  if (size <= 128) return pick_layout<kType, 128, kForm>(call, stream);
  if (size <= 192 && call.dv <= 128)
    return launch_forward_sm90<kType, 192, 128, kForm>(call, stream);
  if (size <= 192) return launch_forward_sm90<kType, 192, 192, kForm>(call, stream);
  return launch_forward_sm90<kType, 256, 256, kForm>(call, stream);
}

template <DType kType> void pick_listed(const ForwardCall& call, cudaStream_t stream) {
  const MaskView& mask = call.lists.mask;
  const bool apart = mask.blocks && mask.block_q % (64 * kListedWarpgroups) != 0;
  if (std::max(call.d, call.dv) <= 64)
    return launch_forward_sm90<kType, 64, 64, Form::kPlain, Layout::kListed>(call, stream);
  apart ? launch_forward_sm90<kType, 128, 128, Form::kPlain, Layout::kApart>(call, stream)
        : launch_forward_sm90<kType, 128, 128, Form::kPlain, Layout::kListed>(call, stream);
}

template <DType kType> void pick_paged(const ForwardCall& call, cudaStream_t stream) {
  std::max(call.d, call.dv) <= 64
      ? launch_forward_sm90<kType, 64, 64, Form::kPlain, Layout::kPaged>(call, stream)
      : launch_forward_sm90<kType, 128, 128, Form::kPlain, Layout::kPaged>(call, stream);
}

// Of kSlotColumns columns
template <DType kType> void pick_form(const ForwardCall& call, cudaStream_t stream) {
  dispatch_form(call, [&]<Form kForm>() { pick_layout<kType, kSlotColumns, kForm>(call, stream); });
}

bool maps_scores(const ForwardCall& call) {
  return call.soft_cap != 0 || call.slopes || !scales_products(call);
}

const char* declines_pages(const ForwardCall& call) {
  if (call.masked || call.slots.used() || maps_scores(call))
    return "mask, softCap, slopes, weights, bias, cosine and lengthScale must be left out with "
           "blockTable, and scale must be positive";
  if (call.dtype == DType::kE4M3) return "q must not be float8_e4m3fn with blockTable";
  if (std::max(call.d, call.dv) > 128 || call.dv == 0)
    return "d must be at most 128, and v have columns, with blockTable";
  if (call.page_size < 8) return "the page size must be at least 8";
  return prefers_tiles(call) ? nullptr
                             : "q must have rows for all multiprocessors, with blockTable";
}

template <DType kType> void pick(const ForwardCall& call, cudaStream_t stream) {
  const int64_t size = std::max(call.d, call.dv);
  if (call.dv == 0)
    return call.slots.units ? launch_sums_sm90<DType::kF16, true>(call, stream)
                            : launch_sums_sm90<kType, false>(call, stream);
  if (call.block_table) return pick_paged<kType>(call, stream);
  if (call.masked) return pick_listed<kType>(call, stream);
  if (call.slots.used() || (size > 96 && size <= kSlotColumns))
    return pick_form<kType>(call, stream);
  maps_scores(call) ? pick<kType, Form::kMapped>(call, stream)
                    : pick<kType, Form::kPlain>(call, stream);
}

}  // namespace

// By what either takes on an H200 to begin and end, and for 128 keys. Tiles leave multiprocessors
// idle where they are few; splitting keeps all busy, but has half the rows and adds up.
bool prefers_tiles(const ForwardCall& call) {
  // packed sequences may all but one have a single query
  const int64_t sq = call.sq - call.sequences, size = std::max(call.d, call.dv);
  if (call.block_table && sq <= kFewQueries) return false;
  constexpr double kBegins = 8, kSplits = 20;  // us
  const double its = size <= 64    ? 1.06
                     : size <= 128 ? 1.27
                     : size <= 192 ? 1.7
                                   : 2.3,
               split = size <= 64    ? 0.7
                       : size <= 128 ? 1.5
                                     : 3.3;
  const int64_t rows = size <= 64 ? 192 : 128;
  const int64_t keys = call.window ? std::min(call.sk, call.window + rows) : call.sk;
  const auto key_tiles = static_cast<double>((keys + 127) / 128);
  const auto tiles = static_cast<double>(call.b * call.hq * ((sq + rows - 1) / rows));
  const auto all = static_cast<double>(call.b * call.hk * ((sq * call.hq / call.hk + 63) / 64));
  const auto wave = static_cast<double>(call.processors);
  // Of a causal prompt the rows of a tile see half of the keys in the mean, of which the longest
  // sees all. Runs of keys are less even: splitting gains two fifths of that.
  const bool alike = !call.causal || call.window;
  const double unseen = alike ? 0 : static_cast<double>(sq) / static_cast<double>(2 * call.sk);
  const double waves = alike ? std::ceil(tiles / wave) : std::max(1., (1 - unseen) * tiles / wave);
  return kBegins + its * key_tiles * waves <=
         kSplits + split * key_tiles * (1 - 0.4 * unseen) * all / wave;
}

const char* declines_addresses_sm90(const ForwardCall& call, int64_t blocks, int64_t rows) {
  if (size_of(call.out_dtype) != 2) return "out must be float16 or bfloat16";
  if (call.sk == 0) return "k must not be empty";
  if (!addressable(call.q, call.q_strides, call.b, call.sq, call.hq, call.dtype) ||
      !addressable(call.k, call.k_strides, blocks, rows, call.hk, call.dtype) ||
      (call.dv > 0 &&
       (!addressable(call.v, call.v_strides, blocks, rows, call.hk, call.dtype) ||
        !addressable(call.out, call.out_strides, call.b, call.sq, call.hq, call.out_dtype))))
    return "rows of q, k, v and out must start at multiples of 16 bytes";
  return nullptr;
}

const char* declines_forward_sm90(const ForwardCall& call) {
  constexpr int64_t kMost = int64_t{1} << 30;  // rows and tiles are counted in 32 bits
  constexpr int64_t kFewRows = 8;
  if (call.sq <= kFewRows) return "q must have more than 8 rows";
  // divided, since the product can overflow
  if (call.sq > kMost || call.sk > kMost ||
      call.sq / 64 + call.sequences + 1 > kMost / call.b / call.hq)
    return "q and k must have at most 2^30 rows and tiles";
  if (call.masked && maps_scores(call))
    return "softCap and slopes must be left out with a mask, and scale must be positive";
  if (call.slots.used() && std::max(call.d, call.dv) > kSlotColumns)
    return "d must be at most 128 with weights, bias, cosine or lengthScale";
  if (call.masked && std::max(call.d, call.dv) > 128) return "d must be at most 128 with a mask";
  const bool float8 = call.dtype == DType::kE4M3;
  if (call.dv == 0 && (call.masked || float8 || call.d > kSlotColumns))
    return "v must have columns with a mask, with float8 and with d above 128";
  if (float8 && call.slots.used())
    return "weights, bias, cosine and lengthScale must be left out with float8";
  if (float8 && (call.masked || maps_scores(call)))
    return "mask, softCap and slopes must be left out with float8, and scale must be positive";
  if (float8 && (call.d % 2 != 0 || call.dv % 8 != 0))
    return "d must be even, and that of v a multiple of 8, with float8";
  if (float8 && std::max(call.d, call.dv) > 128) return "d must be at most 128 with float8";
  if (!call.block_table) return declines_addresses_sm90(call, call.b, call.sk);
  const char* reason = declines_pages(call);
  return reason ? reason : declines_addresses_sm90(call, call.pages, call.page_size);
}

void forward_sm90(const ForwardCall& call, cudaStream_t stream) {
  if (call.dtype == DType::kE4M3)
    return std::max(call.d, call.dv) <= 64 ? launch_float8_sm90<64>(call, stream)
                                           : launch_float8_sm90<128>(call, stream);
  call.dtype == DType::kF16 ? pick<DType::kF16>(call, stream) : pick<DType::kBF16>(call, stream);
}

}  // namespace heddle
