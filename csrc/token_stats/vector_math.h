// exp, tanh and the logit's cap for any vector type V.
#pragma once
#include "token_stats/op.h"

namespace saltire::token_stats {
namespace {

template <typename V>
struct VectorMath {
  using reg = typename V::reg;

  // Below this e^x would leave the normal numbers; it counts as 0.
  static constexpr float kLeast = -87.0f;

  // e^x for x up to 88, to about 1 ulp; 0 below kLeast, NaN for NaN.
  //   x = n·ln 2 + r,  |r| <= 0.3466;  the Taylor series to r⁷/7! leaves 0.3466⁸/8! = 5e-9.
  // ln 2 comes in two parts, of which the first has 12 trailing zero bits: n times it is exact.
  static inline reg exp(reg x) {
    const reg bounded = V::max(V::set1(kLeast), x);  // the second operand if it is NaN
    const reg n = V::round(V::mul(bounded, V::set1(1.44269504f)));
    reg r = V::fma(n, V::set1(-0.693145752f), bounded);
    r = V::fma(n, V::set1(-1.42860677e-6f), r);
    reg p = V::set1(1.0f / 5040);
    p = V::fma(p, r, V::set1(1.0f / 720));
    p = V::fma(p, r, V::set1(1.0f / 120));
    p = V::fma(p, r, V::set1(1.0f / 24));
    p = V::fma(p, r, V::set1(1.0f / 6));
    p = V::fma(p, r, V::set1(0.5f));
    p = V::fma(p, r, V::set1(1.0f));
    p = V::fma(p, r, V::set1(1.0f));
    return V::where_greater(V::set1(kLeast), x, V::set1(0.0f), V::times_power_of_two(p, n));
  }

  // tanh x = ±(1 − e)/(1 + e), e = e^(−2|x|): absolute error 1e-7.
  static inline reg tanh(reg x) {
    const reg e = exp(V::mul(V::abs(x), V::set1(-2.0f)));
    return V::with_sign_of(V::div(V::sub(V::set1(1.0f), e), V::add(V::set1(1.0f), e)), x);
  }

  // c·tanh(x / c); −∞ stays −∞, for it says "masked".
  static inline reg cap(reg x, float softcap) {
    const reg capped = V::mul(V::set1(softcap), tanh(V::mul(x, V::set1(1.0f / softcap))));
    return V::where_equal(x, V::set1(-kInfinity), x, capped);
  }

  // d cap(x) / dx = 1 − (cap(x) / c)².
  static inline reg cap_slope(reg capped, float softcap) {
    const reg t = V::mul(capped, V::set1(1.0f / softcap));
    return V::sub(V::set1(1.0f), V::mul(t, t));
  }

  // p·(a − b·ln p): the part of dz that every token of the vocabulary has, with
  // a = g_lse − g_logp − g_H·H and b = g_H.
  static inline reg spread(reg log_p, reg a, reg b) {
    const reg p = exp(log_p);
    const reg bounded = V::max(V::set1(kLeast), log_p);  // finite, for p = 0 must win
    return V::mul(p, V::sub(a, V::mul(b, bounded)));
  }
};

}  // namespace
}  // namespace saltire::token_stats
