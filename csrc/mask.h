// What a mask forbids to a row of attention at either end of its tokens: the future, what left a window, padding.
//
// Most masks forbid nothing else, and hold zeros (or true) where they allow something. The rows of a mask are read
// once, for all heads that share them; from then on, a row is known by two numbers (`Allowed`).
//
// A finite entry forbids as well as -inf does if another entry of its row is so far above it that e^(difference) is 0:
// masks of transformers hold the lowest number of their type. Entries <= `never` do, next to one >= -`reach`, as long
// as no score is as large as `reach`.
//
// Included by a translation unit after its target pragma, like dot_linear.h.
#pragma once

namespace octavo {
namespace {

// A mask of the lanes that are in [first, last), in the vector of tokens from s on.
inline Vec::Bits lanes_within(int64_t first, int64_t last, int64_t s) {
  const auto before = [s](int64_t token) { return static_cast<int>(max64(0, min64(Vec::kLanes, token - s))); };
  return Vec::first(before(last)) & ~Vec::first(before(first));
}

struct MaskRows {
  using Kind = Mask::Kind;
  static constexpr int kLanes = Vec::kLanes;

  static Float float_of(Kind kind) {
    return kind == Kind::f32 ? Float::f32 : kind == Kind::bf16 ? Float::bf16 : Float::f16;
  }

  // The entries of row i, counted over all rows of the mask.
  static const void* row(const Mask& m, int64_t i) {
    const int64_t at = i / (m.H * m.T) * m.batch_step + i / m.T % m.H * m.head_step + i % m.T * m.row_step;
    return m.kind == Kind::boolean ? static_cast<const char*>(m.x) + at : element(m.x, float_of(m.kind), at);
  }

  static float never(Kind kind) { return kind == Kind::f16 ? -6e4f : -1e30f; }
  static float reach(Kind kind) { return kind == Kind::f16 ? 1e4f : 1e29f; }

  // Reads rows [i0, i1) of the mask -> allowed.
  static void look(const Attention& a, int64_t i0, int64_t i1) {
    const Mask& m = a.mask;
    const int64_t S = a.S;
    for (int64_t i = i0; i < i1; i++) {
      if (m.kind == Kind::causal) {
        m.allowed[i] = {0, min64(i + 1, S), true, true};
        continue;
      }
      const void* const entries = row(m, i);
      m.allowed[i] = m.kind == Kind::boolean ? look<Kind::boolean>(entries, S)
                     : m.kind == Kind::f32   ? look<Kind::f32>(entries, S)
                     : m.kind == Kind::bf16  ? look<Kind::bf16>(entries, S)
                                             : look<Kind::f16>(entries, S);
    }
  }

  template <Kind kind>
  static Allowed look(const void* entries, int64_t S) {
    Allowed found{0, 0, true, kind == Kind::boolean};
    int64_t s = 0;
    while (s < S && !allows_some<kind>(entries, s, S)) s += kMany;
    // Nothing is allowed. With a float mask all tokens are then equally low, and share the attention: not certain.
    if (s >= S) return found;
    while (!allows<kind>(entries, s, count(S - s))) s += kLanes;
    found.first = s + __builtin_ctz(allows<kind>(entries, s, count(S - s)));
    if constexpr (kind != Kind::boolean) found.certain = first_is_near<kind>(entries, found.first);

    for (s = (S - 1) / kMany * kMany; !allows_some<kind>(entries, s, S);) s -= kMany;
    for (s = (min64(s + kMany, S) - 1) / kLanes * kLanes; !allows<kind>(entries, s, count(S - s));) s -= kLanes;
    found.last = s + 32 - __builtin_clz(allows<kind>(entries, s, count(S - s)));

    for (s = found.first; s < found.last && found.plain; s += kMany)
      found.plain = all_change_nothing<kind>(entries, s, found.last);
    return found;
  }

  static constexpr int64_t kMany = 64;  // entries that are read between two branches on what was found

  template <Kind kind>
  static bool allows_some(const void* entries, int64_t s, int64_t S) {
    const int64_t end = min64(s + kMany, S);
    unsigned found = 0;
    for (; s + kLanes <= end; s += kLanes) found |= allows<kind>(entries, s, kLanes);
    if (s < end) found |= allows<kind>(entries, s, count(end - s));
    return found;
  }

  template <Kind kind>
  static bool all_change_nothing(const void* entries, int64_t s, int64_t last) {
    const int64_t end = min64(s + kMany, last);
    unsigned found = Vec::kAll;
    for (; s + kLanes <= end; s += kLanes) found &= changes_nothing<kind>(entries, s, kLanes);
    if (s < end) found &= changes_nothing<kind>(entries, s, count(end - s)) | ~Vec::first(count(end - s));
    return found == Vec::kAll;
  }

  static int count(int64_t left) { return static_cast<int>(min64(kLanes, left)); }

  // Which of up to kLanes entries allow something. NaN does, since it reaches the result.
  template <Kind kind>
  static Vec::Bits allows(const void* entries, int64_t s, int count) {
    if constexpr (kind == Kind::boolean) return changes_nothing<kind>(entries, s, count);
    return Vec::is_not_at_most(load<kind>(entries, s, count), Vec::set1(never(kind))) & Vec::first(count);
  }

  // Which are true, or 0.
  template <Kind kind>
  static Vec::Bits changes_nothing(const void* entries, int64_t s, int count) {
    if constexpr (kind == Kind::boolean) return Vec::nonzero_bytes(static_cast<const char*>(entries) + s, count);
    return Vec::is_equal(load<kind>(entries, s, count), Vec::set1(0)) & Vec::first(count);
  }

  template <Kind kind>
  static Vec::F load(const void* entries, int64_t s, int count) {
    constexpr Float type = kind == Kind::f32 ? Float::f32 : kind == Kind::bf16 ? Float::bf16 : Float::f16;
    return Vec::load(element(entries, type, s), type, count);
  }

  template <Kind kind>
  static bool first_is_near(const void* entries, int64_t first) {
    return Vec::is_at_least(load<kind>(entries, first, 1), Vec::set1(-reach(kind))) & 1;
  }
};

template <class Of>
constexpr AttentionKernels attention{Of::most_rows, Of::packed, Of::scratch, MaskRows::look, Of::tokens, Of::rows};

// With two more steps, for kernels that need all tokens' scores before values are multiplied.
template <class Of>
constexpr AttentionKernels attention_in_parts{Of::most_rows, Of::packed, Of::scratch, MaskRows::look,
                                              Of::tokens,    Of::rows,   Of::values,  Of::join};

}  // namespace
}  // namespace octavo
