#include "attention_check.h"

// What programs of attention have in common, so that it is compiled once
namespace heddle {
template double check<DType::kF16>(const Case&, int64_t, int64_t, emulator::Random&, const Run&);
template double check<DType::kBF16>(const Case&, int64_t, int64_t, emulator::Random&, const Run&);
template double check<DType::kE4M3, DType::kF16>(const Case&, int64_t, int64_t, emulator::Random&,
                                                 const Run&);
template double check<DType::kE4M3, DType::kBF16>(const Case&, int64_t, int64_t, emulator::Random&,
                                                  const Run&);
}  // namespace heddle
