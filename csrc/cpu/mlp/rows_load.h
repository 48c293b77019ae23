// Operands of the MLP's backward with tokens as rows (rows_backward.h): packed weights, and a block's tokens.
#pragma once

#include "../core/scratch.h"
#include "../product/tile_block.h"
#include "../product/token_tile.h"
#include "rows_backward_params.h"

namespace pk {
namespace {

PK_INLINE Pair load_bf16_pair(const uint16_t* p) { return load_pair(reinterpret_cast<const bf16*>(p)); }
PK_INLINE void store_bf16_pair(uint16_t* p, Pair v) { store_pair(reinterpret_cast<bf16*>(p), v); }
// 32 floats that are split.
PK_INLINE Pair load_split(const float* p) { return {load(p), load(p + 16)}; }

PK_INLINE const uint16_t* weight_row(const Weight& w, int64_t row, int64_t col) {
  return static_cast<const uint16_t*>(w.data) + row * w.step + col;
}

// The tile pair for block (row, col) of [.., columns] tile pairs.
PK_INLINE uint16_t* tile_pair(uint16_t* tiles, int64_t row, int64_t columns, int64_t col) {
  return tiles + (row * columns + col) * (kTilePair / 2);
}

// ---- packed weights

// W1 for h = n W1^T: channels along k, so 16 rows of the weight are transposed; even and odd hidden channels.
PK_INLINE void pack_w1(const RowsBackwardParams& p, int64_t j, int64_t k, char* out) {
  for (int64_t half = 0; half < 2; ++half)
    transpose_block([&](int64_t i) PK_FORCED { return weight_row(p.w1, j * kRowsSide + half + 2 * i, k * kRowsSide); },
                    out + half * kTileBytes, 64);
}

// diag(s) W2 for dp = g (s W2): output channels along k; even and odd hidden channels.
PK_INLINE void pack_w2(const RowsBackwardParams& p, int64_t j, int64_t k, uint16_t* out) {
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t c = k * kRowsSide + 2 * i;
    const vf scale_a = splat(p.scale[c]), scale_b = splat(p.scale[c + 1]);
    const Pair a = load_bf16_pair(weight_row(p.w2, c, j * kRowsSide));
    const Pair b = load_bf16_pair(weight_row(p.w2, c + 1, j * kRowsSide));
    store_bf16_pair(out + i * 32, {a.a * scale_a, b.a * scale_b});
    store_bf16_pair(out + i * 32 + kTileBytes / 2, {a.b * scale_a, b.b * scale_b});
  }
}

// W1 for e = dh W1: hidden channels along k, which two rows of the weight give.
PK_INLINE void pack_w1_rows(const RowsBackwardParams& p, int64_t j, int64_t c) {
  const int64_t columns = p.channels / kRowsSide, most = kRowsInputHidden / kRowsSide, chunk = j / most * most;
  const int64_t steps = least(most, p.hidden / kRowsSide - chunk);
  uint16_t* out = tile_pair(p.w1_rows_tiles, chunk * columns + c * steps + j - chunk, 1, 0);
  typedef uint16_t Words __attribute__((vector_size(64)));
  Words low{}, high{};
  for (int i = 0; i < 32; ++i) low[i] = i / 2 + i % 2 * 32, high[i] = 16 + i / 2 + i % 2 * 32;
  for (int64_t i = 0; i < 16; ++i) {
    const __m512i a = read<__m512i>(weight_row(p.w1, j * kRowsSide + 2 * i, c * kRowsSide));
    const __m512i b = read<__m512i>(weight_row(p.w1, j * kRowsSide + 2 * i + 1, c * kRowsSide));
    write(out + i * 32, _mm512_permutex2var_epi16(a, (__m512i)low, b));
    write(out + i * 32 + kTileBytes / 2, _mm512_permutex2var_epi16(a, (__m512i)high, b));
  }
}

// The weights of 32 hidden channels for `hidden`: [C / 32] tile pairs each.
__attribute__((noinline)) void pack_hidden(const RowsBackwardParams& p, int64_t j, uint16_t* w1, uint16_t* w2) {
  for (int64_t k = 0; k < p.channels / kRowsSide; ++k) {
    pack_w1(p, j, k, reinterpret_cast<char*>(tile_pair(w1, k, 1, 0)));
    pack_w2(p, j, k, tile_pair(w2, k, 1, 0));
  }
}

// See RowsBackwardKernels::pack.
void rows_pack(const RowsBackwardParams& p, int64_t j) {
  const int64_t columns = p.channels / kRowsSide;
  if (p.packed) pack_hidden(p, j, tile_pair(p.w1_tiles, j, columns, 0), tile_pair(p.w2_tiles, j, columns, 0));
  for (int64_t c = 0; c < columns; ++c) pack_w1_rows(p, j, c);
}

// ---- a block's tokens

// 32 rows of channels turned so that tokens run along k: of 32 channels the even and the odd ones are a tile each.
// `sums` [channels], where not null: their sums over the rows, split.
PK_INLINE void tokens_along_k(const uint16_t* rows, int64_t channels, int64_t sub, int64_t subs, uint16_t* tiles,
                              float* sums) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t c = 0; c < channels; c += kRowsSide) {
    char* out = reinterpret_cast<char*>(tile_pair(tiles, c / kRowsSide, subs, sub));
    const auto row = [&](int i) PK_FORCED { return read<__m512i>(rows + i * channels + c); };
    __m512 even = {}, odd = {};
    transpose_vectors(
        [&](int i) PK_FORCED {
          const __m512i v = _mm512_mask_mov_epi16(row(2 * i), 0xaaaaaaaa, _mm512_slli_epi32(row(2 * i + 1), 16));
          even = _mm512_dpbf16_ps(even, (__m512bh)v, ones);
          return v;
        },
        out, 64);
    transpose_vectors(
        [&](int i) PK_FORCED {
          const __m512i v = _mm512_mask_mov_epi16(row(2 * i + 1), 0x55555555, _mm512_srli_epi32(row(2 * i), 16));
          odd = _mm512_dpbf16_ps(odd, (__m512bh)v, ones);
          return v;
        },
        out + kTileBytes, 64);
    if (sums) store(sums + c, (vf)even), store(sums + c + 16, (vf)odd);
  }
}

// n_tiles of `count` tokens, and (x - mean) rstd as rows.
PK_INLINE void normalise_rows(const RowsBackwardParams& p, int64_t first, int64_t count, int64_t sub, uint16_t* rows) {
  const int64_t steps = p.channels / kRowsSide;
  uint16_t* n = tile_pair(p.n_tiles, sub, steps, 0);
  each_sample(p.pixels, first, count, [&](int64_t b, int64_t, int64_t lane, int64_t run) PK_FORCED {
    const vf mean = splat(p.norm ? p.mean[b] : 0), rstd = splat(p.norm ? p.rstd[b] : 1);
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + first * p.channels;
    for (int64_t k = 0, c = 0; k < steps; ++k, c += kRowsSide) {
      const Pair gamma = load_split(p.gamma_split + c), beta = load_split(p.beta_split + c);
      for (int64_t i = lane; i < lane + run; ++i) {
        const Pair v = load_bf16_pair(x + i * p.channels + c), hat = {(v.a - mean) * rstd, (v.b - mean) * rstd};
        store_bf16_pair(rows + i * p.channels + c, hat);
        store_bf16_pair(n + (k * kTilePair + i * 64) / 2, {hat.a * gamma.a + beta.a, hat.b * gamma.b + beta.b});
      }
    }
  });
  for (int64_t i = count; i < kRowsSide; ++i) {
    __builtin_memset(rows + i * p.channels, 0, 2 * p.channels);
    for (int64_t k = 0; k < steps; ++k) __builtin_memset(n + (k * kTilePair + i * 64) / 2, 0, 64);
  }
}

// d g as rows of `count` tokens, rounded, and its sums before that.
PK_INLINE void drop_rows(const RowsBackwardParams& p, const uint16_t* g, int64_t count, const float* drop,
                         uint16_t* rows, float* sums) {
  for (int64_t c = 0; c < p.out; c += kRowsSide) {
    Pair sum{};
    for (int64_t i = 0; i < count; ++i) {
      const vf d = splat(drop[i]);
      const Pair v = load_bf16_pair(g + i * p.out + c), dropped = {v.a * d, v.b * d};
      sum = {sum.a + dropped.a, sum.b + dropped.b};
      store_bf16_pair(rows + i * p.out + c, dropped);
    }
    store(sums + c, sum.a), store(sums + c + 16, sum.b);
  }
  if (count < kRowsSide) __builtin_memset(rows + count * p.out, 0, (kRowsSide - count) * p.out * 2);
}

int64_t rows_load_scratch(const RowsBackwardParams& p) { return kRowsSide * p.channels / 2; }

// `rows` [32, C] is scratch.
PK_INLINE void load_sub(const RowsBackwardParams& p, const RowsBlock& block, int64_t sub, uint16_t* rows) {
  const int64_t at = sub * kRowsSide, first = block.first + at, count = least(kRowsSide, block.tokens - at);
  const int64_t subs = p.block_tokens / kRowsSide;
  normalise_rows(p, first, count, sub, rows);
  const uint16_t* g = static_cast<const uint16_t*>(p.grad) + first * p.out;
  if (count < kRowsSide) {
    __builtin_memcpy(p.g_rest, g, count * p.out * 2);
    __builtin_memset(p.g_rest + count * p.out, 0, (kRowsSide - count) * p.out * 2);
    g = p.g_rest;
  }
  if (!p.parameter_grads) return;
  tokens_along_k(rows, p.channels, sub, subs, p.x_tiles, nullptr);
  float* sums = p.g_sums + sub * p.out;
  if (p.dropped) {
    drop_rows(p, g, count, p.drop_rows + at, rows, sums);
    tokens_along_k(rows, p.out, sub, subs, p.g_tiles, nullptr);
  } else {
    tokens_along_k(g, p.out, sub, subs, p.g_tiles, sums);
  }
}

// See RowsBackwardKernels::load.
void rows_load(const RowsBackwardParams& p, const RowsBlock& block, int64_t first_sub, int64_t last_sub,
               packed32* scratch) {
  for (int64_t sub = first_sub; sub < last_sub; ++sub) load_sub(p, block, sub, reinterpret_cast<uint16_t*>(scratch));
}

}  // namespace
}  // namespace pk
