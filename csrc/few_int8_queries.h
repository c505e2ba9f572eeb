// Attention with both products in int8, for so few rows that one tile holds all that share a key head: decode, or a few
// draft tokens. Each key and each value is used once, so keys are packed a block at a time, which stays in L1, and
// values are multiplied in place (value_strips.h):
//
//     tokens   keys -> their sums with the rows; keys and values that are not codes yet are quantized
//     rows     sums with all keys -> codes of the probabilities (int8_rows.h), whose scale is set by the largest of all
//     values   128 at a time: codes times values -> partial sums of y
//     join     all partial sums -> y
//
// Sums are whole numbers, so it makes no difference how they are split: y has the same bits as by int8_attention.h.
//
// Included by a translation unit after its target pragma, like int8_rows.h and value_strips.h.
#pragma once

namespace octavo {
namespace {

template <class Score, class Weighted>
struct FewInt8Queries {
  using V = Vec;
  using Rows = Int8Rows<Score, Weighted>;
  using Strips = ValueStrips<Weighted, int8_t>;
  static int64_t most_rows(const Attention&) { return kAttentionRows; }

  static int64_t parts_of(const Attention& a) { return ceil_div(a.S, kAttentionTokens); }

  // `packed`, for one key head.
  struct Packed {
    // Of all tokens: outside of [first, last) all codes are 0. `scale` is what each row's sums are multiplied by.
    struct Weights {
      int64_t first, last;
      float scale[kAttentionRows];
    };
    int64_t rows, ldp, ldy;
    Weights* weights;
    int32_t* scores;           // [tokens / 32][rows][32]
    float *k_scale, *v_scale;  // [tokens rounded up to a multiple of 32], padded with zeros
    int32_t* y;                // [parts][rows][ldy]
    char* p;                   // [rows][ldp]: units
    int8_t* values;            // [tokens][ldy], unless they are codes already

    Packed(const Attention& a, int64_t key_head) : Packed(a, a.packed + key_head * bytes(a)) {}
    static int64_t bytes(const Attention& a) {
      const Packed at(a, static_cast<char*>(nullptr));
      const int64_t values = a.v_scale.x ? 0 : whole(a.S) * at.ldy;
      return ceil_div(reinterpret_cast<intptr_t>(at.values) + values, 64) * 64;
    }
    int32_t* scores_of(int64_t s) const { return scores + s * rows; }
    int32_t* y_of(int64_t part, int64_t row) const { return y + (part * rows + row) * ldy; }

   private:
    Packed(const Attention& a, char* memory)
        : rows(a.rows()),
          ldp(Rows::bytes_of_codes(a)),
          ldy(whole(a.Dv)),
          weights(reinterpret_cast<Weights*>(memory)),
          scores(reinterpret_cast<int32_t*>(memory + 64)) {
      static_assert(sizeof(Weights) <= 64);
      k_scale = reinterpret_cast<float*>(scores + whole(a.S) * rows), v_scale = k_scale + whole(a.S);
      y = reinterpret_cast<int32_t*>(v_scale + whole(a.S));
      p = reinterpret_cast<char*>(y + parts_of(a) * rows * ldy);
      values = reinterpret_cast<int8_t*>(p + rows * ldp);
    }
  };

  static size_t packed(const Attention& a) { return Packed::bytes(a); }

  struct Scratch {
    char *q, *panel;  // units: [12][a row of q], [D / u][32 keys][u]
    int8_t* codes;    // [32][D]

    Scratch(const Attention& a, void* memory) : q(static_cast<char*>(memory)) {
      panel = q + kAttentionRows * Rows::bytes_of_units(a);
      codes = reinterpret_cast<int8_t*>(panel + Rows::units(a.D) * kBlockN * kUnitBytes);
    }
    static size_t bytes(const Attention& a) {
      return reinterpret_cast<intptr_t>(Scratch(a, nullptr).codes) + kBlockN * a.D;
    }
  };

  static size_t scratch(const Attention& a) { return Scratch::bytes(a); }

  static void tokens(const Attention& a, int64_t key_head, int64_t s0, int64_t s1, void* memory) {
    const Packed to(a, key_head);
    const Scratch scratch(a, memory);
    const typename Rows::Queries q(a, key_head, 0, to.rows, scratch.q, scratch.codes);
    for (int64_t s = s0; s < s1; s += kBlockN) {
      const int64_t count = min64(kBlockN, s1 - s);
      lay_keys(a, key_head, s, count, scratch, to.k_scale + s);
      outer_tile_of<Score>(
          q.count,
          {q.units, q.ldq, kUnitBytes, scratch.panel, Rows::units(a.D) * kStripBytes, Rows::units(a.D), nullptr},
          to.scores_of(s), false);
      keep_values(a, key_head, s, count, to);
    }
  }

  static void rows(const Attention& a, int64_t key_head, int64_t r0, int64_t r1, void* memory) {
    const Packed in(a, key_head);
    const Scratch scratch(a, memory);
    const typename Rows::Queries q(a, key_head, r0, r1, scratch.q, scratch.codes);
    const typename Rows::Part part = Rows::part_of(a, in.k_scale, in.v_scale, q);
    in.weights->first = part.first, in.weights->last = min64(part.last, a.S);
    Rows::softmax(a, in.k_scale, in.v_scale, q, part, in.scores, in.rows, in.p, in.ldp, in.weights->scale);
  }

  static void values(const Attention& a, int64_t key_head, int64_t s0, int64_t s1, void*) {
    const Packed in(a, key_head);
    for (int64_t s = s0; s < s1; s += kAttentionTokens) part_of_y(a, key_head, s, min64(s + kAttentionTokens, s1), in);
  }

  static void join(const Attention& a, int64_t key_head, int64_t r0, int64_t r1, void*) {
    const Packed in(a, key_head);
    Place places[kAttentionRows];
    find_places(a, key_head, r0, r1, places);
    for (int64_t i = 0; i < r1 - r0; i++)
      for (int64_t n = 0; n < a.Dv; n += kBlockN) {
        int32_t sums[kBlockN] = {};
        for (int64_t part = 0; part < parts_of(a); part++)
          for (int64_t j = 0; j < kBlockN; j++) sums[j] += in.y_of(part, i)[n + j];
        Rows::store(a, result_row(a, places[i]), n, sums, in.weights->scale[i]);
      }
  }

 private:
  static constexpr int64_t kFetchedAhead = 64;  // tokens

  static void part_of_y(const Attention& a, int64_t key_head, int64_t s0, int64_t s1, const Packed& in) {
    const int64_t first = max64(s0, in.weights->first), last = min64(s1, in.weights->last);
    const bool codes = a.v_scale.x;
    const int64_t ldv = codes ? a.v.token_step : in.ldy;
    const int8_t* const v =
        codes ? row_of<int8_t>(a.v, key_head / a.KV, key_head % a.KV, first) : in.values + first * ldv;
    for (int64_t n = 0; n < a.Dv; n += kStrip)
      for (int64_t i = 0; i < in.rows; i += V::kRegisterRows)
        Strips::sums(min64(V::kRegisterRows, in.rows - i),
                     {in.p + i * in.ldp + first * Weighted::kCodeBytes,
                      in.ldp,
                      v + n,
                      ldv,
                      last - first,
                      a.Dv - n,
                      {v + kFetchedAhead * ldv + n, ldv}},
                     in.y_of(s0 / kAttentionTokens, i) + n, in.ldy);
  }

  // Packs `count` keys from s on into scratch.panel, quantized if they are not codes, and stores their scales.
  static void lay_keys(const Attention& a, int64_t key_head, int64_t s, int64_t count, const Scratch& scratch,
                       float* scale) {
    const int64_t batch = key_head / a.KV, head = key_head % a.KV;
    if (!a.k_scale.x) {
      fetch_next_tokens(a.k, size_of(a.k.type), a.D, batch, head, s, a.S);
      Rows::codes_of(a.k, a.k_scale, a.D, batch, head, s, count, scratch.codes, a.D, scale, 1);
      return lay_codes_across<Score>(scratch.codes, a.D, count, a.D, scratch.panel);
    }
    copy_scales(a.k_scale, batch, head, s, s + count, scale);
    const int64_t step = a.k.token_step;
    const int8_t* const codes = row_of<int8_t>(a.k, batch, head, s);
    const auto load = [&](int64_t n, int64_t d, auto... there) {
      const int8_t* const from = codes + n * step + d;
      __builtin_prefetch(from + kFetchedAhead * step, 0, kIntoL2);
      return Score::load_w(from, there...);
    };
    lay_across<Score>(load, count, a.D, scratch.panel);
  }

  // Stores the scales of `count` values from s on; and their codes, if they are not codes yet.
  static void keep_values(const Attention& a, int64_t key_head, int64_t s, int64_t count, const Packed& to) {
    const int64_t batch = key_head / a.KV, head = key_head % a.KV;
    if (a.v_scale.x) return copy_scales(a.v_scale, batch, head, s, s + count, to.v_scale + s);
    fetch_next_tokens(a.v, size_of(a.v.type), a.Dv, batch, head, s, a.S);
    Rows::codes_of(a.v, a.v_scale, a.Dv, batch, head, s, count, to.values + s * to.ldy, to.ldy, to.v_scale + s, 0);
  }
};

}  // namespace
}  // namespace octavo
