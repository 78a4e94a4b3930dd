#pragma once
#include <cuda_fp8.h>

#include <cmath>

#include "attention/forward_args.cuh"
#include "common/elements.cuh"
#include "common/lanes.cuh"
#include "common/launch.h"

// Every option of attention on any GPU from sm_80 on, in f32 arithmetic:
//
//   out[i] = sum over visible t of exp(s[i, t] - m[i]) v[t] / l[i]      s = cap(q . k * scale) +
//   slope * (t - p)
//
// A CTA of 128 threads owns 32 query rows of one head and walks its keys 32 at a time. Rows of q
// stay in shared memory; k and v of a tile take turns in one buffer. Four threads share a row: each
// computes 8 of its 32 scores and keeps a quarter of its output in registers. With splits, several
// CTAs share a row's keys and a second kernel joins them. Under a mask a row's keys of a tile are
// bits of one word, and a tile that no row sees anything of is not loaded.
namespace heddle {

struct E4M3 {
  __nv_fp8_storage_t bits;
};
__device__ __forceinline__ float to_float(E4M3 x) {
  return __half2float(F16(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3)));
}

constexpr int kRowTile = 32, kKeyTile = 32, kRowThreads = 4;
constexpr int kAttentionThreads = kRowTile * kRowThreads;
constexpr int kMostColumns = 256 / kRowThreads;

ForwardArgs portable_args(const Attention& op);

// Enqueues the look at lengths and pages, which only the device knows. Returns the word that it
// sets if they are wrong, or null.
const int* check_lengths(const Attention& op, CudaContext& context);

// What one CTA works on. `row0` counts from the sequence's first row, or key.
struct Place {
  int64_t batch, q_begin, sq, k_begin, sk, row0, sequence;
  bool any;
};

// Packed sequences have unequal numbers of tiles: the CTA counts through them to find its own, a
// tile of rows or, on request, of keys. Offsets are clamped, so that wrong ones, which the check
// kernel reports, lead nowhere outside.
__device__ inline Place find_place(const ForwardArgs& p, int64_t tile, bool keys = false) {
  const auto cached = [&](int64_t sequence) {
    return p.cache_seqlens ? clamp_to(p.cache_seqlens[sequence * p.cache_stride], 0, p.sk) : p.sk;
  };
  if (!p.cu_seqlens_q) {
    const int64_t tiles = ((keys ? p.sk : p.sq) + kRowTile - 1) / kRowTile, batch = tile / tiles;
    return {batch, 0, p.sq, 0, cached(batch), tile % tiles * kRowTile, batch, true};
  }
  for (int64_t i = 0; i < p.sequences; ++i) {
    const int64_t q_begin = clamp_to(p.cu_seqlens_q[i * p.cu_q_stride], 0, p.sq);
    const int64_t q_end = clamp_to(p.cu_seqlens_q[(i + 1) * p.cu_q_stride], q_begin, p.sq);
    int64_t k_begin = 0, k_end = 0;
    if (p.cu_seqlens_k) {
      k_begin = clamp_to(p.cu_seqlens_k[i * p.cu_k_stride], 0, p.sk);
      k_end = clamp_to(p.cu_seqlens_k[(i + 1) * p.cu_k_stride], k_begin, p.sk);
    } else {
      k_end = cached(i);
    }
    const int64_t tiles = ((keys ? k_end - k_begin : q_end - q_begin) + kRowTile - 1) / kRowTile;
    if (tile < tiles)
      return {0, q_begin, q_end - q_begin, k_begin, k_end - k_begin, tile * kRowTile, i, true};
    tile -= tiles;
  }
  return {0, 0, 0, 0, 0, 0, 0, false};
}

// As many tiles as find_place may find, and some more of packed sequences
HEDDLE_HD inline int64_t tile_count(const ForwardArgs& p, bool keys = false) {
  const int64_t size = keys ? p.sk : p.sq;
  return p.cu_seqlens_q ? size / kRowTile + p.sequences + 1
                        : p.b * ((size + kRowTile - 1) / kRowTile);
}

// Where key `t` of a sequence stands, or null if its page does not exist
template <class T>
__device__ inline const T* key_at(const ForwardArgs& p, const Heads& x, const Place& place,
                                  int64_t t, int64_t head) {
  const T* data = static_cast<const T*>(x.data) + head * x.head;
  if (!p.block_table) return data + place.batch * x.batch + (place.k_begin + t) * x.token;
  const int64_t page =
      p.block_table[place.sequence * p.table_row + t / p.page_size * p.table_column];
  if (page < 0 || page >= p.pages) return nullptr;
  return data + page * x.batch + t % p.page_size * x.token;
}

__device__ inline float bias_at(const ForwardArgs& p, int64_t batch, int64_t head, int64_t query,
                                int64_t t) {
  const int64_t at = batch * p.bias_strides[0] + head * p.bias_strides[1] +
                     query * p.bias_strides[2] + t * p.bias_strides[3];
  const float bias = load_float(p.bias, at, p.bias_dtype);
  return bias * 1.44269504f < Attention::kHidingLog2 ? -INFINITY : bias;
}

// Out has the dtype of q, but float8 names another
template <class T> __device__ inline void store_out(const ForwardArgs& p, int64_t at, float x) {
  if constexpr (std::is_same_v<T, E4M3>) {
    store_float(p.out, at, p.out_dtype, x);
  } else {
    static_cast<T*>(p.out)[at] = from_float<T>(x);
  }
}

// What a score weighs where no maximum is taken off
__device__ inline float weight_of(const ForwardArgs& p, float s) {
  if (p.weights == Attention::kSigmoid) return sigmoid(s);
  if (p.weights == Attention::kSoftplus) return fmaxf(s, 0) + log1pf(expf(-fabsf(s)));
  const float x = s < 0 ? 0 : s;  // NaN stays
  float weight = x;
  for (int i = 1; i < static_cast<int>(p.power); ++i) weight *= x;
  return weight;
}

// Keys that the row at `position` sees without a mask
__device__ inline int64_t keys_seen(const ForwardArgs& p, const Place& place, int64_t position) {
  const int64_t end = p.causal || p.window ? clamp_to(position + 1, 0, place.sk) : place.sk;
  return p.window ? max(end - max(position - p.window + 1, int64_t{0}), int64_t{0}) : end;
}

// Query `query` of a sequence under the mask
__device__ inline MaskRow mask_row(const ForwardArgs& p, const Place& place, int64_t head,
                                   int64_t query) {
  const int64_t off = place.sk - place.sq;
  return p.mask.row(
      place.batch, place.sequence,
      p.cu_seqlens_q ? first_block_row(place.q_begin, place.sequence, p.mask.block_q) : 0,
      place.q_begin, head, query, off,
      p.causal ? clamp_to(off + query + 1, 0, place.sk) : place.sk);
}

// What a row knows of its weights besides the scores
struct Lift {
  float gain = 0, offset = 0;  // gain is a natural log
};

__device__ inline Lift lift_of(const ForwardArgs& p, int64_t batch, int64_t head, int64_t token,
                               int64_t seen) {
  if (!p.level || seen == 0) return {};
  const float level =
      p.level[batch * p.level_strides[0] + head * p.level_strides[1] + token * p.level_strides[2]];
  return {level == -INFINITY ? level : logf(static_cast<float>(seen)) - level,
          seen > Attention::kYoungRows ? p.offset : 0};
}

// The exponent of what a score weighs where a maximum is taken off. Far below 0 softplus is exp
__device__ inline float exponent_of(const ForwardArgs& p, float s, Lift lift) {
  if (p.weights == Attention::kSoftmax) return s;
  const float log_softplus = s < -30 ? s : logf(fmaxf(s, 0) + log1pf(expf(-fabsf(s))));
  if (p.weights == Attention::kSoftplus) return log_softplus;
  const float share = expf(log_softplus + lift.gain), rest = share - lift.offset;
  return rest <= Attention::kReweightedSnap * share ? -INFINITY : p.power * logf(rest);
}

// By how much a score moves what moves with the log of its softplus by `rate`
__device__ inline float softplus_rate(float s, float rate) {
  return s < -30 ? rate : rate * sigmoid(s) / (fmaxf(s, 0) + log1pf(expf(-fabsf(s))));
}

// By how much the log of softplus moves a weight `weight` of reweighted, as the level does
// downwards
__device__ inline float reweighted_rate(const ForwardArgs& p, float s, Lift lift, float weight) {
  if (weight == 0) return 0;
  const float log_softplus = s < -30 ? s : logf(fmaxf(s, 0) + log1pf(expf(-fabsf(s))));
  const float share = expf(log_softplus + lift.gain);
  return p.power * weight / (share - lift.offset) * share;
}

// By how much a score moves a weight `weight`, which is `share` of what it is before a division
__device__ inline float rate_of(const ForwardArgs& p, float s, float weight, float share) {
  if (p.weights == Attention::kSoftmax) return weight;
  if (p.weights == Attention::kSigmoid) return weight * (1 - sigmoid(s));
  if (p.weights == Attention::kSoftplus) {
    if (!p.shifted) return share * sigmoid(s);
    return softplus_rate(s, weight);
  }
  if (s <= 0) return 0;
  float rate = share * p.power;
  for (int i = 1; i < static_cast<int>(p.power); ++i) rate *= s;
  return rate;
}

__device__ inline float length_factor(const ForwardArgs& p, int64_t seen) {
  return p.length_scale == 0 ? 1 : p.length_scale * logf(static_cast<float>(max(seen, int64_t{1})));
}

// Rows in shared memory get a length of 1, whatever their sizes; a warp takes a row. `lengths` are
// those before.
__device__ inline void make_unit(float* rows, int count, int width, int d,
                                 float* lengths = nullptr) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < count; row += kAttentionThreads / 32) {
    float* const x = rows + row * width;
    float largest = 0, square = 0;
    for (int e = lane; e < d; e += 32) largest = fmaxf(largest, fabsf(x[e]));
    largest = warp_max(largest);
    // NaN, which no maximum finds, goes through the sum
    const float unit = largest > 0 ? largest : 1;
    for (int e = lane; e < d; e += 32) square = fmaf(x[e] / unit, x[e] / unit, square);
    const float length = sqrtf(warp_sum(square));
    if (lengths && lane == 0) lengths[row] = unit * length;
    const float short_of = fminf(unit * length * 1e12f, 1);
    for (int e = lane; e < d; e += 32) x[e] = length == 0 ? 0 : x[e] / unit / length * short_of;
  }
}

template <class T>
__device__ __forceinline__ void attention_tile(const ForwardArgs& p, float* smem, int64_t tile) {
  const int q_width = p.d + 1, kv_width = max(p.d, p.dv) + 1;
  float* smem_q = smem;                           // [32, d + 1]
  float* smem_kv = smem_q + kRowTile * q_width;   // [32, max(d, dv) + 1]
  float* smem_p = smem_kv + kKeyTile * kv_width;  // [32, 33]

  const int64_t head = blockIdx.y, kv_head = head / (p.hq / p.hk);
  const int split = blockIdx.z;
  const Place place = find_place(p, tile);
  if (!place.any) return;
  const int thread = threadIdx.x, row = thread / kRowThreads, part = thread % kRowThreads;
  const int64_t query = place.row0 + row;
  const bool exists = query < place.sq;
  const int64_t position = place.sk - place.sq + query;

  for (int i = thread; i < kRowTile * p.d; i += kAttentionThreads) {
    const int r = i / p.d, e = i % p.d;
    const T* q = static_cast<const T*>(p.q.data) + place.batch * p.q.batch +
                 (place.q_begin + place.row0 + r) * p.q.token + head * p.q.head;
    smem_q[r * q_width + e] = place.row0 + r < place.sq ? to_float(q[e * p.q.element]) : 0;
  }

  if (p.cosine) {
    __syncthreads();
    make_unit(smem_q, kRowTile, q_width, p.d);
  }

  // Keys that some row of the tile sees, then this split's share of them in whole tiles
  int64_t first = 0, last = place.sk;
  const int64_t low = place.sk - place.sq + place.row0;
  const int64_t high = place.sk - place.sq + min(place.row0 + kRowTile, place.sq) - 1;
  if (p.causal || p.window) last = min(last, high + 1);
  if (p.window) first = max(first, low - p.window + 1);
  first = first / kKeyTile * kKeyTile;
  const int64_t tiles = last > first ? (last - first + kKeyTile - 1) / kKeyTile : 0;
  const int64_t share = (tiles + p.splits - 1) / p.splits;
  const int64_t begin = first + split * share * kKeyTile;
  const int64_t end = min(last, begin + share * kKeyTile);

  MaskRow own_mask{};
  if (p.masked) own_mask = mask_row(p, place, head, min(query, place.sq - 1));

  const float slope = p.slopes ? p.slopes[head * p.slopes_stride] : 0;
  const int64_t row_keys = exists ? keys_seen(p, place, position) : 0;
  const float scale = p.scale * length_factor(p, row_keys) * p.scales.score(head, kv_head);
  const Lift lift = lift_of(p, place.batch, head, place.q_begin + query, row_keys);
  // row_max starts at a large negative finite number: (-inf) - (-inf) would poison empty rows.
  // Other weights than exponentials are relative to nothing
  float row_max = p.shifted ? -1e30f : 0, row_sum = 0;
  float acc[kMostColumns] = {};

  for (int64_t t0 = begin; t0 < end; t0 += kKeyTile) {
    uint32_t seen = ~0u;
    if (p.masked) {
      seen = exists ? static_cast<uint32_t>(p.mask.seen(own_mask, t0)) : 0;
      // All threads take the same turn, as the loads below wait for each other
      if (!__syncthreads_or(seen != 0)) continue;
    }
    const auto load = [&](const Heads& x, int width) {
      __syncthreads();
      for (int i = thread; i < kKeyTile * width; i += kAttentionThreads) {
        const int t = i / width, e = i % width;
        const T* key = t0 + t < place.sk ? key_at<T>(p, x, place, t0 + t, kv_head) : nullptr;
        smem_kv[t * kv_width + e] = key ? to_float(key[e * x.element]) : 0;
      }
      __syncthreads();
    };

    load(p.k, p.d);
    if (p.cosine) {
      make_unit(smem_kv, kKeyTile, kv_width, p.d);
      __syncthreads();
    }
    float score[kKeyTile / kRowThreads];
    uint32_t hidden = 0;  // a bit for each
    float tile_max = -1e30f;
#pragma unroll
    for (int j = 0; j < kKeyTile / kRowThreads; ++j) {
      const int c = part + kRowThreads * j;
      const int64_t t = t0 + c;
      float dot = 0;
      for (int e = 0; e < p.d; ++e)
        dot = fmaf(smem_q[row * q_width + e], smem_kv[c * kv_width + e], dot);
      float s = dot * scale;
      if (p.soft_cap > 0) s = p.soft_cap * tanhf(s / p.soft_cap);
      if (p.slopes) s += slope * static_cast<float>(t - position);
      const bool visible = exists && t < end && (!(p.causal || p.window) || t <= position) &&
                           (!p.window || t > position - p.window) && (seen >> c & 1);
      if (p.bias && visible) s += bias_at(p, place.batch, head, query, t);
      if (p.shifted) s = exponent_of(p, s, lift);
      score[j] = visible ? s : -INFINITY;
      hidden |= static_cast<uint32_t>(!visible) << j;
      if (visible) tile_max = s > tile_max || isnan(s) ? s : tile_max;
    }
    tile_max = quad_max(tile_max);
    const float new_max = p.shifted ? fmaxf(row_max, tile_max) : 0,
                correction = expf(row_max - new_max);
    row_max = new_max;
    row_sum *= correction;
    for (int f = 0; f < kMostColumns; ++f) acc[f] *= correction;
#pragma unroll
    for (int j = 0; j < kKeyTile / kRowThreads; ++j) {
      const float weight = score[j] == -INFINITY ? 0
                           : p.shifted           ? expf(score[j] - row_max)
                                                 : weight_of(p, score[j]);
      row_sum += weight;
      // -1 marks what the row must not see, whatever its value holds. A weight of 0 is none: what
      // it is multiplied by may be no number
      smem_p[row * (kKeyTile + 1) + part + kRowThreads * j] = hidden >> j & 1 ? -1 : weight;
    }

    load(p.v, p.dv);
    const int count = static_cast<int>(min(int64_t{kKeyTile}, end - t0));
    for (int c = 0; c < count; ++c) {
      const float weight = smem_p[row * (kKeyTile + 1) + c];
      if (weight < 0) continue;
#pragma unroll
      for (int f = 0; f < kMostColumns; ++f) {
        const int column = part + kRowThreads * f;
        if (column < p.dv) acc[f] = fmaf(weight, smem_kv[c * kv_width + column], acc[f]);
      }
    }
  }

  row_sum = quad_sum(row_sum);
  if (!exists) return;
  const int64_t token = place.q_begin + query;
  const int64_t statistic = (place.batch * p.hq + head) * p.sq + token;
  if (p.part_out) {
    const int64_t at = statistic * p.splits + split;
    for (int f = 0; f < kMostColumns; ++f) {
      const int column = part + kRowThreads * f;
      if (column < p.dv) p.part_out[at * p.dv + column] = acc[f];
    }
    if (part == 0) {
      p.part_max[at] = row_max;
      p.part_sum[at] = row_sum;
    }
    return;
  }
  float total_max = row_max, total = row_sum;
  if (p.sink) {
    const float sink = p.sink[head * p.sink_stride];
    total_max = row_sum == 0 ? sink : fmaxf(row_max, sink);
    total = row_sum * expf(row_max - total_max) + expf(sink - total_max);
  }
  const float factor = (row_sum == 0  ? 0
                        : p.normalise ? expf(row_max - total_max) / total
                                      : 1) *
                       p.scales.value(kv_head);
  const int64_t out = ((place.batch * p.sq + token) * p.hq + head) * p.dv;
  for (int f = 0; f < kMostColumns; ++f) {
    const int column = part + kRowThreads * f;
    if (column < p.dv) store_out<T>(p, out + column, row_sum == 0 ? 0 : acc[f] * factor);
  }
  if (part == 0) p.lse[statistic] = total == 0 ? -INFINITY : total_max + logf(total);
}

template <class T>
__global__ void __launch_bounds__(kAttentionThreads) attention_portable_kernel(ForwardArgs p) {
  if (p.only_if && *p.only_if == 0) return;
  extern __shared__ float smem[];
  for (int64_t tile = blockIdx.x; tile < tile_count(p); tile += gridDim.x) {
    attention_tile<T>(p, smem, tile);
    __syncthreads();
  }
}

// One warp per row joins its splits, in their order
template <class T> __global__ void attention_join_kernel(ForwardArgs p) {
  if (p.only_if && *p.only_if == 0) return;
  const int lane = threadIdx.x % 32;
  const int64_t rows = p.b * p.hq * p.sq,
                warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  for (int64_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < rows; row += warps) {
    const int64_t token = row % p.sq, head = row / p.sq % p.hq, batch = row / p.sq / p.hq;
    const float *row_max = p.part_max + row * p.splits, *row_sum = p.part_sum + row * p.splits;
    float top = p.sink      ? p.sink[head * p.sink_stride]
                : p.shifted ? -1e30f
                            : 0,
          total = p.sink ? 1 : 0;
    bool any = false;
    for (int i = 0; i < p.splits; ++i) {
      if (row_sum[i] == 0) continue;
      const float next = fmaxf(top, row_max[i]);
      total = total * expf(top - next) + row_sum[i] * expf(row_max[i] - next);
      top = next;
      any = true;
    }
    const int64_t out = ((batch * p.sq + token) * p.hq + head) * p.dv;
    const float scale = p.scales.value(head / (p.hq / p.hk));
    for (int f = lane; f < p.dv; f += 32) {
      float sum = 0;
      for (int i = 0; i < p.splits; ++i)
        if (row_sum[i] != 0)
          sum += expf(row_max[i] - top) * p.part_out[(row * p.splits + i) * p.dv + f];
      store_out<T>(p, out + f, !any ? 0 : scale * (p.normalise ? sum / total : sum));
    }
    if (lane == 0) p.lse[row] = total == 0 ? -INFINITY : top + logf(total);
  }
}

// `columns` CTAs share the tiles of a head and a split
template <class T>
void forward_portable(const ForwardArgs& args, int64_t columns, CudaContext& context) {
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(args.hq),
                  static_cast<unsigned>(args.splits));
  const size_t smem_bytes =
      sizeof(float) *
      static_cast<size_t>(kRowTile * (args.d + 1) + kKeyTile * (std::max(args.d, args.dv) + 1) +
                          kRowTile * (kKeyTile + 1));
  launch_grid(attention_portable_kernel<T>, grid, kAttentionThreads, smem_bytes, context.stream,
              args);
  context.launched("attention_portable_kernel");
  if (!args.part_out) return;
  launch_grid(attention_join_kernel<T>, blocks_for(args.b * args.hq * args.sq * 32, context),
              kThreads, 0, context.stream, args);
  context.launched("attention_join_kernel");
}

}  // namespace heddle
