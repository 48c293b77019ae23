// What the MLP's forward kernels share: tokens and their statistics, the operand of fc1, the output and its statistics.
//
// A warp has 16 tokens, and of a product's fragments (ptx.cuh) lane 4 g + q has tokens g and g + 8. The order of
// channels in a product is free as long as both operands agree, so logical channel l of each 32 is memory's
// `memory_channel(l)`: a lane then has channels 8 q .. 8 q + 7 of each 32, whole 16-byte packs, as operand and as
// result.
#pragma once

#include "../../common/activation.h"
#include "../../common/activation_math.h"
#include "../../common/host_device.h"
#include "../core/device.cuh"

namespace pk {

// Matrices are dense, row by row. Tokens are the pixels of all samples, numbered through the batch. T is the operands'
// dtype, bfloat16 or float16. docs/algebra.md, "MLP", calls the input y and the output z.
struct MlpParams {
  const void* x;       // [tokens, C], float32 where x_float, else T: the input
  void* y;             // the same shape and dtype: the output
  const void* w1;      // [hidden, C] of T
  const void* w2;      // [C, hidden] of T
  Vector b1;           // [hidden]
  Vector b2;           // [C]
  Vector gamma;        // [C]: GroupNorm's weight
  Vector beta;         // [C]: GroupNorm's bias
  Vector layer_scale;  // [C]
  Vector drop_scale;   // [B]
  const float* stats;  // [B, partials, 3]: count, mean and M2 of parts of x; null: there is no norm
  int64_t partials;    // of a sample
  float* mean_rstd;    // [B, 2]: written, where there is a norm
  float* y_stats;      // [B, slots, 3]: count, mean and M2 of parts of y, or null
  int64_t slots;       // of a sample
  void* saved;         // [tokens, hidden] of T: fc1's output for the backward, or null
  int64_t tokens;      // B H W
  int64_t pixels;      // H W
  int hidden;          // hidden channels
  float eps;           // GroupNorm's
  bool x_float;        // whether x and y are float32
  bool residual;       // whether y includes x
  Activation activation;
};

namespace {

constexpr int kUnit = 64;  // tokens whose statistics are one partial of their sample; STATS_ROWS in backends/cuda.py

// Which channel of memory logical channel l is, of C and of the hidden channels alike.
__device__ inline int memory_channel(int l) { return l / 32 * 32 + l % 8 / 2 * 8 + l % 32 / 8 * 2 + l % 2; }

// float32 tables in shared memory: [C] gamma, beta, b2 and LayerScale; for ROWS tokens their sample's mean, rstd and
// drop scale, and the mean and M2 of the output's channels; [hidden] b1. Each is at a constant offset.
template <int C, int ROWS>
struct Tables {
  float* const gamma;

  PK_HOST_DEVICE static constexpr int bytes(int hidden) { return (hidden + 4 * C + 5 * ROWS) * 4; }

  __device__ explicit Tables(char* memory) : gamma(reinterpret_cast<float*>(memory)) {}
  __device__ float* beta() const { return gamma + C; }
  __device__ float* b2() const { return gamma + 2 * C; }
  __device__ float* scale() const { return gamma + 3 * C; }
  __device__ float* mean() const { return gamma + 4 * C; }
  __device__ float* rstd() const { return mean() + ROWS; }
  __device__ float* drop() const { return mean() + 2 * ROWS; }
  __device__ float* y_mean() const { return mean() + 3 * ROWS; }
  __device__ float* y_m2() const { return mean() + 4 * ROWS; }
  __device__ float* b1() const { return mean() + 5 * ROWS; }

  __device__ void fill(const MlpParams& p, int thread, int threads) const {
    for (int i = thread; i < p.hidden; i += threads) b1()[i] = p.b1.at(i, 0);
    for (int i = thread; i < C; i += threads) {
      gamma[i] = p.gamma.at(i, 1);
      beta()[i] = p.beta.at(i, 0);
      b2()[i] = p.b2.at(i, 0);
      scale()[i] = p.layer_scale.at(i, 1);
    }
  }

  // Fills mean, rstd and drop scale of the tokens from `start` on, each warp those of some samples.
  __device__ void fill_tokens(const MlpParams& p, int64_t start, int warp, int warps) const {
    const int lane = threadIdx.x % 32;
    const int64_t end = min(start + ROWS, p.tokens), first = start / p.pixels, last = (end - 1) / p.pixels;
    for (int64_t b = first + warp; b <= last; b += warps) {
      float sample_mean = 0, sample_rstd = 1;
      if (p.stats != nullptr) {
        const Moments<float> m = merged(p.stats + b * p.partials * 3, p.partials);
        sample_mean = m.mean;
        sample_rstd = rstd_of(m, p.eps);
        if (lane == 0 && b * p.pixels >= start) {
          p.mean_rstd[2 * b] = sample_mean;
          p.mean_rstd[2 * b + 1] = sample_rstd;
        }
      }
      const float sample_drop = p.drop_scale.at(b, 1);
      const int stop = static_cast<int>(min((b + 1) * p.pixels, end) - start);
      for (int row = static_cast<int>(max(b * p.pixels, start) - start) + lane; row < stop; row += 32) {
        mean()[row] = sample_mean;
        rstd()[row] = sample_rstd;
        drop()[row] = sample_drop;
      }
    }
  }

  // Writes partials of y's statistics. The kUnit tokens of unit `unit`, counted from `start`, belong to one or two
  // samples: `segment` 0 is the first of them, 1 the second, by a warp each. A sample's last unit also empties the
  // slots left over.
  __device__ void store_stats(const MlpParams& p, int64_t start, int unit, int segment) const {
    start += unit * kUnit;
    if (start >= p.tokens) return;
    const int64_t b = start / p.pixels + segment, begin = max(b * p.pixels, start);
    const int64_t next = (b + 1) * p.pixels, end = min(min(next, start + kUnit), p.tokens);
    if (begin >= end) return;
    const int lane = threadIdx.x % 32, stop = static_cast<int>(end - start);
    Moments<float> m;
    for (int row = static_cast<int>(begin - start) + lane; row < stop; row += 32)
      m.merge(C, y_mean()[unit * kUnit + row], y_m2()[unit * kUnit + row]);
    m = warp_merged(m);
    const int64_t slot = start / kUnit - b * p.pixels / kUnit;
    float* out = p.y_stats + (b * p.slots + slot) * 3;
    if (lane == 0) out[0] = m.count, out[1] = m.mean, out[2] = m.m2;
    if (next <= start + kUnit) {
#pragma unroll 1
      for (int64_t i = 3 + lane; i < 3 * (p.slots - slot); i += 32) out[i] = 0;
    }
  }
};

// 8 channels of a token, of dtype X in memory, in float32.
template <class X>
__device__ inline void load_channels(const void* x, int64_t offset, float (&out)[8]) {
  if constexpr (sizeof(X) == 4) {
    const Pack<float, 4> low = load<float, 4>(static_cast<const float*>(x) + offset);
    const Pack<float, 4> high = load<float, 4>(static_cast<const float*>(x) + offset + 4);
#pragma unroll
    for (int e = 0; e < 8; ++e) out[e] = e < 4 ? element(low, e) : element(high, e - 4);
  } else {
    const Pack<X, 8> pack = load<X, 8>(static_cast<const X*>(x) + offset);
#pragma unroll
    for (int e = 0; e < 8; ++e) out[e] = element(pack, e);
  }
}

// Stores 8 channels of a token, where it `exists`. `value` becomes what was stored, rounded to X.
template <class X>
__device__ inline void store_channels(void* y, int64_t offset, bool exists, float (&value)[8]) {
  if constexpr (sizeof(X) == 4) {
    const float low[4] = {value[0], value[1], value[2], value[3]}, high[4] = {value[4], value[5], value[6], value[7]};
    float* target = static_cast<float*>(y) + offset;
    if (exists) store(target, packed<float>(low)), store(target + 4, packed<float>(high));
  } else {
    const Pack<X, 8> pack = packed<X>(value);
    if (exists) store(static_cast<X*>(y) + offset, pack);
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] = element(pack, e);
  }
}

// Loads fc1's operand: the 16 tokens from `start + row` on, normalised in float32 and rounded once.
template <class T, class X, int C, class Table>
__device__ inline void load_operand_from(const MlpParams& p, const Table& table, int64_t start, int row,
                                         uint32_t (&a)[C / 16][4]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + g + 8 * half;
    const int64_t token = min(start + r, p.tokens - 1);
    const int known = static_cast<int>(token - start);  // past the end: the last token again
    const float mean = table.mean()[known], rstd = table.rstd()[known];
#pragma unroll
    for (int i = 0; i < C / 32; ++i) {
      const int c = 32 * i + 8 * q;
      float n[8];
      load_channels<X>(p.x, token * C + c, n);
      if (p.stats != nullptr) {
#pragma unroll
        for (int e = 0; e < 8; ++e) n[e] = (n[e] - mean) * rstd * table.gamma[c + e] + table.beta()[c + e];
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) a[2 * i + e / 2][2 * (e % 2) + half] = pair<T>(n[2 * e], n[2 * e + 1]);
    }
  }
}

template <class T, int C, class Table>
__device__ inline void load_operand(const MlpParams& p, const Table& table, int64_t start, int row,
                                    uint32_t (&a)[C / 16][4]) {
  if (p.x_float)
    load_operand_from<T, float, C>(p, table, start, row, a);
  else
    load_operand_from<T, T, C>(p, table, start, row, a);
}

// fc1's output as it is saved for the backward. Beyond the range of float16 it becomes the largest finite number, for
// which the activation's slope is the same, 0 or 1. But relu_squared's slope is 2 h: there a large h becomes infinite,
// as it does in eager float16.
template <class T>
__device__ inline float saved_value(float h, Activation activation) {
  if constexpr (std::is_same_v<T, f16>) {
    const float most = activation == Activation::relu_squared ? INFINITY : 65504.0f;
    if (fabsf(h) < INFINITY) h = fminf(fmaxf(h, -65504.0f), most);
  }
  return h;
}

template <class T, Activation A>
__device__ inline void activated(float (&h)[4][4], uint32_t (&out)[2][4]) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) h[m][i] = activate<A, false>(h[m][i], [](float x) { return __expf(x); }).value;
    out[m / 2][2 * (m % 2)] = pair<T>(h[m][0], h[m][1]);
    out[m / 2][2 * (m % 2) + 1] = pair<T>(h[m][2], h[m][3]);
  }
}

// Adds b1 to h, 32 hidden channels from `j` on, saves the sum where asked for, and returns its activation as fc2's
// operand.
template <class T>
__device__ inline void hidden_operand(const MlpParams& p, const float* b1, int64_t token, int j, float (&h)[4][4],
                                      uint32_t (&out)[2][4]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) h[m][i] += b1[j + 8 * q + 2 * m + i % 2];
  if (p.saved != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float row[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) row[e] = saved_value<T>(h[e / 2][2 * half + e % 2], p.activation);
      const int64_t t = token + g + 8 * half;
      if (t < p.tokens) store(static_cast<T*>(p.saved) + t * p.hidden + j + 8 * q, packed<T>(row));
    }
  }
  switch (p.activation) {
    case Activation::gelu: return activated<T, Activation::gelu>(h, out);
    case Activation::gelu_tanh: return activated<T, Activation::gelu_tanh>(h, out);
    case Activation::relu: return activated<T, Activation::relu>(h, out);
    case Activation::relu_squared: return activated<T, Activation::relu_squared>(h, out);
    default: return activated<T, Activation::silu>(h, out);
  }
}

// Stores y of the 16 tokens from `start + row` on, and writes the moments of each token's channels to the tables.
template <class X, int C, class Table>
__device__ inline void store_rows_as(const MlpParams& p, const Table& table, int64_t start, int row,
                                     float (&acc)[C / 8][4]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + g + 8 * half;
    const bool exists = start + r < p.tokens;
    const int64_t token = min(start + r, p.tokens - 1);
    const float drop = table.drop()[static_cast<int>(token - start)];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < C / 32; ++i) {
      const int c = 32 * i + 8 * q;
      float v[8];
      if (p.residual) load_channels<X>(p.x, token * C + c, v);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float m = (acc[4 * i + e / 2][2 * half + e % 2] + table.b2()[c + e]) * table.scale()[c + e] * drop;
        v[e] = p.residual ? v[e] + m : m;
      }
      store_channels<X>(p.y, token * C + c, exists, v);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        acc[4 * i + e / 2][2 * half + e % 2] = v[e];
        sum += v[e];
      }
    }
    if (p.y_stats == nullptr) continue;
    sum += __shfl_xor_sync(kWarp, sum, 1);
    sum += __shfl_xor_sync(kWarp, sum, 2);
    const float mean = sum * (1.0f / C);
    float m2 = 0;
#pragma unroll
    for (int j = 0; j < C / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float d = acc[j][2 * half + e] - mean;
        m2 += d * d;
      }
    m2 += __shfl_xor_sync(kWarp, m2, 1);
    m2 += __shfl_xor_sync(kWarp, m2, 2);
    if (q == 0) table.y_mean()[r] = mean, table.y_m2()[r] = m2;
  }
}

template <class T, int C, class Table>
__device__ inline void store_rows(const MlpParams& p, const Table& table, int64_t start, int row,
                                  float (&acc)[C / 8][4]) {
  if (p.x_float)
    store_rows_as<float, C>(p, table, start, row, acc);
  else
    store_rows_as<T, C>(p, table, start, row, acc);
}

}  // namespace
}  // namespace pk
