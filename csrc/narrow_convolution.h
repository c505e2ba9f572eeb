// Convolutions with few columns (output channels): depthwise, in narrow groups of channels, the last of a decoder.
//
//     y[b, n, p] = sum_k x[b, element k of window p] * w[n, k] * w_scale[n] + bias[n]
//
// Outer products (convolution.h) take 32 columns at a time, and most of them would be empty here. So the lanes of a
// vector are adjacent windows instead: one load takes their elements k, for a product with each column.
//
// For that, each part of the work (some rows of windows of a group) first copies what it needs of the image to scratch,
// in units of 4 bytes, with the zero padding. A row of the image becomes as many rows as the stride, so that the units
// of adjacent windows are adjacent, too:
//
//     a row of an image     a b c d e f g h
//     with stride 2         a c e g             element 0 of windows 0, 1, ...; element 2 from the second unit on
//                           b d f h             element 1
//
// A unit is one element, in fp32, or two in bf16: of two channels or, if there is only one channel, two neighbours
// within a window.
#pragma once

namespace octavo {
namespace {

// `Unit`: see units.h. A vector has `Wide` windows, or `Short` ones if rows are no longer.
template <class Unit, class Wide, class Short>
class NarrowKernel {
  using V = Vec;
  static constexpr int64_t kLanes = Vec::kLanes;
  static constexpr int kSums = kLanes == 16 ? 16 : 12;  // accumulators that stay in registers
  static constexpr int kColumns = 8;                    // that share a load
  static constexpr int64_t kUnits = 1 << 17;            // of an image in scratch: they stay in a cache
  static constexpr int64_t kLeastWindows = 64;          // of a row, at a time
  static constexpr int64_t kLeastRows = 4;              // or most of what a part copies, others would copy, too

  // A product for all columns: where its unit is in scratch, and which codes of a filter it takes. The code past the
  // last one is 0.
  struct Step {
    int64_t at, first, second;
  };

  // How the work is cut: a part has `rows` rows of `width` windows, and [channels, count[0], height, stride[2], pitch]
  // units of the image in scratch.
  struct Plan {
    int64_t channels, steps, whole;  // steps from `whole` on take one element: a neighbour that is left over
    int64_t width, rows, across, down, parts;
    int64_t pitch, chunks, row, height, slice, channel;

    explicit Plan(const NarrowConvolution& c) {
      channels = pairs_channels(c) ? ceil_div(c.C, 2) : c.C;
      const int64_t of_rows = channels * c.count[0] * c.count[1];
      whole = of_rows * (pairs_neighbours(c) ? c.count[2] / 2 : c.count[2]);
      steps = whole + (pairs_neighbours(c) ? of_rows * (c.count[2] % 2) : 0);
      const int64_t reach = (c.count[2] - 1) * c.dilation[2] / c.stride[2];
      const int64_t tall = (c.count[1] - 1) * c.dilation[1] + 1, of_line = channels * c.count[0] * c.stride[2];
      const int64_t sharers = ceil_div(c.threads, c.images * c.groups * c.windows[0]);  // threads that share a plane
      const int64_t of_thread = c.windows[1] > 1 ? c.windows[2] : ceil_div(c.windows[2], sharers);
      const int64_t fitting = kUnits / 4 / (of_line * tall);
      width = min64(c.windows[2], max64(kLeastWindows, ceil_div(min64(fitting, of_thread), kLanes) * kLanes));
      pitch = ceil_div(width, kLanes) * kLanes + reach;
      chunks = ceil_div(pitch, kLanes) * c.stride[2];
      row = c.stride[2] * pitch;
      rows = max64(1, (kUnits / (of_line * pitch) - tall) / c.stride[1] + 1);
      const int64_t even = ceil_div(ceil_div(c.windows[1], rows), sharers) * sharers;
      rows = min64(rows, min64(c.windows[1], max64(kLeastRows, ceil_div(c.windows[1], even))));
      height = (rows - 1) * c.stride[1] + tall;
      slice = height * row;
      channel = c.count[0] * slice;
      across = ceil_div(c.windows[2], width), down = ceil_div(c.windows[1], rows);
      parts = c.images * c.groups * c.windows[0] * down * across;
    }
  };

  // A vector of units of a row: where it is stored, where its first and its second elements begin in the rows of the
  // image, in bytes, and which of them exist.
  struct Chunk {
    int64_t to, first_at, second_at;
    Vec::Range first, second;
    bool has_first, has_second;  // whether any exist
  };

  struct Scratch {
    Step* steps;
    Chunk* chunks;
    uint32_t* filter;  // codes of a column in fp32, and a 0
    uint32_t* codes;   // [steps, columns]
    uint32_t* image;

    Scratch(const NarrowConvolution& c, const Plan& plan, void* memory) {
      steps = static_cast<Step*>(memory);
      chunks = reinterpret_cast<Chunk*>(steps + plan.steps);
      filter = reinterpret_cast<uint32_t*>(chunks + plan.chunks);
      codes = filter + filter_size(c) + 16;
      image = codes + kColumns * plan.steps;
    }
    static size_t bytes(const NarrowConvolution& c, const Plan& plan) {
      const int64_t units = filter_size(c) + 16 + kColumns * plan.steps + plan.channels * plan.channel + 16;
      return plan.steps * sizeof(Step) + plan.chunks * sizeof(Chunk) + units * sizeof(uint32_t);
    }
  };

  // Adjacent windows.
  struct Vector {
    int64_t p;
    int count;
    const uint32_t* x;  // the first unit of the first window
  };

  // The windows of a part: some of one group of one image. `plane`: the group, counted over all images.
  struct Part {
    int64_t plane, from[3], rows, width;

    Part(const NarrowConvolution& c, const Plan& plan, int64_t i) {
      from[2] = i % plan.across * plan.width, i /= plan.across;
      from[1] = i % plan.down * plan.rows, i /= plan.down;
      from[0] = i % c.windows[0], plane = i / c.windows[0];
      rows = min64(plan.rows, c.windows[1] - from[1]), width = min64(plan.width, c.windows[2] - from[2]);
    }
  };

  static int64_t filter_size(const NarrowConvolution& c) { return c.C * c.count[0] * c.count[1] * c.count[2]; }
  static bool pairs_channels(const NarrowConvolution& c) { return Unit::kElements == 2 && c.C > 1; }
  static bool pairs_neighbours(const NarrowConvolution& c) { return Unit::kElements == 2 && c.C == 1; }

 public:
  static int64_t parts(const NarrowConvolution& c) { return Plan(c).parts; }

  static size_t scratch_bytes(const NarrowConvolution& c) { return Scratch::bytes(c, Plan(c)); }

  static void run(const NarrowConvolution& c, int64_t i0, int64_t i1, void* memory) {
    const Plan plan(c);
    const Scratch scratch(c, plan, memory);
    lay_steps(c, plan, scratch.steps);
    int64_t laid = -1;  // the first of the columns whose codes are in scratch
    for (int64_t i = i0, from = -1; i < i1; i++) {
      const Part part(c, plan, i);
      if (part.from[2] != from) lay_chunks(c, plan, from = part.from[2], scratch.chunks);
      lay_image(c, plan, part, scratch);
      for (int64_t n = 0; n < c.N;)
        n += part.width <= Short::kWindows ? columns<Short, kColumns>(c, plan, part, n, laid, scratch)
                                           : columns<Wide, kColumns>(c, plan, part, n, laid, scratch);
    }
  }

 private:
  static void lay_steps(const NarrowConvolution& c, const Plan& plan, Step* step) {
    const int64_t filter = c.count[0] * c.count[1] * c.count[2], none = filter_size(c);
    Step* left_over = step + plan.whole;
    for (int64_t channel = 0; channel < plan.channels; channel++)
      for (int64_t row = 0; row < c.count[0] * c.count[1]; row++)
        for (int64_t k = 0; k < c.count[2]; k++) {
          const int64_t along = k * c.dilation[2], i = row / c.count[1], j = row % c.count[1];
          const int64_t at = channel * plan.channel + i * plan.slice + j * c.dilation[1] * plan.row +
                             along % c.stride[2] * plan.pitch + along / c.stride[2];
          const int64_t first = (pairs_channels(c) ? 2 * channel : channel) * filter + row * c.count[2] + k;
          if (pairs_channels(c))
            *step++ = {at, first, 2 * channel + 1 < c.C ? first + filter : none};
          else if (!pairs_neighbours(c))
            *step++ = {at, first, none};
          else if (k + 1 == c.count[2])
            *left_over++ = {at, first, none};
          else
            *step++ = {at, first, first + 1}, k++;
        }
  }

  // The chunks of the rows in which windows from `from` on begin.
  static void lay_chunks(const NarrowConvolution& c, const Plan& plan, int64_t from, Chunk* chunk) {
    const int64_t step = c.stride[2];
    const auto before = [&](int64_t start, int64_t end) {  // lanes before `end`, in a row from `start` on
      return min64(kLanes, ceil_div(max64(0, end - start), step));
    };
    for (int64_t phase = 0; phase < step; phase++)
      for (int64_t i = 0; i < plan.pitch; i += kLanes) {
        const int64_t first = (from + i) * step - c.padding[2] + phase;
        const int64_t second = first + (pairs_neighbours(c) ? c.dilation[2] : 0);
        const int64_t f0 = before(first, 0), f1 = before(first, c.size[2]);
        const int64_t s0 = before(second, 0), s1 = before(second, c.size[2]);
        *chunk++ = {
            phase * plan.pitch + i, first * Unit::kBytes, second * Unit::kBytes, {f0, f1}, {s0, s1}, f0 < f1, s0 < s1};
      }
  }

  static void lay_image(const NarrowConvolution& c, const Plan& plan, const Part& part, const Scratch& scratch) {
    const int64_t height = (part.rows - 1) * c.stride[1] + (c.count[1] - 1) * c.dilation[1] + 1;
    uint32_t* to = scratch.image;
    for (int64_t channel = 0; channel < plan.channels; channel++)
      for (int64_t i = 0; i < c.count[0]; i++, to += plan.slice)
        for (int64_t j = 0; j < height; j++) {
          const int64_t first = pairs_channels(c) ? 2 * channel : channel, second = first + pairs_channels(c);
          lay_row(c, plan, row_of(c, part, first, i, j), row_of(c, part, second, i, j), scratch.chunks,
                  to + j * plan.row);
        }
  }

  // Row (i, j) of a channel, counted from the beginning of the part. Null means zeros: the row is outside of the image,
  // or there is no such channel.
  static const char* row_of(const NarrowConvolution& c, const Part& part, int64_t channel, int64_t i, int64_t j) {
    const int64_t x0 = part.from[0] * c.stride[0] + i * c.dilation[0] - c.padding[0];
    const int64_t x1 = part.from[1] * c.stride[1] + j - c.padding[1];
    if (channel >= c.C || x0 < 0 || x0 >= c.size[0] || x1 < 0 || x1 >= c.size[1]) return nullptr;
    const int64_t row = ((part.plane * c.C + channel) * c.size[0] + x0) * c.size[1] + x1;
    return static_cast<const char*>(element(c.x, c.type, row * c.size[2]));
  }

  // The last chunk may reach past the end of its row, into the next one, which is stored later.
  static void lay_row(const NarrowConvolution& c, const Plan& plan, const char* first, const char* second,
                      const Chunk* chunks, uint32_t* to) {
    const auto elements = [&](const char* row, bool has_some, int64_t at, const Vec::Range& lanes) {
      return row && has_some ? Vec::strided<Unit::kBytes>(row + at, c.stride[2], lanes) : Vec::zeros();
    };
    for (const Chunk* chunk = chunks; chunk < chunks + plan.chunks; chunk++) {
      const Vec::I other =
          Unit::kElements == 2 ? elements(second, chunk->has_second, chunk->second_at, chunk->second) : Vec::zeros();
      const Vec::I one = elements(first, chunk->has_first, chunk->first_at, chunk->first);
      Vec::store_units(to + chunk->to, Unit::unit(one, other));
    }
  }

  // The codes of columns [column, column + N) of w, in the order of the steps.
  template <int N>
  static void lay_codes(const NarrowConvolution& c, const Plan& plan, int64_t column, const Scratch& scratch) {
    const int64_t K = filter_size(c);
    for (int j = 0; j < N; j++) {
      for (int64_t k = 0; k < K; k += kLanes) {
        const auto codes = V::load_codes(c.w + (column + j) * K + k, static_cast<int>(min64(kLanes, K - k)));
        V::store(reinterpret_cast<float*>(scratch.filter + k), codes);
      }
      scratch.filter[K] = 0;
      for (int64_t k = 0; k < plan.steps; k++) {
        const Step& step = scratch.steps[k];
        scratch.codes[k * N + j] = Unit::unit_of_codes(scratch.filter[step.first], scratch.filter[step.second]);
      }
    }
  }

  // Computes the first N columns of y from n on, or fewer; returns how many.
  template <class Of, int N>
  static int64_t columns(const NarrowConvolution& c, const Plan& plan, const Part& part, int64_t n, int64_t& laid,
                         const Scratch& scratch) {
    if constexpr (N > 1) {
      if (c.N - n < N) return columns<Of, N / 2>(c, plan, part, n, laid, scratch);
    }
    const int64_t column = part.plane % c.groups * c.N + n;
    if (column != laid) lay_codes<N>(c, plan, laid = column, scratch);
    constexpr int kMost = kSums / N < 8 ? kSums / N : 8;
    Vector vectors[kMost];
    int many = 0;
    const auto flush = [&] {
      if (many) tile<Of, N, kMost>(c, plan, part.plane / c.groups * c.groups * c.N, column, vectors, many, scratch);
      many = 0;
    };
    for (int64_t r = 0; r < part.rows; r++) {
      const int64_t p = (part.from[0] * c.windows[1] + part.from[1] + r) * c.windows[2] + part.from[2];
      const uint32_t* const x = scratch.image + r * c.stride[1] * plan.row;
      for (int64_t i = 0; i < part.width; i += Of::kWindows) {
        vectors[many++] = {p + i, static_cast<int>(min64(Of::kWindows, part.width - i)), x + i};
        if (many == kMost) flush();
      }
    }
    flush();
    return N;
  }

  // Vectors of windows, `many` of them (1 to M), times columns [column, column + N) of w. `before`: columns of y that
  // belong to earlier images.
  template <class Of, int N, int M>
  static void tile(const NarrowConvolution& c, const Plan& plan, int64_t before, int64_t column, const Vector* vectors,
                   int many, const Scratch& scratch) {
    if constexpr (M > 1) {
      if (many < M) return tile<Of, N, M - 1>(c, plan, before, column, vectors, many, scratch);
    }
    typename Of::Sums sums[M][N];
    const uint32_t* x[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      x[i] = vectors[i].x;
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) sums[i][j] = Of::zero();
    }
    const uint32_t* codes = scratch.codes;
    // In a unit that is left over, the second element is in no window, and is cleared: if it is infinite, even 0 times
    // it is not 0.
    const auto products = [&](int64_t from, int64_t to, auto is_left_over) {
      for (int64_t k = from; k < to; k++, codes += N) {
        const int64_t at = scratch.steps[k].at;
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
          auto v = Of::load(x[i] + at);
          if constexpr (is_left_over) v = Of::firsts(v);
#pragma GCC unroll 8
          for (int j = 0; j < N; j++) sums[i][j] = Unit::template product<Of>(sums[i][j], v, codes[j]);
        }
      }
    };
    products(0, plan.whole, std::false_type{});
    products(plan.whole, plan.steps, std::true_type{});
    const int64_t P = c.windows[0] * c.windows[1] * c.windows[2];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      const auto scale = V::set1(c.w_scale[column + j]);
      float bias = 0;
      if (c.bias) V::store(&bias, Float::f32, 1, V::load(element(c.bias, c.bias_type, column + j), c.bias_type, 1));
#pragma GCC unroll 8
      for (int i = 0; i < M; i++)
        V::store(element(c.y, c.type, (before + column + j) * P + vectors[i].p), c.type, vectors[i].count,
                 V::add(V::mul(Of::whole(sums[i][j]), scale), V::set1(bias)));
    }
  }
};

template <class Of>
constexpr NarrowConvolutionKernels narrow_convolution{Of::parts, Of::scratch_bytes, Of::run};

}  // namespace
}  // namespace octavo
