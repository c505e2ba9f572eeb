// The windows of an image, one element of several at a time. Adjacent windows begin at adjacent elements, as a rule, or
// at every other one: one load then takes that element of all of them.
//
// Included by a translation unit after its target pragma.
#pragma once

namespace octavo {
namespace {

// How many windows an image has.
inline int64_t windows_of(const Convolution& c) { return c.windows[0] * c.windows[1] * c.windows[2]; }

// M windows as the rows of x of a linear layer.
inline Linear layer_of(const Convolution& c, int64_t M) {
  Linear layer{};
  layer.M = M, layer.N = c.N, layer.K = c.K;
  layer.w = c.w, layer.groups = 1;
  return layer;
}

// Up to `kCount` windows, of elements of `kBytes` bytes, in vectors of `V`.
template <int64_t kCount, int64_t kBytes, class V = Vec>
class WindowsAcross {
  static constexpr int64_t kPieces = (kCount + V::kLanes - 1) / V::kLanes;

 public:
  // Calls pack(piece, across) for each vector of windows [p, p + count) of an image. `piece` is its number, a constant;
  // across(at) is the element `at` bytes after the beginning of each window, and zero where there is no window.
  template <class Pack>
  static void each(const Convolution& c, int64_t image, int64_t p, int64_t count, const Pack& pack) {
    const int64_t step = c.step[2] == 2 ? 2 : 1;
    Run runs[kCount];
    int many = 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t start = image * c.image_step + start_of(c, p + i) - i * step;
      if (!many || runs[many - 1].start != start) runs[many++] = {start, i, i};
      runs[many - 1].end = i + 1;
    }
    step == 2 ? pieces<2>(c, runs, many, pack) : pieces<1>(c, runs, many, pack);
  }

 private:
  // A run of windows at equal distances: where that of lane 0 would begin, and which windows these are. A piece is one
  // vector of windows, and `lanes` are those that the run has of it.
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

  template <int kStep, int kPiece = 0, class Pack>
  static void pieces(const Convolution& c, const Run* runs, int many, const Pack& pack) {
    piece<kStep, kPiece>(c, runs, many, pack);
    if constexpr (kPiece + 1 < kPieces) pieces<kStep, kPiece + 1>(c, runs, many, pack);
  }

  // Lanes of a piece that are in one run, and the element of the image that lane 0 would have. A piece has one run or
  // two, as a rule.
  struct Some {
    const char* x;
    typename V::Range lanes;
  };

  template <int kStep, int kPiece, class Pack>
  static void piece(const Convolution& c, const Run* runs, int many, const Pack& pack) {
    constexpr int64_t kFirst = kPiece * V::kLanes;
    Some some[kCount];
    int count = 0;
    for (const Run* run = runs; run < runs + many; run++)
      if (run->first < kFirst + V::kLanes && run->end > kFirst)
        some[count++] = {static_cast<const char*>(c.x) + (run->start + kFirst * kStep) * kBytes, run->lanes(kPiece)};
    // By copy: for all the compiler knows, what is packed could overwrite `some`.
    constexpr std::integral_constant<int, kPiece> number;
    if (count == 1) pack(number, [one = some[0]](int64_t at) { return load<kStep>(one, at); });
    if (count == 2)
      pack(number, [one = some[0], other = some[1]](int64_t at) {
        return V::both(load<kStep>(one, at), load<kStep>(other, at));
      });
    if (count > 2)
      pack(number, [&](int64_t at) {
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
