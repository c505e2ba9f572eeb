// The tile unit of AMX: 8 tiles of 16 rows of 64 bytes each. It multiplies two of them into 16 x 16 sums, a third one.
//
//     y^T = W x^T
//
//          W, as it lies in memory             x, packed                          sums
//
//      bytes 0-3  4-7  ... 60-63                    x0   x1  ... x15               x0   x1  ... x15
//     w0    [    |    |   |    ]      bytes 0-3   [    |    |   |    ]      w0   [    |    |   |    ]
//     w1    [    |    |   |    ]   *        4-7   [    |    |   |    ]   =  w1   [    |    |   |    ]
//     ...   [    |    |   |    ]            ...   [    |    |   |    ]      ...  [    |    |   |    ]
//     w15   [    |    |   |    ]            60-63 [    |    |   |    ]      w15  [    |    |   |    ]
//
// This way round, W is the operand whose rows a tile loads as they lie in memory. x, which is smaller, is packed in the
// order of the other operand: a column for each of 16 rows of x, in units of four bytes along K.
//
// Included by amx.cpp after its target pragma.
#pragma once

namespace octavo {
namespace {

constexpr int64_t kTile = 16;  // rows of a tile, and columns of a tile of sums
constexpr int64_t kRowBytes = 64;
constexpr int64_t kTileBytes = kTile * kRowBytes;
constexpr int64_t kTileSums = kTile * kTile;
constexpr int64_t kBlock = 2 * kTile;
constexpr int64_t kUnitCodes = 64;  // along K, in which x is packed and W is read: a row of a tile of codes

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kWholeTiles;

// Configures the tiles for this thread, and releases them when it is destroyed.
class TilesInUse {
 public:
  TilesInUse() { _tile_loadconfig(&kWholeTiles); }
  ~TilesInUse() { _tile_release(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

// What was stored so far must be in memory before tiles load it: GCC's intrinsics do not say that they read memory.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// Transposes 16 columns of 64 bytes, in units of four bytes, into 16 rows of 64 bytes. `step`, `row`: bytes from one
// column, or row, to the next.
OCTAVO_INLINE void turn(const void* from, int64_t step, void* to, int64_t row = kRowBytes) {
  const char* const columns = static_cast<const char*>(from);
  char* const rows = static_cast<char*>(to);
  __m512i r[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i++) r[i] = _mm512_loadu_si512(columns + i * step);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i++) _mm512_storeu_si512(rows + i * row, r[i]);
}

// A mask of the first `count` of 64 bytes, where `count` may be 64 or more.
inline __mmask64 first_bytes(int count) { return count < 64 ? mask64(count) : ~__mmask64{0}; }

}  // namespace
}  // namespace octavo
