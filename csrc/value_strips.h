// Rows of weights times values, in place, for few queries, which use each value once. A token's values are a row of
// columns of y: those of kElements tokens are interleaved into units in registers, and a unit of weights is broadcast.
//
// Included by a translation unit after its target pragma, like outer_linear.h, whose units these are, and heads.h.
#pragma once

namespace octavo {
namespace {

// Rows in memory to be prefetched, `step` elements apart.
template <class T>
struct Ahead {
  const T* row;
  int64_t step;
};

// `Unit` is the product of a unit of weights, broadcast, and a vector of units of values. Beyond what linear layers ask
// of it, it has
//     strip       kElements rows of values, the first `count` of kStrip columns -> units, in two vectors. A null row is
//                 zeros
//     in_order    puts two vectors of such columns, or of their sums, into the order of the columns
template <class Unit, class Stored>
struct ValueStrips {
  using V = Vec;
  static constexpr int64_t kUnit = Unit::kElements;

  // Units of weights, rows `ldp` bytes apart, and the values of `tokens`, `ldv` elements apart, with `columns` columns
  // left. `next`: rows of which kStrip columns are prefetched, one row for each token.
  struct Values {
    const char* p;
    int64_t ldp;
    const Stored* v;
    int64_t ldv, tokens, columns;
    Ahead<Stored> next;
  };

  // The products of 1 to kRegisterRows rows -> y [rows][kStrip], rows `ldy` apart.
  template <class Sum, int MR = V::kRegisterRows>
  OCTAVO_INLINE static void sums(int64_t rows, const Values& in, Sum* y, int64_t ldy) {
    if constexpr (MR > 1) {
      if (rows < MR) return sums<Sum, MR - 1>(rows, in, y, ldy);
    }
    in.columns < kStrip ? of_rows<MR, false>(in, y, ldy) : of_rows<MR, true>(in, y, ldy);
  }

 private:
  template <int MR, bool Whole, class Sum>
  __attribute__((noinline)) static void of_rows(const Values& in, Sum* y, int64_t ldy) {
    Vec::I acc[MR][2];
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) acc[i][0] = acc[i][1] = V::zeros();
    const int count = Whole ? kStrip : static_cast<int>(in.columns);
    const int64_t ldp = in.ldp;
    const char* p[(MR + 2) / 3];
#pragma GCC unroll 4
    for (int j = 0; j < (MR + 2) / 3; j++) p[j] = in.p + 3 * j * ldp;
    const Stored *v = in.v, *next = in.next.row;
    const int64_t ldv = in.ldv, step = in.next.step;
    // One unit, in which `there` tokens are left.
    const auto unit = [&](int64_t there) __attribute__((always_inline)) {
      const Stored* rows[kUnit];
#pragma GCC unroll 4
      for (int u = 0; u < kUnit; u++, v += ldv, next += step) {
        rows[u] = u < there ? v : nullptr;
        octavo::fetch(next, kStrip * sizeof(Stored));
      }
      Vec::I w[2];
      Unit::strip(rows, count, w);
#pragma GCC unroll 12
      for (int i = 0; i < MR; i++) {
        int unit;
        memcpy(&unit, p[i / 3] + i % 3 * ldp, sizeof unit);
        const Vec::I e = V::broadcast(unit);
        acc[i][0] = Unit::product(acc[i][0], e, w[0]);
        acc[i][1] = Unit::product(acc[i][1], e, w[1]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < (MR + 2) / 3; j++) p[j] += kUnitBytes;
    };
    int64_t left = in.tokens;
    for (; left >= kUnit; left -= kUnit) unit(kUnit);
    if (left > 0) unit(left);
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) {
      Unit::in_order(acc[i]);
      V::store_units(y + i * ldy, acc[i][0]);
      V::store_units(y + i * ldy + V::kLanes, acc[i][1]);
    }
  }
};

}  // namespace
}  // namespace octavo
