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
// A `Unit` is the product of one instruction (see avx512.cpp):
//     X, Sum      element types of x and of the sums
//     kOffset     what was added to every code of W, to be taken off again: offset * (sum of x's row)
//     kElements   in a unit
//     load_w      64 bytes of a row of W as the product wants them: whole, or the first `count` elements with zeros
//     behind product     sums + unit of x * unit of W sum_x       the sum of a row of x (only where there is an offset)
#pragma once

namespace octavo {
namespace {

constexpr int kTileRows = 12;
constexpr int64_t kPanelSteps = 512;  // units of K at a time: 2 KB of a row of x, 64 KB of W

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

// sums[MR][kBlockN] += x[MR, units] panel[units], or = if not `add`: `whole` units, and one of `left` elements if that
// is not 0. `next`: codes that later panels need, fetched from memory meanwhile, 32 rows times a unit for each step; or
// null.
template <class Unit, int MR, bool Ahead>
__attribute__((noinline)) void outer_tile(const typename Unit::X* x, int64_t ldx, const char* panel, int64_t whole,
                                          int left, typename Unit::Sum* sums, bool add, const int8_t* next) {
  __m512i acc[MR][2];
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++) {
    acc[i][0] = add ? _mm512_loadu_si512(sums + i * kBlockN) : _mm512_setzero_si512();
    acc[i][1] = add ? _mm512_loadu_si512(sums + i * kBlockN + 16) : _mm512_setzero_si512();
  }
  const int64_t row = ldx * static_cast<int64_t>(sizeof(typename Unit::X));
  const char* p[(MR + 2) / 3];
#pragma GCC unroll 4
  for (int j = 0; j < (MR + 2) / 3; j++) p[j] = reinterpret_cast<const char*>(x) + 3 * j * row;
  for (int64_t step = 0; step < whole; step++, panel += 128) {
    if constexpr (Ahead) {
#pragma GCC unroll 2
      for (int line = 0; line < kBlockN * Unit::kElements; line += 64) __builtin_prefetch(next + line, 0, 2);
      next += kBlockN * Unit::kElements;
    }
    outer_step<Unit, MR>(acc, p, row, panel, sizeof(int));
#pragma GCC unroll 4
    for (int j = 0; j < (MR + 2) / 3; j++) p[j] += 4;
  }
  if (left) outer_step<Unit, MR>(acc, p, row, panel, left * sizeof(typename Unit::X));
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++) {
    _mm512_storeu_si512(sums + i * kBlockN, acc[i][0]);
    _mm512_storeu_si512(sums + i * kBlockN + 16, acc[i][1]);
  }
}

// A tile of `rows` rows, 1 to MR.
template <class Unit, int MR>
OCTAVO_INLINE void outer_tile_of(int64_t rows, const typename Unit::X* x, int64_t ldx, const char* panel, int64_t whole,
                                 int left, typename Unit::Sum* sums, bool add, const int8_t* next) {
  if constexpr (MR > 1) {
    if (rows < MR) return outer_tile_of<Unit, MR - 1>(rows, x, ldx, panel, whole, left, sums, add, next);
  }
  if (next)
    outer_tile<Unit, MR, true>(x, ldx, panel, whole, left, sums, add, next);
  else
    outer_tile<Unit, MR, false>(x, ldx, panel, whole, left, sums, add, next);
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
  };

  static void run(const Linear& layer, Block block, void* memory) {
    auto& scratch = *static_cast<Scratch*>(memory);
    for (int64_t m = block.m0; m < block.m1; m += kBlockM) {
      const int64_t rows = min64(kBlockM, block.m1 - m);
      for (int64_t i = 0; i < rows; i++) scratch.excess[i] = excess_of<Unit>(x_row(layer, m + i), layer.K);
      for (int64_t n = block.n0; n < block.n1; n += kBlockN) {
        const Block part{m, m + rows, n, min64(n + kBlockN, block.n1)};
        products(layer, part, scratch);
        finish<V>(layer, part, scratch.sums, scratch.excess);
      }
    }
  }

 private:
  static const X* x_row(const Linear& layer, int64_t m) { return static_cast<const X*>(layer.x) + m * layer.K; }

  static void products(const Linear& layer, Block part, Scratch& scratch) {
    const int64_t rows = part.m1 - part.m0, height = ceil_div(rows, ceil_div(rows, kTileRows));
    for (int64_t k = 0; k < layer.K || k == 0; k += kPanelSteps * Unit::kElements) {
      const int64_t length = min64(kPanelSteps * Unit::kElements, layer.K - k);
      lay_across<Unit>(layer.w + part.n0 * layer.K + k, layer.K, part.n1 - part.n0, length, scratch.panel);
      for (int64_t i = 0; i < rows; i += height)
        outer_tile_of<Unit, kTileRows>(min64(height, rows - i), x_row(layer, part.m0 + i) + k, layer.K, scratch.panel,
                                       length / Unit::kElements, static_cast<int>(length % Unit::kElements),
                                       scratch.sums + i * kBlockN, k > 0,
                                       i == 0 ? layer.w + part.n1 * layer.K + kBlockN * k : nullptr);
    }
  }
};

}  // namespace
}  // namespace octavo
