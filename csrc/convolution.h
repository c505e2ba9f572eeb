// Convolutions by outer products: a convolution is a linear layer whose rows of x are windows of an image.
//
//     y[b, n, p] = sum_k x[start of window p of image b + element k] * w[n, k] * w_scale[n] + bias[n]
//
// No window is ever laid out as a row. Windows that are next to each other begin at elements that are, as a rule; so
// the tiles that outer_linear.h multiplies are filled from the image directly, an element of 12 windows at a time,
// piece by piece into scratch, where the piece stays while all rows of W pass by. Sums are turned around as they are
// stored.
#pragma once

namespace octavo {
namespace {

constexpr int kPieces = (kTileRows + Vec::kLanes - 1) / Vec::kLanes;  // vectors of a lane for each row of a tile

// Windows of a tile that begin at the same distance from each other: where the window of lane 0 would begin, and which
// lanes they are of each piece.
struct Run {
  int64_t start, first, end;
  Vec::Range lanes(int piece) const {
    const auto within = [&](int64_t lane) { return max64(0, min64(Vec::kLanes, lane - piece * Vec::kLanes)); };
    return {within(first), within(end)};
  }
};

// `Elements`: of the image, as a `Unit` multiplies them: see units.h.
template <class Unit, class Elements>
class OuterConvolution : OuterLinear<Unit> {
  using Outer = OuterLinear<Unit>;
  using Scratch = typename Outer::Scratch;
  static_assert(Unit::kElements == Elements::kElements);
  static constexpr int64_t kBytes = Elements::kBytes;

  static constexpr int64_t kPackedBytes = 1 << 21;  // of windows, at most: they stay in a cache
  static constexpr int64_t kLeastTiles = 4;  // but so many, or to lay W across would take longer than to multiply

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
      multiply(c, image, some, layer_of(c, some.m1 - some.m0, packed), scratch);
    }
  }

 private:
  static int64_t tile_bytes(const Convolution& c) { return Outer::tile_bytes(layer_of(c, 0, nullptr)); }

  // M windows as rows of x, packed.
  static Linear layer_of(const Convolution& c, int64_t M, char* packed) {
    Linear layer{};
    layer.M = M, layer.N = c.N, layer.K = c.K;
    layer.w = c.w, layer.groups = 1;
    layer.packed = packed;
    return layer;
  }

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

  static int64_t start_of(const Convolution& c, int64_t p) {
    const int64_t last = p % c.windows[2], middle = p / c.windows[2] % c.windows[1];
    return p / c.windows[2] / c.windows[1] * c.step[0] + middle * c.step[1] + last * c.step[2];
  }

  // Windows [p, p + count) of an image -> a tile.
  static void pack(const Convolution& c, int64_t image, int64_t p, int64_t count, char* to) {
    const int64_t step = c.step[2] == 2 ? 2 : 1;
    Run runs[kTileRows];
    int many = 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t start = image * c.image_step + start_of(c, p + i) - i * step;
      if (!many || runs[many - 1].start != start) runs[many++] = {start, i, i};
      runs[many - 1].end = i + 1;
    }
    step == 2 ? lay_pieces<2>(c, runs, many, to) : lay_pieces<1>(c, runs, many, to);
  }

  template <int kStep, int kPiece = 0>
  static void lay_pieces(const Convolution& c, const Run* runs, int many, char* to) {
    lay_piece<kStep, kPiece>(c, runs, many, to + kPiece * Vec::kLanes * kUnitBytes);
    if constexpr (kPiece + 1 < kPieces) lay_pieces<kStep, kPiece + 1>(c, runs, many, to);
  }

  // Where the lanes of a piece are, each from an element of the image on. As a rule they are one run or two.
  struct Some {
    const char* x;
    Vec::Range lanes;
  };

  template <int kStep, int kPiece>
  static void lay_piece(const Convolution& c, const Run* runs, int many, char* to) {
    constexpr int64_t kFirst = kPiece * Vec::kLanes;
    Some some[kTileRows];
    int count = 0;
    for (const Run* run = runs; run < runs + many; run++)
      if (run->first < kFirst + Vec::kLanes && run->end > kFirst)
        some[count++] = {static_cast<const char*>(c.x) + (run->start + kFirst * kStep) * kBytes, run->lanes(kPiece)};
    const auto load = [&](int i, int64_t at) { return Vec::strided<kBytes>(some[i].x + at, kStep, some[i].lanes); };
    if (count == 1) lay_windows<kPiece>(c, [&](int64_t at) { return load(0, at); }, to);
    if (count == 2) lay_windows<kPiece>(c, [&](int64_t at) { return Vec::both(load(0, at), load(1, at)); }, to);
    if (count > 2)
      lay_windows<kPiece>(
          c,
          [&](int64_t at) {
            Vec::I v = load(0, at);
            for (int i = 1; i < count; i++) v = Vec::both(v, load(i, at));
            return v;
          },
          to);
  }

  // across(at): the element of all windows of the piece, `at` bytes behind the first of each.
  template <int kPiece, class Across>
  OCTAVO_INLINE static void lay_windows(const Convolution& c, const Across& across, char* to) {
    constexpr int kLeft = kTileRows - kPiece * Vec::kLanes, kRows = kLeft < Vec::kLanes ? kLeft : Vec::kLanes;
    for (int64_t k = 0; k < c.K; k += Unit::kElements, to += kTileRows * kUnitBytes) {
      Vec::I second = Vec::zeros();
      if (Unit::kElements == 2 && k + 1 < c.K) second = across(c.element[k + 1] * kBytes);
      Vec::store_first_units<kRows>(to, Elements::unit(across(c.element[k] * kBytes), second));
    }
  }

  // Sums [m1 - m0, 32] -> y, in which the windows of a column lie next to each other.
  static void store(const Convolution& c, int64_t image, Block part, const float* sums) {
    const int64_t P = c.windows[0] * c.windows[1] * c.windows[2];
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
constexpr ConvolutionKernels convolution{Of::most_windows, Of::scratch_bytes, Of::run};

}  // namespace
}  // namespace octavo
