// What a kernel is: a function over raw pointers. It allocates nothing, starts no thread and knows nothing of torch.
//
// Every instruction set has one translation unit (scalar.cpp, avx2.cpp, avx512.cpp, amx.cpp) that fills one `Kernels`
// table; `select.cpp` chooses the table, once; `bind.cpp` hands it tensors and splits the work over torch's threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo {

// Element types of activations.
enum class Float : int { f32, bf16, f16 };

inline int64_t size_of(Float type) { return type == Float::f32 ? 4 : 2; }

// A linear layer with int8 weights, y = x W^T. Rows are contiguous, of K elements (x, w) or N (y).
//
//     w8a16   y[m, n] = sum_k x[m, k] * w[n, k] * w_scale[n] + bias[n]
//     w8a8    y[m, n] = (sum_k x[m, k] * w[n, k]) * (x_scale[m] * w_scale[n]) + bias[n]      the sum is exact, in int32
struct Linear {
  int64_t M, N, K;
  const void* x;         // [M, K]: `x_type`; int8 codes in w8a8
  Float x_type;          // w8a16 only
  const float* x_scale;  // w8a8 only: [M], or [1] if `x_scale_step` is 0
  int64_t x_scale_step;
  const int8_t* w;       // [N, K], as on disk: it is never repacked
  const float* w_scale;  // [N, groups]
  int64_t groups;        // divides K; 1 is per_channel, and the only choice in w8a8
  const void* bias;      // [N] of `bias_type`, or null
  Float bias_type;
  void* y;  // [M, N] of `y_type`
  Float y_type;
};

// The part of y that one call computes: rows [m0, m1), columns [n0, n1).
struct Block {
  int64_t m0, m1, n0, n1;
};

// Rows of float values -> int8 codes: code = clamp(round_half_even(x / scale), -127, 127), in fp32.
struct Rows {
  int64_t rows, K;
  const void* x;  // [rows, K]
  Float x_type;
  int8_t* codes;  // [rows, K]
  float* scale;   // found: [rows]; given: [1]
};

// Rows of an int8 table -> float values: code * scale, rounded once.
struct Lookup {
  int64_t count, H;
  const int64_t* indices;  // [count], rows of the table
  const int8_t* table;     // [V, H]
  const float* scale;      // [V]
  void* y;                 // [count, H] of `y_type`
  Float y_type;
};

struct Kernels {
  const char* isa;

  // `scratch`: 64-byte aligned, as many bytes as `*_scratch` says, and not shared between threads.
  size_t (*w8a16_scratch)(const Linear&);
  void (*w8a16)(const Linear&, Block, void* scratch);
  size_t (*w8a8_scratch)(const Linear&);
  void (*w8a8)(const Linear&, Block, void* scratch);

  // A weight's rows [r0, r1): scale = amax / 127, rounded to the type of x; one step up where that would clip.
  void (*quantize_weight)(const Rows&, int64_t r0, int64_t r1);
  // An activation's: scale = amax / 127 in fp32. Both: 1 for a row of zeros, NaN or inf where the row holds such.
  void (*quantize_token)(const Rows&, int64_t r0, int64_t r1);
  // With the scale that is given.
  void (*quantize_given)(const Rows&, int64_t r0, int64_t r1);
  // The largest magnitude in rows [r0, r1): NaN if they hold one.
  float (*amax)(const Rows&, int64_t r0, int64_t r1);

  void (*lookup)(const Lookup&, int64_t i0, int64_t i1);
};

extern const Kernels scalar_kernels, avx2_kernels, avx512_kernels, amx_kernels;

}  // namespace octavo
