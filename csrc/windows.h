// The windows of an image, an element of several at a time. Windows that are next to each other begin at elements that
// are, as a rule: a load takes that element of all.
//
// Included by a translation unit after its target pragma.
#pragma once

namespace octavo {
namespace {

// Windows of an image.
inline int64_t windows_of(const Convolution& c) { return c.windows[0] * c.windows[1] * c.windows[2]; }

// M of them as rows of x.
inline Linear layer_of(const Convolution& c, int64_t M) {
  Linear layer{};
  layer.M = M, layer.N = c.N, layer.K = c.K;
  layer.w = c.w, layer.groups = 1;
  return layer;
}

// `kCount` windows, or fewer, of which elements have `kBytes`, in vectors of `V`.
template <int64_t kCount, int64_t kBytes, class V = Vec>
class WindowsAcross {
  static constexpr int64_t kPieces = (kCount + V::kLanes - 1) / V::kLanes;

 public:
  // Windows [p, p + count) of an image: lay(piece, across) for each vector of them. `piece` is a constant, its number;
  // across(at) is the element `at` bytes behind the first of each, zero where there is no window.
  template <class Lay>
  static void each(const Convolution& c, int64_t image, int64_t p, int64_t count, const Lay& lay) {
    const int64_t step = c.step[2] == 2 ? 2 : 1;
    Run runs[kCount];
    int many = 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t start = image * c.image_step + start_of(c, p + i) - i * step;
      if (!many || runs[many - 1].start != start) runs[many++] = {start, i, i};
      runs[many - 1].end = i + 1;
    }
    step == 2 ? pieces<2>(c, runs, many, lay) : pieces<1>(c, runs, many, lay);
  }

 private:
  // Windows that begin at the same distance from each other: where that of lane 0 would begin, and which lanes they are
  // of each piece, a vector's.
  struct Run {
    int64_t start, first, end;
    typename V::Range lanes(int piece) const {
      const auto within = [&](int64_t lane) { return max64(0, min64(V::kLanes, lane - piece * V::kLanes)); };
      return {within(first), within(end)};
    }
  };

  static int64_t start_of(const Convolution& c, int64_t p) {
    const int64_t last = p % c.windows[2], middle = p / c.windows[2] % c.windows[1];
    return p / c.windows[2] / c.windows[1] * c.step[0] + middle * c.step[1] + last * c.step[2];
  }

  template <int kStep, int kPiece = 0, class Lay>
  static void pieces(const Convolution& c, const Run* runs, int many, const Lay& lay) {
    piece<kStep, kPiece>(c, runs, many, lay);
    if constexpr (kPiece + 1 < kPieces) pieces<kStep, kPiece + 1>(c, runs, many, lay);
  }

  // Where the lanes of a piece are, each from an element of the image on. As a rule they are one run or two.
  struct Some {
    const char* x;
    typename V::Range lanes;
  };

  template <int kStep, int kPiece, class Lay>
  static void piece(const Convolution& c, const Run* runs, int many, const Lay& lay) {
    constexpr int64_t kFirst = kPiece * V::kLanes;
    Some some[kCount];
    int count = 0;
    for (const Run* run = runs; run < runs + many; run++)
      if (run->first < kFirst + V::kLanes && run->end > kFirst)
        some[count++] = {static_cast<const char*>(c.x) + (run->start + kFirst * kStep) * kBytes, run->lanes(kPiece)};
    // As copies, for what is laid out could lie where `some` does, as far as the compiler knows.
    constexpr std::integral_constant<int, kPiece> number;
    if (count == 1) lay(number, [one = some[0]](int64_t at) { return load<kStep>(one, at); });
    if (count == 2)
      lay(number, [one = some[0], other = some[1]](int64_t at) {
        return V::both(load<kStep>(one, at), load<kStep>(other, at));
      });
    if (count > 2)
      lay(number, [&](int64_t at) {
        typename V::I v = load<kStep>(some[0], at);
        for (int i = 1; i < count; i++) v = V::both(v, load<kStep>(some[i], at));
        return v;
      });
  }

  template <int kStep>
  OCTAVO_INLINE static typename V::I load(const Some& run, int64_t at) {
    return V::template strided<kBytes>(run.x + at, kStep, run.lanes);
  }
};

}  // namespace
}  // namespace octavo
