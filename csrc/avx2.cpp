// AVX2 with FMA and F16C: sixteen registers of eight fp32. No instruction multiplies bf16, or bytes without saturation,
// so activations and codes are widened: to fp32, and codes that meet codes to 16 bits.

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "rows.h"

#include "avx2.h"

#include "dot_linear.h"

#include "outer_linear.h"

#include "units.h"

#include "convolution.h"

#include "narrow_convolution.h"

#include "mask.h"

#include "softmax.h"

#include "heads.h"

#include "int8_attention.h"

#include "float_attention.h"

namespace octavo {
namespace {

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
    const __m256 v = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    _mm_storeu_ps(sums, add ? _mm_add_ps(four, _mm_loadu_ps(sums)) : four);
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
  static void store4(Acc a, Acc b, Acc c, Acc d, int32_t* sums, bool add) { store_across4(a, b, c, d, sums, add); }
};

struct Int8Kept : Int8 {
  using W = int16_t;
  static WV load_w(const W* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }
  static WV load_w(const W* w, int) { return load_w(w); }
};

// The same one by one and in pairs, for outer products.
template <Float type>
struct Fp32Unit : Fp32<type> {
  using typename Fp32<type>::X;
  static constexpr int64_t kElements = 1;
  static constexpr int64_t kManyRows = 81;
  static constexpr int64_t kManyRowsOfGroups = 49;
  template <class... Count>
  static __m256i load_x(const X* x, Count... count) {
    return Vec::units(Fp32<type>::load_x(x, count...));
  }
  template <class... Count>
  static __m256i load_w(const int8_t* w, Count... count) {
    return Vec::units(Fp32<type>::load_w(w, count...));
  }
  static __m256i product(__m256i sums, __m256i x, __m256i w) {
    return Vec::units(Fp32<type>::dot(Vec::floats(sums), Vec::floats(x), Vec::floats(w)));
  }
  static __m256i beside(const X* const (&rows)[kElements], int count) { return load_x(rows[0], count); }
  static __m256i rounded(const __m256 (&v)[kElements]) { return Vec::units(v[0]); }
};

struct Int8Unit : Int8 {
  static constexpr int64_t kElements = 2;
  static constexpr int64_t kManyRows = 129;
  static __m256i product(__m256i sums, __m256i x, __m256i w) { return dot(sums, x, w); }
};

// Codes of probabilities times codes of values.
struct WeightedUnit : Int8Unit {
  static constexpr int64_t kCodeBytes = 2;
  static void store_codes(char* to, __m256 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), Vec::narrowed(_mm256_cvtps_epi32(v)));
  }
  static __m256i beside(const int8_t* codes, int64_t width) {
    const auto row = [&](int i) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i * width)); };
    return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(row(0), row(1)));
  }
};

template <Float type>
using LinearFloat = DotLinear<Vec, Fp32<type>>;
using LinearInt8 = DotLinear<Vec, Int8>;

}  // namespace

extern constexpr Kernels avx2_kernels = [] {
  Kernels kernels = kernels_of<Vec>("avx2", linear<LinearFloat<Float::f32>, OuterLinear<Fp32Unit<Float::f32>>>,
                                    linear<LinearFloat<Float::bf16>, OuterLinear<Fp32Unit<Float::bf16>>>,
                                    linear<LinearFloat<Float::f16>, OuterLinear<Fp32Unit<Float::f16>>>,
                                    linear<LinearInt8, OuterLinear<Int8Unit>>);
  // Next to wider ones so few that memory bounds both.
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
  kernels.float_attention_of[0] = &attention<FloatAttention<Fp32Unit<Float::f32>>>;
  kernels.float_attention_of[1] = &attention<FloatAttention<Fp32Unit<Float::bf16>>>;
  kernels.float_attention_of[2] = &attention<FloatAttention<Fp32Unit<Float::f16>>>;
  return kernels;
}();

}  // namespace octavo

#pragma GCC pop_options

#endif  // x86-64
