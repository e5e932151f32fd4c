// fp8 decoded by table, one code at a time: where registers cannot do it.
#pragma once

#include <cstdint>

#include "fp8.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

// 32 fp8 codes as bfloat16, in order.
template <class Format>
inline void unpack_fp8_by_table(const uint8_t* from, uint16_t* to) {
  for (int i = 0; i < 32; ++i) {
    to[i] = static_cast<uint16_t>(kDecode<Format>.bits[from[i] & 0x7f] | (from[i] & 0x80) << 8);
  }
}

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
