// Sixteen float lanes on any machine: four 16-byte vectors, which the compiler maps to SSE2, NEON,
// ...
#pragma once

#include <cstdint>
#include <cstring>

#include "fp8_table.h"
#include "scalar_float.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct F32x16 {
  Float4 v[4];
};

#define BMC_EACH4 for (int i = 0; i < 4; ++i)

inline F32x16 set1(float x) {
  F32x16 r;
  BMC_EACH4 r.v[i] = Float4{x, x, x, x};
  return r;
}
inline F32x16 load(const float* p) {
  F32x16 r;
  memcpy(&r, p, sizeof(r));
  return r;
}
inline void store(float* p, F32x16 a) { memcpy(p, &a, sizeof(a)); }
inline F32x16 add(F32x16 a, F32x16 b) {
  BMC_EACH4 a.v[i] += b.v[i];
  return a;
}
inline F32x16 sub(F32x16 a, F32x16 b) {
  BMC_EACH4 a.v[i] -= b.v[i];
  return a;
}
inline F32x16 mul(F32x16 a, F32x16 b) {
  BMC_EACH4 a.v[i] *= b.v[i];
  return a;
}
inline F32x16 div(F32x16 a, F32x16 b) {
  BMC_EACH4 a.v[i] /= b.v[i];
  return a;
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {  // a * b + c
  BMC_EACH4 c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline F32x16 max(F32x16 a, F32x16 b) {
  BMC_EACH4 a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline F32x16 min(F32x16 a, F32x16 b) {
  BMC_EACH4 a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
// Lanes outside [lo, hi) become fill.
inline F32x16 keep_lanes(F32x16 a, int lo, int hi, float fill) {
  BMC_EACH4 for (int j = 0; j < 4; ++j) {
    const int lane = i * 4 + j;
    if (lane < lo || lane >= hi) a.v[i][j] = fill;
  }
  return a;
}
inline F32x16 iota() {
  F32x16 r;
  BMC_EACH4 for (int j = 0; j < 4; ++j) r.v[i][j] = static_cast<float>(i * 4 + j);
  return r;
}
inline float reduce_max(F32x16 a) {
  float r = a.v[0][0];
  BMC_EACH4 for (int j = 0; j < 4; ++j) r = a.v[i][j] > r ? a.v[i][j] : r;
  return r;
}
inline float reduce_add(F32x16 a) {
  const Float4 s = (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]);
  return (s[0] + s[1]) + (s[2] + s[3]);
}
// floor(max(x, -126)); anything for NaN.
inline Int4 floor_exponent(Float4 x) {
  const Float4 least = {-126.f, -126.f, -126.f, -126.f};
  const Float4 c = x > least ? x : least;  // not x for NaN: its conversion would be undefined
  const Int4 truncated = __builtin_convertvector(c, Int4);
  return truncated + (__builtin_convertvector(truncated, Float4) > c);  // a true lane is -1
}
// x - floor(x) for x of at least -126; NaN for NaN.
inline F32x16 fraction(F32x16 x) {
  const Float4 least = {-126.f, -126.f, -126.f, -126.f};
  BMC_EACH4 {
    const Float4 floor = __builtin_convertvector(floor_exponent(x.v[i]), Float4);
    const Float4 c = x.v[i] < least ? least : x.v[i];
    x.v[i] = c - floor;
  }
  return x;
}
// a * 2^floor(x) for a in [1, 2], 0 for x below -126; NaN where a is NaN.
inline F32x16 scale_by_floor_power(F32x16 a, F32x16 x) {
  const Float4 least = {-126.f, -126.f, -126.f, -126.f}, zero = {0, 0, 0, 0};
  BMC_EACH4 {
    const Float4 scaled = (Float4)((Int4)a.v[i] + (floor_exponent(x.v[i]) << 23));
    a.v[i] = x.v[i] == x.v[i] ? (x.v[i] < least ? zero : scaled) : x.v[i];
  }
  return a;
}

// Round to nearest, ties to even.
inline uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (bits < 0x38800000u) {                        // subnormal half: let the FPU round
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    volatile float shifted = magnitude + 0.5f;  // 0.5f's ulp is 2^-24, half's smallest step
    float rounded = shifted;
    uint32_t out;
    memcpy(&out, &rounded, 4);
    return sign | static_cast<uint16_t>(out - 0x3f000000u);
  }
  const uint32_t odd = (bits >> 13) & 1u;
  return sign | static_cast<uint16_t>((bits - 0x38000000u + 0xfffu + odd) >> 13);
}
inline uint16_t float_to_bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline F32x16 load_half(const uint16_t* p) {
  float t[16];
  for (int i = 0; i < 16; ++i) t[i] = half_to_float(p[i]);
  return load(t);
}
inline void store_half(uint16_t* p, F32x16 a) {
  float t[16];
  store(t, a);
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(t[i]);
}
inline F32x16 load_bfloat(const uint16_t* p) {
  uint32_t t[16];
  for (int i = 0; i < 16; ++i) t[i] = static_cast<uint32_t>(p[i]) << 16;
  F32x16 r;
  memcpy(&r, t, sizeof(r));
  return r;
}
inline void store_bfloat(uint16_t* p, F32x16 a) {
  float t[16];
  store(t, a);
  for (int i = 0; i < 16; ++i) p[i] = float_to_bfloat(t[i]);
}
// Sixteen bfloat16 pairs [16][2] as two vectors: the firsts and the seconds of each pair.
inline void load_bfloat_pairs(const uint16_t* p, F32x16* first, F32x16* second) {
  const Int4 high = {-65536, -65536, -65536, -65536};
  BMC_EACH4 {
    Int4 pair;
    memcpy(&pair, p + 8 * i, sizeof(pair));
    first->v[i] = (Float4)(pair << 16);
    second->v[i] = (Float4)(pair & high);
  }
}

// 32 fp8 codes as bfloat16, in order.
template <class Format>
inline void unpack_fp8(const uint8_t* from, uint16_t* to) {
  unpack_fp8_by_table<Format>(from, to);
}
// Sixteen fp8 pairs [16][2] as two vectors: the firsts and the seconds of each pair.
constexpr bool kFp8ByHalf = false;
template <class Format>
inline void load_fp8_pairs(const uint8_t* p, F32x16* first, F32x16* second) {
  uint16_t pairs[32];
  unpack_fp8<Format>(p, pairs);
  load_bfloat_pairs(pairs, first, second);
}
inline bool has_e4m3_nan(const uint8_t*, int) { return false; }  // decoded like any other code

#undef BMC_EACH4

// Register blocking: query rows x vectors of one product.
constexpr int kRowBlock = 2;
constexpr int kScoreTiles = 1;
constexpr int kValueVectors = 2;

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
