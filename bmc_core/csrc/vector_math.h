// Exponential and hyperbolic tangent on sixteen lanes.
#pragma once

#include <cmath>

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kNegativeInfinity = -__builtin_inff();

// 2^x for x < 126: 2^floor(x) times a polynomial in the fraction (minimax, relative). Largest
// relative error 2.6e-6 for kDegree 4, 1e-7 for 5. 0 for x under about -126, -inf included; NaN
// stays NaN.
template <int kDegree>
inline F32x16 exp2(F32x16 x) {
  static_assert(kDegree == 4 || kDegree == 5);
  const F32x16 f = fraction(x);
  F32x16 p;
  if constexpr (kDegree == 4) {
    p = fma(set1(0.013534167781472206f), f, set1(0.052011460065841675f));
    p = fma(p, f, set1(0.2414427548646927f));
    p = fma(p, f, set1(0.6930038332939148f));
    p = fma(p, f, set1(1.0000026226043701f));
  } else {
    p = fma(set1(0.0018775766948238015f), f, set1(0.00898933969438076f));
    p = fma(p, f, set1(0.05582631751894951f));
    p = fma(p, f, set1(0.24015361070632935f));
    p = fma(p, f, set1(0.6931530833244324f));
    p = fma(p, f, set1(0.9999999403953552f));
  }
  return scale_by_floor_power(p, x);
}

inline F32x16 tanh(F32x16 x) {  // 1 - 2 / (e^2x + 1)
  const F32x16 e = exp2<5>(mul(min(set1(20.f), max(set1(-20.f), x)), set1(2.f * kLog2e)));
  return sub(set1(1.f), div(set1(2.f), add(e, set1(1.f))));
}

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
