// The token mixer for pools other than 3 x 3: an element's window is summed element by element.
#pragma once

#include "backward.cuh"
#include "forward.cuh"

namespace pk {
namespace {

// Calls visit(h, w, offset) for each element of a place: two columns by its rows.
template <class Visit>
__device__ inline void each_element(const Tiling& tiling, const Place& place, const Visit& visit) {
  for (int r = 0; r < place.rows; ++r)
    for (int j = 0; j < 2 && place.w + j < tiling.width; ++j)
      visit(place.top + r, place.w + j, place.offset + r * tiling.row + j * tiling.column);
}

__device__ inline float window_count_any(int i, int size, int pool) {
  return static_cast<float>(window_count(i, size, pool));
}

// Sum of value(offset) over the window around an element. ADJOINT: each is divided by the size of its own window.
template <bool ADJOINT, class Value>
__device__ inline float window_sum(const Tiling& tiling, int h, int w, int64_t offset, const Value& value) {
  const int half = tiling.pool / 2;
  const int top = max(h - half, 0), bottom = min(h + half, tiling.height - 1);
  const int left = max(w - half, 0), right = min(w + half, tiling.width - 1);
  float total = 0;
  for (int i = top; i <= bottom; ++i) {
    float row = 0;
    const int64_t row_offset = offset + (i - h) * tiling.row;
#pragma unroll 1
    for (int j = left; j <= right; ++j) {
      const float neighbour = value(row_offset + (j - w) * tiling.column);
      row += ADJOINT ? neighbour / window_count_any(j, tiling.width, tiling.pool) : neighbour;
    }
    total += ADJOINT ? row / window_count_any(i, tiling.height, tiling.pool) : row;
  }
  return total;
}

template <class T>
__device__ inline float value_at(const void* tensor, int64_t offset) {
  return element(load<T, 1>(static_cast<const T*>(tensor) + offset), 0);
}

// (P x - x) of an element, computed from x - mean, which is exact for numbers near the mean.
template <class T>
__device__ inline float mixed_at(const PoolMixerParams& p, int h, int w, int64_t offset, float mean) {
  const Tiling& tiling = p.tiling;
  const float size = window_count_any(h, tiling.height, tiling.pool) * window_count_any(w, tiling.width, tiling.pool);
  const float total =
      window_sum<false>(tiling, h, w, offset, [&](int64_t neighbour) { return value_at<T>(p.x, neighbour) - mean; });
  return fmaf(-size, value_at<T>(p.x, offset) - mean, total) * (1.0f / size);
}

template <class T>
__global__ void __launch_bounds__(256) pool_mixer_fwd_any(PoolMixerParams p) {
  __shared__ Prepared shared;
  __shared__ float scratch[3 * 8];
  const Tiling& tiling = p.tiling;
  const Tile t = tile_at(tiling, blockIdx.x);
  prepare(p, t, shared);
  const float mean = shared.mean;
  const float origin = p.residual ? mean : 0.0f;
  OutputMoments moments;
  for (int item = threadIdx.x; item < tiling.items; item += blockDim.x) {
    const Place place = place_of<2>(tiling, t, item, 1);
    const float gain = shared.gain[place.channel - t.group * (tiling.channels_last ? kCellElements : 1)] * shared.scale;
    each_element(tiling, place, [&](int h, int w, int64_t offset) {
      const float x = value_at<T>(p.x, offset);
      const float y[1] = {fmaf(gain, mixed_at<T>(p, h, w, offset, mean), p.residual ? x : 0.0f)};
      const Pack<T, 1> rounded = packed<T>(y);
      store<T, 1>(static_cast<T*>(p.out) + offset, rounded);
      moments.count += 1;
      moments.add(element(rounded, 0), origin);
    });
  }
  if (p.y_stats != nullptr) moments.write(p, t, origin, scratch);
}

template <class T>
__global__ void __launch_bounds__(256) pool_mixer_bwd_reduce_any(PoolMixerParams p) {
  __shared__ float sums[kTileElements];
  const Tile t = tile_at(p.tiling, blockIdx.x);
  const float mean = p.mean_rstd[2 * t.b];
  for (int item = threadIdx.x; item < p.tiling.items; item += blockDim.x) {
    float q = 0;
    each_element(p.tiling, place_of<2>(p.tiling, t, item, 1), [&](int h, int w, int64_t offset) {
      q = fmaf(value_at<T>(p.grad, offset), mixed_at<T>(p, h, w, offset, mean), q);
    });
    sums[item] = q;
  }
  write_q(p, t, sums);
}

template <class T>
__global__ void __launch_bounds__(256) pool_mixer_bwd_apply_any(PoolMixerParams p) {
  __shared__ float gain[kTileElements];
  const Tiling& tiling = p.tiling;
  const Tile t = tile_at(tiling, blockIdx.x);
  const float mean = p.mean_rstd[2 * t.b], rstd = p.mean_rstd[2 * t.b + 1];
  const float correction = p.k[t.b] * rstd * rstd, scale = rstd * p.drop_scale.at(t.b, 1.0f);
  gains(p, t, gain);
  __syncthreads();
  for (int item = threadIdx.x; item < tiling.items; item += blockDim.x) {
    const Place place = place_of<2>(tiling, t, item, 1);
    const float a = gain[place.channel - t.group * (tiling.channels_last ? kCellElements : 1)] * scale;
    each_element(tiling, place, [&](int h, int w, int64_t offset) {
      const float total =
          window_sum<true>(tiling, h, w, offset, [&](int64_t neighbour) { return value_at<T>(p.grad, neighbour); });
      const float g = value_at<T>(p.grad, offset), centred = value_at<T>(p.x, offset) - mean;
      const float dx[1] = {fmaf(-correction, centred, fmaf(a, total - g, p.residual ? g : 0.0f))};
      store<T, 1>(static_cast<T*>(p.out) + offset, packed<T>(dx));
    });
  }
}

}  // namespace
}  // namespace pk
