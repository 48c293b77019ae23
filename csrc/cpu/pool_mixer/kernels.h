// The token mixer's kernels for one instruction-set level (README, "Algebra").
//
// The pool is separable. In channels_last two rows are swept along w with a block of channels: the vertical sums of the
// next column are loaded, those of the last three stay in registers. In NCHW a strip of a plane is widened into
// zero-padded float rows first. Both pool differences, sum - count * x: exact for half inputs, and for float inputs a
// shift is subtracted on load (the sample's mean; in NCHW that of the strip), so a large mean costs no
// digits.
#pragma once

#include "../core/sample_stats.h"
#include "channels_last.h"
#include "nchw.h"
#include "pool_mixer.h"

namespace pk {
namespace {

template <class T, Task TASK>
void pool_x(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  if (p.channels_last)
    pool_channels_last<T, TASK>(p, b, first, last, scratch);
  else if (p.pool == 3)
    pool_nchw<T, 3, TASK>(p, b, first, last, scratch);
  else
    pool_nchw<T, 0, TASK>(p, b, first, last, scratch);
}

template <class T>
void pool_mixer_forward(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  if (p.y_partials)
    pool_x<T, Task::forward_stats>(p, b, first, last, scratch);
  else
    pool_x<T, Task::forward>(p, b, first, last, scratch);
}

template <class T>
void pool_mixer_backward_apply(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  if (p.channels_last)
    backward_channels_last<T>(p, b, first, last, scratch);
  else if (p.pool == 3)
    backward_nchw<T, 3>(p, b, first, last, scratch);
  else
    backward_nchw<T, 0>(p, b, first, last, scratch);
}

template <class T>
constexpr PoolMixerKernels pool_mixer_kernels() {
  return {sample_stats<T>, pool_mixer_forward<T>, pool_x<T, Task::reduce>, pool_mixer_backward_apply<T>};
}

}  // namespace
}  // namespace pk
