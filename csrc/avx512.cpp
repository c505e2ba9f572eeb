// AVX-512 with VNNI and BF16.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")

#include "rows.h"

#include "dot_linear.h"

namespace octavo {
namespace {

inline __mmask16 mask16(int count) { return static_cast<__mmask16>((1u << count) - 1); }

struct Vec {
  static constexpr int kLanes = 16;
  using F = __m512;

  static F set1(float value) { return _mm512_set1_ps(value); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }

  static F from_bf16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

  static F load(const void* p, Float type) {
    if (type == Float::f32) return _mm512_loadu_ps(p);
    const __m256i v = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return type == Float::bf16 ? from_bf16(v) : _mm512_cvtph_ps(v);
  }

  static F load(const void* p, Float type, int count) {
    const __mmask16 mask = mask16(count);
    if (type == Float::f32) return _mm512_maskz_loadu_ps(mask, p);
    const __m256i v = _mm256_maskz_loadu_epi16(mask, p);
    return type == Float::bf16 ? from_bf16(v) : _mm512_cvtph_ps(v);
  }

  // Round half to even by hand: the instruction for it (vcvtneps2bf16) makes zeros of subnormal numbers.
  static __m256i to_bf16(F v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
  }

  static void store(void* p, Float type, int count, F v) {
    const __mmask16 mask = mask16(count);
    if (type == Float::f32) return _mm512_mask_storeu_ps(p, mask, v);
    const __m256i half = type == Float::bf16 ? to_bf16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(p, mask, half);
  }

  // As integers, magnitudes are ordered, and NaN is the largest.
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

  // x / scale is rounded after a multiplication by 1 / scale, which is many times faster than a division, and is off
  // by less than 2^-15 for quotients up to 128. Only where that could decide how it is rounded, it is divided.
  struct Divisor {
    F scale, inverse;
    explicit Divisor(float s) : scale(_mm512_set1_ps(s)), inverse(_mm512_set1_ps(1.0f / s)) {}
  };

  static __m512i round(F x, const Divisor& by) {
    F quotient = _mm512_mul_ps(x, by.inverse);
    const F whole = _mm512_roundscale_ps(quotient, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F distance = _mm512_abs_ps(_mm512_sub_ps(quotient, whole));
    // "not less" is true for NaN too
    const __mmask16 close = _mm512_cmp_ps_mask(distance, _mm512_set1_ps(0.5f - 1.0f / 16384), _CMP_NLT_UQ);
    if (__builtin_expect(close != 0, 0)) {
      quotient = _mm512_div_ps(x, by.scale);
      quotient = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(quotient, quotient, _CMP_ORD_Q), quotient);  // NaN's code is 0
    }
    const F bounded = _mm512_max_ps(_mm512_min_ps(quotient, _mm512_set1_ps(kQmax)), _mm512_set1_ps(-kQmax));
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

// Sums of the four accumulators across their lanes, as one vector of four.
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

struct FloatSums {
  using Sum = float;
  using Acc = __m512;
  static constexpr int32_t kOffset = 0;
  static constexpr bool kGroups = true;
  static Acc zero() { return _mm512_setzero_ps(); }
  static Acc scaled_add(Acc total, Acc partial, float scale) {
    return _mm512_fmadd_ps(partial, _mm512_set1_ps(scale), total);
  }
  static void store4(Acc a, Acc b, Acc c, Acc d, float* sums, bool add) {
    const __m128 v = across4(a, b, c, d);
    _mm_storeu_ps(sums, add ? _mm_add_ps(v, _mm_loadu_ps(sums)) : v);
  }
};

// fp32 products, of activations of any type.
template <Float type>
struct Fp32 : FloatSums {
  using X = std::conditional_t<type == Float::f32, float, uint16_t>;
  using XV = __m512;
  using WV = __m512;
  static constexpr int kStep = 16;
  static constexpr int kTileM = 6;
  static XV load_x(const X* x) { return Vec::load(x, type); }
  static XV load_x(const X* x, int count) { return Vec::load(x, type, count); }
  static Acc dot(Acc acc, XV x, WV w) { return _mm512_fmadd_ps(x, w, acc); }
};

template <Float type>
struct Fp32Direct : Fp32<type> {
  static constexpr int64_t kFewRows = 12;
  using W = int8_t;
  static __m512 load_w(const W* w) { return Vec::load_codes(w); }
  static __m512 load_w(const W* w, int count) { return Vec::load_codes(w, count); }
};

template <Float type>
struct Fp32Packed : Fp32<type> {
  using W = float;
  static __m512 load_w(const W* w) { return _mm512_loadu_ps(w); }
  static __m512 load_w(const W* w, int count) { return _mm512_maskz_loadu_ps(mask16(count), w); }
  static void pack(const int8_t* codes, int64_t count, W* w) {
    int64_t k = 0;
    for (; k + 16 <= count; k += 16) _mm512_storeu_ps(w + k, Vec::load_codes(codes + k));
    if (k < count) _mm512_storeu_ps(w + k, Vec::load_codes(codes + k, static_cast<int>(count - k)));
  }
};

// Products of bf16 pairs, summed in fp32. A code is exact in bf16.
struct Bf16 : FloatSums {
  using X = uint16_t;
  using XV = __m512i;
  using WV = __m512i;
  static constexpr int kStep = 32;
  static constexpr int kTileM = 6;
  static __mmask32 mask(int count) { return static_cast<__mmask32>((1ull << count) - 1); }
  static XV load_x(const X* x) { return _mm512_loadu_si512(x); }
  static XV load_x(const X* x, int count) { return _mm512_maskz_loadu_epi16(mask(count), x); }
  static Acc dot(Acc acc, XV x, WV w) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
    return acc;
  }
  static WV widen(__m256i codes) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
  static WV widen(const int8_t* codes) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))); }
  static WV widen(const int8_t* codes, int count) { return widen(_mm256_maskz_loadu_epi8(mask(count), codes)); }
};

struct Bf16Direct : Bf16 {
  static constexpr int64_t kFewRows = 24;
  using W = int8_t;
  static WV load_w(const W* w) { return widen(w); }
  static WV load_w(const W* w, int count) { return widen(w, count); }
};

struct Bf16Packed : Bf16 {
  using W = uint16_t;
  static WV load_w(const W* w) { return _mm512_loadu_si512(w); }
  static WV load_w(const W* w, int count) { return _mm512_maskz_loadu_epi16(mask(count), w); }
  static void pack(const int8_t* codes, int64_t count, W* w) {
    int64_t k = 0;
    for (; k + kStep <= count; k += kStep) _mm512_storeu_si512(w + k, widen(codes + k));
    if (k < count) _mm512_storeu_si512(w + k, widen(codes + k, static_cast<int>(count - k)));
  }
};

// Products of codes, summed in int32. The instruction wants one operand without sign: W + 128.
struct Int8 {
  using X = int8_t;
  using Sum = int32_t;
  using XV = __m512i;
  using WV = __m512i;
  using Acc = __m512i;
  static constexpr int kStep = 64;
  static constexpr int kTileM = 6;
  static constexpr int32_t kOffset = 128;
  static constexpr bool kGroups = false;
  static __mmask64 mask(int count) { return (1ull << count) - 1; }
  static WV unsign(__m512i codes) { return _mm512_xor_si512(codes, _mm512_set1_epi8(-128)); }
  static XV load_x(const X* x) { return _mm512_loadu_si512(x); }
  static XV load_x(const X* x, int count) { return _mm512_maskz_loadu_epi8(mask(count), x); }
  static Acc zero() { return _mm512_setzero_si512(); }
  static Acc dot(Acc acc, XV x, WV w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
  }
  static void store4(Acc a, Acc b, Acc c, Acc d, int32_t* sums, bool add) {
    const __m128i v = across4(a, b, c, d);
    auto* to = reinterpret_cast<__m128i*>(sums);
    _mm_storeu_si128(to, add ? _mm_add_epi32(v, _mm_loadu_si128(to)) : v);
  }
  static int32_t sum_x(const X* x, int64_t K) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + kStep <= K; k += kStep) sum = _mm512_dpbusd_epi32(sum, ones, load_x(x + k));
    if (k < K) sum = _mm512_dpbusd_epi32(sum, ones, load_x(x + k, static_cast<int>(K - k)));
    return _mm512_reduce_add_epi32(sum);
  }
};

struct Int8Direct : Int8 {
  static constexpr int64_t kFewRows = 32;
  using W = int8_t;
  static WV load_w(const W* w) { return unsign(_mm512_loadu_si512(w)); }
  static WV load_w(const W* w, int count) { return unsign(_mm512_maskz_loadu_epi8(mask(count), w)); }
};

struct Int8Packed : Int8 {
  using W = uint8_t;
  static WV load_w(const W* w) { return _mm512_loadu_si512(w); }
  static WV load_w(const W* w, int count) { return _mm512_maskz_loadu_epi8(mask(count), w); }
  static void pack(const int8_t* codes, int64_t count, W* w) {
    int64_t k = 0;
    for (; k + kStep <= count; k += kStep) _mm512_storeu_si512(w + k, Int8Direct::load_w(codes + k));
    if (k < count) _mm512_storeu_si512(w + k, Int8Direct::load_w(codes + k, static_cast<int>(count - k)));
  }
};

using LinearF32 = DotLinear<Vec, Fp32Direct<Float::f32>, Fp32Packed<Float::f32>>;
using LinearF16 = DotLinear<Vec, Fp32Direct<Float::f16>, Fp32Packed<Float::f16>>;
using LinearBf16 = DotLinear<Vec, Bf16Direct, Bf16Packed>;
using LinearInt8 = DotLinear<Vec, Int8Direct, Int8Packed>;

size_t w8a16_scratch(const Linear& layer) {
  return layer.x_type == Float::bf16 ? LinearBf16::scratch(layer) : LinearF32::scratch(layer);
}

void w8a16(const Linear& layer, Block block, void* scratch) {
  if (layer.x_type == Float::bf16) return LinearBf16::run(layer, block, scratch);
  if (layer.x_type == Float::f16) return LinearF16::run(layer, block, scratch);
  LinearF32::run(layer, block, scratch);
}

}  // namespace

using Of = RowKernels<Vec>;

extern const Kernels avx512_kernels = {
    "avx512",           w8a16_scratch,          w8a16,     LinearInt8::scratch, LinearInt8::run,
    Of::quantize_weight, Of::quantize_token, Of::quantize_given, Of::amax,        Of::lookup,
};

}  // namespace octavo

#pragma GCC pop_options

#endif  // x86-64
