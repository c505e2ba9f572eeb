// Attention in float, a few rows of the query at a time:
//
//     y = softmax(scaling * q k^T) v             sums and the softmax in fp32
//
//     tokens   32 keys at a time are packed in units, [D / u][32 keys][u] (outer_linear.h), and 32 values, [S / u][32
//              columns][u] for each 32 columns of v. u is 2 in bf16, whose products are of pairs, and 1 otherwise (fp16
//              is widened to fp32 when it is packed)
//     rows     12 at a time, or 32 in tiles, by up to 1024 tokens: scores, weights e^(score - largest) as units
//              (attention_rows.h), and sums of weights times values. The results with all tokens are combined by their
//              largest scores (online softmax) -> y
//
// Many rows of a key head share what is packed (`packed`). For few rows nothing is packed: see few_queries.h.
//
// Included by a translation unit after its target pragma, like outer_linear.h, whose tiles it uses, attention_rows.h
// and few_queries.h.
#pragma once

namespace octavo {
namespace {

// `Unit`: see the heads of attention_rows.h and few_queries.h. `Products`: see heads.h.
template <class Unit, class Few, class Products = OuterProducts>
struct FloatAttention {
  using V = Vec;
  using X = typename Unit::X;
  using Stored = typename Few::Stored;  // of keys and values: X, or codes
  static constexpr int64_t kRows = Products::kRows;
  using Tile = AttentionTile<Unit, kRows>;
  using Scratch = typename Tile::Scratch;
  static constexpr int64_t kUnit = Unit::kElements;

  static int64_t units(int64_t elements) { return ceil_div(elements, kUnit); }
  static int64_t of_keys(const Attention& a) { return Products::read(units(a.D)); }

  // The packed keys and values of one key head.
  struct Laid {
    int64_t count;             // S rounded up to a multiple of 32, padded with zeros
    int64_t panel;             // bytes of 32 packed keys
    char *keys, *values;       // [count / 32][D / u][32][u], [Dv / 32][count / u][32][u]
    float *k_scale, *v_scale;  // [count] of codes

    Laid(const Attention& a, int64_t key_head)
        : count(whole(a.S)), panel(of_keys(a) * kBlockN * kUnitBytes), keys(a.packed + key_head * packed(a)) {
      values = keys + count / kBlockN * panel;
      k_scale = reinterpret_cast<float*>(values + Tile::bytes_of(count) * whole(a.Dv)), v_scale = k_scale + count;
    }
    Tokens tokens(int64_t s) const {  // of the part that begins at s
      return {s, min64(kPart, count - s), Few::kCodes ? k_scale + s : nullptr, Few::kCodes ? v_scale + s : nullptr};
    }
    int64_t steps() const { return count / kUnit; }  // of values
    char* keys_from(int64_t s) const { return keys + s / kBlockN * panel; }
    char* values_from(int64_t s, int64_t column) const {
      return values + column / kBlockN * steps() * kBlockN * kUnitBytes +
             in_panel(steps(), s / kUnit, column % kBlockN);
    }
  };

  static size_t packed(const Attention& a) {
    if (Few::take(a)) return Few::packed(a);
    const size_t scales = Few::kCodes ? 2 * sizeof(float) : 0;
    return whole(a.S) * (of_keys(a) * kUnitBytes + scales) + Tile::bytes_of(whole(a.S)) * whole(a.Dv);
  }

  // Many tokens are taken in parts, whose keys and values stay in L2 while some tiles use them.
  static constexpr int64_t kPart = 1024, kTiles = 8;
  static int64_t part_of(const Attention& a) { return min64(kPart, a.S); }
  static int64_t most_rows(const Attention& a) { return (a.S <= kPart ? 1 : kTiles) * kRows; }

  // The softmax of a tile over the tokens so far: of each row, the largest score, and the sum of weights.
  struct Sofar {
    static constexpr int64_t kCount = ceil_div(kRows, V::kLanes) * V::kLanes;
    static constexpr float kLowest = std::numeric_limits<float>::lowest();
    float top[kCount], total[kCount];

    // Before the first token.
    Sofar() {
      for (int64_t i = 0; i < kCount; i++) top[i] = -INFINITY, total[i] = 0;
    }

    // Adds `more` tokens. kept, taken: the factors for the sums of weights times values, of this and of `more`, when
    // these are added.
    void add(const Sofar& more, float scaling, float* kept, float* taken) {
      for (int64_t i = 0; i < kCount; i += V::kLanes) {
        const auto mine = V::load(top + i), its = V::load(more.top + i), largest = V::max(mine, its);
        const auto shift = V::max(largest, V::set1(kLowest));  // so that -inf - shift is not NaN
        const auto weight = [&](V::F top) { return exp_of_negative<V>(V::mul(V::set1(scaling), V::sub(top, shift))); };
        const auto keep = weight(mine), take = weight(its);
        V::store(kept + i, keep), V::store(taken + i, take), V::store(top + i, largest);
        V::store(total + i, V::fmadd(V::load(total + i), keep, V::mul(V::load(more.total + i), take)));
      }
    }
  };

  // A tile in progress.
  struct Sums {
    Tile tile;
    Sofar sofar;
    float* y;  // [kRows][Dv rounded up to a multiple of 32]: sums of weights times values
  };
  static Sums* sums_at(const Attention& a, void* memory) {
    return reinterpret_cast<Sums*>(static_cast<char*>(memory) + ceil_div(Scratch::bytes(a, part_of(a)), 64) * 64);
  }

  static size_t scratch(const Attention& a) {
    if (Few::take(a)) return Few::scratch(a);
    const int64_t rows = most_rows(a);
    return reinterpret_cast<intptr_t>(sums_at(a, nullptr) + rows / kRows) + rows * whole(a.Dv) * sizeof(float);
  }

  // -- tokens ----------------------------------------------------------------------------------------------------

  static void tokens(const Attention& a, int64_t key_head, int64_t s0, int64_t s1, void* memory) {
    if (Few::take(a)) return Few::tokens(a, key_head, s0, s1, memory);
    const Laid to(a, key_head);
    const int64_t batch = key_head / a.KV, head = key_head % a.KV;
    if constexpr (Few::kCodes) {
      copy_scales(a.k_scale, batch, head, s0, s1, to.k_scale + s0);
      copy_scales(a.v_scale, batch, head, s0, s1, to.v_scale + s0);
    }
    for (int64_t s = s0; s < s1; s += kBlockN) {
      const int64_t end = min64(s + kBlockN, s1);
      fetch_next_tokens(a.k, sizeof(Stored), a.D, batch, head, s, a.S);
      fetch_next_tokens(a.v, sizeof(Stored), a.Dv, batch, head, s, a.S);
      const auto key = [&](int64_t j, int64_t d, auto... count) {
        const Stored* const x = row_of<Stored>(a.k, batch, head, s + j) + d;
        if constexpr (Few::kCodes)
          return Unit::load_w(x, count...);
        else
          return Unit::load_x(x, count...);
      };
      lay_across<Unit>(key, end - s, a.D, to.keys_from(s));
      memset(to.keys_from(s) + units(a.D) * kBlockN * kUnitBytes, 0, (of_keys(a) - units(a.D)) * kBlockN * kUnitBytes);
      for (int64_t column = 0; column < whole(a.Dv); column += kStrip)
        for (int64_t token = s; token < s + kBlockN; token += kUnit) {
          V::I w[2];
          values(a, batch, head, token, end, column, w);
          char* const units = to.values_from(token, column);
          V::store_units(units, w[0]), V::store_units(units + kStripBytes / 2, w[1]);
        }
    }
  }

  // Columns of v from `column` on, for the tokens of a unit, of which `token` is the first. Missing tokens and columns
  // are zeros.
  static void values(const Attention& a, int64_t batch, int64_t head, int64_t token, int64_t end, int64_t column,
                     V::I (&w)[2]) {
    const int count = static_cast<int>(min64(kStrip, a.Dv - column));
    if (token >= end || count <= 0) return void(w[0] = w[1] = V::zeros());
    const Stored* rows[kUnit] = {};
    for (int64_t i = 0; i < min64(kUnit, end - token); i++)
      rows[i] = row_of<Stored>(a.v, batch, head, token + i) + column;
    Unit::strip(rows, count, w);
    Unit::in_order(w);
  }

  // -- rows ------------------------------------------------------------------------------------------------------

  static void rows(const Attention& a, int64_t key_head, int64_t r0, int64_t r1, void* memory) {
    if (Few::take(a)) return Few::rows(a, key_head, r0, r1, memory);
    const Laid laid(a, key_head);
    const Scratch scratch(a, part_of(a), static_cast<char*>(memory));
    const typename Products::InUse in_use;
    if (a.S > kPart) return rows_in_parts(a, laid, key_head, r0, r1, scratch, memory);
    const Tile tile(a, key_head, r0, r1);
    Sofar of_all;
    const auto range = weigh(a, tile, laid, 0, scratch, of_all);
    multiply_values(a, tile, laid, range, 0, scratch,
                    [&](int64_t i, int64_t n, const float* sums) { tile.store(a, i, n, sums, of_all.total[i]); });
  }

  static void rows_in_parts(const Attention& a, const Laid& laid, int64_t key_head, int64_t r0, int64_t r1,
                            const Scratch& scratch, void* memory) {
    Sums* const sums = sums_at(a, memory);
    float* const y = reinterpret_cast<float*>(sums + most_rows(a) / kRows);
    memset(y, 0, (r1 - r0) * whole(a.Dv) * sizeof(float));
    int64_t tiles = 0;
    for (int64_t r = r0; r < r1; r += kRows, tiles++)
      new (sums + tiles) Sums{Tile(a, key_head, r, min64(r + kRows, r1)), Sofar(), y + (r - r0) * whole(a.Dv)};
    for (int64_t s = 0; s < laid.count; s += kPart)
      for (int64_t t = 0; t < tiles; t++) add_part(a, laid, s, scratch, sums[t]);
    for (int64_t t = 0; t < tiles; t++)
      for (int64_t n = 0; n < a.Dv; n += kBlockN)
        for (int64_t i = 0; i < sums[t].tile.count; i++)
          sums[t].tile.store(a, i, n, sums[t].y + i * whole(a.Dv) + n, sums[t].sofar.total[i]);
  }

  // Adds the part that begins at token s.
  static void add_part(const Attention& a, const Laid& laid, int64_t s, const Scratch& scratch, Sums& sums) {
    Sofar of_part;
    const auto range = weigh(a, sums.tile, laid, s, scratch, of_part);
    if (range.first == range.last) return;
    float keep[Sofar::kCount], take[Sofar::kCount];
    sums.sofar.add(of_part, a.scaling, keep, take);
    multiply_values(a, sums.tile, laid, range, s, scratch, [&](int64_t i, int64_t n, const float* added) {
      float* const y = sums.y + i * whole(a.Dv) + n;
      for (int64_t j = 0; j < kBlockN; j += V::kLanes)
        V::store(y + j, V::fmadd(V::load(y + j), V::set1(keep[i]), V::mul(V::load(added + j), V::set1(take[i]))));
    });
  }

  // Weights of the tile with tokens of the part that begins at s, as units -> scratch. Returns which tokens have any.
  static typename Tile::Range weigh(const Attention& a, const Tile& tile, const Laid& laid, int64_t s,
                                    const Scratch& scratch, Sofar& of_part) {
    return tile.weigh(a, laid.tokens(s), scratch, of_part.top, of_part.total, [&](const auto& range) {
      if (range.first < range.last) multiply_keys(a, tile, laid, range, s, scratch);
    });
  }

  // put(i, n, sums): takes the sums of row i with columns [n, n + 32) of values.
  template <class Put>
  static void multiply_values(const Attention& a, const Tile& tile, const Laid& laid, const typename Tile::Range& range,
                              int64_t s, const Scratch& scratch, const Put& put) {
    for (int64_t n = 0; n < a.Dv; n += kBlockN) {
      Products::template multiply<Unit>(
          tile.count,
          {scratch.units_of(0, range.first - s), scratch.ldp, kUnitBytes, laid.values_from(range.first, n),
           laid.steps() * kStripBytes, (whole(range.last) - range.first) / kUnit, nullptr},
          scratch.y);
      for (int64_t i = 0; i < tile.count; i++) put(i, n, scratch.y + i * kBlockN);
    }
  }

  // Scores with the tokens of `range`, of the part that begins at s.
  static void multiply_keys(const Attention& a, const Tile& tile, const Laid& laid, const typename Tile::Range& range,
                            int64_t s, const Scratch& scratch) {
    const int64_t steps = of_keys(a);
    lay_rows(a, tile, scratch);
    for (int64_t token = range.first; token < range.last; token += kBlockN)
      Products::template multiply<Unit>(
          tile.count, {scratch.q, scratch.ldq, kUnitBytes, laid.keys_from(token), steps * kStripBytes, steps, nullptr},
          scratch.scores_of(0, token - s));
    if constexpr (Few::kCodes)
      for (int64_t i = 0; i < tile.count; i++) Tile::template scale<float>(laid.tokens(s), range, scratch, i, 1);
  }

  // The tile's rows of q -> scratch, in units.
  static void lay_rows(const Attention& a, const Tile& tile, const Scratch& scratch) {
    const int64_t batch = tile.key_head / a.KV;
    for (int64_t i = 0; i < tile.count; i++) fetch(query_row(a, batch, tile.places[i]), size_of(a.q.type) * a.D);
    for (int64_t i = 0; i < tile.count; i++)
      lay_row<Unit>(static_cast<const X*>(query_row(a, batch, tile.places[i])), a.D, scratch.q + i * scratch.ldq);
  }
};

}  // namespace
}  // namespace octavo
