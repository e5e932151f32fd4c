// fp8 decoded by table, one code at a time: for instruction sets without a table lookup in
// registers. Stands on the vector type of a simd_*.h.
#pragma once

#include <cstdint>

#include "fp8.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

// 32 fp8 codes as bfloat16, in order.
template <class Format>
inline void unpack_fp8(const uint8_t* from, uint16_t* to) {
  for (int i = 0; i < 32; ++i) {
    to[i] = static_cast<uint16_t>(kDecode<Format>.bits[from[i] & 0x7f] | (from[i] & 0x80) << 8);
  }
}
// Sixteen fp8 pairs [16][2] as two vectors: the firsts and the seconds of each pair.
template <class Format>
inline void load_fp8_pairs(const uint8_t* p, F32x16* first, F32x16* second) {
  uint16_t pairs[32];
  unpack_fp8<Format>(p, pairs);
  load_bfloat_pairs(pairs, first, second);
}

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
