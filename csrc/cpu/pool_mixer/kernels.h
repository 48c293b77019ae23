// The token mixer's kernels for one instruction-set level (docs/algebra.md, "Token mixer").
//
// The pool is separable: windows are summed along one direction, then along the other. In channels_last (by blocks of
// channels) a sweep along w adds up the rows of each new column and keeps the sums of the last three columns in
// registers. In NCHW a strip of rows is first widened to float and padded with zeros.
//
// Both compute the difference sum - count * x. It is exact for half-precision inputs. From float32 inputs a shift is
// subtracted on load (the sample's mean; in NCHW the strip's), so that a large mean costs no digits.
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
