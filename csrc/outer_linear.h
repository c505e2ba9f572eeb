// y = x W^T by outer products, for many rows of x: accumulators are vectors of columns of y.
//
//                           32 rows of W, a unit of each
//                          [ w0: vector ][ w1: vector ]
//     a unit of row 0   *    acc[0][0]     acc[0][1]         a step along K: two vectors of W are loaded, and a unit of
//     a unit of row 1   *    acc[1][0]     acc[1][1]         each row of x is broadcast
//     ...
//
// Dot products along K (dot_linear.h) load whole vectors of x and of W. With many rows of x it pays to pack both, in
// units of 4 bytes, which are u elements along K: 32 rows of W as [K / u][32][u], and 12 rows of x as [K / u][12][u].
// The same products then take less than half of the bytes from cache, and all of them in sequence.
//
//     x   is packed in advance, once, by all threads (`pack`): tiles of 12 rows
//     W   is packed a panel of 32 rows at a time, piece by piece of K, into scratch, where it stays in L2 while all
//         tiles are multiplied. If two vectors hold fewer than 32 columns, a panel is several strips in a row
//
// Groups along K with scales of their own are multiplied one by one, and their sums are scaled as they are added.
//
// `Vec` is the instruction set's part (see avx512.h):
//     kLanes, F, I            a vector of fp32, and of units
//     kRegisterRows           rows of x, with two accumulators each, for which there are registers
//     zeros, load_units, store_units, store_first_units, broadcast, transpose
//     floats, units           a vector, reinterpreted as the other kind
//
// A `Unit` is the product of one instruction (see avx512_products.h):
//     X, Sum      element types of x and of the sums
//     kOffset     what was added to each code of W, to be subtracted again: offset * (sum of x's row)
//     kElements   elements in a unit: u
//     kManyRows   rows of x from which outer products are faster than dot products
//     load_x      kLanes units of a row of x: whole, or their first `count` elements, padded with zeros
//     load_w      the same for a row of W, as `product` takes it
//     product     sums + unit of x * unit of W
//     sum_x       the sum of a row of x (only if there is an offset)
//     kGroups     whether groups along K may have scales of their own (fp32 sums only); if so:
//     kManyRowsOfGroups   kManyRows for these: fewer, since dot products then take two accumulators for each sum
#pragma once

namespace octavo {
namespace {

constexpr int kTileRows = kPackedRows;
constexpr int64_t kUnitBytes = 4;

constexpr int64_t kStrip = 2 * Vec::kLanes;  // columns of a panel that a tile multiplies at once
constexpr int64_t kStripBytes = kStrip * kUnitBytes;
static_assert(kBlockN % kStrip == 0);

// The offset of a column's unit in a panel of `steps` units along K.
constexpr int64_t in_panel(int64_t steps, int64_t step, int64_t column) {
  return (column / kStrip * steps + step) * kStripBytes + column % kStrip * kUnitBytes;
}

// The operands of a tile: rows of x, and a panel of 32 rows of W, over `steps` units of K; the panel may have more.
// `next`: codes that later panels need, prefetched meanwhile, 32 rows times a unit for each step; or null.
struct OuterOperands {
  const char* x;
  int64_t row, unit;  // bytes from one row of x to the next, and from one unit of a row to the next
  const char* panel;
  int64_t strip;  // bytes from one strip of the panel to the next
  int64_t steps;
  const int8_t* next;
};

// acc += x[MR, a unit] panel[a unit]. p: every third row of x.
template <class Unit, int MR>
OCTAVO_INLINE void outer_step(Vec::I (&acc)[MR][2], const char* const (&p)[(MR + 2) / 3], int64_t row,
                              const char* panel) {
  const Vec::I w0 = Vec::load_units(panel), w1 = Vec::load_units(panel + kStripBytes / 2);
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++) {
    int unit;
    memcpy(&unit, p[i / 3] + i % 3 * row, sizeof unit);
    const Vec::I a = Vec::broadcast(unit);
    acc[i][0] = Unit::product(acc[i][0], a, w0);
    acc[i][1] = Unit::product(acc[i][1], a, w1);
  }
}

OCTAVO_INLINE void store_scaled(float* sums, Vec::I partial, Vec::F scale, bool add) {
  const Vec::F v = Vec::mul(Vec::floats(partial), scale);
  Vec::store(sums, add ? Vec::add(v, Vec::load(sums)) : v);
}

// sums[MR][kStrip] += x[MR, units] panel[units], or = if not `add`; rows of sums are kBlockN apart. `Scaled`: what is
// added is multiplied by scale[kStrip].
template <class Unit, int MR, bool Ahead, bool Scaled>
__attribute__((noinline)) void outer_tile(const OuterOperands& in, typename Unit::Sum* sums, bool add,
                                          const float* scale) {
  constexpr int64_t kHalf = Vec::kLanes;
  Vec::I acc[MR][2];
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++) {
    acc[i][0] = add && !Scaled ? Vec::load_units(sums + i * kBlockN) : Vec::zeros();
    acc[i][1] = add && !Scaled ? Vec::load_units(sums + i * kBlockN + kHalf) : Vec::zeros();
  }
  const int64_t row = in.row, unit = in.unit;
  const char* p[(MR + 2) / 3];
#pragma GCC unroll 4
  for (int j = 0; j < (MR + 2) / 3; j++) p[j] = in.x + 3 * j * row;
  const char* panel = in.panel;
  const int8_t* next = in.next;
  constexpr int64_t kCodes = kBlockN * Unit::kElements;  // of W in a step
  for (int64_t steps = in.steps; steps > 0; steps--, panel += kStripBytes) {
    if constexpr (Ahead) {
#pragma GCC unroll 2
      for (int64_t line = 0; line < kCodes; line += 64) __builtin_prefetch(next + line, 0, kIntoL2);
      next += kCodes;
    }
    outer_step<Unit, MR>(acc, p, row, panel);
#pragma GCC unroll 4
    for (int j = 0; j < (MR + 2) / 3; j++) p[j] += unit;
  }
  if constexpr (Scaled) {
    // Without this the compiler allocates registers to suit what follows, and copies or spills each accumulator in
    // every step above.
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) __asm__("" : "+v"(acc[i][0]), "+v"(acc[i][1]));
    const Vec::F scale0 = Vec::load(scale), scale1 = Vec::load(scale + kHalf);
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) {
      store_scaled(sums + i * kBlockN, acc[i][0], scale0, add);
      store_scaled(sums + i * kBlockN + kHalf, acc[i][1], scale1, add);
    }
  } else {
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) {
      Vec::store_units(sums + i * kBlockN, acc[i][0]);
      Vec::store_units(sums + i * kBlockN + kHalf, acc[i][1]);
    }
  }
}

// The same for 1 to MR rows.
template <class Unit, bool Scaled, int MR = Vec::kRegisterRows>
OCTAVO_INLINE void outer_rows(int64_t rows, const OuterOperands& in, typename Unit::Sum* sums, bool add,
                              const float* scale) {
  if constexpr (MR > 1) {
    if (rows < MR) return outer_rows<Unit, Scaled, MR - 1>(rows, in, sums, add, scale);
  }
  if (in.next)
    outer_tile<Unit, MR, true, Scaled>(in, sums, add, scale);
  else
    outer_tile<Unit, MR, false, Scaled>(in, sums, add, scale);
}

// A tile of 1 to kTileRows rows, over all columns.
template <class Unit, bool Scaled = false>
OCTAVO_INLINE void outer_tile_of(int64_t rows, OuterOperands in, typename Unit::Sum* sums, bool add,
                                 const float* scale = nullptr) {
  constexpr int64_t kRows = Vec::kRegisterRows;
  if constexpr (kStrip == kBlockN && kRows == kTileRows) {
    outer_rows<Unit, Scaled>(rows, in, sums, add, scale);
  } else {
    const char* const x = in.x;
    for (int64_t n = 0; n < kBlockN; n += kStrip, in.panel += in.strip) {
      in.x = x;
      for (int64_t i = 0; i < rows; i += kRows, in.x += kRows * in.row, in.next = nullptr)
        outer_rows<Unit, Scaled>(min64(kRows, rows - i), in, sums + i * kBlockN + n, add, scale + n);
    }
  }
}

// Transposes kLanes rows of kLanes units, `load(row)`, and stores the first `count` units of `kRows` rows, `unit` bytes
// from one unit to the next.
template <int kRows, class Load>
OCTAVO_INLINE void lay_units(const Load& load, int64_t count, char* to, int64_t unit) {
  Vec::I r[Vec::kLanes];
#pragma GCC unroll 16
  for (int j = 0; j < Vec::kLanes; j++) r[j] = load(j);
  transpose(r);
#pragma GCC unroll 16
  for (int j = 0; j < Vec::kLanes; j++)
    if (j < count) Vec::store_first_units<kRows>(to + unit * j, r[j]);
}

// Packs up to 32 rows of `length` elements into a panel; missing rows are zeros. `load(row, k)`: kLanes units of the
// row from element k on; `load(row, k, count)`: its first `count` elements.
template <class Unit, class Load>
OCTAVO_INLINE void lay_across(const Load& load, int64_t rows, int64_t length, char* panel) {
  constexpr int64_t kVector = Vec::kLanes * Unit::kElements;
  const int64_t steps = ceil_div(length, Unit::kElements);
  for (int64_t k = 0; k < length; k += kVector) {
    const int count = static_cast<int>(min64(kVector, length - k));
    for (int64_t first = 0; first < kBlockN; first += Vec::kLanes) {
      const auto row = [&](int j) {
        const int64_t n = first + j;
        return n >= rows ? Vec::zeros() : count == kVector ? load(n, k) : load(n, k, count);
      };
      lay_units<Vec::kLanes>(row, ceil_div(count, Unit::kElements), panel + in_panel(steps, k / Unit::kElements, first),
                             kStripBytes);
    }
  }
}

// The same for rows of codes, `step` elements apart.
template <class Unit>
void lay_codes_across(const int8_t* codes, int64_t step, int64_t rows, int64_t length, char* panel) {
  const auto load = [&](int64_t n, int64_t k, auto... count) { return Unit::load_w(codes + n * step + k, count...); };
  lay_across<Unit>(load, rows, length, panel);
}

// Packs a tile of x over kLanes units: `load(row)` -> `count` units of all 12 rows.
template <int kFirst = 0, class Load>
OCTAVO_INLINE void lay_rows(const Load& load, int64_t count, char* to) {
  constexpr int kRows = Vec::kLanes < kTileRows - kFirst ? Vec::kLanes : kTileRows - kFirst;
  lay_units<kRows>([&](int j) { return load(kFirst + j); }, count, to + kFirst * kUnitBytes, kTileRows * kUnitBytes);
  if constexpr (kFirst + kRows < kTileRows) lay_rows<kFirst + kRows>(load, count, to);
}

// A row of x -> its units, in order. The last vector is stored whole, with zeros past the last element.
template <class Unit>
void lay_row(const typename Unit::X* x, int64_t K, char* to) {
  constexpr int64_t kVector = Vec::kLanes * Unit::kElements;
  for (int64_t k = 0; k < K; k += kVector, to += Vec::kLanes * kUnitBytes)
    Vec::store_units(to, K - k < kVector ? Unit::load_x(x + k, static_cast<int>(K - k)) : Unit::load_x(x + k));
}

template <class Unit>
struct OuterLinear {
  using X = typename Unit::X;
  static constexpr int64_t kPanelSteps = 512;  // units of K at a time: 64 KB of a panel
  static constexpr int64_t kPanelK = kPanelSteps * Unit::kElements;
  static constexpr int64_t kTiles = kRowsAtOnce / kTileRows;  // of x, whose sums stay in scratch
  static constexpr int64_t kGroupSteps = 8;                   // of a group, at least: smaller groups are not served
  static constexpr int64_t kGroups = kPanelSteps / kGroupSteps + 1;  // in a panel: one may have begun before it

  struct Scratch {
    alignas(64) typename Unit::Sum sums[kTiles * kTileRows * kBlockN];
    alignas(64) char panel[kPanelSteps * kBlockN * kUnitBytes];
    float scales[kGroups][kBlockN];
  };

  static size_t scratch_bytes(const Linear&) { return sizeof(Scratch); }

  // Few rows, and groups that are small or that cut a unit, are left to dot products.
  static bool takes(const Linear& layer) {
    if (layer.groups == 1) return layer.M >= Unit::kManyRows;
    if constexpr (Unit::kGroups) {
      const int64_t size = group_size(layer);
      return layer.M >= Unit::kManyRowsOfGroups && size >= kGroupSteps * Unit::kElements && size % Unit::kElements == 0;
    }
    return false;
  }

  static size_t packed_bytes(const Linear& layer) { return ceil_div(layer.M, kTileRows) * tile_bytes(layer); }

  static void pack(const Linear& layer, int64_t m0, int64_t m1) {
    for (int64_t m = m0; m < m1; m += kTileRows) {
      const int64_t rows = min64(kTileRows, m1 - m);
      char* to = tile_of(layer, m);
      for (int64_t i = 0; i < rows; i++) excess_at(layer, m)[i] = excess_of<Unit>(x_row(layer, m + i), layer.K);
      constexpr int64_t kVector = Vec::kLanes * Unit::kElements;
      for (int64_t k = 0; k < layer.K; k += kVector, to += Vec::kLanes * kTileRows * kUnitBytes) {
        const int count = static_cast<int>(min64(kVector, layer.K - k));
        const auto load = [&](int64_t j) {
          if (j >= rows) return Vec::zeros();
          const X* x = x_row(layer, m + j) + k;
          return count == kVector ? Unit::load_x(x) : Unit::load_x(x, count);
        };
        lay_rows(load, ceil_div(count, Unit::kElements), to);
      }
    }
  }

  static void run(const Linear& layer, Block block, void* memory) {
    auto& scratch = *static_cast<Scratch*>(memory);
    for (int64_t m = block.m0 / kTileRows * kTileRows; m < block.m1; m += kTiles * kTileRows) {
      for (int64_t n = block.n0; n < block.n1; n += kBlockN) {
        const Block part{m, min64(m + kTiles * kTileRows, block.m1), n, min64(n + kBlockN, block.n1)};
        for (int64_t k = 0; k == 0 || k < layer.K; k += kPanelK) {
          const bool is_last = k + kPanelK >= layer.K;
          products(layer, part, k, min64(kPanelK, layer.K - k), scratch, [&](int64_t m) {
            if (is_last) store(layer, part, m, block.m0, scratch);
          });
        }
      }
    }
  }

 protected:
  static int64_t group_size(const Linear& layer) { return layer.K / layer.groups; }

  static const X* x_row(const Linear& layer, int64_t m) { return static_cast<const X*>(layer.x) + m * layer.K; }

  // The bytes of a tile of x: its units, and in the last 64 bytes, for each row, by how much the offset of W's codes
  // makes its sums too large.
  static int64_t tile_bytes(const Linear& layer) {
    return ceil_div(ceil_div(layer.K, Unit::kElements) * kTileRows * kUnitBytes, 64) * 64 + 64;
  }
  static char* tile_of(const Linear& layer, int64_t m) { return layer.packed + m / kTileRows * tile_bytes(layer); }
  static int32_t* excess_at(const Linear& layer, int64_t m) {
    return reinterpret_cast<int32_t*>(tile_of(layer, m) + tile_bytes(layer) - 64);
  }

  // The sums of `part` over [k, k + length) of K. `then(m)` is called after each tile.
  template <class Then>
  static void products(const Linear& layer, Block part, int64_t k, int64_t length, Scratch& scratch, const Then& then) {
    lay_codes_across<Unit>(layer.codes() + part.n0 * layer.K + k, layer.K, part.n1 - part.n0, length, scratch.panel);
    if (layer.groups > 1) lay_scales_across(layer, part, k, length, scratch.scales);
    const int64_t steps = ceil_div(length, Unit::kElements);
    for (int64_t m = part.m0; m < part.m1; m += kTileRows) {
      const OuterOperands in{tile_of(layer, m) + k / Unit::kElements * kTileRows * kUnitBytes,
                             kUnitBytes,
                             kTileRows * kUnitBytes,
                             scratch.panel,
                             steps * kStripBytes,
                             steps,
                             m == part.m0 ? layer.codes() + part.n1 * layer.K + kBlockN * k : nullptr};
      const int64_t rows = min64(kTileRows, layer.M - m);
      auto* const sums = scratch.sums + (m - part.m0) * kBlockN;
      if (layer.groups == 1)
        outer_tile_of<Unit>(rows, in, sums, k > 0);
      else if constexpr (Unit::kGroups)
        grouped_tile(layer, k, length, rows, in, sums, scratch.scales);
      then(m);
    }
  }

  // The scales of the groups that overlap the panel -> [group][column].
  static void lay_scales_across(const Linear& layer, Block part, int64_t k, int64_t length, float (*scales)[kBlockN]) {
    const int64_t first = k / group_size(layer), end = ceil_div(k + length, group_size(layer));
    for (int64_t n = part.n0; n < part.n1; n++)
      for (int64_t g = first; g < end; g++) scales[g - first][n - part.n0] = layer.w_scale[n * layer.groups + g];
  }

  // A tile over the panel, one group after another.
  static void grouped_tile(const Linear& layer, int64_t k, int64_t length, int64_t rows, OuterOperands in,
                           typename Unit::Sum* sums, const float (*scale)[kBlockN]) {
    const int64_t size = group_size(layer);
    for (int64_t begin = k, end; begin < k + length; begin = end, scale++) {
      end = min64((begin / size + 1) * size, k + length);
      in.steps = (end - begin) / Unit::kElements;
      outer_tile_of<Unit, true>(rows, in, sums, begin > 0, *scale);
      in.x += in.steps * in.unit;
      in.panel += in.steps * kStripBytes;
      if (in.next) in.next += kBlockN * (end - begin);
    }
  }

  // The sums of a tile of `part` -> y, from row m0 on: a block may begin within a tile.
  static void store(const Linear& layer, Block part, int64_t m, int64_t m0, const Scratch& scratch) {
    const int64_t from = max64(m, m0);
    finish<Vec>(layer, {from, min64(m + kTileRows, part.m1), part.n0, part.n1},
                scratch.sums + (from - part.m0) * kBlockN, excess_at(layer, m) + (from - m));
  }
};

// `FewRows` runs layers with few rows of x, `ManyRows` those with many, whose rows are packed.
template <class FewRows, class ManyRows>
constexpr LinearKernels linear{
    Either<ManyRows, FewRows>::scratch_bytes,
    Either<ManyRows, FewRows>::run,
    [](const Linear& layer) { return ManyRows::takes(layer) ? ManyRows::packed_bytes(layer) : 0; },
    ManyRows::pack,
};

}  // namespace
}  // namespace octavo
