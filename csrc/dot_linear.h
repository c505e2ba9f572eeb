// y = x W^T by dot products along K, for any vector length.
//
//                        4 rows of W
//                       w0  w1  w2  w3
//     a row of x   x0   acc acc acc acc        an accumulator is a vector: kStep elements of both rows are multiplied
//     the next     x1   acc acc acc acc        at a time, and its lanes are added up once, at the end of K
//     ...
//
// Both operands are read along K, in place: nothing is transposed, and a weight is never repacked. A register tile is
// up to kTileM rows of x by kTileN rows of W. The first tile of rows of x widens codes in registers, and keeps them,
// widened, in L1 for the tiles that follow.
//
// A `Dot` is the dot product of one instruction set (see avx512_products.h):
//     X, W, Sum         element types of x, of W as the dot product reads it, and of the sums (float or int32)
//     Stored            element type of W in memory
//     XV, WV, Acc       the operands of a step, and an accumulator, in registers
//     kStep             elements of K in a step
//     kTileM            rows of x in a register tile
//     kOffset           what was added to each code of W: sums are too large by kOffset * (sum of x's row)
//     load_x, load_w    an operand of a step: whole, or its first `count` elements, padded with zeros
//     zero, dot         an empty accumulator, and a step added to one
//     Kept              the same product for what `keep` has stored; `Dot` itself if widening is cheaper than a store
//     kGroups           whether groups along K may have scales of their own; if so:
//     scaled_add        total + partial * scale
//     store4            four accumulators, each added up across its lanes, stored or added to 4 sums
//     sum_x             the sum of a row of x (only if there is an offset)
//
// Included by a translation unit after its target pragma: all of this is compiled for that instruction set.
#pragma once

namespace octavo {
namespace {

constexpr int kTileN = 4;
constexpr int64_t kBlockN = 32;        // columns of y whose sums stay in scratch until all of K is done
constexpr int64_t kBlockM = 36;        // rows of y, at most: so many of x stay in L2 while W is read
constexpr int64_t kPieceBytes = 4096;  // of a row of W that is kept widened: a tile's four rows stay in L1

constexpr int64_t kFetchAhead = 4096;  // bytes by which prefetching is ahead of the next tile
constexpr int kLine = 64;              // bytes of a cache line
constexpr int kShortTile = 4;          // rows of x that are too few to hide the latency of memory
constexpr int kIntoL2 = 2;             // locality for __builtin_prefetch: L1 is full of the tile

constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The same products, with a float W of x's type.
template <class Dot>
struct WithFloats : Dot {
  using Kept = WithFloats;
  using Stored = typename Dot::X;
  using W = Stored;
  static constexpr bool kGroups = false;
  template <class... Count>
  static typename Dot::WV load_w(const W* w, Count... count) {
    return Dot::load_x(w, count...);
  }
};

// The operands of a tile: rows of x, `ldx` elements apart, and kTileN rows of W, over K elements. `kept`: where the
// rows of W are stored once they are widened, if they are to be kept. `next`: kTileN * K codes that will be needed,
// prefetched meanwhile in memory order.
template <class Dot>
struct Operands {
  const typename Dot::X* x;
  int64_t ldx;
  const typename Dot::W* w[kTileN];
  int64_t K;
  typename Dot::Kept::W* kept[kTileN];
  const char* next;
};

// The scales of groups of `size` elements along K, for kTileN rows of W. `first`: the element of the row at which the
// tile begins.
struct Groups {
  int64_t size;
  int64_t first;
  const float* scale[kTileN];
};

// acc += x[MR, a step from k] W[kTileN, the same]^T. `count`: how many elements the step has; all, if it is left out.
template <class Dot, int MR, bool Keep, class... Count>
OCTAVO_INLINE void step(typename Dot::Acc (&acc)[MR][kTileN], const Operands<Dot>& in, int64_t k, Count... count) {
  const typename Dot::WV b0 = Dot::load_w(in.w[0] + k, count...), b1 = Dot::load_w(in.w[1] + k, count...),
                         b2 = Dot::load_w(in.w[2] + k, count...), b3 = Dot::load_w(in.w[3] + k, count...);
  if constexpr (Keep) {
    Dot::keep(in.kept[0] + k, b0), Dot::keep(in.kept[1] + k, b1);
    Dot::keep(in.kept[2] + k, b2), Dot::keep(in.kept[3] + k, b3);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
    const typename Dot::XV a = Dot::load_x(in.x + i * in.ldx + k, count...);
    acc[i][0] = Dot::dot(acc[i][0], a, b0);
    acc[i][1] = Dot::dot(acc[i][1], a, b1);
    acc[i][2] = Dot::dot(acc[i][2], a, b2);
    acc[i][3] = Dot::dot(acc[i][3], a, b3);
  }
}

// Prefetches a line of W. The processor drops requests that come faster than memory answers, as they do if a step takes
// a whole line and multiplies it by few rows. Each line is then requested three times: further ahead, at the usual
// distance, and closer.
template <class Dot, int MR>
OCTAVO_INLINE void fetch(const char* line) {
  constexpr bool often = Dot::kStep * sizeof(typename Dot::Stored) == kLine && MR <= kShortTile;
  if constexpr (often) __builtin_prefetch(line + kFetchAhead, 0, kIntoL2);
  __builtin_prefetch(line, 0, kIntoL2);
  if constexpr (often) __builtin_prefetch(line - kFetchAhead / 2, 0, kIntoL2);
}

// acc += x[MR, k0:k1] W[kTileN, k0:k1]^T
template <class Dot, int MR, bool Keep>
OCTAVO_INLINE void accumulate(typename Dot::Acc (&acc)[MR][kTileN], const Operands<Dot>& operands, int64_t k0,
                              int64_t k1) {
  constexpr int kBytes = sizeof(typename Dot::Stored);
  const Operands<Dot> in = operands;  // a copy, whose pointers stay in registers
  int64_t k = k0;
  for (; k + Dot::kStep <= k1; k += Dot::kStep) {
#pragma GCC unroll 4
    for (int line = 0; line < kTileN * Dot::kStep * kBytes; line += kLine)
      fetch<Dot, MR>(in.next + kTileN * k * kBytes + line);
    step<Dot, MR, Keep>(acc, in, k);
  }
  if (k < k1) step<Dot, MR, Keep>(acc, in, k, static_cast<int>(k1 - k));
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

// A register tile -> sums[MR][kTileN], rows kBlockN apart. `add`: to what is there.
template <class Dot, int MR, bool Keep>
__attribute__((noinline)) void tile(const Operands<Dot>& in, typename Dot::Sum* sums, bool add) {
  typename Dot::Acc acc[MR][kTileN];
  zero<Dot, MR>(acc);
  accumulate<Dot, MR, Keep>(acc, in, 0, in.K);
  store<Dot, MR>(acc, sums, add);
}

// The same, with each group's sum multiplied by its scale.
template <class Dot, int MR, bool Keep>
__attribute__((noinline)) void grouped_tile(const Operands<Dot>& in, const Groups& groups, typename Dot::Sum* sums,
                                            bool add) {
  typename Dot::Acc total[MR][kTileN];
  zero<Dot, MR>(total);
  for (int64_t k = 0; k < in.K;) {
    const int64_t group = (groups.first + k) / groups.size;
    const int64_t end = min64((group + 1) * groups.size - groups.first, in.K);
    typename Dot::Acc acc[MR][kTileN];
    zero<Dot, MR>(acc);
    accumulate<Dot, MR, Keep>(acc, in, k, end);
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

// With groups half as many rows: each sum takes two accumulators.
template <class Dot, bool Grouped>
constexpr int tile_m() {
  return Grouped ? (Dot::kTileM + 1) / 2 : Dot::kTileM;
}

// The same for 1 to MR rows.
template <class Dot, bool Grouped, bool Keep, int MR = tile_m<Dot, Grouped>()>
OCTAVO_INLINE void tile_of(int64_t rows, const Operands<Dot>& in, const Groups& groups, typename Dot::Sum* sums,
                           bool add) {
  if constexpr (MR > 1) {
    if (rows < MR) return tile_of<Dot, Grouped, Keep, MR - 1>(rows, in, groups, sums, add);
  }
  if constexpr (Grouped)
    grouped_tile<Dot, MR, Keep>(in, groups, sums, add);
  else
    tile<Dot, MR, Keep>(in, sums, add);
}

template <class Dot>
struct Scratch {
  typename Dot::Sum sums[kBlockM * kBlockN];
  int32_t excess[kBlockM];
  // Rows are an odd number of cache lines long, so that they do not all fall into the same sets of the cache.
  alignas(64) typename Dot::Kept::W kept[kTileN][(kPieceBytes + 64) / sizeof(typename Dot::Kept::W)];
};

// The epilogue: sums with rows [n, n + count) of W -> y. Those of groups are already multiplied by their scales.
template <class V>
struct Finish {
  const Linear& layer;
  int64_t n;
  int count;
  typename V::F scale, bias;

  Finish(const Linear& layer, int64_t n, int count) : layer(layer), n(n), count(count) {
    if (layer.groups == 1) scale = layer.w_scale ? V::load(layer.w_scale + n, Float::f32, count) : V::set1(1.0f);
    if (layer.bias) bias = V::load(element(layer.bias, layer.bias_type, n), layer.bias_type, count);
  }

  // y[m, n : n + count], before rounding
  OCTAVO_INLINE typename V::F value(int64_t m, typename V::F y) const {
    const float x_scale = layer.x_scale ? layer.x_scale[m * layer.x_scale_step] : 1.0f;
    if (layer.groups == 1) y = V::mul(y, V::mul(V::set1(x_scale), scale));
    return layer.bias ? V::add(y, bias) : y;
  }

  // -> y[m, n : n + count]
  OCTAVO_INLINE void store(int64_t m, typename V::F y) const {
    V::store(element(layer.y, layer.y_type, m * layer.N + n), layer.y_type, count, value(m, y));
  }
};

// The epilogue of a block: sums -> y. Sums of a row are too large by excess[row].
template <class V, class Sum>
void finish(const Linear& layer, Block part, const Sum* sums, const int32_t* excess) {
  for (int64_t n = part.n0; n < part.n1; n += V::kLanes, sums += V::kLanes) {
    const Finish<V> columns(layer, n, static_cast<int>(min64(V::kLanes, part.n1 - n)));
    for (int64_t m = 0; m < part.m1 - part.m0; m++)
      columns.store(part.m0 + m, V::from_sums(sums + m * kBlockN, excess[m]));
  }
}

// By how much the offset of W's codes makes the sums of a row of x too large.
template <class Dot>
OCTAVO_INLINE int32_t excess_of(const typename Dot::X* x, int64_t K) {
  if constexpr (Dot::kOffset != 0)
    return Dot::kOffset * Dot::sum_x(x, K);
  else
    return 0;
}

template <class V, class Dot>
struct DotLinear {
  using X = typename Dot::X;
  using Sum = typename Dot::Sum;
  using Kept = typename Dot::Kept;
  static constexpr bool kKeeps = !std::is_same_v<Kept, Dot>;
  static constexpr int64_t kPiece = kPieceBytes / static_cast<int64_t>(sizeof(typename Kept::W));

  static size_t scratch_bytes(const Linear&) { return sizeof(Scratch<Dot>); }

  // Whether the rows of x fit one tile.
  static bool takes(const Linear& layer) {
    return layer.M <= (layer.groups > 1 ? tile_m<Dot, true>() : tile_m<Dot, false>());
  }

  static void run(const Linear& layer, Block block, void* memory) {
    auto& scratch = *static_cast<Scratch<Dot>*>(memory);
    const bool grouped = Dot::kGroups && layer.groups > 1;
    for (int64_t m = block.m0; m < block.m1; m += kBlockM) {
      const int64_t rows = min64(kBlockM, block.m1 - m);
      for (int64_t i = 0; i < rows; i++) scratch.excess[i] = excess_of<Dot>(x_row(layer, m + i), layer.K);
      for (int64_t n = block.n0; n < block.n1; n += kBlockN) {
        const Block part{m, m + rows, n, min64(n + kBlockN, block.n1)};
        grouped ? products<Dot::kGroups>(layer, part, scratch) : products<false>(layer, part, scratch);
        finish<V>(layer, part, scratch.sums, scratch.excess);
      }
    }
  }

 private:
  static const X* x_row(const Linear& layer, int64_t m) { return static_cast<const X*>(layer.x) + m * layer.K; }

  static const typename Dot::W* w_at(const Linear& layer, int64_t n, int64_t k) {
    return static_cast<const typename Dot::W*>(layer.w) + n * layer.K + k;
  }

  // Row j of the tile that begins at row n of W. Past the end, the last row is repeated; its sums are not used.
  static int64_t w_row(int64_t n, int j, int64_t end) { return min64(n + j, end - 1); }

  static Groups groups_of(const Linear& layer, int64_t n, int64_t end, int64_t first) {
    Groups groups{layer.K / layer.groups, first, {}};
    for (int j = 0; j < kTileN; j++) groups.scale[j] = layer.w_scale + w_row(n, j, end) * layer.groups;
    return groups;
  }

  // The sums of a part. If the layer has more than one tile of rows, K is cut into pieces, whose widened codes are
  // kept. The layer decides, not the part, whose rows depend on the number of threads: sums must not.
  template <bool Grouped>
  static void products(const Linear& layer, Block part, Scratch<Dot>& scratch) {
    const int64_t rows = part.m1 - part.m0;
    const int64_t height = ceil_div(rows, ceil_div(rows, tile_m<Dot, Grouped>()));  // tiles of about equal height
    const int64_t piece = kKeeps && !takes(layer) ? kPiece : layer.K;
    for (int64_t n = part.n0; n < part.n1; n += kTileN) {
      int64_t k = 0;
      do {
        const int64_t length = min64(piece, layer.K - k);
        column<Grouped>(layer, part, n, k, length, height, scratch);
        k += length;
      } while (k < layer.K);
    }
  }

  // All rows of a part times kTileN rows of W, from n on, over [k, k + length).
  template <bool Grouped>
  static void column(const Linear& layer, Block part, int64_t n, int64_t k, int64_t length, int64_t height,
                     Scratch<Dot>& scratch) {
    const int64_t rows = part.m1 - part.m0;
    const X* const x = x_row(layer, part.m0) + k;
    const char* const next = reinterpret_cast<const char*>(w_at(layer, n + kTileN, kTileN * k)) + kFetchAhead;
    const Groups groups = groups_of(layer, n, part.n1, k);
    Sum* const sums = scratch.sums + (n - part.n0);
    Operands<Dot> in{x, layer.K, {}, length, {}, next};
    for (int j = 0; j < kTileN; j++) in.w[j] = w_at(layer, w_row(n, j, part.n1), k);
    if constexpr (kKeeps) {
      if (height < rows) {
        Operands<Kept> rest{x + height * layer.K, layer.K, {}, length, {}, next};
        for (int j = 0; j < kTileN; j++) rest.w[j] = in.kept[j] = scratch.kept[j];
        tiles<true, Grouped>(in, groups, height, height, sums, k > 0);
        return tiles<false, Grouped>(rest, groups, rows - height, height, sums + height * kBlockN, k > 0);
      }
    }
    tiles<false, Grouped>(in, groups, rows, height, sums, k > 0);
  }

  template <bool Keep, bool Grouped, class Any>
  static void tiles(Operands<Any> in, const Groups& groups, int64_t rows, int64_t height, Sum* sums, bool add) {
    for (; rows > 0; rows -= height, in.x += height * in.ldx, sums += height * kBlockN)
      tile_of<Any, Grouped, Keep>(min64(height, rows), in, groups, sums, add);
  }
};

// `Special` runs the layers that it takes, `General` the others.
template <class Special, class General>
struct Either {
  static size_t scratch_bytes(const Linear& layer) {
    return Special::takes(layer) ? Special::scratch_bytes(layer) : General::scratch_bytes(layer);
  }
  static void run(const Linear& layer, Block block, void* scratch) {
    Special::takes(layer) ? Special::run(layer, block, scratch) : General::run(layer, block, scratch);
  }
};

template <class Layer>
constexpr LinearKernels linear_kernels{Layer::scratch_bytes, Layer::run};

}  // namespace
}  // namespace octavo
