// The only file that knows torch: ops in, kernels out. Tensors are checked here and the work is split over torch's
// threads (`torch.set_num_threads`). Built on torch's stable ABI: one build serves torch 2.10 and later.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "select.h"

namespace {

using octavo::Allowed;
using octavo::Attention;
using octavo::AttentionKernels;
using octavo::Block;
using octavo::Convolution;
using octavo::ConvolutionKernels;
using octavo::Float;
using octavo::Gated;
using octavo::Heads;
using octavo::Kernels;
using octavo::Linear;
using octavo::LinearKernels;
using octavo::Lookup;
using octavo::Mask;
using octavo::NarrowConvolution;
using octavo::NarrowConvolutionKernels;
using octavo::Norm;
using octavo::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::atomic<const Kernels*> active{nullptr};  // null: the reference serves
const Kernels& kernels() { return *active.load(std::memory_order_relaxed); }

// -- tensors ---------------------------------------------------------------------------------------------------------

// Of what the kernels serve; the rest is the reference's.
std::optional<Float> float_type(ScalarType type) {
  if (!active.load(std::memory_order_relaxed)) return std::nullopt;
  if (type == ScalarType::Float) return Float::f32;
  if (type == ScalarType::BFloat16) return Float::bf16;
  if (type == ScalarType::Half) return Float::f16;
  return std::nullopt;
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); d++) rows *= x.size(d);
  return rows;
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return sizes;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

const void* at(const void* base, int64_t bytes) { return static_cast<const char*>(base) + bytes; }
void* at(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }

// The same op of the reference, for what no kernel is written for: float64.
template <class Result, class... Args>
Result reference(const char* name, const Args&... args) {
  std::array<StableIValue, std::max<size_t>(sizeof...(Args), 2)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher((std::string("octavo_reference::") + name).c_str(), "", stack.data(), TORCH_ABI_VERSION));
  if constexpr (std::is_same_v<Result, std::tuple<Tensor, Tensor>>)
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
  else
    return torch::stable::detail::to<Result>(stack[0]);
}

Rows rows(const Tensor& values, Float type, Tensor& codes, Tensor& scale) {
  return {rows_of(values),
          values.size(-1),
          values.const_data_ptr(),
          type,
          static_cast<int8_t*>(codes.mutable_data_ptr()),
          static_cast<float*>(scale.mutable_data_ptr())};
}

// -- threads ---------------------------------------------------------------------------------------------------------

constexpr int64_t kColumns = 32;              // of y, the unit in which work is dealt out
constexpr int64_t kRowsOfPart = 129;          // of x, that are worth laying W across for
constexpr int64_t kWorthAThread = 128 << 10;  // products that a thread should at least have to make
constexpr int64_t kUnitsOfThread = 8;         // of work, from which it does not matter who has one more
constexpr int64_t kElement = 8;               // products that take as long as what is done to an element of a row
constexpr int64_t kLongestExact = 131071;     // K of which a sum of products of codes, 128 * 128 at most, fits int32

// The first address in `memory`, which has 64 bytes more than are used, that is a multiple of 64.
char* aligned(void* memory) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~static_cast<uintptr_t>(63));
}

// 64-byte aligned memory of this thread, kept from call to call.
void* scratch_of(size_t bytes) {
  thread_local std::vector<char> memory;
  if (memory.size() < bytes + 64) memory.resize(bytes + 64);
  return aligned(memory.data());
}

int64_t up_to_multiple(int64_t value, int64_t of) { return (value + of - 1) / of * of; }

template <class Work>
void in_parallel(int64_t units, int64_t cost_of_unit, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, cost_of_unit));
  if (units <= grain)
    work(0, units);
  else
    torch::stable::parallel_for(0, units, grain, work);
}

// The same for what is done to each element of rows [rows, K].
template <class Work>
void over_rows(int64_t rows, int64_t K, const Work& work) {
  in_parallel(rows, K * kElement, work);
}

// -- linear layers ---------------------------------------------------------------------------------------------------

// What the operands of a linear layer are, before anyone asks which rows of them.
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

  // The layer with rows [m0, m1) of x, and the weight of expert e (0 where there are no experts).
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
      STD_TORCH_CHECK(layer.K <= kLongestExact, "int32 holds sums of up to ", kLongestExact, " products of codes");
      layer.x_scale_step = x_scale.numel() > 1;
      layer.x_scale = static_cast<const float*>(x_scale.const_data_ptr()) + m0 * layer.x_scale_step;
    }
    layer.w = static_cast<const int8_t*>(weight.const_data_ptr()) + e * layer.N * layer.K;
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
  // Whether the sizes that come before the weight's last are those of `one`, too.
  bool is_by_row(const Tensor& one) const {
    for (int64_t d = 0; d + 1 < weight.dim(); d++)
      if (one.size(d) != weight.size(d)) return false;
    return true;
  }
};

// Deals out units of `size` to the threads, of all layers together, of which each has `of(layer)`.
template <class Of, class Work>
void deal_out(const std::vector<Linear>& layers, int64_t size, const Of& of, const Work& work) {
  std::vector<int64_t> ends;  // of the layers, counted in units
  int64_t units = 0, products = 0;
  for (const Linear& layer : layers) {
    ends.push_back(units += (of(layer) + size - 1) / size);
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

// Into how many parts rows are to be cut, if `whole` units of work are all there is of each, so that threads get as
// much of them. least: rows of a part that are worth it.
int64_t even_parts(int64_t whole, int64_t rows, int64_t least) {
  const int64_t threads = torch::stable::get_num_threads();
  if (whole >= kUnitsOfThread * threads || whole % threads == 0) return 1;
  return std::max<int64_t>(1, std::min(threads, rows / least));
}

// Rows of x are packed where the kernels want it, then columns of y computed. `like`: what memory is allocated like.
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
  const int64_t M = layers.size() == 1 ? layers[0].M : 0;  // of experts each is a part
  const int64_t parts = M ? even_parts(columns(layers[0]) / kColumns, M, kRowsOfPart) : 1;
  deal_out(
      layers, kColumns, [&](const Linear& layer) { return parts * columns(layer); },
      [&](const Linear& layer, int64_t begin, int64_t end) {
        const int64_t width = columns(layer),
                      height = up_to_multiple((layer.M + parts - 1) / parts, octavo::kPackedRows);
        void* const scratch = scratch_of(scratch_bytes);
        for (int64_t part = begin / width; part * width < end; part++) {
          const int64_t n0 = std::max(begin - part * width, int64_t{0}), n1 = std::min(end - part * width, layer.N);
          const int64_t m0 = std::min(part * height, layer.M), m1 = std::min(m0 + height, layer.M);
          kernels.run(layer, {m0, m1, n0, n1}, scratch);
        }
      });
}

constexpr size_t kPackedAtOnce = 4 << 20;  // bytes of x, which stay in cache until they are read

// A layer with as many rows of x at a time. `layer(m0, m1)`: with these.
template <class Of>
void run_by_rows(int64_t rows, const Of& layer, const LinearKernels& kernels, const Tensor& like) {
  const Linear all = layer(0, rows);
  const size_t bytes = kernels.packed_bytes ? kernels.packed_bytes(all) : 0;
  if (bytes <= kPackedAtOnce) return run({all}, kernels, like);
  const auto parts = static_cast<int64_t>((bytes + kPackedAtOnce - 1) / kPackedAtOnce);
  const int64_t step = up_to_multiple((rows + parts - 1) / parts, octavo::kRowsAtOnce);
  for (int64_t m = 0; m < rows; m += step) run({layer(m, std::min(m + step, rows))}, kernels, like);
}

// Whether there are kernels for floats of these types: of x in w8a16, of y in w8a8.
bool served(ScalarType type, const std::optional<Tensor>& bias) {
  return float_type(type) && (!bias || float_type(bias->scalar_type()));
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

// The layers of the experts that have rows. Rows past the last end are zeros.
std::vector<Linear> routed(const Operands& in, const Tensor& ends, Tensor& y, Float y_type) {
  STD_TORCH_CHECK(ends.scalar_type() == ScalarType::Int && ends.numel() == in.weight.size(0),
                  "ends must be int32, one for each of ", in.weight.size(0), " experts");
  const Tensor last = dense(ends);
  const auto* end = static_cast<const int32_t*>(last.const_data_ptr());
  std::vector<Linear> layers;
  int64_t done = 0;
  for (int64_t e = 0; e < ends.numel(); e++) {
    STD_TORCH_CHECK(end[e] >= done && end[e] <= rows_of(in.x), "ends must rise, up to the rows of x");
    if (end[e] > done) layers.push_back(in.layer(done, end[e], e, y, y_type));
    done = end[e];
  }
  const int64_t row = in.weight.size(-2) * octavo::size_of(y_type);
  std::memset(static_cast<char*>(y.mutable_data_ptr()) + done * row, 0, (rows_of(in.x) - done) * row);
  return layers;
}

Tensor w8a16_experts_linear(const Tensor& x, const Tensor& ends, const Tensor& weight, const Tensor& weight_scale,
                            const std::optional<Tensor>& bias) {
  if (!served(x.scalar_type(), bias))
    return reference<Tensor>("w8a16_experts_linear", x, ends, weight, weight_scale, bias);
  const Operands in(3, x, std::nullopt, weight, weight_scale, bias);
  Tensor y = empty(x, with_last(x, weight.size(1)), x.scalar_type());
  run(routed(in, ends, y, *float_type(x.scalar_type())), w8a16_kernels(x), x);
  return y;
}

Tensor w8a8_experts_linear(const Tensor& x, const Tensor& x_scale, const Tensor& ends, const Tensor& weight,
                           const Tensor& weight_scale, const std::optional<Tensor>& bias, ScalarType dtype) {
  if (!served(dtype, bias))
    return reference<Tensor>("w8a8_experts_linear", x, x_scale, ends, weight, weight_scale, bias, dtype);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Char, "x must be int8");
  const Operands in(3, x, x_scale, weight, weight_scale, bias);
  Tensor y = empty(x, with_last(x, weight.size(1)), dtype);
  run(routed(in, ends, y, *float_type(dtype)), kernels().w8a8, x);
  return y;
}

#include "bind_convolution.h"

// -- rows ------------------------------------------------------------------------------------------------------------

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

std::tuple<Tensor, Tensor> quantize_weight(const Tensor& weight) {
  const auto type = float_type(weight.scalar_type());
  if (!type || weight.dim() != 2) return reference<std::tuple<Tensor, Tensor>>("quantize_weight", weight);
  return quantize_rows(weight, *type, kernels().quantize_weight);
}

// One scale for all: the rows are pieces of equal length then, as many as is convenient.
constexpr int64_t kPiece = 16 << 10;

// Calls work(piece) for each piece of `count` values that lie one after another.
template <class Work>
void in_pieces(int64_t count, const Work& work) {
  over_rows((count + kPiece - 1) / kPiece, kPiece, [&](int64_t begin, int64_t end) {
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

Tensor quantize_static(const Tensor& x, const Tensor& input_scale) {
  const auto type = float_type(x.scalar_type());
  if (!type || x.dim() == 0) return reference<Tensor>("quantize_static", x, input_scale);
  STD_TORCH_CHECK(input_scale.scalar_type() == ScalarType::Float && input_scale.numel() == 1,
                  "input_scale must be fp32 [1]");
  const Tensor values = dense(x);
  Tensor codes = empty(x, with_last(x, x.size(-1)), ScalarType::Char), scale = input_scale;
  const Rows in = rows(values, *type, codes, scale);
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
  std::vector<float> largest((x.numel() + kPiece - 1) / kPiece);
  in_pieces(x.numel(), [&](int64_t i, int64_t start, int64_t length) {
    largest[i] = kernels().amax(piece_of(in, start, length), 0, 1);
  });
  float amax = 0;
  for (const float one : largest) amax = one > amax || std::isnan(one) ? one : amax;
  const float step = amax / 127.0f;
  in.scale[0] = step == 0 ? 1 : step;  // of the smallest numbers too, of which a 127th is zero
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
  STD_TORCH_CHECK(weight_scale.scalar_type() == ScalarType::Float && weight_scale.numel() == weight.size(0),
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

// Not of the table of ops: it is called where nobody differentiates or compiles, with operands of one type.
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

// Elements from one row [..., K] to the next, if it is the same between all and a row's values are next to each other:
// a half of what one layer returned for two is such.
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

// Not of the table of ops either, for the same reason.
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

// -- attention -------------------------------------------------------------------------------------------------------

// [batch, heads, tokens, values], a token's values next to each other.
Heads heads_of(const Tensor& x) {
  return {x.const_data_ptr(), *float_type(x.scalar_type()), x.stride(0), x.stride(1), x.stride(2)};
}

Tensor with_dense_rows(const Tensor& x) { return x.size(3) == 1 || x.stride(3) == 1 ? x : dense(x); }

std::optional<Mask::Kind> mask_kind(ScalarType type) {
  if (type == ScalarType::Bool) return Mask::Kind::boolean;
  if (type == ScalarType::Float) return Mask::Kind::f32;
  if (type == ScalarType::BFloat16) return Mask::Kind::bf16;
  if (type == ScalarType::Half) return Mask::Kind::f16;
  return std::nullopt;
}

// The mask with an entry for each of `tokens`, next to each other in each row.
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

// Rows in the middle of a causal attention cost as much as all do on average: the first goes with the last, the second
// with the last but one, so that every thread gets its share.
int64_t from_both_ends(int64_t i, int64_t count) { return i % 2 == 0 ? i / 2 : count - 1 - i / 2; }

void run(Attention& a, const AttentionKernels& k) {
  const int64_t key_heads = a.B * a.KV, rows = a.KV ? a.H / a.KV * a.T : 0;
  if (key_heads * rows * a.Dv == 0) return;
  std::vector<Allowed> allowed(a.mask.kind == Mask::Kind::none ? 0 : a.mask.B * a.mask.H * a.mask.T);
  a.mask.allowed = allowed.data();
  in_parallel(static_cast<int64_t>(allowed.size()), a.S, [&](int64_t begin, int64_t end) { k.mask(a, begin, end); });
  const size_t bytes = k.scratch_bytes(a);
  const int64_t parts = (a.S + octavo::kAttentionTokens - 1) / octavo::kAttentionTokens;
  in_parallel(key_heads * parts, octavo::kAttentionTokens * (a.D + a.Dv), [&](int64_t begin, int64_t end) {
    void* const memory = scratch_of(bytes);
    for (int64_t i = begin; i < end; i++) {
      const int64_t s = i % parts * octavo::kAttentionTokens;
      k.tokens(a, i / parts, s, std::min(s + octavo::kAttentionTokens, a.S), memory);
    }
  });
  const int64_t tiles = (rows + octavo::kAttentionRows - 1) / octavo::kAttentionRows,
                height = (rows + tiles - 1) / tiles;
  in_parallel(key_heads * tiles, height * a.S * (a.D + a.Dv), [&](int64_t begin, int64_t end) {
    void* const memory = scratch_of(bytes);
    for (int64_t i = begin; i < end; i++) {
      const int64_t r = from_both_ends(i % tiles, tiles) * height;
      k.rows(a, i / tiles, r, std::min(r + height, rows), memory);
    }
  });
}

// The operands of an attention, its scaling, and who computes it.
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

Tensor int8_attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                      double scaling, std::optional<double> softcap) {
  const bool floats =
      float_type(query.scalar_type()) && float_type(key.scalar_type()) && float_type(value.scalar_type());
  if (!floats || (mask && !mask_kind(mask->scalar_type())) || !kernels().int8_attention)
    return reference<Tensor>("int8_attention", query, key, value, mask, scaling, softcap);
  for (const int64_t summed : {key.size(2), key.size(3)})
    STD_TORCH_CHECK(summed <= kLongestExact, "int32 holds sums of up to ", kLongestExact, " products of codes");
  Attention a{};
  a.has_softcap = softcap.has_value(), a.softcap = static_cast<float>(softcap.value_or(0));
  return attend(a, *kernels().int8_attention, query, key, value, mask, scaling);
}

Tensor float_attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                       double scaling, bool is_causal) {
  const auto type = float_type(query.scalar_type());
  const bool alike = key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type();
  const bool understood = (!mask || (mask->scalar_type() == ScalarType::Bool && !is_causal)) && scaling > 0;
  const AttentionKernels* const served = type ? kernels().float_attention(*type) : nullptr;
  if (!alike || !understood || !served)
    return reference<Tensor>("float_attention", query, key, value, mask, scaling, is_causal);
  Attention a{};
  if (is_causal) a.mask = {Mask::Kind::causal, nullptr, 1, 1, query.size(2), 0, 0, 0, nullptr};
  return attend(a, *served, query, key, value, mask, scaling);
}

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) {
  m.impl("w8a16_linear", TORCH_BOX(&w8a16_linear));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear));
  m.impl("w8a16_conv", TORCH_BOX(&w8a16_conv));
  m.impl("w8a16_conv_transpose", TORCH_BOX(&w8a16_conv_transpose));
  m.impl("w8a16_experts_linear", TORCH_BOX(&w8a16_experts_linear));
  m.impl("w8a8_experts_linear", TORCH_BOX(&w8a8_experts_linear));
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
  m.impl("quantize_per_tensor", TORCH_BOX(&quantize_per_tensor));
  m.impl("quantize_static", TORCH_BOX(&quantize_static));
  m.impl("quantize_weight", TORCH_BOX(&quantize_weight));
  m.impl("w8a16_embedding", TORCH_BOX(&w8a16_embedding));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("gated", TORCH_BOX(&gated));
  m.impl("int8_attention", TORCH_BOX(&int8_attention));
  m.impl("float_attention", TORCH_BOX(&float_attention));
}

}  // namespace

// For Python (octavo/ops/native.py): choose the kernels. Returns why these, or, with `*error` set, what is wrong.
extern "C" __attribute__((visibility("default"))) const char* octavo_select(const char* forced, int* error) {
  static octavo::Choice choice;
  choice = octavo::choose(octavo::this_machine(), forced);
  *error = choice.error;
  if (!choice.error) active.store(choice.kernels);
  return choice.why;
}

// The name of the instruction set of the chosen kernels; null if there are none.
extern "C" __attribute__((visibility("default"))) const char* octavo_isa() {
  return active.load() ? kernels().isa : nullptr;
}

// Whether convolutions have kernels there; else they are the reference's.
extern "C" __attribute__((visibility("default"))) bool octavo_convolves() {
  return active.load() && kernels().convolution(Float::bf16);
}

// Whether int8 attention has kernels of its own there; else it is composed of the other ops.
extern "C" __attribute__((visibility("default"))) bool octavo_attends() {
  return active.load() && kernels().int8_attention;
}

// Whether float attention has, for a type of `Float`; else it is torch's.
extern "C" __attribute__((visibility("default"))) bool octavo_attends_in(int type) {
  return active.load() && kernels().float_attention(static_cast<Float>(type));
}
