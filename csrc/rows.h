// Kernels on rows, for any vector length: floats to int8 codes and back, norms, gates, rotary embeddings, recurrences.
//
//     code = clamp(round_half_even(x / scale), -127, 127)        in fp32, as octavo/primitives.py defines it
//
// The code is 0 if x / scale is NaN: a row that contains inf has scale inf and codes 0, whose product is NaN.
//
// A `V` is a vector of fp32 (see avx512.h):
//     kLanes, F                   its length and its register
//     load, store                 `count` elements of a `Float` type, widened to fp32 or rounded from it
//     rounded                     a value after rounding to a `Float` type
//     set1, add, mul
//     largest                     per lane, the larger of a magnitude so far and |x|; NaN stays
//     across                      the largest of all lanes
//     total                       the sum of all lanes
//     sigmoid                     1 / (1 + e^-z)
//     tanh
//     Divisor                     a scale to divide by; see kNearHalf
//     store_codes                 `count` codes of x / (a Divisor)
//     load_codes                  `count` codes, widened to fp32
//     from_sums                   kLanes sums of a dot product, minus an excess, as fp32
#pragma once

#define OCTAVO_INLINE inline __attribute__((always_inline))

namespace octavo {
namespace {

inline const void* element(const void* base, Float type, int64_t i) {
  return static_cast<const char*>(base) + i * size_of(type);
}
inline void* element(void* base, Float type, int64_t i) { return static_cast<char*>(base) + i * size_of(type); }

constexpr float kQmax = 127.0f;

// x / scale is computed as x * (1 / scale), which is many times faster, and off by less than 2^-15 for quotients up to
// 128. It is divided only if that error could matter: if the product is at least so far from a whole number.
constexpr float kNearHalf = 0.5f - 1.0f / 16384;

template <class V>
struct RowKernels {
  static float amax_of(const void* row, Float type, int64_t K) {
    typename V::F first = V::set1(0), second = first;
    int64_t k = 0;
    for (; k + 2 * V::kLanes <= K; k += 2 * V::kLanes) {
      first = V::largest(first, V::load(element(row, type, k), type));
      second = V::largest(second, V::load(element(row, type, k + V::kLanes), type));
    }
    for (; k < K; k += V::kLanes) {
      const int count = static_cast<int>(K - k < V::kLanes ? K - k : V::kLanes);
      first = V::largest(first, V::load(element(row, type, k), type, count));
    }
    return V::across(V::largest(first, second));
  }

  static void codes_of(const void* row, Float type, int64_t K, float scale, int8_t* codes) {
    const typename V::Divisor by(scale);
    int64_t k = 0;
    for (; k + V::kLanes <= K; k += V::kLanes) V::store_codes(codes + k, V::load(element(row, type, k), type), by);
    if (k < K) {
      const int count = static_cast<int>(K - k);
      V::store_codes(codes + k, V::load(element(row, type, k), type, count), by, count);
    }
  }

  static const void* row_of(const Rows& in, int64_t r) { return element(in.x, in.x_type, r * in.K); }

  static float amax(const Rows& in, int64_t r0, int64_t r1) {
    return r1 > r0 ? amax_of(row_of(in, r0), in.x_type, (r1 - r0) * in.K) : 0;
  }

  static void quantize_token(const Rows& in, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; r++) {
      const float scale = amax_of(row_of(in, r), in.x_type, in.K) / kQmax;
      in.scale[r] = scale == 0 ? 1 : scale;
      codes_of(row_of(in, r), in.x_type, in.K, in.scale[r], in.codes + r * in.K);
    }
  }

  static void quantize_given(const Rows& in, int64_t r0, int64_t r1) {
    codes_of(row_of(in, r0), in.x_type, (r1 - r0) * in.K, in.scale[0], in.codes + r0 * in.K);
  }

  static void quantize_weight(const Rows& in, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; r++) {
      in.scale[r] = weight_scale(amax_of(row_of(in, r), in.x_type, in.K), in.x_type);
      codes_of(row_of(in, r), in.x_type, in.K, in.scale[r], in.codes + r * in.K);
    }
  }

  // amax / 127 as the weight's type stores it; the next larger value if the largest weight would clip.
  static float weight_scale(float amax, Float type) {
    if (amax == 0) return 1;
    uint32_t stored = 0;  // bits of fp32, bf16 or fp16: the next larger integer is the next larger value
    V::store(&stored, type, 1, V::set1(amax / kQmax));
    float scale = value(&stored, type);
    if (amax / scale > kQmax + 0.5f) {
      stored++;
      scale = value(&stored, type);
    }
    return scale;
  }

  static float value(const uint32_t* stored, Float type) {
    float lanes[V::kLanes];
    V::store(lanes, Float::f32, V::kLanes, V::load(stored, type, 1));
    return lanes[0];
  }

  static void rms_norm(const Norm& in, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; r++) {
      const void* const x = element(in.x, in.type, r * in.K);
      void* const y = element(in.y, in.type, r * in.K);
      const float mean = sum_of_squares(x, in.type, in.K) / static_cast<float>(in.K);
      const typename V::F scale = V::set1(1.0f / __builtin_sqrtf(mean + in.eps));
      for (int64_t k = 0; k < in.K; k += V::kLanes) {
        const int count = static_cast<int>(in.K - k < V::kLanes ? in.K - k : V::kLanes);
        void* const to = element(y, in.type, k);
        typename V::F v = V::mul(V::load(element(x, in.type, k), in.type, count), scale);
        if (in.round_first) v = V::rounded(v, in.type);
        V::store(to, in.type, count, V::mul(v, V::load(element(in.weight, in.type, k), in.type, count)));
      }
    }
  }

  static float sum_of_squares(const void* x, Float type, int64_t K) {
    typename V::F first = V::set1(0), second = first;
    int64_t k = 0;
    for (; k + 2 * V::kLanes <= K; k += 2 * V::kLanes) {
      const typename V::F a = V::load(element(x, type, k), type), b = V::load(element(x, type, k + V::kLanes), type);
      first = V::add(first, V::mul(a, a)), second = V::add(second, V::mul(b, b));
    }
    for (; k < K; k += V::kLanes) {
      const int count = static_cast<int>(K - k < V::kLanes ? K - k : V::kLanes);
      const typename V::F a = V::load(element(x, type, k), type, count);
      first = V::add(first, V::mul(a, a));
    }
    return V::total(V::add(first, second));
  }

  static void gated(const Gated& in, int64_t r0, int64_t r1) {
    if (in.type == Float::f32) return gated_of<Float::f32>(in, r0, r1);
    if (in.type == Float::bf16) return gated_of<Float::bf16>(in, r0, r1);
    gated_of<Float::f16>(in, r0, r1);
  }

  template <Float type>
  static void gated_of(const Gated& in, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; r++) {
      const void* const gate = element(in.gate, type, r * in.gate_step);
      const void* const up = element(in.up, type, r * in.up_step);
      void* const y = element(in.y, type, r * in.K);
      int64_t k = 0;
      for (; k + V::kLanes <= in.K; k += V::kLanes) gated_lanes<type>(in, gate, up, y, k, V::kLanes);
      if (k < in.K) gated_lanes<type>(in, gate, up, y, k, static_cast<int>(in.K - k));
    }
  }

  template <Float type>
  static inline __attribute__((always_inline)) void gated_lanes(const Gated& in, const void* gate, const void* up,
                                                                void* y, int64_t k, int count) {
    const typename V::F g = V::load(element(gate, type, k), type, count);
    const typename V::F a = V::set1(in.a), b = V::set1(in.b);
    // If b is 0, its term is left out: 0 times infinity would be NaN.
    const typename V::F z = V::mul(g, in.b == 0 ? a : V::add(a, V::mul(b, V::mul(g, g))));
    const typename V::F acted = V::rounded(V::mul(g, V::sigmoid(z)), type);
    V::store(element(y, type, k), type, count, V::mul(acted, V::load(element(up, type, k), type, count)));
  }

  static void rotary(const Rotary& in) {
    if (in.type == Float::f32) return rotary_of<Float::f32>(in);
    if (in.type == Float::bf16) return rotary_of<Float::bf16>(in);
    rotary_of<Float::f16>(in);
  }

  template <Float type>
  static void rotary_of(const Rotary& in) {
    const int64_t half = in.D / 2;
    for (int64_t k = 0; k < half; k += V::kLanes) {
      const int count = static_cast<int>(half - k < V::kLanes ? half - k : V::kLanes);
      const auto load = [&](const void* row, int64_t from) { return V::load(element(row, type, from), type, count); };
      const typename V::F cos[] = {load(in.cos, k), load(in.cos, half + k)};
      const typename V::F sin[] = {V::mul(load(in.sin, k), V::set1(-1)), load(in.sin, half + k)};
      for (int64_t h = 0; h < in.heads; h++) {
        const int64_t from = h * in.x_step + k, to = h * in.y_step + k;
        const typename V::F first = load(in.x, from), second = load(in.x, from + half);
        const auto turned = [&](typename V::F own, typename V::F other, int i) {
          return V::add(apart(V::rounded(V::mul(own, cos[i]), type)), apart(V::rounded(V::mul(other, sin[i]), type)));
        };
        V::store(element(in.y, type, to), type, count, turned(first, second, 0));
        V::store(element(in.y, type, to + half), type, count, turned(second, first, 1));
      }
    }
  }

  // Keeps the compiler from fusing a product with the sum that it goes into: torch rounds both.
  OCTAVO_INLINE static typename V::F apart(typename V::F product) {
#if defined(__x86_64__)
    asm("" : "+x"(product));
#elif defined(__aarch64__)
    asm("" : "+w"(product));
#endif
    return product;
  }

  static void recur(const Recurrence& in, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; r++)
      for (int64_t k = 0; k < in.H; k += V::kLanes)
        recur(in, r, k, static_cast<int>(in.H - k < V::kLanes ? in.H - k : V::kLanes));
  }

  // `count` values of row r, from value k on.
  OCTAVO_INLINE static void recur(const Recurrence& in, int64_t r, int64_t k, int count) {
    const int64_t i = r * in.H + k;
    const auto p = [&](int gate) {
      return V::load(element(in.p, in.type, (r * in.gates() + gate) * in.H + k), in.type, count);
    };
    const auto q = [&](int gate) { return V::load(in.q + (r * in.gates() + gate) * in.H + k, Float::f32, count); };
    const auto sum = [&](int gate) { return V::add(p(gate), q(gate)); };
    typename V::F h;
    if (in.kind == Recurrence::Kind::lstm) {
      const typename V::F kept = V::mul(V::sigmoid(sum(1)), V::load(in.c + i, Float::f32, count));
      const typename V::F c = V::add(kept, V::mul(V::sigmoid(sum(0)), V::tanh(sum(2))));
      V::store(in.c + i, Float::f32, count, c);
      h = V::mul(V::sigmoid(sum(3)), V::tanh(c));
    } else if (in.kind == Recurrence::Kind::gru) {
      const typename V::F n = V::tanh(V::add(p(2), V::mul(V::sigmoid(sum(0)), q(2))));
      const typename V::F before = V::load(element(in.h, in.type, i), in.type, count);
      h = V::add(n, V::mul(V::sigmoid(sum(1)), V::add(before, V::mul(n, V::set1(-1)))));
    } else {
      h = V::tanh(sum(0));
    }
    V::store(element(in.y, in.type, i), in.type, count, h);
  }

  static void lookup(const Lookup& in, int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; i++) {
      const int8_t* codes = in.table + in.indices[i] * in.H;
      const typename V::F scale = V::set1(in.scale[in.indices[i]]);
      for (int64_t h = 0; h < in.H; h += V::kLanes) {
        const int count = static_cast<int>(in.H - h < V::kLanes ? in.H - h : V::kLanes);
        V::store(element(in.y, in.y_type, i * in.H + h), in.y_type, count,
                 V::mul(V::load_codes(codes + h, count), scale));
      }
    }
  }
};

// A table of kernels: those on rows, and the given linear layers, by the type of x. No convolutions, no attention.
template <class V>
constexpr Kernels kernels_of(const char* isa, LinearKernels f32, LinearKernels bf16, LinearKernels f16,
                             LinearKernels int8) {
  using Of = RowKernels<V>;
  return {isa,      {f32, bf16, f16}, int8,         Of::quantize_weight, Of::quantize_token, Of::quantize_given,
          Of::amax, Of::lookup,       Of::rms_norm, Of::gated,           Of::rotary,         Of::recur};
}

}  // namespace
}  // namespace octavo
