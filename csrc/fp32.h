// Products in fp32, for activations of any type: activations and codes are widened in registers. They are dot products
// along K (dot_linear.h), or units of outer products (outer_linear.h).
//
// `FloatSums` is how an instruction set accumulates them (see avx512.h):
//     kTileM                          rows of x in a register tile
//     kManyRows, kManyRowsOfGroups    rows of x from which outer products are faster
//
// Included by a translation unit after its vectors.
#pragma once

namespace octavo {
namespace {

template <Float type>
struct Fp32Kept;

template <Float type>
struct Fp32 : FloatSums {
  using Kept = Fp32Kept<type>;
  using X = std::conditional_t<type == Float::f32, float, uint16_t>;
  using W = int8_t;
  using XV = Vec::F;
  using WV = Vec::F;
  static constexpr int kStep = Vec::kLanes;
  static XV load_x(const X* x) { return Vec::load(x, type); }
  static XV load_x(const X* x, int count) { return Vec::load(x, type, count); }
  static WV load_w(const W* w) { return Vec::load_codes(w); }
  static WV load_w(const W* w, int count) { return Vec::load_codes(w, count); }
  static void keep(float* kept, WV w) { Vec::store(kept, w); }
  static Acc dot(Acc acc, XV x, WV w) { return Vec::fmadd(x, w, acc); }
};

template <Float type>
struct Fp32Kept : Fp32<type> {
  using W = float;
  static Vec::F load_w(const W* w) { return Vec::load(w); }
  static Vec::F load_w(const W* w, int) { return load_w(w); }
};

// The same as units of one element.
template <Float type>
struct Fp32Unit : Fp32<type> {
  using typename Fp32<type>::X;
  static constexpr int64_t kElements = 1;
  template <class... Count>
  static Vec::I load_x(const X* x, Count... count) {
    return Vec::units(Fp32<type>::load_x(x, count...));
  }
  template <class... Count>
  static Vec::I load_w(const int8_t* w, Count... count) {
    return Vec::units(Fp32<type>::load_w(w, count...));
  }
  static Vec::I product(Vec::I sums, Vec::I x, Vec::I w) {
    return Vec::units(Fp32<type>::dot(Vec::floats(sums), Vec::floats(x), Vec::floats(w)));
  }
  template <class T>
  OCTAVO_INLINE static void strip(const T* const (&rows)[kElements], int count, Vec::I (&w)[2]) {
    const int front = count < Vec::kLanes ? count : Vec::kLanes;
    w[0] = load(rows[0], front);
    w[1] = count > front ? load(rows[0] + Vec::kLanes, count - front) : Vec::zeros();
  }
  static Vec::I load(const X* x, int count) { return count == Vec::kLanes ? load_x(x) : load_x(x, count); }
  static Vec::I load(const int8_t* codes, int count) {
    return count == Vec::kLanes ? load_w(codes) : load_w(codes, count);
  }
  static void in_order(Vec::I (&)[2]) {}
  static Vec::I rounded(const Vec::F (&v)[kElements]) { return Vec::units(v[0]); }
};

}  // namespace
}  // namespace octavo
