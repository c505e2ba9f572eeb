// Convolutions by outer products: a convolution is a linear layer whose rows of x are windows of an image.
//
//     y[b, n, p] = sum_k x[start of window p of image b + element k] * w[n, k] * w_scale[n] + bias[n]
//
// The matrix of all windows is never made (there is no im2col). The tiles that outer_linear.h multiplies are packed
// from the image directly, one element of 12 windows at a time (windows.h), into scratch, for as many windows as stay
// in a cache while all rows of W are read. Sums are transposed as they are stored.
#pragma once

namespace octavo {
namespace {

// `Elements`: the image's elements in the units that a `Unit` multiplies, see units.h.
template <class Unit, class Elements>
class OuterConvolution : OuterLinear<Unit> {
  using Outer = OuterLinear<Unit>;
  using Scratch = typename Outer::Scratch;
  static_assert(Unit::kElements == Elements::kElements);
  static constexpr int64_t kBytes = Elements::kBytes;

  static constexpr int64_t kPackedBytes = 1 << 21;  // of packed windows, at most: they stay in a cache
  static constexpr int64_t kLeastTiles = 4;  // but at least so many, or packing W would take longer than multiplying

 public:
  static int64_t most_windows(const Convolution& c) {
    return kTileRows * max64(kLeastTiles, min64(Outer::kTiles, kPackedBytes / tile_bytes(c)));
  }

  static size_t scratch_bytes(const Convolution& c) {
    return sizeof(Scratch) + most_windows(c) / kTileRows * tile_bytes(c);
  }

  static void run(const Convolution& c, int64_t image, Block block, void* memory) {
    auto& scratch = *static_cast<Scratch*>(memory);
    char* const packed = static_cast<char*>(memory) + sizeof(Scratch);
    for (int64_t m = block.m0, most = most_windows(c); m < block.m1; m += most) {
      const Block some{m, min64(m + most, block.m1), block.n0, block.n1};
      Linear layer = layer_of(c, some.m1 - some.m0);
      layer.packed = packed;
      multiply(c, image, some, layer, scratch);
    }
  }

 private:
  static int64_t tile_bytes(const Convolution& c) { return Outer::tile_bytes(layer_of(c, 0)); }

  static void multiply(const Convolution& c, int64_t image, Block block, const Linear& layer, Scratch& scratch) {
    for (int64_t m = 0; m < layer.M; m += kTileRows)
      pack(c, image, block.m0 + m, min64(kTileRows, layer.M - m), Outer::tile_of(layer, m));
    for (int64_t n = block.n0; n < block.n1; n += kBlockN) {
      const Block part{0, layer.M, n, min64(n + kBlockN, block.n1)};
      for (int64_t k = 0; k < c.K; k += Outer::kPanelK)
        Outer::products(layer, part, k, min64(Outer::kPanelK, c.K - k), scratch, [](int64_t) {});
      store(c, image, {block.m0, block.m1, part.n0, part.n1}, scratch.sums);
    }
  }

  // Packs windows [p, p + count) of an image into a tile.
  static void pack(const Convolution& c, int64_t image, int64_t p, int64_t count, char* to) {
    WindowsAcross<kTileRows, kBytes>::each(c, image, p, count, [&](auto piece, const auto& across) {
      lay_windows<piece>(c, across, to + piece * Vec::kLanes * kUnitBytes);
    });
  }

  template <int kPiece, class Across>
  OCTAVO_INLINE static void lay_windows(const Convolution& c, const Across& across, char* to) {
    constexpr int kLeft = kTileRows - kPiece * Vec::kLanes, kRows = kLeft < Vec::kLanes ? kLeft : Vec::kLanes;
    for (int64_t k = 0; k < c.K; k += Unit::kElements, to += kTileRows * kUnitBytes) {
      Vec::I second = Vec::zeros();
      if (Unit::kElements == 2 && k + 1 < c.K) second = across(c.element[k + 1] * kBytes);
      Vec::store_first_units<kRows>(to, Elements::unit(across(c.element[k] * kBytes), second));
    }
  }

  // The epilogue: sums [m1 - m0, 32] -> y, in which the windows of a column are contiguous.
  static void store(const Convolution& c, int64_t image, Block part, const float* sums) {
    const int64_t P = windows_of(c);
    constexpr int kLanes = Vec::kLanes;
    for (int64_t n = part.n0; n < part.n1; n += kLanes) {
      const int columns = static_cast<int>(min64(kLanes, part.n1 - n));
      float scale[kLanes], bias[kLanes] = {};
      Vec::store(scale, Vec::load(c.w_scale + n, Float::f32, columns));
      if (c.bias) Vec::store(bias, Vec::load(element(c.bias, c.bias_type, n), c.bias_type, columns));
      for (int64_t m = part.m0; m < part.m1; m += kLanes) {
        const int rows = static_cast<int>(min64(kLanes, part.m1 - m));
        const float* from = sums + (m - part.m0) * kBlockN + (n - part.n0);
        Vec::I r[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) r[i] = i < rows ? Vec::load_units(from + i * kBlockN) : Vec::zeros();
        transpose(r);
        for (int j = 0; j < columns; j++) {
          const auto y = Vec::add(Vec::mul(Vec::floats(r[j]), Vec::set1(scale[j])), Vec::set1(bias[j]));
          Vec::store(element(c.y, c.type, image * c.y_step + (n + j) * P + m), c.type, rows, y);
        }
      }
    }
  }
};

template <class Of>
constexpr ConvolutionKernels convolution{32, 256, kTileRows, Of::most_windows, Of::scratch_bytes, Of::run};

}  // namespace
}  // namespace octavo
