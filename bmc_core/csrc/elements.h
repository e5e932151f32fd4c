// What one cache element is and how a product over it is accumulated, per dtype.
//
//   Storage    the type in the cache, the query and the output
//   Arith      the type that the left operand (query, probabilities) is packed to
//   kPack      P of the cache layout: how many products one `dot` adds to each lane
//   Right      one vector load of the cache: 16 lanes x kPack
//   kExpDegree degree of the exponential's polynomial: as exact as the probabilities are stored
//   Left       kPack values of the left operand, broadcast to all lanes
#pragma once

#include "attention.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

struct Float32 {
  static constexpr int kExpDegree = 5;
  using Storage = float;
  using Arith = float;
  using Right = F32x16;
  using Left = F32x16;
  static constexpr int kPack = 1;
  static Right right(const Storage* p) { return load(p); }
  static Left left(const Arith* p) { return set1(*p); }
  static void dot(F32x16& acc, Left a, Right b) { acc = fma(a, b, acc); }
  static void pack(Arith* dst, F32x16 x) { store(dst, x); }
  static F32x16 widen(const Storage* p) { return load(p); }
  static void narrow(Storage* p, F32x16 x) { store(p, x); }
};

struct Float16 {
  static constexpr int kExpDegree = 5;
  using Storage = uint16_t;
  using Arith = float;
  using Right = F32x16;
  using Left = F32x16;
  static constexpr int kPack = 1;
  static Right right(const Storage* p) { return load_half(p); }
  static Left left(const Arith* p) { return set1(*p); }
  static void dot(F32x16& acc, Left a, Right b) { acc = fma(a, b, acc); }
  static void pack(Arith* dst, F32x16 x) { store(dst, x); }
  static F32x16 widen(const Storage* p) { return load_half(p); }
  static void narrow(Storage* p, F32x16 x) { store_half(p, x); }
};

#ifdef __AVX512BF16__
struct BFloat16 {
  static constexpr int kExpDegree = 4;
  using Storage = uint16_t;
  using Arith = uint16_t;  // probabilities are rounded to bfloat16, sums stay in float32
  using Right = __m512i;
  using Left = __m512i;
  static constexpr int kPack = 2;
  static Right right(const Storage* p) { return _mm512_loadu_si512(p); }
  static Left left(const Arith* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  static void dot(F32x16& acc, Left a, Right b) {
    acc.v = _mm512_dpbf16_ps(acc.v, (__m512bh)a, (__m512bh)b);
  }
  static void pack(Arith* dst, F32x16 x) { store_bfloat(dst, x); }
  static F32x16 widen(const Storage* p) { return load_bfloat(p); }
  static void narrow(Storage* p, F32x16 x) { store_bfloat(p, x); }
};
#else
struct BFloat16 {
  struct Pair {
    F32x16 first, second;
  };
  static constexpr int kExpDegree = 5;
  using Storage = uint16_t;
  using Arith = float;
  using Right = Pair;
  using Left = Pair;
  static constexpr int kPack = 2;
  static Right right(const Storage* p) {
    Pair r;
    load_bfloat_pairs(p, &r.first, &r.second);
    return r;
  }
  static Left left(const Arith* p) { return {set1(p[0]), set1(p[1])}; }
  static void dot(F32x16& acc, Left a, Right b) {
    acc = fma(a.first, b.first, acc);
    acc = fma(a.second, b.second, acc);
  }
  static void pack(Arith* dst, F32x16 x) { store(dst, x); }
  static F32x16 widen(const Storage* p) { return load_bfloat(p); }
  static void narrow(Storage* p, F32x16 x) { store_bfloat(p, x); }
};
#endif

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
