// What the token mixer's kernels of both layouts share, for one instruction-set level.
#pragma once

#include "../core/sample_stats.h"
#include "../isa/vec.h"

namespace pk {
namespace {

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

}  // namespace
}  // namespace pk
