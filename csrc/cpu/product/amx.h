// Products of bfloat16 pairs on AMX tiles. gemm.h includes it at the level that has them.
//
// Assembly, since gcc 12's _tile_loadconfig lets the stores of the configuration be dropped and its _tile_loadd does
// not say that it reads memory. With PK_EMULATE_TILES the eight registers are arrays, for tests on other machines.
#pragma once

#include "../isa/vec.h"
#include "prefetch.h"

namespace pk {
namespace {

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tile registers where tokens are rows: 0 .. 3 hold sums of `rows` tokens, 4 and 5 tokens, 6 and 7 weights.
PK_INLINE TileConfig token_tiles(int64_t rows) {
  TileConfig config;
  for (int i = 0; i < 6; ++i) config.rows[i] = rows;
  return config;
}

#if !defined(PK_EMULATE_TILES)
// Configures the tile registers, and releases them when it is destroyed. Every kernel that multiplies has one.
struct MatrixUnit {
  PK_INLINE MatrixUnit(const TileConfig& config = {}) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  PK_INLINE ~MatrixUnit() { asm volatile("tilerelease"); }
};
template <int TILE>
PK_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
template <int TILE>
PK_INLINE void tile_load(const void* p, int64_t step) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(p), "r"(step) : "memory");
}
// As tile_load, but lines that come from L2 do not displace others in L1: for an operand that streams.
template <int TILE>
PK_INLINE void tile_stream(const void* p, int64_t step) {
  asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(p), "r"(step) : "memory");
}
template <int TILE>
PK_INLINE void tile_store(void* p, int64_t step) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(TILE), "r"(p), "r"(step) : "memory");
}
template <int SUM, int A, int B>
PK_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}
#else
thread_local uint8_t tile_rows[8];
thread_local packed32 tiles[8][16][16];
struct MatrixUnit {
  MatrixUnit(const TileConfig& config = {}) { __builtin_memcpy(tile_rows, config.rows, sizeof tile_rows); }
  ~MatrixUnit() { __builtin_memset(tile_rows, 0, sizeof tile_rows); }
};
template <int TILE>
void tile_zero() {
  __builtin_memset(tiles[TILE], 0, sizeof tiles[TILE]);
}
template <int TILE>
void tile_load(const void* p, int64_t step) {
  for (int r = 0; r < tile_rows[TILE]; ++r)
    __builtin_memcpy(tiles[TILE][r], static_cast<const char*>(p) + r * step, 64);
}
template <int TILE>
void tile_stream(const void* p, int64_t step) {
  tile_load<TILE>(p, step);
}
template <int TILE>
void tile_store(void* p, int64_t step) {
  for (int r = 0; r < tile_rows[TILE]; ++r) __builtin_memcpy(static_cast<char*>(p) + r * step, tiles[TILE][r], 64);
}
template <int SUM, int A, int B>
void tile_multiply_add() {
  const auto low = [](packed32 w) { return __builtin_bit_cast(float, w << 16); };
  const auto high = [](packed32 w) { return __builtin_bit_cast(float, w & 0xffff0000u); };
  if (tile_rows[SUM] != tile_rows[A] || tile_rows[B] != 16) __builtin_trap();  // the instruction would fault
  for (int r = 0; r < tile_rows[SUM]; ++r)
    for (int c = 0; c < 16; ++c) {
      float sum = __builtin_bit_cast(float, tiles[SUM][r][c]);
      for (int k = 0; k < 16; ++k) {
        const packed32 a = tiles[A][r][k], b = tiles[B][k][c];
        sum = low(a) * low(b) + sum;
        sum = high(a) * high(b) + sum;
      }
      tiles[SUM][r][c] = __builtin_bit_cast(packed32, sum);
    }
}
#endif

// 32 rows of `out`, 16 * COLUMNS lanes wide: a step of k, 16 words, takes two tiles of a and COLUMNS of b.
template <int COLUMNS>
PK_INLINE void multiply_tiles(const packed32* a, int64_t a_row, const packed32* b, int64_t b_row, int64_t k, float* out,
                              int64_t out_row, bool add, const PrefetchRows& next) {
  const int64_t out_step = out_row * sizeof(float), a_step = a_row * sizeof(packed32),
                b_step = b_row * sizeof(packed32);
  if (add) {
    tile_load<0>(out, out_step);
    tile_load<1>(out + 16 * out_row, out_step);
    if constexpr (COLUMNS == 2) {
      tile_load<2>(out + 16, out_step);
      tile_load<3>(out + 16 * out_row + 16, out_step);
    }
  } else {
    tile_zero<0>();
    tile_zero<1>();
    if constexpr (COLUMNS == 2) {
      tile_zero<2>();
      tile_zero<3>();
    }
  }
  for (int64_t i = 0; i < k; i += 16) {
    next.fetch(i, 32);
    tile_load<4>(a + i, a_step);
    tile_load<5>(a + 16 * a_row + i, a_step);
    tile_stream<6>(b + i * b_row, b_step);
    tile_multiply_add<0, 4, 6>();
    tile_multiply_add<1, 5, 6>();
    if constexpr (COLUMNS == 2) {
      tile_stream<7>(b + i * b_row + 16, b_step);
      tile_multiply_add<2, 4, 7>();
      tile_multiply_add<3, 5, 7>();
    }
  }
  tile_store<0>(out, out_step);
  tile_store<1>(out + 16 * out_row, out_step);
  if constexpr (COLUMNS == 2) {
    tile_store<2>(out + 16, out_step);
    tile_store<3>(out + 16 * out_row + 16, out_step);
  }
}

struct Bf16Pairs {
  static constexpr int kPer = 2;
  static constexpr int kStep = 16;
  static constexpr int kRows = 32;
  using Element = bf16;
};

// See the general `multiply` in gemm.h.
template <class Op>
void multiply(const packed32* a, int64_t a_row, int64_t rows, const packed32* b, int64_t b_row, int64_t lanes,
              int64_t k, float* out, int64_t out_row, bool add, const PrefetchRows& next = {}) {
  static_assert(__is_same(Op, Bf16Pairs));
  for (int64_t l = 0; l < lanes; l += 32)
    for (int64_t r = 0; r < rows; r += 32) {
      const PrefetchRows now = l == 0 ? next : PrefetchRows{};
      if (lanes - l >= 32)
        multiply_tiles<2>(a + r * a_row, a_row, b + l, b_row, k, out + r * out_row + l, out_row, add, now);
      else
        multiply_tiles<1>(a + r * a_row, a_row, b + l, b_row, k, out + r * out_row + l, out_row, add, now);
    }
}

}  // namespace
}  // namespace pk
