// The vectors of AVX2 that its kernels (avx2.cpp, avxvnni.cpp) share.
//
// Included by a translation unit after its target pragma, which must name AVX2, FMA and F16C.
#pragma once

#include "exponential.h"

namespace octavo {
namespace {

// The first `bytes` of 16, padded with zeros; no more are read. AVX2 has no masked load of bytes, and a call of memcpy
// would spill the accumulators.
inline __m128i load_first(const void* p, int bytes) {
  alignas(16) char buffer[16] = {};
  const char* from = static_cast<const char*>(p);
  char* to = buffer;
  if (bytes & 8) memcpy(to, from, 8), to += 8, from += 8;
  if (bytes & 4) memcpy(to, from, 4), to += 4, from += 4;
  if (bytes & 2) memcpy(to, from, 2), to += 2, from += 2;
  if (bytes & 1) *to = *from;
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}

inline void store_first(void* p, int bytes, __m128i v) {
  alignas(16) char buffer[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), v);
  const char* from = buffer;
  char* to = static_cast<char*>(p);
  if (bytes & 8) memcpy(to, from, 8), to += 8, from += 8;
  if (bytes & 4) memcpy(to, from, 4), to += 4, from += 4;
  if (bytes & 2) memcpy(to, from, 2), to += 2, from += 2;
  if (bytes & 1) *to = *from;
}

// Copies an even number of bytes up to 32, in two pieces that meet or overlap.
inline void copy(char* to, const char* from, int bytes) {
  const auto ends = [&](auto piece) {
    memcpy(&piece, from, sizeof piece), memcpy(to, &piece, sizeof piece);
    memcpy(&piece, from + bytes - sizeof piece, sizeof piece), memcpy(to + bytes - sizeof piece, &piece, sizeof piece);
  };
  if (bytes >= 16) return ends(__m128i{});
  if (bytes >= 8) return ends(uint64_t{});
  if (bytes >= 4) return ends(uint32_t{});
  ends(uint16_t{});
}

inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline __m256i mask8(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kRegisterRows = 6;  // accumulators take 12 of 16 registers
  using F = __m256;
  using I = __m256i;
  using Bits = unsigned;
  using Lanes = __m256;  // a mask: all bits are set in the lanes that it selects

  static F set1(float value) { return _mm256_set1_ps(value); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fmadd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fnmadd(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }  // b if either is NaN
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // the same
  static F magnitude(F v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
  static F with_sign_of(F v, F magnitude) { return _mm256_or_ps(magnitude, _mm256_and_ps(v, _mm256_set1_ps(-0.0f))); }
  static F whole(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  // In two steps, each with half of the exponent: 2^n may be too small for a normal number.
  static F times_two_to(Lanes there, F v, F n) {
    const __m256i whole = _mm256_and_si256(units(there), _mm256_cvtps_epi32(n)), half = _mm256_srai_epi32(whole, 1);
    return _mm256_and_ps(there, mul(mul(v, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half))));
  }
  static Lanes is_not_below(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
  static F power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }

  // As in avx512.h.
  static Bits first(int count) { return (1u << count) - 1; }
  static constexpr Bits kAll = 0xff;
  static Bits is_less(F a, F b) { return lanes(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static Bits is_equal(F a, F b) { return lanes(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
  static Bits is_not_at_most(F a, F b) { return lanes(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)); }
  static Bits is_at_least(F a, F b) { return lanes(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
  static Bits lanes(F v) { return static_cast<unsigned>(_mm256_movemask_ps(v)); }
  static Bits nonzero_bytes(const void* p, int count) {
    const __m128i zeros = _mm_cmpeq_epi8(load_first(p, count), _mm_setzero_si128());
    return ~static_cast<unsigned>(_mm_movemask_epi8(zeros)) & kAll;
  }
  static F select(Bits lanes, F there, F elsewhere) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bit);
    return _mm256_blendv_ps(elsewhere, there, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)));
  }

  static F floats(I v) { return _mm256_castsi256_ps(v); }
  static I units(F v) { return _mm256_castps_si256(v); }
  static I zeros() { return _mm256_setzero_si256(); }
  static I broadcast(int unit) { return _mm256_set1_epi32(unit); }
  static I load_units(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_units(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  template <int kCount>
  static void store_first_units(void* p, I v) {
    static_assert(kCount == kLanes || kCount == kLanes / 2);
    if constexpr (kCount == kLanes)
      store_units(p, v);
    else
      _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(v));
  }

  static I both(I a, I b) { return _mm256_or_si256(a, b); }

  // Masks of lanes [first, end): for adjacent elements, and for every other element (`spread`).
  struct Range {
    int first, end;
    int32_t lanes[kLanes], spread[2 * kLanes];
    Range() = default;
    Range(int64_t from, int64_t to) : first(static_cast<int>(from)), end(static_cast<int>(to)), spread() {
      for (int i = 0; i < kLanes; i++) lanes[i] = spread[2 * i] = i >= first && i < end ? -1 : 0;
    }
  };

  // As in avx512.h.
  template <int64_t size>
  OCTAVO_INLINE static I strided(const char* x, int64_t step, const Range& range) {
    if (size == 4 && step == 1) return masked(x, range.lanes);
    if (size == 4 && step == 2) {
      const F front = floats(masked(x, range.spread)), back = floats(masked(x + 32, range.spread + kLanes));
      const F even = _mm256_shuffle_ps(front, back, _MM_SHUFFLE(2, 0, 2, 0));  // each half: 2 of `front`, 2 of `back`
      return _mm256_permute4x64_epi64(units(even), _MM_SHUFFLE(3, 1, 2, 0));
    }
    if (size == 2 && step == 1 && range.first == 0) {
      if (range.end == kLanes) return _mm256_cvtepu16_epi32(load16(x));
      // What a tile of twelve leaves over.
      if (range.end == kLanes / 2) return _mm256_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
    }
    alignas(32) char together[2 * sizeof(I)] = {};
    if (size == 2 && step <= 2) {
      const int64_t from = range.first * step * size, to = ((range.end - 1) * step + 1) * size;
      copy(together + from, x + from, static_cast<int>(to - from));
      return step == 1 ? _mm256_cvtepu16_epi32(load16(together))
                       : _mm256_and_si256(load_units(together), _mm256_set1_epi32(0xffff));
    }
    for (int i = range.first; i < range.end; i++) memcpy(together + 4 * i, x + i * step * size, size);
    return load_units(together);
  }

  static I masked(const char* x, const int32_t* mask) {
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(x), load_units(mask));
  }

  // Widens elements of a 2-byte type, as `strided` loads them.
  static F from_integers(I v, Float type) {
    if (type == Float::bf16) return floats(_mm256_slli_epi32(v, 16));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
  }

  static F extended(__m256 v) { return v; }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }

  static F widen(__m128i v, Float type) {
    if (type == Float::f16) return _mm256_cvtph_ps(v);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }

  static F load(const void* p, Float type) {
    return type == Float::f32 ? _mm256_loadu_ps(static_cast<const float*>(p)) : widen(load16(p), type);
  }

  static F load(const void* p, Float type, int count) {
    if (count == kLanes) return load(p, type);
    if (type == Float::f32) return _mm256_maskload_ps(static_cast<const float*>(p), mask8(count));
    return widen(load_first(p, 2 * count), type);
  }

  // Rounded to bf16, half to even, in the upper half of each lane; the lower half is to be dropped. NaN stays.
  static __m256i rounded_to_bf16(F v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, nan);
  }

  static __m128i to_bf16(F v) {
    const __m256i high = _mm256_srli_epi32(rounded_to_bf16(v), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }

  // Narrows to one of the 2-byte types.
  static __m128i narrow(F v, Float type) {
    return type == Float::bf16 ? to_bf16(v) : _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  }

  static F rounded(F v, Float type) {
    if (type == Float::f32) return v;
    if (type == Float::f16) return widen(narrow(v, type), type);
    return floats(_mm256_and_si256(rounded_to_bf16(v), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  static void store(void* p, Float type, int count, F v) {
    if (type == Float::f32) {
      // On Zen 3, a masked store takes as long as ten others.
      if (count == kLanes) return store(static_cast<float*>(p), v);
      return _mm256_maskstore_ps(static_cast<float*>(p), mask8(count), v);
    }
    const __m128i half = narrow(v, type);
    if (count == kLanes) return _mm_storeu_si128(static_cast<__m128i*>(p), half);
    store_first(p, 2 * count, half);
  }

  // As integers, magnitudes have the same order, and NaN is the largest.
  static F largest(F sofar, F x) {
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(sofar), magnitude));
  }
  static float across(F v) {
    const __m256i bits = _mm256_castps_si256(v);
    __m128i most = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, _MM_SHUFFLE(1, 0, 3, 2)));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtss_f32(_mm_castsi128_ps(most));
  }

  static float total(F v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static float most(F v) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
  }

  // By e = e^-|z|, which cannot overflow.
  static F sigmoid(F z) {
    const F e = exp_of_negative<Vec>(_mm256_or_ps(z, _mm256_set1_ps(-0.0f))), one = _mm256_set1_ps(1.0f);
    return _mm256_div_ps(_mm256_blendv_ps(one, e, z), _mm256_add_ps(one, e));
  }

  static F tanh(F x) { return tanh_of<Vec>(x); }

  struct Divisor {
    F scale, inverse;
    explicit Divisor(float s) : scale(_mm256_set1_ps(s)), inverse(_mm256_set1_ps(1.0f / s)) {}
  };

  // Eight codes, in the lower half.
  static __m128i codes(F x, const Divisor& by) {
    F quotient = _mm256_mul_ps(x, by.inverse);
    const F whole = _mm256_round_ps(quotient, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F distance = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_sub_ps(quotient, whole));
    // "Not less" is true for NaN, too.
    const F close = _mm256_cmp_ps(distance, _mm256_set1_ps(kNearHalf), _CMP_NLT_UQ);
    if (__builtin_expect(_mm256_movemask_ps(close) != 0, 0)) {
      quotient = _mm256_div_ps(x, by.scale);
      quotient = _mm256_and_ps(quotient, _mm256_cmp_ps(quotient, quotient, _CMP_ORD_Q));  // the code of NaN is 0
    }
    const F bounded = _mm256_max_ps(_mm256_min_ps(quotient, _mm256_set1_ps(kQmax)), _mm256_set1_ps(-kQmax));
    const __m256i wide = _mm256_cvtps_epi32(bounded);
    const __m128i half = narrowed(wide);
    return _mm_packs_epi16(half, half);
  }

  // Narrows to 16 bits.
  static __m128i narrowed(I v) { return _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); }

  static void store_codes(int8_t* to, F x, const Divisor& by) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), codes(x, by));
  }
  static void store_codes(int8_t* to, F x, const Divisor& by, int count) { store_first(to, count, codes(x, by)); }

  static F widen_codes(__m128i v) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)); }
  static F load_codes(const int8_t* codes) {
    return widen_codes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  }
  static F load_codes(const int8_t* codes, int count) { return widen_codes(load_first(codes, count)); }

  static F from_sums(const float* sums, int32_t) { return _mm256_loadu_ps(sums); }
  static F from_sums(const int32_t* sums, int32_t excess) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(load_units(sums), _mm256_set1_epi32(excess)));
  }
};

// Transposes 8 rows of 8 units of 4 bytes, in steps of 1, 2 and 4 units.
inline __attribute__((always_inline)) void transpose(__m256i (&r)[8]) {
  __m256i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

// Accumulates products in fp32. The twelve accumulators of a tile leave four registers, so that products read W from
// memory: from L1, if it is kept there.
struct FloatSums {
  using Stored = int8_t;
  using Sum = float;
  using Acc = __m256;
  static constexpr int kTileM = 3;
  static constexpr int64_t kManyRows = 81;
  static constexpr int64_t kManyRowsOfGroups = 49;
  static constexpr int32_t kOffset = 0;
  static constexpr bool kGroups = true;
  static constexpr bool kFixed = false;
  static Acc zero() { return _mm256_setzero_ps(); }
  static Acc scaled_add(Acc total, Acc partial, float scale) {
    return _mm256_fmadd_ps(partial, _mm256_set1_ps(scale), total);
  }
  static void store4(Acc a, Acc b, Acc c, Acc d, float* sums, bool add) {
    const __m256 v = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    _mm_storeu_ps(sums, add ? _mm_add_ps(four, _mm_loadu_ps(sums)) : four);
  }
};

// Accumulates products of codes, in int32.
struct CodeSums {
  using Stored = int8_t;
  using X = int8_t;
  using W = int8_t;
  using Sum = int32_t;
  using XV = __m256i;
  using WV = __m256i;
  using Acc = __m256i;
  static constexpr bool kGroups = false;
  static Acc zero() { return _mm256_setzero_si256(); }
  static void store4(Acc a, Acc b, Acc c, Acc d, int32_t* sums, bool add) {
    const __m256i v = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    auto* const to = reinterpret_cast<__m128i*>(sums);
    _mm_storeu_si128(to, add ? _mm_add_epi32(four, _mm_loadu_si128(to)) : four);
  }
};

}  // namespace
}  // namespace octavo
