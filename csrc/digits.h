// A row of x as tiles multiply it: int8 codes as they are, bf16 in the order of looked-up codes (avx512.h), or floats
// as int8 digits.
//
// Digits let the int8 products of the tile unit serve floats, too. A row becomes fixed-point numbers, and these are cut
// into signed digits in base 256. The unit of the fixed-point numbers is a power of two, so small that the largest
// magnitude of the row takes all bits but one: with three digits, it is 2^-22 of that magnitude rounded up to a power
// of two. A value of bf16 within 2^14 of the row's largest is exact, and a smaller one is off by half a unit at most.
// Products of digits and codes, and their sums, are exact in int32; the sums of all digits are combined in fp32.
//
// Each kind of row has
//     kVectors     vectors of 64 bytes that 64 values become
//     kDigits      digits of a value, each in a vector of its own; if it is 1, vectors follow each other along K
//     kSize        bytes of a value
//     is_finite    false if the row has NaN or inf, which have no digits
//     of           the first `count` of 64 values, padded with zeros
//
// Included by amx.cpp after its target pragma.
#pragma once

namespace octavo {
namespace {

// A row of which nothing needs to be known in advance.
struct PlainRow {
  PlainRow() = default;
  PlainRow(const char*, int64_t) {}
  bool is_finite() const { return true; }
};

struct CodeRow : PlainRow {
  using PlainRow::PlainRow;
  static constexpr int kVectors = 1, kDigits = 1;
  static constexpr int64_t kSize = 1;
  OCTAVO_INLINE void of(const char* x, int count, __m512i (&v)[kVectors]) const {
    v[0] = _mm512_maskz_loadu_epi8(first_bytes(count), x);
  }
};

struct Bf16Row : PlainRow {
  using PlainRow::PlainRow;
  static constexpr int kVectors = 2, kDigits = 1;
  static constexpr int64_t kSize = 2;
  OCTAVO_INLINE void of(const char* x, int count, __m512i (&v)[kVectors]) const {
    const __m512i front = _mm512_maskz_loadu_epi8(first_bytes(2 * count), x);
    const __m512i back = count > 32 ? _mm512_maskz_loadu_epi8(first_bytes(2 * count - 64), x + 64) : Vec::zeros();
    const Halves both = halves(front, back);
    v[0] = both.first, v[1] = both.second;
  }
};

template <Float kType, int kCount>
struct DigitRow {
  static constexpr int kVectors = kCount, kDigits = kCount;
  static constexpr int64_t kSize = size_of(kType);

  float shift;  // a value's fixed-point number is value * 2^shift

  DigitRow() = default;
  DigitRow(const char* x, int64_t K) {
    const float largest = RowKernels<Vec>::amax_of(x, kType, K);
    finite_ = std::isfinite(largest);
    shift = finite_ && largest > 0 ? 8 * kDigits - 3 - std::ilogb(largest) : 0;
  }

  bool is_finite() const { return finite_; }

  OCTAVO_INLINE void of(const char* x, int count, __m512i (&digits)[kVectors]) const {
    __m512i fixed[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const char* const at = x + i * Vec::kLanes * kSize;
      const int there = count - i * Vec::kLanes;
      const __m512 v = there >= Vec::kLanes ? Vec::load(at, kType)
                       : there > 0          ? Vec::load(at, kType, there)
                                            : _mm512_setzero_ps();
      const __m512i units = _mm512_cvtps_epi32(Vec::times_two_to(v, Vec::set1(shift)));
      fixed[i] = _mm512_add_epi32(units, _mm512_set1_epi32(static_cast<int>(0x80808080)));
    }
    // The bytes of that sum are the digits plus 128.
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i lowest =
        _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10101010)), _mm512_set1_epi32(0x0c080400));
#pragma GCC unroll 4
    for (int d = 0; d < kDigits; d++) {
      const __m512i at = _mm512_add_epi8(lowest, _mm512_set1_epi8(static_cast<char>(d)));
      const __m512i front = _mm512_permutex2var_epi8(fixed[0], at, fixed[1]);
      const __m512i back = _mm512_permutex2var_epi8(fixed[2], at, fixed[3]);
      digits[d] = _mm512_xor_si512(_mm512_inserti64x4(front, _mm512_castsi512_si256(back), 1), _mm512_set1_epi8(-128));
    }
  }

 private:
  bool finite_;
};

// The sums of all digits, `sums(d)` for digit d, combined in units of the fixed-point numbers.
template <int kDigits, class Sums>
OCTAVO_INLINE __m512 together(const Sums& sums) {
  __m512 total = sums(kDigits - 1);
#pragma GCC unroll 4
  for (int d = kDigits - 2; d >= 0; d--) total = _mm512_fmadd_ps(total, _mm512_set1_ps(256.0f), sums(d));
  return total;
}

}  // namespace
}  // namespace octavo
