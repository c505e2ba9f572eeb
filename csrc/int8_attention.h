// Attention with both products in int8, by outer products, a few rows of the query at a time.
//
//     tokens   32 keys are quantized, unless they are codes, and laid across, [D / u][32 keys][u], as a linear layer's
//              rows of W are (outer_linear.h); 32 values too, [S / u][32 columns][u] for each 32 columns of v, where
//              the u tokens of a unit are u rows as they lie
//     rows     up to 12: their codes, their scores with all keys, the probabilities' codes, y. What is between the two
//              products stays in scratch, which is in L1 for 500 tokens and in L2 for 10000
//
// Each value of e^(score - largest) * (scale of v) is computed once and kept. Its sum over the row divides y at the
// end, not the probabilities: a factor of the whole row changes no code.
//
// What the mask forbids to all of the rows at either end of the tokens is passed over where that changes no bit
// (mask.h).
//
// Included by a translation unit after its target pragma, like outer_linear.h, whose tiles it uses, and heads.h.
#pragma once

namespace octavo {
namespace {

// `Score` is the unit of q times k, `Weighted` of probabilities times v, which beyond what linear layers ask of it has
//     kCodeBytes     of a code in a unit
//     store_codes    a vector of whole numbers, as such codes
//     beside         units of a column each: of kElements rows of codes, `width` apart
template <class Score, class Weighted>
struct Int8Attention {
  using V = Vec;
  static constexpr int64_t kUnit = Score::kElements;
  static constexpr int64_t kVector = V::kLanes * kUnit;
  static constexpr int64_t kVectorBytes = V::kLanes * kUnitBytes;
  static_assert(Weighted::kElements == kUnit && Weighted::kCodeBytes * kUnit == kUnitBytes);

  static int64_t units(int64_t elements) { return ceil_div(elements, kUnit); }

  // What `packed` holds of one key head.
  struct Tokens {
    int64_t count;             // S, and tokens up to the next multiple of 32: their scale is 0
    int64_t panel;             // bytes of 32 keys
    char *keys, *values;       // [count / 32][D / u][32][u], [Dv / 32][count / u][32][u]
    float *k_scale, *v_scale;  // [count]

    Tokens(const Attention& a, int64_t key_head)
        : count(whole(a.S)), panel(units(a.D) * kBlockN * kUnitBytes), keys(a.packed + key_head * packed(a)) {
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
    return whole(a.S) * (units(a.D) * kUnitBytes + whole(a.Dv) * Weighted::kCodeBytes + 2 * sizeof(float));
  }

  // -- tokens ----------------------------------------------------------------------------------------------------

  static void tokens(const Attention& a, int64_t key_head, int64_t s0, int64_t s1, void* memory) {
    const Tokens to(a, key_head);
    auto* const codes = static_cast<int8_t*>(memory);
    const int64_t batch = key_head / a.KV, head = key_head % a.KV;
    for (int64_t s = s0; s < s1; s += kBlockN) {
      const int64_t rows = min64(kBlockN, s1 - s);
      fetch_next_tokens(a.k, bytes_of(a.k, a.k_scale), a.D, batch, head, s, a.S);
      fetch_next_tokens(a.v, bytes_of(a.v, a.v_scale), a.Dv, batch, head, s, a.S);
      for (int64_t j = 0; j < kBlockN; j++) to.k_scale[s + j] = to.v_scale[s + j] = 0;
      codes_of(a.k, a.k_scale, a.D, batch, head, s, rows, codes, a.D, to.k_scale + s, 1);
      lay_codes_across<Score>(codes, a.D, rows, a.D, to.keys + s / kBlockN * to.panel);
      codes_of(a.v, a.v_scale, a.Dv, batch, head, s, rows, codes, whole(a.Dv), to.v_scale + s, 0);
      for (int64_t column = 0; column < whole(a.Dv); column += V::kLanes)
        for (int64_t j = 0; j < kBlockN; j += kUnit)
          V::store_units(to.values_from(s + j, column),
                         Weighted::beside(codes + j * whole(a.Dv) + column, whole(a.Dv)));
    }
  }

  static int64_t bytes_of(const Heads& x, const Heads& x_scale) { return x_scale.x ? 1 : size_of(x.type); }

  // Tokens of x from s on, rows of `size` -> codes, `step` apart, and scales: quantized, unless x has scales.
  static void codes_of(const Heads& x, const Heads& x_scale, int64_t size, int64_t batch, int64_t head, int64_t s,
                       int64_t rows, int8_t* codes, int64_t step, float* scale, float of_zeros) {
    if (!x_scale.x) {
      const auto row = [&](int64_t j) { return head_row(x, batch, head, s + j); };
      return quantize(rows, row, x.type, size, codes, step, scale, of_zeros);
    }
    for (int64_t j = 0; j < rows; j++) {
      memcpy(codes + j * step, row_of<int8_t>(x, batch, head, s + j), size);
      scale[j] = *row_of<float>(x_scale, batch, head, s + j);
    }
  }

  // Rows that lie anywhere -> codes, `step` apart, and scales, `of_zeros` for a row of zeros. In two passes, for what
  // is found across the lanes of a vector takes long, and the next row need not wait for it.
  template <class RowOf>
  static void quantize(int64_t rows, const RowOf& row_of, Float type, int64_t K, int8_t* codes, int64_t step,
                       float* scale, float of_zeros) {
    for (int64_t i = 0; i < rows; i++) scale[i] = RowKernels<V>::amax_of(row_of(i), type, K) / kQmax;
    for (int64_t i = 0; i < rows; i++) {
      const bool zeros = scale[i] == 0;
      RowKernels<V>::codes_of(row_of(i), type, K, zeros ? 1 : scale[i], codes + i * step);
      if (zeros) scale[i] = of_zeros;
    }
  }

  // -- rows ------------------------------------------------------------------------------------------------------

  struct Scratch {
    int64_t ldq, ldp;  // odd multiples of a cache line, so that rows do not all fall into the same sets of the cache
    int32_t* scores;   // [tokens / 32][12][32]; after the softmax's first pass fp32
    int32_t* y;        // [12][32]
    char *q, *p;       // [12][ldq], [12][ldp]: units
    int8_t* codes;     // [12][D]
    float scale[kAttentionRows];
    int32_t excess[kAttentionRows];

    Scratch(const Attention& a, void* memory)
        : ldq(padded_row(ceil_div(a.D, kVector) * kVectorBytes)),
          ldp(padded_row(whole(a.S) * Weighted::kCodeBytes)),
          scores(static_cast<int32_t*>(memory)) {
      y = scores + kAttentionRows * whole(a.S);
      q = reinterpret_cast<char*>(y + kAttentionRows * kBlockN);
      p = q + kAttentionRows * ldq;
      codes = reinterpret_cast<int8_t*>(p + kAttentionRows * ldp);
    }
    static size_t bytes(const Attention& a) {
      const Scratch at(a, nullptr);
      return kAttentionRows * ((whole(a.S) + kBlockN) * sizeof(int32_t) + at.ldq + at.ldp + a.D);
    }
    char* codes_from(int64_t i, int64_t s) const { return p + i * ldp + s * Weighted::kCodeBytes; }
  };

  static size_t scratch(const Attention& a) { return max64(Scratch::bytes(a), kBlockN * max64(a.D, whole(a.Dv))); }

  static void rows(const Attention& a, int64_t key_head, int64_t r0, int64_t r1, void* memory) {
    const Tokens tokens(a, key_head);
    Scratch scratch(a, memory);
    const int64_t count = r1 - r0, batch = key_head / a.KV;
    Place places[kAttentionRows];
    find_places(a, key_head, r0, r1, places);
    const auto q_row = [&](int64_t i) { return query_row(a, batch, places[i]); };
    for (int64_t i = 0; i < count; i++) fetch(q_row(i), size_of(a.q.type) * a.D);
    quantize(count, q_row, a.q.type, a.D, scratch.codes, a.D, scratch.scale, 1);
    for (int64_t i = 0; i < count; i++) {
      const int8_t* const codes = scratch.codes + i * a.D;
      lay_row<Score>(codes, a.D, scratch.q + i * scratch.ldq);
      scratch.scale[i] *= a.scaling;
      scratch.excess[i] = excess_of<Score>(codes, a.D);
    }
    const Part part = part_of(a, tokens, scratch.scale, places, count);
    for (int64_t s = part.first; s < part.last; s += kBlockN)
      outer_tile_of<Score>(count,
                           {scratch.q, scratch.ldq, kUnitBytes, tokens.keys + s / kBlockN * tokens.panel,
                            units(a.D) * kStripBytes, units(a.D), nullptr},
                           scratch.scores + s * kAttentionRows, false);
    SoftmaxRow softmax[kAttentionRows];
    for (int64_t i = 0; i < count; i++) softmax[i] = softmax_row(a, tokens, part, scratch, i, places[i].of_mask);
    Softmax<Weighted>::run(softmax, count);
    for (int64_t i = 0; i < count; i++) scratch.scale[i] = Softmax<Weighted>::scale_of(softmax[i]);
    for (int64_t n = 0; n < a.Dv; n += kBlockN) {
      outer_tile_of<Weighted>(
          count,
          {scratch.codes_from(0, part.first), scratch.ldp, kUnitBytes, tokens.values_from(part.first, n),
           tokens.steps() * kStripBytes, (part.last - part.first) / kUnit, nullptr},
          scratch.y, false);
      for (int64_t i = 0; i < count; i++)
        store_y(a, result_row(a, places[i]), n, scratch.y + i * kBlockN, scratch.scale[i]);
    }
  }

  // Sums -> y[n : n + 32] of a row that begins at element `row`.
  static void store_y(const Attention& a, int64_t row, int64_t n, const int32_t* sums, float scale) {
    const int64_t end = min64(n + kBlockN, a.Dv);
    for (; n < end; n += V::kLanes, sums += V::kLanes)
      V::store(element(a.y, a.y_type, row + n), a.y_type, static_cast<int>(min64(V::kLanes, end - n)),
               V::mul(V::from_sums(sums, 0), V::set1(scale)));
  }

  // -- masks -----------------------------------------------------------------------------------------------------

  // Tokens [first, last), multiples of 32, outside of which each probability of rows [r0, r1) is 0.
  struct Part {
    int64_t first, last;
    bool trusted;  // so is each of a row outside of what its mask allows
  };

  static Part part_of(const Attention& a, const Tokens& tokens, const float* q_scale, const Place* places,
                      int64_t count) {
    const Part all{0, tokens.count, false};
    const Mask& m = a.mask;
    if (m.kind == Mask::Kind::none) return all;
    int64_t first = a.S, last = 0;
    for (int64_t i = 0; i < count; i++) {
      const Allowed& row = m.allowed[places[i].of_mask];
      if (!row.certain) return all;
      if (row.first < row.last) first = min64(first, row.first), last = max64(last, row.last);
    }
    // What is not finite is NaN in the result, times 0 too.
    if (!std::isfinite(RowKernels<V>::amax_of(tokens.v_scale, Float::f32, a.S))) return all;
    if (m.kind != Mask::Kind::boolean) {
      const float largest = RowKernels<V>::amax_of(tokens.k_scale, Float::f32, a.S) *
                            RowKernels<V>::amax_of(q_scale, Float::f32, count) * 16384.0f * static_cast<float>(a.D);
      if (!(largest < MaskRows::reach(m.kind)) || (a.has_softcap && a.softcap == 0)) return all;
    }
    if (first >= last) return {0, 0, true};
    return {first / kBlockN * kBlockN, whole(last), true};
  }

  // Row i, whose sums are in scratch. The codes of what its own mask forbids, and only others' allow, are zeros.
  static SoftmaxRow softmax_row(const Attention& a, const Tokens& tokens, const Part& part, Scratch& scratch, int64_t i,
                                int64_t of_mask) {
    SoftmaxRow row{};
    row.x = reinterpret_cast<float*>(scratch.scores) + i * kBlockN, row.step = kAttentionRows * kBlockN;
    row.excess = scratch.excess[i], row.scale = scratch.scale[i];
    row.k_scale = tokens.k_scale, row.v_scale = tokens.v_scale;
    row.first = part.first, row.last = min64(part.last, a.S);
    row.has_softcap = a.has_softcap, row.softcap = a.softcap;
    row.codes = scratch.codes_from(i, 0);
    if (a.mask.kind != Mask::Kind::none) {
      const Allowed& allowed = a.mask.allowed[of_mask];
      if (part.trusted && allowed.plain) {
        row.first = allowed.first, row.last = allowed.last;
        const bool some = row.first < row.last;
        const int64_t from = some ? row.first / kBlockN * kBlockN : part.last, to = some ? whole(row.last) : part.last;
        memset(scratch.codes_from(i, part.first), 0, (from - part.first) * Weighted::kCodeBytes);
        memset(scratch.codes_from(i, to), 0, (part.last - to) * Weighted::kCodeBytes);
      } else {
        row.kind = a.mask.kind, row.mask = MaskRows::row(a.mask, of_mask);
      }
    }
    return row;
  }
};

}  // namespace
}  // namespace octavo
