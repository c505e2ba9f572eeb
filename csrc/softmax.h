// A row of attention between its two products: sums -> scores -> probabilities -> codes.
//
//     score   sum * (scale of q * scale of k), softcap, mask                     -inf where nothing is allowed
//     weight  e^(score - largest) * (scale of v)                                 computed once, and kept
//     code    weight / step, rounded, with step = (largest weight) / 127
//
// The sum of the e^... divides at the end, with the step, what is multiplied with v: a factor of the whole row changes
// no code. Each pass keeps its results where the sums were.
//
// Included by a translation unit after its target pragma, which must name AVX-512 F, BW, VL and DQ.
#pragma once

namespace octavo {
namespace {

constexpr int64_t kChunk = 32;  // tokens whose sums lie next to each other

struct SoftmaxRow {
  float* x;  // of token s, a multiple of kChunk, and of those behind it: x + s / kChunk * step. First sums, int32
  int64_t step;
  int32_t excess;  // by which the sums are too large
  float scale;     // of q, times scaling
  const float *k_scale, *v_scale;
  int64_t first, last;  // tokens that may be attended to, if the mask says so too
  Mask::Kind kind;
  const void* mask;
  bool has_softcap;
  float softcap;
  int8_t* codes;

  float top, total;  // the largest score; the sum of e^(score - top)
  float largest;     // weight
};

template <class V>
struct Softmax {
  using F = typename V::F;
  using Kind = Mask::Kind;

  // Codes of tokens [first, last), and up to the multiples of kChunk around them, of some rows: pass after pass, for
  // the sums across lanes at the end of one row's pass then wait for nobody.
  static void run(SoftmaxRow* rows, int64_t count) {
    for (int64_t i = 0; i < count; i++) rows[i].has_softcap ? scores_of<true>(rows[i]) : scores_of<false>(rows[i]);
    for (int64_t i = 0; i < count; i++) weights(rows[i]);
    for (int64_t i = 0; i < count; i++) codes(rows[i]);
  }

  // What multiplies the product of a row's codes with v's. Where nothing is allowed 0, but NaN if a scale is.
  static float scale_of(const SoftmaxRow& row) {
    const float lift = lift_of(row);
    return row.largest * lift / kQmax / (row.total == 0 ? 1 : row.total) / lift;
  }

 private:
  static int64_t from(const SoftmaxRow& row) { return row.first / kChunk; }
  static int64_t to(const SoftmaxRow& row) { return ceil_div(row.last, kChunk); }

  // Out of the numbers that are too small to divide by.
  static float lift_of(const SoftmaxRow& row) { return row.largest < 0x1p-60f ? 0x1p60f : 1.0f; }

  template <bool capped>
  static void scores_of(SoftmaxRow& row) {
    if (row.kind == Kind::none) return scores<Kind::none, capped>(row);
    if (row.kind == Kind::boolean) return scores<Kind::boolean, capped>(row);
    if (row.kind == Kind::f32) return scores<Kind::f32, capped>(row);
    if (row.kind == Kind::bf16) return scores<Kind::bf16, capped>(row);
    return scores<Kind::f16, capped>(row);
  }

  template <Kind kind, bool capped>
  static void scores(SoftmaxRow& given) {
    const SoftmaxRow row = given;  // a copy, which stays in registers
    F most = V::set1(-INFINITY);
    float* x = row.x + from(row) * row.step;
    for (int64_t s = from(row) * kChunk; s < row.last; s += kChunk, x += row.step) {
      F a = score<kind, capped>(row, x, s, 0), b = score<kind, capped>(row, x, s, 16);
      if (s < row.first || s + kChunk > row.last) {
        a = _mm512_mask_mov_ps(V::set1(-INFINITY), lanes_within(row.first, row.last, s), a);
        b = _mm512_mask_mov_ps(V::set1(-INFINITY), lanes_within(row.first, row.last, s + 16), b);
      }
      _mm512_storeu_ps(x, a), _mm512_storeu_ps(x + 16, b);
      most = _mm512_max_ps(b, _mm512_max_ps(a, most));  // in this order of operands NaN is passed over
    }
    given.top = _mm512_reduce_max_ps(most);
  }

  static int count(const SoftmaxRow& row, int64_t s) { return static_cast<int>(max64(0, min64(16, row.last - s))); }

  template <Kind kind, bool capped>
  static F score(const SoftmaxRow& row, const float* x, int64_t s, int half) {
    const F scale = V::mul(V::set1(row.scale), _mm512_loadu_ps(row.k_scale + s + half));
    F score = V::mul(V::from_sums(reinterpret_cast<const int32_t*>(x + half), row.excess), scale);
    if constexpr (capped) score = V::mul(tanh_of(_mm512_div_ps(score, V::set1(row.softcap))), V::set1(row.softcap));
    if constexpr (kind == Kind::none) return score;
    const int there = count(row, s + half);
    if constexpr (kind == Kind::boolean)
      return _mm512_mask_mov_ps(V::set1(-INFINITY),
                                MaskRows<V>::template changes_nothing<kind>(row.mask, s + half, there), score);
    return V::add(score, MaskRows<V>::template load<kind>(row.mask, s + half, there));
  }

  static void weights(SoftmaxRow& row) {
    const F shift = V::set1(row.top == -INFINITY ? 0 : row.top);
    const float* scale = row.v_scale + from(row) * kChunk;
    F total = V::set1(0), most = V::set1(0);
    float* x = row.x + from(row) * row.step;
    for (int64_t left = to(row) - from(row); left > 0; left--, x += row.step, scale += kChunk) {
#pragma GCC unroll 2
      for (int half = 0; half < kChunk; half += 16) {
        const F e = exp_of_negative(_mm512_sub_ps(_mm512_loadu_ps(x + half), shift));
        const F weight = V::mul(e, _mm512_loadu_ps(scale + half));
        total = V::add(total, e);
        most = V::largest(most, weight);
        _mm512_storeu_ps(x + half, weight);
      }
    }
    row.total = _mm512_reduce_add_ps(total), row.largest = V::across(most);
  }

  // Weights -> codes: a product with 127 / largest, not a division by the step.
  static void codes(const SoftmaxRow& row) {
    const float lift = lift_of(row);
    const F up = V::set1(lift), inverse = V::set1(row.largest == 0 ? 0 : kQmax / (row.largest * lift));
    const float* x = row.x + from(row) * row.step;
    int8_t* codes = row.codes + from(row) * kChunk;
    for (int64_t left = to(row) - from(row); left > 0; left--, x += row.step, codes += kChunk) {
#pragma GCC unroll 2
      for (int half = 0; half < kChunk; half += 16) {
        const __m512i rounded = _mm512_cvtps_epi32(V::mul(V::mul(_mm512_loadu_ps(x + half), up), inverse));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + half), _mm512_cvtepi32_epi8(rounded));
      }
    }
  }
};

}  // namespace
}  // namespace octavo
