// The ops of convolutions: which kernel serves one, and what it is given.
//
// A convolution with few columns (output channels) is narrow, one with many is wide. A transposed convolution is run as
// ordinary ones, with a column for each place between two strides, and the results are interleaved in y.
#pragma once

#include "tensors.h"
#include "threads.h"

namespace {

using octavo::Block;
using octavo::Convolution;
using octavo::ConvolutionKernels;
using octavo::NarrowConvolution;
using octavo::NarrowConvolutionKernels;

using Sizes = std::vector<int64_t>;
using Three = std::array<int64_t, 3>;  // of dimensions: if there are fewer, the first ones have no effect

constexpr int64_t kFewWindows = 48;        // of a part that are worth it, at least
constexpr int64_t kFewColumnsOfPart = 64;  // the same for columns, if other parts have the same windows

Three three(const Sizes& sizes, int64_t in_front) {
  Three all{in_front, in_front, in_front};
  std::copy(sizes.begin(), sizes.end(), all.end() - sizes.size());
  return all;
}

int64_t product(const Three& sizes) { return sizes[0] * sizes[1] * sizes[2]; }

Sizes after_two(const Tensor& tensor) { return Sizes(tensor.sizes().begin() + 2, tensor.sizes().end()); }

// Dense operands, and the geometry: images of `size`, their zero padding, and the windows over them.
struct Convolved {
  Tensor x, weight, scale;     // [B, groups * C, *size]; [groups * N, C, *count]; [groups * N] in fp32
  std::optional<Tensor> bias;  // [groups * N]
  Float type;                  // of x and y
  int64_t groups;
  Three size, count, stride, before, after, dilation, windows;

  Convolved(const Tensor& x_, const Tensor& weight_, const Tensor& scale_, const std::optional<Tensor>& bias_,
            int64_t groups_)
      : x(dense(x_)), weight(dense(weight_)), scale(dense(scale_)), groups(groups_) {
    if (bias_) bias = dense(*bias_);
    type = *float_type(x.scalar_type());
    size = three(after_two(x), 1), count = three(after_two(weight), 1);
  }

  int64_t images() const { return x.size(0); }
  int64_t C() const { return weight.size(1); }
  int64_t N() const { return weight.size(0) / groups; }
  Sizes sizes_of_y(const Three& along) const {
    Sizes sizes{x.size(0), weight.size(0)};
    sizes.insert(sizes.end(), along.end() - (x.dim() - 2), along.end());
    return sizes;
  }
};

// Images with their zero padding.
struct Padded {
  Tensor x;
  Three size;

  explicit Padded(const Convolved& in) : x(in.x), size(in.size) {
    for (int d = 0; d < 3; d++) size[d] += in.before[d] + in.after[d];
    if (size == in.size) return;
    const int64_t planes = in.x.size(0) * in.x.size(1), image = product(size), bytes = octavo::size_of(in.type);
    x = empty(in.x, {planes, size[0], size[1], size[2]}, in.x.scalar_type());
    const auto* from = static_cast<const char*>(in.x.const_data_ptr());
    auto* to = static_cast<char*>(x.mutable_data_ptr());
    over_rows(planes, image, [&](int64_t begin, int64_t end) {
      std::memset(to + begin * image * bytes, 0, (end - begin) * image * bytes);
      const int64_t rows = in.size[0] * in.size[1];
      for (int64_t i = begin * rows; i < end * rows; i++) {
        const int64_t j = i / in.size[1] % in.size[0] + in.before[0], k = i % in.size[1] + in.before[1];
        const int64_t place = ((i / rows * size[0] + j) * size[1] + k) * size[2] + in.before[2];
        std::memcpy(to + place * bytes, from + i * in.size[2] * bytes, in.size[2] * bytes);
      }
    });
  }

  int64_t step(int d) const { return d == 2 ? 1 : size[d + 1] * step(d + 1); }  // from one place along d to the next
};

// From each place so far, `count` places along one more dimension.
Sizes with_dimension(const Sizes& so_far, int64_t count, int64_t step) {
  Sizes all;
  for (const int64_t place : so_far)
    for (int64_t i = 0; i < count; i++) all.push_back(place + i * step);
  return all;
}

// The convolutions of all groups and images, where `part(group)` is that of a group.
template <class Part>
void run(const Convolution& c, const ConvolutionKernels& kernels, int64_t groups, int64_t images, const Part& part) {
  const int64_t P = c.windows[0] * c.windows[1] * c.windows[2], most = kernels.most_windows(c);
  const int64_t widest = ceil_div(c.N, kernels.most_columns), of_widest = groups * images * widest;
  int64_t parts = ceil_div(P, most);
  parts *= even_parts(of_widest * parts, P / parts, kFewWindows);
  const int64_t height = up_to_multiple(ceil_div(P, parts), kernels.unit);
  parts = ceil_div(P, height);
  // Threads that share the same windows.
  const int64_t sharers = std::max<int64_t>(1, torch::stable::get_num_threads() / (of_widest * parts));
  const int64_t width = up_to_multiple(std::max(kFewColumnsOfPart, ceil_div(c.N, widest * sharers)), kColumns);
  const int64_t columns = ceil_div(c.N, width), whole = groups * images * columns;
  const size_t bytes = kernels.scratch_bytes(c);
  in_parallel(whole * parts, std::min(height, P) * std::min(c.N, width) * c.K, [&](int64_t begin, int64_t end) {
    void* const memory = scratch_of(bytes);
    for (int64_t i = begin; i < end; i++) {
      const int64_t n = i % columns * width, m = i / columns % parts * height;
      const int64_t image = i / columns / parts % images, group = i / columns / parts / images;
      kernels.run(part(group), image, {m, std::min(m + height, P), n, std::min(n + width, c.N)}, memory);
    }
  });
}

Tensor narrow_convolution(const Convolved& in, const NarrowConvolutionKernels& kernel) {
  Tensor y = empty(in.x, in.sizes_of_y(in.windows), in.x.scalar_type());
  NarrowConvolution c{};
  c.threads = torch::stable::get_num_threads();
  c.images = in.images(), c.groups = in.groups, c.N = in.N(), c.C = in.C(), c.type = in.type;
  std::copy_n(in.size.begin(), 3, c.size), std::copy_n(in.count.begin(), 3, c.count);
  std::copy_n(in.stride.begin(), 3, c.stride), std::copy_n(in.before.begin(), 3, c.padding);
  std::copy_n(in.dilation.begin(), 3, c.dilation), std::copy_n(in.windows.begin(), 3, c.windows);
  c.x = in.x.const_data_ptr(), c.y = y.mutable_data_ptr();
  c.w = static_cast<const int8_t*>(in.weight.const_data_ptr());
  c.w_scale = static_cast<const float*>(in.scale.const_data_ptr());
  if (in.bias) c.bias = in.bias->const_data_ptr(), c.bias_type = *float_type(in.bias->scalar_type());
  const int64_t parts = kernel.parts(c);
  const size_t bytes = kernel.scratch_bytes(c);
  in_parallel(parts, y.numel() / parts * c.C * product(in.count),
              [&](int64_t begin, int64_t end) { kernel.run(c, begin, end, scratch_of(bytes)); });
  return y;
}

Tensor wide_convolution(const Convolved& in, const ConvolutionKernels& kernel) {
  Tensor y = empty(in.x, in.sizes_of_y(in.windows), in.x.scalar_type());
  const Padded image(in);
  Convolution c{};
  Sizes element = with_dimension({0}, in.C(), product(image.size));
  for (int d = 0; d < 3; d++) element = with_dimension(element, in.count[d], in.dilation[d] * image.step(d));
  std::fill_n(c.windows, 3, 1);
  for (int d = 2, last = 2; d >= 0; d--)  // dimensions with a single window are left out
    if (in.windows[d] > 1) c.windows[last] = in.windows[d], c.step[last--] = in.stride[d] * image.step(d);
  if (in.bias) c.bias_type = *float_type(in.bias->scalar_type());
  c.N = in.N(), c.K = static_cast<int64_t>(element.size()), c.type = in.type;
  const int64_t of_group = in.C() * product(image.size);
  c.image_step = in.groups * of_group, c.element = element.data(), c.y_step = y.stride(0);
  run(c, kernel, in.groups, in.images(), [&](int64_t group) {
    Convolution part = c;
    const int64_t n = group * c.N;
    part.x = at(image.x.const_data_ptr(), group * of_group * octavo::size_of(c.type));
    part.w = static_cast<const int8_t*>(in.weight.const_data_ptr()) + n * c.K;
    part.w_scale = static_cast<const float*>(in.scale.const_data_ptr()) + n;
    if (in.bias) part.bias = at(in.bias->const_data_ptr(), n * octavo::size_of(c.bias_type));
    part.y = at(y.mutable_data_ptr(), n * y.stride(1) * octavo::size_of(c.type));
    return part;
  });
  return y;
}

Tensor by_kernel(const Convolved& in) {
  const ConvolutionKernels& wide = *kernels().convolution(in.type);
  return in.N() < wide.least_columns ? narrow_convolution(in, *kernels().narrow_convolution(in.type))
                                     : wide_convolution(in, wide);
}

bool has_kernel(const Tensor& x) {
  const auto type = float_type(x.scalar_type());
  return type && kernels().convolution(*type) && kernels().narrow_convolution(*type);
}

// Whether kernels may serve a convolution of these operands, as far as types and dimensions tell.
bool is_convolution(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                    const std::optional<Tensor>& bias, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                    int64_t groups) {
  const int64_t dims = weight.dim() - 2, N = weight.size(0);
  const auto is_each = [&](const Sizes& sizes, int64_t least) {
    return static_cast<int64_t>(sizes.size()) == dims &&
           std::all_of(sizes.begin(), sizes.end(), [&](int64_t size) { return size >= least; });
  };
  return dims >= 1 && dims <= 3 && x.dim() == weight.dim() && is_each(stride, 1) && is_each(padding, 0) &&
         is_each(dilation, 1) && groups >= 1 && N % groups == 0 && weight.numel() > 0 && x.numel() > 0 &&
         x.size(1) == weight.size(1) * groups && weight.scalar_type() == ScalarType::Char &&
         weight_scale.scalar_type() == ScalarType::Float && weight_scale.numel() == N && (!bias || bias->numel() == N);
}

Tensor w8a16_conv(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias,
                  Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  const auto by_reference = [&] {
    return reference<Tensor>("w8a16_conv", x, weight, weight_scale, bias, stride, padding, dilation, groups);
  };
  if (!has_kernel(x) || !served(x.scalar_type(), bias) ||
      !is_convolution(x, weight, weight_scale, bias, stride, padding, dilation, groups))
    return by_reference();
  Convolved in(x, weight, weight_scale, bias, groups);
  in.stride = three(stride, 1), in.dilation = three(dilation, 1), in.before = in.after = three(padding, 0);
  for (int d = 0; d < 3; d++) {
    const int64_t room = in.size[d] + 2 * in.before[d] - in.dilation[d] * (in.count[d] - 1) - 1;
    if (room < 0) return by_reference();
    in.windows[d] = room / in.stride[d] + 1;
  }
  return by_kernel(in);
}

// -- transposed ones -------------------------------------------------------------------------------------------------
//
// Along a dimension, element t of x and element k of a filter contribute to place t * stride + k * dilation - padding
// of y. So place q, of phase r = (q + padding) % stride, gets elements r, r + stride, ... of a filter, its taps, and a
// window of x that ends with element (q + padding) / stride. The phases of a filter are filters of an ordinary
// convolution. Those with one tap less than others have a convolution of their own: with a tap of 0 instead, 0 times
// infinity would not be 0.

struct Phases {
  Three from, many, taps;
};

struct Transposed {
  Three count, stride, padding, dilation;
  Three size = {};                 // of y
  Three first = {}, windows = {};  // the first window, and their number

  // The phases with the most taps along dimensions whose bit is not set, and with one tap less along the others.
  Phases phases(int bits) const {
    Phases some{};
    for (int d = 0; d < 3; d++) {
      const bool has_less = bits >> d & 1;
      const int64_t most = (count[d] - 1) / stride[d] + 1, full = count[d] - (most - 1) * stride[d];
      some.from[d] = has_less ? full : 0, some.many[d] = has_less ? stride[d] - full : full;
      some.taps[d] = has_less ? most - 1 : most;
    }
    return some;
  }
};

Three place_of(int64_t i, const Three& sizes) {
  return {i / sizes[2] / sizes[1], i / sizes[2] % sizes[1], i % sizes[2]};
}

// Filters [N, C, *count] -> [N * phases, C, *taps], in the order of x.
Tensor filters_of(const Phases& phases, const Tensor& weight, const Transposed& of) {
  const int64_t C = weight.size(1), filter = product(of.count), many = product(phases.many),
                taps = product(phases.taps);
  Tensor rows =
      empty(weight, {weight.size(0) * many, C, phases.taps[0], phases.taps[1], phases.taps[2]}, ScalarType::Char);
  const auto* from = static_cast<const int8_t*>(weight.const_data_ptr());
  auto* to = static_cast<int8_t*>(rows.mutable_data_ptr());
  over_rows(weight.size(0) * many, C * taps, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const Three phase = place_of(row % many, phases.many);
      for (int64_t i = 0; i < taps; i++) {
        const Three tap = place_of(i, phases.taps);
        int64_t k = 0;
        for (int d = 0; d < 3; d++)
          k = k * of.count[d] + phases.from[d] + phase[d] + (phases.taps[d] - 1 - tap[d]) * of.stride[d];
        const int8_t* const codes = from + row / many * C * filter + k;
        int8_t* const tapped = to + row * C * taps + i;
        for (int64_t c = 0, channels = C, step = filter, width = taps; c < channels; c++)
          tapped[c * width] = codes[c * step];
      }
    }
  });
  return rows;
}

// Each of [N] values, `times` times.
Tensor repeated(const Tensor& values, int64_t times, int64_t bytes) {
  Tensor all = empty(values, {values.numel() * times}, values.scalar_type());
  for (int64_t i = 0; i < all.numel(); i++)
    std::memcpy(at(all.mutable_data_ptr(), i * bytes), at(values.const_data_ptr(), i / times * bytes), bytes);
  return all;
}

// Columns [N * phases, windows] -> y [N, *size], where phases are interleaved.
template <class Value>
void interleave(const Tensor& columns, const Phases& phases, const Transposed& of, Tensor& y) {
  const auto* from = static_cast<const Value*>(columns.const_data_ptr());
  auto* to = static_cast<Value*>(y.mutable_data_ptr());
  over_rows(y.numel() / of.size[2], of.size[2], [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const int64_t n = row / of.size[1] / of.size[0];
      const int64_t q0 = row / of.size[1] % of.size[0] + of.padding[0], q1 = row % of.size[1] + of.padding[1];
      const int64_t r0 = q0 % of.stride[0] - phases.from[0], r1 = q1 % of.stride[1] - phases.from[1];
      if (r0 < 0 || r0 >= phases.many[0] || r1 < 0 || r1 >= phases.many[1]) continue;
      const int64_t u0 = q0 / of.stride[0] - of.first[0], u1 = q1 / of.stride[1] - of.first[1];
      for (int64_t r2 = 0; r2 < phases.many[2]; r2++) {
        const int64_t column = ((n * phases.many[0] + r0) * phases.many[1] + r1) * phases.many[2] + r2;
        const Value* line = from + ((column * of.windows[0] + u0) * of.windows[1] + u1) * of.windows[2];
        int64_t q = of.first[2] * of.stride[2] + phases.from[2] + r2 - of.padding[2];
        if (q < 0) q += of.stride[2], line++;
        for (; q < of.size[2]; q += of.stride[2]) to[row * of.size[2] + q] = *line++;
      }
    }
  });
}

// Nothing, if it is left to the reference.
std::optional<Transposed> transposed(const Convolved& in, const Sizes& stride, const Sizes& padding,
                                     const Sizes& dilation, const Sizes& output_padding) {
  Transposed of{in.count, three(stride, 1), three(padding, 0), three(dilation, 1)};
  const Three more = three(output_padding, 0);
  for (int d = 0; d < 3; d++) {
    const int64_t step = of.stride[d], apart = of.dilation[d];
    of.size[d] = (in.size[d] - 1) * step - 2 * of.padding[d] + apart * (of.count[d] - 1) + more[d] + 1;
    of.first[d] = of.padding[d] / step;
    of.windows[d] = (of.size[d] - 1 + of.padding[d]) / step - of.first[d] + 1;
    const bool is_valid = of.size[d] > 0 && more[d] >= 0 && more[d] < std::max(step, apart);
    // Otherwise the elements of a phase are not strides apart, or it has none, or the first window begins inside of x.
    const bool has_taps = (step == 1 || apart == 1) && of.count[d] >= step;
    if (!is_valid || !has_taps || of.first[d] > (of.count[d] / step - 1) * apart) return std::nullopt;
  }
  return of;
}

// The ordinary convolution that computes some phases.
Convolved convolved(const Phases& phases, const Convolved& given, const Transposed& of) {
  Convolved in = given;
  const int64_t many = product(phases.many);
  in.weight = filters_of(phases, given.weight, of), in.scale = repeated(given.scale, many, sizeof(float));
  if (given.bias) in.bias = repeated(*given.bias, many, octavo::size_of(*float_type(given.bias->scalar_type())));
  in.count = phases.taps, in.stride = {1, 1, 1}, in.dilation = of.dilation, in.windows = of.windows;
  for (int d = 0; d < 3; d++) {
    in.before[d] = (in.count[d] - 1) * of.dilation[d] - of.first[d];
    in.after[d] = std::max(of.first[d] + of.windows[d] - in.size[d], int64_t{0});
  }
  return in;
}

Tensor w8a16_conv_transpose(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                            const std::optional<Tensor>& bias, Sizes stride, Sizes padding, Sizes dilation,
                            Sizes output_padding, int64_t groups) {
  const auto by_reference = [&] {
    return reference<Tensor>("w8a16_conv_transpose", x, weight, weight_scale, bias, stride, padding, dilation,
                             output_padding, groups);
  };
  if (!has_kernel(x) || !served(x.scalar_type(), bias) ||
      !is_convolution(x, weight, weight_scale, bias, stride, padding, dilation, groups) ||
      output_padding.size() != stride.size())
    return by_reference();
  const Convolved given(x, weight, weight_scale, bias, groups);
  const auto of = transposed(given, stride, padding, dilation, output_padding);
  if (!of) return by_reference();
  Tensor y = empty(x, given.sizes_of_y(of->size), x.scalar_type());
  for (int bits = 0; bits < 8; bits++) {
    const Phases phases = of->phases(bits);
    if (product(phases.many) == 0) continue;
    const Tensor columns = by_kernel(convolved(phases, given, *of));
    given.type == Float::f32 ? interleave<uint32_t>(columns, phases, *of, y)
                             : interleave<uint16_t>(columns, phases, *of, y);
  }
  return y;
}

}  // namespace
