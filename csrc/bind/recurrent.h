// The op of recurrent layers: step after step, a product that the threads share, and then the gates.
#pragma once

#include "../kernels.h"
#include "linear.h"
#include "tensors.h"
#include "threads.h"

namespace {

using octavo::Recurrence;
using octavo::Rows;

// Not in the table of ops: it is called where nobody differentiates or compiles, with operands of one type.
//
//     p [T, B, gates * H]    W_ih x + b_ih of all steps
//     weight, bias           W_hh int8 [gates * H, H], b_hh
//     h [B, H], c            the state before; c, fp32, is updated in place
//     kind                   of `Recurrence`
//     int8_inputs            each step quantizes the rows of h, as quantize_per_token does
//     backwards              from the last step to the first
//
// Returns h of all steps, [T, B, H].
Tensor recurrent(const Tensor& p, const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias,
                 const Tensor& h, std::optional<Tensor> c, int64_t kind, bool int8_inputs, bool backwards) {
  const auto type = float_type(p.scalar_type());
  STD_TORCH_CHECK(type && served(p.scalar_type(), bias) && h.scalar_type() == p.scalar_type(),
                  "p, h and bias must be floats, p and h of one type");
  STD_TORCH_CHECK(p.dim() == 3 && h.dim() == 2, "p must be [T, B, N] and h [B, H]");
  const int64_t T = p.size(0), B = p.size(1), N = p.size(2), H = h.size(1);
  Recurrence step{static_cast<Recurrence::Kind>(kind), B, H};
  STD_TORCH_CHECK(kind >= 0 && kind <= 2 && N == step.gates() * H && h.size(0) == B && weight.size(0) == N,
                  "p, h and weight must be of one layer");
  STD_TORCH_CHECK(step.kind != Recurrence::Kind::lstm ||
                      (c && c->scalar_type() == ScalarType::Float && c->is_contiguous() && c->numel() == B * H),
                  "c must be fp32, of the size of h");
  const Tensor steps = dense(p), before = dense(h);
  Tensor codes, x_scale;
  if (int8_inputs) codes = empty(h, {B, H}, ScalarType::Char), x_scale = empty(h, {B}, ScalarType::Float);
  const Operands in = int8_inputs ? Operands(2, codes, x_scale, weight, weight_scale, bias)
                                  : Operands(2, before, std::nullopt, weight, weight_scale, bias);
  Tensor y = empty(h, {T, B, H}, h.scalar_type()), q = empty(h, {B, N}, ScalarType::Float);
  Linear layer = in.layer(0, B, 0, q, Float::f32);
  step.type = *type;
  step.h = before.const_data_ptr();
  step.q = static_cast<const float*>(q.const_data_ptr());
  step.c = c ? static_cast<float*>(c->mutable_data_ptr()) : nullptr;
  for (int64_t i = 0; i < T; i++) {
    const int64_t t = backwards ? T - 1 - i : i;
    if (int8_inputs) {
      const Rows rows{B,
                      H,
                      step.h,
                      *type,
                      static_cast<int8_t*>(codes.mutable_data_ptr()),
                      static_cast<float*>(x_scale.mutable_data_ptr())};
      over_rows(B, H, [&](int64_t begin, int64_t end) { kernels().quantize_token(rows, begin, end); });
    } else {
      layer.x = step.h;
    }
    run({layer}, int8_inputs ? kernels().w8a8 : w8a16_kernels(h), h);
    step.p = at(steps.const_data_ptr(), t * B * N * octavo::size_of(*type));
    step.y = at(y.mutable_data_ptr(), t * B * H * octavo::size_of(*type));
    over_rows(B, N, [&](int64_t begin, int64_t end) { kernels().recur(step, begin, end); });
    step.h = step.y;
  }
  return y;
}

}  // namespace
