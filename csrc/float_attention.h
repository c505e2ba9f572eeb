// Attention in float, by outer products, a few rows of the query at a time:
//
//     y = softmax(scaling * q k^T) v             sums and the softmax in fp32
//
//     lay      32 keys are laid across, as units [D / u][32 keys][u] (outer_linear.h), and 32 values, [S / u][32
//              columns][u] for each 32 columns of v: u is 2 in bf16, whose products are of pairs, and 1 otherwise (fp16
//              is widened to fp32 on the way)
//     weigh    up to 12 rows: their scores with these keys, e^(score - largest) as units
//     sum      the products of those with values, which the sum of the e^... divides at the end
//
// Many rows of a key head share what is laid out (`packed`), and each tile of them looks at all tokens. Where there is
// but one tile, as in decode, tokens are met once: they are laid into scratch, 128 at a time, and what a tile makes of
// them is kept (`packed` again), to be joined when all have been met.
//
// In bf16 the e^... are rounded to it, as torch's kernel rounds them; their sum is of what they were before. Tokens
// that the mask forbids to all of the rows, at either end, are not looked at.
//
// Included by a translation unit after its target pragma, like outer_linear.h, whose tiles it uses, heads.h, mask.h and
// exponential.h.
#pragma once

namespace octavo {
namespace {

// `Unit`, beyond what linear layers ask of it:
//     beside       units of a column each: of kElements rows of x, their first `count` elements; null is a row of zeros
//     rounded      kElements vectors of fp32 -> units
template <class Unit>
struct FloatAttention {
  using V = Vec;
  using F = Vec::F;
  using X = typename Unit::X;
  static constexpr int64_t kUnit = Unit::kElements;
  static constexpr int64_t kVector = V::kLanes * kUnit;
  static constexpr int64_t kVectorBytes = V::kLanes * kUnitBytes;

  static int64_t units(int64_t elements) { return ceil_div(elements, kUnit); }
  static int64_t bytes_of(int64_t tokens) { return tokens / kUnit * kUnitBytes; }  // of a multiple of 32
  static int64_t rows_of(const Attention& a) { return a.H / a.KV * a.T; }          // of a key head
  static bool is_one_tile(const Attention& a) { return rows_of(a) <= kAttentionRows; }

  // Tokens from `begin` on, a multiple of 32, laid out.
  struct Tokens {
    int64_t begin, count;  // `count`: zeros up to a multiple of 32 with them
    int64_t panel;         // bytes of 32 keys
    char *keys, *values;   // [count / 32][D / u][32][u], [Dv / 32][count / u][32][u]

    Tokens(const Attention& a, int64_t s0, int64_t s1, char* memory)
        : begin(s0), count(whole(s1 - s0)), panel(units(a.D) * kBlockN * kUnitBytes), keys(memory) {
      values = keys + count / kBlockN * panel;
    }
    static int64_t bytes(const Attention& a, int64_t count) {
      return whole(count) * units(a.D) * kUnitBytes + bytes_of(whole(count)) * whole(a.Dv);
    }
    char* keys_from(int64_t s) const { return keys + (s - begin) / kBlockN * panel; }
    char* values_from(int64_t s, int64_t column) const {
      const int64_t steps = count / kUnit;
      return values + column / kBlockN * steps * kBlockN * kUnitBytes +
             in_panel(steps, (s - begin) / kUnit, column % kBlockN);
    }
  };

  // What is between the two products of a tile, and the second.
  struct Scratch {
    int64_t ldq, ldp;  // bytes
    float* scores;     // [tokens / 32][12][32]
    float* y;          // [12][32]
    char *q, *p;       // [12][ldq], [12][ldp]: units

    Scratch(const Attention& a, int64_t tokens, char* memory)
        : ldq(padded_row(ceil_div(a.D, kVector) * kVectorBytes)),
          ldp(padded_row(bytes_of(whole(tokens)))),
          scores(reinterpret_cast<float*>(memory)) {
      y = scores + kAttentionRows * whole(tokens);
      q = reinterpret_cast<char*>(y + kAttentionRows * kBlockN);
      p = q + kAttentionRows * ldq;
    }
    static int64_t bytes(const Attention& a, int64_t tokens) {
      const Scratch at(a, tokens, nullptr);
      return kAttentionRows * ((whole(tokens) + kBlockN) * static_cast<int64_t>(sizeof(float)) + at.ldq + at.ldp);
    }
    float* scores_of(int64_t i, int64_t token) const { return scores + token * kAttentionRows + i * kBlockN; }
    char* units_of(int64_t i, int64_t token) const { return p + i * ldp + bytes_of(token); }
  };

  // What one tile of rows makes of some tokens: sums of e^... times v, the largest score, the sum of the e^...
  struct Partial {
    float *y, *top, *total;  // [12][Dv, up to a multiple of 32], [12 of 16], [12 of 16]

    Partial(const Attention& a, int64_t key_head, int64_t part) {
      y = reinterpret_cast<float*>(a.packed + key_head * packed(a) + part * bytes(a));
      top = y + kAttentionRows * whole(a.Dv), total = top + 16;
    }
    static int64_t bytes(const Attention& a) {
      return (kAttentionRows * whole(a.Dv) + 32) * static_cast<int64_t>(sizeof(float));
    }
  };

  static size_t packed(const Attention& a) {
    return is_one_tile(a) ? ceil_div(a.S, kAttentionTokens) * Partial::bytes(a) : Tokens::bytes(a, a.S);
  }
  static size_t scratch(const Attention& a) {
    return is_one_tile(a) ? Tokens::bytes(a, kAttentionTokens) + Scratch::bytes(a, kAttentionTokens)
                          : Scratch::bytes(a, a.S);
  }

  // -- steps -----------------------------------------------------------------------------------------------------

  static void tokens(const Attention& a, int64_t key_head, int64_t s0, int64_t s1, void* memory) {
    if (!is_one_tile(a)) return lay(a, key_head, Tokens(a, 0, a.S, a.packed + key_head * packed(a)), s0, s1);
    const Tokens some(a, s0, s1, static_cast<char*>(memory));
    lay(a, key_head, some, s0, s1);
    const Tile tile(a, key_head, 0, rows_of(a));
    const Scratch scratch(a, kAttentionTokens, some.keys + Tokens::bytes(a, kAttentionTokens));
    const Partial to(a, key_head, s0 / kAttentionTokens);
    const Range range = weigh(a, tile, some, scratch, to.top, to.total);
    sum(a, tile, some, scratch, range, [&](int64_t i, int64_t n) {
      memcpy(to.y + i * whole(a.Dv) + n, scratch.y + i * kBlockN, kBlockN * sizeof(float));
    });
  }

  static void rows(const Attention& a, int64_t key_head, int64_t r0, int64_t r1, void* memory) {
    const Tile tile(a, key_head, r0, r1);
    if (is_one_tile(a)) return join(a, tile);
    const Tokens all(a, 0, a.S, a.packed + key_head * packed(a));
    const Scratch scratch(a, a.S, static_cast<char*>(memory));
    float top[kAttentionRows], total[kAttentionRows];
    const Range range = weigh(a, tile, all, scratch, top, total);
    sum(a, tile, all, scratch, range,
        [&](int64_t i, int64_t n) { store_y(a, tile, i, n, scratch.y + i * kBlockN, total[i]); });
  }

  // Rows [r0, r1) of a key head.
  struct Tile {
    int64_t key_head, count;
    Place places[kAttentionRows];
    Tile(const Attention& a, int64_t of, int64_t r0, int64_t r1) : key_head(of), count(r1 - r0) {
      find_places(a, key_head, r0, r1, places);
    }
  };

  // -- lay -------------------------------------------------------------------------------------------------------

  static void lay(const Attention& a, int64_t key_head, const Tokens& to, int64_t s0, int64_t s1) {
    const int64_t batch = key_head / a.KV, head = key_head % a.KV;
    for (int64_t s = s0; s < s1; s += kBlockN) {
      const int64_t end = min64(s + kBlockN, s1);
      fetch_next_tokens(a, batch, head, s);
      const auto key = [&](int64_t j, int64_t d, auto... count) {
        return Unit::load_x(static_cast<const X*>(head_row(a.k, batch, head, s + j)) + d, count...);
      };
      lay_across<Unit>(key, end - s, a.D, to.keys_from(s));
      for (int64_t column = 0; column < whole(a.Dv); column += V::kLanes)
        for (int64_t token = s; token < s + kBlockN; token += kUnit)
          V::store_units(to.values_from(token, column), unit_of_values(a, batch, head, token, end, column));
    }
  }

  // Columns of v, from `column` on, of the tokens of a unit, the first of them `token`. What is missing is zeros.
  static V::I unit_of_values(const Attention& a, int64_t batch, int64_t head, int64_t token, int64_t end,
                             int64_t column) {
    const X* rows[kUnit] = {};
    for (int64_t i = 0; i < min64(kUnit, end - token); i++)
      rows[i] = static_cast<const X*>(head_row(a.v, batch, head, token + i)) + column;
    const int count = static_cast<int>(max64(0, min64(V::kLanes, a.Dv - column)));
    return rows[0] && count ? Unit::beside(rows, count) : V::zeros();
  }

  // -- weigh -----------------------------------------------------------------------------------------------------

  // Tokens from `first`, a multiple of 32, up to `last`.
  struct Range {
    int64_t first, last;
  };

  // top, total: [12], of the tile's rows. Returns: the tokens outside of which all e^... are 0.
  static Range weigh(const Attention& a, const Tile& tile, const Tokens& tokens, const Scratch& scratch, float* top,
                     float* total) {
    const int64_t batch = tile.key_head / a.KV;
    for (int64_t i = 0; i < tile.count; i++) fetch(query_row(a, batch, tile.places[i]), size_of(a.q.type) * a.D);
    for (int64_t i = 0; i < tile.count; i++)
      lay_row<Unit>(static_cast<const X*>(query_row(a, batch, tile.places[i])), a.D, scratch.q + i * scratch.ldq);
    Allowed allowed[kAttentionRows];
    for (int64_t i = 0; i < tile.count; i++) allowed[i] = allowed_of(a, tile.places[i], tokens);
    const Range range = range_of(allowed, tile.count, tokens);
    const int64_t steps = units(a.D);
    for (int64_t s = range.first; s < range.last; s += kBlockN)
      outer_tile_of<Unit>(
          tile.count, {scratch.q, scratch.ldq, kUnitBytes, tokens.keys_from(s), steps * kStripBytes, steps, nullptr},
          scratch.scores_of(0, s - tokens.begin), false);
    for (int64_t i = 0; i < tile.count; i++)
      top[i] = largest_score(a, tile.places[i].of_mask, allowed[i], tokens, scratch, i);
    for (int64_t i = 0; i < tile.count; i++)
      total[i] = exponentials(a.scaling, allowed[i], range, tokens, scratch, i, top[i]);
    return range;
  }

  // Which tokens a row may attend to.
  static Allowed allowed_of(const Attention& a, const Place& place) {
    return a.mask.kind == Mask::Kind::none ? Allowed{0, a.S, true, true} : a.mask.allowed[place.of_mask];
  }

  // ... and which of these.
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

  // Of row i. Scores that the mask forbids, next to others, become -inf.
  static float largest_score(const Attention& a, int64_t of_mask, const Allowed& row, const Tokens& tokens,
                             const Scratch& scratch, int64_t i) {
    F most = V::set1(-INFINITY);
    for (int64_t s = row.first / kBlockN * kBlockN; s < row.last; s += kBlockN) {
      float* x = scratch.scores_of(i, s - tokens.begin);
      if (!row.plain || s < row.first || s + kBlockN > row.last)
        for (int j = 0; j < kBlockN; j += V::kLanes)
          V::store(x + j, V::select(lanes(a, of_mask, row, s + j), V::load(x + j), V::set1(-INFINITY)));
      // In this order of operands NaN is passed over.
#pragma GCC unroll 4
      for (int j = 0; j < kBlockN; j += V::kLanes) most = V::max(V::load(x + j), most);
    }
    return V::most(most);
  }

  // Those of a vector of tokens, from s on, that may be attended to.
  static V::Bits lanes(const Attention& a, int64_t of_mask, const Allowed& row, int64_t s) {
    const V::Bits there = lanes_within(row.first, row.last, s);
    if (row.plain || !there) return there;
    constexpr auto kind = Mask::Kind::boolean;
    const int count = static_cast<int>(min64(V::kLanes, row.last - s));
    return there & MaskRows::changes_nothing<kind>(MaskRows::row(a.mask, of_mask), s, count);
  }

  // e^(scaling * (score - top)) of row i -> units, zeros for the other tokens of `range`. Returns: their sum.
  static float exponentials(float by, const Allowed& row, const Range& range, const Tokens& tokens,
                            const Scratch& scratch, int64_t i, float top) {
    const int64_t end = whole(range.last);  // of the tokens, and of the zeros behind the last
    const int64_t from = row.first < row.last ? row.first / kBlockN * kBlockN : end, to = max64(from, whole(row.last));
    memset(scratch.units_of(i, range.first - tokens.begin), 0, bytes_of(from - range.first));
    memset(scratch.units_of(i, to - tokens.begin), 0, bytes_of(end - to));
    const F scaling = V::set1(by), shift = V::set1(top == -INFINITY ? 0 : top);
    F total = V::set1(0);
    for (int64_t s = from; s < to; s += kBlockN) {
      const float* x = scratch.scores_of(i, s - tokens.begin);
      char* units = scratch.units_of(i, s - tokens.begin);
#pragma GCC unroll 4
      for (int j = 0; j < kBlockN; j += kVector, units += kVectorBytes) {
        F e[kUnit];
#pragma GCC unroll 2
        for (int u = 0; u < kUnit; u++) {
          e[u] = exp_of_negative<V>(V::mul(scaling, V::sub(V::load(x + j + u * V::kLanes), shift)));
          total = V::add(total, e[u]);
        }
        V::store_units(units, Unit::rounded(e));
      }
    }
    return V::total(total);
  }

  // -- sum -------------------------------------------------------------------------------------------------------

  // Calls keep(i, n) for each row and 32 columns of v, when the sums are in scratch.y.
  template <class Keep>
  static void sum(const Attention& a, const Tile& tile, const Tokens& tokens, const Scratch& scratch,
                  const Range& range, const Keep& keep) {
    for (int64_t n = 0; n < a.Dv; n += kBlockN) {
      outer_tile_of<Unit>(
          tile.count,
          {scratch.units_of(0, range.first - tokens.begin), scratch.ldp, kUnitBytes, tokens.values_from(range.first, n),
           tokens.count / kUnit * kStripBytes, (whole(range.last) - range.first) / kUnit, nullptr},
          scratch.y, false);
      for (int64_t i = 0; i < tile.count; i++) keep(i, n);
    }
  }

  // Partial results of all tokens -> y: each under e^(scaling * (its top - the largest)), which takes the top's place.
  static void join(const Attention& a, const Tile& tile) {
    const int64_t parts = ceil_div(a.S, kAttentionTokens);
    const auto part = [&](int64_t p) { return Partial(a, tile.key_head, p); };
    for (int64_t i = 0; i < tile.count; i++) {
      float largest = -INFINITY, total = 0;
      for (int64_t p = 0; p < parts; p++) largest = std::max(largest, part(p).top[i]);
      for (int64_t p = 0; p < parts; p++) {
        float& weight = part(p).top[i];
        const float below = a.scaling * (weight - (largest == -INFINITY ? 0 : largest));
        V::store(&weight, Float::f32, 1, exp_of_negative<V>(V::set1(below)));
        total += weight * part(p).total[i];
      }
      for (int64_t n = 0; n < a.Dv; n += kBlockN) {
        float sums[kBlockN] = {};
        for (int64_t p = 0; p < parts; p++) {
          const float* const y = part(p).y + i * whole(a.Dv) + n;
          for (int64_t j = 0; j < kBlockN; j++) sums[j] += part(p).top[i] * y[j];
        }
        store_y(a, tile, i, n, sums, total);
      }
    }
  }

  // Sums over `total` -> columns [n, n + 32) of row i of the tile; zeros where nothing may be attended to.
  static void store_y(const Attention& a, const Tile& tile, int64_t i, int64_t n, const float* sums, float total) {
    const Allowed allowed = allowed_of(a, tile.places[i]);
    const F scale = V::set1(allowed.first < allowed.last ? 1 / total : 0);
    const int64_t row = result_row(a, tile.places[i]), end = min64(n + kBlockN, a.Dv);
    for (; n < end; n += V::kLanes, sums += V::kLanes)
      V::store(element(a.y, a.y_type, row + n), a.y_type, static_cast<int>(min64(V::kLanes, end - n)),
               V::mul(V::load(sums), scale));
  }
};

}  // namespace
}  // namespace octavo
