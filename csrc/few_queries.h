// Attention in float for so few rows that one tile holds all that share a key head: decode, or a few draft tokens.
//
// Each key and each value is used once, so nothing is packed. Scores are dot products with keys in place
// (dot_linear.h). Values are multiplied in place, too: a token's values are a row of columns of y, and a unit of
// weights is broadcast (value_strips.h).
//
//     tokens   128 at a time: the rows' results with these tokens, not yet divided by the sum of weights (`packed`)
//     rows     the results with all tokens, combined by their largest scores (online softmax) -> y
//
// While keys are multiplied, their values are prefetched, and then the next keys: memory is never idle. Which tokens
// form a part depends on nothing but their number, so the number of threads changes no bit.
//
// If keys and values are codes, both products are of whole numbers, in int32: q and weights become 16-bit fixed-point
// numbers, and codes are widened to 16 bits, which takes a third of the instructions that widen them to bf16. (If q is
// fp32, codes are widened to fp32.)
//
// Included by a translation unit after its target pragma, like dot_linear.h, attention_rows.h and value_strips.h.
#pragma once

namespace octavo {
namespace {

// `Dot`: the dot product of a row of q and a key. `Unit`: the product of weights and values.
template <class Unit, class Dot>
struct FewQueries {
  using V = Vec;
  using X = typename Dot::X;       // of q, as `Dot` reads it
  using Stored = typename Dot::W;  // of keys and values: X, or codes
  static constexpr bool kCodes = std::is_same_v<Stored, int8_t>;
  using Tile = AttentionTile<Unit>;
  using Scratch = typename Tile::Scratch;
  using Strips = ValueStrips<Unit, Stored>;
  static constexpr int64_t kUnit = Unit::kElements;

  // The result with a part of the tokens: sums of weights times v, the largest score, the sum of weights.
  struct Part {
    float *y, *top, *total;  // [12][Dv rounded up to a multiple of 32], [12 of 16], [12 of 16]

    Part(const Attention& a, int64_t key_head, int64_t part) {
      y = reinterpret_cast<float*>(a.packed + key_head * packed(a) + part * bytes(a));
      top = y + kAttentionRows * whole(a.Dv), total = top + 16;
    }
    static int64_t bytes(const Attention& a) {
      return (kAttentionRows * whole(a.Dv) + 32) * static_cast<int64_t>(sizeof(float));
    }
  };

  static constexpr int64_t kLongestFixed = 512;  // the most products of such numbers and codes whose sum fits int32
  static bool take(const Attention& a) { return a.rows() <= kAttentionRows && (!Unit::kFixed || a.D <= kLongestFixed); }

  static size_t packed(const Attention& a) { return ceil_div(a.S, kAttentionTokens) * Part::bytes(a); }
  static size_t scratch(const Attention& a) {
    return Scratch::bytes(a, kAttentionTokens) + (kCodes ? 2 * kAttentionTokens * sizeof(float) : 0);
  }

  static void tokens(const Attention& a, int64_t key_head, int64_t s0, int64_t s1, void* memory) {
    const Tile tile(a, key_head, 0, a.rows());
    const Scratch scratch(a, kAttentionTokens, static_cast<char*>(memory));
    auto* const scales = reinterpret_cast<float*>(static_cast<char*>(memory) + Scratch::bytes(a, kAttentionTokens));
    float q_scale[kAttentionRows];
    for (int64_t i = 0; i < tile.count; i++) q_scale[i] = lay_query(a, tile, i, scratch);
    for (int64_t s = s0; s < s1; s += kAttentionTokens) {
      const Part to(a, key_head, s / kAttentionTokens);
      const int64_t end = min64(s + kAttentionTokens, s1);
      Tokens part{s, whole(end - s), nullptr, nullptr};
      if constexpr (kCodes) {
        copy_scales(a.k_scale, key_head / a.KV, key_head % a.KV, s, end, scales);
        copy_scales(a.v_scale, key_head / a.KV, key_head % a.KV, s, end, scales + kAttentionTokens);
        part.k_scale = scales, part.v_scale = scales + kAttentionTokens;
      }
      const auto range = tile.weigh(a, part, scratch, to.top, to.total,
                                    [&](const auto& range) { keys(a, tile, range, part, q_scale, scratch); });
      values(a, tile, range, s, scratch, to.y);
    }
  }

  // Combines all parts -> y: each is multiplied by e^(scaling * (its top - the largest)), which replaces its top.
  static void rows(const Attention& a, int64_t key_head, int64_t r0, int64_t r1, void*) {
    const Tile tile(a, key_head, r0, r1);
    const int64_t parts = ceil_div(a.S, kAttentionTokens);
    const auto part = [&](int64_t p) { return Part(a, key_head, p); };
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
        tile.store(a, i, n, sums, total);
      }
    }
  }

 private:
  // -- keys ------------------------------------------------------------------------------------------------------

  // Rows of q, `ldq` elements apart, and up to 32 keys, `ldk` apart. `next`: their values, `Dv` elements each, to be
  // prefetched; or null.
  struct Keys {
    const X* q;
    int64_t ldq;
    const Stored* k;
    int64_t ldk, tokens, D;
    Ahead<Stored> next;
    int64_t Dv;
  };

  // Products of the rows and the keys of `range` -> scores.
  static void keys(const Attention& a, const Tile& tile, const typename Tile::Range& range, const Tokens& tokens,
                   const float* q_scale, const Scratch& scratch) {
    const int64_t batch = tile.key_head / a.KV, head = tile.key_head % a.KV;
    const int64_t ldq = scratch.ldq / static_cast<int64_t>(sizeof(X));
    auto* const q = reinterpret_cast<X*>(scratch.q);
    const int64_t height = ceil_div(tile.count, ceil_div(tile.count, Dot::kTileM));
    for (int64_t s = range.first; s < range.last; s += kBlockN) {
      const int64_t count = min64(kBlockN, range.last - s);
      Keys in{q, ldq, row_of<Stored>(a.k, batch, head, s), a.k.token_step, count, a.D, {}, a.Dv};
      in.next = {row_of<Stored>(a.v, batch, head, s), a.v.token_step};
      for (int64_t i = 0; i < tile.count; i += height, in.q += height * ldq, in.next.row = nullptr)
        scores_of(min64(height, tile.count - i), in, scratch.scores_of(i, s - tokens.begin));
    }
    if constexpr (kCodes)
      for (int64_t i = 0; i < tile.count; i++)
        Tile::template scale<typename Dot::Sum>(tokens, range, scratch, i, q_scale[i]);
  }

  // Row i of q -> scratch, as `Dot` reads it. Returns its scale.
  static float lay_query(const Attention& a, const Tile& tile, int64_t i, const Scratch& scratch) {
    const void* const row = query_row(a, tile.key_head / a.KV, tile.places[i]);
    auto* const to = reinterpret_cast<X*>(scratch.q + i * scratch.ldq);
    const int64_t D = a.D;
    const Float type = a.q.type;
    if constexpr (Unit::kFixed) {
      const FixedPoint fixed(RowKernels<V>::amax_of(row, type, D));
      for (int64_t d = 0; d < D; d += kUnit * V::kLanes) {
        typename V::F x[kUnit];
        for (int64_t u = 0; u < kUnit; u++) {
          const int64_t at = min64(D, d + u * V::kLanes), count = min64(V::kLanes, D - at);
          x[u] = fixed.of(V::load(element(row, type, at), type, static_cast<int>(count)));
        }
        V::store_units(to + d, Unit::rounded(x));
      }
      return fixed.scale;
    } else {
      memcpy(to, row, D * sizeof(X));
      return 1;
    }
  }

  template <int MR = Dot::kTileM>
  OCTAVO_INLINE static void scores_of(int64_t rows, const Keys& in, float* scores) {
    if constexpr (MR > 1) {
      if (rows < MR) return scores_of<MR - 1>(rows, in, scores);
    }
    some_scores<MR>(in, reinterpret_cast<typename Dot::Sum*>(scores));
  }

  // scores[MR][32]. Past the last key, that one is repeated; its sums are not used.
  template <int MR>
  __attribute__((noinline)) static void some_scores(const Keys& in, typename Dot::Sum* scores) {
    const Stored *k = in.k, *next = in.next.row;
    for (int64_t left = in.tokens; left > 0; left -= kTileN, k += kTileN * in.ldk, scores += kTileN) {
      const int64_t last = min64(kTileN, left) - 1;
      const auto key = [&](int64_t j) { return k + min64(j, last) * in.ldk; };
      const Operands<Dot> tile{in.q, in.ldq, {key(0), key(1), key(2), key(3)}, in.D, {}, nullptr};
      for (int64_t j = 0; next && j <= last; j++, next += in.next.step) octavo::fetch(next, in.Dv * sizeof(Stored));
      typename Dot::Acc acc[MR][kTileN];
      zero<Dot, MR>(acc);
      int64_t d = 0;
      for (; d + Dot::kStep <= in.D; d += Dot::kStep) step<Dot, MR, false>(acc, tile, d);
      if (d < in.D) step<Dot, MR, false>(acc, tile, d, static_cast<int>(in.D - d));
      octavo::store<Dot, MR>(acc, scores, false);
    }
  }

  // -- values ----------------------------------------------------------------------------------------------------

  // Weights of the tokens of `range` times their values -> y [12][Dv rounded up to a multiple of 32].
  static void values(const Attention& a, const Tile& tile, const typename Tile::Range& range, int64_t begin,
                     const Scratch& scratch, float* y) {
    const int64_t batch = tile.key_head / a.KV, head = tile.key_head % a.KV, ldy = whole(a.Dv);
    const Stored* const v = row_of<Stored>(a.v, batch, head, range.first);
    const Stored* const next = row_of<Stored>(a.k, batch, head, range.first + kAttentionTokens);
    for (int64_t n = 0; n < a.Dv; n += kStrip)
      for (int64_t i = 0; i < tile.count; i += V::kRegisterRows)
        Strips::sums(min64(V::kRegisterRows, tile.count - i),
                     {scratch.units_of(i, range.first - begin),
                      scratch.ldp,
                      v + n,
                      a.v.token_step,
                      range.last - range.first,
                      a.Dv - n,
                      {next + n, a.k.token_step}},
                     y + i * ldy + n, ldy);
    if constexpr (Unit::kFixed)
      for (int64_t i = 0; i < tile.count; i++, y += ldy)
        for (int64_t n = 0; n < ldy; n += V::kLanes)
          V::store(y + n,
                   V::mul(V::from_sums(reinterpret_cast<const int32_t*>(y + n), 0), V::set1(scratch.p_scale[i])));
  }
};

}  // namespace
}  // namespace octavo
