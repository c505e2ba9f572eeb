// Attention with both products in int8, for AVX-512: by outer products, a few rows of the query at a time.
//
//     tokens   32 keys are quantized and laid across, [D / 4][32 keys][4], as a linear layer's rows of W are; 32 values
//              too, [S / 4][32 columns][4] for each 32 columns of v, where four tokens are four rows as they lie
//     rows     up to 12: their codes, their scores with all keys, the probabilities' codes, y. What is between the two
//              products stays in scratch, which is in L1 for 500 tokens and in L2 for 10000
//
// Each value of e^(score - largest) * (scale of v) is computed once and kept. Its sum over the row divides y at the
// end, not the probabilities: a factor of the whole row changes no code.
//
// What the mask forbids to all of the rows at either end of the tokens (the future, what left a window, padding) is
// passed over where that changes no bit: see `columns`.
//
// Included by a translation unit after its target pragma, like outer_linear.h, whose tiles it uses.
#pragma once

namespace octavo {
namespace {

// `Score` is the unit of q times k, `Weighted` of probabilities times v.
template <class V, class Score, class Weighted>
struct AttentionKernels {
  using F = typename V::F;

  // What `packed` holds of one key head.
  struct Tokens {
    int64_t count;             // S, and tokens up to the next multiple of 32: their scale is 0
    int64_t panel;             // bytes of 32 keys
    char *keys, *values;       // [count / 32][D / 4][32][4], [Dv / 32][count / 4][32][4]
    float *k_scale, *v_scale;  // [count]

    Tokens(const Attention& a, int64_t key_head)
        : count(whole(a.S)), panel(ceil_div(a.D, 4) * 4 * kBlockN), keys(a.packed + key_head * packed(a)) {
      values = keys + count / kBlockN * panel;
      k_scale = reinterpret_cast<float*>(values + count * whole(a.Dv));
      v_scale = k_scale + count;
    }
  };

  static int64_t whole(int64_t count) { return ceil_div(count, kBlockN) * kBlockN; }

  static size_t packed(const Attention& a) {
    return whole(a.S) * (ceil_div(a.D, 4) * 4 + whole(a.Dv) + 2 * sizeof(float));
  }

  // -- tokens ----------------------------------------------------------------------------------------------------

  static void tokens(const Attention& a, int64_t key_head, int64_t s0, int64_t s1, void* memory) {
    const Tokens to(a, key_head);
    auto* const codes = static_cast<int8_t*>(memory);
    for (int64_t s = s0; s < s1; s += kBlockN) {
      const int64_t rows = min64(kBlockN, s1 - s);
      for (int64_t j = 0; j < kBlockN; j++) to.k_scale[s + j] = to.v_scale[s + j] = 0;
      for (int64_t j = 0; j < rows; j++)
        to.k_scale[s + j] = quantize(head_row(a.k, key_head, a.KV, s + j), a.k.type, a.D, codes + j * a.D);
      lay_across<Score>(codes, a.D, rows, a.D, to.keys + s / kBlockN * to.panel);
      for (int64_t j = 0; j < rows; j++)
        to.v_scale[s + j] = quantize(head_row(a.v, key_head, a.KV, s + j), a.v.type, a.Dv, codes + j * whole(a.Dv));
      lay_by_fours(codes, whole(a.Dv), to.values + s * kBlockN, to.count * kBlockN);
    }
  }

  static float quantize(const void* x, Float type, int64_t K, int8_t* codes) {
    float scale;
    RowKernels<V>::quantize_token({1, K, x, type, codes, &scale}, 0, 1);
    return scale;
  }

  // Row `token` of head `head`, counted over the batch.
  static const void* head_row(const Heads& x, int64_t head, int64_t heads, int64_t token) {
    return element(x.x, x.type, head / heads * x.batch_step + head % heads * x.head_step + token * x.token_step);
  }

  // 32 rows of `width` codes, each 32 columns -> [8][32 columns][4 rows], `step` bytes apart.
  static void lay_by_fours(const int8_t* codes, int64_t width, char* panels, int64_t step) {
    for (int64_t column = 0; column < width; column += 16) {
      char* to = panels + column / kBlockN * step + column % kBlockN * 4;
      for (int64_t row = 0; row < kBlockN; row += 4, to += 4 * kBlockN) {
        const int8_t* from = codes + row * width + column;
        const __m128i r0 = load16(from), r1 = load16(from + width), r2 = load16(from + 2 * width),
                      r3 = load16(from + 3 * width);
        const __m128i low01 = _mm_unpacklo_epi8(r0, r1), high01 = _mm_unpackhi_epi8(r0, r1);
        const __m128i low23 = _mm_unpacklo_epi8(r2, r3), high23 = _mm_unpackhi_epi8(r2, r3);
        store16(to, _mm_unpacklo_epi16(low01, low23)), store16(to + 16, _mm_unpackhi_epi16(low01, low23));
        store16(to + 32, _mm_unpacklo_epi16(high01, high23)), store16(to + 48, _mm_unpackhi_epi16(high01, high23));
      }
    }
  }

  static __m128i load16(const int8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static void store16(char* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }

  // -- rows ------------------------------------------------------------------------------------------------------

  struct Scratch {
    int64_t ldq, ldp;  // odd multiples of a cache line, so that rows do not all fall into the same sets of the cache
    int32_t* scores;   // [tokens / 32][12][32]; after the softmax's first pass fp32
    int32_t* y;        // [12][32]
    int8_t *q, *p;     // [12][ldq], [12][ldp]
    float scale[kAttentionRows];
    int32_t excess[kAttentionRows];

    Scratch(const Attention& a, void* memory)
        : ldq(padded(a.D)), ldp(padded(a.S)), scores(static_cast<int32_t*>(memory)) {
      y = scores + kAttentionRows * whole(a.S);
      q = reinterpret_cast<int8_t*>(y + kAttentionRows * kBlockN);
      p = q + kAttentionRows * ldq;
    }
    static int64_t padded(int64_t count) { return ceil_div(count, 128) * 128 + 64; }
    static size_t bytes(const Attention& a) {
      return kAttentionRows * ((whole(a.S) + kBlockN) * sizeof(int32_t) + padded(a.D) + padded(a.S));
    }
  };

  static size_t scratch(const Attention& a) { return max64(Scratch::bytes(a), kBlockN * max64(a.D, whole(a.Dv))); }

  // Row r of a key head: whose it is.
  struct Place {
    int64_t batch, head, query;
    Place(const Attention& a, int64_t key_head, int64_t r) {
      const int64_t shared = a.H / a.KV;
      batch = key_head / a.KV, head = key_head % a.KV * shared + r % shared, query = r / shared;
    }
  };

  static void rows(const Attention& a, int64_t key_head, int64_t r0, int64_t r1, void* memory) {
    const Tokens tokens(a, key_head);
    Scratch scratch(a, memory);
    const int64_t count = r1 - r0;
    for (int64_t i = 0; i < count; i++) {
      const Place at(a, key_head, r0 + i);
      int8_t* const codes = scratch.q + i * scratch.ldq;
      scratch.scale[i] =
          quantize(head_row(a.q, at.batch * a.H + at.head, a.H, at.query), a.q.type, a.D, codes) * a.scaling;
      scratch.excess[i] = excess_of<Score>(codes, a.D);
    }
    const Columns part = columns(a, tokens, scratch.scale, key_head, r0, r1);
    for (int64_t s = part.first; s < part.last; s += kBlockN)
      outer_tile_of<Score, kAttentionRows>(count, scratch.q, scratch.ldq, tokens.keys + s / kBlockN * tokens.panel,
                                           a.D / 4, a.D % 4, scratch.scores + s * kAttentionRows, false, nullptr);
    for (int64_t i = 0; i < count; i++)
      scratch.scale[i] = probabilities(a, tokens, part, scratch, i, mask_row(a, key_head, r0 + i));
    for (int64_t n = 0; n < a.Dv; n += kBlockN) {
      outer_tile_of<Weighted, kAttentionRows>(count, scratch.p + part.first, scratch.ldp,
                                              tokens.values + (n * tokens.count + part.first * kBlockN),
                                              (part.last - part.first) / 4, 0, scratch.y, false, nullptr);
      for (int64_t i = 0; i < count; i++)
        store_y(a, Place(a, key_head, r0 + i), n, scratch.y + i * kBlockN, V::set1(scratch.scale[i]));
    }
  }

  static void store_y(const Attention& a, const Place& at, int64_t n, const int32_t* sums, F scale) {
    const int64_t row = ((at.batch * a.H + at.head) * a.T + at.query) * a.Dv, end = min64(n + kBlockN, a.Dv);
    for (; n < end; n += V::kLanes, sums += V::kLanes)
      V::store(element(a.y, a.y_type, row + n), a.y_type, static_cast<int>(min64(V::kLanes, end - n)),
               V::mul(V::from_sums(sums, 0), scale));
  }

  // -- masks -----------------------------------------------------------------------------------------------------

  static Float float_of(Mask::Kind kind) {
    return kind == Mask::Kind::f32 ? Float::f32 : kind == Mask::Kind::bf16 ? Float::bf16 : Float::f16;
  }

  static const void* mask_row(const Attention& a, int64_t key_head, int64_t r) {
    const Place at(a, key_head, r);
    const Mask& m = a.mask;
    const int64_t i = at.batch * m.batch_step + at.head * m.head_step + at.query * m.row_step;
    return m.kind == Mask::Kind::boolean ? static_cast<const char*>(m.x) + i : element(m.x, float_of(m.kind), i);
  }

  // A finite entry forbids as well as -inf does where another entry of its row is so far above it that e^(difference)
  // is 0: entries <= `never` do, next to one >= -`reach`, if no score is as large as `reach`.
  struct Limits {
    float never, reach;
  };
  static Limits limits_of(Mask::Kind kind) {
    return kind == Mask::Kind::f16 ? Limits{-6e4f, 1e4f} : Limits{-1e30f, 1e29f};
  }

  // Which of up to 16 entries of a row allow something. NaN does, for it reaches the result.
  static __mmask16 allowed(const void* row, Mask::Kind kind, int64_t s, int count) {
    if (kind == Mask::Kind::boolean)
      return _mm_test_epi8_mask(_mm_maskz_loadu_epi8(mask16(count), static_cast<const char*>(row) + s),
                                _mm_set1_epi8(-1));
    const F entries = V::load(element(row, float_of(kind), s), float_of(kind), count);
    return _mm512_mask_cmp_ps_mask(mask16(count), entries, V::set1(limits_of(kind).never), _CMP_NLE_UQ);
  }

  // The first entry that allows something, or S.
  static int64_t first_allowed(const void* row, Mask::Kind kind, int64_t S) {
    for (int64_t s = 0; s < S; s += 16) {
      const unsigned found = allowed(row, kind, s, static_cast<int>(min64(16, S - s)));
      if (found) return s + __builtin_ctz(found);
    }
    return S;
  }

  // Where the last one ends, or `from`, after which is looked.
  static int64_t last_allowed(const void* row, Mask::Kind kind, int64_t from, int64_t S) {
    for (int64_t s = (S - 1) / 16 * 16; s + 16 > from; s -= 16) {
      const unsigned found = allowed(row, kind, s, static_cast<int>(min64(16, S - s)));
      if (found) return max64(from, s + 32 - __builtin_clz(found));
    }
    return from;
  }

  // Tokens [first, last), multiples of 32, outside of which each probability of rows [r0, r1) is 0.
  struct Columns {
    int64_t first, last;
  };

  static Columns columns(const Attention& a, const Tokens& tokens, const float* q_scale, int64_t key_head, int64_t r0,
                         int64_t r1) {
    const Columns all{0, tokens.count};
    const Mask::Kind kind = a.mask.kind;
    if (kind == Mask::Kind::none) return all;
    const Limits limits = limits_of(kind);
    int64_t first = a.S, last = 0;
    const void* before = nullptr;
    for (int64_t r = r0; r < r1; r++) {
      const void* const row = mask_row(a, key_head, r);
      if (row == before) continue;
      before = row;
      const int64_t own = first_allowed(row, kind, a.S);
      if (kind != Mask::Kind::boolean) {
        if (own == a.S) return all;  // all are equally far from what is allowed, and share the attention
        if (!(_mm512_cvtss_f32(V::load(element(row, float_of(kind), own), float_of(kind), 1)) >= -limits.reach))
          return all;
      }
      first = min64(first, own);
      last = last_allowed(row, kind, last, a.S);
    }
    const Columns part = first < last ? Columns{first / kBlockN * kBlockN, whole(last)} : Columns{0, 0};
    if (part.first == 0 && part.last == tokens.count) return all;
    // What is not finite is NaN in the result, times 0 too.
    if (!std::isfinite(RowKernels<V>::amax_of(tokens.v_scale, Float::f32, a.S))) return all;
    if (kind != Mask::Kind::boolean) {
      const float largest = RowKernels<V>::amax_of(tokens.k_scale, Float::f32, a.S) *
                            RowKernels<V>::amax_of(q_scale, Float::f32, r1 - r0) * 16384.0f * static_cast<float>(a.D);
      if (!(largest < limits.reach) || (a.has_softcap && a.softcap == 0)) return all;
    }
    return part;
  }

  // -- softmax ---------------------------------------------------------------------------------------------------

  // Scores of row i -> codes of probability * (scale of v), and what multiplies their product with v's codes.
  static float probabilities(const Attention& a, const Tokens& tokens, Columns part, Scratch& scratch, int64_t i,
                             const void* mask) {
    using Kind = Mask::Kind;
    const Kind kind = a.mask.kind;
    const F largest = kind == Kind::none      ? scores<Kind::none>(a, tokens, part, scratch, i, mask)
                      : kind == Kind::boolean ? scores<Kind::boolean>(a, tokens, part, scratch, i, mask)
                      : kind == Kind::f32     ? scores<Kind::f32>(a, tokens, part, scratch, i, mask)
                      : kind == Kind::bf16    ? scores<Kind::bf16>(a, tokens, part, scratch, i, mask)
                                              : scores<Kind::f16>(a, tokens, part, scratch, i, mask);
    float top = _mm512_reduce_max_ps(largest);
    if (top == -INFINITY) top = 0;  // nothing is allowed: zeros, but for NaN

    float* const row = row_of(scratch, i);
    const F shift = V::set1(top);
    F sum = V::set1(0), largest_weight = V::set1(0);
    for (int64_t s = part.first; s < part.last; s += kBlockN) {
      float* const x = row + s * kAttentionRows;
#pragma GCC unroll 2
      for (int half = 0; half < kBlockN; half += 16) {
        const F e = exp_of_negative(_mm512_sub_ps(_mm512_loadu_ps(x + half), shift));
        const F weight = V::mul(e, _mm512_loadu_ps(tokens.v_scale + s + half));
        sum = V::add(sum, e);
        largest_weight = V::largest(largest_weight, weight);
        _mm512_storeu_ps(x + half, weight);
      }
    }
    const float total = _mm512_reduce_add_ps(sum), step = V::across(largest_weight) / kQmax;
    const float scale = step == 0 ? 1 : step;
    const typename V::Divisor by(scale);
    int8_t* const codes = scratch.p + i * scratch.ldp;
    for (int64_t s = part.first; s < part.last; s += kBlockN) {
      const float* const x = row + s * kAttentionRows;
      V::store_codes(codes + s, _mm512_loadu_ps(x), by);
      V::store_codes(codes + s + 16, _mm512_loadu_ps(x + 16), by);
    }
    return total == 0 ? scale : scale / total;
  }

  static float* row_of(const Scratch& scratch, int64_t i) {
    return reinterpret_cast<float*>(scratch.scores) + i * kBlockN;
  }

  // Sums of products -> scores, in their place, -inf where nothing is allowed. Returns: the largest of each lane.
  template <Mask::Kind kind>
  static F scores(const Attention& a, const Tokens& tokens, Columns part, Scratch& scratch, int64_t i,
                  const void* mask) {
    F largest = V::set1(-INFINITY);
    for (int64_t s = part.first; s < part.last; s += kBlockN) {
      float* const x = row_of(scratch, i) + s * kAttentionRows;
#pragma GCC unroll 2
      for (int64_t half = 0; half < kBlockN; half += 16) {
        const int count = static_cast<int>(max64(0, min64(16, a.S - s - half)));
        const F scale = V::mul(V::set1(scratch.scale[i]), _mm512_loadu_ps(tokens.k_scale + s + half));
        F score = V::mul(V::from_sums(reinterpret_cast<const int32_t*>(x + half), scratch.excess[i]), scale);
        if (a.has_softcap) {
          const F cap = V::set1(a.softcap);
          score = V::mul(tanh_of(_mm512_div_ps(score, cap)), cap);
        }
        score = masked<kind>(score, mask, s + half, count);
        _mm512_storeu_ps(x + half, score);
        largest = _mm512_max_ps(score, largest);  // in this order of operands NaN is passed over
      }
    }
    return largest;
  }

  template <Mask::Kind kind>
  static F masked(F score, const void* mask, int64_t s, int count) {
    __mmask16 allowed = mask16(count);
    if constexpr (kind == Mask::Kind::boolean) {
      const __m128i entries = _mm_maskz_loadu_epi8(allowed, static_cast<const char*>(mask) + s);
      allowed = _mm_test_epi8_mask(entries, entries);
    } else if constexpr (kind != Mask::Kind::none) {
      score = V::add(score, V::load(element(mask, float_of(kind), s), float_of(kind), count));
    }
    return _mm512_mask_mov_ps(V::set1(-INFINITY), allowed, score);
  }
};

}  // namespace
}  // namespace octavo
