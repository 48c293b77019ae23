// Blocks of 32 x 32 sums on AMX tiles, and their operands as whole tiles: for 32 rows of A, or 32 columns of B, and a
// step of 32 elements of k there are two tiles of 1 KB, one behind the other. So a tile is 16 consecutive cache lines.
#pragma once

#include "gemm.h"

namespace pk {
namespace {

constexpr int64_t kTileBytes = 1024, kTilePair = 2 * kTileBytes;
constexpr int64_t kStepWords = kTilePair / 4;  // words of the two tiles of one operand in a step of a product
constexpr int64_t kBlockSums = 32 * 32;        // floats of a block of sums

// The sums are tiles 0 and 1, and below them 2 and 3. In memory rows are `row` floats apart; tiles have `rows` of them.
PK_INLINE void zero_block() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}
PK_INLINE void load_left_tiles(const float* in, int64_t row, int64_t rows = 16) {
  tile_load<0>(in, row * sizeof(float));
  tile_load<2>(in + rows * row, row * sizeof(float));
}
PK_INLINE void load_block(const float* in, int64_t row, int64_t rows = 16) {
  load_left_tiles(in, row, rows);
  tile_load<1>(in + 16, row * sizeof(float));
  tile_load<3>(in + rows * row + 16, row * sizeof(float));
}
PK_INLINE void store_left_tiles(float* out, int64_t row, int64_t rows = 16) {
  tile_store<0>(out, row * sizeof(float));
  tile_store<2>(out + rows * row, row * sizeof(float));
}
PK_INLINE void store_block(float* out, int64_t row, int64_t rows = 16) {
  store_left_tiles(out, row, rows);
  tile_store<1>(out + 16, row * sizeof(float));
  tile_store<3>(out + rows * row + 16, row * sizeof(float));
}

// Rows of A: 32 of them, and 32 elements of k a step. Distances are bytes.
struct BlockRows {
  const char* data;
  int64_t row, half, step;  // from a row to the next, to the one 16 further on, and to the next step

  static PK_INLINE BlockRows tiles(const char* data) { return {data, 64, kTileBytes, kTilePair}; }
};

// Lines that are asked for into L2, some at a time, beside products.
class LinesAhead {
 public:
  LinesAhead() = default;
  PK_INLINE LinesAhead(const void* p, int64_t bytes) : next_(static_cast<const char*>(p)), end_(next_ + bytes) {}
  template <int LINES>
  PK_INLINE void fetch() {
    if (next_ >= end_) return;
#pragma GCC unroll 8
    for (int i = 0; i < LINES; ++i) __builtin_prefetch(next_ + 64 * i, 0, 2);
    next_ += 64 * LINES;
  }

 private:
  const char *next_ = nullptr, *end_ = nullptr;
};

}  // namespace
}  // namespace pk
