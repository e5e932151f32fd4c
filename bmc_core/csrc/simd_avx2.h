// Sixteen float lanes as two AVX registers (AVX2, FMA and F16C).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "fp8_table.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

struct F32x16 {
  __m256 lo, hi;
};

inline F32x16 set1(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline F32x16 add(F32x16 a, F32x16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F32x16 sub(F32x16 a, F32x16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F32x16 mul(F32x16 a, F32x16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F32x16 div(F32x16 a, F32x16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {  // a * b + c
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32x16 max(F32x16 a, F32x16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
inline F32x16 iota() {
  return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15)};
}
// Lanes outside [lo, hi) become fill.
inline F32x16 keep_lanes(F32x16 a, int lo, int hi, float fill) {
  const F32x16 lane = iota();
  const __m256 first = _mm256_set1_ps(static_cast<float>(lo));
  const __m256 end = _mm256_set1_ps(static_cast<float>(hi));
  const __m256 f = _mm256_set1_ps(fill);
  const __m256 keep_lo = _mm256_and_ps(_mm256_cmp_ps(lane.lo, first, _CMP_GE_OQ),
                                       _mm256_cmp_ps(lane.lo, end, _CMP_LT_OQ));
  const __m256 keep_hi = _mm256_and_ps(_mm256_cmp_ps(lane.hi, first, _CMP_GE_OQ),
                                       _mm256_cmp_ps(lane.hi, end, _CMP_LT_OQ));
  return {_mm256_blendv_ps(f, a.lo, keep_lo), _mm256_blendv_ps(f, a.hi, keep_hi)};
}
inline float reduce_max(F32x16 a) {
  const __m256 m = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float reduce_add(F32x16 a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
// max(x, -126), NaN for NaN: where 2^x is still a normal number.
inline F32x16 normal_exponent(F32x16 x) { return max(set1(-126.f), x); }
// x - floor(x) for x of at least -126.
inline F32x16 fraction(F32x16 x) {
  const F32x16 c = normal_exponent(x);
  return {_mm256_sub_ps(c.lo, _mm256_floor_ps(c.lo)), _mm256_sub_ps(c.hi, _mm256_floor_ps(c.hi))};
}
inline __m256 add_exponent(__m256 a, __m256 c, __m256 x) {
  const __m256i n = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(c)), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), n));
  // 0 where x is below the range; a NaN in x keeps the NaN that a is then.
  return _mm256_and_ps(scaled, _mm256_cmp_ps(x, _mm256_set1_ps(-126.f), _CMP_NLT_UQ));
}
// a * 2^floor(x) for a in [1, 2], 0 for x below -126.
inline F32x16 scale_by_floor_power(F32x16 a, F32x16 x) {
  const F32x16 c = normal_exponent(x);
  return {add_exponent(a.lo, c.lo, x.lo), add_exponent(a.hi, c.hi, x.hi)};
}
inline __m128i load_i128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline F32x16 load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_i128(p)), _mm256_cvtph_ps(load_i128(p + 8))};
}
inline void store_half(uint16_t* p, F32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8),
                   _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256 widen_bfloat(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline F32x16 load_bfloat(const uint16_t* p) {
  return {widen_bfloat(load_i128(p)), widen_bfloat(load_i128(p + 8))};
}
// Round to nearest, ties to even; NaN stays NaN.
inline __m256i bfloat_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}
inline void store_bfloat(uint16_t* p, F32x16 a) {
  const __m256i packed =
      _mm256_permute4x64_epi64(_mm256_packus_epi32(bfloat_bits(a.lo), bfloat_bits(a.hi)), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
// Sixteen bfloat16 pairs [16][2] as two vectors: the firsts and the seconds of each pair.
inline void load_bfloat_pairs(const uint16_t* p, F32x16* first, F32x16* second) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256i lo = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i hi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  first->lo = _mm256_castsi256_ps(_mm256_slli_epi32(lo, 16));
  first->hi = _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16));
  second->lo = _mm256_castsi256_ps(_mm256_and_si256(lo, high));
  second->hi = _mm256_castsi256_ps(_mm256_and_si256(hi, high));
}

// As in simd_avx512.h.
constexpr bool kFp8ByHalf = true;
template <class Format>
inline F32x16 upper_bytes_to_float(__m256i codes) {
  if constexpr (Format::kMantissaBits == 3) {
    // seeeemmm -> s0eeeemmm0000000
    codes = _mm256_and_si256(_mm256_srai_epi16(codes, 1),
                             _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
  }
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(codes)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(codes, 1))};
}
template <class Format>
inline void load_fp8_pairs(const uint8_t* p, F32x16* first, F32x16* second) {
  __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *first = upper_bytes_to_float<Format>(_mm256_slli_epi16(pairs, 8));
  if constexpr (Format::kMantissaBits == 2) {
    pairs = _mm256_and_si256(pairs, _mm256_set1_epi16(static_cast<int16_t>(0xff00)));
  }
  *second = upper_bytes_to_float<Format>(pairs);
}
inline bool has_e4m3_nan(const uint8_t* p, int count) {
  __m256i most_signed = _mm256_setzero_si256(), most = _mm256_setzero_si256();
  for (int i = 0; i < count; i += 32) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
    most_signed = _mm256_max_epi8(most_signed, codes);
    most = _mm256_max_epu8(most, codes);
  }
  const __m256i found = _mm256_or_si256(_mm256_cmpeq_epi8(most_signed, _mm256_set1_epi8(0x7f)),
                                        _mm256_cmpeq_epi8(most, _mm256_set1_epi8(-1)));
  return _mm256_movemask_epi8(found) != 0;
}
// 32 fp8 codes as bfloat16, in order.
template <class Format>
inline void unpack_fp8(const uint8_t* from, uint16_t* to) {
  if (Format::kHalfUnit != 1.f && has_e4m3_nan(from, 32)) {
    return unpack_fp8_by_table<Format>(from, to);
  }
  F32x16 first, second;
  load_fp8_pairs<Format>(from, &first, &second);
  first = mul(first, set1(Format::kHalfUnit));
  second = mul(second, set1(Format::kHalfUnit));
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const auto pairs = [high](__m256 a, __m256 b) {  // every fp8 value is a bfloat16 value
    return _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(a), 16),
                           _mm256_and_si256(_mm256_castps_si256(b), high));
  };
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pairs(first.lo, second.lo));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), pairs(first.hi, second.hi));
}

// Register blocking: query rows x vectors of one product; 16 registers, two of them a vector here.
constexpr int kRowBlock = 4;
constexpr int kScoreTiles = 1;
constexpr int kValueVectors = 1;

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
