// The token mixer's CPU kernels: plain parameters, and one table of functions per instruction-set level and dtype.
#pragma once

#include <cstdint>

#include "../core/stats.h"

namespace pk {

struct PoolMixerParams {
  const void* x;     // [B, C, H, W], contiguous or channels_last
  const void* grad;  // backward: dL/dy in x's layout
  void* out;         // forward: y; backward: dx; in x's layout
  int64_t batch, channels, height, width;
  int64_t pool;            // no larger than covers the image from any pixel
  int64_t half_h, half_w;  // pool / 2, and no more than the image has rows or columns beyond a pixel (but for pool 3)
  bool channels_last, residual;
  int64_t chunks;      // partials a sample's input statistics are computed in
  int64_t strip_rows;  // output rows of one work item
  int64_t strips;      // ceil(height / strip_rows)

  const float* coef;        // [C] gamma * layer_scale
  const float* mean;        // [B] of x
  const float* scale;       // [B] drop_scale * rstd
  const float* correct;     // [B] backward: rstd^2 k, see pool_mixer.cpp
  const float* row_counts;  // [H] valid taps in the vertical direction
  const float* col_counts;  // [W] and in the horizontal one
  // The adjoint's weights, all `area` times as large: a power of two inside, not a rounded 1 / 3. That is too large by
  // as much for every element, which a sum less its own gradient does not forgive.
  const float* row_weight;  // [H] a factor / row_counts
  const float* col_weight;  // [W] another one / col_counts
  float area;               // product of the two
  const float* inv;         // [pool + 1, W] 1 / (taps * col_counts)

  float* x_partials;  // [B, chunks, 3], see stats.h
  float* y_partials;  // [B, items, 3], or null
  float* q_partials;  // backward: channels_last [B, strips, C], NCHW [B, C, strips]: sum of g (P x - x)
};

struct PoolMixerKernels {
  StatsKernel stats;
  // Items of one sample: (strip) in channels_last, (channel, strip) in NCHW.
  void (*forward)(const PoolMixerParams&, int64_t b, int64_t first, int64_t last, float* scratch);
  void (*backward_reduce)(const PoolMixerParams&, int64_t b, int64_t first, int64_t last, float* scratch);
  void (*backward_apply)(const PoolMixerParams&, int64_t b, int64_t first, int64_t last, float* scratch);
};

// fp32, bf16, fp16
extern const PoolMixerKernels pool_mixer_baseline[3];
extern const PoolMixerKernels pool_mixer_avx2[3];
extern const PoolMixerKernels pool_mixer_avx512[3];
extern const PoolMixerKernels pool_mixer_avx512_bf16[3];

}  // namespace pk
