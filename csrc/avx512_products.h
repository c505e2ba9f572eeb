// The products of AVX-512: as dot products (dot_linear.h), and in units of 4 bytes for outer products (outer_linear.h)
// and for attention (attention_rows.h, int8_rows.h).
//
// Included by a translation unit after its target pragma, like avx512.h and dot_linear.h.
#pragma once

namespace octavo {
namespace {

struct Bf16Kept;

// Products of pairs of bf16, accumulated in fp32. A code is exact in bf16.
struct Bf16 : FloatSums {
  using Kept = Bf16Kept;
  using X = uint16_t;
  using W = int8_t;
  using XV = __m512i;
  using WV = __m512i;
  static constexpr int kStep = 32;
  static XV load_x(const X* x) { return _mm512_loadu_si512(x); }
  static XV load_x(const X* x, int count) { return _mm512_maskz_loadu_epi16(mask32(count), x); }
  static WV load_w(const W* w) { return widened_to_bf16(w); }
  static WV load_w(const W* w, int count) { return widened_to_bf16(w, count); }
  static void keep(uint16_t* kept, WV w) { _mm512_storeu_si512(kept, w); }
  static Acc dot(Acc acc, XV x, WV w) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
    return acc;
  }
};

struct Bf16Kept : Bf16 {
  using W = uint16_t;
  static WV load_w(const W* w) { return _mm512_loadu_si512(w); }
  static WV load_w(const W* w, int) { return load_w(w); }
};

// The same with twice as many elements in a step, in the order that looking up gives (`Halves`). There are no registers
// for more rows.
struct Bf16Codes : Bf16 {
  using Kept = Bf16Codes;
  using XV = Halves;
  using WV = Halves;
  static constexpr int kStep = 64;
  static constexpr int kTileM = 4;
  static XV load_x(const X* x) { return halves(_mm512_loadu_si512(x), _mm512_loadu_si512(x + 32)); }
  static XV load_x(const X* x, int count) {
    const int front = count < 32 ? count : 32;
    return halves(_mm512_maskz_loadu_epi16(mask32(front), x), _mm512_maskz_loadu_epi16(mask32(count - front), x + 32));
  }
  static WV load_w(const W* w) { return looked_up(_mm512_loadu_si512(w)); }
  static WV load_w(const W* w, int count) { return looked_up(_mm512_maskz_loadu_epi8(mask64(count), w)); }
  static Acc dot(Acc acc, XV x, WV w) { return Bf16::dot(Bf16::dot(acc, x.first, w.first), x.second, w.second); }
};

// Products of codes, accumulated in int32. The instruction takes one unsigned operand: W + 128.
struct Int8 : CodeSums {
  using Kept = Int8;
  static constexpr int kStep = 64;
  static constexpr int kTileM = 6;
  static constexpr int32_t kOffset = 128;
  static WV unsign(__m512i codes) { return _mm512_xor_si512(codes, _mm512_set1_epi8(-128)); }
  static XV load_x(const X* x) { return _mm512_loadu_si512(x); }
  static XV load_x(const X* x, int count) { return _mm512_maskz_loadu_epi8(mask64(count), x); }
  static WV load_w(const W* w) { return unsign(_mm512_loadu_si512(w)); }
  static WV load_w(const W* w, int count) { return unsign(_mm512_maskz_loadu_epi8(mask64(count), w)); }
  static Acc dot(Acc acc, XV x, WV w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
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

// Interleaves two rows of 32 columns of 16 bits into pairs. In each 128 bits, w[0] has four columns and w[1] the next.
OCTAVO_INLINE void interleave(__m512i first, __m512i second, __m512i (&w)[2]) {
  w[0] = _mm512_unpacklo_epi16(first, second), w[1] = _mm512_unpackhi_epi16(first, second);
}
OCTAVO_INLINE void pairs_in_order(__m512i (&w)[2]) {
  const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512i first = _mm512_permutex2var_epi64(w[0], front, w[1]);
  w[1] = _mm512_permutex2var_epi64(w[0], back, w[1]), w[0] = first;
}

// The same in units of two and of four elements, for outer products.
struct Bf16Unit : Bf16 {
  static constexpr int64_t kElements = 2;
  static __m512i product(__m512i sums, __m512i x, __m512i w) {
    return _mm512_castps_si512(dot(_mm512_castsi512_ps(sums), x, w));
  }
  template <class T>
  OCTAVO_INLINE static void strip(const T* const (&rows)[kElements], int count, __m512i (&w)[2]) {
    const __m512i first = load(rows[0], count), second = rows[1] ? load(rows[1], count) : Vec::zeros();
    interleave(first, second, w);
  }
  static void in_order(__m512i (&w)[2]) { pairs_in_order(w); }
  static __m512i load(const X* x, int count) { return load_x(x, count); }
  static __m512i load(const int8_t* codes, int count) { return load_w(codes, count); }
  static __m512i rounded(const __m512 (&v)[kElements]) { return (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]); }
};

struct Int8Unit : Int8 {
  static constexpr int64_t kElements = 4;
  static constexpr int64_t kManyRows = 193;
  static __m512i product(__m512i sums, __m512i x, __m512i w) { return dot(sums, x, w); }
};

// Products of 16-bit fixed-point numbers and codes, accumulated in int32.
struct Fixed : CodeSums {
  using Kept = Fixed;
  using X = int16_t;
  static constexpr int kStep = 32;
  static constexpr int kTileM = 6;
  static XV load_x(const X* x) { return _mm512_loadu_si512(x); }
  static XV load_x(const X* x, int count) { return _mm512_maskz_loadu_epi16(mask32(count), x); }
  static WV load_w(const W* w) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))); }
  static WV load_w(const W* w, int count) { return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask32(count), w)); }
  static Acc dot(Acc acc, XV x, WV w) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
    return acc;
  }
};

struct FixedUnit : Fixed {
  static constexpr int64_t kElements = 2;
  static constexpr bool kFixed = true;
  static __m512i product(__m512i sums, __m512i x, __m512i w) { return dot(sums, x, w); }
  OCTAVO_INLINE static void strip(const int8_t* const (&rows)[kElements], int count, __m512i (&w)[2]) {
    interleave(load_w(rows[0], count), rows[1] ? load_w(rows[1], count) : Vec::zeros(), w);
  }
  static void in_order(__m512i (&w)[2]) { pairs_in_order(w); }
  static __m512i rounded(const __m512 (&v)[kElements]) {
    const __m256i first = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v[0]));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v[1])), 1);
  }
};

// Codes of probabilities, which are the unsigned operand, times codes of values.
struct WeightedUnit {
  using X = int8_t;
  using Sum = int32_t;
  static constexpr int64_t kElements = 4;
  static constexpr int64_t kCodeBytes = 1;
  static __m512i product(__m512i sums, __m512i x, __m512i w) { return Int8::dot(sums, w, x); }
  static void store_codes(char* to, __m512 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  OCTAVO_INLINE static void strip(const int8_t* const (&rows)[kElements], int count, __m512i (&w)[2]) {
    const __mmask32 there = mask32(count);
    const auto row = [&](int i) { return rows[i] ? _mm256_maskz_loadu_epi8(there, rows[i]) : _mm256_setzero_si256(); };
    const __m512i front = _mm512_inserti64x4(_mm512_castsi256_si512(row(0)), row(1), 1);
    const __m512i back = _mm512_inserti64x4(_mm512_castsi256_si512(row(2)), row(3), 1);
    // Column c of all four rows: bytes c and 32 + c of `front`, then of `back`, whose bytes count from 64 on.
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i first =
        _mm512_add_epi32(_mm512_set1_epi32(0x60402000), _mm512_mullo_epi32(lane, _mm512_set1_epi32(0x01010101)));
    w[0] = _mm512_permutex2var_epi8(front, first, back);
    w[1] = _mm512_permutex2var_epi8(front, _mm512_add_epi8(first, _mm512_set1_epi8(16)), back);
  }
  static void in_order(__m512i (&)[2]) {}
};

}  // namespace
}  // namespace octavo
