// The vectors of AVX-512 that its kernels (avx512.cpp) and those of AMX (amx.cpp) share.
//
// Included by a translation unit after its target pragma, which must name AVX-512 F, BW, VL, DQ and BF16.
#pragma once

#include "exponential.h"

namespace octavo {
namespace {

// Masks of the first `count` lanes, where `count` may be 0, but not 64.
inline __mmask16 mask16(int count) { return static_cast<__mmask16>((1u << count) - 1); }
inline __mmask32 mask32(int count) { return static_cast<__mmask32>((1ull << count) - 1); }
inline __mmask64 mask64(int count) { return (1ull << count) - 1; }

struct Vec {
  static constexpr int kLanes = 16;
  static constexpr int kRegisterRows = 12;  // accumulators take 24 of 32 registers
  using F = __m512;
  using I = __m512i;
  using Bits = __mmask16;
  using Lanes = __mmask16;

  static F set1(float value) { return _mm512_set1_ps(value); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fmadd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnmadd(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }  // b if either is NaN
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // the same
  static F magnitude(F v) { return _mm512_abs_ps(v); }
  static F with_sign_of(F v, F magnitude) { return _mm512_or_ps(magnitude, _mm512_and_ps(v, _mm512_set1_ps(-0.0f))); }
  static F whole(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }
  static F times_two_to(F v, F n) { return _mm512_scalef_ps(v, n); }
  static F times_two_to(Lanes there, F v, F n) { return _mm512_maskz_scalef_ps(there, v, n); }
  static Lanes is_not_below(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }

  // Masks of lanes: the first `count`, all, those where a comparison holds. `select` takes `there` in the lanes of a
  // mask, and `elsewhere` in the others.
  static Bits first(int count) { return mask16(count); }
  static constexpr Bits kAll = 0xffff;
  static Bits is_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Bits is_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static Bits is_not_at_most(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }  // or NaN
  static Bits is_at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static Bits nonzero_bytes(const void* p, int count) {
    const __m128i bytes = _mm_maskz_loadu_epi8(mask16(count), p);
    return _mm_test_epi8_mask(bytes, bytes);
  }
  static F select(Bits lanes, F there, F elsewhere) { return _mm512_mask_mov_ps(elsewhere, lanes, there); }

  static F floats(I v) { return _mm512_castsi512_ps(v); }
  static I units(F v) { return _mm512_castps_si512(v); }
  static I zeros() { return _mm512_setzero_si512(); }
  static I broadcast(int unit) { return _mm512_set1_epi32(unit); }
  static I load_units(const void* p) { return _mm512_loadu_si512(p); }
  static void store_units(void* p, I v) { _mm512_storeu_si512(p, v); }
  template <int kCount>
  static void store_first_units(void* p, I v) {
    _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1 << kCount) - 1), v);
  }

  static I both(I a, I b) { return _mm512_or_si512(a, b); }

  // Masks of lanes [first, end): for adjacent elements, and for every other element (`spread`).
  struct Range {
    __mmask16 lanes;
    uint32_t spread;
    Range() = default;
    Range(int64_t first, int64_t end)
        : lanes(static_cast<__mmask16>((1u << end) - (1u << first))),
          spread(static_cast<uint32_t>((1ull << 2 * end) - (1ull << 2 * first)) & 0x55555555) {}
  };

  // Elements 0, step, 2 step, ... of x. Only those of the range are read; the others are zero. Elements of 2 bytes are
  // widened to integers, those of 4 bytes are loaded as they are.
  template <int64_t size>
  OCTAVO_INLINE static I strided(const char* x, int64_t step, const Range& range) {
    if (step == 1 && size == 4) return _mm512_maskz_loadu_epi32(range.lanes, x);
    if (step == 1) return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(range.lanes, x));
    if (step == 2 && size == 2) return _mm512_maskz_loadu_epi16(range.spread, x);
    if (step == 2) {
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i front = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(range.spread), x);
      const __m512i back = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(range.spread >> 16), x + 64);
      return _mm512_permutex2var_epi32(front, even, back);
    }
    alignas(64) char together[64] = {};
    for (int i = 0; i < kLanes; i++)
      if (range.lanes >> i & 1) memcpy(together + 4 * i, x + i * step * size, size);
    return _mm512_load_si512(together);
  }

  // Widens elements of a 2-byte type, as `strided` loads them.
  static F from_integers(I v, Float type) {
    return type == Float::bf16 ? floats(_mm512_slli_epi32(v, 16)) : _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
  }

  static F extended(__m256 v) { return _mm512_castps256_ps512(v); }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }

  static F from_bf16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

  static Bits subnormal(F v) { return _mm512_fpclass_ps_mask(v, 0x20); }

  // Rounded half to even. The instruction flushes subnormal numbers to zero; these are rare.
  static __m256i to_bf16(F v) {
    if (__builtin_expect(subnormal(v) != 0, 0)) return to_bf16_by_hand(v);
    return (__m256i)_mm512_cvtneps_pbh(v);
  }

  static __m256i to_bf16_by_hand(F v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
  }

  // Stores two vectors, 32 numbers, in bf16.
  static void store_bf16(void* p, F front, F back) {
    if (__builtin_expect((subnormal(front) | subnormal(back)) != 0, 0)) {
      _mm512_storeu_si512(p, _mm512_inserti64x4(_mm512_castsi256_si512(to_bf16(front)), to_bf16(back), 1));
    } else {
      _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(back, front));
    }
  }

  // Widens from, and narrows to, one of the 2-byte types.
  static F widen(__m256i v, Float type) { return type == Float::bf16 ? from_bf16(v) : _mm512_cvtph_ps(v); }
  static __m256i narrow(F v, Float type) {
    return type == Float::bf16 ? to_bf16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  }

  static F rounded(F v, Float type) { return type == Float::f32 ? v : widen(narrow(v, type), type); }

  static F load(const void* p, Float type) {
    if (type == Float::f32) return _mm512_loadu_ps(p);
    return widen(_mm256_loadu_si256(static_cast<const __m256i*>(p)), type);
  }

  static F load(const void* p, Float type, int count) {
    const __mmask16 mask = mask16(count);
    if (type == Float::f32) return _mm512_maskz_loadu_ps(mask, p);
    return widen(_mm256_maskz_loadu_epi16(mask, p), type);
  }

  static void store(void* p, Float type, int count, F v) {
    const __mmask16 mask = mask16(count);
    if (type == Float::f32) return _mm512_mask_storeu_ps(p, mask, v);
    _mm256_mask_storeu_epi16(p, mask, narrow(v, type));
  }

  // As integers, magnitudes have the same order, and NaN is the largest.
  static F largest(F sofar, F x) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(sofar), magnitude));
  }
  static float across(F v) {
    const uint32_t bits = _mm512_reduce_max_epu32(_mm512_castps_si512(v));
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }

  static float total(F v) { return _mm512_reduce_add_ps(v); }
  static float most(F v) { return _mm512_reduce_max_ps(v); }

  // By e = e^-|z|, which cannot overflow.
  static F sigmoid(F z) {
    const F e = exp_of_negative<Vec>(_mm512_or_ps(z, _mm512_set1_ps(-0.0f)));
    const F above = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), _mm512_movepi32_mask(_mm512_castps_si512(z)), e);
    return _mm512_div_ps(above, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
  }

  static F tanh(F x) { return tanh_of<Vec>(x); }

  struct Divisor {
    F scale, inverse;
    explicit Divisor(float s) : scale(_mm512_set1_ps(s)), inverse(_mm512_set1_ps(1.0f / s)) {}
  };

  static __m512i round(F x, const Divisor& by) {
    F quotient = _mm512_mul_ps(x, by.inverse);
    const F whole = _mm512_roundscale_ps(quotient, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F distance = _mm512_abs_ps(_mm512_sub_ps(quotient, whole));
    // "Not less" is true for NaN, too.
    const __mmask16 close = _mm512_cmp_ps_mask(distance, _mm512_set1_ps(kNearHalf), _CMP_NLT_UQ);
    if (__builtin_expect(close != 0, 0)) quotient = _mm512_div_ps(x, by.scale);
    // With this order of operands NaN stays, and becomes code 0.
    const F bounded = _mm512_max_ps(_mm512_set1_ps(-kQmax), _mm512_min_ps(_mm512_set1_ps(kQmax), quotient));
    return _mm512_cvtps_epi32(bounded);
  }

  static void store_codes(int8_t* codes, F x, const Divisor& by) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(round(x, by)));
  }
  static void store_codes(int8_t* codes, F x, const Divisor& by, int count) {
    _mm_mask_storeu_epi8(codes, mask16(count), _mm512_cvtepi32_epi8(round(x, by)));
  }

  static F load_codes(const int8_t* codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
  }
  static F load_codes(const int8_t* codes, int count) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask16(count), codes)));
  }

  static F from_sums(const float* sums, int32_t) { return _mm512_loadu_ps(sums); }
  static F from_sums(const int32_t* sums, int32_t excess) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums), _mm512_set1_epi32(excess)));
  }
};

// Widens 32 codes to bf16, which holds each exactly.
inline __m512i widened_to_bf16(const int8_t* codes) {
  return (__m512i)_mm512_cvtne2ps_pbh(Vec::load_codes(codes + 16), Vec::load_codes(codes));
}
inline __m512i widened_to_bf16(const int8_t* codes, int count) {
  const int low = count < 16 ? count : 16;
  return (__m512i)_mm512_cvtne2ps_pbh(Vec::load_codes(codes + 16, count - low), Vec::load_codes(codes, low));
}

// 64 elements of bf16, in the order that interleaving bytes gives: of each 16, the first 8 are in `first`, the others
// in `second`.
struct Halves {
  __m512i first, second;
};

inline Halves halves(__m512i front, __m512i back) {
  return {_mm512_shuffle_i64x2(front, back, 0x88), _mm512_shuffle_i64x2(front, back, 0xdd)};
}

// The two bytes of 0 to 127 in bf16: a lookup table.
struct Bf16Bytes {
  alignas(64) uint8_t low[128], high[128];
  constexpr Bf16Bytes() : low(), high() {
    for (int n = 1; n < 128; n++) {
      int exponent = 6;
      while (!(n >> exponent)) exponent--;
      const int bits = ((127 + exponent) << 7) | ((n << (7 - exponent)) & 0x7f);
      low[n] = static_cast<uint8_t>(bits & 0xff), high[n] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
constexpr Bf16Bytes kBf16Bytes;

inline __attribute__((always_inline)) __m512i byte_of(const uint8_t* table, __m512i at) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), at, _mm512_load_si512(table + 64));
}

// Widens 64 codes to bf16: both bytes are looked up by the code's magnitude.
inline __attribute__((always_inline)) Halves looked_up(__m512i codes) {
  const __m512i magnitude = _mm512_abs_epi8(codes);
  const __m512i low = byte_of(kBf16Bytes.low, magnitude);
  // With the code's sign: high | (codes & 0x80).
  __m512i high = _mm512_ternarylogic_epi32(byte_of(kBf16Bytes.high, magnitude), codes, _mm512_set1_epi8(-128), 0xf8);
  // -128: its magnitude is just past the end of the table.
  high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(magnitude), _mm512_set1_epi8(static_cast<char>(0xc3)));
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

// Transposes 16 rows of 16 units of 4 bytes, in steps of 1, 2, 4 and 8 units.
inline __attribute__((always_inline)) void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Sums of four accumulators across their lanes, as one vector of four.
inline __m128 across4(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d abcd0 = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d abcd1 = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 v = _mm512_add_ps(_mm512_castpd_ps(abcd0), _mm512_castpd_ps(abcd1));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline __m128i across4(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i v = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti32x8_epi32(v, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Accumulates products in fp32.
struct FloatSums {
  using Stored = int8_t;
  using Sum = float;
  using Acc = __m512;
  static constexpr int kTileM = 6;
  static constexpr int64_t kManyRows = 81;
  static constexpr int64_t kManyRowsOfGroups = 13;
  static constexpr int32_t kOffset = 0;
  static constexpr bool kGroups = true;
  static constexpr bool kFixed = false;
  static Acc zero() { return _mm512_setzero_ps(); }
  static Acc scaled_add(Acc total, Acc partial, float scale) {
    return _mm512_fmadd_ps(partial, _mm512_set1_ps(scale), total);
  }
  static void store4(Acc a, Acc b, Acc c, Acc d, float* sums, bool add) {
    const __m128 v = across4(a, b, c, d);
    _mm_storeu_ps(sums, add ? _mm_add_ps(v, _mm_loadu_ps(sums)) : v);
  }
};

// Accumulates products of codes, in int32.
struct CodeSums {
  using Stored = int8_t;
  using X = int8_t;
  using W = int8_t;
  using Sum = int32_t;
  using XV = __m512i;
  using WV = __m512i;
  using Acc = __m512i;
  static constexpr bool kGroups = false;
  static Acc zero() { return _mm512_setzero_si512(); }
  static void store4(Acc a, Acc b, Acc c, Acc d, int32_t* sums, bool add) {
    const __m128i v = across4(a, b, c, d);
    auto* to = reinterpret_cast<__m128i*>(sums);
    _mm_storeu_si128(to, add ? _mm_add_epi32(v, _mm_loadu_si128(to)) : v);
  }
};

}  // namespace
}  // namespace octavo
