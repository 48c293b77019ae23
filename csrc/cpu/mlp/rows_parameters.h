// What the MLP's backward with tokens as rows (rows_backward.h) makes of its products: the parameters' gradients, and
// dx.
#pragma once

#include "../product/tile_block.h"
#include "../product/token_tile.h"
#include "gelu_slope_table.h"
#include "rows_load.h"

namespace pk {
namespace {

// Lane i: the sum of value(i)'s lanes, for 16 vectors.
template <class Value>
PK_INLINE vf lane_sums(const Value& value) {
  // Where sums of a and of b are to be neighbours, their halves are exchanged and added: by pairs of lanes that are 1,
  // 2, 4 and 8 apart.
  const auto join = [](vf a, vf b, auto first, auto second) PK_FORCED { return first(a, b) + second(a, b); };
  vf v[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)  // lane 4 q + 2 r + h: of v[i] (h = 0) or v[i + 8]
    v[i] = join(
        value(i), value(i + 8), [](vf a, vf b) PK_FORCED { return (vf)_mm512_unpacklo_ps((__m512)a, (__m512)b); },
        [](vf a, vf b) PK_FORCED { return (vf)_mm512_unpackhi_ps((__m512)a, (__m512)b); });
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)  // lane 4 q + 2 r + h: of vector i + 4 r + 8 h
    v[i] = join(
        v[i], v[i + 4], [](vf a, vf b) PK_FORCED { return (vf)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); },
        [](vf a, vf b) PK_FORCED { return (vf)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); });
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    v[i] = join(
        v[i], v[i + 2], [](vf a, vf b) PK_FORCED { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88); },
        [](vf a, vf b) PK_FORCED { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd); });
  // Quarters 0 and 1 of v[i] are now of vectors i + .., quarters 2 and 3 of i + 2 + ..
  const vf sums = join(
      v[0], v[1], [](vf a, vf b) PK_FORCED { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88); },
      [](vf a, vf b) PK_FORCED { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd); });
  // Lane 4 q + 2 r + h has the sum of vector kQuarter[q] + 4 r + 8 h
  typedef int32_t Order __attribute__((vector_size(64)));
  Order order{};
  constexpr int kQuarter[4] = {0, 2, 1, 3};
  for (int q = 0; q < 4; ++q)
    for (int r = 0; r < 2; ++r)
      for (int h = 0; h < 2; ++h) order[kQuarter[q] + 4 * r + 8 * h] = 4 * q + 2 * r + h;
  return (vf)_mm512_permutexvar_ps((__m512i)order, (__m512)sums);
}

// ---- the parameters' gradients of hidden channels 32 j .. 32 j + 31 and channels 32 c .. 32 c + 31

// Output channels: with G = d g p summed over tokens, dW2 = diag(s) G and the part of dscale that is W2 G.
template <class W>
PK_INLINE void output_gradients(const RowsBackwardParams& p, int64_t j, int64_t c, const float* products) {
  const int64_t hidden = j * kRowsSide;
  const bool more = (c + 1) * kRowsSide < p.out;  // rows so far apart come from L3, or further away
  float* sums = p.scale_sums + j * p.out + c * kRowsSide;
#pragma GCC unroll 1
  for (int64_t odd = 0; odd < 2; ++odd)
    store(sums + 16 * odd, 0.25f * lane_sums([&](int64_t i) PK_FORCED {
                             const int64_t channel = c * kRowsSide + 2 * i + odd;
                             const Pair g = load_split(products + (16 * odd + i) * kRowsSide);
                             const W* row = weight_row<W>(p.w2, channel, hidden);
                             const Pair w = rounded_pair(row);
                             W* out = static_cast<W*>(p.dw2) + channel * p.hidden + hidden;
                             const vf scale = splat(0.25f * p.scale[channel]);
                             store_even_odd(out, {g.a * scale, g.b * scale});
                             if (more)
                               for (int64_t line = 0; line < kRowsSide; line += 64 / sizeof(W))
                                 __builtin_prefetch(row + kRowsSide * p.w2.step + line),
                                     __builtin_prefetch(out + kRowsSide * p.hidden + line, 1);
                             return w.a * g.a + w.b * g.b;
                           }));
}

// Input channels: with M = xhat dh summed over tokens, dW1 = M diag(gamma) + db1 beta^T.
PK_INLINE void input_gradients(const RowsBackwardParams& p, int64_t j, int64_t c, const float* products, bf16*) {
  const int64_t hidden = j * kRowsSide, channel = c * kRowsSide;
  uint16_t* dw1 = static_cast<uint16_t*>(p.dw1) + hidden * p.channels + channel;
  alignas(64) uint16_t block[kTileBytes / 2];
  typedef uint16_t Words __attribute__((vector_size(64)));
  Words order{};
  for (int i = 0; i < 16; ++i) order[2 * i] = i, order[2 * i + 1] = 16 + i;
  if (hidden + kRowsSide < p.hidden)
    for (int64_t i = 0; i < kRowsSide; ++i) __builtin_prefetch(dw1 + (kRowsSide + i) * p.channels, 1);
  for (int64_t odd = 0; odd < 2; ++odd) {  // hidden channels
    const vf db1 = load(p.db1 + hidden + 16 * odd);
    transpose_vectors(
        [&](int64_t i) PK_FORCED {
          const vf a = load(products + i * kRowsSide + 16 * odd), b = load(products + (16 + i) * kRowsSide + 16 * odd);
          const float *gamma = p.gamma + channel + 2 * i, *beta = p.beta + channel + 2 * i;
          const vf even_channel = a * splat(gamma[0]) + db1 * splat(beta[0]);
          const vf odd_channel = b * splat(gamma[1]) + db1 * splat(beta[1]);
          return _mm512_permutexvar_epi16((__m512i)order,
                                          (__m512i)_mm512_cvtne2ps_pbh((__m512)odd_channel, (__m512)even_channel));
        },
        reinterpret_cast<char*>(block), 64);
    for (int64_t i = 0; i < 16; ++i) write(dw1 + (2 * i + odd) * p.channels, read<__m512i>(block + i * 32));
  }
}

PK_INLINE void input_gradients(const RowsBackwardParams& p, int64_t j, int64_t c, const float* products, float*) {
  const int64_t hidden = j * kRowsSide, channel = c * kRowsSide;
  float* dw1 = static_cast<float*>(p.dw1) + hidden * p.channels + channel;
  if (hidden + kRowsSide < p.hidden)
    for (int64_t i = 0; i < kRowsSide; ++i)
      __builtin_prefetch(dw1 + (kRowsSide + i) * p.channels, 1),
          __builtin_prefetch(dw1 + (kRowsSide + i) * p.channels + 16, 1);
  for (int64_t odd = 0; odd < 2; ++odd) {  // hidden channels
    const vf db1 = load(p.db1 + hidden + 16 * odd);
    for (int64_t half = 0; half < kRowsSide; half += 16)
      transpose_vectors(
          [&](int64_t i) PK_FORCED {
            const vf m = load(products + (i % 2 * 16 + (half + i) / 2) * kRowsSide + 16 * odd);
            return (__m512i)(m * splat(p.gamma[channel + half + i]) + db1 * splat(p.beta[channel + half + i]));
          },
          reinterpret_cast<char*>(dw1 + odd * p.channels + half), 2 * p.channels * sizeof(float));
  }
}

// dgamma = sum over hidden channels of W1 M, dbeta of W1 db1: the part of these hidden channels. `w1`: their tile pair.
PK_INLINE void norm_gradients(const RowsBackwardParams& p, int64_t j, int64_t c, const uint16_t* w1,
                              const float* products) {
  const Pair db1 = load_split(p.db1 + j * kRowsSide);
  const int64_t at = j * p.channels + c * kRowsSide;
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; ++odd) {  // channels
    const auto weights = [&](int64_t i) PK_FORCED {
      const Pair even_hidden = load_bf16_pair(w1 + i * 32), odd_hidden = load_bf16_pair(w1 + i * 32 + kTileBytes / 2);
      return odd ? Pair{even_hidden.b, odd_hidden.b} : Pair{even_hidden.a, odd_hidden.a};
    };
    store(p.gamma_sums + at + 16 * odd, lane_sums([&](int64_t i) PK_FORCED {
            const Pair w = weights(i), m = load_split(products + (16 * odd + i) * kRowsSide);
            return w.a * m.a + w.b * m.b;
          }));
    store(p.beta_sums + at + 16 * odd, lane_sums([&](int64_t i) PK_FORCED {
            const Pair w = weights(i);
            return w.a * db1.a + w.b * db1.b;
          }));
  }
}

// `w1`: tile pairs of these hidden channels. W: elements of the weights and of their gradients.
template <class W>
__attribute__((noinline)) void rows_parameters(const RowsBackwardParams& p, int64_t j, const uint16_t* w1,
                                               const float* g_p, const float* x_dh) {
  for (int64_t c = 0; c < p.channels / kRowsSide; ++c) {
    output_gradients<W>(p, j, c, g_p + c * kRowsSide * kRowsSide);
    input_gradients(p, j, c, x_dh + c * kRowsSide * kRowsSide, static_cast<W*>(nullptr));
    norm_gradients(p, j, c, w1 + c * (kTilePair / 2), x_dh + c * kRowsSide * kRowsSide);
  }
}

// ---- GroupNorm's backward

// e_sum and e_product of 32 tokens of the block.
template <class T>
__attribute__((noinline)) void rows_token_sums(const RowsBackwardParams& p, const RowsBlock& block, int64_t sub) {
  const int64_t at = sub * kRowsSide, first = block.first + at, count = least(kRowsSide, block.tokens - at);
  const float* e = p.e_of(first);
  const T* x = static_cast<const T*>(p.x) + first * p.channels;
  float sums[kRowsSide * 16], products[kRowsSide * 16];
  each_sample(p.pixels, first, count, [&](int64_t b, int64_t, int64_t lane, int64_t run) PK_FORCED {
    const vf mean = splat(p.mean[b]);
    for (int64_t i = lane; i < lane + run; ++i) {
      vf sum{}, product{};
      for (int64_t c = 0; c < p.channels; c += 16) {
        const vf v = load(e + i * p.channels + c) * load(p.gamma + c);
        sum += v;
        product += v * (load(x + i * p.channels + c) - mean);
      }
      store(sums + i * 16, sum), store(products + i * 16, product);
    }
  });
  const int64_t out = first % p.ring_tokens;
  for (int64_t half = 0; half < count; half += 16) {
    store(p.e_sum + out + half, lane_sums([&](int64_t i) PK_FORCED { return load(sums + (half + i) * 16); }));
    store(p.e_product + out + half, lane_sums([&](int64_t i) PK_FORCED { return load(products + (half + i) * 16); }));
  }
}

// Tokens whose rows of e are one behind the other.
template <class T>
PK_INLINE void finish_rows(const RowsBackwardParams& p, int64_t first, int64_t tokens) {
  const float* e = p.e_of(first);
  const int64_t begin = first * p.channels;
  const T *x = static_cast<const T*>(p.x) + begin, *g = static_cast<const T*>(p.grad) + begin;
  T* dx = static_cast<T*>(p.dx) + begin;
  each_sample(p.pixels, first, tokens, [&](int64_t b, int64_t, int64_t lane, int64_t run) PK_FORCED {
    const vf mean = splat(p.mean[b]), rstd = splat(p.norm ? p.rstd[b] : 1);
    const vf k0 = splat(p.k0[b]), k1 = splat(p.k1[b]);
    for (int64_t i = lane * p.channels; i < (lane + run) * p.channels;)
      for (int64_t c = 0; c < p.channels; c += 16, i += 16) {
        vf v = load(e + i) * load(p.gamma + c);
        if (p.norm) v = (v * rstd - k0) - (load(x + i) - mean) * k1;
        if (p.residual) v += load(g + i);
        store(dx + i, v);
      }
  });
}

// See RowsBackwardKernels::finish.
template <class T>
void rows_finish(const RowsBackwardParams& p, int64_t first, int64_t tokens) {
  while (tokens > 0) {
    const int64_t run = least(tokens, p.ring_tokens - first % p.ring_tokens);
    finish_rows<T>(p, first, run);
    first += run, tokens -= run;
  }
}

}  // namespace
}  // namespace pk
