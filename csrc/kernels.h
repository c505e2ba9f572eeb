// What a kernel is: a function over raw pointers. It allocates nothing, starts no threads and knows nothing of torch.
//
// Each instruction set has one translation unit (scalar.cpp, avx2.cpp, avxvnni.cpp, avx512.cpp, amx.cpp) that fills one
// `Kernels` table. `select.cpp` chooses the table, once; `bind.cpp` passes it tensors and splits the work over torch's
// threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo {

// Element types of activations.
enum class Float : int { f32, bf16, f16 };

constexpr int64_t size_of(Float type) { return type == Float::f32 ? 4 : 2; }

constexpr int64_t kLongestExact = 131071;  // the most products of codes, each at most 128 * 128, whose sum fits int32

// A linear layer, y = x W^T, with int8 or float weights. Rows are contiguous: K elements in x and w, N in y.
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
  const float* w_scale;  // [N, groups]; null for float weights
  int64_t groups;        // divides K; 1 is per_channel, the only choice in w8a8
  const void* bias;      // [N] of `bias_type`, or null
  Float bias_type;
  void* y;  // [M, N] of `y_type`
  Float y_type;
  char* packed = nullptr;  // a copy of x, as packed by `LinearKernels::pack`

  const int8_t* codes() const { return static_cast<const int8_t*>(w); }
};

// The part of y that one call computes: rows [m0, m1), columns [n0, n1).
struct Block {
  int64_t m0, m1, n0, n1;
};

// A convolution of images with int8 weights, scaled as in w8a16: a linear layer whose rows of x are windows of an
// image.
//
//     y[b, n, p] = sum_k x[b * image_step + start of window p + element[k]] * w[n, k] * w_scale[n] + bias[n]
//
// Each group of channels is a convolution of its own.
struct Convolution {
  int64_t N, K;
  const void* x;  // images that contain every window whole: they are already padded
  Float type;     // of x and y
  int64_t image_step;
  int64_t windows[3], step[3];  // windows along each dimension, and elements from one window to the next
  const int64_t* element;       // [K]: offsets from the start of a window
  const int8_t* w;              // [N, K]
  const float* w_scale;         // [N]
  const void* bias;             // [N] of `bias_type`, or null
  Float bias_type;
  void* y;  // [N, windows] for each image; `y_step` elements from one image to the next
  int64_t y_step;
};

// A convolution with few columns of y (output channels), scaled as in w8a16, on images that are not padded. Sizes have
// three dimensions.
struct NarrowConvolution {
  int64_t threads;               // threads that share the work
  int64_t images, groups, N, C;  // N and C of one group: columns (output channels), and input channels
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

// Rows of floats -> int8 codes: code = clamp(round_half_even(x / scale), -127, 127), in fp32.
struct Rows {
  int64_t rows, K;
  const void* x;  // [rows, K]
  Float x_type;
  int8_t* codes;  // [rows, K]
  float* scale;   // [rows] if it is computed, [1] if it is given
};

// RMS norm of rows of floats: y = weight * x / sqrt(mean(x^2) + eps), in fp32.
struct Norm {
  int64_t rows, K;
  const void* x;       // [rows, K]
  const void* weight;  // [K]
  void* y;             // [rows, K]
  Float type;          // of all three
  float eps;
  bool round_first;  // round x / sqrt(...) to the type before it is multiplied
};

// The activation of gated MLPs, on rows of floats: y = act(gate) * up, act(g) = g / (1 + e^-z) with z = g (a + b g^2),
// in fp32. It is silu if a = 1 and b = 0, and gelu (by tanh) if a = sqrt(8 / pi) and b = 0.044715 a.
struct Gated {
  int64_t rows, K;
  const void* gate;  // [rows, K]: rows are `gate_step` elements apart
  const void* up;    // [rows, K]: rows are `up_step` elements apart
  int64_t gate_step, up_step;
  void* y;     // [rows, K]
  Float type;  // of all three; act(gate) is rounded to it before it is multiplied
  float a, b;
};

// Rotary position embeddings of the heads of a token, each of two halves, x = (first, second). Each product, and the
// sum, is rounded to the type.
//
//     y = x * cos + (-second, first) * sin
struct Rotary {
  int64_t heads, D;
  const void* x;    // [heads, D]: heads are `x_step` elements apart
  const void* cos;  // [D]
  const void* sin;  // [D]
  void* y;          // [heads, D]: heads are `y_step` elements apart
  int64_t x_step, y_step;
  Float type;  // of all four
};

// One step of a recurrent layer, in fp32: p = W_ih x + b_ih and q = W_hh h + b_hh -> h, and c of an LSTM. Gates are
// adjacent, in torch's order:
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
  const void* h;   // [rows, H]: the old state
  float* c;        // [rows, H]: the cell state of an LSTM, updated in place
  void* y;         // [rows, H]: the new h
  Float type;      // of p, h and y

  constexpr int64_t gates() const { return kind == Kind::lstm ? 4 : kind == Kind::gru ? 3 : 1; }
};

// Embeddings: rows of an int8 table -> floats: code * scale, rounded once.
struct Lookup {
  int64_t count, H;
  const int64_t* indices;  // [count], rows of the table
  const int8_t* table;     // [V, H]
  const float* scale;      // [V]
  void* y;                 // [count, H] of `y_type`
  Float y_type;
};

// One operand of attention, [batch, heads, tokens, values]. The values of a token are contiguous; other strides are
// arbitrary. Keys and values may be int8 codes with a scale for each token; `type` then has no meaning.
struct Heads {
  const void* x;
  Float type;
  int64_t batch_step, head_step, token_step;  // elements from one to the next
};

// What is known about a row of a mask: it forbids everything outside [first, last).
struct Allowed {
  int64_t first, last;
  bool plain;    // within that range it allows everything, and adds nothing
  bool certain;  // what it forbids has probability 0, unless scores exceed the bound in csrc/mask.h
};

// Which tokens a query may attend to, [batch, heads, rows, tokens]; any of the first three may be 1, for what is the
// same for all. The entries of a row are contiguous. `causal` has no entries: query t may attend to tokens 0 to t.
struct Mask {
  enum class Kind : int { none, causal, boolean, f32, bf16, f16 };  // boolean: a byte, 1 allows; floats are added
  Kind kind;
  const void* x;
  int64_t B, H, T;
  int64_t batch_step, head_step, row_step;
  Allowed* allowed;  // [B, H, T]
};

// Attention, softmax(softcap(q k^T) + mask) v, in steps: see `AttentionKernels`. Both products are in int8, as
// octavo/ops/attention.py defines it, or in float: then q, k, v and y have one type, and neither masks that are added
// nor softcap are served.
//
// A key head has the number batch * KV + (its number within the batch). Its rows are those of all H / KV query heads
// that share it: row r is query r / (H / KV) of head r % (H / KV) among them.
struct Attention {
  int64_t B, H, KV, T, S, D, Dv;  // KV divides H
  Heads q, k, v;                  // [B, H, T, D], [B, KV, S, D], [B, KV, S, Dv]
  Heads k_scale, v_scale;         // [B, KV, S, 1] fp32 if k and v are int8 codes; else null
  Mask mask;
  float scaling;
  bool has_softcap;
  float softcap;
  char* packed;  // 64-byte aligned, `AttentionKernels::packed_bytes` for each key head
  void* y;       // [B, H, T, Dv] of `y_type`
  Float y_type;

  int64_t rows() const { return KV ? H / KV * T : 0; }  // of one key head
};

constexpr int64_t kAttentionTokens = 128;  // threads take tokens in multiples of this: see `AttentionKernels::tokens`
constexpr int64_t kAttentionRows = 12;     // the most rows of a key head that count as few

constexpr int64_t kPackedRows = 12;                // rows of x are packed in multiples of this
constexpr int64_t kRowsAtOnce = 43 * kPackedRows;  // rows of x that share one packing of W

struct LinearKernels {
  // The size of `scratch`, which is 64-byte aligned and not shared between threads.
  size_t (*scratch_bytes)(const Linear&);
  void (*run)(const Linear&, Block, void* scratch);

  // The size of `Linear::packed` (64-byte aligned), which rows [m0, m1) of x are packed into before any block is run. 0
  // if x is read in place; null if it always is.
  size_t (*packed_bytes)(const Linear&) = nullptr;
  void (*pack)(const Linear&, int64_t m0, int64_t m1) = nullptr;

  // How many times W is read, each time for as many rows of x as stay in cache. Null if threads do not divide these
  // passes among themselves.
  int64_t (*passes)(const Linear&) = nullptr;
};

// For layers with float weights: `linear` is faster than torch's own up to `most_rows` rows of x; never if that is 0.
struct FloatLinearKernels {
  int64_t most_rows;
  int64_t most_rows_next_to_wider;  // the same where torch's own has wider vectors than these kernels
  LinearKernels linear;
};

constexpr int64_t kAnyNumber = INT64_MAX;  // of rows: no limit

struct ConvolutionKernels {
  int64_t least_columns;  // with fewer, a convolution is narrow
  // The best size for one call of `run`: at most so many columns of y and windows of an image. Windows are a multiple
  // of `unit`.
  int64_t most_columns, unit;
  int64_t (*most_windows)(const Convolution&);
  // The size of `scratch`, which is 64-byte aligned and not shared between threads.
  size_t (*scratch_bytes)(const Convolution&);
  // Windows [m0, m1) of an image, columns [n0, n1) of y.
  void (*run)(const Convolution&, int64_t image, Block, void* scratch);
};

struct NarrowConvolutionKernels {
  int64_t (*parts)(const NarrowConvolution&);  // how many parts the work has
  // The size of `scratch`, which is 64-byte aligned and not shared between threads.
  size_t (*scratch_bytes)(const NarrowConvolution&);
  // Parts [i0, i1).
  void (*run)(const NarrowConvolution&, int64_t i0, int64_t i1, void* scratch);
};

struct AttentionKernels {
  int64_t (*most_rows)(const Attention&);     // the most rows that one call of `rows` takes
  size_t (*packed_bytes)(const Attention&);   // of `Attention::packed`, for each key head: a multiple of 64
  size_t (*scratch_bytes)(const Attention&);  // of `scratch`, 64-byte aligned, in all steps but `mask`
  // If there is a mask: rows [i0, i1) of its B * H * T -> `mask.allowed`.
  void (*mask)(const Attention&, int64_t i0, int64_t i1);
  // Tokens [s0, s1) of k and v -> `packed`: packed for the products or, if q has few rows, the rows' results with them.
  // s0 is a multiple of kAttentionTokens.
  void (*tokens)(const Attention&, int64_t key_head, int64_t s0, int64_t s1, void* scratch);
  // Rows [r0, r1) of q -> y; or -> `packed`, if the two steps below follow.
  void (*rows)(const Attention&, int64_t key_head, int64_t r0, int64_t r1, void* scratch);
  // Tokens [s0, s1) of v -> `packed`: partial sums of y, over kAttentionTokens tokens each.
  void (*values)(const Attention&, int64_t key_head, int64_t s0, int64_t s1, void* scratch) = nullptr;
  // Rows [r0, r1) of all partial sums -> y.
  void (*join)(const Attention&, int64_t key_head, int64_t r0, int64_t r1, void* scratch) = nullptr;
};

// Float attention is faster than torch's own up to `most_rows` rows of a key head; never if that is 0.
struct FloatAttentionKernels {
  int64_t most_rows;
  const AttentionKernels* attention;
};

struct Kernels {
  const char* isa;

  LinearKernels w8a16_of[3];  // f32, bf16, f16: see `w8a16`
  LinearKernels w8a8;

  // Quantizes rows [r0, r1) of a weight: scale = amax / 127, rounded to the type of x; one step up if that would clip.
  void (*quantize_weight)(const Rows&, int64_t r0, int64_t r1);
  // Quantizes rows of an activation: scale = amax / 127 in fp32. In both, the scale of a row of zeros is 1, and that of
  // a row with NaN or inf is NaN or inf.
  void (*quantize_token)(const Rows&, int64_t r0, int64_t r1);
  // Quantizes with the given scale.
  void (*quantize_given)(const Rows&, int64_t r0, int64_t r1);
  // The largest magnitude in rows [r0, r1), or NaN if they contain one.
  float (*amax)(const Rows&, int64_t r0, int64_t r1);

  void (*lookup)(const Lookup&, int64_t i0, int64_t i1);

  void (*rms_norm)(const Norm&, int64_t r0, int64_t r1);

  void (*gated)(const Gated&, int64_t r0, int64_t r1);

  void (*rotary)(const Rotary&);

  void (*recur)(const Recurrence&, int64_t r0, int64_t r1);

  // Null if the instruction set has none: convolutions then run on the reference, and attention is composed of the
  // other ops, or is torch's.
  const ConvolutionKernels* convolution_of[3];               // f32, bf16, f16
  const NarrowConvolutionKernels* narrow_convolution_of[3];  // f32, bf16, f16
  const AttentionKernels* int8_attention;
  const AttentionKernels* int8_attention_of_few;     // for up to kAttentionRows rows of a key head
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
