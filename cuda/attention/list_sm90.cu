#include "attention/list_sm90.cuh"

namespace heddle {

void list_units_sm90(const ForwardCall& call, int64_t count, cudaStream_t stream) {
  launch_list_sm90(call, count, stream);
}

}  // namespace heddle
