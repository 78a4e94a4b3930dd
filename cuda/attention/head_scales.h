#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace heddle {

// What numbers of float8 are multiplied by in each head; 1 where there is nothing
struct HeadScales {
  const float *q, *k, *v;  // [hq], [hk] and [hk] or null
  int64_t q_stride, k_stride, v_stride;

  HEDDLE_HD float score(int64_t head, int64_t kv_head) const {
    return (q ? q[head * q_stride] : 1) * (k ? k[kv_head * k_stride] : 1);
  }
  HEDDLE_HD float value(int64_t kv_head) const { return v ? v[kv_head * v_stride] : 1; }
};

}  // namespace heddle
