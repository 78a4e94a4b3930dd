#pragma once
#include "core/schema.h"

namespace heddle {

// Slots near the kernels that hold some of the pages of k and v, which stand far away. Pages that
// are wanted and have no slot get one, and are copied. Slots lie in a circle: the next is taken
// whose page has not been wanted for more than `patience` calls. Where there is none, the page goes
// without.
struct Fetch {
  static constexpr const char* kName = "fetch";
  enum Count { kFound, kMissed, kTime, kNext };
  Tensor k;       // [pages, page_size, hk, d]
  Tensor v;       // [pages, page_size, hk, dv]
  Tensor wanted;  // [n] i32: pages; of one that stands there twice the second time has no `found`
  Tensor length;  // [1] i32: how many rows these are, which may be more than stand there
  Tensor near_k;  // [slots, page_size, hk, d]
  Tensor near_v;  // [slots, page_size, hk, dv]
  Tensor places;  // [most_pages] i32: the slot of a page, -1 if it has none
  Tensor slots;   // [slots, 2] i32: the page in it, -1 for none, and when it was wanted last
  Tensor counts;  // [4] i64: wanted pages that were there, and were not; calls; slots looked at
  Tensor found;   // [n] i32: slots of the wanted pages, -1 for one that goes without, then 0
  int64_t patience = 0;

  template <class Schema> static void describe(Schema& schema) {
    schema.input("k", &Fetch::k, "pages page_size hk d", kFloats);
    schema.optional("v", &Fetch::v, "pages page_size hk dv", like("k"));
    schema.input("wanted", &Fetch::wanted, "n", kI32);
    schema.input("length", &Fetch::length, "1", kI32);
    schema.inout("near_k", &Fetch::near_k, "slots page_size hk d", like("k"));
    schema.inout("near_v", &Fetch::near_v, "slots page_size hk dv", like("k")).only_if("v");
    schema.inout("places", &Fetch::places, "most_pages", kI32);
    schema.inout("slots", &Fetch::slots, "slots 2", kI32);
    schema.inout("counts", &Fetch::counts, "4", DTypes{1u << int(DType::kI64)});
    schema.output("found", &Fetch::found, "n", kI32);
    schema.integer("patience", &Fetch::patience, 0).at_least(0);
  }

  // Bytes of a page of k or v
  static int64_t page_bytes(const Tensor& x) {
    return x.shape[1] * x.shape[2] * x.shape[3] * static_cast<int64_t>(size_of(x.dtype));
  }

  void validate() const {
    HEDDLE_CHECK(k.shape[1] > 0, kShape, "k", "k must have pages of at least one row");
    HEDDLE_CHECK(bool(v) == bool(near_v), kArgument, "v", "v and nearV must be given together");
    HEDDLE_CHECK(places.shape[0] >= k.shape[0], kShape, "places", "places must be of ", k.shape[0],
                 " pages at least, got ", places.shape[0]);
    for (const Tensor* tensor : {&k, &v, &wanted, &near_k, &near_v, &places, &slots, &counts})
      HEDDLE_CHECK(!*tensor || tensor->contiguous(), kShape, "k", "all must be contiguous");
  }
};

}  // namespace heddle
