// Heads of attention: where their rows are in memory, which rows one call computes, and how they are multiplied.
//
// Included by a translation unit after its target pragma, like outer_linear.h, whose blocks these are.
#pragma once

namespace octavo {
namespace {

// A number of tokens, or of columns of v, rounded up to a multiple of 32.
inline int64_t whole(int64_t count) { return ceil_div(count, kBlockN) * kBlockN; }

// Bytes of a row in scratch: an odd number of cache lines, so that rows do not all fall into the same sets of L1.
inline int64_t padded_row(int64_t bytes) { return ceil_div(bytes, 128) * 128 + 64; }

inline const void* head_row(const Heads& x, int64_t batch, int64_t head, int64_t token) {
  return element(x.x, x.type, batch * x.batch_step + head * x.head_step + token * x.token_step);
}

// The same, if the type of the elements is known.
template <class T>
inline const T* row_of(const Heads& x, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const T*>(x.x) + batch * x.batch_step + head * x.head_step + token * x.token_step;
}

// Copies the scales of tokens [s0, s1) of a key head, padded with zeros to a multiple of 32.
inline void copy_scales(const Heads& scale, int64_t batch, int64_t head, int64_t s0, int64_t s1, float* to) {
  for (int64_t s = s0; s < s1; s++) *to++ = *row_of<float>(scale, batch, head, s);
  for (int64_t s = s1; s < s0 + whole(s1 - s0); s++) *to++ = 0;
}

inline void fetch(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 0, kIntoL2);
}

// Prefetches the block of 32 tokens after the one at s, in rows of `size` elements of `bytes` bytes each.
inline void fetch_next_tokens(const Heads& x, int64_t bytes, int64_t size, int64_t batch, int64_t key_head, int64_t s,
                              int64_t S) {
  const int64_t at = batch * x.batch_step + key_head * x.head_step;
  for (int64_t j = s + kBlockN; j < min64(s + 2 * kBlockN, S); j++)
    fetch(static_cast<const char*>(x.x) + (at + j * x.token_step) * bytes, bytes * size);
}

// Where row r of a key head comes from: its head (the heads that share a key head take turns), its query, and its row
// of the mask.
struct Place {
  int64_t head, query, of_mask;  // `head` is counted over the batch
};

inline void find_places(const Attention& a, int64_t key_head, int64_t r0, int64_t r1, Place* places) {
  const int64_t shared = a.H / a.KV, batch = key_head / a.KV;
  const Mask& m = a.mask;
  int64_t head = r0 % shared, query = r0 / shared;
  for (int64_t r = r0; r < r1; r++, places++) {
    places->head = key_head * shared + head, places->query = query;
    places->of_mask =
        ((m.B > 1 ? batch : 0) * m.H + (m.H > 1 ? places->head - batch * a.H : 0)) * m.T + (m.T > 1 ? query : 0);
    if (++head == shared) head = 0, query++;
  }
}

// The row of q at a place in that batch.
inline const void* query_row(const Attention& a, int64_t batch, const Place& place) {
  return head_row(a.q, batch, place.head - batch * a.H, place.query);
}

// The first element of a place's row of y.
inline int64_t result_row(const Attention& a, const Place& place) { return (place.head * a.T + place.query) * a.Dv; }

constexpr int64_t kTogether = kAttentionRows;  // rows whose scores are in L1 at the same time

// How attention multiplies rows by packed columns: here by outer products. (The other way is tile_products.h.)
struct OuterProducts {
  static constexpr int64_t kRows = kAttentionRows;  // at once, at most
  static int64_t rows_next_to(int64_t /*tokens*/) { return kRows; }

  // How many units are read to sum over `units` of them: up to `kPast` more. Past the end, units of x are zeros, and
  // the others are finite.
  static constexpr int64_t kPast = 0;
  static int64_t read(int64_t units) { return units; }

  // Held by a thread while it multiplies.
  struct InUse {
    InUse() {}
  };

  // sums[rows, 32] = x[rows, units] panel[units, 32]
  template <class Unit>
  OCTAVO_INLINE static void multiply(int64_t rows, const OuterOperands& in, typename Unit::Sum* sums) {
    outer_tile_of<Unit>(rows, in, sums, false);
  }
};

}  // namespace
}  // namespace octavo
