// exp and tanh of a vector, by range reduction and a polynomial: accurate to two units in the last place.
//
// `V` is a vector of fp32 (see avx512.h):
//     set1, add, sub, mul, div, min, max, magnitude, with_sign_of, is_less, select
//     fmadd, fnmadd           a b + c, c - a b, rounded once
//     whole                   the nearest whole number
//     is_not_below            a mask of the lanes where a >= b, or where one is NaN
//     times_two_to            x 2^n in the lanes of a mask, and 0 in the others
//
// Included by a translation unit after its target pragma.
#pragma once

namespace octavo {
namespace {

// e^x for x <= 0, so that nothing overflows.
//
//     x = n ln 2 + r with |r| <= ln 2 / 2        e^x = 2^n e^r        e^r = 1 + r + r^2 p(r)
//
// p is fitted to the least relative error, 2^-28. -inf gives 0, NaN stays.
template <class V, class F = typename V::F>
inline __attribute__((always_inline)) F exp_of_negative(F x) {
  // Below -104, e^x is 0 in fp32. The mask sets it to that instead of letting it underflow, which takes 100 ns for a
  // vector on Intel's processors.
  const typename V::Lanes there = V::is_not_below(x, V::set1(-104.0f));
  const F n = V::whole(V::mul(x, V::set1(1.44269504f)));
  // ln 2 in two parts: n times the first is exact.
  F r = V::fnmadd(n, V::set1(0.693359375f), x);
  r = V::fnmadd(n, V::set1(-2.12194440e-4f), r);
  F p = V::set1(1.38145394e-3f);
  p = V::fmadd(p, r, V::set1(8.36874545e-3f));
  p = V::fmadd(p, r, V::set1(4.16683890e-2f));
  p = V::fmadd(p, r, V::set1(1.66665211e-1f));
  p = V::fmadd(p, r, V::set1(4.99999940e-1f));
  p = V::fmadd(p, r, V::set1(1.0f));
  p = V::fmadd(p, r, V::set1(1.0f));
  return V::times_two_to(there, p, n);
}

// (1 - t) / (1 + t) with t = e^-2|x|. Where that would cancel, for small |x|, the polynomial of Moshier's Cephes
// library (tanhf). NaN stays.
template <class V, class F = typename V::F>
inline F tanh_of(F x) {
  const F one = V::set1(1.0f), bounded = V::min(V::set1(10.0f), V::magnitude(x));  // tanh(10) is 1
  const F t = exp_of_negative<V>(V::mul(bounded, V::set1(-2.0f)));
  const F large = V::div(V::sub(one, t), V::add(one, t));
  const F z = V::mul(bounded, bounded);
  F p = V::set1(-5.70498872745e-3f);
  p = V::fmadd(p, z, V::set1(2.06390887954e-2f));
  p = V::fmadd(p, z, V::set1(-5.37397155531e-2f));
  p = V::fmadd(p, z, V::set1(1.33314422036e-1f));
  p = V::fmadd(p, z, V::set1(-3.33332819422e-1f));
  const F small = V::fmadd(V::mul(p, z), bounded, bounded);
  return V::with_sign_of(x, V::select(V::is_less(bounded, V::set1(0.625f)), small, large));
}

}  // namespace
}  // namespace octavo
