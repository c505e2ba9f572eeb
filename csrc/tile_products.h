// How attention multiplies rows in tiles: 32 rows by 32 columns at a time.
//
//                             16 columns   16 columns
//                               tile 6       tile 7
//     16 rows      tile 4       tile 0       tile 1        rows of x are loaded as they are: units of 4 bytes along K
//     16 rows      tile 5       tile 2       tile 3        columns are packed as for outer products (outer_linear.h)
//
// Included by amx.cpp after its target pragma, like heads.h, which has the other way (`OuterProducts`),
// avx512_products.h and tiles.h.
#pragma once

namespace octavo {
namespace {

struct TileProducts {
  static constexpr int64_t kRows = 2 * kTile;
  // So few that their scores with all tokens stay in L2.
  static int64_t rows_next_to(int64_t tokens) { return tokens > 4096 ? kTile : kRows; }
  static constexpr int64_t kPast = kTile - 1;
  static int64_t read(int64_t units) { return ceil_div(units, kTile) * kTile; }

  using InUse = TilesInUse;

  template <class Unit>
  static void multiply(int64_t rows, const OuterOperands& in, typename Unit::Sum* sums) {
    rows > kTile ? of_tiles<Unit, 2>(in, sums) : of_tiles<Unit, 1>(in, sums);
  }

 private:
  // Rows past the last one are multiplied, too; their sums are not used.
  template <class Unit, int kTilesOfX>
  __attribute__((noinline)) static void of_tiles(const OuterOperands& in, typename Unit::Sum* sums) {
    constexpr int64_t kSumsRow = kBlockN * sizeof(typename Unit::Sum);
    const char *x = in.x, *panel = in.panel;
    const int64_t row = in.row;
    settle();
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTilesOfX == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t step = 0; step < in.steps; step += kTile, x += kRowBytes, panel += kTile * kStripBytes) {
      _tile_loadd(6, panel, kStripBytes);
      _tile_loadd(7, panel + kRowBytes, kStripBytes);
      _tile_loadd(4, x, row);
      first<Unit>();
      if constexpr (kTilesOfX == 2) {
        _tile_loadd(5, x + kTile * row, row);
        second<Unit>();
      }
    }
    _tile_stored(0, sums, kSumsRow);
    _tile_stored(1, sums + kTile, kSumsRow);
    if constexpr (kTilesOfX == 2) {
      _tile_stored(2, sums + kTile * kBlockN, kSumsRow);
      _tile_stored(3, sums + kTile * kBlockN + kTile, kSumsRow);
    }
    settle();
  }

  template <class Unit>
  static constexpr bool kCodes = std::is_same_v<typename Unit::Sum, int32_t>;

  template <class Unit>
  static void first() {
    if constexpr (kCodes<Unit>) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  template <class Unit>
  static void second() {
    if constexpr (kCodes<Unit>) {
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
};

// Codes with their sign, as tiles multiply them: no offset.
struct SignedUnit : Int8Unit {
  static constexpr int32_t kOffset = 0;
  static WV load_w(const W* w) { return load_x(w); }
  static WV load_w(const W* w, int count) { return load_x(w, count); }
};

}  // namespace
}  // namespace octavo
