// What one cache element is and how a product over it is accumulated.
//
//   Value      the type of the query and the output, widened from and narrowed to float
//   Storage    the type in the cache
//   Arith      the type that the left operand (query, probabilities) is packed to
//   kPack      P of the cache layout: how many products one `dot` adds to each lane
//   Right      one vector load of the cache: 16 lanes x kPack
//   Left       kPack values of the left operand, broadcast to all lanes
//   kExpDegree degree of the exponential's polynomial: as exact as the probabilities are stored
//   kUnit      a decoded value of the cache times this is the value
//   Wide       the element whose storage a quantized cache is unpacked to where that is done once
//              for many query rows; the element itself where nothing is quantized
#pragma once

#include "attention.h"
#include "fp8.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

struct FloatValues {
  using Value = float;
  static constexpr float kUnit = 1.f;
  static F32x16 widen(const Value* p) { return load(p); }
  static void narrow(Value* p, F32x16 x) { store(p, x); }
};

struct HalfValues {
  using Value = uint16_t;
  static constexpr float kUnit = 1.f;
  static F32x16 widen(const Value* p) { return load_half(p); }
  static void narrow(Value* p, F32x16 x) { store_half(p, x); }
};

struct BFloatValues {
  using Value = uint16_t;
  static constexpr float kUnit = 1.f;
  static F32x16 widen(const Value* p) { return load_bfloat(p); }
  static void narrow(Value* p, F32x16 x) { store_bfloat(p, x); }
};

// Products of float with one float of the cache per lane.
struct SingleProducts {
  using Arith = float;
  using Right = F32x16;
  using Left = F32x16;
  static constexpr int kPack = 1;
  static constexpr int kExpDegree = 5;
  static Left left(const Arith* p) { return set1(*p); }
  static void dot(F32x16& acc, Left a, Right b) { acc = fma(a, b, acc); }
  static void pack(Arith* dst, F32x16 x) { store(dst, x); }
};

// Products of float with two bfloat16 of the cache per lane, widened in registers.
struct PairProducts {
  struct Pair {
    F32x16 first, second;
  };
  using Arith = float;
  using Right = Pair;
  using Left = Pair;
  static constexpr int kPack = 2;
  static constexpr int kExpDegree = 5;
  static Right right(const uint16_t* pairs) {
    Pair r;
    load_bfloat_pairs(pairs, &r.first, &r.second);
    return r;
  }
  template <class Format>
  static constexpr float kFp8Unit = kFp8ByHalf ? Format::kHalfUnit : 1.f;
  template <class Format>
  static Right right_fp8(const uint8_t* pairs) {
    Pair r;
    load_fp8_pairs<Format>(pairs, &r.first, &r.second);
    return r;
  }
  static Left left(const Arith* p) { return {set1(p[0]), set1(p[1])}; }
  static void dot(F32x16& acc, Left a, Right b) {
    acc = fma(a.first, b.first, acc);
    acc = fma(a.second, b.second, acc);
  }
  static void pack(Arith* dst, F32x16 x) { store(dst, x); }
};

#ifdef BMC_BFLOAT_PAIRS
// Products of bfloat16 pairs; probabilities are rounded to bfloat16, sums stay in float.
struct BFloatProducts {
  using Arith = uint16_t;
  using Right = BFloatPairs;
  using Left = BFloatPairs;
  static constexpr int kPack = 2;
  static constexpr int kExpDegree = 4;
  static Right right(const uint16_t* pairs) { return load_pairs(pairs); }
  template <class Format>
  static constexpr float kFp8Unit = 1.f;
  template <class Format>
  static Right right_fp8(const uint8_t* pairs) {
    return fp8_to_bfloat<Format>(pairs);
  }
  static Left left(const Arith* p) { return broadcast_pair(p); }
  static void dot(F32x16& acc, Left a, Right b) { dot_pairs(acc, a, b); }
  static void pack(Arith* dst, F32x16 x) { store_bfloat(dst, x); }
};
#else
using BFloatProducts = PairProducts;
#endif

struct Float32 : FloatValues, SingleProducts {
  using Storage = float;
  using Wide = Float32;
  static Right right(const Storage* p) { return load(p); }
};

struct Float16 : HalfValues, SingleProducts {
  using Storage = uint16_t;
  using Wide = Float16;
  static Right right(const Storage* p) { return load_half(p); }
};

struct BFloat16 : BFloatValues, BFloatProducts {
  using Storage = uint16_t;
  using Wide = BFloat16;
};

// A cache of fp8 codes under queries of another type.
template <class Values, class Products>
struct Unpacked : Values, Products {
  using Storage = uint16_t;
  using Wide = Unpacked;
};

template <class Format, class Values, class Products>
struct Fp8 : Values, Products {
  using Storage = uint8_t;
  using Wide = Unpacked<Values, Products>;
  static constexpr float kUnit = Products::template kFp8Unit<Format>;
  static typename Products::Right right(const Storage* p) {
    return Products::template right_fp8<Format>(p);
  }
  // Values times scale, a power of two; count: multiple of 32
  static void unpack(const Storage* from, int count, float scale, uint16_t* to) {
    for (int i = 0; i < count; i += 32) unpack_fp8<Format>(from + i, to + i);
    if (scale == 1.f) return;
    for (int i = 0; i < count; i += 16) store_bfloat(to + i, mul(load_bfloat(to + i), set1(scale)));
  }
  // Whether `right` may be used for all of them; count: multiple of 64
  static bool decodes(const Storage* p, int count) {
    if constexpr (kUnit == 1.f) return true;
    return !has_e4m3_nan(p, count);
  }
};

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
