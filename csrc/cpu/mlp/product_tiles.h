// What both forms of the MLP's forward on AMX tiles share: blocks of 32 x 32 sums in four tiles.
#pragma once

#include "../product/amx.h"

namespace pk {
namespace {

constexpr int64_t kStepWords = 2 * 16 * 16;  // words of the two tiles of one operand in a step of a product
constexpr int64_t kBlockSums = 32 * 32;      // floats of a block of sums

// Sums in tiles 0 to 3: two rows of two tiles. `step`: bytes from a row to the next, `rows`: rows of a tile.
PK_INLINE void zero_sums() { tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(); }
PK_INLINE float* lower(float* o, int64_t step, int64_t rows) { return o + rows * step / int64_t{sizeof(float)}; }
PK_INLINE void load_left_sums(float* o, int64_t step, int64_t rows) {
  tile_load<0>(o, step), tile_load<2>(lower(o, step, rows), step);
}
PK_INLINE void load_sums(float* o, int64_t step, int64_t rows) {
  load_left_sums(o, step, rows);
  tile_load<1>(o + 16, step), tile_load<3>(lower(o, step, rows) + 16, step);
}
PK_INLINE void store_left_sums(float* o, int64_t step, int64_t rows) {
  tile_store<0>(o, step), tile_store<2>(lower(o, step, rows), step);
}
PK_INLINE void store_sums(float* o, int64_t step, int64_t rows) {
  store_left_sums(o, step, rows);
  tile_store<1>(o + 16, step), tile_store<3>(lower(o, step, rows) + 16, step);
}

}  // namespace
}  // namespace pk
