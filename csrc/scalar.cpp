// One value at a time, in plain C++: correct on any processor, and the definition of what the vectors of every other
// file compute.

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#include "rows.h"

#include "dot_linear.h"

namespace octavo {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// `bits` without the last `drop` of them, rounded half to even.
inline uint32_t rounded_shift(uint32_t bits, int drop) {
  const uint32_t below_half = (1u << (drop - 1)) - 1;
  return (bits + below_half + ((bits >> drop) & 1)) >> drop;
}

// bf16 is the upper half of fp32.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return static_cast<uint16_t>((bits | 0x400000) >> 16);
  return static_cast<uint16_t>(rounded_shift(bits, 16));
}

// fp16 has 5 bits of exponent, biased by 15 where fp32's 8 are biased by 127, and 10 bits of fraction instead of 23.
inline float from_f16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000u | (magnitude << 13));  // inf, NaN
  if (magnitude < 0x0400) {                                                          // subnormal: counts 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return float_of(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

inline uint16_t to_f16(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u, magnitude = bits_of(value) & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u)
    half = 0x7e00 | ((magnitude >> 13) & 0x1ff);  // NaN
  else if (magnitude >= bits_of(65520.0f))        // halfway between the largest fp16 and 2^16
    half = 0x7c00;
  else if (magnitude >= bits_of(0x1p-14f))
    half = rounded_shift(magnitude - ((127u - 15u) << 23), 13);  // a carry out of the fraction raises the exponent
  else  // subnormal: next to 0.5, fp32 rounds to multiples of 2^-24; and 0.5 has no bits in its fraction
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  return static_cast<uint16_t>(sign | half);
}

struct Vec {
  static constexpr int kLanes = 1;
  using F = float;

  static F set1(float value) { return value; }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }

  static F load(const void* p, Float type) {
    if (type == Float::f32) {
      float value;
      memcpy(&value, p, sizeof value);
      return value;
    }
    uint16_t half;
    memcpy(&half, p, sizeof half);
    return type == Float::bf16 ? float_of(static_cast<uint32_t>(half) << 16) : from_f16(half);
  }
  static F load(const void* p, Float type, int) { return load(p, type); }

  static void store(void* p, Float type, int, F v) {
    if (type == Float::f32) {
      memcpy(p, &v, sizeof v);
      return;
    }
    const uint16_t half = type == Float::bf16 ? to_bf16(v) : to_f16(v);
    memcpy(p, &half, sizeof half);
  }

  static F rounded(F v, Float type) {
    store(&v, type, 1, v);
    return load(&v, type);
  }

  // As integers, magnitudes have the same order, and NaN is the largest.
  static F largest(F sofar, F x) {
    const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
    return magnitude > bits_of(sofar) ? float_of(magnitude) : sofar;
  }
  static float total(F v) { return v; }
  static float across(F v) { return v; }

  // By e = e^-|z|, which cannot overflow.
  static F sigmoid(F z) {
    const float e = std::exp(-std::fabs(z));
    return (z >= 0 ? 1.0f : e) / (1.0f + e);
  }

  static F tanh(F x) { return std::tanh(x); }

  struct Divisor {
    float scale;
    explicit Divisor(float s) : scale(s) {}
  };

  static void store_codes(int8_t* codes, F x, const Divisor& by) {
    const float divided = x / by.scale, quotient = divided == divided ? divided : 0;  // the code of NaN is 0
    const float below = quotient < kQmax ? quotient : kQmax;
    const float bounded = below > -kQmax ? below : -kQmax;
    constexpr float kNoFraction =
        0x1.8p23f;  // next to it, fp32 has no bits for a fraction: the sum is rounded, half to even
    *codes = static_cast<int8_t>((bounded + kNoFraction) - kNoFraction);
  }
  static void store_codes(int8_t* codes, F x, const Divisor& by, int) { store_codes(codes, x, by); }

  static F load_codes(const int8_t* codes) { return *codes; }
  static F load_codes(const int8_t* codes, int) { return *codes; }

  static F from_sums(const float* sums, int32_t) { return *sums; }
  static F from_sums(const int32_t* sums, int32_t) { return static_cast<float>(*sums); }
};

// x86-64 has sixteen registers for floats, and sixteen for integers and addresses together: a tile of int32 sums has
// half as many rows.
template <class X_, class Sum_>
struct Product {
  using X = X_;
  using Stored = int8_t;
  using W = int8_t;
  using Sum = Sum_;
  using XV = Sum;
  using WV = Sum;
  using Acc = Sum;
  static constexpr int kStep = 1;
  static constexpr int kTileM = std::is_same<Sum, float>::value ? 2 : 1;
  static constexpr int32_t kOffset = 0;
  static constexpr bool kGroups = std::is_same<Sum, float>::value;
  static WV load_w(const W* w) { return *w; }
  static WV load_w(const W* w, int) { return *w; }
  static Acc zero() { return 0; }
  static Acc dot(Acc acc, XV x, WV w) { return acc + x * w; }
  static Acc scaled_add(Acc total, Acc partial, float scale) { return total + partial * scale; }
  static void store4(Acc a, Acc b, Acc c, Acc d, Sum* sums, bool add) {
    const Sum four[4] = {a, b, c, d};
    for (int j = 0; j < 4; j++) sums[j] = add ? sums[j] + four[j] : four[j];
  }
};

template <Float type>
struct Fp32 : Product<std::conditional_t<type == Float::f32, float, uint16_t>, float> {
  using Kept = Fp32;
  using X = std::conditional_t<type == Float::f32, float, uint16_t>;
  static float load_x(const X* x) { return Vec::load(x, type); }
  static float load_x(const X* x, int) { return load_x(x); }
};

struct Int8 : Product<int8_t, int32_t> {
  using Kept = Int8;
  static int32_t load_x(const int8_t* x) { return *x; }
  static int32_t load_x(const int8_t* x, int) { return *x; }
};

template <Float type>
using LinearFloat = DotLinear<Vec, Fp32<type>>;
using LinearInt8 = DotLinear<Vec, Int8>;

}  // namespace

extern constexpr Kernels scalar_kernels =
    kernels_of<Vec>("scalar", linear_kernels<LinearFloat<Float::f32>>, linear_kernels<LinearFloat<Float::bf16>>,
                    linear_kernels<LinearFloat<Float::f16>>, linear_kernels<LinearInt8>);

}  // namespace octavo
