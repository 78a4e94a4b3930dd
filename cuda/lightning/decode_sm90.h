#pragma once
#include "lightning/decode_call.h"

namespace heddle {

// Why it cannot take a call, or null
const char* declines_decode_sm90(const DecodeCall& call);
void decode_sm90(const DecodeCall& call, cudaStream_t stream);

}  // namespace heddle
