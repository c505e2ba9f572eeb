// Attention with both products in int8: what is done to the rows of a tile around them, however they are computed.
//
//     codes_of    tokens of k or v -> codes, and their scales
//     Queries     rows of q: their units, the scales of their sums, and by how much sums are too large
//     softmax     sums with keys -> codes of the probabilities (softmax.h). Tokens at either end that the mask forbids
//                 to all of the rows are skipped, if that changes no bit (mask.h)
//     store       sums with values -> y
//
// Each weight, e^(score - largest) * (scale of v), is computed once and kept. The sum of the e^... divides y at the
// end, not the probabilities: a factor of the whole row changes no code.
//
// Included by a translation unit after its target pragma, like outer_linear.h, whose units these are, softmax.h and
// heads.h.
#pragma once

namespace octavo {
namespace {

// `Score` is the unit of q times k. `Weighted` is that of probabilities times v, and beyond what linear layers ask of
// it has
//     kCodeBytes     bytes of a code in a unit
//     store_codes    stores a vector of whole numbers as such codes
// and what value_strips.h asks of it. `kRows`: the most rows at once.
template <class Score, class Weighted, int64_t kRows = kAttentionRows>
struct Int8Rows {
  using V = Vec;
  static constexpr int64_t kUnit = Score::kElements;
  static constexpr int64_t kVector = V::kLanes * kUnit;
  static constexpr int64_t kVectorBytes = V::kLanes * kUnitBytes;
  static_assert(Weighted::kElements == kUnit && Weighted::kCodeBytes * kUnit == kUnitBytes);

  static int64_t units(int64_t elements) { return ceil_div(elements, kUnit); }
  static int64_t bytes_of_units(const Attention& a) { return padded_row(ceil_div(a.D, kVector) * kVectorBytes); }
  static int64_t bytes_of_codes(const Attention& a) { return padded_row(whole(a.S) * Weighted::kCodeBytes); }

  // -- tokens ----------------------------------------------------------------------------------------------------

  static int64_t bytes_of(const Heads& x, const Heads& x_scale) { return x_scale.x ? 1 : size_of(x.type); }

  // Up to 32 tokens of x from s on, rows of `size` -> codes, `step` apart, and scales, padded with zeros. x is
  // quantized unless it has scales.
  static void codes_of(const Heads& x, const Heads& x_scale, int64_t size, int64_t batch, int64_t head, int64_t s,
                       int64_t rows, int8_t* codes, int64_t step, float* scale, float of_zeros) {
    if (x_scale.x) {
      for (int64_t j = 0; j < rows; j++) memcpy(codes + j * step, row_of<int8_t>(x, batch, head, s + j), size);
      return copy_scales(x_scale, batch, head, s, s + rows, scale);
    }
    const auto row = [&](int64_t j) { return head_row(x, batch, head, s + j); };
    quantize(rows, row, x.type, size, codes, step, scale, of_zeros);
    for (int64_t j = rows; j < kBlockN; j++) scale[j] = 0;
  }

  // Quantizes rows, wherever they are in memory -> codes, `step` apart, and scales; that of a row of zeros is
  // `of_zeros`. There are two passes, because reductions across the lanes of a vector take long, and the next row need
  // not wait for them.
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

  // Rows [r0, r1) of q. units: [kRows][ldq], where they are stored; codes: [kRows][D], not used afterwards.
  struct Queries {
    int64_t count, ldq;
    char* units;
    Place places[kRows];
    float scale[kRows];  // times the attention's scaling
    int32_t excess[kRows];

    Queries(const Attention& a, int64_t key_head, int64_t r0, int64_t r1, char* units, int8_t* codes)
        : count(r1 - r0), ldq(bytes_of_units(a)), units(units) {
      const int64_t batch = key_head / a.KV;
      find_places(a, key_head, r0, r1, places);
      const auto row = [&](int64_t i) { return query_row(a, batch, places[i]); };
      for (int64_t i = 0; i < count; i++) fetch(row(i), size_of(a.q.type) * a.D);
      quantize(count, row, a.q.type, a.D, codes, a.D, scale, 1);
      for (int64_t i = 0; i < count; i++, codes += a.D) {
        lay_row<Score>(codes, a.D, units + i * ldq);
        scale[i] *= a.scaling;
        excess[i] = excess_of<Score>(codes, a.D);
      }
    }
  };

  // Tokens [first, last), multiples of 32, outside of which each probability is 0.
  struct Part {
    int64_t first, last;
    bool trusted;  // outside of what its own mask allows, the probabilities of a row are 0, too
  };

  // k_scale, v_scale: of all tokens, padded with zeros to a multiple of 32.
  static Part part_of(const Attention& a, const float* k_scale, const float* v_scale, const Queries& queries) {
    const Part all{0, whole(a.S), false};
    const Mask& m = a.mask;
    if (m.kind == Mask::Kind::none) return all;
    int64_t first = a.S, last = 0;
    for (int64_t i = 0; i < queries.count; i++) {
      const Allowed& row = m.allowed[queries.places[i].of_mask];
      if (!row.certain) return all;
      if (row.first < row.last) first = min64(first, row.first), last = max64(last, row.last);
    }
    // A scale that is not finite makes the result NaN, even times 0.
    if (!std::isfinite(RowKernels<V>::amax_of(v_scale, Float::f32, a.S))) return all;
    if (m.kind != Mask::Kind::boolean) {
      const float largest = RowKernels<V>::amax_of(k_scale, Float::f32, a.S) *
                            RowKernels<V>::amax_of(queries.scale, Float::f32, queries.count) * 16384.0f *
                            static_cast<float>(a.D);
      if (!(largest < MaskRows::reach(m.kind)) || (a.has_softcap && a.softcap == 0)) return all;
    }
    if (first >= last) return {0, 0, true};
    return {first / kBlockN * kBlockN, whole(last), true};
  }

  // Sums of all rows, [tokens / 32][`rows`][32] -> codes, [rows][`ldp`] bytes, and the factors of their sums with v,
  // scale[count]. Codes of tokens that a row's own mask forbids, and only other rows' masks allow, are zeros.
  static void softmax(const Attention& a, const float* k_scale, const float* v_scale, const Queries& queries,
                      const Part& part, int32_t* sums, int64_t rows, char* codes, int64_t ldp, float* scale) {
    SoftmaxRow row[kTogether];
    for (int64_t first = 0; first < queries.count; first += kTogether) {
      const int64_t count = min64(kTogether, queries.count - first);
      for (int64_t j = 0; j < count; j++) {
        const int64_t i = first + j;
        row[j] = SoftmaxRow{};
        row[j].x = reinterpret_cast<float*>(sums) + i * kBlockN, row[j].step = rows * kBlockN;
        row[j].excess = queries.excess[i], row[j].scale = queries.scale[i];
        row[j].k_scale = k_scale, row[j].v_scale = v_scale;
        row[j].first = part.first, row[j].last = min64(part.last, a.S);
        row[j].has_softcap = a.has_softcap, row[j].softcap = a.softcap;
        row[j].codes = codes + i * ldp;
        if (a.mask.kind != Mask::Kind::none) put_mask(a, part, queries.places[i].of_mask, row[j]);
      }
      Softmax<Weighted>::run(row, count);
      for (int64_t j = 0; j < count; j++) scale[first + j] = Softmax<Weighted>::scale_of(row[j]);
    }
  }

  // Sums -> y[n : n + 32] of a row of y, whose first element is `row`.
  static void store(const Attention& a, int64_t row, int64_t n, const int32_t* sums, float scale) {
    const int64_t end = min64(n + kBlockN, a.Dv);
    for (; n < end; n += V::kLanes, sums += V::kLanes)
      V::store(element(a.y, a.y_type, row + n), a.y_type, static_cast<int>(min64(V::kLanes, end - n)),
               V::mul(V::from_sums(sums, 0), V::set1(scale)));
  }

 private:
  static void put_mask(const Attention& a, const Part& part, int64_t of_mask, SoftmaxRow& row) {
    const Allowed& allowed = a.mask.allowed[of_mask];
    if (!part.trusted || !allowed.plain) {
      row.kind = a.mask.kind, row.mask = MaskRows::row(a.mask, of_mask);
      return;
    }
    row.first = allowed.first, row.last = allowed.last;
    const bool some = row.first < row.last;
    const int64_t from = some ? row.first / kBlockN * kBlockN : part.last, to = some ? whole(row.last) : part.last;
    memset(row.codes + part.first * Weighted::kCodeBytes, 0, (from - part.first) * Weighted::kCodeBytes);
    memset(row.codes + to * Weighted::kCodeBytes, 0, (part.last - to) * Weighted::kCodeBytes);
  }
};

}  // namespace
}  // namespace octavo
