// Checks exp and tanh of csrc/exponential.h against those of double: for every 64th of all values of fp32, and at the
// ends of their ranges. tests/ops/test_exponential.py builds and runs this, with OCTAVO_VECTORS for "avx2.h" or
// "avx512.h", and the instruction sets that go with it. Exit status 0: all is right.

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "../kernels.h"

#include "../rows.h"

#include OCTAVO_VECTORS

namespace {

using octavo::Vec;
constexpr int kLanes = Vec::kLanes;

constexpr double kSmallest = 0x1p-149;  // the smallest number of fp32 above 0

float value_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The error of an fp32 value, in units in the last place.
double distance(float value, double expected) {
  int exponent;
  std::frexp(expected, &exponent);
  return std::fabs(value - expected) / std::fmax(std::ldexp(1.0, exponent - 24), kSmallest);
}

using Function = Vec::F (*)(Vec::F);

Vec::F exp_of(Vec::F x) { return octavo::exp_of_negative<Vec>(x); }
Vec::F tanh_of(Vec::F x) { return octavo::tanh_of<Vec>(x); }

void apply(Function function, const float* x, float* y) { Vec::store(y, function(Vec::load(x))); }

// Checks every 64th of the numbers with these bits. Returns whether each is right to `allowed` units in the last place.
bool check(const char* name, Function function, double (*exact)(double), uint32_t first, uint32_t last,
           double allowed) {
  double worst = 0;
  for (uint64_t bits = first; bits <= last; bits += kLanes * 64) {
    float x[kLanes], y[kLanes];
    for (int i = 0; i < kLanes; i++)
      x[i] = value_of(static_cast<uint32_t>(bits + 64 * i < last ? bits + 64 * i : last));
    apply(function, x, y);
    for (int i = 0; i < kLanes; i++) {
      const double error = distance(y[i], exact(x[i]));
      if (!(error <= worst)) worst = error;
      if (!(error <= allowed)) {
        fprintf(stderr, "%s(%.9g) is %.9g, expected %.9g: %.2f units of the last place\n", name, x[i], y[i],
                exact(x[i]), error);
        return false;
      }
    }
  }
  printf("%s: right to %.2f units of the last place\n", name, worst);
  return true;
}

}  // namespace

int main() {
  constexpr uint32_t kZero = 0, kMinus = 0x80000000u, kInfinity = 0x7f800000u, kNan = 0x7fc00000u;
  bool right = check("exp", exp_of, std::exp, kMinus, kMinus | kInfinity, 2);  // from -0 to -inf
  right &= check("tanh", tanh_of, std::tanh, kZero, kInfinity, 3);
  right &= check("tanh", tanh_of, std::tanh, kMinus, kMinus | kInfinity, 3);
  const Function both[] = {exp_of, tanh_of};
  for (const Function function : both) {
    float x[kLanes], y[kLanes];
    for (float& one : x) one = value_of(kNan);
    apply(function, x, y);
    for (const float one : y) right &= std::isnan(one);
  }
  return right ? 0 : 1;
}
