// Few rows of x in tiles: W is read once, as codes, in place. Included by amx.cpp.
//
// With few rows the time is that of reading W, as long as nothing is done to a code on its way: the tile unit takes 16
// cycles for 1 KB of codes. So codes stay codes, and it is x that becomes int8, in digits (digits.h): each row of x is
// one, three or four columns of a tile. Up to 6 tiles of columns are multiplied by 16 rows of W at once, up to 2 tiles
// by 32 rows.
//
// While one panel of W is multiplied, the next one is prefetched in memory order.
#pragma once

namespace octavo {
namespace {

constexpr int kMostTiles = 6;  // of x
constexpr int64_t kColumnsOfTiles = kMostTiles * kTile;

// Panels of 16 rows of W that are multiplied by so many tiles of x at once: there are 8 tiles in all.
constexpr int panels_for(int tiles) { return tiles <= 2 ? 2 : 1; }

// A step along K: panels of W, whose rows are `row` bytes apart, times kTiles tiles of x.
template <int kTiles>
OCTAVO_INLINE void few_step(const char* w, int64_t row, const char* x) {
  _tile_loadd(6, w, row);
  if constexpr (panels_for(kTiles) == 2) {
    _tile_loadd(4, x, kRowBytes);
    _tile_loadd(7, w + kTile * row, row);
    _tile_dpbssd(0, 6, 4);
    _tile_dpbssd(1, 7, 4);
    if constexpr (kTiles == 2) {
      _tile_loadd(5, x + kTileBytes, kRowBytes);
      _tile_dpbssd(2, 6, 5);
      _tile_dpbssd(3, 7, 5);
    }
  } else {
    _tile_loadd(7, x, kRowBytes);
    _tile_dpbssd(0, 6, 7);
    _tile_loadd(7, x + kTileBytes, kRowBytes);
    _tile_dpbssd(1, 6, 7);
    _tile_loadd(7, x + 2 * kTileBytes, kRowBytes);
    _tile_dpbssd(2, 6, 7);
    if constexpr (kTiles > 3) {
      _tile_loadd(7, x + 3 * kTileBytes, kRowBytes);
      _tile_dpbssd(3, 6, 7);
    }
    if constexpr (kTiles > 4) {
      _tile_loadd(7, x + 4 * kTileBytes, kRowBytes);
      _tile_dpbssd(4, 6, 7);
    }
    if constexpr (kTiles > 5) {
      _tile_loadd(7, x + 5 * kTileBytes, kRowBytes);
      _tile_dpbssd(5, 6, 7);
    }
  }
}

// Memory that will be needed, to be prefetched line by line.
struct Ahead {
  const char* line;
  const char* end;
  template <int kLines>
  OCTAVO_INLINE void fetch() {
    if (line >= end) return;
#pragma GCC unroll 32
    for (int i = 0; i < kLines; i++) __builtin_prefetch(line + i * kLine, 0, kIntoL2);
    line += kLines * kLine;
  }
};

// sums[tile of 16 columns of x][panel of W] = W x^T over steps [step, end). From step `whole` on, what is left of W's
// rows is in `rest`, padded with zeros.
template <int kTiles>
__attribute__((noinline)) void few_products(const char* w, int64_t row, const char* x, int64_t step, int64_t end,
                                            int64_t whole, const char* rest, Ahead& ahead, int32_t* sums) {
  constexpr int kPanels = panels_for(kTiles);
  settle();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (; step < end; step++) {
    const bool there = step < whole;
    few_step<kTiles>(there ? w + step * kRowBytes : rest, there ? row : kRowBytes, x + step * kTiles * kTileBytes);
    ahead.fetch<kPanels * kTile>();
  }
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + kTileSums, kRowBytes);
  if constexpr (kPanels * kTiles > 2) _tile_stored(2, sums + 2 * kTileSums, kRowBytes);
  if constexpr (kPanels * kTiles > 3) _tile_stored(3, sums + 3 * kTileSums, kRowBytes);
  if constexpr (kPanels * kTiles > 4) _tile_stored(4, sums + 4 * kTileSums, kRowBytes);
  if constexpr (kPanels * kTiles > 5) _tile_stored(5, sums + 5 * kTileSums, kRowBytes);
  settle();
}

// `Rest` computes rows that have no digits. `kLeast`: rows of x; fewer are no faster than by dot products.
template <class Row, class Rest, int kLeast>
struct FewTileRows {
  static constexpr int64_t kDigits = Row::kDigits, kMostRows = kColumnsOfTiles / kDigits;

  struct Scratch {
    Row rows[kMostRows];
    alignas(64) char columns[kColumnsOfTiles][kRowBytes];
    alignas(64) char rest[2 * kTileBytes];
    alignas(64) int32_t sums[kMostTiles * kTileSums];
    alignas(64) float totals[kMostTiles * kTileSums];
    alignas(64) int32_t columns_of_sums[kColumnsOfTiles][kBlock + kTile];  // [column of x][row of W]
    alignas(64) char x[];
  };

  static bool takes(const Linear& layer) {
    return layer.M >= kLeast && layer.M <= kMostRows && layer.N >= kBlock && layer.K <= kLongestExact &&
           (layer.groups == 1 || layer.K / layer.groups % kUnitCodes == 0);
  }

  static int64_t passes(const Linear&) { return 1; }

  static size_t scratch_bytes(const Linear& layer) {
    const size_t bytes = sizeof(Scratch) + tiles_of(layer.M) * ceil_div(layer.K, kRowBytes) * kTileBytes;
    return bytes > Rest::scratch_bytes(layer) ? bytes : Rest::scratch_bytes(layer);
  }

  static void run(const Linear& layer, Block block, void* memory) {
    auto& scratch = *static_cast<Scratch*>(memory);
    if (!pack(layer, block, scratch)) return Rest::run(layer, block, memory);
    const TilesInUse in_use;
    run_tiles(tiles_of(block.m1 - block.m0), layer, block, scratch);
  }

 private:
  static int64_t tiles_of(int64_t rows) { return ceil_div(rows * kDigits, kTile); }

  // Packs x into tiles; those of one step are adjacent. Returns whether its rows have digits.
  static bool pack(const Linear& layer, Block block, Scratch& scratch) {
    const int64_t rows = block.m1 - block.m0, row = layer.K * Row::kSize, tiles = tiles_of(rows);
    const char* const x = static_cast<const char*>(layer.x) + block.m0 * row;
    for (int64_t m = 0; m < rows; m++) {
      scratch.rows[m] = Row(x + m * row, layer.K);
      if (!scratch.rows[m].is_finite()) return false;
    }
    for (int64_t c = rows * kDigits; c < tiles * kTile; c++) memset(scratch.columns[c], 0, kRowBytes);
    char* to = scratch.x;
    for (int64_t k = 0; k < layer.K; k += kRowBytes) {
      const int count = static_cast<int>(min64(kRowBytes, layer.K - k));
      for (int64_t m = 0; m < rows; m++) {
        __m512i digits[kDigits];
        scratch.rows[m].of(x + m * row + k * Row::kSize, count, digits);
#pragma GCC unroll 4
        for (int d = 0; d < kDigits; d++) _mm512_store_si512(scratch.columns[m * kDigits + d], digits[d]);
      }
      for (int64_t tile = 0; tile < tiles; tile++, to += kTileBytes) turn(scratch.columns[tile * kTile], kRowBytes, to);
    }
    return true;
  }

  // The same for 1 to kTiles tiles of x.
  template <int kTiles = kMostTiles>
  static void run_tiles(int64_t tiles, const Linear& layer, Block block, Scratch& scratch) {
    if constexpr (kTiles > 1) {
      if (tiles < kTiles) return run_tiles<kTiles - 1>(tiles, layer, block, scratch);
    }
    panels<kTiles>(layer, block, scratch);
  }

  template <int kTiles>
  static void panels(const Linear& layer, Block block, Scratch& scratch) {
    constexpr int64_t kRows = panels_for(kTiles) * kTile;
    const char* const w = reinterpret_cast<const char*>(layer.codes());
    const int64_t K = layer.K, steps = ceil_div(K, kRowBytes), whole = K / kRowBytes, group = steps / layer.groups;
    for (int64_t n = block.n0; n < block.n1; n += kRows) {
      const int64_t first = min64(n, layer.N - kRows);  // the last panel may begin before n
      const char* const panel = w + first * K;
      if (whole < steps) {
        const __mmask64 there = mask64(static_cast<int>(K % kRowBytes));
        for (int64_t i = 0; i < kRows; i++)
          _mm512_store_si512(scratch.rest + i * kRowBytes,
                             _mm512_maskz_loadu_epi8(there, panel + i * K + whole * kRowBytes));
      }
      Ahead ahead{panel + kRows * K, w + block.n1 * K};
      for (int64_t g = 0; g < layer.groups; g++) {
        few_products<kTiles>(panel, K, scratch.x, g * group, (g + 1) * group, whole, scratch.rest, ahead, scratch.sums);
        if (layer.groups > 1) add_group<kTiles>(layer.w_scale + first * layer.groups + g, layer.groups, g > 0, scratch);
      }
      const Block part{block.m0, block.m1, n, min64(n + kRows, block.n1)};
      layer.groups > 1 ? finish<kTiles>(layer, part, first, scratch.totals, scratch)
                       : finish<kTiles>(layer, part, first, scratch.sums, scratch);
    }
  }

  // totals = or += a group's sums, each multiplied by the scale of its row of W.
  template <int kTiles>
  static void add_group(const float* scale, int64_t step, bool add, Scratch& scratch) {
    constexpr int kPanels = panels_for(kTiles);
    for (int p = 0; p < kPanels; p++) {
      for (int64_t i = 0; i < kTile; i++) {
        const __m512 by = _mm512_set1_ps(scale[(p * kTile + i) * step]);
#pragma GCC unroll 4
        for (int t = 0; t < kTiles; t++) {
          const int64_t at = (t * kPanels + p) * kTileSums + i * kTile;
          const __m512 sums = Vec::from_sums(scratch.sums + at, 0);
          const __m512 before = add ? _mm512_load_ps(scratch.totals + at) : _mm512_setzero_ps();
          _mm512_store_ps(scratch.totals + at, _mm512_fmadd_ps(sums, by, before));
        }
      }
    }
  }

  // The epilogue: tiles of sums, for rows of W from `first` on -> y of a part.
  template <int kTiles, class Sum>
  static void finish(const Linear& layer, Block part, int64_t first, const Sum* sums, Scratch& scratch) {
    for (int t = 0; t < kTiles; t++)
      for (int p = 0; p < panels_for(kTiles); p++, sums += kTileSums)
        turn(sums, kRowBytes, scratch.columns_of_sums[t * kTile] + p * kTile, sizeof scratch.columns_of_sums[0]);
    for (int64_t n = part.n0; n < part.n1; n += kTile) {
      const Finish<Vec> columns(layer, n, static_cast<int>(min64(kTile, part.n1 - n)));
      for (int64_t m = 0; m < part.m1 - part.m0; m++) {
        __m512 y = together<kDigits>([&](int d) {
          const int32_t* const column = scratch.columns_of_sums[m * kDigits + d] + (n - first);
          return Vec::from_sums(reinterpret_cast<const Sum*>(column), 0);
        });
        if constexpr (kDigits > 1) y = Vec::times_two_to(y, Vec::set1(-scratch.rows[m].shift));
        columns.store(part.m0 + m, y);
      }
    }
  }
};

}  // namespace
}  // namespace octavo
