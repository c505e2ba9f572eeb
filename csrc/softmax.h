// A row of int8 attention between its two products: sums -> scores -> weights -> codes of the probabilities.
//
//     score   sum * (scale of q * scale of k), softcap, mask                     -inf where nothing is allowed
//     weight  e^(score - largest) * (scale of v)                                 computed once, and kept
//     code    weight / step, rounded, with step = (largest weight) / 127
//
// The product of codes and v is multiplied by `step`, and divided by the sum of the e^..., at the end: a factor of the
// whole row changes no code. Each pass stores its results where the sums were.
//
// Included by a translation unit after its target pragma, like mask.h.
#pragma once

namespace octavo {
namespace {

constexpr int64_t kChunk = 32;  // tokens whose sums are contiguous

struct SoftmaxRow {
  float* x;  // tokens from s on, a multiple of kChunk, are at x + s / kChunk * step. At first int32 sums
  int64_t step;
  int32_t excess;  // what the sums are too large by
  float scale;     // of q, times the attention's scaling
  const float *k_scale, *v_scale;
  int64_t first, last;  // tokens that may be attended to, unless `mask` forbids them
  Mask::Kind kind;
  const void* mask;
  bool has_softcap;
  float softcap;
  char* codes;  // as `Weighted` stores them

  float top, total;  // the largest score; the sum of e^(score - top)
  float largest;     // the largest weight
};

// `Weighted`: the unit of codes of probabilities times values.
template <class Weighted>
struct Softmax {
  using V = Vec;
  using F = Vec::F;
  using Kind = Mask::Kind;

  // Codes of tokens [first, last), and up to the multiples of kChunk around them, of some rows. Each pass is done for
  // all rows before the next, so that the next row need not wait for the reduction across lanes at the end of a row.
  static void run(SoftmaxRow* rows, int64_t count) {
    for (int64_t i = 0; i < count; i++) rows[i].has_softcap ? scores_of<true>(rows[i]) : scores_of<false>(rows[i]);
    for (int64_t i = 0; i < count; i++) weights(rows[i]);
    for (int64_t i = 0; i < count; i++) codes(rows[i]);
  }

  // The factor for the product of a row's codes and v's: 0 if nothing is allowed, but NaN if a scale is.
  static float scale_of(const SoftmaxRow& row) {
    const float lift = lift_of(row);
    return row.largest * lift / kQmax / (row.total == 0 ? 1 : row.total) / lift;
  }

 private:
  static int64_t from(const SoftmaxRow& row) { return row.first / kChunk; }
  static int64_t to(const SoftmaxRow& row) { return ceil_div(row.last, kChunk); }

  // Scales up numbers that are too small to divide by.
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
      const bool is_whole = s >= row.first && s + kChunk <= row.last;
#pragma GCC unroll 4
      for (int i = 0; i < kChunk; i += V::kLanes) {
        F one = score<kind, capped>(row, x, s, i);
        if (!is_whole) one = V::select(lanes_within(row.first, row.last, s + i), one, V::set1(-INFINITY));
        V::store(x + i, one);
        most = V::max(one, most);  // with this order of operands NaN is skipped
      }
    }
    given.top = V::most(most);
  }

  static int count(const SoftmaxRow& row, int64_t s) {
    return static_cast<int>(max64(0, min64(V::kLanes, row.last - s)));
  }

  template <Kind kind, bool capped>
  static F score(const SoftmaxRow& row, const float* sums, int64_t s, int i) {
    F x = V::from_sums(reinterpret_cast<const int32_t*>(sums + i), row.excess);
    F by = V::mul(V::set1(row.scale), V::load(row.k_scale + s + i));
    if constexpr (capped) {
      const F softcap = V::set1(row.softcap);
      x = tanh_of<V>(V::div(V::mul(x, by), softcap)), by = softcap;
    }
    if constexpr (kind == Kind::none) return V::mul(x, by);
    const int there = count(row, s + i);
    if constexpr (kind == Kind::boolean)
      return V::select(MaskRows::changes_nothing<kind>(row.mask, s + i, there), V::mul(x, by), V::set1(-INFINITY));
    return V::fmadd(x, by, MaskRows::load<kind>(row.mask, s + i, there));
  }

  static void weights(SoftmaxRow& row) {
    const F shift = V::set1(row.top == -INFINITY ? 0 : row.top);
    const float* scale = row.v_scale + from(row) * kChunk;
    F total = V::set1(0), most = V::set1(0);
    float* x = row.x + from(row) * row.step;
    for (int64_t left = to(row) - from(row); left > 0; left--, x += row.step, scale += kChunk) {
#pragma GCC unroll 4
      for (int i = 0; i < kChunk; i += V::kLanes) {
        const F e = exp_of_negative<V>(V::sub(V::load(x + i), shift));
        const F weight = V::mul(e, V::load(scale + i));
        total = V::add(total, e);
        most = V::largest(most, weight);
        V::store(x + i, weight);
      }
    }
    row.total = V::total(total), row.largest = V::across(most);
  }

  // Weights -> codes: multiplied by 127 / largest, not divided by the step.
  static void codes(const SoftmaxRow& row) {
    const float lift = lift_of(row);
    const F up = V::set1(lift), inverse = V::set1(row.largest == 0 ? 0 : kQmax / (row.largest * lift));
    const float* x = row.x + from(row) * row.step;
    char* codes = row.codes + from(row) * kChunk * Weighted::kCodeBytes;
    for (int64_t left = to(row) - from(row); left > 0; left--, x += row.step)
#pragma GCC unroll 4
      for (int i = 0; i < kChunk; i += V::kLanes, codes += V::kLanes * Weighted::kCodeBytes)
        Weighted::store_codes(codes, V::mul(V::mul(V::load(x + i), up), inverse));
  }
};

}  // namespace
}  // namespace octavo
