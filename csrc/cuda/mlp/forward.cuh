// The MLP's forward with the tensor cores of sm_80 and later: one kernel, hidden activations in registers.
#pragma once

#include "forward_tile.cuh"
#include "../core/ptx.cuh"

namespace pk {
namespace {

constexpr int kChunk = 32;  // hidden channels of a step

// The shape of the kernel for C channels. A warp has kTiles times 16 tokens, which share each weight that it loads.
template <int C>
struct MlpFwdConfig {
  static constexpr int kWarps = 4, kTiles = C <= 64 ? 2 : 1, kRows = kWarps * 16 * kTiles, kStages = C <= 128 ? 3 : 2;
  static constexpr int kW1Stride = 2 * C + (C % 64 ? 0 : 64);  // bytes: 64 mod 128, so that loads meet no bank twice
  static constexpr int kW2Stride = 2 * kChunk, kW1 = kChunk * kW1Stride, kStage = kW1 + C * kW2Stride;
  static constexpr bool kParked = C > 128;  // fc1's operand lies in shared memory, as there are too few registers
  static constexpr int kOperand = kParked ? C / 16 * 16 * 32 * kWarps : 0;
  using Table = Tables<C, kRows>;
  static int shared(int hidden) { return kStages * kStage + kOperand + Table::bytes(hidden); }
};

// Starts the copy of both weights' parts for hidden channels j .. j + kChunk - 1 to shared memory: W1's rows [kChunk,
// C], then W2's columns [C, kChunk]. Four threads copy a row, so that their addresses differ by constants.
template <class T, int C>
__device__ inline void copy_weights(const MlpParams& p, int j, char* stage) {
  using Config = MlpFwdConfig<C>;
  static_assert(Config::kWarps * 32 == 4 * kChunk);
  const int row = threadIdx.x / 4, part = threadIdx.x % 4 * 8;
  const T* w1 = static_cast<const T*>(p.w1) + (j + row) * C + part;
  const T* w2 = static_cast<const T*>(p.w2) + row * p.hidden + j + part;
  char *target1 = stage + row * Config::kW1Stride + 2 * part,
       *target2 = stage + Config::kW1 + row * Config::kW2Stride + 2 * part;
#pragma unroll
  for (int i = 0; i < C / 32; ++i) {
    copy_async(target1 + 64 * i, w1 + 32 * i, true);
    copy_async(target2 + 32 * i * Config::kW2Stride, w2 + 32 * i * p.hidden, true);
  }
}

template <class T, int C>
__global__ void __launch_bounds__(128, C == 96 ? 3 : 2) mlp_fwd(MlpParams p) {
  using Config = MlpFwdConfig<C>;
  constexpr int kTiles = Config::kTiles;
  PK_SHARED(memory);
  const typename Config::Table table(memory + Config::kStages * Config::kStage + Config::kOperand);
  const int64_t start = int64_t{blockIdx.x} * Config::kRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 * kTiles;

  for (int s = 0; s < Config::kStages - 1; ++s) {
    if (s * kChunk < p.hidden) copy_weights<T, C>(p, s * kChunk, memory + s * Config::kStage);
    copy_commit();
  }
  table.fill(p, threadIdx.x, 32 * Config::kWarps);
  table.fill_tokens(p, start, warp, Config::kWarps);
  __syncthreads();
  uint4* const parked = reinterpret_cast<uint4*>(memory + Config::kStages * Config::kStage) + threadIdx.x;
  uint32_t n[kTiles][C / 16][4];
  float acc[kTiles][C / 8][4];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    load_operand<T, C>(p, table, start, row + 16 * t, n[t]);
    if constexpr (Config::kParked) {
#pragma unroll
      for (int s = 0; s < C / 16; ++s)
        parked[s * 32 * Config::kWarps] = make_uint4(n[t][s][0], n[t][s][1], n[t][s][2], n[t][s][3]);
    }
#pragma unroll
    for (int i = 0; i < C / 2; ++i) acc[t][i / 4][i % 4] = 0;
  }

  // Of the 8 columns of fragment m, column lane / 4 is the weights' row `weight_row + 2 m` of 32 (memory_channel).
  const int weight_row = lane / 8 * 8 + lane / 4 % 2, pack = lane % 4 * 16;
  int stage = 0;
  for (int j = 0; j < p.hidden; j += kChunk) {
    copy_wait<Config::kStages - 2>();
    __syncthreads();  // this chunk has arrived for all, and all have left the one before it
    const int next = j + (Config::kStages - 1) * kChunk;
    if (next < p.hidden)
      copy_weights<T, C>(p, next, memory + (stage == 0 ? Config::kStages - 1 : stage - 1) * Config::kStage);
    copy_commit();
    const char* w1 = memory + stage * Config::kStage;
    const char* w2 = w1 + Config::kW1;
    stage = stage == Config::kStages - 1 ? 0 : stage + 1;

    float h[kTiles][4][4] = {};
#pragma unroll
    for (int i = 0; i < C / 32; ++i) {
      if constexpr (Config::kParked) {
#pragma unroll
        for (int s = 2 * i; s < 2 * i + 2; ++s) {
          const uint4 a = parked[s * 32 * Config::kWarps];
          n[0][s][0] = a.x, n[0][s][1] = a.y, n[0][s][2] = a.z, n[0][s][3] = a.w;
        }
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const uint4 b = *reinterpret_cast<const uint4*>(w1 + (weight_row + 2 * m) * Config::kW1Stride + 64 * i + pack);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          mma<T>(h[t][m], n[t][2 * i], b.x, b.y);
          mma<T>(h[t][m], n[t][2 * i + 1], b.z, b.w);
        }
      }
    }
    uint32_t a[kTiles][2][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      hidden_operand<T>(p, table.b1(), int64_t{block_index()} * Config::kRows + row + 16 * t, j, h[t], a[t]);
#pragma unroll
    for (int i = 0; i < C / 32; ++i)
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const char* source = w2 + (32 * i + weight_row + 2 * m) * Config::kW2Stride + pack;
        const uint4 b = *reinterpret_cast<const uint4*>(source);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          mma<T>(acc[t][4 * i + m], a[t][0], b.x, b.y);
          mma<T>(acc[t][4 * i + m], a[t][1], b.z, b.w);
        }
      }
  }

  const int64_t start_again = int64_t{block_index()} * Config::kRows;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) store_rows<T, C>(p, table, start_again, row + 16 * t, acc[t]);
  if (p.y_stats == nullptr) return;
  __syncthreads();
  if (warp < 2 * kTiles) table.store_stats(p, start_again, warp % kTiles, warp / kTiles);
}

}  // namespace
}  // namespace pk
