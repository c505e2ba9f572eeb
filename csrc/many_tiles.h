// Many columns in tiles: a block of sums, 32 rows of W by 32 columns of x, takes four of the eight tiles.
//
//                            16 columns of x   16 columns of x
//                                tile 6            tile 7
//     16 rows of W  tile 4       tile 0            tile 2       4 tiles are loaded for 4 products at each step along K
//     16 rows of W  tile 5       tile 1            tile 3
//
// A column is a row of x (many_tile_rows.h) or a window of an image (tile_convolution.h). Columns are packed once, and
// stay in the L2 cache while panels of W, 32 rows each, are read. Codes are read in place, and prefetched a panel
// ahead, if their rows are aligned to cache lines; otherwise, or if they are to be widened to bf16, a panel is copied
// into tiles in L2. That, and the epilogue (sums -> y), are work for the vector units. They do it while the tile unit
// is busy, 16 cycles for each product: see `Meanwhile`.
//
// Included by amx.cpp after its target pragma.
#pragma once

namespace octavo {
namespace {

constexpr int64_t kStepBytes = 2 * kTileBytes + 64;  // of a panel: an odd number of cache lines, to use all sets

// Sizes in scratch, for what should stay in L2, which holds 2 MB.
constexpr int64_t kPackedTiles = 1024;   // of x: 1 MB, or half of it next to panels that are twice as large in bf16
constexpr int64_t kPieceSteps = 64;      // of K that x is packed for at a time, at most: 132 KB for each of two panels
constexpr int64_t kWaitingBlocks = 128;  // of sums, if K is cut into pieces: 512 KB
constexpr int64_t kMostBlocks = 32;      // of columns
constexpr int64_t kLeastBlocks = 4;      // of columns: with fewer, filling panels would take longer than multiplying

// How tiles multiply: `left` by tile 6, `right` by tile 7. `kSteps`: tiles for 64 values along K.
struct Int8Tiles {
  using Sum = int32_t;
  static constexpr int64_t kSteps = 1;
  static void left() {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 5, 6);
  }
  static void right() {
    _tile_dpbssd(2, 4, 7);
    _tile_dpbssd(3, 5, 7);
  }
  static void store_w(char* to, __m512i codes) { _mm512_storeu_si512(to, codes); }
};

// The tile unit flushes subnormal numbers of x to zero.
struct Bf16Tiles {
  using Sum = float;
  static constexpr int64_t kSteps = 2;
  static void left() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
  }
  static void right() {
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  static void store_w(char* to, __m512i codes) {
    const Halves both = looked_up(codes);
    _mm512_storeu_si512(to, both.first);
    _mm512_storeu_si512(to + kStepBytes, both.second);
  }
};

// A panel of W: its first tile, and the bytes to the next row, to the next step along K, and to the second tile.
struct Panel {
  const char* tiles;
  int64_t row, step, second;
};

// Loads the next panel of W, up to 32 rows of `length` codes, in portions: into tiles or, if the panel is read in
// place, into the cache. A row is read to its end before the next one, in memory order, and the row after it is
// prefetched at the same time.
template <class Tiles>
class PanelLoader {
 public:
  PanelLoader(const int8_t* w, int64_t row, int64_t rows, int64_t length, char* tiles)
      : w_(w), row_(row), rows_(rows), length_(length), units_(ceil_div(length, kUnitCodes)), tiles_(tiles) {}

  // The next `count` units of 64 codes.
  OCTAVO_INLINE void some(int64_t count) { tiles_ ? copy(count) : fetch(count); }

  void rest() { some(kBlock * units_ + 1); }

 private:
  OCTAVO_INLINE void fetch(int64_t count) {
    for (; count > 0 && done_ < rows_; count--) {
      __builtin_prefetch(w_ + unit_ * kUnitCodes, 0, kIntoL2);
      if (++unit_ == units_) unit_ = 0, done_++, w_ += row_;
    }
  }

  OCTAVO_INLINE void copy(int64_t count) {
    while (count > 0 && done_ < rows_) {
      const int64_t end = min64(unit_ + count, units_);
      count -= end - unit_;
      stretch(unit_, end);
      unit_ = end;
      if (unit_ == units_) unit_ = 0, done_++, w_ += row_, tiles_ += kRowBytes;
    }
  }

  OCTAVO_INLINE void stretch(int64_t unit, int64_t end) {
    const int64_t whole = min64(end, length_ / kUnitCodes), row = row_;
    const int8_t* w = w_ + unit * kUnitCodes;
    char* to = tiles_ + unit * Tiles::kSteps * kStepBytes;
    for (; unit < whole; unit++, w += kUnitCodes, to += Tiles::kSteps * kStepBytes) {
      __builtin_prefetch(w + row, 0, kIntoL2);
      Tiles::store_w(to, _mm512_loadu_si512(w));
    }
    if (unit < end) {
      const int count = static_cast<int>(length_ % kUnitCodes);
      Tiles::store_w(to, _mm512_maskz_loadu_epi8(mask64(count), w));
    }
  }

  const int8_t* w_;
  int64_t row_, rows_, length_, units_;
  char* tiles_;
  int64_t done_ = 0, unit_ = 0;
};

// The sums of a block, with a row for each row of W: as the tile unit stores them, or parts of a sum folded together.
template <class Sum>
union Sums {
  Sum whole[4 * kTileSums];
  float folded[4 * kTileSums];
};

// What the vector units do while the tile unit multiplies: load the next panel of W, and finish the previous block.
template <class Tiles, class Epilogue>
struct Meanwhile {
  PanelLoader<Tiles> panel;
  Epilogue sums;
  int64_t portion;  // units to load after each step, so that the panel is full once the current one has been used

  OCTAVO_INLINE void work() {
    panel.some(portion);
    sums.one();
  }
};

// A block of sums, added to `sums` if `add`, over `steps` of a panel of W and of one or two tiles of x, `x_second`
// bytes apart.
template <class Tiles, int kTilesOfX, class Epilogue>
__attribute__((noinline)) void multiply(const Panel& panel, const char* x, int64_t x_second, int64_t steps,
                                        typename Tiles::Sum* sums, bool add, Meanwhile<Tiles, Epilogue>& meanwhile) {
  const char *const w = panel.tiles, *const next_w = w + panel.second, *const next_x = x + x_second;
  const int64_t row = panel.row, w_step = panel.step;
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
  for (int64_t step = 0; step < steps; step++) {
    _tile_loadd(4, w + step * w_step, row);
    _tile_loadd(5, next_w + step * w_step, row);
    _tile_loadd(6, x + step * kTileBytes, kRowBytes);
    Tiles::left();
    if constexpr (kTilesOfX == 2) {
      _tile_loadd(7, next_x + step * kTileBytes, kRowBytes);
      Tiles::right();
    }
    meanwhile.work();
  }
  meanwhile.sums.rest();  // which may still be where these are stored
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + kTileSums, kRowBytes);
  if constexpr (kTilesOfX == 2) {
    _tile_stored(2, sums + 2 * kTileSums, kRowBytes);
    _tile_stored(3, sums + 3 * kTileSums, kRowBytes);
  }
  settle();
}

// The product of W and all columns. `Columns` is what these are:
//
//     kParts       how many parts a value is split into, each with sums of its own
//     kFolds       parts are digits, whose sums are folded together (digits.h); otherwise their sums are added
//     kVectors     tiles of 16 columns for 64 values along K, all parts together
//     kMixes       the columns of a block are spread over both tiles, however few there are
//     Memory       what `Columns` keeps in scratch
//     prepare      for columns [m0, m1), no more than fit: returns whether they can be packed
//     pack         columns [m, m1), up to 32, over values [k, k + length), into tiles of 16 columns each,
//                  `second` bytes apart, one part after the other
//     down         the exponents of the digits' units, for 16 of the prepared columns, from the m-th on
//     prefetch_y   the lines of y that a block writes
//     Epilogue     sums of a block -> y, in portions of some hundred operations: the processor looks some 500 ahead,
//                  and has to find the next loads of tiles there
template <class Columns, class Tiles>
struct ManyTiles {
  static constexpr int64_t kParts = Columns::kParts, kSteps = Tiles::kSteps;
  static_assert(Columns::kVectors == kParts * kSteps);

  using Sum = typename Tiles::Sum;
  using Epilogue = typename Columns::Epilogue;

  struct Scratch {
    alignas(64) char x[kPackedTiles / kSteps * kTileBytes];
    alignas(64) char panels[2][kPieceSteps * kStepBytes];
    alignas(64) Sums<Sum> sums[kWaitingBlocks];
    alignas(64) Sum parts[kParts][4 * kTileSums];
    typename Columns::Memory memory;
  };

  static int64_t units_of_group(const Linear& layer) { return layer.K / layer.groups / kUnitCodes; }

  // How much is multiplied at a time, along K and along x.
  struct Plan {
    int64_t all, units, most;  // units of K: all, and those of a piece; the most blocks of columns

    explicit Plan(const Linear& layer) : all(ceil_div(layer.K, kUnitCodes)) {
      const int64_t group = layer.groups > 1 ? units_of_group(layer) : 1;
      int64_t fit = kPieceSteps / kSteps / group * group;
      if (!Columns::kFolds) fit = min64(fit, kPackedTiles / (2 * Columns::kVectors * kSteps * kLeastBlocks));
      units = ceil_div(ceil_div(all, ceil_div(all, fit)), group) * group;
      most = min64(kMostBlocks, kPackedTiles / (2 * units * Columns::kVectors * kSteps));
    }

    // How often W is read for so many columns.
    int64_t passes(int64_t columns) const { return ceil_div(ceil_div(columns, kBlock), most); }
  };

  // `rest(block)` computes columns that cannot be packed.
  template <class Rest>
  static void run(const Linear& layer, Columns& x, Block block, Scratch& scratch, const Rest& rest) {
    const Plan plan(layer);
    const int64_t all = max64(1, block.m1 - block.m0);
    const int64_t rows = ceil_div(ceil_div(all, kBlock), plan.passes(all)) * kBlock;
    const int64_t columns = plan.units < plan.all ? kWaitingBlocks / (rows / kBlock) * kBlock : block.n1 - block.n0;
    const TilesInUse in_use;
    for (int64_t m = block.m0; m < block.m1; m += rows) {
      const int64_t m1 = min64(m + rows, block.m1);
      if (!x.prepare(m, m1)) {
        rest(Block{m, m1, block.n0, block.n1});
        continue;
      }
      for (int64_t n = block.n0; n < block.n1; n += columns) {
        const Block part{m, m1, n, min64(n + columns, block.n1)};
        for (int64_t unit = 0; unit < plan.all; unit += plan.units) {
          const int64_t k = unit * kUnitCodes;
          piece(layer, x, part, k, min64(plan.units * kUnitCodes, layer.K - k), scratch);
        }
      }
    }
  }

 private:
  // The sums of `part` over [k, k + length) of K; and y, if this is the last piece.
  static void piece(const Linear& layer, Columns& columns, Block part, int64_t k, int64_t length, Scratch& scratch) {
    const int64_t units = ceil_div(length, kUnitCodes), steps = units * kSteps;
    const int64_t blocks = ceil_div(part.m1 - part.m0, kBlock);
    const int64_t group = layer.groups > 1 ? units_of_group(layer) : units;
    const bool folds = Columns::kFolds || layer.groups > 1;
    const bool first = k == 0, last = k + length == layer.K, whole = first && last;
    const int64_t tile = steps * kTileBytes;  // bytes that 16 columns take
    char* to = scratch.x;
    for (int64_t m = part.m0; m < part.m1; m += kBlock, to += kParts * 2 * tile)
      columns.pack(m, min64(m + kBlock, part.m1), k, length, to, tile);
    const int8_t* const w = layer.codes() + k;
    const bool is_aligned = kSteps == 1 && (reinterpret_cast<uintptr_t>(w) | static_cast<uintptr_t>(layer.K)) % 64 == 0;
    const auto in_place = [&](int64_t n) { return is_aligned && n + kBlock <= part.n1; };
    const auto loading = [&](int64_t n, char* tiles) {
      const int64_t rows = max64(0, min64(kBlock, part.n1 - n));  // past the last column there is nothing to load
      return PanelLoader<Tiles>(w + n * layer.K, layer.K, rows, length, in_place(n) ? nullptr : tiles);
    };

    char *copy = scratch.panels[0], *next = scratch.panels[1];
    if (!in_place(part.n0)) loading(part.n0, copy).rest();
    Epilogue sums_before;
    Sums<Sum>* sums = scratch.sums;
    for (int64_t n = part.n0; n < part.n1; n += kBlock) {
      const char* const there = reinterpret_cast<const char*>(w + n * layer.K);
      const Panel panel = in_place(n) ? Panel{there, layer.K, kRowBytes, kTile * layer.K}
                                      : Panel{copy, kRowBytes, kStepBytes, kTileBytes};
      const int64_t portion = ceil_div(kBlock, kSteps * blocks * kParts);
      Meanwhile<Tiles, Epilogue> meanwhile{loading(n + kBlock, next), sums_before, portion};
      const char* x = scratch.x;
      for (int64_t m = part.m0; m < part.m1; m += kBlock, x += kParts * 2 * tile) {
        const Block block{m, min64(m + kBlock, part.m1), n, min64(n + kBlock, part.n1)};
        if (last) columns.prefetch_y(block);
        for (int64_t p = 0; !folds && p < kParts; p++)
          products(panel, 0, x + p * 2 * tile, tile, steps, block, sums->whole, !first || p > 0, meanwhile);
        for (int64_t g = 0; folds && g < units; g += group) {
          for (int64_t p = 0; p < kParts; p++)
            products(panel, g * kSteps, x + p * 2 * tile, tile, group * kSteps, block, scratch.parts[p], false,
                     meanwhile);
          fold(layer, columns, block, m - part.m0, k / kUnitCodes + g, !first || g > 0, scratch, sums->folded);
        }
        if (last) meanwhile.sums = Epilogue(columns, block, *sums, folds);
        if (!whole) sums++;
      }
      meanwhile.panel.rest();
      sums_before = meanwhile.sums;
      char* const used = copy;
      copy = next;
      next = used;
    }
    sums_before.rest();
  }

  // The sums of a block over `steps` steps, from `step` on.
  static void products(const Panel& panel, int64_t step, const char* x, int64_t x_second, int64_t steps, Block block,
                       Sum* sums, bool add, Meanwhile<Tiles, Epilogue>& meanwhile) {
    const Panel from{panel.tiles + step * panel.step, panel.row, panel.step, panel.second};
    x += step * kTileBytes;
    if (block.m1 - block.m0 > kTile || Columns::kMixes)
      multiply<Tiles, 2>(from, x, x_second, steps, sums, add, meanwhile);
    else
      multiply<Tiles, 1>(from, x, x_second, steps, sums, add, meanwhile);
  }

  // sums = or += parts: digits are combined and, if there are groups, multiplied by the group's scale. `i`: the first
  // column of the block among the prepared ones. `unit`: the first unit of the group along K.
  static void fold(const Linear& layer, const Columns& columns, Block block, int64_t i, int64_t unit, bool add,
                   const Scratch& scratch, float* sums) {
    const int64_t tiles = block.m1 - block.m0 > kTile ? 4 : 2;
    const float* scale = layer.groups > 1 ? layer.w_scale + unit / units_of_group(layer) : nullptr;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t n = block.n0 + tile % 2 * kTile, column = i + tile / 2 * kTile;
      for (int64_t j = 0; j < kTile; j++) {
        const int64_t at = tile * kTileSums + j * kTile;
        __m512 v = together<kParts>([&](int part) { return Vec::from_sums(scratch.parts[part] + at, 0); });
        if constexpr (Columns::kFolds) v = Vec::times_two_to(v, columns.down(column));
        if (scale) v = Vec::mul(v, Vec::set1(scale[min64(n + j, layer.N - 1) * layer.groups]));
        Vec::store(sums + at, add ? Vec::add(v, Vec::load(sums + at)) : v);
      }
    }
  }
};

}  // namespace
}  // namespace octavo
