// The token mixer's kernels for one instruction-set level (README, "Algebra"). Included after vec.h.
//
// The pool is separable. In channels_last two rows are swept along w with a block of channels: the vertical sums of the
// next column are loaded, those of the last three stay in registers. In NCHW a strip of a plane is widened into
// zero-padded float rows first. Both pool differences, sum - count * x: exact for half inputs, and for float inputs a
// shift is subtracted on load (the sample's mean; in NCHW that of the strip), so a large mean costs no
// digits.

#include "../core/sample_stats.h"

template <class T>
constexpr bool kShifted = sizeof(T) == 4;

// What a sweep that pools x is for: y, y with its statistics, or the backward's q.
enum class Task { forward, forward_stats, reduce };

struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};

struct YMoments {  // of the rounded output, around a shift
  vf first{}, second{};
  PK_INLINE void add(vf deviation) {
    first += deviation;
    second += deviation * deviation;
  }
  PK_INLINE void add(const YMoments& other) {
    first += other.first;
    second += other.second;
  }
  PK_INLINE void write_partial(float* out, int64_t n, float shift) const {
    write_moments(out, n, shift, hsum(first), hsum(second));
  }
};

template <bool PARTIAL, class T>
PK_INLINE vf get(const T* p, int64_t n) {
  if constexpr (PARTIAL) return load(p, n);
  return load(p);
}
template <bool PARTIAL, class T>
PK_INLINE void put(T* p, vf v, int64_t n) {
  if constexpr (PARTIAL)
    store(p, v, n);
  else
    store(p, v);
}
// `a` in the lanes in use, zero in the others.
template <bool PARTIAL>
PK_INLINE vf splat_lanes(float a, int64_t n) {
  if constexpr (!PARTIAL) return splat(a);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = a;
  return read<vf>(lanes);
}

#include "channels_last.h"
#include "nchw.h"

template <class T, Task TASK>
void pool_x(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  if (p.channels_last)
    pool_last<T, TASK>(p, b, first, last, scratch);
  else if (p.pool == 3)
    pool_planes<T, 3, TASK>(p, b, first, last, scratch);
  else
    pool_planes<T, 0, TASK>(p, b, first, last, scratch);
}

template <class T>
void forward(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  if (p.y_partials)
    pool_x<T, Task::forward_stats>(p, b, first, last, scratch);
  else
    pool_x<T, Task::forward>(p, b, first, last, scratch);
}

template <class T>
void backward_apply(const PoolMixerParams& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  if (p.channels_last)
    backward_last<T>(p, b, first, last, scratch);
  else if (p.pool == 3)
    backward_planes<T, 3>(p, b, first, last, scratch);
  else
    backward_planes<T, 0>(p, b, first, last, scratch);
}

template <class T>
constexpr PoolMixerKernels kernels() {
  return {stats<T>, forward<T>, pool_x<T, Task::reduce>, backward_apply<T>};
}
