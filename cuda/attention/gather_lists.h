#pragma once
#include <cstdint>

namespace heddle {

// Lists of short blocks, as first keys of them
struct GatherLists {
  const int32_t *index, *count;  // [b, lists, rows, width], [b, lists, rows]
  int64_t lists, rows, width;
};

}  // namespace heddle
