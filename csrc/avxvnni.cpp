// AVX-VNNI: AVX2, and the instruction for products of bytes that AVX-512 has (vpdpbusd), on processors that may have no
// AVX-512: Intel's from Alder Lake on. It computes products of codes with codes, in linear layers and in attention; all
// else is AVX2's.
//
// If OCTAVO_EMULATED_VNNI is defined, the instruction is composed of AVX2's, so that tests run this on any processor.

#if defined(__x86_64__)

#include <immintrin.h>

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

#include "outer_linear.h"

#include "mask.h"

#include "softmax.h"

#include "heads.h"

#include "value_strips.h"

#include "int8_rows.h"

#include "int8_attention.h"

#include "few_int8_queries.h"

namespace octavo {
namespace {

// sums + products of four bytes each, where those of `a` are unsigned.
#if defined(OCTAVO_EMULATED_VNNI)
inline __m256i dot_bytes(__m256i sums, __m256i a, __m256i b) {
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
}
constexpr const char* kName = "avxvnni, emulated";
#else
inline __m256i dot_bytes(__m256i sums, __m256i a, __m256i b) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(a), "xm"(b));
  return sums;
}
constexpr const char* kName = "avxvnni";
#endif

// The first `bytes` of 32, padded with zeros.
inline __m256i load_first_of_32(const int8_t* p, int bytes) {
  if (bytes < 16) return _mm256_castsi128_si256(load_first(p, bytes));
  return _mm256_setr_m128i(load16(p), load_first(p + 16, bytes - 16));
}

// Products of codes, accumulated in int32. W is the unsigned operand: W + 128.
struct Int8 : CodeSums {
  using Kept = Int8;
  static constexpr int kStep = 32;
  static constexpr int kTileM = 2;  // W takes four registers
  static constexpr int32_t kOffset = 128;
  static WV unsign(__m256i codes) { return _mm256_xor_si256(codes, _mm256_set1_epi8(-128)); }
  static XV load_x(const X* x) { return Vec::load_units(x); }
  static XV load_x(const X* x, int count) { return load_first_of_32(x, count); }
  static WV load_w(const W* w) { return unsign(Vec::load_units(w)); }
  static WV load_w(const W* w, int count) { return unsign(load_first_of_32(w, count)); }
  static Acc dot(Acc acc, XV x, WV w) { return dot_bytes(acc, w, x); }
  static int32_t sum_x(const X* x, int64_t K) {
    const __m256i ones = _mm256_set1_epi8(1);
    __m256i sum = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + kStep <= K; k += kStep) sum = dot_bytes(sum, ones, load_x(x + k));
    if (k < K) sum = dot_bytes(sum, ones, load_x(x + k, static_cast<int>(K - k)));
    int32_t four[4];
    store4(sum, zero(), zero(), zero(), four, false);
    return four[0];
  }
};

// The same in units of four, for outer products.
struct Int8Unit : Int8 {
  static constexpr int64_t kElements = 4;
  static constexpr int64_t kManyRows = 193;
  static __m256i product(__m256i sums, __m256i x, __m256i w) { return dot(sums, x, w); }
};

// Codes of probabilities, which are the unsigned operand, times codes of values.
struct WeightedUnit {
  using X = int8_t;
  using Sum = int32_t;
  static constexpr int64_t kElements = 4;
  static constexpr int64_t kCodeBytes = 1;
  static __m256i product(__m256i sums, __m256i x, __m256i w) { return dot_bytes(sums, x, w); }
  static void store_codes(char* to, __m256 v) {
    const __m128i codes = Vec::narrowed(_mm256_cvtps_epi32(v));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(codes, codes));
  }
  OCTAVO_INLINE static void strip(const int8_t* const (&rows)[kElements], int count, __m256i (&w)[2]) {
    const auto row = [&](int i) {
      return !rows[i] ? _mm_setzero_si128() : count < 16 ? load_first(rows[i], count) : load16(rows[i]);
    };
    const __m128i r0 = row(0), r1 = row(1), r2 = row(2), r3 = row(3);
    const __m128i front01 = _mm_unpacklo_epi8(r0, r1), front23 = _mm_unpacklo_epi8(r2, r3);
    const __m128i back01 = _mm_unpackhi_epi8(r0, r1), back23 = _mm_unpackhi_epi8(r2, r3);
    w[0] = _mm256_setr_m128i(_mm_unpacklo_epi16(front01, front23), _mm_unpackhi_epi16(front01, front23));
    w[1] = _mm256_setr_m128i(_mm_unpacklo_epi16(back01, back23), _mm_unpackhi_epi16(back01, back23));
  }
  static void in_order(__m256i (&)[2]) {}
};

// What differs from the table of AVX2.
constexpr LinearKernels kInt8Linear = linear<DotLinear<Vec, Int8>, OuterLinear<Int8Unit>>;
constexpr const AttentionKernels* kInt8Attention = &attention<Int8Attention<Int8Unit, WeightedUnit>>;
constexpr const AttentionKernels* kInt8AttentionOfFew = &attention_in_parts<FewInt8Queries<Int8Unit, WeightedUnit>>;

}  // namespace
}  // namespace octavo

#pragma GCC pop_options

// Compiled for any processor, since it runs when the library is loaded.
namespace octavo {

extern const Kernels avxvnni_kernels = [] {
  Kernels kernels = avx2_kernels;
  kernels.isa = kName;
  kernels.w8a8 = kInt8Linear;
  kernels.int8_attention = kInt8Attention;
  kernels.int8_attention_of_few = kInt8AttentionOfFew;
  return kernels;
}();

}  // namespace octavo

#endif  // x86-64
