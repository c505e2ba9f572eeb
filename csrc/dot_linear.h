// y = x W^T by dot products along K, for any vector length.
//
// Both operands are read along K, as they lie in memory: nothing is transposed, and a weight is never repacked. A
// register tile is up to kTileM rows of x times kTileN rows of W; each of its sums is a vector, added up across its
// lanes once, when K is done.
//
//     few rows of x     a weight is widened in registers, anew for each tile of rows (`Direct`)
//     many rows of x    kBlockN rows of W are widened once, piece by piece of K, into scratch in L2; every row of x
//                       then meets them, a tile of which stays in L1 meanwhile (`Packed`)
//
// `Direct` and `Packed` are dot products of one instruction set (see avx512.cpp):
//     X, W, Sum         element types of x, of W as the dot reads it, and of the sums (float or int32)
//     XV, WV, Acc       a step's operands, and an accumulator, in registers
//     kStep             elements of K per step
//     kTileM            rows of x in a register tile
//     kFewRows          rows of x up to which widening W for each tile is cheaper than once (Direct, beside Packed)
//     kOffset           what was added to every code of W: the sums are too large by kOffset * (sum of x's row)
//     load_x, load_w    a step's operand: whole, or its first `count` elements with zeros behind
//     zero, dot         an accumulator, and one step added to it
//     kGroups           whether groups of columns may have scales of their own, and then
//     scaled_add        total + partial * scale
//     store4            four accumulators, each added up across its lanes, stored or added to 4 sums
//     pack              int8 codes -> W (Packed only)
//     sum_x             the sum of a row of x (only where there is an offset)
//
// Included by a translation unit after its target pragma: all of this is compiled for that instruction set.
#pragma once

namespace octavo {
namespace {

constexpr int kTileN = 4;
constexpr int64_t kBlockN = 32;        // columns of y whose sums wait in scratch until all of K is done
constexpr int64_t kBlockM = 512;       // and rows, at most
constexpr int64_t kPieceBytes = 4096;  // of a widened row of W: a tile's rows of x stay in L1 meanwhile

constexpr int64_t kFetchAhead = 4096;  // codes by which a tile's fetching is ahead of the next tile

constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#define OCTAVO_INLINE inline __attribute__((always_inline))

// While a tile is computed, kTileN * K codes that will be needed are fetched from memory, in the order in which they
// lie there: soon, by the next tile, or later, by the next block of columns.
enum class Fetch { nothing, soon, later };

// What a tile reads: rows of x, `ldx` elements apart, and kTileN rows of W, over K elements. `next`: what to fetch.
template <class Dot>
struct Operands {
  const typename Dot::X* x;
  int64_t ldx;
  const typename Dot::W* w[kTileN];
  int64_t K;
  const int8_t* next;
};

// The scales of groups of `size` columns, for kTileN rows of W; `first`: the column of the row with which the tile
// begins.
struct Groups {
  int64_t size;
  int64_t first;
  const float* scale[kTileN];
};

// acc += x[MR, a step from k] W[kTileN, the same]^T. `count`: how many elements of the step are there, or none: all.
template <class Dot, int MR, class... Count>
OCTAVO_INLINE void step(typename Dot::Acc (&acc)[MR][kTileN], const Operands<Dot>& in, int64_t k, Count... count) {
  const typename Dot::WV b0 = Dot::load_w(in.w[0] + k, count...), b1 = Dot::load_w(in.w[1] + k, count...),
                         b2 = Dot::load_w(in.w[2] + k, count...), b3 = Dot::load_w(in.w[3] + k, count...);
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
    const typename Dot::XV a = Dot::load_x(in.x + i * in.ldx + k, count...);
    acc[i][0] = Dot::dot(acc[i][0], a, b0);
    acc[i][1] = Dot::dot(acc[i][1], a, b1);
    acc[i][2] = Dot::dot(acc[i][2], a, b2);
    acc[i][3] = Dot::dot(acc[i][3], a, b3);
  }
}

// acc += x[MR, k0:k1] W[kTileN, k0:k1]^T
template <class Dot, int MR, Fetch Ahead>
OCTAVO_INLINE void accumulate(typename Dot::Acc (&acc)[MR][kTileN], const Operands<Dot>& operands, int64_t k0,
                              int64_t k1) {
  const Operands<Dot> in = operands;  // a copy, whose pointers stay in registers
  int64_t k = k0;
  for (; k + Dot::kStep <= k1; k += Dot::kStep) {
    if (Ahead != Fetch::nothing) {
#pragma GCC unroll 4
      for (int line = 0; line < kTileN * Dot::kStep; line += 64)
        __builtin_prefetch(in.next + kTileN * k + line, 0, Ahead == Fetch::soon ? 0 : 2);
    }
    step<Dot, MR>(acc, in, k);
  }
  if (k < k1) step<Dot, MR>(acc, in, k, static_cast<int>(k1 - k));
}

template <class Dot, int MR>
OCTAVO_INLINE void zero(typename Dot::Acc (&acc)[MR][kTileN]) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = Dot::zero();
}

template <class Dot, int MR>
OCTAVO_INLINE void store(const typename Dot::Acc (&acc)[MR][kTileN], typename Dot::Sum* sums, bool add) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) Dot::store4(acc[i][0], acc[i][1], acc[i][2], acc[i][3], sums + i * kBlockN, add);
}

// A register tile: sums[MR][kTileN], rows kBlockN apart. `add`: to the sums that are there.
template <class Dot, int MR, Fetch Ahead>
__attribute__((noinline)) void tile(const Operands<Dot>& in, typename Dot::Sum* sums, bool add) {
  typename Dot::Acc acc[MR][kTileN];
  zero<Dot, MR>(acc);
  accumulate<Dot, MR, Ahead>(acc, in, 0, in.K);
  store<Dot, MR>(acc, sums, add);
}

// The same, each group's sum under its scale.
template <class Dot, int MR, Fetch Ahead>
__attribute__((noinline)) void grouped_tile(const Operands<Dot>& in, const Groups& groups, typename Dot::Sum* sums,
                                            bool add) {
  typename Dot::Acc total[MR][kTileN];
  zero<Dot, MR>(total);
  for (int64_t k = 0; k < in.K;) {
    const int64_t group = (groups.first + k) / groups.size;
    const int64_t end = min64((group + 1) * groups.size - groups.first, in.K);
    typename Dot::Acc acc[MR][kTileN];
    zero<Dot, MR>(acc);
    accumulate<Dot, MR, Ahead>(acc, in, k, end);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      total[i][0] = Dot::scaled_add(total[i][0], acc[i][0], groups.scale[0][group]);
      total[i][1] = Dot::scaled_add(total[i][1], acc[i][1], groups.scale[1][group]);
      total[i][2] = Dot::scaled_add(total[i][2], acc[i][2], groups.scale[2][group]);
      total[i][3] = Dot::scaled_add(total[i][3], acc[i][3], groups.scale[3][group]);
    }
    k = end;
  }
  store<Dot, MR>(total, sums, add);
}

// A tile of `rows` rows, 1 to MR.
template <class Dot, bool Grouped, Fetch Ahead, int MR>
OCTAVO_INLINE void tile_of(int64_t rows, const Operands<Dot>& in, const Groups& groups, typename Dot::Sum* sums,
                           bool add) {
  if constexpr (MR > 1) {
    if (rows < MR) return tile_of<Dot, Grouped, Ahead, MR - 1>(rows, in, groups, sums, add);
  }
  if constexpr (Grouped)
    grouped_tile<Dot, MR, Ahead>(in, groups, sums, add);
  else
    tile<Dot, MR, Ahead>(in, sums, add);
}

// Half as many rows where there are two accumulators for each sum.
template <class Dot, bool Grouped>
constexpr int tile_m() {
  return Grouped ? (Dot::kTileM + 1) / 2 : Dot::kTileM;
}

template <class Packed>
struct Scratch {
  typename Packed::Sum sums[kBlockM * kBlockN];
  int32_t excess[kBlockM];
  // Rows end at odd multiples of a cache line, so that they do not all fall into the same sets of the cache.
  alignas(64) typename Packed::W rows[kBlockN][(kPieceBytes + 64) / sizeof(typename Packed::W)];
};

// Sums -> y[m, n : n + count]. Those of groups are under their scales already.
template <class V>
OCTAVO_INLINE void store_y(const Linear& layer, int64_t m, int64_t n, int count, typename V::F y) {
  const float x_scale = layer.x_scale ? layer.x_scale[m * layer.x_scale_step] : 1.0f;
  if (layer.groups == 1) y = V::mul(y, V::mul(V::set1(x_scale), V::load(layer.w_scale + n, Float::f32, count)));
  if (layer.bias) y = V::add(y, V::load(element(layer.bias, layer.bias_type, n), layer.bias_type, count));
  V::store(element(layer.y, layer.y_type, m * layer.N + n), layer.y_type, count, y);
}

// The sums of a block -> y. They are `excess[row]` too large.
template <class V, class Sum>
void finish(const Linear& layer, Block part, const Sum* sums, const int32_t* excess) {
  for (int64_t m = part.m0; m < part.m1; m++, sums += kBlockN, excess++) {
    for (int64_t n = part.n0; n < part.n1; n += V::kLanes) {
      const int count = static_cast<int>(min64(V::kLanes, part.n1 - n));
      store_y<V>(layer, m, n, count, V::from_sums(sums + (n - part.n0), *excess));
    }
  }
}

// By how much an offset of W's codes makes the sums of a row of x too large.
template <class Dot>
OCTAVO_INLINE int32_t excess_of(const typename Dot::X* x, int64_t K) {
  if constexpr (Dot::kOffset != 0)
    return Dot::kOffset * Dot::sum_x(x, K);
  else
    return 0;
}

// `Packed` may be `Direct`, where nothing is gained by widening once, or many rows of x are somebody else's.
template <class V, class Direct, class Packed = Direct>
struct DotLinear {
  using X = typename Packed::X;
  using Sum = typename Packed::Sum;
  static constexpr int64_t kPiece = kPieceBytes / static_cast<int64_t>(sizeof(typename Packed::W));

  static size_t scratch_bytes(const Linear&) { return sizeof(Scratch<Packed>); }

  static void run(const Linear& layer, Block block, void* memory) {
    auto& scratch = *static_cast<Scratch<Packed>*>(memory);
    const bool grouped = Packed::kGroups && layer.groups > 1;
    for (int64_t m = block.m0; m < block.m1; m += kBlockM) {
      const int64_t rows = min64(kBlockM, block.m1 - m);
      for (int64_t i = 0; i < rows; i++) scratch.excess[i] = excess_of<Packed>(x_row(layer, m + i), layer.K);
      for (int64_t n = block.n0; n < block.n1; n += kBlockN) {
        const Block part{m, m + rows, n, min64(n + kBlockN, block.n1)};
        if (!many(rows))
          grouped ? few_rows<Direct::kGroups>(layer, part, scratch) : few_rows<false>(layer, part, scratch);
        else if constexpr (!std::is_same_v<Direct, Packed>)
          grouped ? many_rows<Packed::kGroups>(layer, part, scratch) : many_rows<false>(layer, part, scratch);
        finish<V>(layer, part, scratch.sums, scratch.excess);
      }
    }
  }

 private:
  static const X* x_row(const Linear& layer, int64_t m) { return static_cast<const X*>(layer.x) + m * layer.K; }

  static bool many(int64_t rows) {
    if constexpr (std::is_same_v<Direct, Packed>)
      return false;
    else
      return rows > Direct::kFewRows;
  }

  // Row j of the tile that begins at row n of W. Past the last row the last is met again; its sums are not used.
  static int64_t w_row(int64_t n, int j, int64_t end) { return min64(n + j, end - 1); }

  static Groups groups_of(const Linear& layer, int64_t n, int64_t end, int64_t first) {
    Groups groups{layer.K / layer.groups, first, {}};
    for (int j = 0; j < kTileN; j++) groups.scale[j] = layer.w_scale + w_row(n, j, end) * layer.groups;
    return groups;
  }

  template <bool Grouped>
  static void few_rows(const Linear& layer, Block part, Scratch<Packed>& scratch) {
    constexpr int kTileM = tile_m<Direct, Grouped>();
    const int64_t rows = part.m1 - part.m0;
    const int64_t height = ceil_div(rows, ceil_div(rows, kTileM));
    for (int64_t n = part.n0; n < part.n1; n += kTileN) {
      Operands<Direct> in{nullptr, layer.K, {}, layer.K, nullptr};
      for (int j = 0; j < kTileN; j++) in.w[j] = layer.w + w_row(n, j, part.n1) * layer.K;
      in.next = layer.w + (n + kTileN) * layer.K + kFetchAhead;
      const Groups groups = groups_of(layer, n, part.n1, 0);
      for (int64_t i = 0; i < rows; i += height) {
        in.x = x_row(layer, part.m0 + i);
        tile_of<Direct, Grouped, Fetch::soon, kTileM>(min64(height, rows - i), in, groups,
                                                      scratch.sums + i * kBlockN + (n - part.n0), false);
      }
    }
  }

  template <bool Grouped>
  static void many_rows(const Linear& layer, Block part, Scratch<Packed>& scratch) {
    constexpr int kTileM = tile_m<Packed, Grouped>();
    const int64_t rows = part.m1 - part.m0;
    const int64_t height = ceil_div(rows, ceil_div(rows, kTileM));  // tiles of about equal height
    for (int64_t k = 0; k < layer.K || k == 0; k += kPiece) {
      const int64_t length = min64(kPiece, layer.K - k);
      for (int64_t n = part.n0; n < part.n1; n++)
        Packed::pack(layer.w + n * layer.K + k, length, scratch.rows[n - part.n0]);
      // Of a tile's two sides the one with more bytes stays in L1 and meets all of the other, which comes from L2.
      if constexpr (kTileM * sizeof(X) >= kTileN * sizeof(typename Packed::W)) {
        for (int64_t i = 0; i < rows; i += height)
          for (int64_t n = part.n0; n < part.n1; n += kTileN)
            packed_tile<Grouped>(layer, part, scratch, k, length, i, min64(height, rows - i), n);
      } else {
        for (int64_t n = part.n0; n < part.n1; n += kTileN)
          for (int64_t i = 0; i < rows; i += height)
            packed_tile<Grouped>(layer, part, scratch, k, length, i, min64(height, rows - i), n);
      }
    }
  }

  // Rows [i, i + height) of the part, columns from n on, over [k, k + length).
  template <bool Grouped>
  static void packed_tile(const Linear& layer, Block part, Scratch<Packed>& scratch, int64_t k, int64_t length,
                          int64_t i, int64_t height, int64_t n) {
    constexpr int kTileM = tile_m<Packed, Grouped>();
    Operands<Packed> in{x_row(layer, part.m0 + i) + k, layer.K, {}, length, nullptr};
    for (int j = 0; j < kTileN; j++) in.w[j] = scratch.rows[w_row(n, j, part.n1) - part.n0];
    in.next = layer.w + (n + kBlockN) * layer.K + kTileN * k;
    const Groups groups = groups_of(layer, n, part.n1, k);
    Sum* const sums = scratch.sums + i * kBlockN + (n - part.n0);
    if (i == 0)
      tile_of<Packed, Grouped, Fetch::later, kTileM>(height, in, groups, sums, k > 0);
    else
      tile_of<Packed, Grouped, Fetch::nothing, kTileM>(height, in, groups, sums, k > 0);
  }
};

template <class Layer>
constexpr LinearKernels linear_kernels{Layer::scratch_bytes, Layer::run};

}  // namespace
}  // namespace octavo
