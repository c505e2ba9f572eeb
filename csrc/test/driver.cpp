// Runs every kernel that this processor has on many shapes, under AddressSanitizer and UBSan (`make sanitize`).
//
// Every operand is in memory of exactly its size: before a guard page, which must not be touched, after one, or in a
// block of the heap, which the sanitizer watches. (It sees no masked load and no inline assembly; the guard page stops
// them.) Results are compared with loops over double and int64. The first wrong one ends the run, and is reported.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../select.h"

using namespace octavo;

namespace {

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fputc('\n', stderr);
  exit(1);
}

// -- random numbers: the same in each run ----------------------------------------------------------------------------

uint64_t state = 1;

uint32_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}

int64_t random_below(int64_t end) { return random_bits() % end; }

template <class T, size_t count>
T one_of(const T (&values)[count]) {
  return values[random_below(count)];
}

// -- memory ----------------------------------------------------------------------------------------------------------

enum class Place { before_guard, after_guard, heap };
constexpr Place kPlaces[] = {Place::before_guard, Place::after_guard, Place::heap};

// `count` elements of T, filled with 0xff, which is NaN: so it shows if a float is read before it is written.
template <class T>
class Array {
 public:
  explicit Array(int64_t count) : bytes_(count * sizeof(T)), place_(one_of(kPlaces)) {
    if (place_ == Place::heap) {
      if (posix_memalign(&data_, 64, bytes_) != 0) fail("no memory for %zu bytes", bytes_);
    } else {
      const size_t page = sysconf(_SC_PAGESIZE);
      inside_ = (bytes_ + page - 1) / page * page;
      mapped_ = inside_ + page;
      base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (base_ == MAP_FAILED) fail("no pages for %zu bytes", bytes_);
      const bool guard_last = place_ == Place::before_guard;
      mprotect(base_ + (guard_last ? inside_ : 0), page, PROT_NONE);
      data_ = guard_last ? base_ + inside_ - bytes_ : base_ + page;
    }
    memset(data_, 0xff, bytes_);
  }
  ~Array() { place_ == Place::heap ? free(data_) : static_cast<void>(munmap(base_, mapped_)); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() { return static_cast<T*>(data_); }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return bytes_ / sizeof(T); }

 private:
  size_t bytes_, inside_ = 0, mapped_ = 0;
  Place place_;
  char* base_ = nullptr;
  void* data_ = nullptr;
};

// -- floats of each type, by their definition ------------------------------------------------------------------------

struct Format {
  int exponent_bits, fraction_bits;
};

Format format_of(Float type) {
  return type == Float::f32 ? Format{8, 23} : type == Float::bf16 ? Format{8, 7} : Format{5, 10};
}

double power_of_two(int exponent) {  // for normal doubles
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

double decode(uint32_t bits, Float type) {
  const auto [e, f] = format_of(type);
  const int exponent = static_cast<int>((bits >> f) & ((1u << e) - 1)), bias = (1 << (e - 1)) - 1;
  const double fraction = bits & ((1u << f) - 1), sign = (bits >> (e + f)) & 1 ? -1 : 1;
  if (exponent == (1 << e) - 1) return fraction != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * fraction * power_of_two(1 - bias - f);
  return sign * (power_of_two(f) + fraction) * power_of_two(exponent - bias - f);
}

// The distance from |value| to the next larger magnitude.
double ulp(double value, Float type) {
  const auto [e, f] = format_of(type);
  int exponent;
  std::frexp(value, &exponent);
  return power_of_two(std::max(exponent - 1, 2 - (1 << (e - 1))) - f);
}

// The bits of |value| rounded to a 16-bit type, half to even. Infinity is where the next number would be.
uint32_t encode(double value, Float type) {
  const auto [e, f] = format_of(type);
  const uint32_t infinity = ((1u << e) - 1) << f;
  const auto at = [&](uint32_t bits) { return bits < infinity ? decode(bits, type) : power_of_two(1 << (e - 1)); };
  value = std::fabs(value);
  if (!(value < at(infinity))) return infinity;
  uint32_t low = 0, high = infinity;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (at(middle) <= value ? low : high) = middle;
  }
  const double down = value - at(low), up = at(high) - value;
  return down < up || (down == up && low % 2 == 0) ? low : high;
}

// An array of floats whose type is known at run time.
class Floats {
 public:
  Floats(int64_t count, Float type) : type_(type), bytes_(count * size_of(type)) {}

  void* data() { return bytes_.data(); }
  Float type() const { return type_; }
  int64_t size() const { return bytes_.size() / size_of(type_); }
  uint32_t bits(int64_t i) {
    uint32_t bits = 0;
    memcpy(&bits, bytes_.data() + i * size_of(type_), size_of(type_));
    return bits;
  }
  void set_bits(int64_t i, uint32_t bits) { memcpy(bytes_.data() + i * size_of(type_), &bits, size_of(type_)); }
  double operator[](int64_t i) { return decode(bits(i), type_); }
  bool untouched(int64_t i) { return bits(i) == (type_ == Float::f32 ? 0xffffffffu : 0xffffu); }

  // Random values with magnitudes from 2^low to 2^high.
  void fill(int low, int high) {
    const auto [e, f] = format_of(type_);
    const int bias = (1 << (e - 1)) - 1;
    for (int64_t i = 0; i < size(); i++) {
      const uint32_t exponent = bias + low + random_below(high - low), fraction = random_bits() & ((1u << f) - 1);
      set_bits(i, (random_bits() & 1u) << (e + f) | exponent << f | fraction);
    }
  }

 private:
  Float type_;
  Array<char> bytes_;
};

constexpr Float kTypes[] = {Float::f32, Float::bf16, Float::f16};
const char* name_of(Float type) { return type == Float::f32 ? "fp32" : type == Float::bf16 ? "bf16" : "fp16"; }

void fill_codes(Array<int8_t>& codes) {
  const bool extreme = random_below(3) == 0;
  for (int64_t i = 0; i < codes.size(); i++)
    codes[i] = static_cast<int8_t>(extreme ? (random_bits() & 1 ? -128 : 127) : random_bits());
}

void fill_scales(Array<float>& scales) {
  for (int64_t i = 0; i < scales.size(); i++) scales[i] = std::ldexp(1.0f + random_below(1 << 20) * 0x1p-20f, -8);
}

// -- linear layers ---------------------------------------------------------------------------------------------------

struct Shape {
  int64_t M, N, K, groups;
};

enum class Scheme { w8a8, w8a16, floats };

const char* name_of(Scheme scheme) {
  return scheme == Scheme::w8a8 ? "w8a8" : scheme == Scheme::w8a16 ? "w8a16" : "floats";
}

// A layer, and its expected result. x is codes in w8a8, else values of `type`; so is W if the scheme is floats.
struct Problem {
  Shape shape;
  Scheme scheme;
  bool int8, has_bias;
  Float type, bias_type;
  Array<int8_t> x_codes, w_codes;
  Array<float> x_scale, w_scale;
  Floats x, w, bias;
  std::vector<double> y, tolerance;  // [M, N]

  Problem(Shape s, Scheme scheme, Float type)
      : shape(s),
        scheme(scheme),
        int8(scheme == Scheme::w8a8),
        has_bias(random_below(2)),
        type(type),
        bias_type(one_of(kTypes)),
        x_codes(int8 ? s.M * s.K : 0),
        w_codes(scheme == Scheme::floats ? 0 : s.N * s.K),
        x_scale(int8 ? (random_below(2) ? s.M : 1) : 0),
        w_scale(scheme == Scheme::floats ? 0 : s.N * s.groups),
        x(int8 ? 0 : s.M * s.K, type),
        w(scheme == Scheme::floats ? s.N * s.K : 0, type),
        bias(has_bias ? s.N : 0, bias_type),
        y(s.M * s.N),
        tolerance(s.M * s.N) {
    fill_codes(w_codes), fill_codes(x_codes), fill_scales(w_scale), fill_scales(x_scale);
    x.fill(-4, 4), w.fill(-4, 4), bias.fill(-4, 4);
    solve();
  }

  double weight(int64_t i) { return scheme == Scheme::floats ? w[i] : w_codes[i]; }
  double scale_of(int64_t i) { return scheme == Scheme::floats ? 1 : w_scale[i]; }

  // fp32 rounds each sum of products; its errors go up as often as down, so they grow with the root of K.
  void solve() {
    std::vector<double> values(shape.K), weights(shape.N * shape.K);
    for (int64_t i = 0; i < shape.N * shape.K; i++) weights[i] = weight(i);
    for (int64_t m = 0; m < shape.M; m++) {
      for (int64_t k = 0; k < shape.K; k++) values[k] = int8 ? x_codes[m * shape.K + k] : x[m * shape.K + k];
      const double scale_of_row = int8 ? x_scale[x_scale.size() > 1 ? m : 0] : 1;
      for (int64_t n = 0; n < shape.N; n++) {
        double sum = 0, magnitude = 0;
        for (int64_t g = 0; g < shape.groups; g++) {
          double part = 0, part_magnitude = 0;
          for (int64_t k = g * shape.K / shape.groups; k < (g + 1) * shape.K / shape.groups; k++) {
            const double product = values[k] * weights[n * shape.K + k];
            part += product, part_magnitude += std::fabs(product);
          }
          const double scale = scale_of(n * shape.groups + g);
          sum += part * scale, magnitude += part_magnitude * scale;
        }
        const double added = has_bias ? bias[n] : 0, exact = std::fabs(sum * scale_of_row);
        const double of_sum = int8 ? exact : magnitude * (4 + std::sqrt(static_cast<double>(shape.K)));
        y[m * shape.N + n] = sum * scale_of_row + added;
        tolerance[m * shape.N + n] = 0x1p-24 * (of_sum + 4 * exact + 2 * std::fabs(added));
      }
    }
  }

  void check(const Kernels& kernels, Block block, Float y_type) {
    const auto [M, N, K, groups] = shape;
    Floats out(M * N, y_type);
    Linear layer{M,
                 N,
                 K,
                 int8 ? static_cast<void*>(x_codes.data()) : x.data(),
                 type,
                 int8 ? x_scale.data() : nullptr,
                 x_scale.size() > 1,
                 scheme == Scheme::floats ? w.data() : w_codes.data(),
                 scheme == Scheme::floats ? nullptr : w_scale.data(),
                 groups,
                 has_bias ? bias.data() : nullptr,
                 bias_type,
                 out.data(),
                 y_type};
    const LinearKernels& of = int8                       ? kernels.w8a8
                              : scheme == Scheme::floats ? kernels.float_linear(type).linear
                                                         : kernels.w8a16(type);
    if (!of.run) return;
    const size_t packed_bytes = of.packed_bytes ? of.packed_bytes(layer) : 0;
    Array<char> scratch((of.scratch_bytes(layer) + 63) / 64 * 64), packed((packed_bytes + 63) / 64 * 64);
    if (packed_bytes) {
      layer.packed = packed.data();
      const int64_t cut = random_below(M / kPackedRows + 1) * kPackedRows;
      of.pack(layer, cut, M);
      of.pack(layer, 0, cut);
    }
    of.run(layer, block, scratch.data());
    for (int64_t m = 0; m < M; m++) {
      for (int64_t n = 0; n < N; n++) {
        const bool asked = m >= block.m0 && m < block.m1 && n >= block.n0 && n < block.n1;
        const int64_t i = m * N + n;
        const double allowed = tolerance[i] + ulp(y[i], y_type);
        if (asked ? !(std::fabs(out[i] - y[i]) <= allowed) : !out.untouched(i))
          fail(
              "%s: %s of %s, M %ld N %ld K %ld groups %ld, block [%ld, %ld) x [%ld, %ld), bias %d: y[%ld, %ld] is "
              "%.9g, "
              "expected %s%.9g in %s",
              kernels.isa, name_of(scheme), int8 ? "int8" : name_of(type), M, N, K, groups, block.m0, block.m1,
              block.n0, block.n1, has_bias, m, n, out[i], asked ? "" : "to be left, not ", y[i], name_of(y_type));
      }
    }
  }
};

Block random_block(const Shape& shape) {
  const int64_t m0 = random_below(shape.M + 1), n0 = random_below(shape.N + 1);
  return {m0, m0 + random_below(shape.M - m0 + 1), n0, n0 + random_below(shape.N - n0 + 1)};
}

void check_linear(const std::vector<const Kernels*>& all, Shape shape, Scheme scheme, Float type) {
  Problem problem(shape, scheme, type);
  for (const Kernels* kernels : all) {
    problem.check(*kernels, {0, shape.M, 0, shape.N}, one_of(kTypes));
    problem.check(*kernels, random_block(shape), one_of(kTypes));
  }
}

int64_t random_groups(int64_t K) {
  std::vector<int64_t> divisors;
  for (int64_t g = 1; g <= K; g++) {
    if (K % g == 0) divisors.push_back(g);
  }
  return divisors.empty() ? 1 : divisors[random_below(divisors.size())];
}

void check_linear_layers(const std::vector<const Kernels*>& all) {
  constexpr int64_t kM[] = {0, 1, 2, 3, 4, 5, 6, 7, 9, 13, 16, 25, 37, 81, 100, 193, 513};
  constexpr int64_t kN[] = {1, 2, 3, 4, 5, 7, 16, 31, 32, 33, 35, 67, 100};
  constexpr int64_t kK[] = {0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 130, 1024, 1030, 2070, 4100};
  constexpr int64_t kMost = 1 << 20;  // products of one layer
  for (int64_t m : kM) {
    for (int64_t k : kK) {
      for (int repeat = 0; repeat < 3; repeat++) {
        const int64_t n = std::max<int64_t>(1, std::min(one_of(kN), kMost / std::max<int64_t>(1, m * k)));
        check_linear(all, {m, n, k, 1}, Scheme::w8a8, Float::f32);
        for (Float type : kTypes) {
          check_linear(all, {m, n, k, random_below(2) ? random_groups(k) : 1}, Scheme::w8a16, type);
          check_linear(all, {m, n, k, 1}, Scheme::floats, type);
        }
      }
    }
  }
  for (int64_t m : {1, 2, 70})
    check_linear(all, {m, 3, 131071, 1}, Scheme::w8a8, Float::f32);  // the longest exact sums
}

// -- convolutions ----------------------------------------------------------------------------------------------------

// Images of [C, *size], and the windows over them.
struct Windows {
  int64_t images, C, N, K = 1, P = 1, image = 1;
  int64_t size[3], count[3], stride[3], dilation[3], windows[3];
  std::vector<int64_t> element{0};

  Windows(int64_t images, int64_t C, int64_t N, const int64_t (&most)[3]) : images(images), C(C), N(N) {
    for (int d = 0; d < 3; d++) {
      windows[d] = 1 + random_below(most[d]), count[d] = 1 + random_below(3);
      stride[d] = 1 + random_below(3), dilation[d] = 1 + random_below(2);
      size[d] = (windows[d] - 1) * stride[d] + (count[d] - 1) * dilation[d] + 1 + random_below(stride[d]);
      P *= windows[d], image *= size[d];
    }
    spread(C, image);
    for (int d = 0; d < 3; d++) spread(count[d], dilation[d] * step(d));
    K = static_cast<int64_t>(element.size()), image *= C;
  }

  // Elements from one place along a dimension to the next.
  int64_t step(int d) const { return d == 2 ? 1 : size[d + 1] * step(d + 1); }

  int64_t start(int64_t p) const {
    int64_t at = 0;
    for (int d = 2; d >= 0; p /= windows[d], d--) at += p % windows[d] * stride[d] * step(d);
    return at;
  }

 private:
  void spread(int64_t many, int64_t by) {
    std::vector<int64_t> all;
    for (int64_t one : element)
      for (int64_t i = 0; i < many; i++) all.push_back(one + i * by);
    element = all;
  }
};

// The expected y, sum * scale + added, where fp32 sums K products whose magnitudes add up to `magnitude`.
struct Convolved {
  double sum, magnitude;
  int64_t K;
  double scale, added;

  double expected() const { return sum * scale + added; }
  bool is(double y, Float type) const {
    const double of_sum = magnitude * scale * (4 + std::sqrt(static_cast<double>(K)));
    const double allowed = 0x1p-24 * (of_sum + 4 * std::fabs(sum * scale) + 2 * std::fabs(added));
    return std::fabs(y - expected()) <= allowed + ulp(expected(), type);
  }
};

void check_convolution(const Kernels& kernels, const Windows& in) {
  const bool has_bias = random_below(2);
  const Float type = one_of(kTypes);
  Floats x(in.images * in.image, type), y(in.images * in.N * in.P, type);
  Floats bias(has_bias ? in.N : 0, one_of(kTypes));
  Array<int8_t> w(in.N * in.K);
  Array<float> scale(in.N);
  x.fill(-4, 4), bias.fill(-4, 4), fill_codes(w), fill_scales(scale);
  Convolution c{};
  c.N = in.N, c.K = in.K, c.image_step = in.image, c.element = in.element.data();
  for (int d = 0; d < 3; d++) c.windows[d] = in.windows[d], c.step[d] = in.stride[d] * in.step(d);
  c.x = x.data(), c.w = w.data(), c.w_scale = scale.data(), c.type = type;
  if (has_bias) c.bias = bias.data(), c.bias_type = bias.type();
  c.y = y.data(), c.y_step = in.N * in.P;

  const ConvolutionKernels& of = *kernels.convolution(type);
  Array<char> scratch((of.scratch_bytes(c) + 63) / 64 * 64);
  const Block block = random_below(2) ? Block{0, in.P, 0, in.N} : random_block({in.P, in.N, in.K, 1});
  const int64_t asked_image = random_below(in.images);
  of.run(c, asked_image, block, scratch.data());
  for (int64_t i = 0; i < y.size(); i++) {
    const int64_t image = i / in.P / in.N, n = i / in.P % in.N, p = i % in.P;
    if (image != asked_image || n < block.n0 || n >= block.n1 || p < block.m0 || p >= block.m1) {
      if (!y.untouched(i)) fail("%s: convolution: y[%ld, %ld, %ld] was not asked for", kernels.isa, image, n, p);
      continue;
    }
    Convolved right{0, 0, in.K, scale[n], has_bias ? bias[n] : 0};
    for (int64_t k = 0; k < in.K; k++) {
      const double product = x[image * in.image + in.start(p) + in.element[k]] * w[n * in.K + k];
      right.sum += product, right.magnitude += std::fabs(product);
    }
    if (!right.is(y[i], type))
      fail("%s: convolution of %s, %ld channels, %ld windows, K %ld, N %ld: y[%ld, %ld, %ld] is %.9g, expected %.9g",
           kernels.isa, name_of(type), in.C, in.P, in.K, in.N, image, n, p, y[i], right.expected());
  }
}

// A convolution of zero-padded images with groups, compared with sums over their windows.
void check_narrow_convolution(const Kernels& kernels, int64_t C, int64_t N, const int64_t (&most)[3]) {
  const bool has_bias = random_below(2);
  NarrowConvolution c{};
  c.threads = 1 + random_below(5);
  c.images = 1 + random_below(2), c.groups = 1 + random_below(3), c.N = N, c.C = C;
  c.type = one_of(kTypes), c.bias_type = one_of(kTypes);
  int64_t image = 1, P = 1, filter = C;
  for (int d = 0; d < 3; d++) {
    c.windows[d] = 1 + random_below(most[d]), c.count[d] = 1 + random_below(4);
    c.stride[d] = 1 + random_below(3), c.dilation[d] = 1 + random_below(2);
    const int64_t seen = (c.windows[d] - 1) * c.stride[d] + (c.count[d] - 1) * c.dilation[d] + 1;
    c.padding[d] = random_below(std::min<int64_t>(3, (seen + 1) / 2));
    c.size[d] = seen - 2 * c.padding[d] + random_below(c.stride[d]);
    image *= c.size[d], P *= c.windows[d], filter *= c.count[d];
  }
  const int64_t planes = c.images * c.groups;
  Floats x(planes * C * image, c.type), y(planes * N * P, c.type), bias(has_bias ? c.groups * N : 0, c.bias_type);
  Array<int8_t> w(c.groups * N * filter);
  Array<float> scale(c.groups * N);
  x.fill(-4, 4), bias.fill(-4, 4), fill_codes(w), fill_scales(scale);
  c.x = x.data(), c.w = w.data(), c.w_scale = scale.data(), c.y = y.data();
  if (has_bias) c.bias = bias.data();

  const NarrowConvolutionKernels& of = *kernels.narrow_convolution(c.type);
  const int64_t parts = of.parts(c), first = random_below(parts);
  Array<char> scratch((of.scratch_bytes(c) + 63) / 64 * 64);
  of.run(c, first, parts, scratch.data());
  of.run(c, 0, first, scratch.data());
  for (int64_t i = 0; i < y.size(); i++) {
    const int64_t column = i / P % (c.groups * N), plane = i / P / N, p = i % P;
    const int64_t window[3] = {p / c.windows[2] / c.windows[1], p / c.windows[2] % c.windows[1], p % c.windows[2]};
    Convolved right{0, 0, filter, scale[column], has_bias ? bias[column] : 0};
    for (int64_t k = 0; k < filter; k++) {
      int64_t at = plane * C + k / (c.count[0] * c.count[1] * c.count[2]);
      const int64_t of_filter[3] = {k / c.count[2] / c.count[1] % c.count[0], k / c.count[2] % c.count[1],
                                    k % c.count[2]};
      bool inside = true;
      for (int d = 0; d < 3; d++) {
        const int64_t place = window[d] * c.stride[d] + of_filter[d] * c.dilation[d] - c.padding[d];
        inside = inside && place >= 0 && place < c.size[d];
        at = at * c.size[d] + place;
      }
      const double product = inside ? x[at] * w[column * filter + k] : 0;
      right.sum += product, right.magnitude += std::fabs(product);
    }
    if (!right.is(y[i], c.type))
      fail("%s: narrow convolution of %s, %ld channels, %ld columns, %ld windows: y[%ld] is %.9g, expected %.9g",
           kernels.isa, name_of(c.type), C, N, P, i, y[i], right.expected());
  }
}

void check_narrow_convolutions(const Kernels& kernels) {
  if (!kernels.narrow_convolution(Float::f32)) return;
  for (int i = 0; i < 400; i++)
    check_narrow_convolution(kernels, 1 + random_below(5), 1 + random_below(20), {2, 6, 40});
  for (int i = 0; i < 3; i++) check_narrow_convolution(kernels, 1, 2, {1, 1, 3000});   // more than are taken at once
  for (int i = 0; i < 3; i++) check_narrow_convolution(kernels, 300, 3, {1, 3, 100});  // long windows
}

void check_convolutions(const Kernels& kernels) {
  if (!kernels.convolution(Float::f32)) return;
  constexpr int64_t kN[] = {1, 2, 7, 15, 16, 17, 31, 32, 33, 40, 70};
  for (int i = 0; i < 300; i++)
    check_convolution(kernels, Windows(1 + random_below(2), 1 + random_below(6), one_of(kN), {2, 6, 30}));
  for (int i = 0; i < 3; i++) check_convolution(kernels, Windows(1, 1, 3, {1, 50, 50}));  // more than are taken at once
  for (int i = 0; i < 3; i++) check_convolution(kernels, Windows(1, 300, 3, {1, 2, 30}));  // long windows
}

// -- rows ------------------------------------------------------------------------------------------------------------

int8_t code_of(float value, float scale) {
  return static_cast<int8_t>(std::fmax(-127.0f, std::fmin(127.0f, std::nearbyint(value / scale))));
}

double largest_of(Floats& x, int64_t begin, int64_t end) {
  double largest = 0;
  for (int64_t i = begin; i < end; i++) {
    const double value = x[i];
    if (std::isnan(value)) return value;
    largest = std::max(largest, std::fabs(value));
  }
  return largest;
}

// As octavo/primitives.py defines it: amax / 127 in fp32, rounded to the type, one step up if that clips.
float weight_scale_of(float largest, Float type) {
  if (largest == 0) return 1;
  float scale = largest / 127;
  uint32_t bits = 0;
  if (type == Float::f32)
    memcpy(&bits, &scale, sizeof bits);
  else
    bits = encode(scale, type);
  scale = static_cast<float>(decode(bits, type));
  return largest / scale > 127.5f ? static_cast<float>(decode(bits + 1, type)) : scale;
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

void check_codes(const char* isa, const char* what, Floats& x, int64_t K, Array<int8_t>& codes, int64_t row,
                 float found, float scale) {
  if (!same(found, scale))
    fail("%s: %s of %s, K %ld: scale is %.9g, expected %.9g", isa, what, name_of(x.type()), K, found, scale);
  if (!std::isfinite(scale)) return;  // its codes mean nothing
  for (int64_t k = 0; k < K; k++) {
    const float value = static_cast<float>(x[row * K + k]);
    if (codes[row * K + k] != code_of(value, scale))
      fail("%s: %s of %s, K %ld: the code of %.9g under %.9g is %d, expected %d", isa, what, name_of(x.type()), K,
           value, scale, codes[row * K + k], code_of(value, scale));
  }
}

void check_rows(const Kernels& kernels, int64_t rows, int64_t K, Float type) {
  Floats x(rows * K, type);
  const int lowest = type == Float::f16 ? -14 : -126, low = lowest + random_below(type == Float::f16 ? 20 : 200);
  x.fill(low, low + 1 + random_below(8));
  const auto [e, f] = format_of(type);
  if (rows > 1) {
    for (int64_t k = 0; k < K; k++) x.set_bits(k, random_below(4) ? random_below(3) : 0);  // subnormal, and zeros
    if (K && random_below(2)) x.set_bits(K + random_below(K), ((1u << e) - 1) << f | random_below(2));  // inf, NaN
  }
  const int64_t first = random_below(rows + 1), last = first + random_below(rows - first + 1);

  for (const bool weight : {false, true}) {
    Array<int8_t> codes(rows * K);
    Array<float> scale(rows);
    const Rows in{rows, K, x.data(), type, codes.data(), scale.data()};
    (weight ? kernels.quantize_weight : kernels.quantize_token)(in, 0, first);
    (weight ? kernels.quantize_weight : kernels.quantize_token)(in, first, last);
    (weight ? kernels.quantize_weight : kernels.quantize_token)(in, last, rows);
    for (int64_t r = 0; r < rows; r++) {
      const float largest = static_cast<float>(largest_of(x, r * K, (r + 1) * K)), token = largest / 127;
      if (weight && !std::isfinite(largest)) continue;  // refused by the caller
      const float expected = weight ? weight_scale_of(largest, type) : token == 0 ? 1 : token;
      check_codes(kernels.isa, weight ? "quantize_weight" : "quantize_token", x, K, codes, r, scale[r], expected);
    }
  }

  const float largest = static_cast<float>(largest_of(x, first * K, last * K));
  Array<int8_t> codes(rows * K);
  Array<float> scale(1);
  scale[0] = std::ldexp(1.0f + random_below(1 << 20) * 0x1p-20f, low - static_cast<int>(random_below(7)));
  const Rows in{rows, K, x.data(), type, codes.data(), scale.data()};
  const float found = kernels.amax(in, first, last);
  if (!same(found, largest)) fail("%s: amax of %s is %.9g, expected %.9g", kernels.isa, name_of(type), found, largest);
  kernels.quantize_given(in, 0, rows);
  for (int64_t i = 0; i < rows * K; i++) {
    const float value = static_cast<float>(x[i]);
    if (!std::isnan(value) && codes[i] != code_of(value, scale[0]))
      fail("%s: quantize_given of %s: the code of %.9g under %.9g is %d, expected %d", kernels.isa, name_of(type),
           value, scale[0], codes[i], code_of(value, scale[0]));
  }
}

void check_lookup(const Kernels& kernels, int64_t count, int64_t H, Float type) {
  constexpr int64_t kRows = 5;
  Array<int64_t> indices(count);
  Array<int8_t> table(kRows * H);
  Array<float> scale(kRows);
  Floats y(count * H, type);
  fill_codes(table);
  // Short fractions, so that products end halfway between two numbers; some are subnormal or infinite in fp16.
  for (int64_t i = 0; i < kRows; i++)
    scale[i] = std::ldexp(1.0f + random_below(64) / 64.0f, static_cast<int>(random_below(46)) - 34);
  for (int64_t i = 0; i < count; i++) indices[i] = random_below(kRows);
  const Lookup in{count, H, indices.data(), table.data(), scale.data(), y.data(), type};
  kernels.lookup(in, 0, count / 2);
  kernels.lookup(in, count / 2, count);
  for (int64_t i = 0; i < count * H; i++) {
    const int64_t row = indices[i / H];
    const float product = table[row * H + i % H] * scale[row];  // 14 bits: exact
    const uint32_t sign = product < 0 ? 0x8000 : 0;
    if (type == Float::f32 ? y[i] != product : y.bits(i) != (encode(product, type) | sign))
      fail("%s: lookup, H %ld: %.9g in %s is %.9g", kernels.isa, H, product, name_of(type), y[i]);
  }
}

// Whether y is `expected`, up to `error` and its own rounding.
bool is_near(double y, double expected, double error, Float type) {
  return std::fabs(y - expected) <= error + ulp(expected, type);
}

void check_norm(const Kernels& kernels, int64_t rows, int64_t K, Float type, bool round_first) {
  Floats x(rows * K, type), weight(K, type), y(rows * K, type);
  x.fill(-4, 4), weight.fill(-2, 2);
  const Norm in{rows, K, x.data(), weight.data(), y.data(), type, 1e-5f, round_first};
  kernels.rms_norm(in, 0, rows / 2);
  kernels.rms_norm(in, rows / 2, rows);
  for (int64_t r = 0; r < rows; r++) {
    double sum = 0;
    for (int64_t k = 0; k < K; k++) sum += x[r * K + k] * x[r * K + k];
    for (int64_t k = 0; k < K; k++) {
      const double rms = std::sqrt(sum / static_cast<double>(K) + 1e-5), unrounded = x[r * K + k] / rms;
      const double error = std::fabs(weight[k]) * (ulp(unrounded, type) + std::fabs(unrounded) * 1e-5);
      if (!is_near(y[r * K + k], unrounded * weight[k], error, type))
        fail("%s: rms_norm of %s, K %ld: %.9g, expected %.9g", kernels.isa, name_of(type), K, y[r * K + k],
             unrounded * weight[k]);
    }
  }
}

void check_rotary(const Kernels& kernels, int64_t heads, int64_t half, Float type) {
  const int64_t D = 2 * half, gap = random_below(3);  // gap: elements between heads, but not after the last
  Floats x(heads > 0 ? heads * (D + gap) - gap : 0, type), cos(D, type), sin(D, type), y(heads * D, type);
  x.fill(-4, 3), cos.fill(-3, 0), sin.fill(-3, 0);
  kernels.rotary({heads, D, x.data(), cos.data(), sin.data(), y.data(), D + gap, D, type});
  for (int64_t i = 0; i < heads * D; i++) {
    const int64_t h = i / D, d = i % D;
    const double own = x[h * (D + gap) + d] * cos[d];
    const double other = (d < half ? -1 : 1) * x[h * (D + gap) + (d + half) % D] * sin[d];
    if (!is_near(y[i], own + other, ulp(own, type) + ulp(other, type), type))
      fail("%s: rotary of %s, D %ld: %.9g, expected %.9g", kernels.isa, name_of(type), D, y[i], own + other);
  }
}

void check_gated(const Kernels& kernels, int64_t rows, int64_t K, Float type, bool cubic) {
  const int64_t gap = random_below(3);  // gap: elements between rows of gate, but not after the last
  Floats gate(rows > 0 ? rows * (K + gap) - gap : 0, type), up(rows * K, type), y(rows * K, type);
  gate.fill(-6, 5), up.fill(-2, 2);
  const float a = cubic ? 1.5957691f : 1.0f, b = cubic ? 0.0713548f : 0.0f;
  const Gated in{rows, K, gate.data(), up.data(), K + gap, K, y.data(), type, a, b};
  kernels.gated(in, 0, rows / 2);
  kernels.gated(in, rows / 2, rows);
  for (int64_t i = 0; i < rows * K; i++) {
    const double g = gate[i / K * (K + gap) + i % K], z = g * (a + b * g * g);
    const double acted = g / (1 + std::exp(-z)), fp32 = std::fabs(acted) * (8 + std::fabs(z)) * 0x1p-22;
    const double error = std::fabs(up[i]) * (ulp(acted, type) + fp32 + 1e-35);
    if (!is_near(y[i], acted * up[i], error, type))
      fail("%s: gated of %s, K %ld: %.9g * %.9g is %.9g, expected %.9g", kernels.isa, name_of(type), K, g, up[i], y[i],
           acted * up[i]);
  }
}

void check_recurrence(const Kernels& kernels, int64_t rows, int64_t H, Float type, Recurrence::Kind kind) {
  Recurrence in{kind, rows, H};
  const int64_t N = in.gates() * H;
  Floats p(rows * N, type), q(rows * N, Float::f32), h(rows * H, type), c(rows * H, Float::f32), y(rows * H, type);
  p.fill(-6, 5), q.fill(-6, 5), h.fill(-4, 0), c.fill(-4, 2);
  std::vector<double> cells;
  for (int64_t i = 0; i < rows * H; i++) cells.push_back(c[i]);
  in.p = p.data(), in.h = h.data(), in.y = y.data(), in.type = type;
  in.q = static_cast<const float*>(q.data()), in.c = static_cast<float*>(c.data());
  kernels.recur(in, 0, rows / 2);
  kernels.recur(in, rows / 2, rows);
  const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
  for (int64_t i = 0; i < rows * H; i++) {
    const int64_t at = i / H * N + i % H;
    const auto sum = [&](int64_t gate) { return p[at + gate * H] + q[at + gate * H]; };
    double cell = cells[i], expected;
    if (kind == Recurrence::Kind::lstm) {
      cell = sigmoid(sum(1)) * cell + sigmoid(sum(0)) * std::tanh(sum(2));
      expected = sigmoid(sum(3)) * std::tanh(cell);
    } else if (kind == Recurrence::Kind::gru) {
      const double n = std::tanh(p[at + 2 * H] + sigmoid(sum(0)) * q[at + 2 * H]);
      expected = n + sigmoid(sum(1)) * (h[i] - n);
    } else {
      expected = std::tanh(sum(0));
    }
    if (!is_near(y[i], expected, 2e-5, type) || !is_near(c[i], cell, 2e-5, Float::f32))
      fail("%s: recurrence %d of %s, H %ld: %.9g, expected %.9g", kernels.isa, static_cast<int>(kind), name_of(type), H,
           y[i], expected);
  }
}

void check_rows_and_lookups(const Kernels& kernels) {
  constexpr int64_t kK[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 255, 1000};
  for (int64_t K : kK) {
    for (Float type : kTypes) {
      for (int64_t rows : {0, 1, 2, 3, 7, 20}) {
        for (int repeat = 0; repeat < 3; repeat++) check_rows(kernels, rows, K, type);
      }
      for (int64_t count : {0, 1, 9}) check_lookup(kernels, count, K, type);
      for (int64_t rows : {0, 1, 5}) {
        for (bool variant : {false, true}) {
          check_norm(kernels, rows, K, type, variant);
          check_gated(kernels, rows, K, type, variant);
          check_rotary(kernels, rows, K, type);
        }
        for (auto kind : {Recurrence::Kind::lstm, Recurrence::Kind::gru, Recurrence::Kind::tanh})
          check_recurrence(kernels, rows, K, type, kind);
      }
    }
  }
}

// -- attention -------------------------------------------------------------------------------------------------------

// One operand, [batch, heads, tokens, size], with heads before tokens in memory, or tokens before heads.
struct Operand {
  int64_t heads, tokens, size;
  bool tokens_first;
  Floats values;
  std::vector<int> codes;
  std::vector<double> scale;

  Operand(int64_t batch, int64_t heads, int64_t tokens, int64_t size, Float type)
      : heads(heads),
        tokens(tokens),
        size(size),
        tokens_first(random_below(2)),
        values(batch * heads * tokens * size, type),
        codes(values.size()),
        scale(batch * heads * tokens) {
    values.fill(-3, 1);
    for (size_t row = 0; row < scale.size(); row++) {
      const float step = static_cast<float>(largest_of(values, row * size, (row + 1) * size)) / 127;
      scale[row] = step == 0 ? 1 : step;
      for (int64_t i = 0; i < size; i++)
        codes[row * size + i] = code_of(static_cast<float>(values[row * size + i]), static_cast<float>(scale[row]));
    }
  }

  int64_t row(int64_t b, int64_t h, int64_t t) const {
    return tokens_first ? (b * tokens + t) * heads + h : (b * heads + h) * tokens + t;
  }
  Heads as_heads() { return heads_of(values.data(), values.type(), size); }
  // Rows of `width` elements.
  Heads heads_of(const void* x, Float type, int64_t width) const {
    return {x, type, heads * tokens * width, (tokens_first ? 1 : tokens) * width, (tokens_first ? heads : 1) * width};
  }
  double product(int64_t row, const Operand& other, int64_t other_row) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < size; i++)
      sum += static_cast<int64_t>(codes[row * size + i]) * other.codes[other_row * size + i];
    return static_cast<double>(sum) * scale[row] * other.scale[other_row];
  }
};

// The codes of an operand, and their scales.
struct Stored {
  const Operand& of;
  Array<int8_t> codes;
  Array<float> scale;

  explicit Stored(const Operand& of) : of(of), codes(of.codes.size()), scale(of.scale.size()) {
    for (int64_t i = 0; i < codes.size(); i++) codes[i] = static_cast<int8_t>(of.codes[i]);
    for (int64_t i = 0; i < scale.size(); i++) scale[i] = static_cast<float>(of.scale[i]);
  }
  void put(Heads& x, Heads& x_scale) {
    x = of.heads_of(codes.data(), Float::f32, of.size), x_scale = of.heads_of(scale.data(), Float::f32, 1);
  }
};

// A mask whose rows forbid tokens at their ends, or anywhere; of booleans, or of numbers that are added.
struct RandomMask {
  int64_t B, H, T, S;
  Mask::Kind kind;
  Floats values;
  Array<char> booleans;
  std::vector<double> added;  // -infinity where forbidden
  Array<Allowed> allowed;

  RandomMask(int64_t batch, int64_t heads, int64_t rows, int64_t S, Mask::Kind kind)
      : B(kind != Mask::Kind::causal && random_below(2) ? batch : 1),
        H(kind != Mask::Kind::causal && random_below(2) ? heads : 1),
        T(kind == Mask::Kind::causal || random_below(3) ? rows : 1),
        S(S),
        kind(kind),
        values(is_float() ? B * H * T * S : 0, kind == Mask::Kind::bf16  ? Float::bf16
                                               : kind == Mask::Kind::f16 ? Float::f16
                                                                         : Float::f32),
        booleans(kind == Mask::Kind::boolean ? B * H * T * S : 0),
        added(B * H * T * S),
        allowed(kind == Mask::Kind::none ? 0 : B * H * T) {
    const auto [e, f] = format_of(values.type());
    const uint32_t sign = 1u << (e + f), infinity = ((1u << e) - 1) << f, lowest = sign | (infinity - 1);
    const int form = static_cast<int>(random_below(4));
    for (int64_t row = 0; row < B * H * T; row++) {
      // A score that is added to fp16's lowest number loses its last bits: a row of nothing else has no exact result.
      const bool some = form == 0 && kind == Mask::Kind::f16;
      const int64_t first = random_below(S + !some), last = first + some + random_below(S - first + !some);
      for (int64_t s = 0; s < S; s++) {
        const int64_t i = row * S + s;
        const bool open = kind == Mask::Kind::none     ? true
                          : kind == Mask::Kind::causal ? s <= row
                          : form == 3                  ? random_below(4) == 0
                                                       : s >= first && s < last;
        added[i] = open ? 0 : -std::numeric_limits<double>::infinity();
        if (kind == Mask::Kind::boolean) booleans[i] = open;
        if (!is_float()) continue;
        values.set_bits(i, open ? 0 : form == 0 ? lowest : sign | infinity);
        if (form == 2 && open) values.set_bits(i, (127u >> (8 - e)) << f | random_bits() % 2 << (e + f));  // 1, -1
        added[i] = values[i];
      }
    }
  }
  bool is_float() const { return kind > Mask::Kind::boolean; }

  Mask as_mask() {
    const void* x = kind == Mask::Kind::boolean ? static_cast<void*>(booleans.data()) : values.data();
    return {kind, x, B, H, T, B > 1 ? H * T * S : 0, H > 1 ? T * S : 0, T > 1 ? S : 0, allowed.data()};
  }
  double at(int64_t b, int64_t h, int64_t t, int64_t s) const {
    return added[(((B > 1 ? b : 0) * H + (H > 1 ? h : 0)) * T + (T > 1 ? t : 0)) * S + s];
  }
};

// An attention to be computed: kv * shared query heads, kv key heads, and a mask.
struct AttentionCase {
  int64_t batch, kv, shared, T, S, D, Dv;
  Operand q, k, v;
  RandomMask mask;
  Floats y;

  // type: of q, k, v and y; if null, each has its own.
  AttentionCase(int64_t batch, int64_t kv, int64_t shared, int64_t T, int64_t S, int64_t D, int64_t Dv, Mask::Kind kind,
                const Float* type)
      : batch(batch),
        kv(kv),
        shared(shared),
        T(T),
        S(S),
        D(D),
        Dv(Dv),
        q(batch, kv * shared, T, D, type ? *type : one_of(kTypes)),
        k(batch, kv, S, D, type ? *type : one_of(kTypes)),
        v(batch, kv, S, Dv, type ? *type : one_of(kTypes)),
        mask(batch, kv * shared, T, S, kind),
        y(batch * kv * shared * T * Dv, type ? *type : one_of(kTypes)) {}

  Attention as_attention() {
    Attention a{};
    a.B = batch, a.H = kv * shared, a.KV = kv, a.T = T, a.S = S, a.D = D, a.Dv = Dv;
    a.q = q.as_heads(), a.k = k.as_heads(), a.v = v.as_heads();
    a.mask = mask.as_mask();
    a.scaling = 0.5f / std::sqrt(static_cast<float>(D));
    a.y = y.data(), a.y_type = y.type();
    return a;
  }

  void fail_at(const char* isa, const char* what, int64_t i, double expected) {
    fail(
        "%s: %s of %ld heads that share %ld of a batch of %ld, T %ld S %ld D %ld Dv %ld, mask %d: y[%ld] is %.9g, "
        "expected %.9g in %s",
        isa, what, kv * shared, kv, batch, T, S, D, Dv, static_cast<int>(mask.kind), i, y[i], expected,
        name_of(y.type()));
  }
};

// All steps, in several parts.
void attend(const AttentionKernels& kernels, Attention a) {
  Array<char> packed(kernels.packed_bytes(a) * a.B * a.KV), scratch((kernels.scratch_bytes(a) + 63) / 64 * 64);
  a.packed = packed.data();
  const int64_t of_mask = a.mask.kind == Mask::Kind::none ? 0 : a.mask.B * a.mask.H * a.mask.T;
  kernels.mask(a, 0, of_mask / 2);
  kernels.mask(a, of_mask / 2, of_mask);
  const int64_t rows = a.rows(), height = rows <= kernels.most_rows(a) ? rows : 1 + random_below(kernels.most_rows(a));
  const auto over_tokens = [&](auto step) {
    for (int64_t head = 0; head < a.B * a.KV; head++)
      for (int64_t s0, s1 = a.S; s1 > 0; s1 = s0) {
        s0 = (s1 - 1) / kAttentionTokens * kAttentionTokens;
        s0 -= random_below(s0 / kAttentionTokens + 1) * kAttentionTokens;
        step(a, head, s0, s1, scratch.data());
      }
  };
  const auto over_rows = [&](auto step) {
    for (int64_t head = 0; head < a.B * a.KV; head++)
      for (int64_t r = 0; r < rows; r += height) step(a, head, r, std::min(r + height, rows), scratch.data());
  };
  over_tokens(kernels.tokens);
  over_rows(kernels.rows);
  if (!kernels.values) return;
  over_tokens(kernels.values);
  over_rows(kernels.join);
}

void check_int8_attention(const Kernels& kernels, AttentionCase c, bool of_codes) {
  const int64_t S = c.S, Dv = c.Dv;
  const Operand &q = c.q, &k = c.k, &v = c.v;
  Attention a = c.as_attention();
  Stored keys(k), values(v);
  if (of_codes) keys.put(a.k, a.k_scale), values.put(a.v, a.v_scale);
  a.has_softcap = random_below(3) == 0, a.softcap = 2;
  const bool few = c.shared * c.T <= kAttentionRows && random_below(4);  // else as if they were many
  attend(few ? *kernels.int8_attention_of_few : *kernels.int8_attention, a);

  std::vector<double> weight(S);
  for (int64_t i = 0; i < a.B * a.H * a.T; i++) {
    const int64_t b = i / (a.H * a.T), h = i / a.T % a.H, t = i % a.T, own = q.row(b, h, t);
    double top = -std::numeric_limits<double>::infinity(), total = 0, most = 0;
    for (int64_t s = 0; s < S; s++) {
      double score = q.product(own, k, k.row(b, h / c.shared, s)) * a.scaling;
      if (a.has_softcap) score = std::tanh(score / a.softcap) * a.softcap;
      weight[s] = score + c.mask.at(b, h, t, s);
      top = std::max(top, weight[s]);
    }
    for (double& one : weight) total += one = std::isinf(top) ? 0 : std::exp(one - top);
    for (int64_t s = 0; s < S; s++) most = std::max(most, weight[s] *= v.scale[v.row(b, h / c.shared, s)]);
    for (int64_t d = 0; d < Dv; d++) {
      double sum = 0, allowed = 0;
      for (int64_t s = 0; s < S && most > 0; s++) {
        const double exact = weight[s] * 127 / most, code = v.codes[v.row(b, h / c.shared, s) * Dv + d];
        sum += std::nearbyint(exact) * code;
        if (std::fabs(exact - std::floor(exact) - 0.5) < 2e-3) allowed += std::fabs(code);  // either code is right
      }
      const double step = most > 0 ? most / 127 / total : 0, expected = sum * step;
      allowed = allowed * step + 1e-4 * std::fabs(expected) + ulp(expected, c.y.type());
      if (!(std::fabs(c.y[i * Dv + d] - expected) <= allowed))
        c.fail_at(kernels.isa, "int8 attention", i * Dv + d, expected);
    }
  }
}

void check_float_attention(const Kernels& kernels, AttentionCase c, bool of_codes) {
  Attention a = c.as_attention();
  Stored keys(c.k), values(c.v);
  if (of_codes) keys.put(a.k, a.k_scale), values.put(a.v, a.v_scale);
  attend(of_codes ? *kernels.attention_of_codes(c.y.type()) : *kernels.float_attention(c.y.type()).attention, a);
  const auto element_of = [&](Operand& x, int64_t row, int64_t i) {
    const int64_t at = row * x.size + i;
    return of_codes ? x.codes[at] * static_cast<double>(static_cast<float>(x.scale[row])) : x.values[at];
  };
  // Relative errors: of weights e^... that are rounded, and of scores and sums; and half a step of fixed-point numbers,
  // relative to the largest of them.
  const double rounding = c.y.type() == Float::bf16 ? 0x1p-8 : 1e-4;
  const double half_step = of_codes && c.y.type() != Float::f32 ? 0.51 / 32767 : 0;
  std::vector<double> weight(c.S);
  for (int64_t i = 0; i < a.B * a.H * a.T; i++) {
    const int64_t b = i / (a.H * a.T), h = i / a.T % a.H, t = i % a.T, own = c.q.row(b, h, t);
    double top = -std::numeric_limits<double>::infinity(), total = 0, lost = 0, heaviest = 0;
    for (int64_t s = 0; s < c.S; s++) {
      const int64_t key = c.k.row(b, h / c.shared, s);
      double score = 0, keys = 0;
      for (int64_t d = 0; d < c.D; d++) {
        score += c.q.values[own * c.D + d] * element_of(c.k, key, d), keys += std::fabs(element_of(c.k, key, d));
      }
      lost = std::max(lost, half_step * largest_of(c.q.values, own * c.D, (own + 1) * c.D) * keys * a.scaling);
      weight[s] = score * a.scaling + c.mask.at(b, h, t, s);
      top = std::max(top, weight[s]);
    }
    for (double& one : weight) total += one = std::isinf(top) ? 0 : std::exp(one - top);
    for (int64_t s = 0; s < c.S && total > 0; s++)
      heaviest = std::max(heaviest, weight[s] / total * c.v.scale[c.v.row(b, h / c.shared, s)]);
    for (int64_t d = 0; d < c.Dv; d++) {
      double sum = 0, size = 0, codes = 0;
      for (int64_t s = 0; s < c.S && total > 0; s++) {
        codes += std::abs(c.v.codes[c.v.row(b, h / c.shared, s) * c.Dv + d]);
        const double part = weight[s] / total * element_of(c.v, c.v.row(b, h / c.shared, s), d);
        sum += part, size += std::fabs(part);
      }
      const double allowed = (rounding + 2 * lost) * size + half_step * heaviest * codes + ulp(sum, c.y.type());
      if (!(std::fabs(c.y[i * c.Dv + d] - sum) <= allowed))
        c.fail_at(kernels.isa, "float attention", i * c.Dv + d, sum);
    }
  }
}

void check_attentions(const Kernels& kernels) {
  constexpr int64_t kT[] = {1, 2, 3, 7, 12, 13, 30, 45}, kS[] = {1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 129, 200, 300};
  constexpr int64_t kD[] = {1, 2, 3, 4, 5, 15, 16, 31, 33, 63, 64, 65, 130};
  using Kind = Mask::Kind;
  constexpr int64_t kMany = 1060;  // tokens, more than float attention takes at a time
  for (const Float type : kTypes)
    if (kernels.float_attention(type).attention)
      for (const Kind kind : {Kind::causal, Kind::boolean})
        check_float_attention(kernels, AttentionCase(1, 1, 2, kMany / 8, kMany, 33, 17, kind, &type), random_below(2));
  for (int64_t S : kS) {
    for (int64_t D : kD) {
      const auto random_case = [&](Kind kind, const Float* type) {
        return AttentionCase(1 + random_below(2), 1 + random_below(2), 1 + random_below(4), one_of(kT), S, D,
                             one_of(kD), kind, type);
      };
      if (kernels.int8_attention)
        for (const Kind kind : {Kind::none, Kind::boolean, Kind::f32, Kind::bf16, Kind::f16})
          check_int8_attention(kernels, random_case(kind, nullptr), random_below(2));
      for (const Float type : kTypes)
        if (kernels.float_attention(type).attention)
          for (const Kind kind : {Kind::none, Kind::causal, Kind::boolean})
            check_float_attention(kernels, random_case(kind, &type), random_below(2));
    }
  }
}

// -- which kernels a machine gets ------------------------------------------------------------------------------------

void check_choice(const Machine& machine, const char* forced, const char* isa, const char* why) {
  const Choice choice = choose(machine, forced);
  const char* got = choice.kernels ? choice.kernels->isa : "none";
  if (strcmp(got, isa) != 0 || !strstr(choice.why, why))
    fail("choose with OCTAVO_ISA '%s': is %s (%s), expected %s (... %s ...)", forced ? forced : "", got, choice.why,
         isa, why);
}

void check_choices() {
  const Machine none{false, false, false, false};
  check_choice(none, nullptr, "none", "no native kernel for this processor is faster");
  check_choice(none, "scalar", "scalar", "forced by OCTAVO_ISA");
  check_choice(none, "neon9", "none", "'neon9', expected one of: ");
  check_choice(none, std::string(1000, 'x').c_str(), "none", "OCTAVO_ISA is 'xxx");
#if defined(__x86_64__)
  Machine avx2{}, avxvnni{}, avx512{}, denied{}, amx{};
  avx2.avx2 = true;
  avxvnni = avx512 = avx2;
  avxvnni.avxvnni = avx512.avx512 = true;
  denied = avx512;
  denied.amx = true;
  amx = denied;
  amx.amx_permitted = true;
  check_choice(none, "", "none", "is faster than the reference");
  check_choice(avx2, "", "avx2", "lacks AVX-VNNI");
  check_choice(avxvnni, "", avxvnni_kernels.isa, "lacks AVX-512");
  check_choice(avx512, "", "avx512", "lacks AMX");
  check_choice(denied, "", "avx512", "the operating system denied AMX tiles");
  check_choice(amx, "", "amx", "the best there is");
  check_choice(amx, nullptr, "amx", "the best there is");
  for (const char* isa : {"scalar", "avx2", "avx512", "amx"}) check_choice(amx, isa, isa, "forced by OCTAVO_ISA");
  check_choice(avxvnni, avxvnni_kernels.isa, avxvnni_kernels.isa, "forced by OCTAVO_ISA");
  check_choice(none, "avx2", "none", "'avx2', but this processor or operating system lacks AVX2");
  check_choice(avx2, "avx512", "none", "'avx512', but this processor or operating system lacks AVX-512");
  check_choice(avx512, "amx", "none", "'amx', but this processor or operating system lacks AMX");
  check_choice(denied, "amx", "none", "'amx', but the operating system denied AMX tiles");
  check_choice(amx, "AVX2", "none", "avx2, scalar");
#endif
}

}  // namespace

int main() {
  check_choices();
  std::vector<const Kernels*> all;
  for (const char* isa : {"scalar", "avx2", "avxvnni", "avx512", "amx"}) {
    const Choice choice = choose(this_machine(), isa);
    if (choice.kernels && choice.kernels->w8a8.run)
      all.push_back(choice.kernels);
    else
      printf("%s: left out, %s\n", isa, choice.kernels ? "it has no kernels" : choice.why);
  }
#if defined(OCTAVO_EMULATED_VNNI)
  if (this_machine().avx2) all.push_back(&avxvnni_kernels);
#endif
  for (size_t i = 0; i < all.size(); i++) {
    const Kernels& kernels = *all[i];
    // What a table shares with an earlier one has been checked with that.
    const auto is_new = [&](const auto& of) {
      return std::none_of(all.begin(), all.begin() + i, [&](const Kernels* one) { return of(*one) == of(kernels); });
    };
    if (is_new([](const Kernels& k) { return k.quantize_token; })) check_rows_and_lookups(kernels);
    if (is_new([](const Kernels& k) { return k.int8_attention; })) check_attentions(kernels);
    if (is_new([](const Kernels& k) { return k.convolution(Float::f32); })) check_convolutions(kernels);
    if (is_new([](const Kernels& k) { return k.narrow_convolution(Float::f32); })) check_narrow_convolutions(kernels);
  }
  check_linear_layers(all);
  for (const Kernels* kernels : all)
    printf("%s: every shape right, and nothing touched outside of its operands\n", kernels->isa);
}
