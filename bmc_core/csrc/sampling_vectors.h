// What sampling needs beyond the arithmetic of simd_*.h: comparisons of sixteen lanes, packing of
// the lanes that pass, and the noise of sixteen tokens. A mask's bit i is lane i.
#pragma once

#include <cstdint>
#include <cstring>

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

// SplitMix64 (Steele, Lea and Flood 2014): a row's key is the mix of its seed, a token's noise the
// mix of the key plus (token + 1) steps.
constexpr uint64_t kMixStep = 0x9e3779b97f4a7c15u;
constexpr uint64_t kMixFirst = 0xbf58476d1ce4e5b9u, kMixSecond = 0x94d049bb133111ebu;

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * kMixFirst;
  z = (z ^ (z >> 27)) * kMixSecond;
  return z ^ (z >> 31);
}

inline uint64_t noise_of(uint64_t key, int64_t token) {
  return mix(key + static_cast<uint64_t>(token + 1) * kMixStep);
}

#if defined(__AVX512F__)

inline uint32_t at_least(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline uint32_t below(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline uint32_t equal(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
// sum + weight in the lanes where value is at least pivot
inline F32x16 add_at_least(F32x16 sum, F32x16 weight, F32x16 value, F32x16 pivot) {
  const __mmask16 lanes = _mm512_cmp_ps_mask(value.v, pivot.v, _CMP_GE_OQ);
  return {_mm512_mask_add_ps(sum.v, lanes, sum.v, weight.v)};
}
// value in the lanes where it is at least pivot, otherwise `other`
inline F32x16 keep_at_least(F32x16 value, F32x16 pivot, F32x16 other) {
  const __mmask16 lanes = _mm512_cmp_ps_mask(value.v, pivot.v, _CMP_GE_OQ);
  return {_mm512_mask_mov_ps(other.v, lanes, value.v)};
}
// Writes the lanes of `mask` side by side, and up to 16 floats in all; returns how many there are.
inline int pack_lanes(float* out, F32x16 a, uint32_t mask) {
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), a.v));
  return __builtin_popcount(mask);
}
inline __m512i mix8(__m512i z) {
  z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)),
                         _mm512_set1_epi64(static_cast<int64_t>(kMixFirst)));
  z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)),
                         _mm512_set1_epi64(static_cast<int64_t>(kMixSecond)));
  return _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
}
// Tokens token ... token + 15 whose noise is at least `least`.
inline uint32_t noise_at_least(uint64_t key, int64_t token, uint64_t least) {
  constexpr int64_t step = static_cast<int64_t>(kMixStep);
  const __m512i steps =
      _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(step));
  const uint64_t first = key + static_cast<uint64_t>(token + 1) * kMixStep;
  const __m512i lo = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), steps);
  const __m512i hi = _mm512_add_epi64(lo, _mm512_set1_epi64(static_cast<int64_t>(8 * kMixStep)));
  const __m512i bound = _mm512_set1_epi64(static_cast<int64_t>(least));
  const uint32_t low = _mm512_cmpge_epu64_mask(mix8(lo), bound);
  return low | static_cast<uint32_t>(_mm512_cmpge_epu64_mask(mix8(hi), bound)) << 8;
}

#else

#if defined(__AVX2__)

template <int kCompare>
inline uint32_t compare(F32x16 a, F32x16 b) {
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, kCompare));
  return static_cast<uint32_t>(lo | _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, kCompare)) << 8);
}
inline uint32_t at_least(F32x16 a, F32x16 b) { return compare<_CMP_GE_OQ>(a, b); }
inline uint32_t below(F32x16 a, F32x16 b) { return compare<_CMP_LT_OQ>(a, b); }
inline uint32_t equal(F32x16 a, F32x16 b) { return compare<_CMP_EQ_OQ>(a, b); }
inline F32x16 add_at_least(F32x16 sum, F32x16 weight, F32x16 value, F32x16 pivot) {
  const __m256 lo = _mm256_cmp_ps(value.lo, pivot.lo, _CMP_GE_OQ);
  const __m256 hi = _mm256_cmp_ps(value.hi, pivot.hi, _CMP_GE_OQ);
  return {_mm256_add_ps(sum.lo, _mm256_and_ps(lo, weight.lo)),
          _mm256_add_ps(sum.hi, _mm256_and_ps(hi, weight.hi))};
}
inline F32x16 keep_at_least(F32x16 value, F32x16 pivot, F32x16 other) {
  const __m256 lo = _mm256_cmp_ps(value.lo, pivot.lo, _CMP_GE_OQ);
  const __m256 hi = _mm256_cmp_ps(value.hi, pivot.hi, _CMP_GE_OQ);
  return {_mm256_blendv_ps(other.lo, value.lo, lo), _mm256_blendv_ps(other.hi, value.hi, hi)};
}

#else

template <class Compare>
inline uint32_t compare(F32x16 a, F32x16 b, Compare holds) {
  float x[16], y[16];
  store(x, a);
  store(y, b);
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(holds(x[i], y[i])) << i;
  return mask;
}
inline uint32_t at_least(F32x16 a, F32x16 b) {
  return compare(a, b, [](float x, float y) { return x >= y; });
}
inline uint32_t below(F32x16 a, F32x16 b) {
  return compare(a, b, [](float x, float y) { return x < y; });
}
inline uint32_t equal(F32x16 a, F32x16 b) {
  return compare(a, b, [](float x, float y) { return x == y; });
}
inline F32x16 add_at_least(F32x16 sum, F32x16 weight, F32x16 value, F32x16 pivot) {
  const Float4 zero = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i) sum.v[i] += value.v[i] >= pivot.v[i] ? weight.v[i] : zero;
  return sum;
}
inline F32x16 keep_at_least(F32x16 value, F32x16 pivot, F32x16 other) {
  for (int i = 0; i < 4; ++i) value.v[i] = value.v[i] >= pivot.v[i] ? value.v[i] : other.v[i];
  return value;
}

#endif

inline int pack_lanes(float* out, F32x16 a, uint32_t mask) {
  float lanes[16];
  store(lanes, a);
  int count = 0;
  for (; mask != 0; mask &= mask - 1) out[count++] = lanes[__builtin_ctz(mask)];
  return count;
}
inline uint32_t noise_at_least(uint64_t key, int64_t token, uint64_t least) {
  uint64_t next = key + static_cast<uint64_t>(token + 1) * kMixStep;
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i, next += kMixStep)
    mask |= static_cast<uint32_t>(mix(next) >= least) << i;
  return mask;
}

#endif

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
