// The small kernels of the MLP's backward: operands before the two large ones, sums in a fixed order between and after
// them.
#pragma once

#include "backward_tile.cuh"

namespace pk {
namespace {

constexpr int kSmallThreads = 256;
constexpr int kWidest = 128;  // channels

// Writes the weights as operands and the tables. A block has kPrepared hidden channels, one for each warp.
//
// float16 has no room for weights times a LayerScale of 1e-5: where `divided`, each row of w2t is divided by its
// largest element.
constexpr int kPrepared = kSmallThreads / 32;

template <class T, class W>
__global__ void __launch_bounds__(kSmallThreads) mlp_bwd_prepare(MlpBwdParams p) {
  __shared__ float columns[kPrepared][kWidest + 1];  // of W2
  __shared__ float gamma[kWidest], beta[kWidest], scale[kWidest];
  const int first = blockIdx.x * kPrepared, warp = threadIdx.x / 32, lane = threadIdx.x % 32, C = p.channels;
  const int j = first + warp, hidden = p.hidden;
  const int64_t offset = int64_t{j} * C;
  const W *w1 = static_cast<const W*>(p.w1) + offset, *w2 = static_cast<const W*>(p.w2) + first;
  Pack<W, 1> row[kWidest / 32];
#pragma unroll
  for (int i = 0; i < kWidest / 32; ++i)
    if (32 * i < C) row[i] = load<W, 1>(w1 + 32 * i + lane);
#pragma unroll
  for (int i = 0; i < kWidest / 32; ++i) {
    const int o = 32 * i + threadIdx.x / kPrepared, local = threadIdx.x % kPrepared;
    if (32 * i < C) columns[local][o] = element(load<W, 1>(w2 + int64_t{o} * hidden + local), 0);
  }
  if (threadIdx.x < C) {
    const int c = threadIdx.x;
    gamma[c] = p.gamma.at(c, 1), beta[c] = p.beta.at(c, 0), scale[c] = p.layer_scale.at(c, 1);
    if (blockIdx.x == 0) p.affine[c] = gamma[c], p.affine[C + c] = beta[c];
  }
  __syncthreads();
  float u = 0, v = 0, peak = 0, column[kWidest / 32];
#pragma unroll
  for (int i = 0; i < kWidest / 32; ++i) {
    const int c = 32 * i + lane;
    if (32 * i >= C) break;
    const Pack<T, 1> w = packed<T>({element(row[i], 0)});
    store(static_cast<T*>(p.w1_rows) + offset + c, w);
    u += element(w, 0) * gamma[c];
    v += element(w, 0) * beta[c];
    column[i] = columns[warp][c] * scale[c];
    peak = fmaxf(peak, fabsf(column[i]));
  }
  u = warp_sum(u);
  v = warp_sum(v);
  for (int offset = 16; offset > 0; offset /= 2) peak = fmaxf(peak, __shfl_xor_sync(kWarp, peak, offset));
  if (!p.divided || !(peak > 1e-30f)) peak = 1;
#pragma unroll
  for (int i = 0; i < kWidest / 32; ++i)
    if (32 * i < C) store(static_cast<T*>(p.w2t) + offset + 32 * i + lane, packed<T>({column[i] / peak}));
  if (lane != 0) return;
  const float b1 = p.b1.at(j, 0);
  p.table[j] = b1, p.table[hidden + j] = peak;
  p.table[2 * hidden + j] = u, p.table[3 * hidden + j] = b1 + v;
}

// Writes x, normalised, and the gradient as operands. A thread has 8 channels of kTokensEach tokens.
constexpr int kTokensEach = 4;

__host__ __device__ inline int tokens_of_block(int channels) { return kSmallThreads / (channels / 8) * kTokensEach; }

template <class T>
__global__ void __launch_bounds__(kSmallThreads) mlp_bwd_tokens(MlpBwdParams p) {
  const int packs = p.channels / 8, rows = kSmallThreads / packs, c = threadIdx.x % packs * 8;
  const int64_t first = int64_t{blockIdx.x} * tokens_of_block(p.channels) + threadIdx.x / packs;
  if (threadIdx.x >= rows * packs) return;
  float gamma[8], beta[8], v[kTokensEach][8];
  load_channels<T>(p.affine, true, c, gamma);
  load_channels<T>(p.affine, true, p.channels + c, beta);
#pragma unroll
  for (int i = 0; i < kTokensEach; ++i) {
    const int64_t token = min(first + i * rows, p.tokens - 1);
    load_channels<T>(p.x, p.x_float, token * p.channels + c, v[i]);
  }
#pragma unroll
  for (int i = 0; i < kTokensEach; ++i) {
    const int64_t token = first + i * rows, offset = token * p.channels + c;
    if (token >= p.tokens) return;
    if (p.norm) {
      const int64_t b = sample_of(token, p);
      const float mean = p.mean_rstd[2 * b], rstd = p.mean_rstd[2 * b + 1];
#pragma unroll
      for (int e = 0; e < 8; ++e) v[i][e] = (v[i][e] - mean) * (rstd * gamma[e]) + beta[e];
    }
    store(static_cast<T*>(p.n_to) + offset, packed<T>(v[i]));
    if (p.g_to != nullptr) {
      load_channels<T>(p.grad, p.x_float, offset, v[i]);
      store(static_cast<T*>(p.g_to) + offset, packed<T>(v[i]));
    }
  }
}

// Sums a sample's rows: k0, k1 and drop_scale's gradient, a block for each.
template <class T>
__global__ void __launch_bounds__(2 * kSmallThreads) mlp_bwd_sample(MlpBwdParams p) {
  __shared__ float scratch[2 * kSmallThreads / 32];
  __shared__ float bias[kWidest];
  const int64_t b = blockIdx.x / 3;
  const int quantity = static_cast<int>(blockIdx.x % 3), parts = p.hidden / kHiddenBlock;
  if (!(quantity < 2 ? p.norm : p.drop_grad)) return;
  float total = 0;
  for (int part = 0; part < parts; ++part) {
    const float* row = p.rows + (int64_t{quantity} * parts + part) * p.tokens + b * p.pixels;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < p.pixels; i += 2 * kSmallThreads) total += row[i];
  }
  if (quantity == 2 && p.b2.data != nullptr) {  // the rows have W2 p of o = W2 p + b2: here is the sum of g s b2
    if (threadIdx.x < p.channels) bias[threadIdx.x] = p.b2.at(threadIdx.x, 0) * p.layer_scale.at(threadIdx.x, 1);
    __syncthreads();
    const int64_t sample = p.pixels * p.channels;
    for (int64_t i = threadIdx.x * 8; i < sample; i += 2 * kSmallThreads * 8) {
      const int c = static_cast<int>(i % p.channels);
      float grad[8];
      load_channels<T>(p.grad, p.x_float, b * sample + i, grad);
#pragma unroll
      for (int e = 0; e < 8; ++e) total += grad[e] * bias[c + e];
    }
  }
  total = block_sum(total, scratch);
  if (threadIdx.x != 0) return;
  if (quantity == 2)
    p.ddrop_scale[b] = total;
  else
    p.k[2 * b + quantity] = total / (static_cast<float>(p.pixels) * p.channels);
}

// ---- sums of partials

constexpr int kSumLanes = 8;     // threads that share the splits of an element (mlp_bwd_weights)
constexpr int kSumGroup = 128;   // rows that a block of mlp_bwd_columns adds
constexpr int kSumColumns = 32;  // columns of a block of mlp_bwd_columns

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200  // by itself ptxas takes 48 registers there and spills two
#define PK_SUM_BOUNDS __launch_bounds__(kSmallThreads, 4)
#else
#define PK_SUM_BOUNDS __launch_bounds__(kSmallThreads)
#endif

// Sums the splits' partials of dW1, G^T and db1.
template <class W>
__global__ void PK_SUM_BOUNDS mlp_bwd_weights(MlpBwdParams p) {
  constexpr int kPacks = kSmallThreads / kSumLanes;
  __shared__ float4 lanes[kSumLanes][kPacks];
  const int pack = threadIdx.x % kPacks, lane = threadIdx.x / kPacks;
  const int64_t width = p.width(), offset = (int64_t{blockIdx.x} * kPacks + pack) * 4;
  float total[4] = {};
  if (offset < width) {
#pragma unroll 8
    for (int64_t split = lane; split < p.splits; split += kSumLanes) {
      const Pack<float, 4> v = load<float, 4>(p.partials + split * width + offset);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[e] += element(v, e);
    }
  }
  lanes[lane][pack] = make_float4(total[0], total[1], total[2], total[3]);
  __syncthreads();
  if (lane != 0 || offset >= width) return;
  for (int other = 1; other < kSumLanes; ++other) {
    const float4 v = lanes[other][pack];
    total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
  }
  const int64_t plane = int64_t{p.hidden} * p.channels;  // a multiple of 4: four elements are of one output
  if (offset < plane)
    store(static_cast<W*>(p.dw1) + offset, packed<W>(total));
  else if (offset < 2 * plane)
    store(p.g2t + offset - plane, packed<float>(total));
  else
    store(p.db1 + offset - 2 * plane, packed<float>(total));
}

struct ColumnsParams {
  const float* rows;  // [count, width]
  float* sums;        // [ceil(count / kSumGroup), width]: the sum of each group of rows
  int64_t count;      // rows
  int width;          // columns, a multiple of kSumColumns
};

__global__ void __launch_bounds__(kSmallThreads) mlp_bwd_columns(ColumnsParams p) {
  constexpr int kLanes = kSmallThreads / kSumColumns;
  __shared__ float lanes[kLanes][kSumColumns];
  const int blocks = p.width / kSumColumns, lane = threadIdx.x / kSumColumns, local = threadIdx.x % kSumColumns;
  const int64_t group = blockIdx.x / blocks, column = blockIdx.x % blocks * kSumColumns + local;
  const int64_t end = min((group + 1) * kSumGroup, p.count);
  float total = 0;
#pragma unroll 8
  for (int64_t row = group * kSumGroup + lane; row < end; row += kLanes) total += p.rows[row * p.width + column];
  lanes[lane][local] = total;
  __syncthreads();
  if (lane != 0) return;
  for (int other = 1; other < kLanes; ++other) total += lanes[other][local];
  p.sums[group * p.width + column] = total;
}

// dW2 = diag(s) G, db2, dgamma, dbeta and LayerScale's gradient, from g2t and `columns` [3, C]. A block has 8 channels,
// a thread one of them, o.
template <class W>
__global__ void __launch_bounds__(kSmallThreads) mlp_bwd_finish(MlpBwdParams p) {
  constexpr int kWarps = kSmallThreads / 32;
  __shared__ float products[kWarps][8];
  const int o = blockIdx.x * 8 + threadIdx.x % 8, C = p.channels;
  const float scale = p.layer_scale.at(o, 1);
  const W* w2 = static_cast<const W*>(p.w2) + int64_t{o} * p.hidden;
  W* dw2 = static_cast<W*>(p.dw2) + int64_t{o} * p.hidden;
  float product = 0;
#pragma unroll 8
  for (int j = threadIdx.x / 8; j < p.hidden; j += kSmallThreads / 8) {
    const float g2 = p.g2t[int64_t{j} * C + o];
    product += element(load<W, 1>(w2 + j), 0) * g2;
    store(dw2 + j, packed<W>({scale * g2}));
  }
  product += __shfl_xor_sync(kWarp, product, 8);
  product += __shfl_xor_sync(kWarp, product, 16);
  if (threadIdx.x % 32 < 8) products[threadIdx.x / 32][threadIdx.x % 8] = product;
  __syncthreads();
  if (threadIdx.x >= 8) return;
  float total = p.b2.at(o, 0) * p.columns[2 * C + o];
  for (int warp = 0; warp < kWarps; ++warp) total += products[warp][threadIdx.x];
  p.dlayer_scale[o] = total;
  p.db2[o] = scale * p.columns[2 * C + o];
  p.dgamma[o] = p.columns[o];
  p.dbeta[o] = p.columns[C + o];
}

}  // namespace
}  // namespace pk
