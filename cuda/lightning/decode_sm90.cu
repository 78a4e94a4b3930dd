#include "lightning/decode_sm90.cuh"

namespace heddle {

const char* declines_decode_sm90(const DecodeCall& call) {
  if (call.d > kDecodeSize || call.e > kDecodeSize) return "d and e must be at most 128";
  if (!call.vectors) return "states must be aligned to 16 bytes and their rows a multiple of it";
  const int64_t tasks = call.batch * call.heads_state;
  // a CTA for half a state is sooner done than one for all of it
  if (tasks < 2 * call.processors) return "there must be two states per multiprocessor or more";
  return tasks < INT32_MAX / 2 ? nullptr : "q has too many rows";
}

void decode_sm90(const DecodeCall& call, cudaStream_t stream) {
  const auto pick = [&]<DType kType>() {
    call.transposed ? launch_decode_sm90<kType, true>(call, stream)
                    : launch_decode_sm90<kType, false>(call, stream);
  };
  switch (call.dtype) {
    case DType::kF32:
      return pick.template operator()<DType::kF32>();
    case DType::kF16:
      return pick.template operator()<DType::kF16>();
    default:
      return pick.template operator()<DType::kBF16>();
  }
}

}  // namespace heddle
