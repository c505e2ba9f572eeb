// AMX: a unit that multiplies tiles, 16 rows of 64 bytes each, into 16 x 16 sums.
//
//     y^T = W x^T
//
// This way round, W is the operand that tiles take row by row, as it lies in memory; x, which is the smaller one, is
// packed into the order that the other operand has: [K / 4][16 rows of x][4] codes, [K / 2][16 rows of x][2] bf16.
//
//                            16 rows of x   16 rows of x
//                               tile 6         tile 7
//     16 rows of W  tile 4      tile 0         tile 2        a block of sums: 4 loads of a tile for 4 products
//     16 rows of W  tile 5      tile 1         tile 3        at each step along K
//
// A block of rows of x, packed, stays in the L2 cache while panels of W, 32 rows each, pass by. A panel is copied, or
// widened to bf16, into tiles in L2 as well: read from where it is, its 32 rows would lie on as many pages, which no
// hardware prefetcher follows. That copy, and the way from sums to y, are work for the vector units. They do it while
// the tile unit is busy, 16 cycles for each product: see `Meanwhile`.
//
// Whatever else there is, groups, fp32 and fp16 activations, few rows, and all that is not a linear layer, is left to
// AVX-512.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(OCTAVO_EMULATED_TILES)
#include "test/emulated_tiles.h"
#endif

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16")

#include "rows.h"

#include "avx512.h"

#include "dot_linear.h"

namespace octavo {
namespace {

constexpr int64_t kFewRows = 4;  // of x, up to which AVX-512 reads W as fast as memory gives it

constexpr int64_t kTile = 16;  // rows of a tile, and columns of a tile of sums
constexpr int64_t kRowBytes = 64;
constexpr int64_t kTileBytes = kTile * kRowBytes;
constexpr int64_t kTileSums = kTile * kTile;
constexpr int64_t kBlock = 2 * kTile;                // rows of W, and of x, whose sums fill four tiles
constexpr int64_t kStepBytes = 2 * kTileBytes + 64;  // of a panel: odd, in cache lines, to spread over a cache's sets

// Sizes in scratch, 2 MB in all, which is what L2 holds.
constexpr int64_t kPackedTiles = 1024;   // of x: 1 MB
constexpr int64_t kPieceSteps = 128;     // of K, at most, that x is packed for at a time: a panel has 264 KB, twice
constexpr int64_t kWaitingBlocks = 128;  // of sums, where K is in pieces: 512 KB

// Steps between one portion of work meanwhile and the next: few, for the processor looks some 500 operations ahead.
constexpr int64_t kSegment = 2;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kWholeTiles;

// What was stored so far is there for the tiles to load. GCC's intrinsics do not say that they read memory.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// What the two types of x differ in. `load_w`: a row of a tile of W, whole or its first `count` elements with zeros
// behind. `left`, `right`: the products with tile 6 and with tile 7.
struct Int8Tiles {
  using Sum = int32_t;
  static constexpr int64_t kStep = 64;
  static constexpr int64_t kSize = 1;
  static __m512i load_w(const int8_t* codes) { return _mm512_loadu_si512(codes); }
  static __m512i load_w(const int8_t* codes, int count) { return _mm512_maskz_loadu_epi8(mask64(count), codes); }
  static void left() {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 5, 6);
  }
  static void right() {
    _tile_dpbssd(2, 4, 7);
    _tile_dpbssd(3, 5, 7);
  }
};

// Subnormal numbers of x are zeros to the tile unit.
struct Bf16Tiles {
  using Sum = float;
  static constexpr int64_t kStep = 32;
  static constexpr int64_t kSize = 2;
  static __m512i load_w(const int8_t* codes) { return widened_to_bf16(codes); }
  static __m512i load_w(const int8_t* codes, int count) { return widened_to_bf16(codes, count); }
  static void left() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
  }
  static void right() {
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
};

// 16 rows of x, over `bytes` of each -> tiles, one for each step. Past the last of `rows` it is met again; the sums are
// not used.
__attribute__((noinline)) void pack(const char* x, int64_t row_bytes, int64_t rows, int64_t bytes, char* tiles) {
  const char* row[kTile];
  for (int i = 0; i < kTile; i++) row[i] = x + min64(i, rows - 1) * row_bytes;
  for (int64_t k = 0; k < bytes; k += kRowBytes, tiles += kTileBytes) {
    const __mmask64 there = bytes - k < kRowBytes ? mask64(static_cast<int>(bytes - k)) : ~__mmask64{0};
    __m512i r[kTile];
#pragma GCC unroll 16
    for (int i = 0; i < kTile; i++) r[i] = _mm512_maskz_loadu_epi8(there, row[i] + k);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; i++) _mm512_storeu_si512(tiles + i * kRowBytes, r[i]);
  }
}

// A panel of W on its way into tiles: up to 32 rows, over `length` columns. A row is read to its end before the next
// is begun, so that W is read as it lies in memory; the row after it is asked for at the same time.
template <class Tiles>
class Filling {
 public:
  Filling(const int8_t* w, int64_t row, int64_t rows, int64_t length, char* tiles)
      : w_(w), row_(row), rows_(rows), length_(length), steps_(ceil_div(length, Tiles::kStep)), tiles_(tiles) {}

  // The next `count` rows of tiles, 64 bytes each.
  OCTAVO_INLINE void some(int64_t count) {
    while (count > 0 && done_ < rows_) {
      const int64_t end = min64(step_ + count, steps_);
      count -= end - step_;
      stretch(step_, end);
      step_ = end;
      if (step_ == steps_) step_ = 0, done_++, w_ += row_, tiles_ += kRowBytes;
    }
  }

  void rest() { some(kBlock * steps_ + 1); }

 private:
  OCTAVO_INLINE void stretch(int64_t step, int64_t end) {
    const int64_t whole = min64(end, length_ / Tiles::kStep), row = row_;
    const int8_t* w = w_ + step * Tiles::kStep;
    char* to = tiles_ + step * kStepBytes;
    for (; step < whole; step++, w += Tiles::kStep, to += kStepBytes) {
      __builtin_prefetch(w + row, 0, 2);
      _mm512_storeu_si512(to, Tiles::load_w(w));
    }
    if (step < end) _mm512_storeu_si512(to, Tiles::load_w(w, static_cast<int>(length_ % Tiles::kStep)));
  }

  const int8_t* w_;
  int64_t row_, rows_, length_, steps_;
  char* tiles_;
  int64_t done_ = 0, step_ = 0;
};

// The sums of a block on their way into y, a tile at a time.
template <class Tiles>
class Finishing {
 public:
  Finishing() = default;
  Finishing(const Linear& layer, Block part, typename Tiles::Sum* sums)
      : layer_(&layer), part_(part), sums_(sums), left_(part.m1 - part.m0 > kTile ? 4 : 2) {}

  OCTAVO_INLINE void one() {
    if (left_ == 0) return;
    left_--;
    const int64_t n = part_.n0 + left_ % 2 * kTile, m = part_.m0 + left_ / 2 * kTile;
    if (n < part_.n1) tile(m, n, sums_ + left_ * kTileSums);
  }

  void rest() {
    while (left_) one();
  }

 private:
  __attribute__((noinline)) void tile(int64_t m, int64_t n, typename Tiles::Sum* sums) {
    __m512i r[kTile];
#pragma GCC unroll 16
    for (int i = 0; i < kTile; i++) r[i] = _mm512_loadu_si512(sums + i * kTile);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; i++) _mm512_storeu_si512(sums + i * kTile, r[i]);
    const int count = static_cast<int>(min64(kTile, part_.n1 - n));
    const int64_t end = min64(kTile, part_.m1 - m);
    const Finish<Vec> columns(*layer_, n, count);
    for (int64_t i = 0; i < end; i++) columns.store(m + i, Vec::from_sums(sums + i * kTile, 0));
  }

  const Linear* layer_ = nullptr;
  Block part_{};
  typename Tiles::Sum* sums_ = nullptr;
  int left_ = 0;
};

// What the vector units do while the tile unit multiplies: the next panel of W, and the sums of the block before.
template <class Tiles>
struct Meanwhile {
  Filling<Tiles> panel;
  Finishing<Tiles> sums;
  int64_t portion;  // rows of tiles after each segment: the panel is full when the one before it has met all of x

  OCTAVO_INLINE void work() {
    panel.some(portion);
    sums.one();
  }
};

// A block of sums, added to those that are there or not, over `steps` of a panel of W and of one or two tiles of x.
template <class Tiles, int kTilesOfX>
__attribute__((noinline)) void multiply(const char* w, const char* x, int64_t steps, typename Tiles::Sum* sums,
                                        bool add, Meanwhile<Tiles>& meanwhile) {
  const char* const next_x = x + steps * kTileBytes;
  settle();
  if (add) {
    _tile_loadd(0, sums, kRowBytes);
    _tile_loadd(1, sums + kTileSums, kRowBytes);
    if constexpr (kTilesOfX == 2) {
      _tile_loadd(2, sums + 2 * kTileSums, kRowBytes);
      _tile_loadd(3, sums + 3 * kTileSums, kRowBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTilesOfX == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t step = 0; step < steps;) {
    for (const int64_t end = min64(step + kSegment, steps); step < end; step++) {
      _tile_loadd(4, w + step * kStepBytes, kRowBytes);
      _tile_loadd(5, w + step * kStepBytes + kTileBytes, kRowBytes);
      _tile_loadd(6, x + step * kTileBytes, kRowBytes);
      Tiles::left();
      if constexpr (kTilesOfX == 2) {
        _tile_loadd(7, next_x + step * kTileBytes, kRowBytes);
        Tiles::right();
      }
    }
    meanwhile.work();
  }
  meanwhile.sums.rest();  // they may lie where these are stored
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + kTileSums, kRowBytes);
  if constexpr (kTilesOfX == 2) {
    _tile_stored(2, sums + 2 * kTileSums, kRowBytes);
    _tile_stored(3, sums + 3 * kTileSums, kRowBytes);
  }
}

}  // namespace
}  // namespace octavo

#include "few_tile_rows.h"

namespace octavo {
namespace {

template <class Tiles>
struct TileLinear {
  struct Scratch {
    alignas(64) char x[kPackedTiles * kTileBytes];
    alignas(64) char panels[2][kPieceSteps * kStepBytes];
    alignas(64) typename Tiles::Sum sums[kWaitingBlocks * 4 * kTileSums];
  };

  static bool takes(const Linear& layer) { return layer.M > kFewRows && layer.groups == 1; }

  static size_t scratch_bytes(const Linear&) { return sizeof(Scratch); }

  static void run(const Linear& layer, Block block, void* memory) {
    auto& scratch = *static_cast<Scratch*>(memory);
    const int64_t all = ceil_div(layer.K, Tiles::kStep);
    const int64_t pieces = max64(1, ceil_div(all, kPieceSteps));
    const int64_t steps = max64(1, ceil_div(all, pieces));  // of a piece
    const int64_t most = kPackedTiles / steps / 2;          // blocks of rows of x that fit
    const int64_t blocks = max64(1, ceil_div(block.m1 - block.m0, kBlock));
    const int64_t rows = ceil_div(blocks, ceil_div(blocks, most)) * kBlock;
    const int64_t columns = steps < all ? max64(1, kWaitingBlocks / (rows / kBlock)) * kBlock : block.n1 - block.n0;
    _tile_loadconfig(&kWholeTiles);
    for (int64_t m = block.m0; m < block.m1; m += rows) {
      for (int64_t n = block.n0; n < block.n1; n += columns) {
        const Block part{m, min64(m + rows, block.m1), n, min64(n + columns, block.n1)};
        for (int64_t step = 0; step == 0 || step < all; step += steps)
          piece(layer, part, step * Tiles::kStep, min64(steps * Tiles::kStep, layer.K - step * Tiles::kStep), scratch);
      }
    }
    _tile_release();
  }

 private:
  // The sums of `part` over K elements [k, k + length); and y, if these are the last.
  static void piece(const Linear& layer, Block part, int64_t k, int64_t length, Scratch& scratch) {
    const int64_t steps = ceil_div(length, Tiles::kStep), blocks = ceil_div(part.m1 - part.m0, kBlock);
    const bool first = k == 0, last = k + length == layer.K, whole = first && last;
    const char* const x = static_cast<const char*>(layer.x);
    for (int64_t m = part.m0, tile = 0; m < part.m1; m += kTile, tile++)
      pack(x + (m * layer.K + k) * Tiles::kSize, layer.K * Tiles::kSize, min64(kTile, part.m1 - m),
           length * Tiles::kSize, scratch.x + tile * steps * kTileBytes);
    const auto panel_of = [&](int64_t n, char* tiles) {
      const int64_t rows = max64(0, min64(kBlock, part.n1 - n));  // past the last column there is nothing to fill
      return Filling<Tiles>(layer.codes() + n * layer.K + k, layer.K, rows, length, tiles);
    };

    char *panel = scratch.panels[0], *next = scratch.panels[1];
    panel_of(part.n0, panel).rest();
    Finishing<Tiles> sums_before;
    typename Tiles::Sum* sums = scratch.sums;
    for (int64_t n = part.n0; n < part.n1; n += kBlock) {
      Meanwhile<Tiles> meanwhile{panel_of(n + kBlock, next), sums_before, ceil_div(kBlock * kSegment, blocks)};
      const char* packed = scratch.x;
      for (int64_t m = part.m0; m < part.m1; m += kBlock, packed += 2 * steps * kTileBytes) {
        if (part.m1 - m > kTile)
          multiply<Tiles, 2>(panel, packed, steps, sums, !first, meanwhile);
        else
          multiply<Tiles, 1>(panel, packed, steps, sums, !first, meanwhile);
        const Block block{m, min64(m + kBlock, part.m1), n, min64(n + kBlock, part.n1)};
        if (last) meanwhile.sums = Finishing<Tiles>(layer, block, sums);
        if (!whole) sums += 4 * kTileSums;
      }
      sums_before = meanwhile.sums;
      char* const used = panel;
      panel = next;
      next = used;
    }
    sums_before.rest();
  }
};

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
};

// A layer is that of the first of `Tiles` that takes it, or else `Rest`'s.
template <class Rest, class... Tiles>
struct InTiles : Rest {};

template <class Rest, class First, class... More>
struct InTiles<Rest, First, More...> : Either<First, InTiles<Rest, More...>> {
  static size_t packed_bytes(const Linear& layer) {
    return First::takes(layer) ? 0 : InTiles<Rest, More...>::packed_bytes(layer);
  }
  static void pack(const Linear& layer, int64_t m0, int64_t m1) { Rest::pack(layer, m0, m1); }
};

template <Float type, int digits, class... More>
using Floats = InTiles<Avx512<avx512_floats<type>>,
                       FewTileRows<FloatDigits<type, digits>, Avx512<avx512_floats<type>>>, More...>;
using Codes = InTiles<Avx512<avx512_codes>, FewTileRows<CodeDigits, Avx512<avx512_codes>>, TileLinear<Int8Tiles>>;

template <class Layer>
constexpr LinearKernels packing_kernels{Layer::scratch_bytes, Layer::run, Layer::packed_bytes, Layer::pack};

}  // namespace
}  // namespace octavo

#pragma GCC pop_options

// Compiled for any processor, since this runs when the library is loaded.
namespace octavo {

extern const Kernels amx_kernels = [] {
  Kernels kernels = avx512_kernels;
  kernels.float_attention_of[static_cast<int>(Float::bf16)].most_rows = kAttentionRows;  // torch's has tiles for many
  for (FloatLinearKernels& none : kernels.float_linear_of) none = {};  // torch's have too; not measured
  kernels.isa = "amx";
  kernels.w8a16_of[static_cast<int>(Float::f32)] = packing_kernels<Floats<Float::f32, 4>>;
  kernels.w8a16_of[static_cast<int>(Float::bf16)] = packing_kernels<Floats<Float::bf16, 3, TileLinear<Bf16Tiles>>>;
  kernels.w8a16_of[static_cast<int>(Float::f16)] = packing_kernels<Floats<Float::f16, 3>>;
  kernels.w8a8 = packing_kernels<Codes>;
  return kernels;
}();

}  // namespace octavo

#endif  // x86-64
