// Sixteen float lanes as one AVX-512 register (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "fp8.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

struct F32x16 {
  __m512 v;
};

inline F32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
// Lanes outside [lo, hi) become fill.
inline F32x16 keep_lanes(F32x16 a, int lo, int hi, float fill) {
  const uint32_t below_hi = hi >= 16 ? 0xffffu : hi <= 0 ? 0u : (1u << hi) - 1u;
  const uint32_t below_lo = lo >= 16 ? 0xffffu : lo <= 0 ? 0u : (1u << lo) - 1u;
  return {
      _mm512_mask_mov_ps(_mm512_set1_ps(fill), static_cast<__mmask16>(below_hi & ~below_lo), a.v)};
}
inline F32x16 iota() {
  return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
inline float reduce_max(F32x16 a) { return _mm512_reduce_max_ps(a.v); }
inline float reduce_add(F32x16 a) { return _mm512_reduce_add_ps(a.v); }
// x - floor(x); 0 for an infinite x.
inline F32x16 fraction(F32x16 x) {
  return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
// a * 2^floor(x), 0 where that is too small.
inline F32x16 scale_by_floor_power(F32x16 a, F32x16 x) { return {_mm512_scalef_ps(a.v, x.v)}; }
inline __m256i load_i256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline F32x16 load_half(const uint16_t* p) { return {_mm512_cvtph_ps(load_i256(p))}; }
inline void store_half(uint16_t* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F32x16 load_bfloat(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_i256(p)), 16))};
}
inline void store_bfloat(uint16_t* p, F32x16 a) {
#ifdef __AVX512BF16__
  // vcvtneps2bf16 treats subnormals as zero: below 2^-126, far under any tolerance.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet)));
#endif
}
// Sixteen bfloat16 pairs [16][2] as two vectors: the firsts and the seconds of each pair.
inline void load_bfloat_pairs(const uint16_t* p, F32x16* first, F32x16* second) {
  const __m512i pairs = _mm512_loadu_si512(p);
  first->v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  second->v = _mm512_castsi512_ps(
      _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// 32 fp8 codes as bfloat16, in order. A normal code is shifted and its exponent moved; the few
// others (NaN, infinity, zero, subnormals) are neighbors modulo 128 and come from a table.
template <class Format>
inline __m512i fp8_to_bfloat(const uint8_t* p) {
  const __m512i code = _mm512_cvtepu8_epi16(load_i256(p));
  const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
  const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 7 - Format::kMantissaBits),
                                          _mm512_set1_epi16((127 - Format::kBias) << 7));
  const __m512i place = _mm512_and_si512(
      _mm512_add_epi16(code, _mm512_set1_epi16(Format::kNonFinite)), _mm512_set1_epi16(0x7f));
  const __mmask32 special =
      _mm512_cmplt_epu16_mask(place, _mm512_set1_epi16(kSpecial<Format>.kCount));
  const __m512i value = _mm512_mask_permutexvar_epi16(normal, special, place,
                                                      _mm512_load_si512(kSpecial<Format>.bits));
  // value | (sign bit of the code in the top bit)
  return _mm512_ternarylogic_epi32(value, _mm512_slli_epi16(code, 8),
                                   _mm512_set1_epi16(static_cast<int16_t>(0x8000)), 0xf8);
}
template <class Format>
inline void unpack_fp8(const uint8_t* from, uint16_t* to) {
  _mm512_storeu_si512(to, fp8_to_bfloat<Format>(from));
}
// Sixteen fp8 pairs [16][2] as two vectors: the firsts and the seconds of each pair, in units of
// Format::kHalfUnit. Subnormals come right; the NaN of e4m3 does not (see has_e4m3_nan).
constexpr bool kFp8ByHalf = true;
template <class Format>
inline __m512 upper_bytes_to_float(__m256i codes) {
  if constexpr (Format::kMantissaBits == 3) {
    // seeeemmm -> s0eeeemmm0000000
    codes = _mm256_and_si256(_mm256_srai_epi16(codes, 1),
                             _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
  }
  return _mm512_cvtph_ps(codes);
}
template <class Format>
inline void load_fp8_pairs(const uint8_t* p, F32x16* first, F32x16* second) {
  __m256i pairs = load_i256(p);
  first->v = upper_bytes_to_float<Format>(_mm256_slli_epi16(pairs, 8));
  if constexpr (Format::kMantissaBits == 2) {
    pairs = _mm256_and_si256(pairs, _mm256_set1_epi16(static_cast<int16_t>(0xff00)));
  }
  second->v = upper_bytes_to_float<Format>(pairs);
}
inline bool has_e4m3_nan(const uint8_t* p, int count) {
  __m512i most_signed = _mm512_setzero_si512(), most = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 64) {
    const __m512i codes = _mm512_loadu_si512(p + i);
    most_signed = _mm512_max_epi8(most_signed, codes);
    most = _mm512_max_epu8(most, codes);
  }
  return (_mm512_cmpeq_epi8_mask(most_signed, _mm512_set1_epi8(0x7f)) |
          _mm512_cmpeq_epi8_mask(most, _mm512_set1_epi8(-1))) != 0;
}

#ifdef __AVX512BF16__
// Sixteen bfloat16 pairs [16][2], and products of them.
#define BMC_BFLOAT_PAIRS
using BFloatPairs = __m512i;
inline BFloatPairs load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }
inline BFloatPairs broadcast_pair(const uint16_t* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return _mm512_set1_epi32(pair);
}
// acc += a[.][0] * b[.][0] + a[.][1] * b[.][1]
inline void dot_pairs(F32x16& acc, BFloatPairs a, BFloatPairs b) {
  acc.v = _mm512_dpbf16_ps(acc.v, (__m512bh)a, (__m512bh)b);
}
#endif

// Register blocking: query rows x vectors of one product, 24 of the 32 registers as accumulators.
constexpr int kRowBlock = 6;
constexpr int kScoreTiles = 4;
constexpr int kValueVectors = 4;

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
