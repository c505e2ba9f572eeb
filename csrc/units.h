// The units of 4 bytes in which convolutions multiply: an element of an image in fp32, or two in bf16.
//
// Included by a translation unit after its target pragma, which must name AVX-512 F, BW, VL, DQ and BF16.
#pragma once

namespace octavo {
namespace {

// Lanes [first, end) of a vector.
struct Lanes {
  int first, end;
  template <int kEach = 1>
  uint32_t mask() const {
    return static_cast<uint32_t>((1ull << kEach * end) - (1ull << kEach * first));
  }
};

// Elements 0, 2, 4, ... of four bytes, of those that are in the mask.
OCTAVO_INLINE __m512i every_other(const char* x, uint32_t mask) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i front = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), x);
  return _mm512_permutex2var_epi32(front, even, _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask >> 16), x + 64));
}

// Elements 0, step, 2 step, ... of x, of which only those of `lanes` are there; zeros for the others. Elements of two
// bytes are integers, those of four are as they are.
template <int64_t size>
OCTAVO_INLINE __m512i strided(const void* x, int64_t step, Lanes lanes) {
  const auto of = [&](uint32_t mask) { return static_cast<__mmask16>(mask); };
  if (step == 1 && size == 4) return _mm512_maskz_loadu_epi32(of(lanes.mask()), x);
  if (step == 1) return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(of(lanes.mask()), x));
  const uint32_t spread = lanes.mask<2>() & 0x55555555;
  if (step == 2 && size == 2) return _mm512_maskz_loadu_epi16(spread, x);
  const auto* const from = static_cast<const char*>(x);
  if (step == 2) return every_other(from, spread);
  alignas(64) char together[64] = {};
  for (int i = lanes.first; i < lanes.end; i++) memcpy(together + 4 * i, from + i * step * size, size);
  return _mm512_load_si512(together);
}

// Two elements of bf16; of codes in fp32, whose other halves are zero.
struct Pair {
  static constexpr int kElements = 2;
  static constexpr int64_t kBytes = 2;  // of an element in the image
  static __m512i unit(__m512i first, __m512i second) { return _mm512_or_si512(first, _mm512_slli_epi32(second, 16)); }
  static uint32_t unit_of_codes(uint32_t first, uint32_t second) { return first >> 16 | second; }
  static __m512 product(__m512 sums, __m512i x, uint32_t w) {
    return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)_mm512_set1_epi32(static_cast<int>(w)));
  }
  static __m256 product(__m256 sums, __m256i x, uint32_t w) {
    return _mm256_dpbf16_ps(sums, (__m256bh)x, (__m256bh)_mm256_set1_epi32(static_cast<int>(w)));
  }
};

// One element, of fp16 or fp32, in fp32.
template <Float type>
struct Single {
  static constexpr int kElements = 1;
  static constexpr int64_t kBytes = size_of(type);
  static __m512i unit(__m512i x, __m512i) {
    return type == Float::f32 ? x : _mm512_castps_si512(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)));
  }
  static uint32_t unit_of_codes(uint32_t first, uint32_t) { return first; }
  static __m512 product(__m512 sums, __m512i x, uint32_t w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(w))), sums);
  }
  static __m256 product(__m256 sums, __m256i x, uint32_t w) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(w))), sums);
  }
};

}  // namespace
}  // namespace octavo
