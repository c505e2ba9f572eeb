// Checks the AMX kernels on machines without AMX: amx.cpp, compiled for emulated tiles, against loops in int64 and
// double. Every operand ends right before a guard page, which must not be touched, or begins right after one.
//
// `make sanitize` and tests/ops/test_tiles.py build and run this. AVX-512, which is used beside tiles, is not emulated.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../kernels.h"

namespace octavo {
bool holds_tiles();
}

namespace {

using namespace octavo;

// Memory between two guard pages. It ends right before the second or, if `at_start`, begins right after the first.
class Fenced {
 public:
  Fenced(size_t bytes, bool at_start, size_t alignment = 1) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), inside = (bytes + page - 1) / page * page;
    size_ = inside + 2 * page;
    map_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED) abort();
    mprotect(map_, page, PROT_NONE);
    mprotect(map_ + page + inside, page, PROT_NONE);
    start_ = map_ + page + (at_start ? 0 : (inside - bytes) / alignment * alignment);
  }
  ~Fenced() { munmap(map_, size_); }
  Fenced(const Fenced&) = delete;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(start_);
  }

 private:
  char *map_, *start_;
  size_t size_;
};

std::mt19937 generator(1);
int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }

template <class T>
T bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return static_cast<T>(bits);
}

uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

double read(const void* base, Float type, int64_t i) {
  if (type == Float::f32) return static_cast<const float*>(base)[i];
  const uint16_t half = static_cast<const uint16_t*>(base)[i];
  if (type == Float::bf16) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  const double sign = half >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

void write(void* base, Float type, int64_t i, float value) {
  if (type == Float::f32)
    static_cast<float*>(base)[i] = value;
  else if (type == Float::bf16)
    static_cast<uint16_t*>(base)[i] = to_bf16(value);
  else
    static_cast<_Float16*>(base)[i] = static_cast<_Float16>(value);
}

// Half a unit in the last place of `type`, relative; and the smallest distance of two numbers.
double half_ulp(Float type) { return std::ldexp(1, type == Float::f32 ? -24 : type == Float::bf16 ? -8 : -11); }
double smallest(Float type) { return std::ldexp(1, type == Float::f16 ? -24 : -133); }

struct Shape {
  int64_t M, N, K;
};

struct Case {
  Shape shape;
  bool codes;       // w8a8, else w8a16
  Float x_type;     // in w8a16
  int64_t groups;   // along K, in w8a16
  bool ends_only;   // codes are -128 and 127 only
  bool row_scales;  // x_scale is [M], else [1]
  bool bias;
  Float bias_type, y_type;
  int64_t threads;  // that share the columns, in units of 32
  bool at_start;
  int64_t odd_row;  // of x in w8a16, or -1: the row with an odd value
  float odd;        // NaN, inf, or so large that the others in its row keep few bits
};

[[noreturn]] void fail(const Case& c, const char* what, int64_t m, int64_t n, double got, double expected) {
  fprintf(stderr, "%s of type %d M=%ld N=%ld K=%ld groups=%ld ends_only=%d row_scales=%d bias=%d of type %d, ",
          c.codes ? "w8a8" : "w8a16", static_cast<int>(c.x_type), c.shape.M, c.shape.N, c.shape.K, c.groups,
          c.ends_only, c.row_scales, c.bias, static_cast<int>(c.bias_type));
  fprintf(stderr, "y of type %d, threads=%ld\n", static_cast<int>(c.y_type), c.threads);
  fprintf(stderr, "%s at [%ld, %ld]: got %.9g, expected %.9g\n", what, m, n, got, expected);
  exit(1);
}

void check(const Case& c) {
  const auto [M, N, K] = c.shape;
  const int64_t size = c.codes ? 1 : size_of(c.x_type), odd_place = K ? (c.odd_row + 1) * 7 % K : 0;
  const Fenced x(M * K * size, c.at_start), w(N * K, c.at_start), w_scale(N * c.groups * 4, c.at_start),
      x_scale((c.row_scales ? M : 1) * 4, c.at_start), bias(N * size_of(c.bias_type), c.at_start),
      y(M * N * size_of(c.y_type), c.at_start);
  const auto code = [&] { return static_cast<int8_t>(c.ends_only ? (any(0, 1) ? 127 : -128) : any(-128, 127)); };
  for (int64_t i = 0; i < N * K; i++) w.as<int8_t>()[i] = code();
  for (int64_t i = 0; i < M * K; i++) {
    if (c.codes)
      x.as<int8_t>()[i] = code();
    else
      write(x.as<void>(), c.x_type, i, i == c.odd_row * K + odd_place ? c.odd : normal());
  }
  for (int64_t n = 0; n < N * c.groups; n++) w_scale.as<float>()[n] = std::ldexp(1 + 0.01f * (n % 97), -8);
  for (int64_t m = 0; m < (c.row_scales ? M : 1); m++) x_scale.as<float>()[m] = 0.01f + 0.001f * m;
  for (int64_t n = 0; n < N; n++) write(bias.as<void>(), c.bias_type, n, std::ldexp(n % 2 ? -1 : 1, n % 7 - 3));
  memset(y.as<char>(), 0x5a, M * N * size_of(c.y_type));

  Linear layer{};
  layer.M = M, layer.N = N, layer.K = K, layer.groups = c.groups;
  layer.x = x.as<void>(), layer.x_type = c.codes ? Float::f32 : c.x_type;
  if (c.codes) layer.x_scale = x_scale.as<float>(), layer.x_scale_step = c.row_scales;
  layer.w = w.as<int8_t>(), layer.w_scale = w_scale.as<float>();
  if (c.bias) layer.bias = bias.as<void>(), layer.bias_type = c.bias_type;
  layer.y = y.as<void>(), layer.y_type = c.y_type;

  const LinearKernels& kernels = c.codes ? amx_kernels.w8a8 : amx_kernels.w8a16(c.x_type);
  const size_t packed_bytes = kernels.packed_bytes(layer);
  const Fenced scratch(kernels.scratch_bytes(layer), c.at_start, 64), packed(packed_bytes, c.at_start, 64);
  if (packed_bytes) {  // computed by AVX-512
    layer.packed = packed.as<char>();
    kernels.pack(layer, 0, M);
  }
  const int64_t units = (N + 31) / 32;
  for (int64_t t = 0; t < c.threads; t++) {
    const int64_t n0 = units * t / c.threads * 32, n1 = std::min(units * (t + 1) / c.threads * 32, N);
    if (n0 < n1) kernels.run(layer, {0, M, n0, n1}, scratch.as<void>());
    if (holds_tiles()) fail(c, "tiles are held after the call", 0, n0, 1, 0);
  }

  for (int64_t m = 0; m < M; m++) {
    for (int64_t n = 0; n < N; n++) {
      const int8_t* const row = w.as<int8_t>() + n * K;
      const double got = read(layer.y, c.y_type, m * N + n);
      if (m == c.odd_row && K && !std::isfinite(c.odd)) {
        const int code = row[odd_place];
        if (std::isnan(c.odd) || code == 0 ? !std::isnan(got) : got != (code > 0 ? c.odd : -c.odd))
          fail(c, "a row with NaN or inf", m, n, got, code * c.odd);
        continue;
      }
      double expected, error;  // before y is rounded to its type
      if (c.codes) {
        int64_t sum = 0;
        for (int64_t k = 0; k < K; k++) sum += int64_t{x.as<int8_t>()[m * K + k]} * row[k];
        // The sum is exact. Its conversion to fp32, the product of the scales, and the product with that are not.
        expected = static_cast<double>(sum) * layer.x_scale[m * layer.x_scale_step] * layer.w_scale[n];
        error = 3 * std::fabs(expected) * half_ulp(Float::f32);
      } else {
        double largest = 0, sum = 0, magnitude = 0, codes = 0;
        for (int64_t k = 0; k < K; k++) {
          const double value = read(layer.x, c.x_type, m * K + k);
          const double scaled = row[k] * static_cast<double>(layer.w_scale[n * c.groups + k * c.groups / K]);
          sum += value * scaled, magnitude += std::fabs(value * scaled), codes += std::fabs(scaled);
          largest = std::max(largest, std::fabs(value));
        }
        // The unit of digits is 2^-22 of the largest magnitude rounded up to a power of two, and 2^-30 of it in fp32.
        const double half_unit = largest * std::ldexp(1, c.x_type == Float::f32 ? -30 : -22);
        expected = sum;
        error = (16 + std::sqrt(static_cast<double>(K))) * magnitude * half_ulp(Float::f32) + half_unit * codes;
      }
      if (c.bias) {
        expected += read(layer.bias, c.bias_type, n);
        error += std::fabs(expected) * half_ulp(Float::f32);
      }
      error = 1.001 * (error + (std::fabs(expected) + error) * half_ulp(c.y_type)) + smallest(c.y_type);
      if (c.y_type == Float::f16 && std::fabs(expected) + error >= 65504) continue;  // y may be infinite
      if (!(std::fabs(got - expected) <= error)) fail(c, "y", m, n, got, expected);
    }
  }
}

const Float kTypes[] = {Float::f32, Float::bf16, Float::f16};

Case any_case(Shape shape, bool codes, Float x_type, int64_t groups = 1) {
  const bool ends_only = any(0, 3) == 0, row_scales = any(0, 1), bias = any(0, 1), at_start = any(0, 1);
  const int64_t odd_row = codes || any(0, 3) ? -1 : any(0, shape.M - 1);
  const float odd = any(0, 2) ? any(0, 1) ? 30000 : INFINITY : NAN;
  const Float bias_type = kTypes[any(0, 2)], y_type = codes ? kTypes[any(0, 2)] : x_type;
  return {shape,     codes,  x_type,    groups,   ends_only, row_scales, bias,
          bias_type, y_type, any(1, 3), at_start, odd_row,   odd};
}

// Codes, and the types of floats in turn.
void check_both(Shape shape) {
  static int turn = 0;
  check(any_case(shape, true, Float::f32));
  check(any_case(shape, false, kTypes[turn++ % 3]));
}

// -- convolutions ----------------------------------------------------------------------------------------------------

struct Plane {
  int64_t C, N, images;
  int64_t windows[2], count[2], stride[2];
};

void check_convolution(const Plane& in, Float type, float odd) {
  const int64_t P = in.windows[0] * in.windows[1], K = in.C * in.count[0] * in.count[1];
  int64_t size[2];
  for (int d = 0; d < 2; d++) size[d] = (in.windows[d] - 1) * in.stride[d] + in.count[d];
  const int64_t image = in.C * size[0] * size[1], odd_place = any(0, in.images * image - 1);
  const bool at_start = any(0, 1), has_bias = any(0, 1);
  const Float bias_type = kTypes[any(0, 2)];
  const Fenced x(in.images * image * size_of(type), at_start), w(in.N * K, at_start), w_scale(in.N * 4, at_start),
      bias(in.N * size_of(bias_type), at_start), y(in.images * in.N * P * size_of(type), at_start),
      element(K * 8, at_start);
  for (int64_t i = 0; i < in.N * K; i++) w.as<int8_t>()[i] = static_cast<int8_t>(any(-128, 127));
  for (int64_t i = 0; i < in.images * image; i++) write(x.as<void>(), type, i, normal());
  if (odd != 0) write(x.as<void>(), type, odd_place, odd);
  for (int64_t n = 0; n < in.N; n++) w_scale.as<float>()[n] = std::ldexp(1 + 0.01f * (n % 97), -8);
  for (int64_t n = 0; n < in.N; n++) write(bias.as<void>(), bias_type, n, std::ldexp(n % 2 ? -1 : 1, n % 7 - 3));
  memset(y.as<char>(), 0x5a, in.images * in.N * P * size_of(type));
  for (int64_t k = 0; k < K; k++) {
    const int64_t j = k % in.count[1], i = k / in.count[1] % in.count[0], c = k / in.count[1] / in.count[0];
    element.as<int64_t>()[k] = (c * size[0] + i) * size[1] + j;
  }

  Convolution c{};
  c.N = in.N, c.K = K, c.x = x.as<void>(), c.type = type, c.image_step = image;
  c.windows[0] = 1, c.windows[1] = in.windows[0], c.windows[2] = in.windows[1];
  c.step[1] = in.stride[0] * size[1], c.step[2] = in.stride[1];
  c.element = element.as<int64_t>(), c.w = w.as<int8_t>(), c.w_scale = w_scale.as<float>();
  if (has_bias) c.bias = bias.as<void>(), c.bias_type = bias_type;
  c.y = y.as<void>(), c.y_step = in.N * P;
  const ConvolutionKernels& kernels = *amx_kernels.convolution(type);
  const Fenced scratch(kernels.scratch_bytes(c), at_start, 64);
  const int64_t cut = std::min(P, kernels.unit * any(1, 4)), split = std::min<int64_t>(in.N, 32 * any(1, 3));
  for (int64_t b = 0; b < in.images; b++)
    for (int64_t m = 0; m < P; m += cut)
      for (int64_t n = 0; n < in.N; n += split)
        kernels.run(c, b, {m, std::min(m + cut, P), n, std::min(n + split, in.N)}, scratch.as<void>());
  const auto fail = [&](int64_t i, double got, double expected) {
    fprintf(stderr, "convolution of type %d: C=%ld N=%ld images=%ld, windows %ld x %ld, filters %ld x %ld, ",
            static_cast<int>(type), in.C, in.N, in.images, in.windows[0], in.windows[1], in.count[0], in.count[1]);
    fprintf(stderr, "strides %ld, %ld: y[%ld] is %.9g, expected %.9g\n", in.stride[0], in.stride[1], i, got, expected);
    exit(1);
  };
  if (holds_tiles()) fail(-1, 1, 0);

  for (int64_t i = 0; i < in.images * in.N * P; i++) {
    const int64_t p = i % P, n = i / P % in.N, b = i / P / in.N;
    const int64_t start = b * image + p / in.windows[1] * c.step[1] + p % in.windows[1] * c.step[2];
    double sum = 0, magnitude = 0;
    for (int64_t k = 0; k < K; k++) {
      const double product = read(c.x, type, start + c.element[k]) * c.w[n * K + k];
      sum += product, magnitude += std::fabs(product);
    }
    const double added = has_bias ? read(c.bias, bias_type, n) : 0, expected = sum * c.w_scale[n] + added;
    const double got = read(c.y, type, i);
    if (!std::isfinite(expected)) {
      if (std::isnan(expected) ? !std::isnan(got) : got != expected) fail(i, got, expected);
      continue;
    }
    double error = (16 + std::sqrt(static_cast<double>(K))) * magnitude * c.w_scale[n] * half_ulp(Float::f32);
    error += std::fabs(expected) * half_ulp(Float::f32);
    error = 1.001 * (error + (std::fabs(expected) + error) * half_ulp(type)) + smallest(type);
    if (type == Float::f16 && std::fabs(expected) + error >= 65504) continue;  // y may be infinite
    if (!(std::fabs(got - expected) <= error)) fail(i, got, expected);
  }
}

void check_convolutions() {
  for (const Float type : kTypes) {
    for (int i = 0; i < 16; i++) {
      const Plane any_plane{
          any(1, 20), any(1, 50), any(1, 2), {any(1, 9), any(1, 40)}, {any(1, 3), any(1, 3)}, {any(1, 3), any(1, 3)}};
      const float odd[] = {0, 30000, INFINITY, NAN};
      check_convolution(any_plane, type, odd[i % 4]);
    }
    check_convolution({240, 33, 1, {1, 33}, {3, 3}, {1, 1}}, type, 0);  // several pieces of K
    check_convolution({1, 33, 1, {30, 40}, {1, 2}, {1, 1}}, type, 0);   // several rounds of windows
  }
}

// -- attention -------------------------------------------------------------------------------------------------------

// Operands of float type, or codes with scales. Tokens of a head are contiguous, and so are heads.
struct Sequence {
  int64_t heads, tokens, size;
  Fenced x, scale;
  Heads values, scales;

  Sequence(int64_t heads, int64_t tokens, int64_t size, bool codes, bool at_start)
      : heads(heads),
        tokens(tokens),
        size(size),
        x(heads * tokens * size * (codes ? 1 : 2), at_start),
        scale(heads * tokens * 4, at_start),
        values{x.as<void>(), Float::bf16, heads * tokens * size, tokens * size, size},
        scales{codes ? scale.as<void>() : nullptr, Float::f32, heads * tokens, tokens, 1} {
    for (int64_t i = 0; i < heads * tokens; i++) scale.as<float>()[i] = codes ? 0.01f + 0.0001f * (i % 89) : 1;
    for (int64_t i = 0; i < heads * tokens * size; i++) {
      if (codes)
        x.as<int8_t>()[i] = static_cast<int8_t>(any(-127, 127));
      else
        write(x.as<void>(), Float::bf16, i, normal());
    }
  }
  double at(int64_t head, int64_t token, int64_t i) const {
    const int64_t row = head * tokens + token;
    const double value = scales.x ? x.as<int8_t>()[row * size + i] : read(x.as<void>(), Float::bf16, row * size + i);
    return value * scale.as<float>()[row];
  }
};

void attend(const AttentionKernels& kernels, Attention a, bool at_start) {
  const Fenced packed(kernels.packed_bytes(a) * a.KV, at_start, 64), scratch(kernels.scratch_bytes(a), at_start, 64);
  a.packed = packed.as<char>();
  if (a.mask.kind != Mask::Kind::none) kernels.mask(a, 0, a.mask.T);
  const int64_t height = any(1, std::min(a.rows(), kernels.most_rows(a)));
  for (int64_t head = 0; head < a.KV; head++) kernels.tokens(a, head, 0, a.S, scratch.as<void>());
  for (int64_t head = 0; head < a.KV; head++)
    for (int64_t r = 0; r < a.rows(); r += height)
      kernels.rows(a, head, r, std::min(r + height, a.rows()), scratch.as<void>());
}

// Int8 results must have the bits of AVX-512's, which driver.cpp checks; those in bf16 are compared with double.
void check_attention(int64_t KV, int64_t shared, int64_t T, int64_t S, int64_t D, int64_t Dv, bool codes, bool causal) {
  const bool at_start = any(0, 1);
  const Sequence q(KV * shared, T, D, false, at_start), k(KV, S, D, codes, at_start), v(KV, S, Dv, codes, at_start);
  const int64_t count = KV * shared * T * Dv;
  const Fenced y(count * 2, at_start), other(count * 2, at_start);
  Attention a{};
  a.B = 1, a.H = KV * shared, a.KV = KV, a.T = T, a.S = S, a.D = D, a.Dv = Dv;
  a.q = q.values, a.k = k.values, a.v = v.values, a.k_scale = k.scales, a.v_scale = v.scales;
  std::vector<Allowed> allowed(T);
  if (causal) a.mask = {Mask::Kind::causal, nullptr, 1, 1, T, 0, 0, 0, allowed.data()};
  a.scaling = 1 / std::sqrt(static_cast<float>(D)), a.y_type = Float::bf16;
  const auto fail = [&](const char* what, int64_t i, double got, double expected) {
    fprintf(stderr,
            "%s, KV=%ld shared=%ld T=%ld S=%ld D=%ld Dv=%ld codes=%d causal=%d: y[%ld] is %.9g, expected %.9g\n", what,
            KV, shared, T, S, D, Dv, codes, causal, i, got, expected);
    exit(1);
  };

  if (!causal) {
    a.y = y.as<void>();
    attend(*amx_kernels.int8_attention, a, at_start);
    a.y = other.as<void>();
    attend(*avx512_kernels.int8_attention, a, at_start);
    for (int64_t i = 0; i < count; i++)
      if (y.as<uint16_t>()[i] != other.as<uint16_t>()[i])
        fail("int8 attention", i, read(y.as<void>(), Float::bf16, i), read(other.as<void>(), Float::bf16, i));
  }

  a.y = y.as<void>();
  attend(codes ? *amx_kernels.attention_of_codes(Float::bf16) : *amx_kernels.float_attention(Float::bf16).attention, a,
         at_start);
  if (holds_tiles()) fail("tiles are held after the call", 0, 1, 0);
  std::vector<double> weight(S);
  for (int64_t row = 0; row < KV * shared * T; row++) {
    const int64_t head = row / T, key_head = head / shared, last = causal ? std::min(S, row % T + 1) : S;
    double top = -INFINITY, total = 0;
    for (int64_t s = 0; s < last; s++) {
      weight[s] = 0;
      for (int64_t d = 0; d < D; d++) weight[s] += q.at(head, row % T, d) * k.at(key_head, s, d) * a.scaling;
      top = std::max(top, weight[s]);
    }
    for (int64_t s = 0; s < last; s++) total += weight[s] = std::exp(weight[s] - top);
    for (int64_t d = 0; d < Dv; d++) {
      double expected = 0, size = 0;
      for (int64_t s = 0; s < last; s++) {
        expected += weight[s] / total * v.at(key_head, s, d);
        size += std::fabs(weight[s] / total * v.at(key_head, s, d));
      }
      const double got = read(a.y, Float::bf16, row * Dv + d);
      if (!(std::fabs(got - expected) <= 0x1p-8 * (size + std::fabs(expected))))
        fail("attention", row * Dv + d, got, expected);
    }
  }
}

void check_attentions() {
  constexpr int64_t kT[] = {13, 16, 17, 32, 33, 70}, kS[] = {1, 31, 32, 33, 64, 65, 96, 130};
  constexpr int64_t kD[] = {1, 3, 16, 33, 64, 65, 130};
  for (const int64_t T : kT)
    for (const int64_t S : kS)
      check_attention(any(1, 2), any(1, 2), T, S, kD[any(0, 6)], kD[any(0, 6)], any(0, 1), any(0, 1));
  for (const bool codes : {true, false}) check_attention(1, 2, 530, 1060, 17, 33, codes, !codes);  // in several parts
}

}  // namespace

int main(int argc, char** argv) {
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vbmi") ||
      !__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16")) {
    puts("amx, emulated: left out, this processor lacks AVX-512 with VBMI, VNNI and BF16");
    return 0;
  }
  generator.seed(argc > 1 ? static_cast<unsigned>(atoi(argv[1])) : 1);
  for (const int64_t M : {1, 4, 5, 15, 16, 17, 31, 32, 33, 48, 65})
    for (const int64_t N : {1, 15, 16, 17, 32, 33, 95})
      for (const int64_t K : {0, 1, 31, 32, 33, 63, 64, 65, 257}) check_both({M, N, K});
  for (int i = 0; i < 60; i++) check_both({any(1, 300), any(1, 130), any(0, 700)});
  for (const int64_t M : {1, 3, 16, 25, 33, 70})  // groups of whole units of 64, and others, which AVX-512 computes
    for (const Float type : kTypes) {
      check(any_case({M, 49, 640}, false, type, 5));
      check(any_case({M, 33, 192}, false, type, 3));
      check(any_case({M, 33, 2112}, false, type, 11));
      check(any_case({M, 49, 96}, false, type, 3));
    }
  check_both({300, 70, 4160});  // several blocks of rows of x; W is read in place
  for (const Float type : kTypes) {
    check(any_case({37, 70, 4100}, true, type));  // several pieces of K
    check(any_case({37, 70, 4100}, false, type));
    check(any_case({133, 40, 2176}, false, type, 17));
  }
  for (const bool codes : {true, false}) {  // several rounds of columns, too, since sums wait for the last piece
    Case all_at_once = any_case({129, 1060, codes ? 4160 : 2112}, codes, Float::bf16);
    all_at_once.threads = 1;
    check(all_at_once);
  }
  check_convolutions();
  check_attentions();
  puts("amx, emulated: every shape right, and nothing touched outside of its operands");
}
