// The tile unit of AMX in plain C++, for machines that have none: the intrinsics that amx.cpp uses, after the
// pseudocode of Intel's Software Developer's Manual (volume 2: LDTILECFG, TILELOADD, TILESTORED, TDPBSSD, TDPBF16PS).
// Slow, and strict: what the processor would refuse ends the program, and sanitizers see each access to memory.
//
// Included by amx.cpp under -DOCTAVO_EMULATED_TILES, after <immintrin.h>, whose macros it replaces.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace octavo {
namespace emulated {

struct Tile {
  uint8_t bytes[16][64];
  int rows = 0, colsb = 0;  // as configured; 0: not configured
};

// One set for each thread, as the operating system keeps them.
struct Unit {
  Tile tiles[8];
  bool configured = false;
};
inline thread_local Unit unit;

[[noreturn]] inline void refuse(const char* why) {
  fprintf(stderr, "emulated tiles: %s\n", why);
  abort();
}

inline Tile& tile(int t) {
  if (t < 0 || t > 7) refuse("there are 8 tiles");
  if (!unit.configured) refuse("used without a configuration");
  if (unit.tiles[t].rows == 0) refuse("a tile is used that the configuration leaves out");
  return unit.tiles[t];
}

inline void loadconfig(const void* config) {
  uint8_t bytes[64];
  memcpy(bytes, config, sizeof bytes);
  if (bytes[0] != 1 || bytes[1] != 0) refuse("palette 1 and start row 0 are expected");
  for (int i = 2; i < 16; i++)
    if (bytes[i]) refuse("a reserved byte of the configuration is set");
  unit = Unit{};
  for (int t = 0; t < 16; t++) {
    uint16_t colsb;
    memcpy(&colsb, bytes + 16 + 2 * t, sizeof colsb);
    const uint8_t rows = bytes[48 + t];
    if (rows > 16 || colsb > 64 || (rows == 0) != (colsb == 0) || (t > 7 && rows)) refuse("no such tile shape");
    if (t < 8) unit.tiles[t].rows = rows, unit.tiles[t].colsb = colsb;
  }
  for (Tile& t : unit.tiles) memset(t.bytes, 0, sizeof t.bytes);
  unit.configured = true;
}

inline void release() { unit = Unit{}; }

inline void loadd(int t, const void* base, long stride) {
  Tile& to = tile(t);
  memset(to.bytes, 0, sizeof to.bytes);
  const char* from = static_cast<const char*>(base);
  for (int row = 0; row < to.rows; row++) memcpy(to.bytes[row], from + row * stride, to.colsb);
}

inline void stored(int t, void* base, long stride) {
  const Tile& from = tile(t);
  char* to = static_cast<char*>(base);
  for (int row = 0; row < from.rows; row++) memcpy(to + row * stride, from.bytes[row], from.colsb);
}

inline void zero(int t) { memset(tile(t).bytes, 0, sizeof unit.tiles[t].bytes); }

inline void check_product(int c, int a, int b) {
  if (c == a || c == b || a == b) refuse("a product needs three different tiles");
  if (tile(c).rows != tile(a).rows || tile(c).colsb != tile(b).colsb || tile(a).colsb != 4 * tile(b).rows)
    refuse("the shapes of a product do not fit");
}

// C[m][n] += sum of A[m][4 k + i] * B[k][4 n + i]
inline void dpbssd(int c, int a, int b) {
  check_product(c, a, b);
  Tile &C = tile(c), &A = tile(a), &B = tile(b);
  for (int m = 0; m < C.rows; m++) {
    uint32_t sums[16];
    memcpy(sums, C.bytes[m], sizeof sums);
    for (int k = 0; k < B.rows; k++) {
      const auto* left = reinterpret_cast<const int8_t*>(A.bytes[m]) + 4 * k;
      const auto* right = reinterpret_cast<const int8_t*>(B.bytes[k]);
      for (int n = 0; n < C.colsb / 4; n++) {
        int32_t sum = 0;
        for (int i = 0; i < 4; i++) sum += left[i] * right[4 * n + i];
        sums[n] += static_cast<uint32_t>(sum);  // wraps, as the instruction does
      }
    }
    memcpy(C.bytes[m], sums, sizeof sums);
  }
}

// Subnormal numbers are flushed to zero, on the way in and on the way out.
inline float flushed(float value) {
  return std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value;
}

inline float from_bf16(const uint8_t* bytes) {
  uint16_t half;
  memcpy(&half, bytes, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return flushed(value);
}

// C[m][n] += sum of A[m][2 k + i] * B[k][2 n + i]. Even and odd products are summed apart, each added by a fused
// multiply-add: in double, which holds the product, because calling std::fma each time takes most of a minute.
inline void dpbf16ps(int c, int a, int b) {
  check_product(c, a, b);
  Tile &C = tile(c), &A = tile(a), &B = tile(b);
  float right[16][32];
  for (int k = 0; k < B.rows; k++)
    for (int n = 0; n < B.colsb / 2; n++) right[k][n] = from_bf16(B.bytes[k] + 2 * n);
  for (int m = 0; m < C.rows; m++) {
    float apart[32] = {};
    for (int k = 0; k < B.rows; k++) {
      const float left[2] = {from_bf16(A.bytes[m] + 4 * k), from_bf16(A.bytes[m] + 4 * k + 2)};
      for (int n = 0; n < B.colsb / 2; n++)
        apart[n] = flushed(static_cast<float>(double{left[n & 1]} * right[k][n] + apart[n]));
    }
    float sums[16];
    memcpy(sums, C.bytes[m], sizeof sums);
    for (int n = 0; n < C.colsb / 4; n++)
      sums[n] = flushed(flushed(sums[n]) + flushed(apart[2 * n] + apart[2 * n + 1]));
    memcpy(C.bytes[m], sums, sizeof sums);
  }
}

}  // namespace emulated

// Whether this thread holds tiles: a kernel must have released them when it returns.
bool holds_tiles() { return emulated::unit.configured; }

}  // namespace octavo

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig octavo::emulated::loadconfig
#define _tile_release octavo::emulated::release
#define _tile_loadd octavo::emulated::loadd
#define _tile_stored octavo::emulated::stored
#define _tile_zero octavo::emulated::zero
#define _tile_dpbssd octavo::emulated::dpbssd
#define _tile_dpbf16ps octavo::emulated::dpbf16ps
