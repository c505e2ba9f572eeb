// What a kernel is: a function over raw pointers. It allocates nothing, starts no thread and knows nothing of torch.
//
// Every instruction set has one translation unit (scalar.cpp, avx2.cpp, avxvnni.cpp, avx512.cpp, amx.cpp) that fills
// one `Kernels` table; `select.cpp` chooses the table, once; `bind.cpp` hands it tensors and splits the work over
// torch's threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo {

// Element types of activations.
enum class Float : int { f32, bf16, f16 };

constexpr int64_t size_of(Float type) { return type == Float::f32 ? 4 : 2; }

constexpr int64_t kLongestExact = 131071;  // products of codes, 128 * 128 at most, whose sum fits int32

// A linear layer, y = x W^T, with int8 weights or float ones. Rows are contiguous, of K elements (x, w) or N (y).
//
//     w8a16   y[m, n] = sum_k x[m, k] * w[n, k] * w_scale[n] + bias[n]
//     float   y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
//     w8a8    y[m, n] = (sum_k x[m, k] * w[n, k]) * (x_scale[m] * w_scale[n]) + bias[n]      the sum is exact, in int32
struct Linear {
  int64_t M, N, K;
  const void* x;         // [M, K]: `x_type`; int8 codes in w8a8
  Float x_type;          // not in w8a8
  const float* x_scale;  // w8a8 only: [M], or [1] if `x_scale_step` is 0
  int64_t x_scale_step;
  const void* w;         // [N, K], as on disk, never repacked: int8 codes, or floats of `x_type`
  const float* w_scale;  // [N, groups]; of floats null
  int64_t groups;        // divides K; 1 is per_channel, and the only choice in w8a8
  const void* bias;      // [N] of `bias_type`, or null
  Float bias_type;
  void* y;  // [M, N] of `y_type`
  Float y_type;
  char* packed = nullptr;  // x once more, as `LinearKernels::pack` lays it out

  const int8_t* codes() const { return static_cast<const int8_t*>(w); }
};

// The part of y that one call computes: rows [m0, m1), columns [n0, n1).
struct Block {
  int64_t m0, m1, n0, n1;
};

// A convolution of images with int8 weights, scaled as in w8a16. Its rows of x are windows of an image:
//
//     y[b, n, p] = sum_k x[b * image_step + start of window p + element[k]] * w[n, k] * w_scale[n] + bias[n]
//
// Of groups of channels each is a convolution of its own.
struct Convolution {
  int64_t N, K;
  const void* x;  // images in which every window lies whole
  Float type;     // of x and y
  int64_t image_step;
  int64_t windows[3], step[3];  // windows along each dimension, and elements from one to the next
  const int64_t* element;       // [K]
  const int8_t* w;              // [N, K]
  const float* w_scale;         // [N]
  const void* bias;             // [N] of `bias_type`, or null
  Float bias_type;
  void* y;  // of each image [N, windows], `y_step` elements from one image to the next
  int64_t y_step;
};

// A convolution of few columns, of images as they are, scaled as in w8a16. Sizes are of three dimensions.
struct NarrowConvolution {
  int64_t threads;               // that share the work
  int64_t images, groups, N, C;  // N and C of a group: columns, and channels
  int64_t size[3], count[3];     // elements of an image, and of a window
  int64_t stride[3], padding[3], dilation[3];
  int64_t windows[3];
  const void* x;         // [images, groups, C, *size] of `type`
  const int8_t* w;       // [groups, N, C, *count]
  const float* w_scale;  // [groups, N]
  const void* bias;      // [groups, N] of `bias_type`, or null
  Float bias_type;
  void* y;  // [images, groups, N, *windows] of `type`
  Float type;
};

// Rows of float values -> int8 codes: code = clamp(round_half_even(x / scale), -127, 127), in fp32.
struct Rows {
  int64_t rows, K;
  const void* x;  // [rows, K]
  Float x_type;
  int8_t* codes;  // [rows, K]
  float* scale;   // found: [rows]; given: [1]
};

// Rows of float values -> y = weight * x / sqrt(mean(x^2) + eps), in fp32.
struct Norm {
  int64_t rows, K;
  const void* x;       // [rows, K]
  const void* weight;  // [K]
  void* y;             // [rows, K]
  Float type;          // of all three
  float eps;
  bool round_first;  // x / sqrt(...) to the type, before it is multiplied
};

// Rows of float values -> y = act(gate) * up, act(g) = g / (1 + e^-z) with z = g (a + b g^2), in fp32: silu where a is
// 1 and b 0, gelu (by tanh) where a is sqrt(8 / pi) and b 0.044715 a.
struct Gated {
  int64_t rows, K;
  const void* gate;  // [rows, K]: rows are `gate_step` elements apart
  const void* up;    // [rows, K]: rows are `up_step` elements apart
  int64_t gate_step, up_step;
  void* y;     // [rows, K]
  Float type;  // of all three, to which act(gate) is rounded before it is multiplied
  float a, b;
};

// Heads of a token -> y = x * cos + (-second, first) * sin, of x = (first, second), two halves: rotary position
// embeddings. Each product, and the sum, is rounded to the type.
struct Rotary {
  int64_t heads, D;
  const void* x;    // [heads, D]: heads are `x_step` elements apart
  const void* cos;  // [D]
  const void* sin;  // [D]
  void* y;          // [heads, D]: heads are `y_step` elements apart
  int64_t x_step, y_step;
  Float type;  // of all four
};

// A step of a recurrent layer: p = W_ih x + b_ih and q = W_hh h + b_hh -> h, and c of an LSTM, in fp32. Gates lie side
// by side, in torch's order:
//
//     lstm   i, f, g, o of p + q        c = sigmoid(f) c + sigmoid(i) tanh(g)    h = sigmoid(o) tanh(c)
//     gru    r, z, n of p and of q      n = tanh(p_n + sigmoid(r) q_n)           h = n + sigmoid(z) (h - n)
//     tanh                                                                       h = tanh(p + q)
struct Recurrence {
  enum class Kind : int { lstm, gru, tanh };
  Kind kind;
  int64_t rows, H;
  const void* p;   // [rows, gates() * H] of `type`
  const float* q;  // the same in fp32
  const void* h;   // [rows, H]: before
  float* c;        // [rows, H]: before, then after; of an LSTM
  void* y;         // [rows, H]: h after
  Float type;      // of p, h and y

  constexpr int64_t gates() const { return kind == Kind::lstm ? 4 : kind == Kind::gru ? 3 : 1; }
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

// One operand of attention, [batch, heads, tokens, values]: a token's values are contiguous, tokens lie anywhere. Keys
// and values may be codes, and `type` then means nothing, with a scale for each token.
struct Heads {
  const void* x;
  Float type;
  int64_t batch_step, head_step, token_step;  // elements from one to the next
};

// What is known of a row of a mask: outside of [first, last) it forbids.
struct Allowed {
  int64_t first, last;
  bool plain;    // within it allows, and adds nothing
  bool certain;  // what it forbids has a probability of 0, as long as scores are no larger than csrc/mask.h says
};

// Where a query may attend, [batch, heads, rows, tokens]; the first three may be 1 for what is the same for all. A
// row's entries are contiguous. `causal` has none: query t may attend to tokens 0 to t.
struct Mask {
  enum class Kind : int { none, causal, boolean, f32, bf16, f16 };  // boolean: a byte, 1 where it may; else added
  Kind kind;
  const void* x;
  int64_t B, H, T;
  int64_t batch_step, head_step, row_step;
  Allowed* allowed;  // [B, H, T]
};

// softmax(softcap(q k^T) + mask) v, with both products in int8 as octavo/ops/attention.py defines it, or in float (one
// type for q, k, v and y; masks that are added, and softcap, are not served), step by step: see `AttentionKernels`.
//
// A key head is batch * KV + (its number there). Its rows are those of the H / KV query heads that share it: row r is
// of head r % (H / KV) among them, and query r / (H / KV).
struct Attention {
  int64_t B, H, KV, T, S, D, Dv;  // KV divides H
  Heads q, k, v;                  // [B, H, T, D], [B, KV, S, D], [B, KV, S, Dv]
  Heads k_scale, v_scale;         // [B, KV, S, 1] fp32 where k and v are int8 codes; else null
  Mask mask;
  float scaling;
  bool has_softcap;
  float softcap;
  char* packed;  // 64-byte aligned, `AttentionKernels::packed_bytes` for each key head
  void* y;       // [B, H, T, Dv] of `y_type`
  Float y_type;

  int64_t rows() const { return KV ? H / KV * T : 0; }  // of a key head
};

constexpr int64_t kAttentionTokens = 128;  // the unit in which `AttentionKernels::tokens` is dealt out
constexpr int64_t kAttentionRows = 12;     // of a key head that are few

constexpr int64_t kPackedRows = 12;                // of x, the unit in which `pack` is dealt out
constexpr int64_t kRowsAtOnce = 43 * kPackedRows;  // for which W is laid across anew

struct LinearKernels {
  // Of `scratch`: 64-byte aligned, and not shared between threads.
  size_t (*scratch_bytes)(const Linear&);
  void (*run)(const Linear&, Block, void* scratch);

  // Of `Linear::packed`, 64-byte aligned, which rows [m0, m1) of x are packed into before any block is run: 0 where x
  // is read as it lies. Null where it always is.
  size_t (*packed_bytes)(const Linear&) = nullptr;
  void (*pack)(const Linear&, int64_t m0, int64_t m1) = nullptr;

  // How many times W is read, each time for as many rows of x as stay in cache. Null where threads do not share these.
  int64_t (*passes)(const Linear&) = nullptr;
};

// Of layers whose weights are float: `linear` is faster than torch's own up to so many rows of x. None at 0.
struct FloatLinearKernels {
  int64_t most_rows;
  int64_t most_rows_next_to_wider;  // where torch's have wider vectors than these
  LinearKernels linear;
};

constexpr int64_t kAnyNumber = INT64_MAX;  // of rows

struct ConvolutionKernels {
  int64_t least_columns;  // fewer make a narrow convolution
  // What `run` is best given at once: so many columns of y at most, and windows of an image, in multiples of a unit.
  int64_t most_columns, unit;
  int64_t (*most_windows)(const Convolution&);
  // Of `scratch`: 64-byte aligned, and not shared between threads.
  size_t (*scratch_bytes)(const Convolution&);
  // Windows [m0, m1) of an image, columns [n0, n1) of y.
  void (*run)(const Convolution&, int64_t image, Block, void* scratch);
};

struct NarrowConvolutionKernels {
  int64_t (*parts)(const NarrowConvolution&);  // of the work
  // Of `scratch`: 64-byte aligned, and not shared between threads.
  size_t (*scratch_bytes)(const NarrowConvolution&);
  // Parts [i0, i1).
  void (*run)(const NarrowConvolution&, int64_t i0, int64_t i1, void* scratch);
};

struct AttentionKernels {
  int64_t (*most_rows)(const Attention&);     // that `rows` takes at once
  size_t (*packed_bytes)(const Attention&);   // of `Attention::packed`, for each key head: a multiple of 64
  size_t (*scratch_bytes)(const Attention&);  // of the steps behind the mask's, 64-byte aligned
  // The mask -> `mask.allowed`, for rows [i0, i1) of its B * H * T; if there is one.
  void (*mask)(const Attention&, int64_t i0, int64_t i1);
  // Tokens [s0, s1) of k and v -> `packed`: laid out as the products read them, or what few rows of q make of them. s0
  // is a multiple of kAttentionTokens.
  void (*tokens)(const Attention&, int64_t key_head, int64_t s0, int64_t s1, void* scratch);
  // Rows [r0, r1) of q -> y; or -> `packed`, where there are two steps more.
  void (*rows)(const Attention&, int64_t key_head, int64_t r0, int64_t r1, void* scratch);
  // Tokens [s0, s1) of v -> `packed`: parts of y, of kAttentionTokens each.
  void (*values)(const Attention&, int64_t key_head, int64_t s0, int64_t s1, void* scratch) = nullptr;
  // Rows [r0, r1) of all parts -> y.
  void (*join)(const Attention&, int64_t key_head, int64_t r0, int64_t r1, void* scratch) = nullptr;
};

// Of float attention: faster than torch's own up to so many rows of a key head. None at 0.
struct FloatAttentionKernels {
  int64_t most_rows;
  const AttentionKernels* attention;
};

struct Kernels {
  const char* isa;

  LinearKernels w8a16_of[3];  // f32, bf16, f16: see `w8a16`
  LinearKernels w8a8;

  // A weight's rows [r0, r1): scale = amax / 127, rounded to the type of x; one step up where that would clip.
  void (*quantize_weight)(const Rows&, int64_t r0, int64_t r1);
  // An activation's: scale = amax / 127 in fp32. Both: 1 for a row of zeros, NaN or inf where the row holds such.
  void (*quantize_token)(const Rows&, int64_t r0, int64_t r1);
  // With the scale that is given.
  void (*quantize_given)(const Rows&, int64_t r0, int64_t r1);
  // The largest magnitude in rows [r0, r1): NaN if they hold one.
  float (*amax)(const Rows&, int64_t r0, int64_t r1);

  void (*lookup)(const Lookup&, int64_t i0, int64_t i1);

  void (*rms_norm)(const Norm&, int64_t r0, int64_t r1);

  void (*gated)(const Gated&, int64_t r0, int64_t r1);

  void (*rotary)(const Rotary&);

  void (*recur)(const Recurrence&, int64_t r0, int64_t r1);

  // Null where the instruction set has none: convolutions are then the reference's, and attention is
  // composed of the other ops, or torch's.
  const ConvolutionKernels* convolution_of[3];               // f32, bf16, f16
  const NarrowConvolutionKernels* narrow_convolution_of[3];  // f32, bf16, f16
  const AttentionKernels* int8_attention;
  const AttentionKernels* int8_attention_of_few;     // of up to kAttentionRows rows of a key head
  FloatAttentionKernels float_attention_of[3];       // f32, bf16, f16
  const AttentionKernels* attention_of_codes_of[3];  // f32, bf16, f16 of q and y; k and v are codes

  FloatLinearKernels float_linear_of[3];  // f32, bf16, f16

  const LinearKernels& w8a16(Float x) const { return w8a16_of[static_cast<int>(x)]; }
  const FloatLinearKernels& float_linear(Float x) const { return float_linear_of[static_cast<int>(x)]; }
  const ConvolutionKernels* convolution(Float x) const { return convolution_of[static_cast<int>(x)]; }
  const NarrowConvolutionKernels* narrow_convolution(Float x) const {
    return narrow_convolution_of[static_cast<int>(x)];
  }
  const FloatAttentionKernels& float_attention(Float x) const { return float_attention_of[static_cast<int>(x)]; }
  const AttentionKernels* attention_of_codes(Float x) const { return attention_of_codes_of[static_cast<int>(x)]; }
};

extern const Kernels scalar_kernels, avx2_kernels, avxvnni_kernels, avx512_kernels, amx_kernels;

}  // namespace octavo
