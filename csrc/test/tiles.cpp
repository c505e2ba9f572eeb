// Checks the AMX kernels on machines without AMX: amx.cpp, compiled over emulated tiles, against loops in int64 and
// double. Every operand ends at a page that must not be touched, or begins right after one.
//
// `make sanitize` and tests/ops/test_tiles.py build and run this. AVX-512, which stands beside the tiles, is not
// emulated.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#include "../kernels.h"

namespace octavo {
bool holds_tiles();
}

namespace {

using namespace octavo;

// Memory between two pages that must not be touched. It ends right before the second one, or, `at_start`, begins right
// behind the first.
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
  else  // powers of two, which are all that is needed of fp16
    static_cast<uint16_t*>(base)[i] = static_cast<uint16_t>((std::ilogb(value) + 15) << 10 | (value < 0) << 15);
}

// Half a unit in the last place of `type`, relative; and the smallest difference there is.
double half_ulp(Float type) { return std::ldexp(1, type == Float::f32 ? -24 : type == Float::bf16 ? -8 : -11); }
double smallest(Float type) { return std::ldexp(1, type == Float::f16 ? -24 : -133); }

struct Shape {
  int64_t M, N, K;
};

struct Case {
  Shape shape;
  bool codes;       // w8a8, else w8a16
  bool ends_only;   // codes are -128 and 127 only
  bool row_scales;  // x_scale is [M], else [1]
  bool bias;
  Float bias_type, y_type;
  int64_t threads;  // columns are dealt out to so many, in units of 32
  bool at_start;
  int64_t nan_row;  // of x in w8a16, or -1
};

[[noreturn]] void fail(const Case& c, const char* what, int64_t m, int64_t n, double got, double expected) {
  fprintf(stderr, "%s M=%ld N=%ld K=%ld ends_only=%d row_scales=%d bias=%d of type %d, y of type %d, threads=%ld\n",
          c.codes ? "w8a8" : "w8a16", c.shape.M, c.shape.N, c.shape.K, c.ends_only, c.row_scales, c.bias,
          static_cast<int>(c.bias_type), static_cast<int>(c.y_type), c.threads);
  fprintf(stderr, "%s at [%ld, %ld]: got %.9g, expected %.9g\n", what, m, n, got, expected);
  exit(1);
}

void check(const Case& c) {
  const auto [M, N, K] = c.shape;
  const int64_t size = c.codes ? 1 : 2;
  const Fenced x(M * K * size, c.at_start), w(N * K, c.at_start), w_scale(N * 4, c.at_start),
      x_scale((c.row_scales ? M : 1) * 4, c.at_start), bias(N * size_of(c.bias_type), c.at_start),
      y(M * N * size_of(c.y_type), c.at_start);
  const auto code = [&] { return static_cast<int8_t>(c.ends_only ? (any(0, 1) ? 127 : -128) : any(-128, 127)); };
  for (int64_t i = 0; i < N * K; i++) w.as<int8_t>()[i] = code();
  for (int64_t i = 0; i < M * K; i++) {
    if (c.codes)
      x.as<int8_t>()[i] = code();
    else
      x.as<uint16_t>()[i] = to_bf16(i / std::max<int64_t>(K, 1) == c.nan_row ? NAN : normal());
  }
  for (int64_t n = 0; n < N; n++) w_scale.as<float>()[n] = std::ldexp(1 + 0.01f * n / N, -8);
  for (int64_t m = 0; m < (c.row_scales ? M : 1); m++) x_scale.as<float>()[m] = 0.01f + 0.001f * m;
  for (int64_t n = 0; n < N; n++) write(bias.as<void>(), c.bias_type, n, std::ldexp(n % 2 ? -1 : 1, n % 7 - 3));
  memset(y.as<char>(), 0x5a, M * N * size_of(c.y_type));

  Linear layer{};
  layer.M = M, layer.N = N, layer.K = K, layer.groups = 1;
  layer.x = x.as<void>(), layer.x_type = c.codes ? Float::f32 : Float::bf16;
  if (c.codes) layer.x_scale = x_scale.as<float>(), layer.x_scale_step = c.row_scales;
  layer.w = w.as<int8_t>(), layer.w_scale = w_scale.as<float>();
  if (c.bias) layer.bias = bias.as<void>(), layer.bias_type = c.bias_type;
  layer.y = y.as<void>(), layer.y_type = c.y_type;

  const LinearKernels& kernels = c.codes ? amx_kernels.w8a8 : amx_kernels.w8a16(Float::bf16);
  const Fenced scratch(kernels.scratch_bytes(layer), c.at_start, 64);
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
      if (m == c.nan_row && K) {
        if (!std::isnan(got)) fail(c, "a row with NaN", m, n, got, NAN);
        continue;
      }
      double expected, error;  // before y is rounded to its type
      if (c.codes) {
        int64_t sum = 0;
        for (int64_t k = 0; k < K; k++) sum += int64_t{x.as<int8_t>()[m * K + k]} * row[k];
        // The sum is exact, its conversion to fp32 is not, nor are the scales' product and the product with it.
        expected = static_cast<double>(sum) * layer.x_scale[m * layer.x_scale_step] * layer.w_scale[n];
        error = 3 * std::fabs(expected) * half_ulp(Float::f32);
      } else {
        double sum = 0, magnitude = 0;
        for (int64_t k = 0; k < K; k++) {
          const double product = read(layer.x, Float::bf16, m * K + k) * row[k];
          sum += product, magnitude += std::fabs(product);
        }
        expected = sum * layer.w_scale[n];
        error = (16 + std::sqrt(static_cast<double>(K))) * magnitude * layer.w_scale[n] * half_ulp(Float::f32);
      }
      if (c.bias) {
        expected += read(layer.bias, c.bias_type, n);
        error += std::fabs(expected) * half_ulp(Float::f32);
      }
      error = 1.001 * (error + (std::fabs(expected) + error) * half_ulp(c.y_type)) + smallest(c.y_type);
      if (c.y_type == Float::f16 && std::fabs(expected) + error >= 65504) continue;  // infinite, or not
      if (!(std::fabs(got - expected) <= error)) fail(c, "y", m, n, got, expected);
    }
  }
}

const Float kTypes[] = {Float::f32, Float::bf16, Float::f16};

Case any_case(Shape shape, bool codes) {
  const bool ends_only = any(0, 3) == 0, row_scales = any(0, 1), bias = any(0, 1), at_start = any(0, 1);
  const int64_t nan_row = codes || any(0, 3) ? -1 : any(0, shape.M - 1);
  const Float bias_type = kTypes[any(0, 2)], y_type = kTypes[any(0, 2)];
  return {shape, codes, ends_only, row_scales, bias, bias_type, y_type, any(1, 3), at_start, nan_row};
}

void check_both(Shape shape) {
  check(any_case(shape, true));
  check(any_case(shape, false));
}

// Few rows and groups of columns, left to AVX-512, must arrive there: with enough scratch, and packed where it wants
// that.
void check_left_to_avx512(int64_t M, int64_t groups) {
  const int64_t N = 33, K = 64;
  const Fenced x(M * K * 2, false), w(N * K, false), w_scale(N * groups * 4, false), y(M * N * 4, false);
  for (int64_t i = 0; i < M * K; i++) x.as<uint16_t>()[i] = to_bf16(1);
  for (int64_t i = 0; i < N * K; i++) w.as<int8_t>()[i] = 1;
  for (int64_t n = 0; n < N * groups; n++) w_scale.as<float>()[n] = n % 2 ? 3 : 1;
  Linear layer{M,      N,       K,          x.as<void>(), Float::bf16, nullptr, 0, w.as<int8_t>(), w_scale.as<float>(),
               groups, nullptr, Float::f32, y.as<void>(), Float::f32};
  const LinearKernels& kernels = amx_kernels.w8a16(Float::bf16);
  const Fenced scratch(kernels.scratch_bytes(layer), false, 64), packed(kernels.packed_bytes(layer), false, 64);
  if (kernels.packed_bytes(layer)) {
    layer.packed = packed.as<char>();
    kernels.pack(layer, 0, M);
  }
  kernels.run(layer, {0, M, 0, N}, scratch.as<void>());
  for (int64_t i = 0; i < M * N; i++) {
    const float expected = groups == 2 ? 32 + 96 : 64 * w_scale.as<float>()[i % N];
    if (y.as<float>()[i] != expected) {
      fprintf(stderr, "M=%ld groups=%ld: y[%ld] is %g, expected %g\n", M, groups, i, y.as<float>()[i], expected);
      exit(1);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vbmi") ||
      !__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16")) {
    puts("amx, emulated: left out, this processor lacks AVX-512 with VBMI, VNNI and BF16");
    return 0;
  }
  generator.seed(argc > 1 ? static_cast<unsigned>(atoi(argv[1])) : 1);
  check_left_to_avx512(3, 1);
  check_left_to_avx512(7, 2);
  check_left_to_avx512(50, 2);
  for (const int64_t M : {1, 4, 5, 15, 16, 17, 31, 32, 33, 48, 65})
    for (const int64_t N : {1, 15, 16, 17, 32, 33, 95})
      for (const int64_t K : {0, 1, 31, 32, 33, 63, 64, 65, 257}) check_both({M, N, K});
  for (int i = 0; i < 60; i++) check_both({any(1, 300), any(1, 130), any(0, 700)});
  check_both({300, 70, 4100});  // several blocks of rows of x
  check_both({37, 70, 8300});   // several pieces of K
  check_both({33, 70, 12345});
  for (const bool codes : {true, false}) {  // and several rounds of columns, since sums wait for the last piece
    Case all_at_once = any_case({129, 1060, 8256}, codes);
    all_at_once.threads = 1;
    check(all_at_once);
  }
  puts("amx, emulated: every shape right, and nothing touched outside of its operands");
}
