// y = x W^T by outer products, for many rows of x: vectors of 16 columns of y.
//
// Dot products along K (dot_linear.h) read each vector of x and of W whole. With many rows of x it pays to lay both
// across instead, in units of u elements, 4 bytes: 32 rows of W as [K / u][32][u], and 12 rows of x as [K / u][12][u].
// A step then takes two vectors of W and one unit of each row of x, which fills a vector by broadcast: less than half
// of the bytes from cache for the same products, and all in the order in which they lie.
//
//     x              packed before, once, by all threads (`pack`): tiles of 12 rows, which with 32 columns of y fill
//                    24 accumulators
//     W              a panel of 32 rows at a time, laid across piece by piece of K into scratch, where it stays in L2
//                    while all tiles pass by
//
// Groups of columns with scales of their own are tiles of their own, whose sums are added under the group's scale.
//
// A `Unit` is the product of one instruction (see avx512.cpp):
//     X, Sum      element types of x and of the sums
//     kOffset     what was added to every code of W, to be taken off again: offset * (sum of x's row)
//     kElements   in a unit
//     kManyRows   of x, from which outer products are faster than dot products
//     load_x      16 units of a row of x: whole, or their first `count` elements with zeros behind
//     load_w      the same of a row of W, as the product wants them
//     product     sums + unit of x * unit of W
//     sum_x       the sum of a row of x (only where there is an offset)
//     kGroups     whether groups of columns may have scales of their own (fp32 sums only), and then
//     kManyRowsOfGroups   in their place: fewer, as dot products need two accumulators there for each sum
#pragma once

namespace octavo {
namespace {

constexpr int kTileRows = kPackedRows;
constexpr int64_t kUnitBytes = 4;

// What a tile reads: rows of x, and 32 rows of W laid across, over `whole` units of K and one of `left` bytes if that
// is not 0. `next`: codes that later panels need, fetched from memory meanwhile, 32 rows times a unit for each step; or
// null.
struct OuterOperands {
  const char* x;
  int64_t row, unit;  // bytes from one row of x to the next, and from one of its units to the next
  const char* panel;
  int64_t whole, left;
  const int8_t* next;
};

// acc += x[MR, a unit] panel[a unit]. p: every third row of x; `bytes`: of the unit that are there.
template <class Unit, int MR>
OCTAVO_INLINE void outer_step(__m512i (&acc)[MR][2], const char* const (&p)[(MR + 2) / 3], int64_t row,
                              const char* panel, size_t bytes) {
  const __m512i w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + 64);
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++) {
    int unit = 0;
    memcpy(&unit, p[i / 3] + i % 3 * row, bytes);
    const __m512i a = _mm512_set1_epi32(unit);
    acc[i][0] = Unit::product(acc[i][0], a, w0);
    acc[i][1] = Unit::product(acc[i][1], a, w1);
  }
}

OCTAVO_INLINE void store_scaled(float* sums, __m512 partial, __m512 scale, bool add) {
  const __m512 v = _mm512_mul_ps(partial, scale);
  _mm512_storeu_ps(sums, add ? _mm512_add_ps(v, _mm512_loadu_ps(sums)) : v);
}

// sums[MR][kBlockN] += x[MR, units] panel[units], or = if not `add`. `Scaled`: what is added is under scale[kBlockN].
template <class Unit, int MR, bool Ahead, bool Scaled>
__attribute__((noinline)) void outer_tile(const OuterOperands& in, typename Unit::Sum* sums, bool add,
                                          const float* scale) {
  __m512i acc[MR][2];
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++) {
    acc[i][0] = add && !Scaled ? _mm512_loadu_si512(sums + i * kBlockN) : _mm512_setzero_si512();
    acc[i][1] = add && !Scaled ? _mm512_loadu_si512(sums + i * kBlockN + 16) : _mm512_setzero_si512();
  }
  const int64_t row = in.row, unit = in.unit;
  const char* p[(MR + 2) / 3];
#pragma GCC unroll 4
  for (int j = 0; j < (MR + 2) / 3; j++) p[j] = in.x + 3 * j * row;
  const char* panel = in.panel;
  const int8_t* next = in.next;
  constexpr int64_t kCodes = kBlockN * Unit::kElements;  // of W in a step
  for (int64_t steps = in.whole; steps > 0; steps--, panel += 128) {
    if constexpr (Ahead) {
#pragma GCC unroll 2
      for (int64_t line = 0; line < kCodes; line += 64) __builtin_prefetch(next + line, 0, kIntoL2);
      next += kCodes;
    }
    outer_step<Unit, MR>(acc, p, row, panel, kUnitBytes);
#pragma GCC unroll 4
    for (int j = 0; j < (MR + 2) / 3; j++) p[j] += unit;
  }
  if (in.left) outer_step<Unit, MR>(acc, p, row, panel, in.left);
  if constexpr (Scaled) {
    // Else the compiler prefers registers for what follows, and copies or spills each at every step above.
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) __asm__("" : "+v"(acc[i][0]), "+v"(acc[i][1]));
    const __m512 scale0 = _mm512_loadu_ps(scale), scale1 = _mm512_loadu_ps(scale + 16);
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) {
      store_scaled(sums + i * kBlockN, _mm512_castsi512_ps(acc[i][0]), scale0, add);
      store_scaled(sums + i * kBlockN + 16, _mm512_castsi512_ps(acc[i][1]), scale1, add);
    }
  } else {
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) {
      _mm512_storeu_si512(sums + i * kBlockN, acc[i][0]);
      _mm512_storeu_si512(sums + i * kBlockN + 16, acc[i][1]);
    }
  }
}

// A tile of `rows` rows, 1 to MR.
template <class Unit, bool Scaled = false, int MR = kTileRows>
OCTAVO_INLINE void outer_tile_of(int64_t rows, const OuterOperands& in, typename Unit::Sum* sums, bool add,
                                 const float* scale = nullptr) {
  if constexpr (MR > 1) {
    if (rows < MR) return outer_tile_of<Unit, Scaled, MR - 1>(rows, in, sums, add, scale);
  }
  if (in.next)
    outer_tile<Unit, MR, true, Scaled>(in, sums, add, scale);
  else
    outer_tile<Unit, MR, false, Scaled>(in, sums, add, scale);
}

// 16 rows of 16 units, `load(row)` -> `count` units of `kRows` rows, `unit` bytes from one to the next.
template <int kRows, class Load>
OCTAVO_INLINE void lay_units(const Load& load, int64_t count, char* to, int64_t unit) {
  __m512i r[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++) r[j] = load(j);
  transpose(r);
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++)
    if (j < count) _mm512_mask_storeu_epi32(to + unit * j, static_cast<__mmask16>((1 << kRows) - 1), r[j]);
}

// Up to 32 rows over `length` elements -> panel. What the missing rows would be is zeros. `load(row, k)`: 16 units of
// it from element k on; `load(row, k, count)` its first `count` elements.
template <class Unit, class Load>
OCTAVO_INLINE void lay_across(const Load& load, int64_t rows, int64_t length, char* panel) {
  constexpr int64_t kVector = 16 * Unit::kElements;
  for (int64_t k = 0; k < length; k += kVector, panel += 16 * 128) {
    const int count = static_cast<int>(min64(kVector, length - k));
    for (int half = 0; half < 2; half++) {
      const auto row = [&](int j) {
        const int64_t n = 16 * half + j;
        return n >= rows ? _mm512_setzero_si512() : count == kVector ? load(n, k) : load(n, k, count);
      };
      lay_units<16>(row, ceil_div(count, Unit::kElements), panel + 64 * half, 128);
    }
  }
}

// Rows of codes, `step` from one to the next.
template <class Unit>
void lay_codes_across(const int8_t* codes, int64_t step, int64_t rows, int64_t length, char* panel) {
  const auto load = [&](int64_t n, int64_t k, auto... count) { return Unit::load_w(codes + n * step + k, count...); };
  lay_across<Unit>(load, rows, length, panel);
}

template <class V, class Unit>
struct OuterLinear {
  using X = typename Unit::X;
  static constexpr int64_t kPanelSteps = 512;  // units of K at a time: 64 KB of a panel
  static constexpr int64_t kPanelK = kPanelSteps * Unit::kElements;
  static constexpr int64_t kTiles = kRowsAtOnce / kTileRows;  // of x, whose sums wait in scratch
  static constexpr int64_t kGroupSteps = 8;                   // of a group, at least: smaller ones are not served
  static constexpr int64_t kGroups = kPanelSteps / kGroupSteps + 1;  // in a panel: one may have begun before it

  struct Scratch {
    alignas(64) typename Unit::Sum sums[kTiles * kTileRows * kBlockN];
    alignas(64) char panel[kPanelSteps * 128];
    float scales[kGroups][kBlockN];
  };

  // What is left to dot products: few rows, and groups that are small or cut a unit.
  static size_t scratch_bytes(const Linear&) { return sizeof(Scratch); }

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
      constexpr int64_t kVector = 16 * Unit::kElements;
      for (int64_t k = 0; k < layer.K; k += kVector, to += 16 * kTileRows * kUnitBytes) {
        const int count = static_cast<int>(min64(kVector, layer.K - k));
        const auto load = [&](int j) {
          if (j >= rows) return _mm512_setzero_si512();
          const X* x = x_row(layer, m + j) + k;
          return count == kVector ? Unit::load_x(x) : Unit::load_x(x, count);
        };
        lay_units<kTileRows>(load, ceil_div(count, Unit::kElements), to, kTileRows * kUnitBytes);
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

  // A tile of x: its units, and by how much an offset of W's codes makes the sums of its rows too large.
  static int64_t tile_bytes(const Linear& layer) {
    return ceil_div(ceil_div(layer.K, Unit::kElements) * kTileRows * kUnitBytes, 64) * 64 + 64;
  }
  static char* tile_of(const Linear& layer, int64_t m) { return layer.packed + m / kTileRows * tile_bytes(layer); }
  static int32_t* excess_at(const Linear& layer, int64_t m) {
    return reinterpret_cast<int32_t*>(tile_of(layer, m) + tile_bytes(layer) - 64);
  }

  // The sums of `part` over columns [k, k + length) of W; and what is then done with each tile.
  template <class Then>
  static void products(const Linear& layer, Block part, int64_t k, int64_t length, Scratch& scratch, const Then& then) {
    lay_codes_across<Unit>(layer.codes() + part.n0 * layer.K + k, layer.K, part.n1 - part.n0, length, scratch.panel);
    if (layer.groups > 1) lay_scales_across(layer, part, k, length, scratch.scales);
    for (int64_t m = part.m0; m < part.m1; m += kTileRows) {
      const OuterOperands in{tile_of(layer, m) + k / Unit::kElements * kTileRows * kUnitBytes,
                             kUnitBytes,
                             kTileRows * kUnitBytes,
                             scratch.panel,
                             ceil_div(length, Unit::kElements),
                             0,
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

  // The scales of the groups that have columns in the panel.
  static void lay_scales_across(const Linear& layer, Block part, int64_t k, int64_t length, float (*scales)[kBlockN]) {
    const int64_t first = k / group_size(layer), end = ceil_div(k + length, group_size(layer));
    for (int64_t n = part.n0; n < part.n1; n++)
      for (int64_t g = first; g < end; g++) scales[g - first][n - part.n0] = layer.w_scale[n * layer.groups + g];
  }

  // A tile for each of these groups.
  static void grouped_tile(const Linear& layer, int64_t k, int64_t length, int64_t rows, OuterOperands in,
                           typename Unit::Sum* sums, const float (*scale)[kBlockN]) {
    const int64_t size = group_size(layer);
    for (int64_t begin = k, end; begin < k + length; begin = end, scale++) {
      end = min64((begin / size + 1) * size, k + length);
      in.whole = (end - begin) / Unit::kElements;
      outer_tile_of<Unit, true>(rows, in, sums, begin > 0, *scale);
      in.x += in.whole * in.unit;
      in.panel += in.whole * 128;
      if (in.next) in.next += kBlockN * (end - begin);
    }
  }

  // The sums of a tile of `part` -> y, from row m0 on: a block may begin inside of a tile.
  static void store(const Linear& layer, Block part, int64_t m, int64_t m0, const Scratch& scratch) {
    const int64_t from = max64(m, m0);
    finish<V>(layer, {from, min64(m + kTileRows, part.m1), part.n0, part.n1}, scratch.sums + (from - part.m0) * kBlockN,
              excess_at(layer, m) + (from - m));
  }
};

}  // namespace
}  // namespace octavo
