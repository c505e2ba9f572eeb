// AMX: a unit that multiplies tiles, 16 rows of 64 bytes each, into 16 x 16 sums (tiles.h). It computes linear layers
// with few rows of x (few_tile_rows.h) and with many (many_tile_rows.h), convolutions of many columns
// (tile_convolution.h) and attention of many rows (tile_products.h). What it cannot do, or is not faster in, is left to
// AVX-512: one or two rows of codes, groups along K that are no multiple of 64, few rows of attention, and the rest.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include "kernels.h"

#if defined(OCTAVO_EMULATED_TILES)
#include "test/emulated_tiles.h"
#endif

#pragma GCC push_options
#pragma GCC target( \
    "avx2,bmi2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16")

#include "rows.h"

#include "avx512.h"

#include "dot_linear.h"

#include "fp32.h"

#include "avx512_products.h"

#include "outer_linear.h"

#include "tiles.h"

#include "digits.h"

#include "few_tile_rows.h"

#include "many_tiles.h"

#include "many_tile_rows.h"

#include "windows.h"

#include "tile_convolution.h"

#include "mask.h"

#include "softmax.h"

#include "heads.h"

#include "tile_products.h"

#include "int8_rows.h"

#include "int8_attention.h"

#include "attention_rows.h"

#include "float_attention.h"

namespace octavo {
namespace {

// The kernels of AVX-512, which are constants that no header has.
template <Float type>
const LinearKernels& avx512_floats() {
  return avx512_kernels.w8a16(type);
}
const LinearKernels& avx512_codes() { return avx512_kernels.w8a8; }

template <const LinearKernels& (*kernels)()>
struct Avx512 {
  static size_t scratch_bytes(const Linear& layer) { return kernels().scratch_bytes(layer); }
  static void run(const Linear& layer, Block block, void* scratch) { kernels().run(layer, block, scratch); }
  static size_t packed_bytes(const Linear& layer) { return kernels().packed_bytes(layer); }
  static void pack(const Linear& layer, int64_t m0, int64_t m1) { kernels().pack(layer, m0, m1); }
  static int64_t passes(const Linear&) { return 1; }
};

// A layer is computed by the first of `Tiles` that takes it, or else by `Rest`.
template <class Rest, class... Tiles>
struct InTiles : Rest {};

template <class Rest, class First, class... More>
struct InTiles<Rest, First, More...> : Either<First, InTiles<Rest, More...>> {
  static size_t packed_bytes(const Linear& layer) {
    return First::takes(layer) ? 0 : InTiles<Rest, More...>::packed_bytes(layer);
  }
  static void pack(const Linear& layer, int64_t m0, int64_t m1) { Rest::pack(layer, m0, m1); }
  static int64_t passes(const Linear& layer) {
    return First::takes(layer) ? First::passes(layer) : InTiles<Rest, More...>::passes(layer);
  }
};

// For rows with NaN or inf, which have no digits.
template <Float type>
using ByDots = DotLinear<Vec, Fp32<type>>;

template <Float type, int digits>
using Few = FewTileRows<DigitRow<type, digits>, ByDots<type>, 1>;
template <Float type, int digits>
using ManyDigits = ManyTileRows<DigitRow<type, digits>, Int8Tiles, ByDots<type>, 5>;

using LinearF32 = InTiles<Avx512<avx512_floats<Float::f32>>, Few<Float::f32, 4>, ManyDigits<Float::f32, 4>>;
using LinearF16 = InTiles<Avx512<avx512_floats<Float::f16>>, Few<Float::f16, 3>, ManyDigits<Float::f16, 3>>;
using LinearBf16 = InTiles<Avx512<avx512_floats<Float::bf16>>, Few<Float::bf16, 3>,
                           ManyTileRows<Bf16Row, Bf16Tiles, ByDots<Float::bf16>, 5>>;
using LinearInt8 = InTiles<Avx512<avx512_codes>, FewTileRows<CodeRow, Avx512<avx512_codes>, 3>,
                           ManyTileRows<CodeRow, Int8Tiles, Avx512<avx512_codes>, 5>>;

template <class Layer>
constexpr LinearKernels tile_kernels{Layer::scratch_bytes, Layer::run, Layer::packed_bytes, Layer::pack, Layer::passes};

// Attention of few rows, by the kernels of AVX-512.
template <class Of, const AttentionKernels* (*kernels)()>
struct FewOfAvx512 {
  using Stored = Of;  // of keys and values
  static constexpr bool kCodes = std::is_same_v<Stored, int8_t>;
  static bool take(const Attention& a) { return a.rows() <= kAttentionRows; }
  static size_t packed(const Attention& a) { return kernels()->packed_bytes(a); }
  static size_t scratch(const Attention& a) { return kernels()->scratch_bytes(a); }
  static void tokens(const Attention& a, int64_t key_head, int64_t s0, int64_t s1, void* memory) {
    kernels()->tokens(a, key_head, s0, s1, memory);
  }
  static void rows(const Attention& a, int64_t key_head, int64_t r0, int64_t r1, void* memory) {
    kernels()->rows(a, key_head, r0, r1, memory);
  }
};
const AttentionKernels* avx512_floats_of_few() { return avx512_kernels.float_attention(Float::bf16).attention; }
const AttentionKernels* avx512_codes_of_few() { return avx512_kernels.attention_of_codes(Float::bf16); }

using Int8InTiles = Int8Attention<SignedUnit, WeightedUnit, TileProducts>;
using Bf16InTiles = FloatAttention<Bf16Unit, FewOfAvx512<uint16_t, avx512_floats_of_few>, TileProducts>;
using Bf16OfCodesInTiles = FloatAttention<Bf16Unit, FewOfAvx512<int8_t, avx512_codes_of_few>, TileProducts>;

template <class Of>
constexpr ConvolutionKernels convolution{Of::kLeastColumns, 1024, kBlock, Of::most_windows, Of::scratch_bytes, Of::run};

}  // namespace
}  // namespace octavo

#pragma GCC pop_options

// Compiled for any processor, since it runs when the library is loaded.
namespace octavo {

extern const Kernels amx_kernels = [] {
  Kernels kernels = avx512_kernels;
  kernels.int8_attention = &attention<Int8InTiles>;
  kernels.float_attention_of[static_cast<int>(Float::bf16)] = {kAnyNumber, &attention<Bf16InTiles>};
  kernels.attention_of_codes_of[static_cast<int>(Float::bf16)] = &attention<Bf16OfCodesInTiles>;
  // Torch uses tiles for bf16, too. It is slower if few rows wait for float weights to be read.
  kernels.float_linear_of[static_cast<int>(Float::f32)] = {};
  FloatLinearKernels &bf16 = kernels.float_linear_of[static_cast<int>(Float::bf16)],
                     &f16 = kernels.float_linear_of[static_cast<int>(Float::f16)];
  bf16.most_rows = bf16.most_rows_next_to_wider = 3;
  f16.most_rows = f16.most_rows_next_to_wider = 12;
  kernels.isa = "amx";
  kernels.w8a16_of[static_cast<int>(Float::f32)] = tile_kernels<LinearF32>;
  kernels.w8a16_of[static_cast<int>(Float::bf16)] = tile_kernels<LinearBf16>;
  kernels.w8a16_of[static_cast<int>(Float::f16)] = tile_kernels<LinearF16>;
  kernels.w8a8 = tile_kernels<LinearInt8>;
  kernels.convolution_of[static_cast<int>(Float::f32)] = &convolution<TileConvolution<Float::f32>>;
  kernels.convolution_of[static_cast<int>(Float::bf16)] = &convolution<TileConvolution<Float::bf16>>;
  kernels.convolution_of[static_cast<int>(Float::f16)] = &convolution<TileConvolution<Float::f16>>;
  return kernels;
}();

}  // namespace octavo

#endif  // x86-64
