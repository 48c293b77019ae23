// dx of a tile of tokens, 16 for each warp; the hidden activations are computed again, chunk by chunk.
#pragma once

#include "backward_tile.cuh"

namespace pk {
namespace {

constexpr int kRowChunk = 64;  // hidden channels of a chunk

template <int C>
struct MlpBwdDgradConfig {
  // Every tile reads all weights from L2: it is as tall as the registers allow.
  static constexpr int kWarps = C == 64 ? 8 : 4, kThreads = 32 * kWarps, kTokens = 16 * kWarps;
  static constexpr int kBlocks = C == 96 ? 3 : 2;  // resident on a multiprocessor
  static constexpr int kWeight = OperandTile<C>::bytes(kRowChunk), kSaved = OperandTile<kRowChunk>::bytes(kTokens);
  static constexpr int kTable = 2 * kRowChunk * 4;
  PK_HOST_DEVICE static constexpr int stage(bool saved) { return 2 * kWeight + kTable + (saved ? kSaved : 0); }
  static constexpr int shared(bool saved) { return 2 * stage(saved); }

  // After the last chunk, the weights' memory holds dn as rows of float32, and then the threads' sums.
  static constexpr int kStride = C + 8, kPacks = C / 8, kRows = kThreads / kPacks;
  static_assert(kTokens * kStride * 4 <= 2 * stage(false) && kRows * 3 * C * 4 <= 2 * stage(false));
};

// What a tile's tokens need of their samples.
template <int C>
struct TokenTable {
  static constexpr int kTokens = MlpBwdDgradConfig<C>::kTokens;
  float mean[kTokens], rstd[kTokens], k0[kTokens], k1[kTokens], drop[kTokens];
};

// Loads fc1's operand: the warp's tokens `row` and `row` + 8, normalised as mlp_bwd_tokens does, in load_a's order.
template <class T, int C>
__device__ inline void load_normalised(const MlpBwdParams& p, const TokenTable<C>& tokens, int64_t start, int row,
                                       int exist, uint32_t (&a)[C / 16][4]) {
#pragma unroll
  for (int i = 0; i < C / 32; ++i) {
    const int c = 32 * i + threadIdx.x % 4 * 8;
    float gamma[8], beta[8];
    load_channels<T>(p.affine, true, c, gamma);
    load_channels<T>(p.affine, true, C + c, beta);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 8 * half;
      const bool exists = r < exist;
      float v[8] = {};
      if (exists) load_channels<T>(p.x, p.x_float, (start + r) * C + c, v);
      if (p.norm && exists) {
        const float mean = tokens.mean[r], rstd = tokens.rstd[r];
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = (v[e] - mean) * (rstd * gamma[e]) + beta[e];
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) a[2 * i + w / 2][w % 2 * 2 + half] = pair<T>(v[2 * w], v[2 * w + 1]);
    }
  }
}

// Writes dx, from dn [kTokens, kStride] in shared memory, and the sums over the tile's tokens; a thread has 8 channels.
template <class T, int C>
__device__ inline void finish_tokens(const MlpBwdParams& p, char* memory, const TokenTable<C>& tokens, int64_t start) {
  using Config = MlpBwdDgradConfig<C>;
  const int c = threadIdx.x % Config::kPacks * 8, first = threadIdx.x / Config::kPacks;
  const int rows = static_cast<int>(min(int64_t{Config::kTokens}, p.tokens - start));
  float gamma[8], sums[3][8] = {};
  load_channels<T>(p.affine, true, c, gamma);
  for (int row = first; row < (first < Config::kRows ? rows : 0); row += Config::kRows) {
    const int64_t offset = (start + row) * C + c;
    float dx[8], grad[8], x[8];
    load_channels<T>(memory, true, row * Config::kStride + c, dx);
    if (p.residual || p.columns != nullptr) load_channels<T>(p.grad, p.x_float, offset, grad);
    if (p.norm) {
      load_channels<T>(p.x, p.x_float, offset, x);
      const float mean = tokens.mean[row], rstd = tokens.rstd[row], k0 = tokens.k0[row], k1 = tokens.k1[row];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float xhat = (x[e] - mean) * rstd, dn = dx[e];
        sums[0][e] += dn * xhat;
        sums[1][e] += dn;
        dx[e] = rstd * (gamma[e] * dn - k0 - xhat * k1);
      }
    }
    if (p.columns != nullptr) {
      const float drop = tokens.drop[row];
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[2][e] += drop * grad[e];
    }
    if (p.residual) {
#pragma unroll
      for (int e = 0; e < 8; ++e) dx[e] += grad[e];
    }
    store_channels<T>(p.dx, p.x_float, offset, dx);
  }
  if (p.columns == nullptr) return;
  __syncthreads();  // dn has been read
  float* partial = reinterpret_cast<float*>(memory);
  if (first < Config::kRows) {
#pragma unroll
    for (int quantity = 0; quantity < 3; ++quantity)
#pragma unroll
      for (int e = 0; e < 8; ++e) partial[(first * 3 + quantity) * C + c + e] = sums[quantity][e];
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < 3 * C; i += Config::kThreads) {
    float total = 0;
    for (int row = 0; row < Config::kRows; ++row) total += partial[row * 3 * C + i];
    p.columns[int64_t{blockIdx.x} * 3 * C + i] = total;
  }
}

template <class T, int C>
__global__ void __launch_bounds__(MlpBwdDgradConfig<C>::kThreads, MlpBwdDgradConfig<C>::kBlocks)
    mlp_bwd_dgrad(MlpBwdParams p) {
  using Config = MlpBwdDgradConfig<C>;
  PK_SHARED(memory);
  __shared__ TokenTable<C> tokens;
  const int64_t start = int64_t{blockIdx.x} * Config::kTokens;
  const int exist = static_cast<int>(min(int64_t{Config::kTokens}, p.tokens - start));
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
  const int row = warp * 16 + g, stage_bytes = Config::stage(p.saved != nullptr);

  const auto start_copy = [&](int chunk) {
    const int j = chunk * kRowChunk;
    char* stage = memory + chunk % 2 * stage_bytes;
    copy_rows<T, C, kRowChunk, Config::kThreads>(stage, static_cast<const T*>(p.w1_rows) + int64_t{j} * C, C,
                                                 kRowChunk);
    copy_rows<T, C, kRowChunk, Config::kThreads>(stage + Config::kWeight, static_cast<const T*>(p.w2t) + int64_t{j} * C,
                                                 C, kRowChunk);
    stage += 2 * Config::kWeight;
    if (thread < kRowChunk / 2) {  // b1 and peak
      const int table = thread / (kRowChunk / 4) * p.hidden + j + thread % (kRowChunk / 4) * 4;
      copy_async(stage + 16 * thread, p.table + table, true);
    }
    if (p.saved != nullptr)
      copy_rows<T, kRowChunk, Config::kTokens, Config::kThreads>(
          stage + Config::kTable, static_cast<const T*>(p.saved) + start * p.hidden + j, p.hidden, exist);
    copy_commit();
  };

  start_copy(0);
  if (thread < Config::kTokens) {
    const bool exists = thread < exist;
    const bool sampled = exists && (p.norm || p.drop_scale.data != nullptr);
    const int64_t b = sampled ? sample_of(start + thread, p) : 0;
    tokens.drop[thread] = exists ? p.drop_scale.at(b, 1) : 0.0f;
    if (p.norm && exists) {
      tokens.mean[thread] = p.mean_rstd[2 * b], tokens.rstd[thread] = p.mean_rstd[2 * b + 1];
      tokens.k0[thread] = p.k[2 * b], tokens.k1[thread] = p.k[2 * b + 1];
    }
  }
  uint32_t n_a[C / 16][4] = {}, g_a[C / 16][4];
  const T* g_row = static_cast<const T*>(p.g) + (start + row) * C;
  load_a<T, C>(g_row, g_row + 8 * C, row < exist, row + 8 < exist, g_a);
  __syncthreads();  // `tokens` is complete
  if (p.saved == nullptr) load_normalised<T, C>(p, tokens, start, row, exist, n_a);
  const float drop[2] = {tokens.drop[row], tokens.drop[row + 8]};
  float dn[C / 8][4];
#pragma unroll
  for (int i = 0; i < C / 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) dn[i][e] = 0;

  const int row_offset = along_offset<C>(), column_offset = across_offset<C>(), chunks = p.hidden / kRowChunk;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_wait<0>();
    __syncthreads();  // this chunk has arrived for all, and all have left the one before it
    if (chunk + 1 < chunks) start_copy(chunk + 1);
    const char* stage = memory + chunk % 2 * stage_bytes;
#pragma unroll 1
    for (int j0 = 0; j0 < kRowChunk; j0 += 16) {
      const char* w1 = stage + j0 * OperandTile<C>::kStride;
      const char* w2 = w1 + Config::kWeight;
      const float* table = reinterpret_cast<const float*>(stage + 2 * Config::kWeight) + j0 + 2 * q;
      float h[2][4], dp[2][4] = {}, act[2][4], slope[2][4];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        if (p.saved == nullptr) {
#pragma unroll
          for (int i = 0; i < 4; ++i) h[t][i] = table[8 * t + i % 2];
          multiply_rows<T, C>(h[t], n_a, w1 + t * OperandTile<C>::bytes(8) + row_offset);
        } else {
          const char* saved = stage + 2 * Config::kWeight + Config::kTable;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const char* pair_of_h =
                saved + tile_row(row + 8 * half) * OperandTile<kRowChunk>::kStride + 2 * (j0 + 8 * t + 2 * q);
            unpacked<T>(*reinterpret_cast<const uint32_t*>(pair_of_h), h[t][2 * half], h[t][2 * half + 1]);
          }
        }
        multiply_rows<T, C>(dp[t], g_a, w2 + t * OperandTile<C>::bytes(8) + row_offset);
      }
      activated(p.activation, h, act, slope);
      uint32_t dh[4];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dp[t][i] *= slope[t][i] * drop[i / 2];
          if constexpr (std::is_same_v<T, f16>) dp[t][i] *= table[kRowChunk + 8 * t + i % 2];
        }
        dh[2 * t] = pair<T>(dp[t][0], dp[t][1]);
        dh[2 * t + 1] = pair<T>(dp[t][2], dp[t][3]);
      }
      multiply_across<T, C>(dn, dh, w1 + column_offset);
    }
  }
  __syncthreads();  // the weights have been read
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* target = reinterpret_cast<float*>(memory) + (row + 8 * half) * Config::kStride + 2 * q;
#pragma unroll
    for (int i = 0; i < C / 8; ++i)
      *reinterpret_cast<float2*>(target + 8 * i) = make_float2(dn[i][2 * half], dn[i][2 * half + 1]);
  }
  __syncthreads();
  finish_tokens<T, C>(p, memory, tokens, start);
}

}  // namespace
}  // namespace pk
