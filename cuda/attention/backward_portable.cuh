#pragma once
#include "attention/backward_sm90.h"
#include "attention/forward_portable.cuh"
#include "common/lanes.cuh"

// Gradients of attention with every option on any GPU from sm_80 on, in f32 arithmetic:
//
//   P = exp(s - lse), or another weight, which moves by P' with its score
//   delta = dout . out
//   dS = P' (dout . v - delta) s'(q . k) scale
//   dq = sum over keys of dS k    dk = sum over rows of dS q    dv = sum over rows of P dout
//
// One kernel, launched twice: a CTA of 128 threads owns 32 rows of a head, or 32 keys of a kv head,
// and walks 16 tokens of the other side at a time. Scores are computed in both launches, seven
// products instead of five, so that every sum has one owner and one order. Four threads share an
// owned token: each computes 4 of its 16 scores and keeps a quarter of its sums in registers.
namespace heddle {

constexpr int kHopperColumns = 128 / kRowThreads;  // of what backward_sm90 takes
constexpr int kOtherTile = 16, kOthersPerThread = kOtherTile / kRowThreads;

struct BackwardArgs {
  ForwardArgs call;
  Heads out, dout;
  void *dq, *dk, *dv;      // as q, k and v, contiguous
  float *dsink, *dslopes;  // [hq] or null
  const float* lse;
  int64_t lse_batch, lse_head, lse_token;
  // Of each row, [b, hq, sq]. lse is +inf where the row is empty: its weights are then 0
  float *row_lse, *row_delta;
  // [b, hq, slope_parts]: sums of dS (t - p) before the scale, here of rows; null without slopes
  float* dslope_parts;
  int64_t slope_parts;
  float* dlevel;     // [b, hq, sq] or null
  float* bias_sums;  // of dS, [b, hq, sq or 1, sk or 1], or null
  bool bias_by_row, bias_by_key;
  float* dbias;
  int64_t dbias_shape[4];
  const float* dlse;  // or null
  int64_t dlse_batch, dlse_head, dlse_token;
};

// One warp per row
__global__ void attention_delta_kernel(BackwardArgs p) {
  const ForwardArgs& call = p.call;
  const int lane = threadIdx.x % 32;
  const int64_t rows = call.b * call.hq * call.sq,
                warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  for (int64_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < rows; row += warps) {
    const int64_t token = row % call.sq, head = row / call.sq % call.hq,
                  batch = row / call.sq / call.hq;
    const auto at = [&](const Heads& x, int e) {
      return load_float(x.data, batch * x.batch + token * x.token + head * x.head + e * x.element,
                        call.out_dtype);
    };
    float sum = 0;
    // out of an empty row is 0, whatever dout holds
    for (int e = lane; e < call.dv; e += 32)
      if (const float out = at(p.out, e); out != 0) sum = fmaf(out, at(p.dout, e), sum);
    sum = warp_sum(sum);
    if (lane != 0) continue;
    const float lse = p.lse[batch * p.lse_batch + head * p.lse_head + token * p.lse_token];
    p.row_lse[row] = lse == -INFINITY ? INFINITY : lse;
    const float dlse =
        p.dlse ? p.dlse[batch * p.dlse_batch + head * p.dlse_head + token * p.dlse_token] : 0;
    p.row_delta[row] = lse == -INFINITY ? 0 : sum - dlse;
  }
}

// Tile `tile` of `size` tokens, as GradientTiles counts them
__device__ inline Place place_tile(const ForwardArgs& p, int64_t batch, int64_t tile, int size,
                                   bool keys) {
  Place place{batch, 0, p.sq, 0, p.sk, tile * size, batch, true};
  if (p.cache_seqlens) place.sk = clamp_to(p.cache_seqlens[batch * p.cache_stride], 0, p.sk);
  if (!p.cu_seqlens_q) return place;
  const int64_t i =
      sequence_of_tile(keys ? p.cu_seqlens_k : p.cu_seqlens_q, keys ? p.cu_k_stride : p.cu_q_stride,
                       static_cast<int>(p.sequences), size, static_cast<int>(tile));
  place.sequence = i;
  place.q_begin = clamp_to(p.cu_seqlens_q[i * p.cu_q_stride], 0, p.sq);
  place.k_begin = clamp_to(p.cu_seqlens_k[i * p.cu_k_stride], 0, p.sk);
  place.sq = clamp_to(p.cu_seqlens_q[(i + 1) * p.cu_q_stride], place.q_begin, p.sq) - place.q_begin;
  place.sk = clamp_to(p.cu_seqlens_k[(i + 1) * p.cu_k_stride], place.k_begin, p.sk) - place.k_begin;
  place.row0 = (tile - ((keys ? place.k_begin : place.q_begin) / size + i)) * size;
  return place;
}

// 32 rows of query head `owner`, or 32 keys of kv head `owner`; a thread has kColumns of each sum.
// Masks are `kMasked`, cosines, levels and biases with sums `kExtra`: the rest does without their
// registers.
template <bool kOwnsKeys, int kColumns, bool kMasked, bool kExtra>
__device__ void gradient_tile(const BackwardArgs& args, const Place& place, int64_t owner) {
  const ForwardArgs& p = args.call;
  extern __shared__ float smem[];
  __shared__ uint32_t smem_seen[kRowTile];  // of each query of the tile, a bit per key
  __shared__ float smem_length[kRowTile];   // of the owned tokens, where scores are cosines
  const int width = p.d + 1, width_v = p.dv + 1;
  float* smem_own = smem;                               // [32, d + 1] of q or k
  float* smem_own_v = smem_own + kRowTile * width;      // [32, dv + 1] of dout or v
  float* smem_other = smem_own_v + kRowTile * width_v;  // [16, d + 1] of k or q
  float* smem_other_v = smem_other + kOtherTile * width;

  const int64_t group = p.hq / p.hk;
  const int64_t kv_head = kOwnsKeys ? owner : owner / group;
  const int64_t off = place.sk - place.sq;
  const int thread = threadIdx.x, own = thread / kRowThreads, part = thread % kRowThreads;

  // Tokens of q or dout, or of k or v, as f32; zeros where there are none
  const auto load = [&](float* to, const Heads& x, bool keys, int64_t head, int64_t first,
                        int count, int size) {
    const int64_t begin = keys ? place.k_begin : place.q_begin, end = keys ? place.sk : place.sq;
    dispatch_float(p.out_dtype, [&]<class T>(T) {
      const T* from =
          static_cast<const T*>(x.data) + place.batch * x.batch + begin * x.token + head * x.head;
#pragma unroll 1
      for (int i = thread; i < count * size; i += kAttentionThreads) {
        const int r = i / size, e = i % size;
        to[r * (size + 1) + e] =
            first + r < end ? to_float(from[(first + r) * x.token + e * x.element]) : 0;
      }
    });
  };

  // Tokens of the other side that some owned token meets
  int64_t first = 0, last = kOwnsKeys ? place.sq : place.sk;
  const int64_t low = place.row0, high = place.row0 + kRowTile - 1;
  if (kOwnsKeys) {
    if (p.causal || p.window) first = max(first, low - off);
    if (p.window) last = min(last, high + p.window - off);
  } else {
    if (p.causal || p.window) last = min(last, high + off + 1);
    if (p.window) first = max(first, low + off - p.window + 1);
  }

  float acc[kColumns] = {};                    // dq or dk
  float acc_v[kOwnsKeys ? kColumns : 1] = {};  // dv
  float dslope = 0, dlevel = 0, dbias = 0;
  const int64_t first_head = kOwnsKeys ? kv_head * group : owner;
  const int64_t last_head = first_head + (kOwnsKeys ? group : 1);
  if (kOwnsKeys) {
    load(smem_own, p.k, true, kv_head, place.row0, kRowTile, p.d);
    load(smem_own_v, p.v, true, kv_head, place.row0, kRowTile, p.dv);
  } else {
    load(smem_own, p.q, false, first_head, place.row0, kRowTile, p.d);
    load(smem_own_v, args.dout, false, first_head, place.row0, kRowTile, p.dv);
  }
  if (kExtra && p.cosine) {
    __syncthreads();
    make_unit(smem_own, kRowTile, width, p.d, smem_length);
  }

  for (int64_t head = first_head; head < last_head; ++head) {
    const float slope = p.slopes ? p.slopes[head * p.slopes_stride] : 0;
    for (int64_t other0 = first; other0 < last; other0 += kOtherTile) {
      __syncthreads();
      if (kMasked && p.masked) {
        uint32_t seen = 0;
        const int64_t query = (kOwnsKeys ? other0 : place.row0) + thread;
        if (thread < (kOwnsKeys ? kOtherTile : kRowTile)) {
          if (query < place.sq)
            seen = static_cast<uint32_t>(
                p.mask.seen(mask_row(p, place, head, query), kOwnsKeys ? place.row0 : other0) &
                (kOwnsKeys ? ~0u : (1u << kOtherTile) - 1));
          smem_seen[thread] = seen;
        }
        // a tile without a pair that meets is not loaded
        if (!__syncthreads_or(seen != 0)) continue;
      }
      if (kOwnsKeys) {
        load(smem_other, p.q, false, head, other0, kOtherTile, p.d);
        load(smem_other_v, args.dout, false, head, other0, kOtherTile, p.dv);
      } else {
        load(smem_other, p.k, true, kv_head, other0, kOtherTile, p.d);
        load(smem_other_v, p.v, true, kv_head, other0, kOtherTile, p.dv);
      }
      __syncthreads();
      if (kExtra && p.cosine) {
        make_unit(smem_other, kOtherTile, width, p.d);
        __syncthreads();
      }

      // -1 marks a pair that does not meet, whatever its tokens hold
      float weight[kOthersPerThread], dscore[kOthersPerThread];
#pragma unroll
      for (int j = 0; j < kOthersPerThread; ++j) {
        const int c = part + kRowThreads * j;
        const int64_t mine = place.row0 + own, its = other0 + c;
        const int64_t query = kOwnsKeys ? its : mine, t = kOwnsKeys ? mine : its;
        const int64_t position = query + off;
        weight[j] = -1;
        dscore[j] = 0;
        if (query >= place.sq || t >= place.sk || its >= last) continue;
        if ((p.causal || p.window) && t > position) continue;
        if (p.window && t <= position - p.window) continue;
        if (kMasked && p.masked && !(smem_seen[kOwnsKeys ? c : own] >> (kOwnsKeys ? own : c) & 1))
          continue;
        float s = 0, dp = 0;
        for (int e = 0; e < p.d; ++e)
          s = fmaf(smem_own[own * width + e], smem_other[c * width + e], s);
        for (int e = 0; e < p.dv; ++e)
          dp = fmaf(smem_own_v[own * width_v + e], smem_other_v[c * width_v + e], dp);
        float derivative = p.scale * length_factor(p, keys_seen(p, place, position));
        s *= derivative;
        if (p.soft_cap > 0) {
          const float bent = tanhf(s / p.soft_cap);
          derivative *= 1 - bent * bent;
          s = p.soft_cap * bent;
        }
        const auto distance = static_cast<float>(t - position);
        if (p.slopes) s = fmaf(slope, distance, s);
        const int64_t row = (place.batch * p.hq + head) * p.sq + place.q_begin + query;
        if (p.bias) s += bias_at(p, place.batch, head, query, t);
        const float lse = args.row_lse[row], share = p.normalise ? expf(-lse) : 1;
        Lift lift;
        if (kExtra && p.level)
          lift =
              lift_of(p, place.batch, head, place.q_begin + query, keys_seen(p, place, position));
        weight[j] = p.shifted ? expf(exponent_of(p, s, lift) - lse) : share * weight_of(p, s);
        const float delta = p.normalise ? args.row_delta[row] : 0;
        float rate;
        if (kExtra && p.level) {
          const float moved = reweighted_rate(p, s, lift, weight[j]);
          dlevel -= moved * (dp - delta);
          rate = softplus_rate(s, moved);
        } else {
          rate = rate_of(p, s, weight[j], share);
        }
        const float ds = rate * (dp - delta);
        if (kExtra && args.bias_sums) {
          dbias += ds;
          if (!kOwnsKeys && args.bias_by_row && args.bias_by_key)
            args.bias_sums[row * p.sk + t] = ds;
        }
        dslope = fmaf(ds, distance, dslope);
        dscore[j] = ds * derivative;
      }

#pragma unroll
      for (int j = 0; j < kOthersPerThread; ++j)
#pragma unroll 1
        for (int i = 0; i < kRowThreads; ++i) {
          const int c = i + kRowThreads * j, from = (thread % 32 & ~(kRowThreads - 1)) + i;
          const float p_c = __shfl_sync(~0u, weight[j], from);
          const float ds_c = __shfl_sync(~0u, dscore[j], from);
          if (p_c < 0) continue;
#pragma unroll
          for (int f = 0; f < kColumns; ++f) {
            const int column = part + kRowThreads * f;
            if (column < p.d) acc[f] = fmaf(ds_c, smem_other[c * width + column], acc[f]);
            if constexpr (kOwnsKeys)
              if (column < p.dv) acc_v[f] = fmaf(p_c, smem_other_v[c * width_v + column], acc_v[f]);
          }
        }
    }
    // a bias of keys alone has sums over the rows of a head
    if (kExtra && kOwnsKeys && args.bias_sums && !args.bias_by_row) {
      dbias = quad_sum(dbias);
      const int64_t key = place.row0 + own;
      if (part == 0 && key < p.sk) args.bias_sums[(place.batch * p.hq + head) * p.sk + key] = dbias;
      dbias = 0;
    }
  }

  dslope = quad_sum(dslope);
  if (kExtra) dlevel = quad_sum(dlevel);
  if (kExtra) dbias = quad_sum(dbias);
  if (kExtra && p.cosine) {
    __syncthreads();
    const float* unit = smem_own + own * width;
    float along = 0;
#pragma unroll
    for (int f = 0; f < kColumns; ++f)
      if (const int column = part + kRowThreads * f; column < p.d)
        along = fmaf(unit[column], acc[f], along);
    along = quad_sum(along);
    // a token without a length has no direction
    const float length = smem_length[own], inverse = length <= 1e-12f ? 0 : 1 / length;
#pragma unroll
    for (int f = 0; f < kColumns; ++f)
      if (const int column = part + kRowThreads * f; column < p.d)
        acc[f] = fmaf(-along, unit[column], acc[f]) * inverse;
  }
  // Keys behind the length of a cache exist, and nothing meets them
  const int64_t token = place.row0 + own;
  const int64_t tokens = kOwnsKeys ? p.sk : p.sq;
  const int64_t exist = !kOwnsKeys ? place.sq : p.cu_seqlens_q ? place.sk : p.sk;
  if (token >= exist) return;
  const int64_t row = place.batch * tokens + (kOwnsKeys ? place.k_begin : place.q_begin) + token;
  const int64_t at = row * (kOwnsKeys ? p.hk : p.hq) + owner;
  dispatch_float(p.out_dtype, [&]<class T>(T) {
    T* const sum = static_cast<T*>(kOwnsKeys ? args.dk : args.dq) + at * p.d;
#pragma unroll
    for (int f = 0; f < kColumns; ++f) {
      const int column = part + kRowThreads * f;
      if (column < p.d) sum[column] = from_float<T>(acc[f]);
      if constexpr (kOwnsKeys)
        if (column < p.dv) (static_cast<T*>(args.dv) + at * p.dv)[column] = from_float<T>(acc_v[f]);
    }
  });
  if (!kOwnsKeys && args.dslope_parts && part == 0)
    args.dslope_parts[(place.batch * p.hq + first_head) * p.sq + place.q_begin + token] = dslope;
  if (kExtra && !kOwnsKeys && p.level && part == 0)
    args.dlevel[(place.batch * p.hq + first_head) * p.sq + place.q_begin + token] = dlevel;
  if (kExtra && !kOwnsKeys && args.bias_sums && !args.bias_by_key && part == 0)
    args.bias_sums[(place.batch * p.hq + first_head) * p.sq + token] = dbias;
}

template <bool kOwnsKeys, bool kExtra>
__global__ void __launch_bounds__(kAttentionThreads) attention_gradient_kernel(BackwardArgs args) {
  const Place place = find_place(args.call, blockIdx.x, kOwnsKeys);
  if (place.any) gradient_tile<kOwnsKeys, kMostColumns, kExtra, kExtra>(args, place, blockIdx.y);
}

// The row tiles, or key tiles, that backward_sm90 has marked. Neighbours go to different CTAs.
template <bool kOwnsKeys>
__device__ void redo_tiles(const BackwardArgs& args, const GradientTiles& tiles, const int* marks) {
  const ForwardArgs& p = args.call;
  const int64_t count = kOwnsKeys ? tiles.total_keys : tiles.total_rows;
  const int64_t each = kOwnsKeys ? tiles.key_tiles : tiles.row_tiles;
  const int64_t size = kOwnsKeys ? tiles.keys : tiles.queries, heads = kOwnsKeys ? p.hk : p.hq;
  const int64_t step = gridDim.x;
  for (int64_t first = blockIdx.x; first < count; first += step * kAttentionThreads) {
    const int64_t mine = first + step * threadIdx.x;
    if (!__syncthreads_or(mine < count && marks[mine])) continue;
    for (int64_t i = first; i < min(count, first + step * kAttentionThreads); i += step) {
      if (!marks[i]) continue;
      Place place = place_tile(p, i / each / heads, i % each, static_cast<int>(size), kOwnsKeys);
      const int64_t end = place.row0 + size;
      for (; place.row0 < end; place.row0 += kRowTile) {
        __syncthreads();
        gradient_tile<kOwnsKeys, kHopperColumns, true, false>(args, place, i / each % heads);
      }
    }
  }
}

__global__ void __launch_bounds__(kAttentionThreads)
    attention_redo_kernel(BackwardArgs args, GradientTiles tiles, const int* marks) {
  redo_tiles<false>(args, tiles, marks);
  redo_tiles<true>(args, tiles, marks + tiles.total_rows);
}

// What each head's sink and slope get: one CTA per head, in one order. The sink is a key whose
// value is zero, its dS is -P delta.
__global__ void attention_heads_kernel(BackwardArgs p) {
  __shared__ double smem_sink[kThreads], smem_slope[kThreads];
  const ForwardArgs& call = p.call;
  const int64_t head = blockIdx.x;
  double dsink = 0, dslope = 0;
  for (int64_t i = threadIdx.x; i < call.b * call.sq; i += kThreads) {
    const int64_t row = (i / call.sq * call.hq + head) * call.sq + i % call.sq;
    if (p.dsink)
      dsink -= expf(call.sink[head * call.sink_stride] - p.row_lse[row]) * p.row_delta[row];
  }
  for (int64_t i = threadIdx.x; p.dslope_parts && i < call.b * p.slope_parts; i += kThreads)
    dslope +=
        p.dslope_parts[(i / p.slope_parts * call.hq + head) * p.slope_parts + i % p.slope_parts];
  smem_sink[threadIdx.x] = dsink;
  smem_slope[threadIdx.x] = dslope;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) {
      smem_sink[threadIdx.x] += smem_sink[threadIdx.x + step];
      smem_slope[threadIdx.x] += smem_slope[threadIdx.x + step];
    }
  }
  if (threadIdx.x != 0) return;
  if (p.dsink) p.dsink[head] = static_cast<float>(smem_sink[0]);
  if (p.dslopes) p.dslopes[head] = static_cast<float>(smem_slope[0]);
}

// Adds up the sums of dS over what the bias is broadcast over, a warp for each number of it
__global__ void attention_bias_kernel(BackwardArgs p, int64_t count) {
  const ForwardArgs& call = p.call;
  const int lane = threadIdx.x % 32;
  const int64_t* shape = p.dbias_shape;
  const int64_t sizes[] = {call.b, call.hq, p.bias_by_row ? call.sq : 1};
  for (int64_t i = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; i < count;
       i += static_cast<int64_t>(gridDim.x) * (kThreads / 32)) {
    const int64_t column = i % shape[3], line = i / shape[3];
    const int64_t at[] = {line / shape[2] / shape[1], line / shape[2] % shape[1], line % shape[2]};
    int64_t first[3], width[3];
    for (int a = 0; a < 3; ++a) {
      first[a] = shape[a] == 1 ? 0 : at[a];
      width[a] = shape[a] == 1 ? sizes[a] : 1;
    }
    double sum = 0;
    for (int64_t j = lane; j < width[0] * width[1] * width[2]; j += 32) {
      const int64_t row = first[2] + j % width[2], head = first[1] + j / width[2] % width[1],
                    batch = first[0] + j / width[2] / width[1];
      sum += p.bias_sums[((batch * sizes[1] + head) * sizes[2] + row) * shape[3] + column];
    }
    sum = warp_sum(sum);
    if (lane == 0) p.dbias[i] = static_cast<float>(sum);
  }
}

inline void sum_bias(const BackwardArgs& args, CudaContext& context) {
  const int64_t* shape = args.dbias_shape;
  const int64_t count = shape[0] * shape[1] * shape[2] * shape[3];
  if (!args.bias_sums || args.bias_sums == args.dbias || count == 0) return;
  launch_grid(attention_bias_kernel, blocks_for(count * 32, context), kThreads, 0, context.stream,
              args, count);
  context.launched("attention_bias_kernel");
}

inline void sum_heads(const BackwardArgs& args, CudaContext& context) {
  if (!args.dsink && !args.dslopes) return;
  launch_grid(attention_heads_kernel, static_cast<unsigned>(args.call.hq), kThreads, 0,
              context.stream, args);
  context.launched("attention_heads_kernel");
}

// Shared memory of a tile
inline size_t gradient_smem_bytes(const ForwardArgs& call) {
  return sizeof(float) * static_cast<size_t>((kRowTile + kOtherTile) * (call.d + call.dv + 2));
}

// Once more what backward_sm90 has marked
inline void backward_redo(const BackwardArgs& args, const GradientTiles& tiles, const int* marks,
                          CudaContext& context) {
  launch_grid(attention_redo_kernel, static_cast<unsigned>(context.processors), kAttentionThreads,
              gradient_smem_bytes(args.call), context.stream, args, tiles, marks);
  context.launched("attention_redo_kernel");
}

inline void backward_portable(const BackwardArgs& args, CudaContext& context) {
  const ForwardArgs& call = args.call;
  const int64_t rows = call.b * call.hq * call.sq;
  const auto tiles = [&](bool keys) { return static_cast<unsigned>(tile_count(call, keys)); };
  const bool extra = call.masked || call.cosine || call.level || args.bias_sums;
  const auto launch_gradient = [&](auto* kernel, unsigned count, int64_t heads) {
    if (count == 0) return;
    launch_grid(kernel, dim3(count, static_cast<unsigned>(heads)), kAttentionThreads,
                gradient_smem_bytes(call), context.stream, args);
    context.launched("attention_gradient_kernel");
  };
  if (rows > 0) {
    launch_grid(attention_delta_kernel, blocks_for(rows * 32, context), kThreads, 0, context.stream,
                args);
    context.launched("attention_delta_kernel");
    launch_gradient(
        extra ? attention_gradient_kernel<false, true> : attention_gradient_kernel<false, false>,
        tiles(false), call.hq);
  }
  launch_gradient(
      extra ? attention_gradient_kernel<true, true> : attention_gradient_kernel<true, false>,
      tiles(true), call.hk);
  sum_bias(args, context);
  sum_heads(args, context);
}

}  // namespace heddle
