// Many rows of x in tiles: each row is a column of many_tiles.h.
//
// Groups along K that have scales of their own, and the digits of fp16 and fp32 (digits.h), are parts of a sum: each
// part has a block of sums of its own, and these are folded together in fp32.
//
// Included by amx.cpp after its target pragma.
#pragma once

namespace octavo {
namespace {

template <class Row, class Sum>
class RowColumns {
  const Linear& layer_;

 public:
  static constexpr int64_t kParts = Row::kDigits, kVectors = Row::kVectors;
  static constexpr bool kFolds = kParts > 1, kMixes = false;

  class Epilogue;

  struct Memory {
    alignas(64) char columns[kVectors][kTileBytes];
    alignas(64) float down[kMostBlocks * kBlock];
    Row rows[kMostBlocks * kBlock];
  };

  RowColumns(const Linear& layer, Memory& memory) : layer_(layer), memory_(memory) {}

  // Returns whether all rows are finite, if they are to become digits.
  bool prepare(int64_t m0, int64_t m1) {
    first_ = m0;
    if constexpr (kFolds) {
      for (int64_t m = m0, i = 0; m < m1; m++, i++) {
        memory_.rows[i] = Row(row(m), layer_.K);
        if (!memory_.rows[i].is_finite()) return false;
        memory_.down[i] = -memory_.rows[i].shift;
      }
    }
    return true;
  }

  __m512 down(int64_t i) const { return Vec::load(memory_.down + i); }

  void pack(int64_t m, int64_t m1, int64_t k, int64_t length, char* to, int64_t second) {
    for (; m < m1; m += kTile, to += second) pack_tiles(m, min64(kTile, m1 - m), k, length, to, 2 * second);
  }

  // Each line is on a page of its own.
  void prefetch_y(Block block) const {
    for (int64_t m = block.m0; m < block.m1; m++)
      __builtin_prefetch(element(layer_.y, layer_.y_type, m * layer_.N + block.n0), 1, kIntoL2);
  }

 private:
  const char* row(int64_t m) const { return static_cast<const char*>(layer_.x) + m * layer_.K * Row::kSize; }

  // Past the last of `rows`, that one is repeated; its sums are not used.
  __attribute__((noinline)) void pack_tiles(int64_t m, int64_t rows, int64_t k0, int64_t length, char* tiles,
                                            int64_t part) {
    const char* const x = row(m) + k0 * Row::kSize;
    const int64_t step = layer_.K * Row::kSize;
    for (int64_t k = 0; k < length; k += kUnitCodes, tiles += kVectors / kParts * kTileBytes) {
      if (std::is_same_v<Row, CodeRow> && rows == kTile && length - k >= kUnitCodes) {
        turn(x + k, step, tiles);
        continue;
      }
      for (int64_t r = 0; r < kTile; r++) {
        const int64_t one = min64(r, rows - 1);
        __m512i v[kVectors];
        memory_.rows[m - first_ + one].of(x + one * step + k * Row::kSize,
                                          static_cast<int>(min64(kUnitCodes, length - k)), v);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) _mm512_store_si512(memory_.columns[j] + r * kRowBytes, v[j]);
      }
      for (int j = 0; j < kVectors; j++)
        turn(memory_.columns[j], kRowBytes, tiles + (kParts > 1 ? j * part : j * kTileBytes));
    }
  }

  Memory& memory_;
  int64_t first_ = 0;  // the first of the prepared rows
};

// The epilogue: two tiles, for 16 rows of x, are transposed, and then stored a few rows at a time.
template <class Row, class Sum>
class RowColumns<Row, Sum>::Epilogue {
 public:
  Epilogue() = default;
  Epilogue(const RowColumns& columns, Block part, Sums<Sum>& sums, bool folded)
      : layer_(&columns.layer_),
        part_(part),
        sums_(&sums),
        folded_(folded),
        left_(part.m1 - part.m0 > kTile ? 2 * kPortions : kPortions) {}

  OCTAVO_INLINE void one() {
    if (left_ == 0) return;
    left_--;
    folded_ ? portion(sums_->folded) : portion(sums_->whole);
  }

  void rest() {
    while (left_) one();
  }

 private:
  static constexpr int64_t kRows = 4, kPortions = 2 + kTile / kRows;  // for 16 rows: two are transpositions

  template <class Any>
  OCTAVO_INLINE void portion(Any* sums) {
    const int64_t half = left_ / kPortions, next = kPortions - 1 - left_ % kPortions;
    sums += half * 2 * kTileSums;
    next < 2 ? turn_around(sums + next * kTileSums) : store(part_.m0 + half * kTile, (next - 2) * kRows, sums);
  }

  template <class Any>
  __attribute__((noinline)) static void turn_around(Any* sums) {
    turn(sums, kRowBytes, sums);
  }

  // Stores some of the 16 rows from m on, beginning with the row `first` of these.
  template <class Any>
  __attribute__((noinline)) void store(int64_t m, int64_t first, const Any* sums) {
    const int64_t end = min64(first + kRows, part_.m1 - m), columns = part_.n1 - part_.n0;
    const Finish<Vec> left(*layer_, part_.n0, static_cast<int>(min64(kTile, columns)));
    const Finish<Vec> right(*layer_, part_.n0 + kTile, static_cast<int>(max64(0, columns - kTile)));
    const bool whole_lines = layer_->y_type == Float::bf16 && columns == kBlock;
    for (int64_t i = first; i < end; i++) {
      const Vec::F front = Vec::from_sums(sums + i * kTile, 0), back = Vec::from_sums(sums + kTileSums + i * kTile, 0);
      if (whole_lines) {
        void* const y = element(layer_->y, layer_->y_type, (m + i) * layer_->N + part_.n0);
        Vec::store_bf16(y, left.value(m + i, front), right.value(m + i, back));
      } else {
        left.store(m + i, front);
        right.store(m + i, back);
      }
    }
  }

  const Linear* layer_ = nullptr;
  Block part_{};
  Sums<Sum>* sums_ = nullptr;
  bool folded_ = false;
  int64_t left_ = 0;
};

// `Rest` computes rows that have no digits. `kLeast`: rows of x; fewer are no faster than by dot products.
template <class Row, class Tiles, class Rest, int kLeast>
struct ManyTileRows {
  using Columns = RowColumns<Row, typename Tiles::Sum>;
  using Many = ManyTiles<Columns, Tiles>;
  using Scratch = typename Many::Scratch;

  static bool takes(const Linear& layer) {
    return layer.M >= kLeast && layer.K > 0 && (Row::kDigits == 1 || layer.K <= kLongestExact) &&
           (layer.groups == 1 ||
            (layer.K / layer.groups % kUnitCodes == 0 && Many::units_of_group(layer) * Tiles::kSteps <= kPieceSteps));
  }

  static int64_t passes(const Linear& layer) { return typename Many::Plan(layer).passes(layer.M); }

  static size_t scratch_bytes(const Linear& layer) {
    return sizeof(Scratch) > Rest::scratch_bytes(layer) ? sizeof(Scratch) : Rest::scratch_bytes(layer);
  }

  static void run(const Linear& layer, Block block, void* memory) {
    auto& scratch = *static_cast<Scratch*>(memory);
    Columns rows(layer, scratch.memory);
    Many::run(layer, rows, block, scratch, [&](Block rest) { Rest::run(layer, rest, memory); });
  }
};

}  // namespace
}  // namespace octavo
