#pragma once
#include <bit>

#include "core/rules.h"

namespace heddle {

// Lists of key blocks that a row of query blocks is likely to attend, found by looking at few keys.
// A row looks for them among the keys from `sink_tokens` on that its last query has left behind
// `window`; a list is ascending. Neither a scale nor a soft cap changes one.
//
//   halves   the whole search: intervals of blocks, of which the best are kept and cut in two
//            until they are single blocks (HiP)
//   stage    one of several: chunks, of all keys or cut from those of `from`, of which the best by
//            a descent inside each are kept (InfiniteHiP)
struct Hip {
  static constexpr const char* kName = "hip";
  enum Kind { kHalves, kStage };
  enum Representative { kCenter, kFirst };
  enum Positions { kOwn, kStreaming, kRelative, kInfllm, kSelfExtend, kDynamicExtend };
  Tensor q;              // [b, sq, hq, d]
  Tensor k;              // [b, sk, hk, d], or pages of it
  Tensor block_table;    // [b, max_pages] i32: which page holds which part of a sequence
  Tensor cache_seqlens;  // [b] i32: keys in use, at least sq
  Tensor cu_seqlens_q;   // [n + 1] i32: where each packed sequence of q begins, b = 1
  Tensor cu_seqlens_k;   // [n + 1] i32; lists stand at rows as a mask has them
  Tensor cos, sin;       // [positions, d / 2] f32: a stage turns queries and keys by them
  Tensor from_index;     // [b, hm, rows, width] i32: what the stage before kept
  Tensor from_count;     // [b, hm, rows] i32
  // Rows of k that stand nearby, t * hk + head counting them, as the operator `fetch` keeps them: k
  // is far away then, and no pages
  Tensor near;         // [slots, d]
  Tensor near_places;  // [most_rows] i32
  Tensor near_slots;   // [slots, 2] i32
  Tensor near_counts;  // [4] i64
  Tensor missed;       // [slots + 1] i32: how many rows were not there, and which, as far as fits
  Tensor index;        // [b, hm, rows, width] i32: first keys of blocks, then INT32_MAX
  Tensor count;        // [b, hm, rows] i32
  Tensor blocks;       // [b, hm, rows, words] i32: what is listed, as bits of a mask
  Tensor table;        // [b, hm, rows, pages] i32: the sink tokens and the list as pages of block_k
  Tensor length;       // [b, hm, rows] i32: how many keys these are
  int kind = kHalves, representative = kCenter;
  int positions = kOwn;  // where what turns is taken to stand, core/hip.h has the rules
  int64_t context = 0;   // of the model, for positions that are compressed
  int64_t block_q = 64, block_k = 2;
  int64_t stride_q = 2, stride_k = 1;  // halves look at the last query and key of each so many;
                                       // a stage at means of so many queries
  int64_t from_block_q = 0, from_block_k = 0;  // blocks of `from`
  int64_t window = 256, sink_tokens = 16;

  template <class Schema> static void describe(Schema& schema) {
    schema.input("q", &Hip::q, "b sq hq d", kFloats);
    schema.input("k", &Hip::k, "b sk hk d", like("q")).when("block_table", "pages page_size hk d");
    schema.optional("block_table", &Hip::block_table, "b max_pages", kI32);
    schema.optional("cache_seqlens", &Hip::cache_seqlens, "b", kI32);
    // With these k is no pages, whose names of sizes are free for them
    schema.optional("cu_seqlens_q", &Hip::cu_seqlens_q, "pages+1", kI32);
    schema.optional("cu_seqlens_k", &Hip::cu_seqlens_k, "pages+1", kI32);
    schema.optional("cos", &Hip::cos, "... turns", kF32);
    schema.optional("sin", &Hip::sin, "... turns", kF32);
    schema.optional("from_index", &Hip::from_index, "b hm from_rows from_width", kI32);
    schema.optional("from_count", &Hip::from_count, "b hm from_rows", kI32);
    // The same goes for these
    schema.optional("near", &Hip::near, "page_size d", like("q"));
    schema.optional("near_places", &Hip::near_places, "max_pages", kI32);
    schema.inout("near_slots", &Hip::near_slots, "page_size 2", kI32).only_if("near");
    schema.inout("near_counts", &Hip::near_counts, "4", DTypes{1u << int(DType::kI64)})
        .only_if("near");
    schema.inout("missed", &Hip::missed, "page_size+1", kI32).only_if("near");
    schema.inout("index", &Hip::index, "b hm rows width", kI32);
    schema.inout("count", &Hip::count, "b hm rows", kI32);
    schema.inout("blocks", &Hip::blocks, "b hm rows words", kI32).only_if("blocks");
    schema.inout("table", &Hip::table, "b hm rows pages", kI32).only_if("table");
    schema.inout("length", &Hip::length, "b hm rows", kI32).only_if("table");
    schema.choice("kind", &Hip::kind, {"halves", "stage"});
    schema.choice("representative", &Hip::representative, {"center", "first"});
    schema.choice("positions", &Hip::positions,
                  {"own", "streaming", "relative", "infllm", "self_extend", "dynamic_extend"});
    schema.integer("context", &Hip::context, 0).at_least(1);
    schema.integer("block_q", &Hip::block_q, 64).at_least(1).at_most(128);
    schema.integer("block_k", &Hip::block_k, 2).at_least(1).at_most(32768);
    schema.integer("stride_q", &Hip::stride_q, 2).at_least(1).at_most(128);
    schema.integer("stride_k", &Hip::stride_k, 1).at_least(1).at_most(64);
    schema.integer("from_block_q", &Hip::from_block_q, 0).at_least(1).at_most(128);
    schema.integer("from_block_k", &Hip::from_block_k, 0).at_least(1).at_most(32768);
    schema.integer("window", &Hip::window, 256).at_least(1);
    schema.integer("sink_tokens", &Hip::sink_tokens, 16).at_least(0);
  }

  // Rows of blocks of so many queries, core/mask.h has where those of a packed sequence begin
  int64_t rows(int64_t block) const {
    const int64_t sq = q.shape[1];
    return cu_seqlens_q ? sq / block + cu_seqlens_q.shape[0] - 1 : (sq + block - 1) / block;
  }
  int64_t keys() const { return block_table ? block_table.shape[1] * k.shape[1] : k.shape[1]; }
  // Chunks that a row of a stage scores at most
  int64_t most_chunks() const {
    return from_index ? from_index.shape[3] * (from_block_k / block_k)
                      : (keys() + block_k - 1) / block_k;
  }

  void validate() const {
    const int64_t sq = q.shape[1], hq = q.shape[2], hk = k.shape[2], d = q.shape[3];
    const auto power = [](int64_t x) { return std::has_single_bit(static_cast<uint64_t>(x)); };
    HEDDLE_CHECK(hk > 0 && hq % hk == 0, kShape, "k", "hq must be a multiple of hk, got ", hq,
                 " and ", hk);
    HEDDLE_CHECK(d >= 1 && d <= 256, kShape, "q", "d must be from 1 to 256, got ", d);
    HEDDLE_CHECK(bool(cu_seqlens_q) == bool(cu_seqlens_k), kArgument, "cuSeqlensQ",
                 "cuSeqlensQ and cuSeqlensK must be given together");
    HEDDLE_CHECK(!cu_seqlens_q || (q.shape[0] == 1 && cu_seqlens_q.contiguous() &&
                                   cu_seqlens_k.contiguous() && !cache_seqlens && !near && !table),
                 kArgument, "cuSeqlensQ",
                 "cuSeqlensQ must be contiguous, with b = 1, and without cacheSeqlens");
    HEDDLE_CHECK(cu_seqlens_q || sq <= keys(), kShape, "q", "sq must be at most sk, got ", sq,
                 " and ", keys());
    HEDDLE_CHECK(keys() < int64_t{1} << 30, kUnsupported, "k", "sk must be less than 2^30, got ",
                 keys());
    HEDDLE_CHECK(!block_table || (cache_seqlens && power(k.shape[1]) && k.shape[1] <= 256), kShape,
                 "k", "pages must be of a power of two keys up to 256, with cacheSeqlens, got ",
                 k.shape[1]);
    HEDDLE_CHECK(power(block_q) && power(block_k), kArgument, "block",
                 "block must be of powers of two, got ", block_q, " and ", block_k);
    HEDDLE_CHECK(block_q % stride_q == 0 && block_k % stride_k == 0, kArgument, "stride",
                 "stride must divide the block, got ", stride_q, " and ", stride_k);
    const int64_t heads = index.shape[1];
    HEDDLE_CHECK(heads == 1 || heads == hk || heads == hq, kShape, "index",
                 "index must have 1, hk or hq heads, got ", heads);
    HEDDLE_CHECK(index.shape[2] == rows(block_q) && index.shape[3] >= 1, kShape, "index",
                 "index must have ", rows(block_q), " rows, got ", index);
    for (const Tensor* tensor :
         {&from_index, &from_count, &index, &count, &blocks, &table, &length})
      HEDDLE_CHECK(!*tensor || tensor->contiguous(), kShape, "index", "lists must be contiguous");
    HEDDLE_CHECK(bool(from_index) == bool(from_count) && (!from_index || kind == kStage), kArgument,
                 "fromIndex", "fromIndex and fromCount must be given together, to a stage");
    if (from_index)
      HEDDLE_CHECK(from_block_q % block_q == 0 && from_block_k % block_k == 0 &&
                       from_index.shape[2] == rows(from_block_q),
                   kArgument, "fromIndex",
                   "fromIndex must have blocks that contain those of index");
    HEDDLE_CHECK(bool(cos) == bool(sin) && (cos || positions == kOwn), kArgument, "cos",
                 "cos and sin must be given together, and for positions that are not a key's own");
    if (cos) {
      HEDDLE_CHECK(kind == kStage, kArgument, "cos", "cos and sin go with stages");
      HEDDLE_CHECK(cos.rank == 2 && cos.shape[1] * 2 == d && cos.contiguous() && sin.contiguous() &&
                       (cu_seqlens_q || cos.shape[0] >= keys()) && cos.shape[0] >= window + 2,
                   kShape, "cos", "cos must be contiguous, [positions, d / 2], for ", keys(),
                   " keys and window + 2 positions, got ", cos);
      HEDDLE_CHECK(positions < kSelfExtend || context >= 4, kArgument, "context",
                   "context must be at least 4 where positions are compressed, got ", context);
    }
    if (near) {
      for (const Tensor* tensor : {&k, &near, &near_places, &near_slots, &near_counts, &missed})
        HEDDLE_CHECK(*tensor && tensor->contiguous(), kArgument, "near",
                     "near must come with all that goes with it, without gaps, as k must be");
      HEDDLE_CHECK(!block_table && k.shape[0] == 1 && near_places.shape[0] >= keys() * hk &&
                       keys() * hk <= INT32_MAX,
                   kArgument, "near", "near must have places for the rows of one sequence");
    }
    HEDDLE_CHECK(bool(table) == bool(length) &&
                     (!table || (sink_tokens % block_k == 0 &&
                                 table.shape[3] == sink_tokens / block_k + index.shape[3])),
                 kShape, "table", "table must have a page for every block of a list, got ", table);
    if (blocks)
      HEDDLE_CHECK(sink_tokens % block_k == 0 && blocks.shape[3] * 32 * block_k >= keys(), kShape,
                   "blocks", "blocks must have a bit for every block of keys, got ", blocks);
  }
};

// What attention reads of lists whose keys are taken to stand elsewhere than they do: sink tokens
// and listed blocks one after the other, in slots
struct HipPlaces {
  static constexpr const char* kName = "hip.places";
  Tensor index, count;  // as in Hip
  Tensor table;         // [b, hm, rows, pages] i32: which pages of block_k the slots are
  Tensor places;        // [b, hm, rows, slots] i32: where their keys are taken to stand
  Tensor bounds;  // [b, hm, rows, block_q, 2] i32: 0, and how many a query sees, that is those that
                  // its window has left behind
  int positions = Hip::kStreaming;
  int64_t context = 0, block_q = 64, block_k = 8, window = 256, sink_tokens = 16;
  int64_t sq = 1, sk = 1;

  template <class Schema> static void describe(Schema& schema) {
    schema.input("index", &HipPlaces::index, "b hm rows width", kI32);
    schema.input("count", &HipPlaces::count, "b hm rows", kI32);
    schema.inout("table", &HipPlaces::table, "b hm rows pages", kI32);
    schema.inout("places", &HipPlaces::places, "b hm rows slots", kI32);
    schema.inout("bounds", &HipPlaces::bounds, "b hm rows block_q 2", kI32);
    schema.choice("positions", &HipPlaces::positions,
                  {"own", "streaming", "relative", "infllm", "self_extend", "dynamic_extend"});
    schema.integer("context", &HipPlaces::context, 0).at_least(1);
    schema.integer("block_q", &HipPlaces::block_q, 64).at_least(1).at_most(128);
    schema.integer("block_k", &HipPlaces::block_k, 8).at_least(1).at_most(64);
    schema.integer("window", &HipPlaces::window, 256).at_least(1);
    schema.integer("sink_tokens", &HipPlaces::sink_tokens, 16).at_least(0);
    schema.integer("sq", &HipPlaces::sq, 1).at_least(1);
    schema.integer("sk", &HipPlaces::sk, 1).at_least(1);
  }

  void validate() const {
    for (const Tensor* tensor : {&index, &count, &table, &places, &bounds})
      HEDDLE_CHECK(tensor->contiguous(), kShape, "index", "lists must be contiguous");
    HEDDLE_CHECK(std::has_single_bit(static_cast<uint64_t>(block_k)) && sink_tokens % block_k == 0,
                 kArgument, "block", "block must be a power of two that divides sinkTokens, got ",
                 block_k);
    HEDDLE_CHECK(table.shape[3] == sink_tokens / block_k + index.shape[3] &&
                     places.shape[3] == table.shape[3] * block_k && bounds.shape[3] == block_q &&
                     index.shape[2] == (sq + block_q - 1) / block_q,
                 kShape, "table", "table must have a page for every block of a list, got ", table);
    HEDDLE_CHECK(positions != Hip::kRelative, kArgument, "positions",
                 "positions must not be relative: there are no halves to attend");
    HEDDLE_CHECK(positions < Hip::kSelfExtend || context >= 4, kArgument, "context",
                 "context must be at least 4 where positions are compressed, got ", context);
  }
};

}  // namespace heddle
