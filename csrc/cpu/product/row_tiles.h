// Products of two tiles of tokens for one instruction-set level, where tokens are rows: sums[t][j] = sum_k a[t][k]
// w[k][j] for the 32 columns j of a block of packed weights. Rows of `a` are read where they lie: windows of an image,
// a constant step apart, each made of runs of words (one run for each row of a convolution's kernel).
#pragma once

#include "../isa/vec.h"
#include "gemm.h"

namespace pk {
namespace {

constexpr int64_t kColumns = 32;  // columns of a block of weights
static_assert(kColumns == kRowsMax);

#if PK_LEVEL == 4
constexpr int64_t kTileRows = 16;  // tokens of a tile, at most
constexpr int64_t kWordStep = 16;  // words of packed weights from a word k to the next
// Where word k of columns 16 half and following lies in a block: whole tiles, as they are loaded fastest.
PK_INLINE int64_t packed_at(int64_t k, int64_t half) { return k / 16 * 512 + half * 256 + k % 16 * 16; }
#else
constexpr int64_t kTileRows = 7;
constexpr int64_t kWordStep = kColumns;
PK_INLINE int64_t packed_at(int64_t k, int64_t half) { return k * kColumns + half * 16; }
#endif

// The rows of both tiles.
struct TokenRows {
  const char* tile[2];     // the first row of each
  int64_t step;            // bytes from a row to the next
  const int64_t* runs_at;  // bytes from a row's beginning to each of its runs
  int64_t runs, words;     // the number of runs, and words of each: whole steps of a product
};

#if PK_LEVEL == 4

// The weights of a block that stay in the L1 cache, or else pass through.
template <bool STREAM, int TILE>
PK_INLINE void load_weights(const packed32* w) {
#if defined(PK_EMULATE_TILES)
  if (reinterpret_cast<uintptr_t>(w) % 64) __builtin_trap();  // each row of the tile would be two cache lines
#endif
  if constexpr (STREAM)
    tile_stream<TILE>(w, 64);
  else
    tile_load<TILE>(w, 64);
}

// sums: [2][rows][kColumns]. `meanwhile` is called between the products and their stores, as both overlap with it.
template <class Op, bool STREAM, class F>
PK_INLINE void multiply_rows(const TokenRows& a, const packed32* w, int64_t rows, float* sums, const F& meanwhile) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t r = 0; r < a.runs; ++r) {
    const char *first = a.tile[0] + a.runs_at[r], *second = a.tile[1] + a.runs_at[r];
    for (int64_t i = 0; i < a.words; i += 16, w += 512) {
      tile_load<4>(first + 4 * i, a.step);
      load_weights<STREAM, 6>(w);
      tile_multiply_add<0, 4, 6>();
      load_weights<STREAM, 7>(w + 256);
      tile_multiply_add<1, 4, 7>();
      tile_load<5>(second + 4 * i, a.step);
      tile_multiply_add<2, 5, 6>();
      tile_multiply_add<3, 5, 7>();
    }
  }
  meanwhile();
  float* const other = sums + rows * kColumns;
  tile_store<0>(sums, 4 * kColumns);
  tile_store<1>(sums + 16, 4 * kColumns);
  tile_store<2>(other, 4 * kColumns);
  tile_store<3>(other + 16, 4 * kColumns);
}

#else

template <class Op, int ROWS>
__attribute__((noinline)) void multiply_row_block(const TokenRows& a, const packed32* w, float* sums) {
  static_assert(kColumns == 2 * kLanes);
  // Rows are addressed as base + {1, 2, 4} step, {1, 2} step3, step5: two pointers that advance, not fourteen.
  int64_t step = a.step, step3 = 3 * step, step5 = 5 * step;
  for (int64_t run = 0, word = 0; run < a.runs;) {
    const bool add = run + word > 0;
    vf sum[2][ROWS][2];
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[t][r][0] = sum[t][r][1] = vf{};
    for (int64_t left = Op::kSumWords; left > 0 && run < a.runs;) {
      const int64_t count = least(a.words - word, left), at = a.runs_at[run] + 4 * word;
      const char *first = a.tile[0] + at, *second = a.tile[1] + at;
      for (int64_t i = 0; i < count; ++i) {
        asm("" : "+r"(step), "+r"(step3), "+r"(step5));
        vu low = read<vu>(w), high = read<vu>(w + kLanes);
        asm("" : "+v"(low), "+v"(high));
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t)
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) {
            const char* base = t ? second : first;
            const char* row = r == 0   ? base
                              : r < 3  ? base + r * step
                              : r == 3 ? base + step3
                              : r == 4 ? base + 4 * step
                              : r == 5 ? base + step5
                                       : base + 2 * step3;
            vu token = vu{} + read<packed32>(row);
            asm("" : "+v"(token));  // one load, not one for each product
            sum[t][r][0] = Op::multiply_add(sum[t][r][0], token, low);
            sum[t][r][1] = Op::multiply_add(sum[t][r][1], token, high);
          }
        first += 4, second += 4, w += kColumns;
      }
      left -= count;
      word += count;
      if (word == a.words) word = 0, ++run;
    }
    float* out = sums;
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r, out += kColumns) {
        store(out, add ? load(out) + sum[t][r][0] : sum[t][r][0]);
        store(out + kLanes, add ? load(out + kLanes) + sum[t][r][1] : sum[t][r][1]);
      }
  }
}

template <class Op, bool, class F>
PK_INLINE void multiply_rows(const TokenRows& a, const packed32* w, int64_t rows, float* sums, const F& meanwhile) {
  meanwhile();
  switch (rows) {
    case 1: return multiply_row_block<Op, 1>(a, w, sums);
    case 2: return multiply_row_block<Op, 2>(a, w, sums);
    case 3: return multiply_row_block<Op, 3>(a, w, sums);
    case 4: return multiply_row_block<Op, 4>(a, w, sums);
    case 5: return multiply_row_block<Op, 5>(a, w, sums);
    case 6: return multiply_row_block<Op, 6>(a, w, sums);
    default: return multiply_row_block<Op, 7>(a, w, sums);
  }
}

#endif

}  // namespace
}  // namespace pk
