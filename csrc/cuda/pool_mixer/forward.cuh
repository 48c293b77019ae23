// The token mixer's forward. Formulas: docs/algebra.md, "Token mixer".
//
// With float32 the sample's mean is subtracted before windows are summed, which is exact for numbers near it: a
// constant image gives exactly zero. bfloat16 and float16 have 8 and 11 significant bits: float32 sums of a window are
// exact as they are.
#pragma once

#include "walk.cuh"

namespace pk {
namespace {

// The statistics of what a block writes of y, as sums of y - origin and of its square.
struct OutputMoments {
  float count = 0, first = 0, second = 0;

  __device__ void add(float value, float origin) {
    const float d = value - origin;
    first += d;
    second = fmaf(d, d, second);
  }
  // Writes the tile's partial; to be called by the whole block, with 3 floats of `scratch` for each warp. The sample's
  // slots that have no tile become empty.
  __device__ void write(const PoolMixerParams& p, const Tile& t, float origin, float* scratch) {
    const int tiles = static_cast<int>(p.tiling.tiles.value);
    float* const partial = p.y_stats + (t.b * p.slots + t.tile) * 3;
    for (int64_t slot = t.tile + tiles; slot < p.slots; slot += tiles)
      if (threadIdx.x < 3) partial[(slot - t.tile) * 3 + threadIdx.x] = 0;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    count = warp_sum(count);
    first = warp_sum(first);
    second = warp_sum(second);
    if (threadIdx.x % 32 == 0) {
      scratch[3 * warp] = count;
      scratch[3 * warp + 1] = first;
      scratch[3 * warp + 2] = second;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < warps; ++i) {
      count += scratch[3 * i];
      first += scratch[3 * i + 1];
      second += scratch[3 * i + 2];
    }
    const float mean = first / count;
    partial[0] = count;
    partial[1] = origin + mean;
    partial[2] = isnan(second) || isinf(second) ? second : fmaxf(second - first * mean, 0.0f);
  }
};

// What all threads of a block need of its sample and channels, in shared memory.
struct Prepared {
  alignas(16) float gain[kTileElements];
  float mean, scale;  // scale: rstd times drop_scale
};

// Fills `shared`, by the whole block; the sample's first block also writes mean_rstd.
__device__ inline void prepare(const PoolMixerParams& p, const Tile& t, Prepared& shared) {
  if (threadIdx.x < 32) {
    const Moments<float> m = merged(p.stats + t.b * p.partials * 3, p.partials);
    if (threadIdx.x == 0) {
      const float rstd = rstd_of(m, p.eps);
      shared.mean = m.mean;
      shared.scale = rstd * p.drop_scale.at(t.b, 1.0f);
      if (t.tile == 0) {
        p.mean_rstd[2 * t.b] = m.mean;
        p.mean_rstd[2 * t.b + 1] = rstd;
      }
    }
  }
  gains(p, t, shared.gain);
  __syncthreads();
}

// Threads of a multiprocessor for which the compiler must leave registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000  // the kernel needs a few registers more there
constexpr int kResident = 384;
#else
constexpr int kResident = 512;
#endif

template <class T, int V, bool ALONG>
__global__ void __launch_bounds__(threads_of<T, V>, V > 1 ? kResident / threads_of<T, V> : 2)
    pool_mixer_fwd(PoolMixerParams p) {
  using W = Walk<T, V, ALONG, 1>;
  using R = typename W::R;
  constexpr bool kShifted = sizeof(T) == 4;
  __shared__ Prepared shared;
  __shared__ float scratch[3 * 8];
  PK_SHARED(memory);
  const Tiling& tiling = p.tiling;
  const Tile t = tile_at(tiling, blockIdx.x);
  OutputMoments moments;
  float origin = 0;
  int item = threadIdx.x;
  do {
    const Place place = place_of<R::CO>(tiling, t, item, R::CH);
    W walk(tiling, place, item, p.x, nullptr, memory);
    if (item == threadIdx.x) prepare(p, t, shared);  // the first loads are under way
    const float mean = shared.mean;
    origin = p.residual ? mean : 0.0f;
    const uint32_t outside = kShifted ? __float_as_uint(mean) : 0;
    walk.surround(tiling, place, outside);
    const int local = place.rows > 0 ? place.channel - t.group * (tiling.channels_last ? kCellElements : 1) : 0;
    WindowSizes<R> sizes(tiling, place);
    float gain[kKinds<R>][R::CH];
    const auto set_gains = [&] {
      float full[R::CH];
      gains_at(shared.gain, local, full);
#pragma unroll
      for (int kind = 0; kind < kKinds<R>; ++kind) {
        const float factor = shared.scale * sizes.inverse(kind);
#pragma unroll
        for (int i = 0; i < R::CH; ++i) gain[kind][i] = full[i] * factor;
      }
    };
    set_gains();
    T* y = static_cast<T*>(p.out) + place.offset;
    walk.for_each_row(
        tiling, place, outside, [&](const R& row, int, float (&out)[R::N]) { plain_sums<kShifted>(row, mean, out); },
        [&](int r, const typename R::Elements& centre, const typename R::Elements&, const float (&total)[R::N]) {
          if (sizes.at_row(r)) set_gains();
          const auto emit = [&](auto residual) {
#pragma unroll
            for (int half = 0; half < (ALONG ? 1 : 2); ++half) {
              if (half == 1 && !walk.has_second) continue;
              float value[V];
#pragma unroll
              for (int e = 0; e < V; ++e) {
                const int j = ALONG ? e : half, i = ALONG ? 0 : e, kind = kind_of<R>(j);
                const float x = centre.value(j, i), centred = kShifted ? x - mean : x;
                const float difference = fmaf(-sizes.size[kind], centred, total[j * R::CH + i]);
                value[e] = residual.value ? fmaf(gain[kind][i], difference, x) : gain[kind][i] * difference;
              }
              const Pack<T, V> rounded = packed<T>(value);
              store<T, V>(y + half * tiling.column, rounded);
              if (p.y_stats != nullptr) {
#pragma unroll
                for (int i = 0; i < V; ++i) moments.add(element(rounded, i), origin);
              }
            }
          };
          if (p.residual)
            emit(std::true_type());
          else
            emit(std::false_type());
          y += tiling.row;
        });
    moments.count += place.rows * V * (ALONG || !walk.has_second ? 1 : 2);
  } while (!W::kOneItem && (item += blockDim.x) < tiling.items);
  if (p.y_stats != nullptr) moments.write(p, t, origin, scratch);
}

}  // namespace
}  // namespace pk
