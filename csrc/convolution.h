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

// Windows of a tile that begin at the same distance from each other: which lanes of a vector they are, where the window
// of lane 0 would begin, and the lanes when elements between them are lanes too.
struct Run {
  int64_t start;
  __mmask16 lanes;
  uint32_t spread;
};

// An element of windows that begin next to each other, or at every other one -> their lanes of v, as `strided` has
// them.
template <int kStep, int64_t kBytes>
OCTAVO_INLINE __m512i with_run(__m512i v, const char* x, const Run& run) {
  const char* const from = x + run.start * kBytes;
  if constexpr (kStep == 1 && kBytes == 2)
    return _mm512_mask_cvtepu16_epi32(v, run.lanes, _mm256_maskz_loadu_epi16(run.lanes, from));
  else if constexpr (kStep == 2 && kBytes == 2)
    return _mm512_mask_loadu_epi16(v, run.spread, from);
  else if constexpr (kStep == 1)
    return _mm512_mask_loadu_epi32(v, run.lanes, from);
  else
    return _mm512_mask_mov_epi32(v, run.lanes, every_other(from, run.spread));
}

// `Elements`: of the image, as a `Unit` multiplies them: see units.h.
template <class V, class Unit, class Elements>
class OuterConvolution : OuterLinear<V, Unit> {
  using Outer = OuterLinear<V, Unit>;
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
      if (!many || runs[many - 1].start != start) runs[many++] = {start, 0, 0};
      runs[many - 1].lanes |= static_cast<__mmask16>(1 << i);
      runs[many - 1].spread |= 1u << 2 * i;
    }
    step == 2 ? lay_runs<2>(c, runs, many, to) : lay_runs<1>(c, runs, many, to);
  }

  // As a rule they are one or two.
  template <int kStep>
  static void lay_runs(const Convolution& c, const Run* runs, int many, char* to) {
    if (many == 1)
      lay_windows(c, [&](const char* x) { return with_run<kStep, kBytes>(_mm512_setzero_si512(), x, runs[0]); }, to);
    else
      lay_windows(
          c,
          [&](const char* x) {
            __m512i v = with_run<kStep, kBytes>(_mm512_setzero_si512(), x, runs[0]);
            for (int i = 1; i < many; i++) v = with_run<kStep, kBytes>(v, x, runs[i]);
            return v;
          },
          to);
  }

  // across(x): the element of all windows of the tile, that of one which begins at 0 being at x.
  template <class Across>
  OCTAVO_INLINE static void lay_windows(const Convolution& c, const Across& across, char* to) {
    constexpr __mmask16 kRows = (1 << kTileRows) - 1;
    const auto* const x = static_cast<const char*>(c.x);
    for (int64_t k = 0; k < c.K; k += Unit::kElements, to += kTileRows * kUnitBytes) {
      __m512i second = _mm512_setzero_si512();
      if (Unit::kElements == 2 && k + 1 < c.K) second = across(x + c.element[k + 1] * kBytes);
      _mm512_mask_storeu_epi32(to, kRows, Elements::unit(across(x + c.element[k] * kBytes), second));
    }
  }

  // Sums [m1 - m0, 32] -> y, in which the windows of a column lie next to each other.
  static void store(const Convolution& c, int64_t image, Block part, const float* sums) {
    const int64_t P = c.windows[0] * c.windows[1] * c.windows[2];
    for (int64_t n = part.n0; n < part.n1; n += 16) {
      const int columns = static_cast<int>(min64(16, part.n1 - n));
      float scale[16], bias[16] = {};
      V::store(scale, Float::f32, 16, V::load(c.w_scale + n, Float::f32, columns));
      if (c.bias) V::store(bias, Float::f32, 16, V::load(element(c.bias, c.bias_type, n), c.bias_type, columns));
      for (int64_t m = part.m0; m < part.m1; m += 16) {
        const int rows = static_cast<int>(min64(16, part.m1 - m));
        const float* from = sums + (m - part.m0) * kBlockN + (n - part.n0);
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) r[i] = i < rows ? _mm512_loadu_si512(from + i * kBlockN) : _mm512_setzero_si512();
        transpose(r);
        for (int j = 0; j < columns; j++) {
          const auto y = V::add(V::mul(_mm512_castsi512_ps(r[j]), V::set1(scale[j])), V::set1(bias[j]));
          V::store(element(c.y, c.type, image * c.y_step + (n + j) * P + m), c.type, rows, y);
        }
      }
    }
  }
};

}  // namespace
}  // namespace octavo
