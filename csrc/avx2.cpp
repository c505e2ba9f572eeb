// AVX2 with FMA and F16C: sixteen registers of eight fp32. No instruction multiplies bf16, or bytes without saturation,
// so activations and codes are widened: to fp32, and codes that meet codes to 16 bits.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "rows.h"

#include "dot_linear.h"

namespace octavo {
namespace {

// The first `bytes` of 16, with zeros behind; no more than these are read. There is no masked load of bytes, and a call
// of memcpy would drive the accumulators out of their registers.
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

inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline __m256i mask8(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

// As the one of the same name in exponential.h; 2^n in two halves, for the smallest numbers have no such exponent.
inline __m256 exp_of_negative(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-104.0f), x);
  const __m256i n = _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)));
  const __m256 whole = _mm256_cvtepi32_ps(n);
  __m256 r = _mm256_fnmadd_ps(whole, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(whole, _mm256_set1_ps(-2.12194440e-4f), r);
  constexpr float kP[] = {8.36874545e-3f, 4.16683890e-2f, 1.66665211e-1f, 4.99999940e-1f, 1.0f, 1.0f};
  __m256 p = _mm256_set1_ps(1.38145394e-3f);
  for (const float c : kP) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
  const __m256i half = _mm256_srai_epi32(n, 1);
  return _mm256_mul_ps(_mm256_mul_ps(p, power_of_two(half)), power_of_two(_mm256_sub_epi32(n, half)));
}

struct Vec {
  static constexpr int kLanes = 8;
  using F = __m256;

  static F set1(float value) { return _mm256_set1_ps(value); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }

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

  // Round half to even, and NaN stays.
  static __m128i to_bf16(F v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }

  // To one of the types of two bytes.
  static __m128i narrow(F v, Float type) {
    return type == Float::bf16 ? to_bf16(v) : _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  }

  static F rounded(F v, Float type) { return type == Float::f32 ? v : widen(narrow(v, type), type); }

  static void store(void* p, Float type, int count, F v) {
    if (type == Float::f32) return _mm256_maskstore_ps(static_cast<float*>(p), mask8(count), v);
    const __m128i half = narrow(v, type);
    if (count == kLanes) return _mm_storeu_si128(static_cast<__m128i*>(p), half);
    store_first(p, 2 * count, half);
  }

  // As integers, magnitudes are ordered, and NaN is the largest.
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

  // With e = e^-|z|, of which nothing overflows.
  static F sigmoid(F z) {
    const F e = exp_of_negative(_mm256_or_ps(z, _mm256_set1_ps(-0.0f))), one = _mm256_set1_ps(1.0f);
    return _mm256_div_ps(_mm256_blendv_ps(one, e, z), _mm256_add_ps(one, e));
  }

  struct Divisor {
    F scale, inverse;
    explicit Divisor(float s) : scale(_mm256_set1_ps(s)), inverse(_mm256_set1_ps(1.0f / s)) {}
  };

  // Eight codes, in the low half.
  static __m128i codes(F x, const Divisor& by) {
    F quotient = _mm256_mul_ps(x, by.inverse);
    const F whole = _mm256_round_ps(quotient, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F distance = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_sub_ps(quotient, whole));
    // "not less" is true for NaN too
    const F close = _mm256_cmp_ps(distance, _mm256_set1_ps(kNearHalf), _CMP_NLT_UQ);
    if (__builtin_expect(_mm256_movemask_ps(close) != 0, 0)) {
      quotient = _mm256_div_ps(x, by.scale);
      quotient = _mm256_and_ps(quotient, _mm256_cmp_ps(quotient, quotient, _CMP_ORD_Q));  // the code of NaN is 0
    }
    const F bounded = _mm256_max_ps(_mm256_min_ps(quotient, _mm256_set1_ps(kQmax)), _mm256_set1_ps(-kQmax));
    const __m256i wide = _mm256_cvtps_epi32(bounded);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    return _mm_packs_epi16(half, half);
  }

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
  static F from_sums(const int32_t* sums, int32_t) {
    return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums)));
  }
};

// Sums of the four accumulators across their lanes, as one vector of four.
inline __m128 across4(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 v = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

inline __m128i across4(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i v = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

template <Float type>
struct Fp32Kept;
struct Int8Kept;

// fp32 products, of activations of any type. A tile's twelve accumulators leave four registers: the multiplications
// read W from memory, which is L1 where it is kept.
template <Float type>
struct Fp32 {
  using Kept = Fp32Kept<type>;
  using Stored = int8_t;
  using W = int8_t;
  using X = std::conditional_t<type == Float::f32, float, uint16_t>;
  using Sum = float;
  using Acc = __m256;
  using XV = __m256;
  using WV = __m256;
  static constexpr int kStep = 8;
  static constexpr int kTileM = 3;
  static constexpr int32_t kOffset = 0;
  static constexpr bool kGroups = true;
  static Acc zero() { return _mm256_setzero_ps(); }
  static XV load_x(const X* x) { return Vec::load(x, type); }
  static XV load_x(const X* x, int count) { return Vec::load(x, type, count); }
  static WV load_w(const W* w) { return Vec::load_codes(w); }
  static WV load_w(const W* w, int count) { return Vec::load_codes(w, count); }
  static void keep(float* kept, WV w) { _mm256_storeu_ps(kept, w); }
  static Acc dot(Acc acc, XV x, WV w) { return _mm256_fmadd_ps(x, w, acc); }
  static Acc scaled_add(Acc total, Acc partial, float scale) {
    return _mm256_fmadd_ps(partial, _mm256_set1_ps(scale), total);
  }
  static void store4(Acc a, Acc b, Acc c, Acc d, float* sums, bool add) {
    const __m128 v = across4(a, b, c, d);
    _mm_storeu_ps(sums, add ? _mm_add_ps(v, _mm_loadu_ps(sums)) : v);
  }
};

template <Float type>
struct Fp32Kept : Fp32<type> {
  using W = float;
  static __m256 load_w(const W* w) { return _mm256_loadu_ps(w); }
  static __m256 load_w(const W* w, int) { return load_w(w); }
};

// Products of codes, summed in int32. The instruction for bytes (vpmaddubsw) saturates at 16 bits, so they are widened
// to 16 bits, of which pairs of products are summed exactly.
struct Int8 {
  using Kept = Int8Kept;
  using Stored = int8_t;
  using X = int8_t;
  using W = int8_t;
  using Sum = int32_t;
  using XV = __m256i;
  using WV = __m256i;
  using Acc = __m256i;
  static constexpr int kStep = 16;
  static constexpr int kTileM = 3;
  static constexpr int32_t kOffset = 0;
  static constexpr bool kGroups = false;
  static __m256i widen(const int8_t* codes) { return _mm256_cvtepi8_epi16(load16(codes)); }
  static __m256i widen(const int8_t* codes, int count) { return _mm256_cvtepi8_epi16(load_first(codes, count)); }
  static Acc zero() { return _mm256_setzero_si256(); }
  static XV load_x(const X* x) { return widen(x); }
  static XV load_x(const X* x, int count) { return widen(x, count); }
  static WV load_w(const W* w) { return widen(w); }
  static WV load_w(const W* w, int count) { return widen(w, count); }
  static void keep(int16_t* kept, WV w) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept), w); }
  static Acc dot(Acc acc, XV x, WV w) { return _mm256_add_epi32(acc, _mm256_madd_epi16(x, w)); }
  static void store4(Acc a, Acc b, Acc c, Acc d, int32_t* sums, bool add) {
    const __m128i v = across4(a, b, c, d);
    auto* to = reinterpret_cast<__m128i*>(sums);
    _mm_storeu_si128(to, add ? _mm_add_epi32(v, _mm_loadu_si128(to)) : v);
  }
};

struct Int8Kept : Int8 {
  using W = int16_t;
  static WV load_w(const W* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }
  static WV load_w(const W* w, int) { return load_w(w); }
};

template <Float type>
using LinearFloat = DotLinear<Vec, Fp32<type>>;
using LinearInt8 = DotLinear<Vec, Int8>;

}  // namespace

extern constexpr Kernels avx2_kernels = [] {
  Kernels kernels =
      kernels_of<Vec>("avx2", linear_kernels<LinearFloat<Float::f32>>, linear_kernels<LinearFloat<Float::bf16>>,
                      linear_kernels<LinearFloat<Float::f16>>, linear_kernels<LinearInt8>);
  // Few enough that memory bounds them: torch may have wider instructions on a processor that has to do with these.
  kernels.float_linear_of[0] = {8, linear_kernels<DotLinear<Vec, WithFloats<Fp32<Float::f32>>>>};
  kernels.float_linear_of[1] = {16, linear_kernels<DotLinear<Vec, WithFloats<Fp32<Float::bf16>>>>};
  kernels.float_linear_of[2] = {kAnyNumber, linear_kernels<DotLinear<Vec, WithFloats<Fp32<Float::f16>>>>};
  return kernels;
}();

}  // namespace octavo

#pragma GCC pop_options

#endif  // x86-64
