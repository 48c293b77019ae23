// What the token mixer's kernels of both layouts share, for one instruction-set level.
#pragma once

#include "../core/sample_stats.h"
#include "../isa/vec.h"

namespace pk {
namespace {

// Whether a shift is subtracted from x on load.
template <class T>
constexpr bool kShifted = sizeof(T) == 4;

// What x is pooled for: y, y with its statistics, or the backward's sums q.
enum class Task { forward, forward_stats, reduce };

struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};

// Sums of y - shift and of its square over the lanes of the rounded output.
struct YMoments {
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

// Vectors of which all lanes are in use, or with PARTIAL the first n.
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
// `a` in the first n lanes, zero in the others.
template <bool PARTIAL>
PK_INLINE vf splat_lanes(float a, int64_t n) {
  if constexpr (!PARTIAL) return splat(a);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = a;
  return read<vf>(lanes);
}

}  // namespace
}  // namespace pk
