// The ops of attention: all threads pack keys and values, and then take rows of queries.
#pragma once

#include "tensors.h"
#include "threads.h"

namespace {

using octavo::Allowed;
using octavo::Attention;
using octavo::AttentionKernels;
using octavo::Heads;
using octavo::Mask;

// [batch, heads, tokens, values]; the values of a token are contiguous.
Heads heads_of(const Tensor& x) {
  return {x.const_data_ptr(), float_type(x.scalar_type()).value_or(Float::f32), x.stride(0), x.stride(1), x.stride(2)};
}

Tensor with_dense_rows(const Tensor& x) { return x.size(3) == 1 || x.stride(3) == 1 ? x : dense(x); }

std::optional<Mask::Kind> mask_kind(ScalarType type) {
  if (type == ScalarType::Bool) return Mask::Kind::boolean;
  if (type == ScalarType::Float) return Mask::Kind::f32;
  if (type == ScalarType::BFloat16) return Mask::Kind::bf16;
  if (type == ScalarType::Half) return Mask::Kind::f16;
  return std::nullopt;
}

// The mask with an entry for each of `tokens`, contiguous in each row.
Tensor with_all_columns(const Tensor& mask, int64_t tokens) {
  if (mask.size(3) == tokens && (tokens == 1 || mask.stride(3) == 1)) return mask;
  Tensor all = empty(mask, with_last(mask, tokens), mask.scalar_type());
  torch::stable::copy_(all, mask);
  return all;
}

Mask mask_of(const Tensor& mask, const Attention& a) {
  const int64_t sizes[] = {a.B, a.H, a.T};
  for (int d = 0; d < 3; d++)
    STD_TORCH_CHECK(mask.size(d) == 1 || mask.size(d) == sizes[d], "mask has ", mask.size(d), " in dimension ", d);
  const auto step = [&](int d) { return mask.size(d) == 1 ? 0 : mask.stride(d); };
  return {*mask_kind(mask.scalar_type()),
          mask.const_data_ptr(),
          mask.size(0),
          mask.size(1),
          mask.size(2),
          step(0),
          step(1),
          step(2),
          nullptr};
}

// In causal attention a row costs more the later it is, and those in the middle cost what all do on average. So the
// first goes with the last, the second with the last but one, and every thread gets its share.
int64_t from_both_ends(int64_t i, int64_t count) { return i % 2 == 0 ? i / 2 : count - 1 - i / 2; }

// Rows for one call: as many as it takes, unless threads would have too few calls then.
int64_t rows_at_once(int64_t key_heads, int64_t rows, int64_t most) {
  const int64_t of_call = ceil_div(key_heads * rows, kUnitsOfThread * torch::stable::get_num_threads());
  return std::min(most, std::max(of_call, octavo::kAttentionRows));
}

void run(Attention& a, const AttentionKernels& k) {
  const int64_t key_heads = a.B * a.KV, rows = a.rows();
  if (key_heads * rows * a.Dv == 0) return;
  std::vector<Allowed> allowed(a.mask.kind == Mask::Kind::none ? 0 : a.mask.B * a.mask.H * a.mask.T);
  a.mask.allowed = allowed.data();
  in_parallel(static_cast<int64_t>(allowed.size()), a.S, [&](int64_t begin, int64_t end) { k.mask(a, begin, end); });
  const size_t bytes = k.scratch_bytes(a);
  const int64_t parts = ceil_div(a.S, octavo::kAttentionTokens);
  const auto over_tokens = [&](auto step, int64_t cost) {
    in_parallel(key_heads * parts, octavo::kAttentionTokens * cost, [&](int64_t begin, int64_t end) {
      void* const memory = scratch_of(bytes);
      for (int64_t i = begin, next; i < end; i = next) {
        next = std::min(end, (i / parts + 1) * parts);  // within the same key head
        const int64_t s0 = i % parts * octavo::kAttentionTokens, s1 = s0 + (next - i) * octavo::kAttentionTokens;
        step(a, i / parts, s0, std::min(s1, a.S), memory);
      }
    });
  };
  const int64_t tiles = ceil_div(rows, rows_at_once(key_heads, rows, k.most_rows(a))), height = ceil_div(rows, tiles);
  const auto over_rows = [&](auto step, int64_t cost) {
    in_parallel(key_heads * tiles, height * cost, [&](int64_t begin, int64_t end) {
      void* const memory = scratch_of(bytes);
      for (int64_t i = begin; i < end; i++) {
        const int64_t r = from_both_ends(i % tiles, tiles) * height;
        step(a, i / tiles, r, std::min(r + height, rows), memory);
      }
    });
  };
  over_tokens(k.tokens, a.D + a.Dv);
  if (!k.values) return over_rows(k.rows, a.S * (a.D + a.Dv));
  over_rows(k.rows, a.S * kElement);
  over_tokens(k.values, a.Dv);
  over_rows(k.join, parts * a.Dv);
}

// Completes `a` by its operands and scaling, and runs `kernels`.
Tensor attend(Attention a, const AttentionKernels& kernels, const Tensor& query, const Tensor& key, const Tensor& value,
              const std::optional<Tensor>& mask, double scaling) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                  "query, key and value must have 4 dimensions");
  a.B = query.size(0), a.H = query.size(1), a.T = query.size(2), a.D = query.size(3);
  a.KV = key.size(1), a.S = key.size(2), a.Dv = value.size(3);
  STD_TORCH_CHECK(key.size(0) == a.B && key.size(3) == a.D && value.size(0) == a.B && value.size(1) == a.KV &&
                      value.size(2) == a.S && (a.KV ? a.H % a.KV : a.H) == 0,
                  "query, key and value do not go together");
  const Tensor q = with_dense_rows(query), k = with_dense_rows(key), v = with_dense_rows(value);
  a.q = heads_of(q), a.k = heads_of(k), a.v = heads_of(v);
  Tensor entries;
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 4 && (mask->size(3) == 1 || mask->size(3) == a.S), "mask must have rows of ", a.S);
    entries = with_all_columns(*mask, a.S);
    a.mask = mask_of(entries, a);
  }
  a.scaling = static_cast<float>(scaling);
  const auto bytes = static_cast<int64_t>(kernels.packed_bytes(a));
  Tensor packed = empty(query, {a.B * a.KV * bytes + 64}, ScalarType::Char);
  Tensor y = empty(query, {a.B, a.H, a.T, a.Dv}, query.scalar_type());
  a.packed = aligned(packed.mutable_data_ptr());
  a.y = y.mutable_data_ptr(), a.y_type = a.q.type;
  run(a, kernels);
  return y;
}

bool is_mask(const std::optional<Tensor>& mask) { return !mask || mask_kind(mask->scalar_type()); }

// int32 holds sums over tokens, and over channels, of products of codes, up to a length.
void check_lengths(const Tensor& key) {
  for (const int64_t summed : {key.size(2), key.size(3)})
    STD_TORCH_CHECK(summed <= octavo::kLongestExact, "int32 holds sums of up to ", octavo::kLongestExact,
                    " products of codes");
}

// `Attention::rows`, for operands that have not been checked yet.
int64_t rows_of_key_head(const Tensor& query, const Tensor& key) {
  const bool some = query.dim() == 4 && key.dim() == 4 && key.size(1) > 0;
  return some ? query.size(1) / key.size(1) * query.size(2) : 0;
}

const AttentionKernels& int8_attention_kernels(const Tensor& query, const Tensor& key) {
  const bool few = rows_of_key_head(query, key) <= octavo::kAttentionRows;
  return few ? *kernels().int8_attention_of_few : *kernels().int8_attention;
}

// Whether x is codes, with a scale for each token.
bool are_codes(const Tensor& x, const Tensor& scale) {
  if (x.dim() != 4 || scale.dim() != 4 || x.scalar_type() != ScalarType::Char ||
      scale.scalar_type() != ScalarType::Float)
    return false;
  return scale.size(0) == x.size(0) && scale.size(1) == x.size(1) && scale.size(2) == x.size(2) && scale.size(3) == 1;
}

Tensor int8_attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                      double scaling, std::optional<double> softcap) {
  const bool floats =
      float_type(query.scalar_type()) && float_type(key.scalar_type()) && float_type(value.scalar_type());
  if (!floats || !is_mask(mask) || !kernels().int8_attention)
    return reference<Tensor>("int8_attention", query, key, value, mask, scaling, softcap);
  check_lengths(key);
  Attention a{};
  a.has_softcap = softcap.has_value(), a.softcap = static_cast<float>(softcap.value_or(0));
  return attend(a, int8_attention_kernels(query, key), query, key, value, mask, scaling);
}

// Whether the kernels of float attention serve this mask and scaling.
bool is_float_attention(const std::optional<Tensor>& mask, double scaling, bool is_causal) {
  return (!mask || (mask->scalar_type() == ScalarType::Bool && !is_causal)) && scaling > 0;
}

Mask causal(const Tensor& query) { return {Mask::Kind::causal, nullptr, 1, 1, query.size(2), 0, 0, 0, nullptr}; }

Tensor float_attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                       double scaling, bool is_causal) {
  const auto type = float_type(query.scalar_type());
  const bool alike = key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type();
  const bool served =
      type && query.dim() == 4 && rows_of_key_head(query, key) <= kernels().float_attention(*type).most_rows;
  if (!alike || !is_float_attention(mask, scaling, is_causal) || !served || !kernels().float_attention(*type).attention)
    return reference<Tensor>("float_attention", query, key, value, mask, scaling, is_causal);
  Attention a{};
  if (is_causal) a.mask = causal(query);
  return attend(a, *kernels().float_attention(*type).attention, query, key, value, mask, scaling);
}

Tensor int8_attention_of_codes(const Tensor& query, const Tensor& key, const Tensor& key_scale, const Tensor& value,
                               const Tensor& value_scale, const std::optional<Tensor>& mask, double scaling,
                               std::optional<double> softcap) {
  const bool codes = are_codes(key, key_scale) && are_codes(value, value_scale);
  if (!codes || !float_type(query.scalar_type()) || !is_mask(mask) || !kernels().int8_attention)
    return reference<Tensor>("int8_attention_of_codes", query, key, key_scale, value, value_scale, mask, scaling,
                             softcap);
  check_lengths(key);
  Attention a{};
  a.k_scale = heads_of(key_scale), a.v_scale = heads_of(value_scale);
  a.has_softcap = softcap.has_value(), a.softcap = static_cast<float>(softcap.value_or(0));
  return attend(a, int8_attention_kernels(query, key), query, key, value, mask, scaling);
}

Tensor float_attention_of_codes(const Tensor& query, const Tensor& key, const Tensor& key_scale, const Tensor& value,
                                const Tensor& value_scale, const std::optional<Tensor>& mask, double scaling,
                                bool is_causal) {
  const auto type = float_type(query.scalar_type());
  const bool codes = are_codes(key, key_scale) && are_codes(value, value_scale);
  if (!codes || !is_float_attention(mask, scaling, is_causal) || !type || query.dim() != 4 ||
      !kernels().attention_of_codes(*type))
    return reference<Tensor>("float_attention_of_codes", query, key, key_scale, value, value_scale, mask, scaling,
                             is_causal);
  Attention a{};
  a.k_scale = heads_of(key_scale), a.v_scale = heads_of(value_scale);
  if (is_causal) a.mask = causal(query);
  return attend(a, *kernels().attention_of_codes(*type), query, key, value, mask, scaling);
}

}  // namespace
