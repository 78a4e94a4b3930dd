#pragma once
#include "attention/forward_sm90.h"

namespace heddle {

// Rows of k or v of one head and sequence that stand in pages, of a kernel whose arguments have the
// table
template <class Args, class Element> struct PageRows {
  const Args& args;
  int sequence;
  const Element* first;  // of the head in page 0
  const Strides& strides;

  __device__ __forceinline__ int page(int key) const {
    return args
        .block_table[sequence * args.table_row + (key >> args.page_log2) * args.table_column];
  }
  __device__ __forceinline__ int row(int key) const { return key & ((1 << args.page_log2) - 1); }
  // one of them, whatever the table says
  __device__ __forceinline__ int page_inside(int key) const {
    return min(max(page(key), 0), args.pages - 1);
  }
  __device__ __forceinline__ const Element* operator()(int key) const {
    return first + page_inside(key) * strides.batch + row(key) * strides.row;
  }
};

}  // namespace heddle
