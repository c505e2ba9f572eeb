// Convolutions in tiles: each window of an image is a column of many_tiles.h.
//
//     y[b, n, p] = sum_k x[start of window p of image b + element k] * w[n, k] * w_scale[n] + bias[n]
//
// The matrix of all windows is never made: tiles are packed from the image directly, one element of many windows at a
// time (windows.h). Sums have a row for each column of y, in which windows are contiguous: they are stored as they are.
//
// Tiles multiply bf16. An element of fp16 is the sum of two bf16 numbers, its parts, and one of fp32 the sum of three,
// exactly, since each part takes the next eight bits of the significand. Products with all parts are added up in fp32,
// the smallest first.
//
// Included by amx.cpp after its target pragma.
#pragma once

namespace octavo {
namespace {

// One element of 16 windows in fp32 or fp16, as `Vec` loads it -> pairs in bf16, for each part.
template <Float kType>
struct Parts : Vec {
  static constexpr int kCount = kType == Float::f32 ? 3 : 2;
  static constexpr bool kMixes = false;

  // The pairs of each part are stored `next` bytes after those of the part before.
  OCTAVO_INLINE static void store_pairs(__m512i first, __m512i second, char* to, int64_t, int64_t next) {
    if (kType == Float::f16) first = units(from_integers(first, kType)), second = units(from_integers(second, kType));
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
#pragma GCC unroll 3
    for (int part = kCount - 1; part >= 0; part--) {
      // second & high | first >> 16
      const __m512i pairs = _mm512_ternarylogic_epi32(second, high, _mm512_srli_epi32(first, 16), 0xea);
      _mm512_store_si512(to + part * next, pairs);
      first = behind(first, _mm512_and_si512(first, high)), second = behind(second, _mm512_and_si512(second, high));
    }
  }

 private:
  // What is left of a value after its first part; 0 if it is infinite.
  OCTAVO_INLINE static __m512i behind(__m512i value, __m512i part) {
    const __mmask16 infinite = _mm512_fpclass_ps_mask(floats(value), 0x18);
    return units(_mm512_maskz_sub_ps(static_cast<__mmask16>(~infinite), floats(value), floats(part)));
  }
};

// bf16, 32 windows at a time. Of each eight windows, the first four are in the first of two tiles.
template <>
struct Parts<Float::bf16> {
  static constexpr int kCount = 1;
  static constexpr bool kMixes = true;
  static constexpr int kLanes = 32;
  using I = __m512i;

  static I zeros() { return Vec::zeros(); }
  static I both(I a, I b) { return Vec::both(a, b); }

  // Like `Vec::Range`.
  struct Range {
    __mmask32 lanes;
    uint64_t spread;
    Range() = default;
    Range(int64_t first, int64_t end)
        : lanes(static_cast<__mmask32>((1ull << end) - (1ull << first))),
          spread(_pdep_u64(lanes, 0x5555555555555555)) {}
  };
  template <int64_t size>
  OCTAVO_INLINE static I strided(const char* x, int64_t step, const Range& range) {
    if (step == 1) return _mm512_maskz_loadu_epi16(range.lanes, x);
    const I front = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(range.spread), x);
    const I back = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(range.spread >> 32), x + 64);
    const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm512_permutexvar_epi64(in_order, _mm512_packus_epi32(front, back));
  }

  OCTAVO_INLINE static void store_pairs(I first, I second, char* to, int64_t other, int64_t) {
    _mm512_store_si512(to, _mm512_unpacklo_epi16(first, second));
    _mm512_store_si512(to + other, _mm512_unpackhi_epi16(first, second));
  }
};

template <Float kType>
class WindowColumns {
  const Convolution& c_;
  const int64_t image_;

 public:
  static constexpr int64_t kParts = Parts<kType>::kCount, kVectors = kParts * Bf16Tiles::kSteps;
  static constexpr bool kFolds = false, kMixes = Parts<kType>::kMixes;

  class Epilogue;
  struct Memory {};

  WindowColumns(const Convolution& c, int64_t image) : c_(c), image_(image) {}

  bool prepare(int64_t, int64_t) { return true; }

  void pack(int64_t m, int64_t m1, int64_t k, int64_t length, char* to, int64_t second) {
    WindowsAcross<kBlock, kBytes, Parts<kType>>::each(c_, image_, m, m1 - m, [&](auto piece, const auto& across) {
      pack_tiles(across, c_.element + k, length, to + piece * second, second);
    });
  }

  void prefetch_y(Block block) const {
    for (int64_t n = block.n0; n < block.n1; n++) __builtin_prefetch(y(n, block.m0), 1, kIntoL2);
  }

 private:
  static constexpr int64_t kBytes = size_of(kType);

  char* y(int64_t n, int64_t m) const {
    return static_cast<char*>(c_.y) + (image_ * c_.y_step + n * windows_of(c_) + m) * kBytes;
  }

  template <class Across>
  static void pack_tiles(const Across& across, const int64_t* element, int64_t length, char* to, int64_t second) {
    for (int64_t k = 0; k < length; k += kUnitCodes, to += Bf16Tiles::kSteps * kTileBytes) {
      const int64_t left = length - k;
      const auto one = [&](int64_t i) { return across(element[k + i] * kBytes); };
      if (left >= kUnitCodes)
        lay_unit(one, to, second);
      else
        lay_unit([&](int64_t i) { return i < left ? one(i) : Vec::zeros(); }, to, second);
    }
  }

  // In the order of looked-up codes (avx512.h): of each 16 elements, the first 8 are in the first tile.
  template <class One>
  OCTAVO_INLINE static void lay_unit(const One& one, char* to, int64_t second) {
    for (int64_t i = 0; i < kUnitCodes; i += 16) {
      for (int64_t j = 0; j < 16; j += 2) {
        const int64_t row = i / 4 + j % 8 / 2;
        Parts<kType>::store_pairs(one(i + j), one(i + j + 1), to + j / 8 * kTileBytes + row * kRowBytes, second,
                                  2 * second);
      }
    }
  }
};

// The epilogue: a few rows at a time, of 32 windows each.
template <Float kType>
class WindowColumns<kType>::Epilogue {
 public:
  Epilogue() = default;
  Epilogue(const WindowColumns& columns, Block part, const Sums<float>& sums, bool)
      : columns_(&columns), part_(part), sums_(sums.whole), n_(part.n0) {}

  OCTAVO_INLINE void one() {
    if (n_ < part_.n1) store();
  }

  void rest() {
    while (n_ < part_.n1) store();
  }

 private:
  static constexpr int64_t kRows = 8;

  __attribute__((noinline)) void store() {
    const Convolution& c = columns_->c_;
    const int count = static_cast<int>(part_.m1 - part_.m0);
    for (const int64_t end = min64(n_ + kRows, part_.n1); n_ < end; n_++) {
      const int64_t row = n_ - part_.n0;
      const float* const from = sums_ + row / kTile * kTileSums + row % kTile * kTile;
      const __m512 scale = Vec::set1(c.w_scale[n_]), bias = c.bias ? value(c.bias, c.bias_type, n_) : Vec::set1(0);
      __m512 front = Vec::add(Vec::mul(Vec::load(from), scale), bias);
      __m512 back = Vec::add(Vec::mul(Vec::load(from + 2 * kTileSums), scale), bias);
      if (kMixes) in_order(front, back);
      char* const y = columns_->y(n_, part_.m0);
      if (kType == Float::bf16 && count == kBlock) {
        Vec::store_bf16(y, front, back);
      } else {
        Vec::store(y, kType, static_cast<int>(min64(kTile, count)), front);
        if (count > kTile) Vec::store(y + kTile * kBytes, kType, static_cast<int>(count - kTile), back);
      }
    }
  }

  // Puts windows in order again: four of the first vector and four of the second in turn.
  OCTAVO_INLINE static void in_order(__m512& first, __m512& second) {
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512d a = _mm512_castps_pd(first), b = _mm512_castps_pd(second);
    first = _mm512_castpd_ps(_mm512_permutex2var_pd(a, low, b));
    second = _mm512_castpd_ps(_mm512_permutex2var_pd(a, high, b));
  }

  static __m512 value(const void* base, Float type, int64_t i) {
    return _mm512_broadcastss_ps(_mm512_castps512_ps128(Vec::load(element(base, type, i), type, 1)));
  }

  const WindowColumns* columns_ = nullptr;
  Block part_{};
  const float* sums_ = nullptr;
  int64_t n_ = 0;  // the next row
};

template <Float kType>
struct TileConvolution {
  using Columns = WindowColumns<kType>;
  using Many = ManyTiles<Columns, Bf16Tiles>;
  using Scratch = typename Many::Scratch;
  // With fewer, AVX-512's narrow convolutions are faster: they split no value into parts.
  static constexpr int64_t kLeastColumns = kType == Float::bf16 ? 9 : kType == Float::f16 ? 17 : 32;

  static int64_t most_windows(const Convolution& c) {
    return typename Many::Plan(layer_of(c, windows_of(c))).most * kBlock;
  }

  static size_t scratch_bytes(const Convolution&) { return sizeof(Scratch); }

  static void run(const Convolution& c, int64_t image, Block block, void* memory) {
    Columns windows(c, image);
    const auto none = [](Block) {};
    Many::run(layer_of(c, windows_of(c)), windows, block, *static_cast<Scratch*>(memory), none);
  }
};

}  // namespace
}  // namespace octavo
