// The ops of linear layers and of experts: threads share rows of x and columns of y.
#pragma once

#include <cstring>

#include "../select.h"
#include "rows.h"
#include "tensors.h"
#include "threads.h"

namespace {

using octavo::Block;
using octavo::Linear;
using octavo::LinearKernels;

constexpr int64_t kRowsOfPart = 129;   // of x, that are worth packing W for
constexpr int64_t kUnpackedRows = 32;  // of x: parts are multiples of this, if x is not packed

// The operands of a linear layer, of which some rows are chosen later.
struct Operands {
  Tensor x, x_scale, weight, weight_scale, bias;

  // dims: of the weight, 2, or 3 with experts.
  Operands(int64_t dims, const Tensor& x_, const std::optional<Tensor>& x_scale_, const Tensor& weight_,
           const Tensor& weight_scale_, const std::optional<Tensor>& bias_)
      : x(dense(x_)), weight(dense(weight_)), weight_scale(dense(weight_scale_)) {
    if (x_scale_) x_scale = dense(*x_scale_);
    if (bias_) bias = dense(*bias_);
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char && weight.dim() == dims, "weight must be int8, of ", dims,
                    " dimensions");
    STD_TORCH_CHECK(weight_scale.scalar_type() == ScalarType::Float, "weight_scale must be fp32");
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) == weight.size(-1), "x must have rows of ", weight.size(-1), " values");
    STD_TORCH_CHECK(weight_scale.dim() == dims && is_by_row(weight_scale), "weight_scale must be of the weight's rows");
    STD_TORCH_CHECK(!bias.defined() || (bias.dim() == dims - 1 && is_by_row(bias)),
                    "bias must be of the weight's rows");
  }

  // The layer with rows [m0, m1) of x, and the weight of expert e (0 if there are no experts).
  Linear layer(int64_t m0, int64_t m1, int64_t e, Tensor& y, Float y_type) const {
    Linear layer{};
    layer.M = m1 - m0, layer.N = weight.size(-2), layer.K = weight.size(-1);
    const bool codes = x.scalar_type() == ScalarType::Char;
    layer.x_type = codes ? Float::f32 : *float_type(x.scalar_type());
    layer.x = at(x.const_data_ptr(), m0 * layer.K * (codes ? 1 : octavo::size_of(layer.x_type)));
    if (codes) {
      const int64_t rows = rows_of(x);
      STD_TORCH_CHECK(x_scale.scalar_type() == ScalarType::Float && (x_scale.numel() == 1 || x_scale.numel() == rows),
                      "x_scale must be fp32, one value or one for each of ", rows, " rows");
      STD_TORCH_CHECK(layer.K <= octavo::kLongestExact, "int32 holds sums of up to ", octavo::kLongestExact,
                      " products of codes");
      layer.x_scale_step = x_scale.numel() > 1;
      layer.x_scale = static_cast<const float*>(x_scale.const_data_ptr()) + m0 * layer.x_scale_step;
    }
    layer.w = at(weight.const_data_ptr(), e * layer.N * layer.K);
    layer.groups = weight_scale.size(-1);
    STD_TORCH_CHECK(layer.groups >= 1 && layer.K % layer.groups == 0 && (layer.groups == 1 || !codes),
                    "weight_scale has ", layer.groups, " groups for rows of ", layer.K);
    layer.w_scale = static_cast<const float*>(weight_scale.const_data_ptr()) + e * layer.N * layer.groups;
    if (bias.defined()) {
      layer.bias_type = *float_type(bias.scalar_type());
      layer.bias = at(bias.const_data_ptr(), e * layer.N * octavo::size_of(layer.bias_type));
    }
    layer.y_type = y_type;
    layer.y = static_cast<char*>(y.mutable_data_ptr()) + m0 * layer.N * octavo::size_of(y_type);
    return layer;
  }

 private:
  // Whether `one` has the weight's sizes in all dimensions but the last.
  bool is_by_row(const Tensor& one) const {
    for (int64_t d = 0; d + 1 < weight.dim(); d++)
      if (one.size(d) != weight.size(d)) return false;
    return true;
  }
};

// Splits all layers together among the threads, in units of `size`. `of(layer)`: how many of what is split a layer has.
template <class Of, class Work>
void deal_out(const std::vector<Linear>& layers, int64_t size, const Of& of, const Work& work) {
  std::vector<int64_t> ends;  // where layers end, counted in units
  int64_t units = 0, products = 0;
  for (const Linear& layer : layers) {
    ends.push_back(units += ceil_div(of(layer), size));
    products += layer.N * layer.K * layer.M;
  }
  if (units == 0) return;
  in_parallel(units, products / units, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < layers.size(); i++) {
      const int64_t first = i ? ends[i - 1] : 0;
      const int64_t from = std::max(begin, first), to = std::min(end, ends[i]);
      if (from < to) work(layers[i], (from - first) * size, std::min((to - first) * size, of(layers[i])));
    }
  });
}

// How many parts the rows of x are cut into, where threads take columns of y, one part after the other. So many that
// threads get equal work; or, if W is read in several passes, each for some of the rows, so many that threads pack rows
// of their own, without further passes.
int64_t parts_of(const Linear& layer, const LinearKernels& kernels) {
  const int64_t passes = kernels.passes ? kernels.passes(layer) : 1;
  return std::max(even_parts(ceil_div(layer.N, kColumns), layer.M, kRowsOfPart), even_shares(passes));
}

// Packs the rows of x if the kernels want it, and computes the columns of y. `like`: memory is allocated as for it.
void run(std::vector<Linear> layers, const LinearKernels& kernels, const Tensor& like) {
  size_t scratch_bytes = 0, packed_bytes = 0;
  for (const Linear& layer : layers) {
    scratch_bytes = std::max(scratch_bytes, kernels.scratch_bytes(layer));
    if (kernels.packed_bytes) packed_bytes += kernels.packed_bytes(layer);
  }
  Tensor packed;
  if (packed_bytes) {
    packed = empty(like, {static_cast<int64_t>(packed_bytes) + 64}, ScalarType::Char);
    char* memory = aligned(packed.mutable_data_ptr());
    for (Linear& layer : layers) {
      const size_t bytes = kernels.packed_bytes(layer);
      if (bytes) layer.packed = memory, memory += bytes;
    }
    deal_out(layers, octavo::kPackedRows, [](const Linear& layer) { return layer.packed ? layer.M : 0; }, kernels.pack);
  }
  const auto columns = [](const Linear& layer) { return up_to_multiple(layer.N, kColumns); };
  const int64_t parts = layers.size() == 1 ? parts_of(layers[0], kernels) : 1;  // of experts, each is a part
  deal_out(
      layers, kColumns, [&](const Linear& layer) { return parts * columns(layer); },
      [&](const Linear& layer, int64_t begin, int64_t end) {
        const int64_t unit = layer.packed ? octavo::kPackedRows : kUnpackedRows;
        const int64_t width = columns(layer), height = up_to_multiple(ceil_div(layer.M, parts), unit);
        void* const scratch = scratch_of(scratch_bytes);
        for (int64_t part = begin / width; part * width < end; part++) {
          const int64_t n0 = std::max(begin - part * width, int64_t{0}), n1 = std::min(end - part * width, layer.N);
          const int64_t m0 = std::min(part * height, layer.M), m1 = std::min(m0 + height, layer.M);
          kernels.run(layer, {m0, m1, n0, n1}, scratch);
        }
      });
}

constexpr size_t kPackedAtOnce = 4 << 20;  // bytes of packed x, which stay in cache until they are read

// Cuts a layer with rows [m0, m1) of x into layers with no more than kPackedAtOnce to pack. `layer(m0, m1)`: the layer
// with these rows.
template <class Of>
void cut(int64_t m0, int64_t m1, const Of& layer, const LinearKernels& kernels, std::vector<Linear>& layers) {
  const Linear all = layer(m0, m1);
  const size_t bytes = kernels.packed_bytes ? kernels.packed_bytes(all) : 0;
  const auto parts = static_cast<int64_t>((bytes + kPackedAtOnce - 1) / kPackedAtOnce);
  if (parts <= 1) return layers.push_back(all);
  const int64_t step = up_to_multiple(ceil_div(m1 - m0, parts), octavo::kRowsAtOnce);
  for (int64_t m = m0; m < m1; m += step) layers.push_back(layer(m, std::min(m + step, m1)));
}

// Runs layers, as many at a time as stay in cache together.
void run_in_turns(const std::vector<Linear>& layers, const LinearKernels& kernels, const Tensor& like) {
  std::vector<Linear> turn;
  size_t packed = 0;
  for (const Linear& layer : layers) {
    const size_t bytes = kernels.packed_bytes ? kernels.packed_bytes(layer) : 0;
    if (!turn.empty() && packed + bytes > kPackedAtOnce) run(std::move(turn), kernels, like), turn = {}, packed = 0;
    turn.push_back(layer), packed += bytes;
  }
  if (!turn.empty()) run(std::move(turn), kernels, like);
}

template <class Of>
void run_by_rows(int64_t rows, const Of& layer, const LinearKernels& kernels, const Tensor& like) {
  std::vector<Linear> layers;
  cut(0, rows, layer, kernels, layers);
  run_in_turns(layers, kernels, like);
}

const LinearKernels& w8a16_kernels(const Tensor& x) { return kernels().w8a16(*float_type(x.scalar_type())); }

Tensor w8a16_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                    const std::optional<Tensor>& bias) {
  if (!served(x.scalar_type(), bias)) return reference<Tensor>("w8a16_linear", x, weight, weight_scale, bias);
  const Operands in(2, x, std::nullopt, weight, weight_scale, bias);
  Tensor y = empty(x, with_last(x, weight.size(0)), x.scalar_type());
  const auto layer = [&](int64_t m0, int64_t m1) { return in.layer(m0, m1, 0, y, *float_type(x.scalar_type())); };
  run_by_rows(rows_of(x), layer, w8a16_kernels(x), x);
  return y;
}

Tensor w8a8_linear(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_scale,
                   const std::optional<Tensor>& bias, ScalarType dtype) {
  if (!served(dtype, bias)) return reference<Tensor>("w8a8_linear", x, x_scale, weight, weight_scale, bias, dtype);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Char, "x must be int8");
  const Operands in(2, x, x_scale, weight, weight_scale, bias);
  Tensor y = empty(x, with_last(x, weight.size(0)), dtype);
  const auto layer = [&](int64_t m0, int64_t m1) { return in.layer(m0, m1, 0, y, *float_type(dtype)); };
  run_by_rows(rows_of(x), layer, kernels().w8a8, x);
  return y;
}

constexpr int64_t kMostAtOnce = 8192;  // values of x

// Not in the table of ops: it is two of them in one, called where nobody differentiates or compiles. Without an
// input_scale, each row of x has a scale of its own. The codes of a few rows are not made into tensors, which would
// take longer than quantizing.
Tensor w8a8_linear_at_once(const Tensor& x, const std::optional<Tensor>& input_scale, const Tensor& weight,
                           const Tensor& weight_scale, const std::optional<Tensor>& bias) {
  if (!served(x.scalar_type(), bias) || x.numel() == 0 || x.numel() > kMostAtOnce) {
    if (input_scale)
      return w8a8_linear(quantize_static(x, *input_scale), *input_scale, weight, weight_scale, bias, x.scalar_type());
    const auto [codes, x_scale] = quantize_per_token(x);
    return w8a8_linear(codes, x_scale, weight, weight_scale, bias, x.scalar_type());
  }
  const Operands in(2, x, std::nullopt, weight, weight_scale, bias);
  STD_TORCH_CHECK(weight_scale.size(1) == 1, "weight_scale must be one for each row");
  const Float type = *float_type(x.scalar_type());
  const int64_t rows = rows_of(x), K = x.size(-1);
  int8_t codes[kMostAtOnce];
  float scale[kMostAtOnce];
  if (input_scale) {
    scale[0] = one_scale(*input_scale);
    kernels().quantize_given({1, rows * K, in.x.const_data_ptr(), type, codes, scale}, 0, 1);
  } else {
    kernels().quantize_token({rows, K, in.x.const_data_ptr(), type, codes, scale}, 0, rows);
  }
  Tensor y = empty(x, with_last(x, weight.size(0)), x.scalar_type());
  Linear layer = in.layer(0, rows, 0, y, type);
  layer.x = codes, layer.x_type = Float::f32;
  layer.x_scale = scale, layer.x_scale_step = !input_scale;
  run({layer}, kernels().w8a8, x);
  return y;
}

// The most rows of x for which float linear layers have kernels.
int64_t most_rows(Float type) {
  static const bool wider = octavo::this_machine().wider;
  const octavo::FloatLinearKernels& of = kernels().float_linear(type);
  return wider ? of.most_rows_next_to_wider : of.most_rows;
}

// Not in the table of ops: it is called where nobody differentiates. If no kernel is faster, it is torch's own.
Tensor float_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.dim() == 2, "weight must be [N, K], of x's type");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) == weight.size(1), "x must have rows of ", weight.size(1), " values");
  STD_TORCH_CHECK(
      !bias || (bias->scalar_type() == x.scalar_type() && bias->dim() == 1 && bias->size(0) == weight.size(0)),
      "bias must be [", weight.size(0), "], of x's type");
  const auto type = float_type(x.scalar_type());
  if (!type || rows_of(x) > most_rows(*type)) return call<Tensor>("aten::linear", x, weight, bias);
  const Tensor values = dense(x), w = dense(weight);
  Tensor y = empty(x, with_last(x, weight.size(0)), x.scalar_type()), added;
  if (bias) added = dense(*bias);
  Linear layer{};
  layer.M = rows_of(x), layer.N = weight.size(0), layer.K = weight.size(1), layer.groups = 1;
  layer.x = values.const_data_ptr(), layer.w = w.const_data_ptr(), layer.y = y.mutable_data_ptr();
  if (bias) layer.bias = added.const_data_ptr();
  layer.x_type = layer.bias_type = layer.y_type = *type;
  run({layer}, kernels().float_linear(*type).linear, x);
  return y;
}

// The layers of the experts that have rows -> y. Rows past the last end are zeros.
void run_routed(const Operands& in, const Tensor& ends, Tensor& y, Float y_type, const LinearKernels& kernels) {
  STD_TORCH_CHECK(ends.scalar_type() == ScalarType::Int && ends.numel() == in.weight.size(0),
                  "ends must be int32, one for each of ", in.weight.size(0), " experts");
  const Tensor last = dense(ends);
  const auto* end = static_cast<const int32_t*>(last.const_data_ptr());
  std::vector<Linear> layers;
  int64_t done = 0;
  for (int64_t e = 0; e < ends.numel(); e++) {
    STD_TORCH_CHECK(end[e] >= done && end[e] <= rows_of(in.x), "ends must rise, up to the rows of x");
    const auto layer = [&](int64_t m0, int64_t m1) { return in.layer(m0, m1, e, y, y_type); };
    if (end[e] > done) cut(done, end[e], layer, kernels, layers);
    done = end[e];
  }
  const int64_t row = in.weight.size(-2) * octavo::size_of(y_type);
  std::memset(static_cast<char*>(y.mutable_data_ptr()) + done * row, 0, (rows_of(in.x) - done) * row);
  run_in_turns(layers, kernels, in.x);
}

Tensor w8a16_experts_linear(const Tensor& x, const Tensor& ends, const Tensor& weight, const Tensor& weight_scale,
                            const std::optional<Tensor>& bias) {
  if (!served(x.scalar_type(), bias))
    return reference<Tensor>("w8a16_experts_linear", x, ends, weight, weight_scale, bias);
  const Operands in(3, x, std::nullopt, weight, weight_scale, bias);
  Tensor y = empty(x, with_last(x, weight.size(1)), x.scalar_type());
  run_routed(in, ends, y, *float_type(x.scalar_type()), w8a16_kernels(x));
  return y;
}

Tensor w8a8_experts_linear(const Tensor& x, const Tensor& x_scale, const Tensor& ends, const Tensor& weight,
                           const Tensor& weight_scale, const std::optional<Tensor>& bias, ScalarType dtype) {
  if (!served(dtype, bias))
    return reference<Tensor>("w8a8_experts_linear", x, x_scale, ends, weight, weight_scale, bias, dtype);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Char, "x must be int8");
  const Operands in(3, x, x_scale, weight, weight_scale, bias);
  Tensor y = empty(x, with_last(x, weight.size(1)), dtype);
  run_routed(in, ends, y, *float_type(dtype), kernels().w8a8);
  return y;
}

}  // namespace
