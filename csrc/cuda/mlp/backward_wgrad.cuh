// The weights' gradients for a block of hidden channels over a split of the tokens, and GroupNorm's sums per token.
//
// Products are transposed, h^T = W1 n^T: rows are hidden channels, 16 for each warp, and columns are tokens. The
// activations are then the operand in registers of the products that follow.
#pragma once

#include "backward_tile.cuh"

namespace pk {
namespace {

constexpr int kSplitTokens = 64;  // tokens of a tile

template <int C>
struct MlpBwdWgradConfig {
  static constexpr int kThreads = 128, kBlocks = C == 64 ? 3 : 2;  // resident on a multiprocessor
  static constexpr int kTile = OperandTile<C>::bytes(kSplitTokens),
                       kSaved = OperandTile<kHiddenBlock>::bytes(kSplitTokens);
  PK_HOST_DEVICE static constexpr int stage(bool saved) { return 2 * kTile + (saved ? kSaved : 0); }
  static constexpr int shared(bool saved) { return 2 * stage(saved); }
};

// Sums 8 values over the 8 lanes with the same lane % 4, in 7 exchanges: a lane gets the total of value lane / 4.
__device__ inline float rows_summed(float (&v)[8]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 4; n > 0; n /= 2) {
    const bool upper = lane & 4 * n;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float theirs = __shfl_xor_sync(kWarp, upper ? v[i] : v[i + n], 4 * n);
      v[i] = (upper ? v[i + n] : v[i]) + theirs;
    }
  }
  return v[0];
}

template <class T, int C>
__global__ void __launch_bounds__(128, MlpBwdWgradConfig<C>::kBlocks) mlp_bwd_wgrad(MlpBwdParams p) {
  using Config = MlpBwdWgradConfig<C>;
  PK_SHARED(memory);
  __shared__ float drops[2][kSplitTokens];
  __shared__ float sums[2][4][3][kSplitTokens];
  __shared__ float table[4][kHiddenBlock];  // b1, peak, u, v
  const int blocks = p.hidden / kHiddenBlock, block = static_cast<int>(blockIdx.x % blocks);
  const int64_t split = blockIdx.x / blocks, first = split * p.tiles_per_split;
  const int64_t last = min(first + p.tiles_per_split, p.tiles);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
  const int row = warp * 16 + g, j = block * kHiddenBlock + row, stage_bytes = Config::stage(p.saved != nullptr);

  const auto start_copy = [&](int64_t tile) {
    const int buffer = static_cast<int>(tile - first) % 2;
    const int64_t start = tile * kSplitTokens;
    const int exist = static_cast<int>(min(int64_t{kSplitTokens}, p.tokens - start));
    char* stage = memory + buffer * stage_bytes;
    copy_rows<T, C, kSplitTokens, Config::kThreads>(stage, static_cast<const T*>(p.n) + start * C, C, exist);
    copy_rows<T, C, kSplitTokens, Config::kThreads>(stage + Config::kTile, static_cast<const T*>(p.g) + start * C, C,
                                                    exist);
    if (p.saved != nullptr)
      copy_rows<T, kHiddenBlock, kSplitTokens, Config::kThreads>(
          stage + 2 * Config::kTile, static_cast<const T*>(p.saved) + start * p.hidden + block * kHiddenBlock, p.hidden,
          exist);
    copy_commit();
    if (thread < kSplitTokens)
      drops[buffer][thread] = thread >= exist     ? 0.0f
                              : p.drop_scale.data ? p.drop_scale.at(sample_of(start + thread, p), 1)
                                                  : 1.0f;
  };
  const auto store_sums = [&](int64_t tile) {
    const int buffer = static_cast<int>(tile - first) % 2;
#pragma unroll 1
    for (int i = thread; i < 3 * kSplitTokens; i += Config::kThreads) {
      const int quantity = i / kSplitTokens, column = i % kSplitTokens;
      const int64_t token = tile * kSplitTokens + column;
      if (!(quantity < 2 ? p.norm : p.drop_grad) || token >= p.tokens) continue;
      float total = 0;
      for (int w = 0; w < 4; ++w) total += sums[buffer][w][quantity][column];
      p.rows[(int64_t{quantity} * blocks + block) * p.tokens + token] = total;
    }
  };

  start_copy(first);
  uint32_t w1[C / 16][4], w2[C / 16][4];
  const T *w1_row = static_cast<const T*>(p.w1_rows) + int64_t{j} * C,
          *w2_row = static_cast<const T*>(p.w2t) + int64_t{j} * C;
  load_a<T, C>(w1_row, w1_row + 8 * C, true, true, w1);
  load_a<T, C>(w2_row, w2_row + 8 * C, true, true, w2);
  for (int i = thread; i < 4 * kHiddenBlock; i += Config::kThreads)
    table[i / kHiddenBlock][i % kHiddenBlock] =
        p.table[i / kHiddenBlock * p.hidden + block * kHiddenBlock + i % kHiddenBlock];
  float db1[2] = {};
  float dw1[C / 8][4], g2t[C / 8][4];
#pragma unroll
  for (int i = 0; i < C / 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) dw1[i][e] = g2t[i][e] = 0;

  const int row_offset = along_offset<C>(), column_offset = across_offset<C>();
  for (int64_t tile = first; tile < last; ++tile) {
    const int buffer = static_cast<int>(tile - first) % 2;
    copy_wait<0>();
    __syncthreads();  // this tile has arrived for all, and all have left the one before it
    if (tile + 1 < last) start_copy(tile + 1);
    if (tile > first) store_sums(tile - 1);
#pragma unroll 1
    for (int t0 = 0; t0 < kSplitTokens; t0 += 16) {
      const char* n_tile = memory + buffer * stage_bytes + t0 * OperandTile<C>::kStride;
      const char* g_tile = n_tile + Config::kTile;
      float h[2][4], dp[2][4] = {}, act[2][4], slope[2][4];
      if (p.saved == nullptr) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) h[t][i] = table[0][row + 8 * (i / 2)];
          multiply_rows<T, C>(h[t], w1, n_tile + t * OperandTile<C>::bytes(8) + row_offset);
        }
      } else {
        const char* saved = memory + buffer * stage_bytes + 2 * Config::kTile;
        const int token = t0 + lane / 16 * 8 + tile_row(lane % 8), column = warp * 16 + lane / 8 % 2 * 8;
        uint32_t packed32[4];
        load_matrices_transposed(packed32, saved + token * OperandTile<kHiddenBlock>::kStride + 2 * column);
#pragma unroll
        for (int i = 0; i < 4; ++i) unpacked<T>(packed32[i], h[i / 2][i % 2 * 2], h[i / 2][i % 2 * 2 + 1]);
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) multiply_rows<T, C>(dp[t], w2, g_tile + t * OperandTile<C>::bytes(8) + row_offset);
      activated(p.activation, h, act, slope);

      if constexpr (std::is_same_v<T, f16>) {
#pragma unroll
        for (int i = 0; i < 8; ++i) dp[i / 4][i % 4] *= table[1][row + 8 * (i % 4 / 2)];
      }
      uint32_t dh_a[4], p_a[4];
      float norm_sums[8] = {};
      float (*warp_sums)[kSplitTokens] = sums[buffer][warp];
      const int token = t0 + lane / 8 % 2 * 8 + 2 * q + lane / 4 % 2;  // of the sums that this lane stores
      if (p.drop_grad) {
        float drop_sums[8] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) drop_sums[i / 4 * 2 + i % 2] += act[i / 4][i % 4] * dp[i / 4][i % 4];
        const float total = rows_summed(drop_sums);
        if (lane < 16) warp_sums[2][token] = total;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float u = table[2][row + 8 * half], v = table[3][row + 8 * half];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          float dh[2], value[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int i = 2 * half + e;
            const float drop = drops[buffer][t0 + 8 * t + 2 * q + e];
            dh[e] = dp[t][i] * slope[t][i] * drop;
            value[e] = act[t][i] * drop;
            db1[half] += dh[e];
            norm_sums[2 * t + e] += dh[e] * u;
            norm_sums[4 + 2 * t + e] += dh[e] * (h[t][i] - v);
          }
          dh_a[2 * t + half] = pair<T>(dh[0], dh[1]);
          p_a[2 * t + half] = pair<T>(value[0], value[1]);
        }
      }
      if (p.norm) warp_sums[lane / 16][token] = rows_summed(norm_sums);
      if (p.partials != nullptr) {
        multiply_across<T, C>(dw1, dh_a, n_tile + column_offset);
        multiply_across<T, C>(g2t, p_a, g_tile + column_offset);
      }
    }
  }
  __syncthreads();
  store_sums(last - 1);
  if (p.partials == nullptr) return;
  const int64_t plane = int64_t{p.hidden} * C;
  float* target = p.partials + split * p.width();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    db1[half] += __shfl_xor_sync(kWarp, db1[half], 1);
    db1[half] += __shfl_xor_sync(kWarp, db1[half], 2);
    if (q == 0) target[2 * plane + j + 8 * half] = db1[half];
    float* dw = target + int64_t{j + 8 * half} * C + 2 * q;
#pragma unroll
    for (int i = 0; i < C / 8; ++i) {
      *reinterpret_cast<float2*>(dw + 8 * i) = make_float2(dw1[i][2 * half], dw1[i][2 * half + 1]);
      *reinterpret_cast<float2*>(dw + plane + 8 * i) = make_float2(g2t[i][2 * half], g2t[i][2 * half + 1]);
    }
  }
}

}  // namespace
}  // namespace pk
