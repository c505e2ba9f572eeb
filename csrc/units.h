// The 4-byte units in which convolutions multiply: one element of an image, widened to fp32, or two in bf16 if there is
// an instruction for pairs (see avx512.cpp).
//
//     kElements, kBytes    elements in a unit, and bytes of an element in the image
//     unit                 a vector of units, from vectors of elements as `Vec::strided` loads them
//     unit_of_codes        a unit of codes, from codes in fp32
//     product              sums + x * w, where `Of` is a vector of windows
//
// Included by a translation unit after its target pragma.
#pragma once

namespace octavo {
namespace {

// One element, in fp32.
template <Float type>
struct Single {
  static constexpr int kElements = 1;
  static constexpr int64_t kBytes = size_of(type);
  static Vec::I unit(Vec::I x, Vec::I) { return type == Float::f32 ? x : Vec::units(Vec::from_integers(x, type)); }
  static uint32_t unit_of_codes(uint32_t first, uint32_t) { return first; }
  template <class Of>
  static typename Of::Sums product(typename Of::Sums sums, typename Of::Units x, uint32_t w) {
    return Of::multiply_add(sums, x, static_cast<int>(w));
  }
};

// The accumulator of a vector of eight windows.
struct Eight {
  using Sums = __m256;
  using Units = __m256i;
  static constexpr int kWindows = 8;
  static Sums zero() { return _mm256_setzero_ps(); }
  static Units load(const uint32_t* units) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(units)); }
  static Units firsts(Units units) { return _mm256_and_si256(units, _mm256_set1_epi32(0xffff)); }
  static Sums multiply_add(Sums sums, Units x, int w) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(_mm256_set1_epi32(w)), sums);
  }
  static Vec::F whole(Sums sums) { return Vec::extended(sums); }
};

}  // namespace
}  // namespace octavo
