// The token mixer's CPU kernels: their arguments, and one table of functions per instruction-set level and dtype.
#pragma once

#include <cstdint>

#include "../core/stats.h"

namespace pk {

struct PoolMixerParams {
  const void* x;     // [B, C, H, W], contiguous or channels_last
  const void* grad;  // backward: dL/dy in x's layout
  void* out;         // forward: y; backward: dx; in x's layout
  int64_t batch, channels, height, width;
  int64_t pool;    // pool size K, at most the size that covers the whole image from any pixel
  int64_t half_h;  // rows of a window above and below its center: pool / 2, at most height - 1 (1 for pool 3)
  int64_t half_w;  // columns of a window left and right of its center, likewise
  bool channels_last, residual;
  int64_t chunks;      // partials that a sample's input statistics are computed in
  int64_t strip_rows;  // output rows of one strip; the work items are strips
  int64_t strips;      // ceil(height / strip_rows)

  const float* coef;        // [C] gamma * layer_scale
  const float* mean;        // [B] mean of x
  const float* scale;       // [B] drop_scale * rstd
  const float* correct;     // [B] backward: rstd^2 k (docs/algebra.md, "Token mixer")
  const float* row_counts;  // [H] rows of a window around row h that are inside the image
  const float* col_counts;  // [W] columns of a window around column w that are inside the image
  // The backward weighs each gradient by 1 / (row_counts * col_counts). Those weights would be rounded, and the error
  // of P^T g would stay in e = P^T g - g, in full where the two nearly cancel. So all weights are `area` times as
  // large, which makes those of inner pixels a power of two and thus exact, and e is (sum - area * g) / area.
  const float* row_weight;  // [H] a common factor / row_counts
  const float* col_weight;  // [W] a common factor / col_counts
  float area;               // product of the two common factors
  const float* inv;         // [pool + 1, W] inv[rows][w] = 1 / (rows * col_counts[w]); row 0 is not used

  float* x_partials;  // [B, chunks, 3] statistics of x, see core/stats.h
  float* y_partials;  // [B, items, 3] statistics of y, or null
  float* q_partials;  // backward: sum of g (P x - x), in channels_last [B, strips, C], in NCHW [B, C, strips]
};

struct PoolMixerKernels {
  StatsKernel stats;
  // Each works on items first .. last - 1 of sample b: strips in channels_last, (channel, strip) in NCHW. `scratch` has
  // the size that worker_scratch in pool_mixer.cpp gives it. The first and the last write `out`, the second q_partials.
  void (*forward)(const PoolMixerParams&, int64_t b, int64_t first, int64_t last, float* scratch);
  void (*backward_reduce)(const PoolMixerParams&, int64_t b, int64_t first, int64_t last, float* scratch);
  void (*backward_apply)(const PoolMixerParams&, int64_t b, int64_t first, int64_t last, float* scratch);
};

// Elements of x: float32, bfloat16, float16
extern const PoolMixerKernels pool_mixer_baseline[3];
extern const PoolMixerKernels pool_mixer_avx2[3];
extern const PoolMixerKernels pool_mixer_avx512[3];
extern const PoolMixerKernels pool_mixer_avx512_bf16[3];

}  // namespace pk
