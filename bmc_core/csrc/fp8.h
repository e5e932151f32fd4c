// The two 8-bit floating point formats of a quantized KV cache, and their codes as bfloat16.
//
// Every value of both formats is a bfloat16 value, so decoding is a table of 128 entries and a
// sign. This header holds plain data and constant evaluation only (see attention.h).
#pragma once

#include <cstdint>

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

struct E4M3 {  // e4m3fn: no infinity, one NaN code
  static constexpr int kMantissaBits = 3, kBias = 7;
  static constexpr int kNonFinite = 1;       // codes from 0x80 - kNonFinite on
  static constexpr float kHalfUnit = 256.f;  // a code's bits in a half's places are 1/256 of it
  static constexpr bool is_nan(int code) { return code == 0x7f; }
  static constexpr bool is_infinite(int) { return false; }
};

struct E5M2 {
  static constexpr int kMantissaBits = 2, kBias = 15;
  static constexpr int kNonFinite = 4;
  static constexpr float kHalfUnit = 1.f;  // the upper byte of a half
  static constexpr bool is_nan(int code) { return code > 0x7c; }
  static constexpr bool is_infinite(int code) { return code == 0x7c; }
};

// bfloat16 bits of the codes 0 to 127; the other half differs in the sign.
template <class Format>
struct DecodeTable {
  alignas(64) uint16_t bits[128];

  constexpr DecodeTable() : bits() {
    for (int code = 0; code < 128; ++code) bits[code] = decode(code);
  }

  static constexpr uint16_t decode(int code) {
    if (Format::is_nan(code)) return 0x7fc0;
    if (Format::is_infinite(code)) return 0x7f80;
    int exponent = code >> Format::kMantissaBits;
    int mantissa = code & ((1 << Format::kMantissaBits) - 1);
    if (exponent == 0) {
      if (mantissa == 0) return 0;
      exponent = 1;  // subnormal: shift the leading one into place
      while ((mantissa >> Format::kMantissaBits) == 0) {
        mantissa <<= 1;
        --exponent;
      }
      mantissa &= (1 << Format::kMantissaBits) - 1;
    }
    return static_cast<uint16_t>(((exponent - Format::kBias + 127) << 7) |
                                 (mantissa << (7 - Format::kMantissaBits)));
  }
};

template <class Format>
constexpr DecodeTable<Format> kDecode{};

// bfloat16 bits of the codes that are not normal numbers: the non-finite ones, which come last,
// then zero and the subnormal ones, which come first. Entry (code + kNonFinite) % 128.
template <class Format>
struct SpecialTable {
  static constexpr int kCount = Format::kNonFinite + (1 << Format::kMantissaBits);
  alignas(64) uint16_t bits[32];

  constexpr SpecialTable() : bits() {
    for (int i = 0; i < kCount; ++i) {
      bits[i] = DecodeTable<Format>::decode((i - Format::kNonFinite) & 0x7f);
    }
  }
};

template <class Format>
constexpr SpecialTable<Format> kSpecial{};

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
