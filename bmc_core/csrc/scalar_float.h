// Scalar conversions of 16-bit floats, for where there is no instruction for them.
#pragma once

#include <cstdint>
#include <cstring>

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu, bits;
  if (exponent == 0x1fu) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
  } else {  // zero and subnormals: mantissa * 2^-24
    float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
    memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

inline float bfloat_to_float(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
