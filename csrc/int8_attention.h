// Attention with both products in int8, a few rows of the query at a time.
//
//     tokens   32 keys at a time are quantized, unless they are codes, and packed, [D / u][32 keys][u], like a linear
//              layer's rows of W (outer_linear.h); so are 32 values, [S / u][32 columns][u] for each 32 columns of v,
//              where the u tokens of a unit are u rows in memory
//     rows     12 at a time, in tiles 32 or 16: their codes, their scores with all keys, the codes of the
//              probabilities, y (int8_rows.h). What is between the two products stays in scratch: in L1 for 500 tokens,
//              in L2 for 10000
//
// Many rows of a key head share what is packed. For few rows nothing is kept packed: see few_int8_queries.h.
//
// Included by a translation unit after its target pragma, like outer_linear.h, whose tiles it uses, and int8_rows.h.
#pragma once

namespace octavo {
namespace {

// `Products`: see heads.h.
template <class Score, class Weighted, class Products = OuterProducts>
struct Int8Attention {
  using V = Vec;
  static constexpr int64_t kRows = Products::kRows;
  using Rows = Int8Rows<Score, Weighted, kRows>;
  static constexpr int64_t kUnit = Score::kElements;

  // `packed`, for one key head.
  struct Tokens {
    int64_t count;             // S rounded up to a multiple of 32; tokens past S have scale 0
    int64_t panel;             // bytes of 32 packed keys
    char *keys, *values;       // [count / 32][D / u][32][u], [Dv / 32][count / u][32][u]
    float *k_scale, *v_scale;  // [count]

    Tokens(const Attention& a, int64_t key_head)
        : count(whole(a.S)),
          panel(Products::read(Rows::units(a.D)) * kBlockN * kUnitBytes),
          keys(a.packed + key_head * packed(a)) {
      values = keys + count / kBlockN * panel;
      k_scale = reinterpret_cast<float*>(values + steps() * whole(a.Dv) * kUnitBytes);
      v_scale = k_scale + count;
    }
    int64_t steps() const { return count / kUnit; }  // of values
    char* values_from(int64_t s, int64_t column) const {
      return values + column / kBlockN * steps() * kBlockN * kUnitBytes +
             in_panel(steps(), s / kUnit, column % kBlockN);
    }
  };

  static size_t packed(const Attention& a) {
    return whole(a.S) * (Products::read(Rows::units(a.D)) * kUnitBytes + whole(a.Dv) * Weighted::kCodeBytes +
                         2 * sizeof(float)) +
           Products::kPast * kBlockN * kUnitBytes;
  }

  static void tokens(const Attention& a, int64_t key_head, int64_t s0, int64_t s1, void* memory) {
    const Tokens to(a, key_head);
    auto* const codes = static_cast<int8_t*>(memory);
    const int64_t batch = key_head / a.KV, head = key_head % a.KV, width = whole(a.Dv);
    for (int64_t s = s0; s < s1; s += kBlockN) {
      const int64_t rows = min64(kBlockN, s1 - s);
      fetch_next_tokens(a.k, Rows::bytes_of(a.k, a.k_scale), a.D, batch, head, s, a.S);
      fetch_next_tokens(a.v, Rows::bytes_of(a.v, a.v_scale), a.Dv, batch, head, s, a.S);
      Rows::codes_of(a.k, a.k_scale, a.D, batch, head, s, rows, codes, a.D, to.k_scale + s, 1);
      lay_codes_across<Score>(codes, a.D, rows, a.D, to.keys + s / kBlockN * to.panel);
      Rows::codes_of(a.v, a.v_scale, a.Dv, batch, head, s, rows, codes, width, to.v_scale + s, 0);
      for (int64_t column = 0; column < width; column += kStrip)
        for (int64_t j = 0; j < kBlockN; j += kUnit) {
          const int8_t* values[kUnit];
          for (int64_t u = 0; u < kUnit; u++) values[u] = codes + (j + u) * width + column;
          V::I w[2];
          Weighted::strip(values, kStrip, w);
          Weighted::in_order(w);
          char* const units = to.values_from(s + j, column);
          V::store_units(units, w[0]), V::store_units(units + kStripBytes / 2, w[1]);
        }
    }
  }

  struct Scratch {
    int64_t ldp;
    int32_t* scores;  // [tokens / 32][kRows][32]; fp32 after the softmax's first pass
    int32_t* y;       // [kRows][32]
    char *q, *p;      // units: [kRows][a row of q], [kRows][ldp]
    int8_t* codes;    // [kRows][D]

    Scratch(const Attention& a, void* memory) : ldp(Rows::bytes_of_codes(a)), scores(static_cast<int32_t*>(memory)) {
      y = scores + kRows * whole(a.S);
      q = reinterpret_cast<char*>(y + kRows * kBlockN);
      p = q + kRows * Rows::bytes_of_units(a);
      codes = reinterpret_cast<int8_t*>(p + kRows * ldp);
    }
    static size_t bytes(const Attention& a) {
      const Scratch at(a, nullptr);
      return kRows * ((whole(a.S) + kBlockN) * sizeof(int32_t) + Rows::bytes_of_units(a) + at.ldp + a.D);
    }
  };

  static int64_t most_rows(const Attention& a) { return Products::rows_next_to(a.S); }

  static size_t scratch(const Attention& a) { return max64(Scratch::bytes(a), kBlockN * max64(a.D, whole(a.Dv))); }

  static void rows(const Attention& a, int64_t key_head, int64_t r0, int64_t r1, void* memory) {
    const Tokens tokens(a, key_head);
    const Scratch scratch(a, memory);
    const typename Rows::Queries q(a, key_head, r0, r1, scratch.q, scratch.codes);
    const typename Rows::Part part = Rows::part_of(a, tokens.k_scale, tokens.v_scale, q);
    const typename Products::InUse in_use;
    const int64_t of_keys = Products::read(Rows::units(a.D));
    for (int64_t s = part.first; s < part.last; s += kBlockN)
      Products::template multiply<Score>(q.count,
                                         {q.units, q.ldq, kUnitBytes, tokens.keys + s / kBlockN * tokens.panel,
                                          of_keys * kStripBytes, of_keys, nullptr},
                                         scratch.scores + s * kRows);
    float scale[kRows];
    Rows::softmax(a, tokens.k_scale, tokens.v_scale, q, part, scratch.scores, kRows, scratch.p, scratch.ldp, scale);
    const int64_t steps = (part.last - part.first) / kUnit, of_values = Products::read(steps);
    for (int64_t i = 0; i < q.count; i++)
      memset(scratch.p + i * scratch.ldp + part.last * Weighted::kCodeBytes, 0, (of_values - steps) * kUnitBytes);
    for (int64_t n = 0; n < a.Dv; n += kBlockN) {
      Products::template multiply<Weighted>(
          q.count,
          {scratch.p + part.first * Weighted::kCodeBytes, scratch.ldp, kUnitBytes, tokens.values_from(part.first, n),
           tokens.steps() * kStripBytes, of_values, nullptr},
          scratch.y);
      for (int64_t i = 0; i < q.count; i++)
        Rows::store(a, result_row(a, q.places[i]), n, scratch.y + i * kBlockN, scale[i]);
    }
  }
};

}  // namespace
}  // namespace octavo
