// exp and tanh of 16 numbers, by range reduction and a polynomial: right to two units of the last place.
//
// Included by a translation unit after its target pragma, which must name AVX-512 F and DQ.
#pragma once

namespace octavo {
namespace {

// e^x for x <= 0, where nothing overflows: x = n ln 2 + r with |r| <= ln 2 / 2, e^x = 2^n e^r. e^r = 1 + r + r^2 p(r),
// p fitted to the least relative error, which is 2^-28. -inf gives 0, NaN stays.
inline __m512 exp_of_negative(__m512 x) {
  // e^-104 is 0 in fp32. In this order of operands NaN stays.
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  // ln 2 in two parts: n times the first is exact
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.38145394e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.36874545e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.16683890e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.66665211e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.99999940e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// (1 - t) / (1 + t) with t = e^-2|x|; where that would cancel, the polynomial of Moshier's Cephes library (tanhf). NaN
// stays.
inline __m512 tanh_of(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), magnitude = _mm512_abs_ps(x);
  const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(10.0f), magnitude);  // of which it is 1
  const __m512 t = exp_of_negative(_mm512_mul_ps(bounded, _mm512_set1_ps(-2.0f)));
  const __m512 large = _mm512_div_ps(_mm512_sub_ps(one, t), _mm512_add_ps(one, t));
  const __m512 z = _mm512_mul_ps(bounded, bounded);
  __m512 p = _mm512_set1_ps(-5.70498872745e-3f);
  p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(2.06390887954e-2f));
  p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(-5.37397155531e-2f));
  p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(1.33314422036e-1f));
  p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(-3.33332819422e-1f));
  const __m512 small = _mm512_fmadd_ps(_mm512_mul_ps(p, z), bounded, bounded);
  const __mmask16 is_small = _mm512_cmp_ps_mask(bounded, _mm512_set1_ps(0.625f), _CMP_LT_OQ);
  const __m512 result = _mm512_mask_mov_ps(large, is_small, small);
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
  return _mm512_or_ps(result, sign);
}

}  // namespace
}  // namespace octavo
