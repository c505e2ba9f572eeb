// AVX2 with FMA and F16C: sixteen registers of eight fp32. No instruction multiplies bf16, or bytes without saturation,
// so activations and codes are widened: to fp32, or to 16 bits for products of codes with codes.

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "rows.h"

#include "avx2.h"

#include "dot_linear.h"

#include "fp32.h"

#include "outer_linear.h"

#include "units.h"

#include "windows.h"

#include "convolution.h"

#include "narrow_convolution.h"

#include "mask.h"

#include "softmax.h"

#include "heads.h"

#include "value_strips.h"

#include "int8_rows.h"

#include "int8_attention.h"

#include "few_int8_queries.h"

#include "attention_rows.h"

#include "few_queries.h"

#include "float_attention.h"

namespace octavo {
namespace {

struct Int8Kept;

// Products of codes, accumulated in int32. The instruction for bytes (vpmaddubsw) saturates at 16 bits, so they are
// widened to 16 bits, of which pairs of products are summed exactly.
struct Int8 : CodeSums {
  using Kept = Int8Kept;
  static constexpr int kStep = 16;
  static constexpr int kTileM = 3;
  static constexpr int32_t kOffset = 0;
  static __m256i widen(const int8_t* codes) { return _mm256_cvtepi8_epi16(load16(codes)); }
  static __m256i widen(const int8_t* codes, int count) { return _mm256_cvtepi8_epi16(load_first(codes, count)); }
  static XV load_x(const X* x) { return widen(x); }
  static XV load_x(const X* x, int count) { return widen(x, count); }
  static WV load_w(const W* w) { return widen(w); }
  static WV load_w(const W* w, int count) { return widen(w, count); }
  static void keep(int16_t* kept, WV w) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept), w); }
  static Acc dot(Acc acc, XV x, WV w) { return _mm256_add_epi32(acc, _mm256_madd_epi16(x, w)); }
};

struct Int8Kept : Int8 {
  using W = int16_t;
  static WV load_w(const W* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }
  static WV load_w(const W* w, int) { return load_w(w); }
};

// The same in units of two, for outer products.
struct Int8Unit : Int8 {
  static constexpr int64_t kElements = 2;
  static constexpr int64_t kManyRows = 129;
  static __m256i product(__m256i sums, __m256i x, __m256i w) { return dot(sums, x, w); }
};

// Rows of codes, interleaved into pairs of 16 bits.
struct PairedCodes {
  // In each 128 bits, w[0] has four columns and w[1] the next.
  OCTAVO_INLINE static void strip(const int8_t* const (&rows)[2], int count, __m256i (&w)[2]) {
    const __m256i first = row(rows[0], count), second = rows[1] ? row(rows[1], count) : Vec::zeros();
    w[0] = _mm256_unpacklo_epi16(first, second), w[1] = _mm256_unpackhi_epi16(first, second);
  }
  static __m256i row(const int8_t* codes, int count) {
    return count == Int8::kStep ? Int8::widen(codes) : Int8::widen(codes, count);
  }
  static void in_order(__m256i (&w)[2]) {
    const __m256i first = _mm256_permute2x128_si256(w[0], w[1], 0x20);
    w[1] = _mm256_permute2x128_si256(w[0], w[1], 0x31), w[0] = first;
  }
};

// Codes of probabilities times codes of values.
struct WeightedUnit : Int8Unit, PairedCodes {
  static constexpr int64_t kCodeBytes = 2;
  static void store_codes(char* to, __m256 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), Vec::narrowed(_mm256_cvtps_epi32(v)));
  }
};

// Products of 16-bit fixed-point numbers and codes, accumulated in int32.
struct Fixed : Int8 {
  using Kept = Fixed;
  using X = int16_t;
  static XV load_x(const X* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
  static XV load_x(const X* x, int count) {
    alignas(32) X first[kStep] = {};
    memcpy(first, x, count * sizeof(X));
    return load_x(first);
  }
};

struct FixedUnit : Fixed, PairedCodes {
  static constexpr int64_t kElements = 2;
  static constexpr bool kFixed = true;
  static __m256i product(__m256i sums, __m256i x, __m256i w) { return dot(sums, x, w); }
  static __m256i rounded(const __m256 (&v)[kElements]) {
    const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
    return _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
  }
};

template <Float type>
using LinearFloat = DotLinear<Vec, Fp32<type>>;
using LinearInt8 = DotLinear<Vec, Int8>;

template <class Unit, class Dot>
using AttentionOf = FloatAttention<Unit, FewQueries<Unit, Dot>>;

}  // namespace

extern constexpr Kernels avx2_kernels = [] {
  Kernels kernels = kernels_of<Vec>("avx2", linear<LinearFloat<Float::f32>, OuterLinear<Fp32Unit<Float::f32>>>,
                                    linear<LinearFloat<Float::bf16>, OuterLinear<Fp32Unit<Float::bf16>>>,
                                    linear<LinearFloat<Float::f16>, OuterLinear<Fp32Unit<Float::f16>>>,
                                    linear<LinearInt8, OuterLinear<Int8Unit>>);
  // Where torch has wider vectors, only so few rows that memory bounds both.
  kernels.float_linear_of[0] = {64, 8, linear_kernels<DotLinear<Vec, WithFloats<Fp32<Float::f32>>>>};
  kernels.float_linear_of[1] = {kAnyNumber, 16, linear_kernels<DotLinear<Vec, WithFloats<Fp32<Float::bf16>>>>};
  kernels.float_linear_of[2] = {kAnyNumber, kAnyNumber, linear_kernels<DotLinear<Vec, WithFloats<Fp32<Float::f16>>>>};
  kernels.convolution_of[0] = &convolution<OuterConvolution<Fp32Unit<Float::f32>, Single<Float::f32>>>;
  kernels.convolution_of[1] = &convolution<OuterConvolution<Fp32Unit<Float::bf16>, Single<Float::bf16>>>;
  kernels.convolution_of[2] = &convolution<OuterConvolution<Fp32Unit<Float::f16>, Single<Float::f16>>>;
  kernels.narrow_convolution_of[0] = &narrow_convolution<NarrowKernel<Single<Float::f32>, Eight, Eight>>;
  kernels.narrow_convolution_of[1] = &narrow_convolution<NarrowKernel<Single<Float::bf16>, Eight, Eight>>;
  kernels.narrow_convolution_of[2] = &narrow_convolution<NarrowKernel<Single<Float::f16>, Eight, Eight>>;
  kernels.int8_attention = &attention<Int8Attention<Int8Unit, WeightedUnit>>;
  kernels.int8_attention_of_few = &attention_in_parts<FewInt8Queries<Int8Unit, WeightedUnit>>;
  kernels.float_attention_of[0] = {kAnyNumber,
                                   &attention<AttentionOf<Fp32Unit<Float::f32>, WithFloats<Fp32<Float::f32>>>>};
  kernels.float_attention_of[1] = {kAnyNumber,
                                   &attention<AttentionOf<Fp32Unit<Float::bf16>, WithFloats<Fp32<Float::bf16>>>>};
  kernels.float_attention_of[2] = {kAnyNumber,
                                   &attention<AttentionOf<Fp32Unit<Float::f16>, WithFloats<Fp32<Float::f16>>>>};
  kernels.attention_of_codes_of[0] = &attention<AttentionOf<Fp32Unit<Float::f32>, Fp32<Float::f32>>>;
  kernels.attention_of_codes_of[1] = &attention<FloatAttention<Fp32Unit<Float::bf16>, FewQueries<FixedUnit, Fixed>>>;
  kernels.attention_of_codes_of[2] = &attention<FloatAttention<Fp32Unit<Float::f16>, FewQueries<FixedUnit, Fixed>>>;
  return kernels;
}();

}  // namespace octavo

#pragma GCC pop_options

#endif  // x86-64
