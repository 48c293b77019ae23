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

// 32 elements, the even ones and the odd ones.
PK_INLINE Pair load_even_odd(const bf16* p) { return load_pair(p); }
PK_INLINE void store_even_odd(bf16* p, Pair v) { store_pair(p, v); }
typedef int32_t LaneOrder __attribute__((vector_size(64)));
PK_INLINE Pair load_even_odd(const float* p) {
  LaneOrder even{};
  for (int i = 0; i < 16; ++i) even[i] = 2 * i;
  const __m512 low = (__m512)load(p), high = (__m512)load(p + 16);
  return {(vf)_mm512_permutex2var_ps(low, (__m512i)even, high),
          (vf)_mm512_permutex2var_ps(low, (__m512i)(even + 1), high)};
}
PK_INLINE void store_even_odd(float* p, Pair v) {
  LaneOrder low{};
  for (int i = 0; i < 16; ++i) low[i] = i / 2 + i % 2 * 16;
  store(p, (vf)_mm512_permutex2var_ps((__m512)v.a, (__m512i)low, (__m512)v.b));
  store(p + 16, (vf)_mm512_permutex2var_ps((__m512)v.a, (__m512i)(low + 8), (__m512)v.b));
}

// 32 elements rounded to bfloat16.
PK_INLINE __m512i rounded_row(const bf16* p) { return read<__m512i>(p); }
PK_INLINE __m512i rounded_row(const float* p) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)load(p + 16), (__m512)load(p));
}
PK_INLINE Pair rounded_pair(const bf16* p) { return load_pair(p); }
PK_INLINE Pair rounded_pair(const float* p) {
  const vu words = (vu)rounded_row(p);
  return {(vf)(words << 16), (vf)(words & 0xffff0000u)};
}

template <class W>
PK_INLINE const W* weight_row(const Weight& w, int64_t row, int64_t col) {
  return static_cast<const W*>(w.data) + row * w.step + col;
}

// The tile pair for block (row, col) of [.., columns] tile pairs.
PK_INLINE uint16_t* tile_pair(uint16_t* tiles, int64_t row, int64_t columns, int64_t col) {
  return tiles + (row * columns + col) * (kTilePair / 2);
}

// ---- packed weights

// W1 for h = n W1^T: channels along k, so 16 rows of the weight are transposed; even and odd hidden channels.
template <class W>
PK_INLINE void pack_w1(const RowsBackwardParams& p, int64_t j, int64_t k, char* out) {
  for (int64_t half = 0; half < 2; ++half)
    transpose_vectors(
        [&](int64_t i)
            PK_FORCED { return rounded_row(weight_row<W>(p.w1, j * kRowsSide + half + 2 * i, k * kRowsSide)); },
        out + half * kTileBytes, 64);
}

// diag(s) W2 for dp = g (s W2): output channels along k; even and odd hidden channels.
template <class W>
PK_INLINE void pack_w2(const RowsBackwardParams& p, int64_t j, int64_t k, uint16_t* out) {
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t c = k * kRowsSide + 2 * i;
    const vf scale_a = splat(p.scale[c]), scale_b = splat(p.scale[c + 1]);
    const Pair a = rounded_pair(weight_row<W>(p.w2, c, j * kRowsSide));
    const Pair b = rounded_pair(weight_row<W>(p.w2, c + 1, j * kRowsSide));
    store_bf16_pair(out + i * 32, {a.a * scale_a, b.a * scale_b});
    store_bf16_pair(out + i * 32 + kTileBytes / 2, {a.b * scale_a, b.b * scale_b});
  }
}

// W1 for e = dh W1: hidden channels along k, which two rows of the weight give.
template <class W>
PK_INLINE void pack_w1_rows(const RowsBackwardParams& p, int64_t j, int64_t c) {
  const int64_t columns = p.channels / kRowsSide, most = kRowsInputHidden / kRowsSide, chunk = j / most * most;
  const int64_t steps = least(most, p.hidden / kRowsSide - chunk);
  uint16_t* out = tile_pair(p.w1_rows_tiles, chunk * columns + c * steps + j - chunk, 1, 0);
  typedef uint16_t Words __attribute__((vector_size(64)));
  Words low{}, high{};
  for (int i = 0; i < 32; ++i) low[i] = i / 2 + i % 2 * 32, high[i] = 16 + i / 2 + i % 2 * 32;
  for (int64_t i = 0; i < 16; ++i) {
    const __m512i a = rounded_row(weight_row<W>(p.w1, j * kRowsSide + 2 * i, c * kRowsSide));
    const __m512i b = rounded_row(weight_row<W>(p.w1, j * kRowsSide + 2 * i + 1, c * kRowsSide));
    write(out + i * 32, _mm512_permutex2var_epi16(a, (__m512i)low, b));
    write(out + i * 32 + kTileBytes / 2, _mm512_permutex2var_epi16(a, (__m512i)high, b));
  }
}

// The weights of 32 hidden channels for `hidden`: [C / 32] tile pairs each.
template <class W>
__attribute__((noinline)) void pack_hidden_of(const RowsBackwardParams& p, int64_t j, uint16_t* w1, uint16_t* w2) {
  for (int64_t k = 0; k < p.channels / kRowsSide; ++k) {
    pack_w1<W>(p, j, k, reinterpret_cast<char*>(tile_pair(w1, k, 1, 0)));
    pack_w2<W>(p, j, k, tile_pair(w2, k, 1, 0));
  }
}
PK_INLINE void pack_hidden(const RowsBackwardParams& p, int64_t j, uint16_t* w1, uint16_t* w2) {
  p.w1.dtype == 0 ? pack_hidden_of<float>(p, j, w1, w2) : pack_hidden_of<bf16>(p, j, w1, w2);
}

// See RowsBackwardKernels::pack.
void rows_pack(const RowsBackwardParams& p, int64_t j) {
  const int64_t columns = p.channels / kRowsSide;
  if (p.packed) pack_hidden(p, j, tile_pair(p.w1_tiles, j, columns, 0), tile_pair(p.w2_tiles, j, columns, 0));
  for (int64_t c = 0; c < columns; ++c) p.w1.dtype == 0 ? pack_w1_rows<float>(p, j, c) : pack_w1_rows<bf16>(p, j, c);
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
template <class T>
PK_INLINE void normalise_rows(const RowsBackwardParams& p, int64_t first, int64_t count, int64_t sub, uint16_t* rows) {
  const int64_t steps = p.channels / kRowsSide;
  uint16_t* n = tile_pair(p.n_tiles, sub, steps, 0);
  each_sample(p.pixels, first, count, [&](int64_t b, int64_t, int64_t lane, int64_t run) PK_FORCED {
    const vf mean = splat(p.norm ? p.mean[b] : 0), rstd = splat(p.norm ? p.rstd[b] : 1);
    const T* x = static_cast<const T*>(p.x) + first * p.channels;
    for (int64_t k = 0, c = 0; k < steps; ++k, c += kRowsSide) {
      const Pair gamma = load_split(p.gamma_split + c), beta = load_split(p.beta_split + c);
      for (int64_t i = lane; i < lane + run; ++i) {
        const Pair v = load_even_odd(x + i * p.channels + c), hat = {(v.a - mean) * rstd, (v.b - mean) * rstd};
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

// g as rows of `count` tokens, rounded, with zeros in those that 32 lack. Where rounding changes g, `sums` [out]
// gets its sums over the tokens before that, of each 32 channels the even ones first, unless it is null.
PK_INLINE void copy_rows(const RowsBackwardParams& p, const bf16* g, int64_t count, uint16_t* rows, float*) {
  __builtin_memcpy(rows, g, count * p.out * 2);
  __builtin_memset(rows + count * p.out, 0, (kRowsSide - count) * p.out * 2);
}
PK_INLINE void copy_rows(const RowsBackwardParams& p, const float* g, int64_t count, uint16_t* rows, float* sums) {
  for (int64_t c = 0; c < p.out; c += kRowsSide) {
    Pair sum{};
    for (int64_t i = 0; i < count; ++i) {
      const Pair v = load_even_odd(g + i * p.out + c);
      sum = {sum.a + v.a, sum.b + v.b};
      store_bf16_pair(rows + i * p.out + c, v);
    }
    if (sums) store(sums + c, sum.a), store(sums + c + 16, sum.b);
  }
  __builtin_memset(rows + count * p.out, 0, (kRowsSide - count) * p.out * 2);
}

// d g as rows of `count` tokens, rounded, and its sums before that.
template <class T>
PK_INLINE void drop_rows(const RowsBackwardParams& p, const T* g, int64_t count, const float* drop, uint16_t* rows,
                         float* sums) {
  for (int64_t c = 0; c < p.out; c += kRowsSide) {
    Pair sum{};
    for (int64_t i = 0; i < count; ++i) {
      const vf d = splat(drop[i]);
      const Pair v = load_even_odd(g + i * p.out + c), dropped = {v.a * d, v.b * d};
      sum = {sum.a + dropped.a, sum.b + dropped.b};
      store_bf16_pair(rows + i * p.out + c, dropped);
    }
    store(sums + c, sum.a), store(sums + c + 16, sum.b);
  }
  if (count < kRowsSide) __builtin_memset(rows + count * p.out, 0, (kRowsSide - count) * p.out * 2);
}

int64_t rows_load_scratch(const RowsBackwardParams& p) { return kRowsSide * p.channels / 2; }

// `rows` [32, C] is scratch. T: elements of x and g.
template <class T>
PK_INLINE void load_sub(const RowsBackwardParams& p, const RowsBlock& block, int64_t sub, uint16_t* rows) {
  const int64_t at = sub * kRowsSide, first = block.first + at, count = least(kRowsSide, block.tokens - at);
  const int64_t subs = p.block_tokens / kRowsSide;
  normalise_rows<T>(p, first, count, sub, rows);
  const T* g = static_cast<const T*>(p.grad) + first * p.out;
  float* sums = p.parameter_grads ? p.g_sums + sub * p.out : nullptr;
  if (p.g_copied(block, sub)) copy_rows(p, g, count, p.g_copy(sub), sums);
  if (!p.parameter_grads) return;
  tokens_along_k(rows, p.channels, sub, subs, p.x_tiles, nullptr);
  if (p.dropped) {
    drop_rows(p, g, count, p.drop_rows + at, rows, sums);
    tokens_along_k(rows, p.out, sub, subs, p.g_tiles, nullptr);
  } else {
    tokens_along_k(static_cast<const uint16_t*>(p.g_rows_of(block, sub)), p.out, sub, subs, p.g_tiles,
                   p.floats ? nullptr : sums);
  }
}

// See RowsBackwardKernels::load.
template <class T>
void rows_load(const RowsBackwardParams& p, const RowsBlock& block, int64_t first_sub, int64_t last_sub,
               packed32* scratch) {
  for (int64_t sub = first_sub; sub < last_sub; ++sub) load_sub<T>(p, block, sub, reinterpret_cast<uint16_t*>(scratch));
}

}  // namespace
}  // namespace pk
