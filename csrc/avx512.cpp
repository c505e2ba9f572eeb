// AVX-512 with VBMI, VNNI and BF16: thirty-two registers of sixteen fp32, and instructions for products of pairs of
// bf16 and of four bytes (avx512_products.h).

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
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16")

#include "rows.h"

#include "avx512.h"

#include "dot_linear.h"

#include "fp32.h"

#include "avx512_products.h"

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

// Two elements of an image in bf16. Codes come in fp32, whose lower halves are zero: the upper ones are bf16.
struct Pair {
  static constexpr int kElements = 2;
  static constexpr int64_t kBytes = 2;
  static __m512i unit(__m512i first, __m512i second) { return _mm512_or_si512(first, _mm512_slli_epi32(second, 16)); }
  static uint32_t unit_of_codes(uint32_t first, uint32_t second) { return first >> 16 | second; }
  template <class Of>
  static typename Of::Sums product(typename Of::Sums sums, typename Of::Units x, uint32_t w) {
    return multiplied(sums, x, static_cast<int>(w));
  }

 private:
  static __m512 multiplied(__m512 sums, __m512i x, int w) {
    return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)_mm512_set1_epi32(w));
  }
  static __m256 multiplied(__m256 sums, __m256i x, int w) {
    return _mm256_dpbf16_ps(sums, (__m256bh)x, (__m256bh)_mm256_set1_epi32(w));
  }
};

// The accumulator of a vector of sixteen windows.
struct Sixteen {
  using Sums = __m512;
  using Units = __m512i;
  static constexpr int kWindows = 16;
  static Sums zero() { return _mm512_setzero_ps(); }
  static Units load(const uint32_t* units) { return _mm512_loadu_si512(units); }
  static Units firsts(Units units) { return _mm512_and_si512(units, _mm512_set1_epi32(0xffff)); }
  static Sums multiply_add(Sums sums, Units x, int w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(_mm512_set1_epi32(w)), sums);
  }
  static Vec::F whole(Sums sums) { return sums; }
};

using LinearF32 = DotLinear<Vec, Fp32<Float::f32>>;
using LinearF16 = DotLinear<Vec, Fp32<Float::f16>>;
using LinearBf16 = Either<DotLinear<Vec, Bf16Codes>, DotLinear<Vec, Bf16>>;
using LinearInt8 = DotLinear<Vec, Int8>;

template <class Unit, class Dot>
using AttentionOf = FloatAttention<Unit, FewQueries<Unit, Dot>>;
using ManyRowsF32 = OuterLinear<Fp32Unit<Float::f32>>;
using ManyRowsF16 = OuterLinear<Fp32Unit<Float::f16>>;
using ManyRowsBf16 = OuterLinear<Bf16Unit>;
using ManyRowsInt8 = OuterLinear<Int8Unit>;

}  // namespace

extern constexpr Kernels avx512_kernels = [] {
  Kernels kernels = kernels_of<Vec>("avx512", linear<LinearF32, ManyRowsF32>, linear<LinearBf16, ManyRowsBf16>,
                                    linear<LinearF16, ManyRowsF16>, linear<LinearInt8, ManyRowsInt8>);
  kernels.convolution_of[0] = &convolution<OuterConvolution<Fp32Unit<Float::f32>, Single<Float::f32>>>;
  kernels.convolution_of[1] = &convolution<OuterConvolution<Bf16Unit, Pair>>;
  kernels.convolution_of[2] = &convolution<OuterConvolution<Fp32Unit<Float::f16>, Single<Float::f16>>>;
  kernels.narrow_convolution_of[0] = &narrow_convolution<NarrowKernel<Single<Float::f32>, Sixteen, Eight>>;
  kernels.narrow_convolution_of[1] = &narrow_convolution<NarrowKernel<Pair, Sixteen, Eight>>;
  kernels.narrow_convolution_of[2] = &narrow_convolution<NarrowKernel<Single<Float::f16>, Sixteen, Eight>>;
  kernels.int8_attention = &attention<Int8Attention<Int8Unit, WeightedUnit>>;
  kernels.int8_attention_of_few = &attention_in_parts<FewInt8Queries<Int8Unit, WeightedUnit>>;
  kernels.float_attention_of[0] = {kAnyNumber,
                                   &attention<AttentionOf<Fp32Unit<Float::f32>, WithFloats<Fp32<Float::f32>>>>};
  kernels.float_attention_of[1] = {kAnyNumber, &attention<AttentionOf<Bf16Unit, WithFloats<Bf16>>>};
  kernels.float_attention_of[2] = {kAnyNumber,
                                   &attention<AttentionOf<Fp32Unit<Float::f16>, WithFloats<Fp32<Float::f16>>>>};
  kernels.attention_of_codes_of[0] = &attention<AttentionOf<Fp32Unit<Float::f32>, Fp32<Float::f32>>>;
  kernels.attention_of_codes_of[1] = &attention<FloatAttention<Bf16Unit, FewQueries<FixedUnit, Fixed>>>;
  kernels.attention_of_codes_of[2] = &attention<FloatAttention<Fp32Unit<Float::f16>, FewQueries<FixedUnit, Fixed>>>;
  kernels.float_linear_of[0] = {64, 64, linear_kernels<DotLinear<Vec, WithFloats<Fp32<Float::f32>>>>};
  kernels.float_linear_of[1] = {24, 24, linear_kernels<DotLinear<Vec, WithFloats<Bf16>>>};
  kernels.float_linear_of[2] = {kAnyNumber, kAnyNumber, linear_kernels<DotLinear<Vec, WithFloats<Fp32<Float::f16>>>>};
  return kernels;
}();

}  // namespace octavo

#pragma GCC pop_options

#endif  // x86-64
