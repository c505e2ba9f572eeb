// Attention in float for AVX-512, by outer products, a few rows of the query at a time:
//
//     y = softmax(scaling * q k^T) v             sums and the softmax in fp32
//
//     tokens   32 keys are laid across, as units [D / u][32 keys][u] (outer_linear.h), and 32 values, [S / u][32
//              columns][u] for each 32 columns of v: u is 2 in bf16, whose products are of pairs, and 1 otherwise (fp16 is
//              widened to fp32 on the way)
//     rows     up to 12: their scores with all keys, e^(score - largest) as units, y. What is between the two products
//              stays in scratch
//
// The sum of the e^... divides y at the end. In bf16 they are rounded to it, as torch's kernel rounds them; the sum is
// of what they were before.
//
// Tokens that the mask forbids to all of the rows, at either end, are not looked at.
//
// Included by a translation unit after its target pragma, like outer_linear.h, whose tiles it uses, heads.h, mask.h and
// exponential.h.
#pragma once

namespace octavo {
namespace {

template <class V, class Unit>
struct FloatAttention {
  using F = typename V::F;
  using X = typename Unit::X;
  static constexpr int64_t kUnit = Unit::kElements;
  static constexpr int64_t kVector = 16 * kUnit;

  // What `packed` holds of one key head.
  struct Tokens {
    int64_t count;        // S, and zeros up to the next multiple of 32
    char *keys, *values;  // [count / 32][D / u][32][u], [Dv / 32][count / u][32][u]

    Tokens(const Attention& a, int64_t key_head) : count(whole(a.S)), keys(a.packed + key_head * packed(a)) {
      values = keys + count * units(a.D) * kUnitBytes;
    }
    char* keys_from(const Attention& a, int64_t s) const { return keys + s * units(a.D) * kUnitBytes; }
    char* values_from(int64_t s, int64_t column) const {
      return values + (column / kBlockN * (count / kUnit) + s / kUnit) * (kBlockN * kUnitBytes);
    }
  };

  static int64_t units(int64_t elements) { return ceil_div(elements, kUnit); }

  static size_t packed(const Attention& a) {
    return whole(a.S) * (units(a.D) * kUnitBytes + whole(a.Dv) * kUnitBytes / kUnit);
  }

  static void mask(const Attention& a, int64_t i0, int64_t i1) { MaskRows<V>::look(a.mask, a.S, i0, i1); }

  // -- tokens ----------------------------------------------------------------------------------------------------

  static void tokens(const Attention& a, int64_t key_head, int64_t s0, int64_t s1, void*) {
    const Tokens to(a, key_head);
    const int64_t batch = key_head / a.KV, head = key_head % a.KV;
    for (int64_t s = s0; s < s1; s += kBlockN) {
      const int64_t rows = min64(kBlockN, s1 - s);
      fetch_next_tokens(a, batch, head, s);
      const auto key = [&](int64_t j, int64_t d, auto... count) {
        return Unit::load_x(static_cast<const X*>(head_row(a.k, batch, head, s + j)) + d, count...);
      };
      lay_across<Unit>(key, rows, a.D, to.keys_from(a, s));
      for (int64_t column = 0; column < whole(a.Dv); column += 16)
        for (int64_t j = 0; j < kBlockN; j += kUnit)
          _mm512_storeu_si512(to.values_from(s + j, column) + column % kBlockN * kUnitBytes,
                              units_of(a, batch, head, s + j, s + rows, column));
    }
  }

  // 16 columns of v of the tokens of a unit, which begins at s. What is missing is zeros.
  static __m512i units_of(const Attention& a, int64_t batch, int64_t head, int64_t s, int64_t end, int64_t column) {
    const auto value = [&](int64_t token) { return static_cast<const X*>(head_row(a.v, batch, head, token)) + column; };
    const int count = static_cast<int>(max64(0, min64(16, a.Dv - column)));
    if (s >= end || count == 0) return _mm512_setzero_si512();
    if constexpr (kUnit == 2) {
      const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16(count), value(s)));
      if (s + 1 >= end) return first;
      const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16(count), value(s + 1)));
      return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
    } else {
      return Unit::load_x(value(s), count);
    }
  }

  // -- rows ------------------------------------------------------------------------------------------------------

  struct Scratch {
    int64_t ldq, ldp;  // bytes
    float* scores;     // [tokens / 32][12][32]
    float* y;          // [12][32]
    char *q, *p;       // [12][ldq], [12][ldp]: units

    Scratch(const Attention& a, void* memory)
        : ldq(padded_row(ceil_div(a.D, kVector) * 64)),
          ldp(padded_row(whole(a.S) * kUnitBytes / kUnit)),
          scores(static_cast<float*>(memory)) {
      y = scores + kAttentionRows * whole(a.S);
      q = reinterpret_cast<char*>(y + kAttentionRows * kBlockN);
      p = q + kAttentionRows * ldq;
    }
  };

  static size_t scratch(const Attention& a) {
    const Scratch at(a, nullptr);
    return kAttentionRows * ((whole(a.S) + kBlockN) * sizeof(float) + at.ldq + at.ldp);
  }

  // Tokens from `first`, a multiple of 32, up to `last`.
  struct Range {
    int64_t first, last;
    bool empty() const { return first >= last; }
  };

  static void rows(const Attention& a, int64_t key_head, int64_t r0, int64_t r1, void* memory) {
    const Tokens tokens(a, key_head);
    const Scratch scratch(a, memory);
    const int64_t count = r1 - r0, batch = key_head / a.KV;
    Place places[kAttentionRows];
    find_places(a, key_head, r0, r1, places);
    for (int64_t i = 0; i < count; i++) fetch(query_row(a, batch, places[i]), size_of(a.q.type) * a.D);
    for (int64_t i = 0; i < count; i++) {
      const X* q = static_cast<const X*>(query_row(a, batch, places[i]));
      char* to = scratch.q + i * scratch.ldq;
      for (int64_t d = 0; d < a.D; d += kVector, to += 64)
        _mm512_storeu_si512(to, Unit::load_x(q + d, static_cast<int>(min64(kVector, a.D - d))));
    }
    const Range all = range_of(a, places, count);
    for (int64_t s = all.first; s < all.last; s += kBlockN)
      outer_tile_of<Unit>(count, {scratch.q, scratch.ldq, kUnitBytes, tokens.keys_from(a, s), units(a.D), 0, nullptr},
                          scratch.scores + s * kAttentionRows, false);
    float top[kAttentionRows], total[kAttentionRows];
    for (int64_t i = 0; i < count; i++) top[i] = largest_score(a, scratch, i, places[i].of_mask);
    for (int64_t i = 0; i < count; i++) total[i] = exponentials(a, scratch, all, i, places[i].of_mask, top[i]);
    for (int64_t n = 0; n < a.Dv; n += kBlockN) {
      outer_tile_of<Unit>(count,
                          {scratch.p + all.first / kUnit * kUnitBytes, scratch.ldp, kUnitBytes,
                           tokens.values_from(all.first, n), (whole(all.last) - all.first) / kUnit, 0, nullptr},
                          scratch.y, false);
      for (int64_t i = 0; i < count; i++) {
        const bool nothing = nothing_allowed(a, places[i].of_mask);
        store_y(a, result_row(a, places[i]), n, scratch.y + i * kBlockN, nothing ? 0 : 1 / total[i]);
      }
    }
  }

  // Outside of which the mask forbids to all of these rows.
  static Range range_of(const Attention& a, const Place* places, int64_t count) {
    if (a.mask.kind == Mask::Kind::none) return {0, a.S};
    int64_t first = a.S, last = 0;
    for (int64_t i = 0; i < count; i++) {
      const Allowed& row = a.mask.allowed[places[i].of_mask];
      if (row.first < row.last) first = min64(first, row.first), last = max64(last, row.last);
    }
    return first < last ? Range{first / kBlockN * kBlockN, last} : Range{0, 0};
  }

  static bool nothing_allowed(const Attention& a, int64_t of_mask) {
    const Allowed row = allowed_of(a, of_mask);
    return row.first >= row.last;
  }

  static Allowed allowed_of(const Attention& a, int64_t of_mask) {
    return a.mask.kind == Mask::Kind::none ? Allowed{0, a.S, true, true} : a.mask.allowed[of_mask];
  }

  // Of row i. Scores that the mask forbids, next to others, become -inf.
  static float largest_score(const Attention& a, const Scratch& scratch, int64_t i, int64_t of_mask) {
    const Allowed row = allowed_of(a, of_mask);
    F most = V::set1(-INFINITY);
    for (int64_t s = row.first / kBlockN * kBlockN; s < row.last; s += kBlockN) {
      float* x = scores_of(scratch, i, s);
      const bool whole_block = row.plain && s >= row.first && s + kBlockN <= row.last;
      if (!whole_block) {
        for (int half = 0; half < kBlockN; half += 16)
          _mm512_storeu_ps(x + half, _mm512_mask_mov_ps(V::set1(-INFINITY), lanes(a, row, of_mask, s + half),
                                                        _mm512_loadu_ps(x + half)));
      }
      // In this order of operands NaN is passed over.
      most = _mm512_max_ps(_mm512_loadu_ps(x + 16), _mm512_max_ps(_mm512_loadu_ps(x), most));
    }
    return _mm512_reduce_max_ps(most);
  }

  static float* scores_of(const Scratch& scratch, int64_t i, int64_t s) {
    return scratch.scores + s * kAttentionRows + i * kBlockN;
  }

  // Those of 16 tokens from s on that may be attended to.
  static __mmask16 lanes(const Attention& a, const Allowed& row, int64_t of_mask, int64_t s) {
    const int before = static_cast<int>(max64(0, min64(16, row.first - s)));
    const int count = static_cast<int>(max64(0, min64(16, row.last - s)));
    const __mmask16 there = mask16(count) & ~mask16(before);
    if (row.plain) return there;
    return there & MaskRows<V>::template changes_nothing<Mask::Kind::boolean>(MaskRows<V>::row(a.mask, of_mask), s,
                                                                              count);
  }

  // e^(scaling * (score - top)) of row i -> units, zeros where `all` has more tokens. Returns: their sum.
  static float exponentials(const Attention& a, const Scratch& scratch, const Range& all, int64_t i, int64_t of_mask,
                            float top) {
    const Allowed row = allowed_of(a, of_mask);
    const bool nothing = nothing_allowed(a, of_mask);
    const int64_t from = nothing ? whole(all.last) : row.first / kBlockN * kBlockN,
                  to = nothing ? whole(all.last) : whole(row.last);
    char* const p = scratch.p + i * scratch.ldp;
    memset(p + bytes_of(all.first), 0, bytes_of(from - all.first));
    memset(p + bytes_of(to), 0, bytes_of(whole(all.last) - to));
    const F scaling = V::set1(a.scaling), shift = V::set1(top == -INFINITY ? 0 : top);
    F total = V::set1(0);
    for (int64_t s = from; s < to; s += kBlockN) {
      const float* x = scores_of(scratch, i, s);
      const F low = exp_of_negative(V::mul(scaling, _mm512_sub_ps(_mm512_loadu_ps(x), shift)));
      const F high = exp_of_negative(V::mul(scaling, _mm512_sub_ps(_mm512_loadu_ps(x + 16), shift)));
      total = V::add(total, V::add(low, high));
      char* const units = p + bytes_of(s);
      if constexpr (kUnit == 2) {
        _mm512_storeu_si512(units, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      } else {
        _mm512_storeu_ps(units, low), _mm512_storeu_ps(units + 64, high);
      }
    }
    return _mm512_reduce_add_ps(total);
  }

  static int64_t bytes_of(int64_t tokens) { return tokens / kUnit * kUnitBytes; }

  // Sums -> y[n : n + 32] of a row that begins at element `row`.
  static void store_y(const Attention& a, int64_t row, int64_t n, const float* sums, float scale) {
    const int64_t end = min64(n + kBlockN, a.Dv);
    for (; n < end; n += V::kLanes, sums += V::kLanes)
      V::store(element(a.y, a.y_type, row + n), a.y_type, static_cast<int>(min64(V::kLanes, end - n)),
               V::mul(_mm512_loadu_ps(sums), V::set1(scale)));
  }
};

}  // namespace
}  // namespace octavo
