// The token mixer's backward in four kernels: pool_mixer_bwd_reduce writes q by tiles, pool_mixer_bwd_q sums it,
// pool_mixer_bwd_finish computes k and the parameters' gradients from it, pool_mixer_bwd_apply writes dx.
// Formulas: docs/algebra.md, "Token mixer".
#pragma once

#include "walk.cuh"

namespace pk {
namespace {

constexpr int kReduceThreads = 256, kReduceChannels = 32;

// Adds what the threads of a tile summed, one number for each channel, and writes it to q_partials. `sums` is
// [tile_columns][channels of the tile] in channels_last, [channels of the tile][fast] in NCHW.
__device__ inline void write_q(const PoolMixerParams& p, const Tile& t, const float* sums) {
  const Tiling& tiling = p.tiling;
  int first;
  const int n = channels_of(tiling, t, first);
  float* out = p.q_partials + (t.b * tiling.column_tiles + t.column / tiling.tile_columns) * tiling.channels + first;
  __syncthreads();
  if (tiling.channels_last) {
    const int pitch = tiling.tile_groups * kCellElements;
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
      float total = 0;
      for (int i = 0; i < tiling.tile_columns; ++i) total += sums[i * pitch + c];
      out[c] = total;
    }
  } else {
    const int fast = static_cast<int>(tiling.fast.value);
    for (int c = threadIdx.x / 32; c < n; c += blockDim.x / 32) {
      float total = 0;
      for (int i = threadIdx.x % 32; i < fast; i += 32) total += sums[c * fast + i];
      total = warp_sum(total);
      if (threadIdx.x % 32 == 0) out[c] = total;
    }
  }
}

// Sums g (P x - x) = q / rstd for each tile and channel: P x - x is the same with or without the mean.
template <class T, int V, bool ALONG>
__global__ void __launch_bounds__(threads_of<T, V>, V > 1 ? 512 / threads_of<T, V> : 2)
    pool_mixer_bwd_reduce(PoolMixerParams p) {
  using W = Walk<T, V, ALONG, 2>;
  using R = typename W::R;
  constexpr bool kShifted = sizeof(T) == 4;
  __shared__ float sums[kTileElements];
  PK_SHARED(memory);
  const Tiling& tiling = p.tiling;
  const Tile t = tile_at(tiling, blockIdx.x);
  const float mean = p.mean_rstd[2 * t.b];
  const uint32_t outside = kShifted ? __float_as_uint(mean) : 0;
  int item = threadIdx.x;
  do {
    const Place place = place_of<R::CO>(tiling, t, item, R::CH);
    W walk(tiling, place, item, p.x, p.grad, memory);
    walk.surround(tiling, place, outside);
    WindowSizes<R> sizes(tiling, place);
    float inverse[kKinds<R>], q[R::CH] = {};
    const auto invert = [&] {
#pragma unroll
      for (int kind = 0; kind < kKinds<R>; ++kind) inverse[kind] = sizes.inverse(kind);
    };
    invert();
    walk.for_each_row(
        tiling, place, outside, [&](const R& row, int, float (&out)[R::N]) { plain_sums<kShifted>(row, mean, out); },
        [&](int r, const typename R::Elements& centre, const typename R::Elements& grad, const float (&total)[R::N]) {
          if (sizes.at_row(r)) invert();
#pragma unroll
          for (int j = 0; j < R::CO; ++j) {
            if (!ALONG && j == 1 && !walk.has_second) continue;
            const int kind = kind_of<R>(j);
#pragma unroll
            for (int i = 0; i < R::CH; ++i) {
              const float x = centre.value(j, i), centred = kShifted ? x - mean : x;
              const float mixed = fmaf(-sizes.size[kind], centred, total[j * R::CH + i]) * inverse[kind];
              q[i] = fmaf(grad.value(j, i), mixed, q[i]);
            }
          }
        });
    if (item < tiling.items)
#pragma unroll
      for (int i = 0; i < R::CH; ++i) sums[item * R::CH + i] = q[i];
  } while (!W::kOneItem && (item += blockDim.x) < tiling.items);
  write_q(p, t, sums);
}

// Sum of value(i) over i < n for each of 32 columns, by eight threads each, which all get the same bits.
template <class Value>
__device__ inline float column_sum(int64_t n, float* scratch, const Value& value) {
  const int lane = threadIdx.x % kReduceChannels, row = threadIdx.x / kReduceChannels;
  float total = 0;
  for (int64_t i = row; i < n; i += kReduceThreads / kReduceChannels) total += value(i);
  __syncthreads();
  scratch[threadIdx.x] = total;
  __syncthreads();
  total = 0;
  for (int i = 0; i < kReduceThreads / kReduceChannels; ++i) total += scratch[i * kReduceChannels + lane];
  return total;
}

// q of 32 channels of one sample.
__global__ void __launch_bounds__(kReduceThreads) pool_mixer_bwd_q(PoolMixerParams p) {
  __shared__ float scratch[kReduceThreads];
  const int chunks = (p.tiling.channels + kReduceChannels - 1) / kReduceChannels;
  const int64_t b = blockIdx.x / chunks, tiles = p.tiling.column_tiles;
  const int c = blockIdx.x % chunks * kReduceChannels + threadIdx.x % kReduceChannels;
  const bool exists = c < p.tiling.channels;
  const float* source = p.q_partials + b * tiles * p.tiling.channels + c;
  const float total =
      column_sum(tiles, scratch, [&](int64_t i) { return exists ? source[i * p.tiling.channels] : 0.0f; });
  if (exists && threadIdx.x < kReduceChannels) p.q[b * p.tiling.channels + c] = total * p.mean_rstd[2 * b + 1];
}

// The first B blocks compute k and drop_scale's gradient of a sample each. Each of the others has 32 channels and
// computes the gradients of weight and layer_scale from Q = sum_b d_b q_b.
__global__ void __launch_bounds__(kReduceThreads) pool_mixer_bwd_finish(PoolMixerParams p) {
  __shared__ float scratch[kReduceThreads];
  const int channels = p.tiling.channels;
  const int64_t b = blockIdx.x;
  if (b < p.batch) {
    float total = 0;
    for (int c = threadIdx.x; c < channels; c += kReduceThreads)
      total += p.weight.at(c, 1.0f) * p.layer_scale.at(c, 1.0f) * p.q[b * channels + c];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) {
      p.ddrop_scale[b] = total;
      p.k[b] = total * p.drop_scale.at(b, 1.0f) / static_cast<float>(p.tiling.sample);
    }
    return;
  }
  const int c = static_cast<int>(b - p.batch) * kReduceChannels + threadIdx.x % kReduceChannels;
  const bool exists = c < channels;
  const float total = column_sum(
      p.batch, scratch, [&](int64_t i) { return exists ? p.drop_scale.at(i, 1.0f) * p.q[i * channels + c] : 0.0f; });
  if (!exists || threadIdx.x >= kReduceChannels) return;
  p.dweight[c] = total * p.layer_scale.at(c, 1.0f);
  p.dlayer_scale[c] = total * p.weight.at(c, 1.0f);
}

// (3 / 4) / count, the weight of a row or column in the adjoint's sums. Inside the image it is 1 / 4, which is exact.
// The plain 1 / 3 is rounded, an error with the same sign in all nine terms, which would show in e = P^T g - g where
// P^T g and g nearly cancel. The factor of kRelativeArea that this leaves on e is divided out of the gain.
__device__ inline float relative_weight(float count) { return count == 3.0f ? 0.25f : count == 2.0f ? 0.375f : 0.75f; }
constexpr float kRelativeArea = 0.75f * 0.75f;

// Horizontal sums of three columns, each divided by the size of its own window, times kRelativeArea.
template <class R>
struct AdjointSums {
  float weight[R::CO == 2 ? 4 : 5];  // of the left and the right neighbour, and of the thread's columns by kind

  __device__ AdjointSums(const Tiling& tiling, int w) {
    weight[0] = relative_weight(window_count_3(w - 1, tiling.width));
    weight[1] = relative_weight(window_count_3(w + R::CO, tiling.width));
#pragma unroll
    for (int kind = 0; kind < kKinds<R>; ++kind)
      weight[2 + kind] = relative_weight(window_count_3(w + column_of<R>(kind), tiling.width));
  }
  __device__ void operator()(const R& row, float row_weight, float (&out)[R::N]) const {
    const auto weight_at = [&](int j) {
      return row_weight * (j < 0 ? weight[0] : j == R::CO ? weight[1] : weight[2 + kind_of<R>(j)]);
    };
#pragma unroll
    for (int i = 0; i < R::CH; ++i)
#pragma unroll
      for (int j = 0; j < R::CO; j += 2) {
        const float inner = fmaf(weight_at(j + 1), row.value(j + 1, i), weight_at(j) * row.value(j, i));
        out[j * R::CH + i] = fmaf(weight_at(j - 1), row.value(j - 1, i), inner);
        out[(j + 1) * R::CH + i] = fmaf(weight_at(j + 2), row.value(j + 2, i), inner);
      }
  }
};

// dx = g + r (gamma s d e - xhat k), e = P^T g - g; without the first g where there is no residual.
template <class T, int V, bool ALONG>
__global__ void __launch_bounds__(threads_of<T, V>, V > 1 ? 512 / threads_of<T, V> : 2)
    pool_mixer_bwd_apply(PoolMixerParams p) {
  using W = Walk<T, V, ALONG, 2>;
  using R = typename W::R;
  alignas(16) __shared__ float shared[kTileElements];
  PK_SHARED(memory);
  const Tiling& tiling = p.tiling;
  const Tile t = tile_at(tiling, gridDim.x - 1 - blockIdx.x);  // the samples reduced last are still in the cache
  const float mean = p.mean_rstd[2 * t.b], rstd = p.mean_rstd[2 * t.b + 1];
  const float kept = p.residual ? 1.0f : 0.0f, correction = p.k[t.b] * rstd * rstd,
              scale = rstd * p.drop_scale.at(t.b, 1.0f) / kRelativeArea;
  int item = threadIdx.x;
  do {
    const Place place = place_of<R::CO>(tiling, t, item, R::CH);
    W walk(tiling, place, item, p.grad, p.x, memory);
    walk.surround(tiling, place, 0);
    if (item == threadIdx.x) {
      gains(p, t, shared);
      __syncthreads();
    }
    const int local = place.rows > 0 ? place.channel - t.group * (tiling.channels_last ? kCellElements : 1) : 0;
    float gain[R::CH];
    gains_at(shared, local, gain);
#pragma unroll
    for (float& each : gain) each *= scale;
    const AdjointSums<R> adjoint(tiling, place.w);
    T* dx = static_cast<T*>(p.out) + place.offset;
    walk.for_each_row(
        tiling, place, 0,
        [&](const R& row, int r, float (&out)[R::N]) {
          adjoint(row, relative_weight(window_count_3(place.top + r, tiling.height)), out);
        },
        [&](int, const typename R::Elements& centre, const typename R::Elements& x, const float (&total)[R::N]) {
#pragma unroll
          for (int half = 0; half < (ALONG ? 1 : 2); ++half) {
            if (half == 1 && !walk.has_second) continue;
            float value[V];
#pragma unroll
            for (int e = 0; e < V; ++e) {
              const int j = ALONG ? e : half, i = ALONG ? 0 : e;
              const float g = centre.value(j, i), centred = x.value(j, i) - mean;
              value[e] =
                  fmaf(-correction, centred, fmaf(gain[i], fmaf(-kRelativeArea, g, total[j * R::CH + i]), kept * g));
            }
            store<T, V>(dx + half * tiling.column, packed<T>(value));
          }
          dx += tiling.row;
        });
  } while (!W::kOneItem && (item += blockDim.x) < tiling.items);
}

}  // namespace
}  // namespace pk
