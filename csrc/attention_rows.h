// Attention in float: what is done to the rows of a tile around its two products, however these are computed.
//
//     scale    sums of codes -> scores: multiplied by the scales of keys
//     weigh    scores -> weights e^(score - largest), as units, and their sum. Weights for values that are codes are
//              multiplied by the scales of these
//     store    sums of weights times values, divided by the sum of weights -> y
//
// In bf16, weights are rounded to bf16, as torch's kernel rounds them; their sum is taken before rounding. In units of
// 16-bit fixed-point numbers, they are whole numbers up to 32767, times a scale of the row. Tokens at either end that
// the mask forbids to all of the rows are skipped.
//
// Included by a translation unit after its target pragma, like outer_linear.h, whose units these are, heads.h, mask.h
// and exponential.h.
#pragma once

namespace octavo {
namespace {

// Tokens [begin, begin + count), where the last block of 32 counts as a whole. Scales of codes: [count]; else null.
struct Tokens {
  int64_t begin, count;
  const float *k_scale, *v_scale;
};

// Numbers of magnitudes up to `largest` in fixed-point: whole numbers up to 32767, times `scale`, which is NaN if
// `largest` is not finite.
struct FixedPoint {
  static constexpr float kMost = 32767;
  float lift, inverse, scale;  // `lift` scales up numbers that are too small to divide by

  explicit FixedPoint(float largest)
      : lift(largest < 0x1p-60f ? 0x1p60f : 1),
        inverse(largest == 0 ? 0 : kMost / (largest * lift)),
        scale(std::isfinite(largest) ? largest * lift / kMost / lift : NAN) {}
  Vec::F of(Vec::F x) const { return Vec::mul(Vec::mul(x, Vec::set1(lift)), Vec::set1(inverse)); }
};

// `Unit`, beyond what linear layers ask of it, has
//     rounded      kElements vectors of fp32 -> units
//     kFixed       whether units are fixed-point numbers
// `kRows`: the most rows of a tile.
template <class Unit, int64_t kRows = kAttentionRows>
struct AttentionTile {
  using V = Vec;
  using F = Vec::F;
  static constexpr int64_t kUnit = Unit::kElements;
  static constexpr int64_t kVector = V::kLanes * kUnit;
  static constexpr int64_t kVectorBytes = V::kLanes * kUnitBytes;

  static int64_t bytes_of(int64_t tokens) { return tokens / kUnit * kUnitBytes; }  // of a multiple of 32

  // Scratch for what is between the two products of a tile, and for the second product.
  struct Scratch {
    int64_t ldq, ldp;  // bytes
    float* scores;     // [tokens / 32][kRows][32]
    float* y;          // [kRows][32]
    char *q, *p;       // [kRows][ldq], [kRows][ldp]: units
    float* p_scale;    // [kRows], of fixed-point numbers

    Scratch(const Attention& a, int64_t tokens, char* memory)
        : ldq(padded_row(ceil_div(a.D, kVector) * kVectorBytes)),
          ldp(padded_row(bytes_of(whole(tokens)))),
          scores(reinterpret_cast<float*>(memory)) {
      y = scores + kRows * whole(tokens);
      q = reinterpret_cast<char*>(y + kRows * kBlockN);
      p = q + kRows * ldq;
      p_scale = reinterpret_cast<float*>(p + kRows * ldp);
    }
    static int64_t bytes(const Attention& a, int64_t tokens) {
      const Scratch at(a, tokens, nullptr);
      return kRows * ((whole(tokens) + kBlockN + 1) * static_cast<int64_t>(sizeof(float)) + at.ldq + at.ldp);
    }
    float* scores_of(int64_t i, int64_t token) const { return scores + token * kRows + i * kBlockN; }
    char* units_of(int64_t i, int64_t token) const { return p + i * ldp + bytes_of(token); }
  };

  // Rows [r0, r1) of a key head.
  int64_t key_head, count;
  Place places[kRows];
  AttentionTile(const Attention& a, int64_t of, int64_t r0, int64_t r1) : key_head(of), count(r1 - r0) {
    find_places(a, key_head, r0, r1, places);
  }

  // Tokens [first, last), where `first` is a multiple of 32.
  struct Range {
    int64_t first, last;
  };

  // Sums of row i, int32 or float -> scores: multiplied by the scales of keys, and `by`.
  template <class Sum>
  static void scale(const Tokens& tokens, const Range& range, const Scratch& scratch, int64_t i, float by) {
    for (int64_t s = range.first; s < range.last; s += kBlockN) {
      float* const x = scratch.scores_of(i, s - tokens.begin);
#pragma GCC unroll 4
      for (int j = 0; j < kBlockN; j += V::kLanes)
        V::store(x + j, V::mul(V::from_sums(reinterpret_cast<const Sum*>(x + j), 0),
                               V::mul(V::set1(by), V::load(tokens.k_scale + s - tokens.begin + j))));
    }
  }

  // multiply(range): the products of the tile's rows with keys -> scratch.scores. top, total: of each row, the largest
  // score and the sum of weights. Returns the tokens outside of which all weights are 0.
  template <class Multiply>
  Range weigh(const Attention& a, const Tokens& tokens, const Scratch& scratch, float* top, float* total,
              const Multiply& multiply) const {
    Allowed allowed[kRows];
    for (int64_t i = 0; i < count; i++) allowed[i] = allowed_of(a, places[i], tokens);
    const Range range = range_of(allowed, count, tokens);
    multiply(range);
    for (int64_t first = 0; first < count; first += kTogether) {
      const int64_t last = min64(first + kTogether, count);
      for (int64_t i = first; i < last; i++)
        top[i] = largest_score(a, places[i].of_mask, allowed[i], tokens, scratch, i);
      for (int64_t i = first; i < last; i++)
        total[i] = exponentials(a.scaling, allowed[i], range, tokens, scratch, i, top[i]);
    }
    return range;
  }

  // Sums / `total` -> columns [n, n + 32) of row i; zeros if it may attend to nothing.
  void store(const Attention& a, int64_t i, int64_t n, const float* sums, float total) const {
    const Allowed allowed = allowed_of(a, places[i]);
    const F scale = V::set1(allowed.first < allowed.last ? 1 / total : 0);
    const int64_t row = result_row(a, places[i]), end = min64(n + kBlockN, a.Dv);
    for (; n < end; n += V::kLanes, sums += V::kLanes)
      V::store(element(a.y, a.y_type, row + n), a.y_type, static_cast<int>(min64(V::kLanes, end - n)),
               V::mul(V::load(sums), scale));
  }

 private:
  // The tokens that a row may attend to.
  static Allowed allowed_of(const Attention& a, const Place& place) {
    return a.mask.kind == Mask::Kind::none ? Allowed{0, a.S, true, true} : a.mask.allowed[place.of_mask];
  }

  // ... and those of them that are among `tokens`.
  static Allowed allowed_of(const Attention& a, const Place& place, const Tokens& tokens) {
    Allowed row = allowed_of(a, place);
    row.first = max64(row.first, tokens.begin), row.last = min64(row.last, tokens.begin + tokens.count);
    if (row.first >= row.last) row.first = row.last = tokens.begin;
    return row;
  }

  static Range range_of(const Allowed* rows, int64_t count, const Tokens& tokens) {
    Range all{tokens.begin + tokens.count, tokens.begin};
    for (int64_t i = 0; i < count; i++)
      if (rows[i].first < rows[i].last) all = {min64(all.first, rows[i].first), max64(all.last, rows[i].last)};
    return all.first < all.last ? Range{all.first / kBlockN * kBlockN, all.last} : Range{tokens.begin, tokens.begin};
  }

  // The largest score of row i. Scores that the mask forbids, in the same blocks as others, become -inf.
  static float largest_score(const Attention& a, int64_t of_mask, const Allowed& row, const Tokens& tokens,
                             const Scratch& scratch, int64_t i) {
    F most = V::set1(-INFINITY);
    for (int64_t s = row.first / kBlockN * kBlockN; s < row.last; s += kBlockN) {
      float* x = scratch.scores_of(i, s - tokens.begin);
      if (!row.plain || s < row.first || s + kBlockN > row.last)
        for (int j = 0; j < kBlockN; j += V::kLanes)
          V::store(x + j, V::select(lanes(a, of_mask, row, s + j), V::load(x + j), V::set1(-INFINITY)));
      // With this order of operands NaN is skipped.
#pragma GCC unroll 4
      for (int j = 0; j < kBlockN; j += V::kLanes) most = V::max(V::load(x + j), most);
    }
    return V::most(most);
  }

  // A mask of the lanes that may be attended to, in the vector of tokens from s on.
  static V::Bits lanes(const Attention& a, int64_t of_mask, const Allowed& row, int64_t s) {
    const V::Bits there = lanes_within(row.first, row.last, s);
    if (row.plain || !there) return there;
    constexpr auto kind = Mask::Kind::boolean;
    const int count = static_cast<int>(min64(V::kLanes, row.last - s));
    return there & MaskRows::changes_nothing<kind>(MaskRows::row(a.mask, of_mask), s, count);
  }

  // e^(scaling * (score - top)) of row i -> units, zeros for the other tokens of `range`. Returns their sum.
  static float exponentials(float by, const Allowed& row, const Range& range, const Tokens& tokens,
                            const Scratch& scratch, int64_t i, float top) {
    const int64_t end = whole(range.last);  // of the tokens, and of the zeros after the last one
    const int64_t from = row.first < row.last ? row.first / kBlockN * kBlockN : end, to = max64(from, whole(row.last));
    memset(scratch.units_of(i, range.first - tokens.begin), 0, bytes_of(from - range.first));
    memset(scratch.units_of(i, to - tokens.begin), 0, bytes_of(end - to));
    const F scaling = V::set1(by), shift = V::set1(top == -INFINITY ? 0 : top);
    F total = V::set1(0), largest = V::set1(0);
    for (int64_t s = from; s < to; s += kBlockN) {
      float* const x = scratch.scores_of(i, s - tokens.begin);
      const float* const v_scale = tokens.v_scale ? tokens.v_scale + s - tokens.begin : nullptr;
      char* units = scratch.units_of(i, s - tokens.begin);
#pragma GCC unroll 4
      for (int j = 0; j < kBlockN; j += kVector, units += kVectorBytes) {
        F e[kUnit];
#pragma GCC unroll 2
        for (int u = 0; u < kUnit; u++) {
          const int at = j + u * V::kLanes;
          e[u] = exp_of_negative<V>(V::mul(scaling, V::sub(V::load(x + at), shift)));
          total = V::add(total, e[u]);
          if (v_scale) e[u] = V::mul(e[u], V::load(v_scale + at));
          if constexpr (Unit::kFixed) largest = V::largest(largest, e[u]), V::store(x + at, e[u]);
        }
        if constexpr (!Unit::kFixed) V::store_units(units, Unit::rounded(e));
      }
    }
    if constexpr (Unit::kFixed) {
      const FixedPoint fixed(V::across(largest));
      scratch.p_scale[i] = fixed.scale;
      for (int64_t s = from; s < to; s += kBlockN) {
        const float* const x = scratch.scores_of(i, s - tokens.begin);
        char* units = scratch.units_of(i, s - tokens.begin);
        for (int j = 0; j < kBlockN; j += kVector, units += kVectorBytes) {
          F e[kUnit];
#pragma GCC unroll 2
          for (int u = 0; u < kUnit; u++) e[u] = fixed.of(V::load(x + j + u * V::kLanes));
          V::store_units(units, Unit::rounded(e));
        }
      }
    }
    return V::total(total);
  }
};

}  // namespace
}  // namespace octavo
