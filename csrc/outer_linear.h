// y = x W^T by outer products, for many rows of x: vectors of 16 columns of y.
//
// Dot products along K (dot_linear.h) read each vector of x and of W whole. With many rows of x it pays to lay 32 rows
// of W across instead, once for all rows of x: [K / u][32 rows of W][u] for units of u elements, 4 bytes. A step then
// takes two vectors of W and one unit of each row of x, which fills a vector by broadcast: less than half of the bytes
// from cache for the same products.
//
//     columns of y   32 at a time: two vectors
//     rows of y      up to kTileRows at a time: 24 accumulators
//     K              in pieces, so that a tile's rows of x stay in L1 and the panel of W in L2
//
// Groups of columns with scales of their own are tiles of their own, whose sums are added under the group's scale.
//
// A `Unit` is the product of one instruction (see avx512.cpp):
//     X, Sum      element types of x and of the sums
//     kOffset     what was added to every code of W, to be taken off again: offset * (sum of x's row)
//     kElements   in a unit
//     kManyRows   of x, from which outer products are faster than dot products
//     load_w      64 bytes of a row of W as the product wants them: whole, or the first `count` elements with zeros
//                 behind
//     product     sums + unit of x * unit of W
//     sum_x       the sum of a row of x (only where there is an offset)
//     kGroups     whether groups of columns may have scales of their own (fp32 sums only), and then
//     kManyRowsOfGroups   in their place: fewer, as dot products need two accumulators there for each sum
#pragma once

namespace octavo {
namespace {

constexpr int kTileRows = 12;
constexpr int64_t kPanelSteps = 512;  // units of K at a time: 2 KB of a row of x, 64 KB of W
constexpr int64_t kGroupSteps = 8;    // units of a group of columns, at least: smaller ones are left to dot products
constexpr int64_t kPanelGroups = kPanelSteps / kGroupSteps + 1;  // one of them may have begun in the panel before

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

// What a tile reads: rows of x, `ldx` elements apart, and 32 rows of W laid across, over `whole` units of K and one of
// `left` elements if that is not 0. `next`: codes that later panels need, fetched from memory meanwhile, 32 rows times
// a unit for each step; or null.
template <class Unit>
struct OuterOperands {
  const typename Unit::X* x;
  int64_t ldx;
  const char* panel;
  int64_t whole;
  int left;
  const int8_t* next;
};

OCTAVO_INLINE void store_scaled(float* sums, __m512 partial, __m512 scale, bool add) {
  const __m512 v = _mm512_mul_ps(partial, scale);
  _mm512_storeu_ps(sums, add ? _mm512_add_ps(v, _mm512_loadu_ps(sums)) : v);
}

// sums[MR][kBlockN] += x[MR, units] panel[units], or = if not `add`. `Scaled`: what is added is under scale[kBlockN].
template <class Unit, int MR, bool Ahead, bool Scaled>
__attribute__((noinline)) void outer_tile(const OuterOperands<Unit>& in, typename Unit::Sum* sums, bool add,
                                          const float* scale) {
  __m512i acc[MR][2];
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++) {
    acc[i][0] = add && !Scaled ? _mm512_loadu_si512(sums + i * kBlockN) : _mm512_setzero_si512();
    acc[i][1] = add && !Scaled ? _mm512_loadu_si512(sums + i * kBlockN + 16) : _mm512_setzero_si512();
  }
  const int64_t row = in.ldx * static_cast<int64_t>(sizeof(typename Unit::X));
  const char* p[(MR + 2) / 3];
#pragma GCC unroll 4
  for (int j = 0; j < (MR + 2) / 3; j++) p[j] = reinterpret_cast<const char*>(in.x) + 3 * j * row;
  const char* panel = in.panel;
  const int8_t* next = in.next;
  for (int64_t left = in.whole; left > 0; left--, panel += 128) {
    if constexpr (Ahead) {
#pragma GCC unroll 2
      for (int line = 0; line < kBlockN * Unit::kElements; line += 64) __builtin_prefetch(next + line, 0, 2);
      next += kBlockN * Unit::kElements;
    }
    outer_step<Unit, MR>(acc, p, row, panel, sizeof(int));
#pragma GCC unroll 4
    for (int j = 0; j < (MR + 2) / 3; j++) p[j] += 4;
  }
  if (in.left) outer_step<Unit, MR>(acc, p, row, panel, in.left * sizeof(typename Unit::X));
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
template <class Unit, int MR, bool Scaled = false>
OCTAVO_INLINE void outer_tile_of(int64_t rows, const OuterOperands<Unit>& in, typename Unit::Sum* sums, bool add,
                                 const float* scale = nullptr) {
  if constexpr (MR > 1) {
    if (rows < MR) return outer_tile_of<Unit, MR - 1, Scaled>(rows, in, sums, add, scale);
  }
  if (in.next)
    outer_tile<Unit, MR, true, Scaled>(in, sums, add, scale);
  else
    outer_tile<Unit, MR, false, Scaled>(in, sums, add, scale);
}

// Up to 32 rows of W, `ldw` codes apart, over `length` elements -> panel. What the missing rows would be is zeros.
template <class Unit>
void lay_across(const int8_t* w, int64_t ldw, int64_t rows, int64_t length, char* panel) {
  constexpr int64_t kVector = 16 * Unit::kElements;
  for (int64_t done = 0; done < length; done += kVector) {
    const int count = static_cast<int>(min64(kVector, length - done));
    for (int half = 0; half < 2; half++) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++) {
        const int64_t n = 16 * half + j;
        const int8_t* codes = w + n * ldw + done;
        r[j] = n >= rows ? _mm512_setzero_si512() : count == kVector ? Unit::load_w(codes) : Unit::load_w(codes, count);
      }
      transpose(r);
      char* to = panel + done / Unit::kElements * 128 + 64 * half;
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++)
        if (j * Unit::kElements < count) _mm512_store_si512(to + 128 * j, r[j]);
    }
  }
}

template <class V, class Unit>
struct OuterLinear {
  using X = typename Unit::X;

  struct Scratch {
    alignas(64) typename Unit::Sum sums[kBlockM * kBlockN];
    int32_t excess[kBlockM];
    alignas(64) char panel[kPanelSteps * 128];
    float scales[kPanelGroups][kBlockN];
  };

  // Whether it serves a block: what is left are few rows, and groups that are small or cut a unit.
  static bool takes(const Linear& layer, Block block) {
    const int64_t rows = block.m1 - block.m0;
    if (layer.groups == 1) return rows >= Unit::kManyRows;
    if constexpr (Unit::kGroups) {
      const int64_t size = group_size(layer);
      return rows >= Unit::kManyRowsOfGroups && size >= kGroupSteps * Unit::kElements && size % Unit::kElements == 0;
    }
    return false;
  }

  static void run(const Linear& layer, Block block, void* memory) {
    auto& scratch = *static_cast<Scratch*>(memory);
    for (int64_t m = block.m0; m < block.m1; m += kBlockM) {
      const int64_t rows = min64(kBlockM, block.m1 - m);
      for (int64_t i = 0; i < rows; i++) scratch.excess[i] = excess_of<Unit>(x_row(layer, m + i), layer.K);
      for (int64_t n = block.n0; n < block.n1; n += kBlockN) {
        const Block part{m, m + rows, n, min64(n + kBlockN, block.n1)};
        for (int64_t k = 0; k < layer.K || k == 0; k += kPanelSteps * Unit::kElements)
          products(layer, part, k, min64(kPanelSteps * Unit::kElements, layer.K - k), scratch);
        finish<V>(layer, part, scratch.sums, scratch.excess);
      }
    }
  }

 private:
  static const X* x_row(const Linear& layer, int64_t m) { return static_cast<const X*>(layer.x) + m * layer.K; }
  static int64_t group_size(const Linear& layer) { return layer.K / layer.groups; }

  // Sums over columns [k, k + length), a panel.
  static void products(const Linear& layer, Block part, int64_t k, int64_t length, Scratch& scratch) {
    lay_across<Unit>(layer.w + part.n0 * layer.K + k, layer.K, part.n1 - part.n0, length, scratch.panel);
    if (layer.groups > 1) lay_scales_across(layer, part, k, length, scratch.scales);
    const int64_t rows = part.m1 - part.m0, height = ceil_div(rows, ceil_div(rows, kTileRows));
    for (int64_t i = 0; i < rows; i += height) {
      const OuterOperands<Unit> in{x_row(layer, part.m0 + i) + k,
                                   layer.K,
                                   scratch.panel,
                                   length / Unit::kElements,
                                   static_cast<int>(length % Unit::kElements),
                                   i == 0 ? layer.w + part.n1 * layer.K + kBlockN * k : nullptr};
      auto* const sums = scratch.sums + i * kBlockN;
      if constexpr (Unit::kGroups) {
        if (layer.groups > 1) {
          grouped_tile(layer, k, length, min64(height, rows - i), in, sums, scratch.scales);
          continue;
        }
      }
      outer_tile_of<Unit, kTileRows>(min64(height, rows - i), in, sums, k > 0);
    }
  }

  // The scales of the groups that have columns in the panel.
  static void lay_scales_across(const Linear& layer, Block part, int64_t k, int64_t length, float (*scales)[kBlockN]) {
    const int64_t first = k / group_size(layer), end = ceil_div(k + length, group_size(layer));
    for (int64_t n = part.n0; n < part.n1; n++)
      for (int64_t g = first; g < end; g++) scales[g - first][n - part.n0] = layer.w_scale[n * layer.groups + g];
  }

  // A tile for each of these groups.
  static void grouped_tile(const Linear& layer, int64_t k, int64_t length, int64_t rows, OuterOperands<Unit> in,
                           typename Unit::Sum* sums, const float (*scale)[kBlockN]) {
    const int64_t size = group_size(layer);
    for (int64_t begin = k, end; begin < k + length; begin = end, scale++) {
      end = min64((begin / size + 1) * size, k + length);
      in.whole = (end - begin) / Unit::kElements;
      outer_tile_of<Unit, kTileRows, true>(rows, in, sums, begin > 0, *scale);
      in.x += end - begin;
      in.panel += 128 * in.whole;
      if (in.next) in.next += kBlockN * (end - begin);
    }
  }
};

}  // namespace
}  // namespace octavo
