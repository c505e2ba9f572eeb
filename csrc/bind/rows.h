// The ops on rows: quantization, lookups, norms, gates, rotary embeddings.
#pragma once

#include <cmath>

#include "tensors.h"
#include "threads.h"

namespace {

using octavo::Gated;
using octavo::Lookup;
using octavo::Norm;
using octavo::Rotary;
using octavo::Rows;

Rows rows(const Tensor& values, Float type, Tensor& codes, Tensor& scale) {
  return {rows_of(values),
          values.size(-1),
          values.const_data_ptr(),
          type,
          static_cast<int8_t*>(codes.mutable_data_ptr()),
          static_cast<float*>(scale.mutable_data_ptr())};
}

// Codes, and a scale for each row.
std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, Float type, void (*kernel)(const Rows&, int64_t, int64_t)) {
  const Tensor values = dense(x);
  Tensor codes = empty(x, with_last(x, x.size(-1)), ScalarType::Char);
  Tensor scale = empty(x, with_last(x, 1), ScalarType::Float);
  const Rows in = rows(values, type, codes, scale);
  over_rows(in.rows, in.K, [&](int64_t begin, int64_t end) { kernel(in, begin, end); });
  return {codes, scale};
}

std::tuple<Tensor, Tensor> quantize_per_token(const Tensor& x) {
  const auto type = float_type(x.scalar_type());
  if (!type || x.dim() == 0) return reference<std::tuple<Tensor, Tensor>>("quantize_per_token", x);
  return quantize_rows(x, *type, kernels().quantize_token);
}

// Keys or values [B, KV, T, D] -> codes and scales with any strides; the codes of a token are contiguous. For values,
// the scale of a row of zeros is 0.
void quantize_states(const Tensor& x, Tensor codes, Tensor scale, bool are_values) {
  const auto type = float_type(x.scalar_type());
  const bool dense_rows = x.dim() == 4 && codes.dim() == 4 && scale.dim() == 4 && codes.stride(3) == 1;
  if (!type || !dense_rows || codes.scalar_type() != ScalarType::Char || scale.scalar_type() != ScalarType::Float)
    return call<void>("octavo_reference::quantize_states", x, codes, scale, are_values);
  for (int d = 0; d < 4; d++)
    STD_TORCH_CHECK(codes.size(d) == x.size(d) && scale.size(d) == (d < 3 ? x.size(d) : 1),
                    "codes and scale must be of x's shape");
  const Tensor values = x.size(3) == 1 || x.stride(3) == 1 ? x : dense(x);
  const int64_t heads = x.size(1), tokens = x.size(2), D = x.size(3);
  auto* const to = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* const scales = static_cast<float*>(scale.mutable_data_ptr());
  over_rows(x.size(0) * heads * tokens, D, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / (heads * tokens), h = i / tokens % heads, t = i % tokens;
      const auto place = [&](const Tensor& at) { return b * at.stride(0) + h * at.stride(1) + t * at.stride(2); };
      int8_t* const row = to + place(codes);
      float* const of_row = scales + place(scale);
      kernels().quantize_token(
          {1, D, at(values.const_data_ptr(), place(values) * octavo::size_of(*type)), *type, row, of_row}, 0, 1);
      if (are_values && *of_row == 1 && std::all_of(row, row + D, [](int8_t code) { return code == 0; })) *of_row = 0;
    }
  });
}

std::tuple<Tensor, Tensor> quantize_weight(const Tensor& weight) {
  const auto type = float_type(weight.scalar_type());
  if (!type || weight.dim() != 2) return reference<std::tuple<Tensor, Tensor>>("quantize_weight", weight);
  return quantize_rows(weight, *type, kernels().quantize_weight);
}

// If there is one scale for all values, rows are pieces of any equal length.
constexpr int64_t kPiece = 16 << 10;

// Calls work(i, start, length) for each piece of `count` contiguous values.
template <class Work>
void in_pieces(int64_t count, const Work& work) {
  over_rows(ceil_div(count, kPiece), kPiece, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) work(i, i * kPiece, std::min(kPiece, count - i * kPiece));
  });
}

Rows piece_of(const Rows& all, int64_t start, int64_t length) {
  return {1,
          length,
          static_cast<const char*>(all.x) + start * octavo::size_of(all.x_type),
          all.x_type,
          all.codes + start,
          all.scale};
}

float one_scale(const Tensor& input_scale) {
  STD_TORCH_CHECK(input_scale.scalar_type() == ScalarType::Float && input_scale.numel() == 1,
                  "input_scale must be fp32 [1]");
  return *static_cast<const float*>(input_scale.const_data_ptr());
}

Tensor quantize_static(const Tensor& x, const Tensor& input_scale) {
  const auto type = float_type(x.scalar_type());
  if (!type || x.dim() == 0) return reference<Tensor>("quantize_static", x, input_scale);
  float one = one_scale(input_scale);
  const Tensor values = dense(x);
  Tensor codes = empty(x, with_last(x, x.size(-1)), ScalarType::Char);
  const Rows in{1, x.numel(), values.const_data_ptr(), *type, static_cast<int8_t*>(codes.mutable_data_ptr()), &one};
  in_pieces(x.numel(), [&](int64_t, int64_t start, int64_t length) {
    kernels().quantize_given(piece_of(in, start, length), 0, 1);
  });
  return codes;
}

std::tuple<Tensor, Tensor> quantize_per_tensor(const Tensor& x) {
  const auto type = float_type(x.scalar_type());
  if (!type || x.dim() == 0) return reference<std::tuple<Tensor, Tensor>>("quantize_per_tensor", x);
  const Tensor values = dense(x);
  Tensor codes = empty(x, with_last(x, x.size(-1)), ScalarType::Char);
  Tensor scale = empty(x, {1}, ScalarType::Float);
  const Rows in = rows(values, *type, codes, scale);
  std::vector<float> largest(ceil_div(x.numel(), kPiece));
  in_pieces(x.numel(), [&](int64_t i, int64_t start, int64_t length) {
    largest[i] = kernels().amax(piece_of(in, start, length), 0, 1);
  });
  float amax = 0;
  for (const float one : largest) amax = one > amax || std::isnan(one) ? one : amax;
  const float step = amax / 127.0f;
  in.scale[0] = step == 0 ? 1 : step;  // also for numbers so small that a 127th of them is zero
  in_pieces(x.numel(), [&](int64_t, int64_t start, int64_t length) {
    kernels().quantize_given(piece_of(in, start, length), 0, 1);
  });
  return {codes, scale};
}

Tensor w8a16_embedding(const Tensor& indices, const Tensor& weight, const Tensor& weight_scale, ScalarType dtype) {
  const auto type = float_type(dtype);
  const bool indexes = indices.scalar_type() == ScalarType::Long;
  if (!type || !indexes) return reference<Tensor>("w8a16_embedding", indices, weight, weight_scale, dtype);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char && weight.dim() == 2, "weight must be int8 [V, H]");
  STD_TORCH_CHECK(weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 2 &&
                      weight_scale.size(0) == weight.size(0) && weight_scale.size(1) == 1,
                  "weight_scale must be fp32 [V, 1]");
  const Tensor which = dense(indices), table = dense(weight), scale = dense(weight_scale);
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(weight.size(1));
  Tensor y = empty(weight, sizes, dtype);
  const Lookup in{indices.numel(),
                  weight.size(1),
                  static_cast<const int64_t*>(which.const_data_ptr()),
                  static_cast<const int8_t*>(table.const_data_ptr()),
                  static_cast<const float*>(scale.const_data_ptr()),
                  y.mutable_data_ptr(),
                  *type};
  for (int64_t i = 0; i < in.count; i++)
    STD_TORCH_CHECK(in.indices[i] >= 0 && in.indices[i] < weight.size(0), "index ", in.indices[i],
                    " is not a row of a table of ", weight.size(0));
  over_rows(in.count, in.H, [&](int64_t begin, int64_t end) { kernels().lookup(in, begin, end); });
  return y;
}

// Not in the table of ops: it is called where nobody differentiates or compiles, with operands of one type.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, bool round_first) {
  const auto type = float_type(x.scalar_type());
  STD_TORCH_CHECK(type && x.scalar_type() == weight.scalar_type(), "x and weight must be floats of one type");
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0), "weight must be a row of x");
  const Tensor values = dense(x), factors = dense(weight);
  Tensor y = empty(x, with_last(x, x.size(-1)), x.scalar_type());
  const Norm in{rows_of(x),           x.size(-1), values.const_data_ptr(), factors.const_data_ptr(),
                y.mutable_data_ptr(), *type,      static_cast<float>(eps), round_first};
  over_rows(in.rows, in.K, [&](int64_t begin, int64_t end) { kernels().rms_norm(in, begin, end); });
  return y;
}

// Elements from one row [..., K] to the next, if they are the same for all rows, and the values of a row are
// contiguous. That holds for either half of what one layer computes for two (gate and up).
std::optional<int64_t> row_step(const Tensor& x) {
  if (x.is_contiguous()) return x.size(-1);
  if (x.size(-1) > 1 && x.stride(-1) != 1) return std::nullopt;
  int64_t step = 0, rows = 1;
  for (int64_t d = x.dim() - 2; d >= 0; d--) {
    if (x.size(d) == 1) continue;
    if (rows == 1) step = x.stride(d);
    if (x.stride(d) != rows * step) return std::nullopt;
    rows *= x.size(d);
  }
  return step;
}

// Not in the table of ops either, for the same reason.
Tensor gated(const Tensor& gate, const Tensor& up, double a, double b) {
  const auto type = float_type(gate.scalar_type());
  STD_TORCH_CHECK(type && gate.scalar_type() == up.scalar_type(), "gate and up must be floats of one type");
  STD_TORCH_CHECK(gate.dim() >= 1 && gate.dim() == up.dim(), "gate and up must be of one shape");
  for (int64_t d = 0; d < gate.dim(); d++)
    STD_TORCH_CHECK(gate.size(d) == up.size(d), "gate and up must be of one shape");
  const Tensor g = row_step(gate) ? gate : dense(gate), u = row_step(up) ? up : dense(up);
  Tensor y = empty(gate, with_last(gate, gate.size(-1)), gate.scalar_type());
  const Gated in{rows_of(gate),         gate.size(-1),        g.const_data_ptr(),   u.const_data_ptr(),
                 *row_step(g),          *row_step(u),         y.mutable_data_ptr(), *type,
                 static_cast<float>(a), static_cast<float>(b)};
  over_rows(in.rows, in.K, [&](int64_t begin, int64_t end) { kernels().gated(in, begin, end); });
  return y;
}

// Where token t of sequence b is in [B, H, T, D], or in [B, T, D].
int64_t token_at(const Tensor& x, int64_t b, int64_t t) {
  return (x.size(0) == 1 ? 0 : b * x.stride(0)) + t * x.stride(x.dim() - 2);
}

// Not in the table of ops either: turns queries [B, H, T, D] and keys [B, KV, T, D] by one cos and sin, [B or 1, T, D].
std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  const auto type = float_type(q.scalar_type());
  STD_TORCH_CHECK(type && q.dim() == 4 && q.size(3) % 2 == 0, "q must be floats [B, H, T, D], D even");
  for (const Tensor* one : {&k, &cos, &sin}) {
    const bool is_key = one == &k, is_alike = one->scalar_type() == q.scalar_type() && one->dim() == (is_key ? 4 : 3);
    STD_TORCH_CHECK(is_alike && one->size(-1) == q.size(3) && one->size(-2) == q.size(2) &&
                        (one->size(0) == q.size(0) || (one->size(0) == 1 && !is_key)),
                    "k, cos and sin must have q's type, tokens and D");
  }
  const auto in_line = [](const Tensor& x) { return x.stride(-1) == 1 ? x : dense(x); };
  // In the layout of torch's ops: heads of a token are adjacent if they are in x.
  const auto laid_out_like = [](const Tensor& x) {
    const Tensor y = torch::stable::empty_like(x);
    return y.stride(-1) == 1 ? y : empty(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type());
  };
  const Tensor c = in_line(cos), s = in_line(sin);
  const Tensor from[] = {in_line(q), in_line(k)};
  Tensor to[] = {laid_out_like(from[0]), laid_out_like(from[1])};
  const int64_t T = q.size(2), D = q.size(3), bytes = octavo::size_of(*type);
  over_rows(q.size(0) * T, (q.size(1) + k.size(1)) * D, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const auto place = [&](const Tensor& x) { return token_at(x, i / T, i % T) * bytes; };
      for (int each = 0; each < 2; each++) {
        const Tensor& x = from[each];
        Tensor& y = to[each];
        kernels().rotary({x.size(1), D, at(x.const_data_ptr(), place(x)), at(c.const_data_ptr(), place(c)),
                          at(s.const_data_ptr(), place(s)), at(y.mutable_data_ptr(), place(y)), x.stride(1),
                          y.stride(1), *type});
      }
    }
  });
  return {to[0], to[1]};
}

}  // namespace
