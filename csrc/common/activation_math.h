// The activations and their slopes, for host and device; V is float or a vector of floats. All functions have
// internal linkage, so that each of the CPU's instruction-set levels keeps its own.
#pragma once

#include "activation.h"
#include "host_device.h"

#if defined(__CUDA_ARCH__) || defined(PK_EXECUTOR)  // tests/cuda_executor has the device's functions on the host
#define PK_DEVICE_MATH
#endif

namespace pk {

// max(bound, x) and min(bound, x), which are x where x is a NaN. Those of vectors must be declared before this header:
// csrc/cpu/mlp/activations.h does so.
PK_HOST_DEVICE static inline float larger(float bound, float x) { return bound > x ? bound : x; }
PK_HOST_DEVICE static inline float lesser(float bound, float x) { return bound < x ? bound : x; }

// x clamped to [0, 1]; a NaN stays one or becomes 0.
template <class V>
PK_HOST_DEVICE static inline V unit_interval(V x) {
#if defined(PK_DEVICE_MATH)
  return __saturatef(x);  // costs nothing: a modifier of the instruction that computes x
#else
  return lesser(V{} + 1.0f, larger(V{}, x));
#endif
}

// 1 / x.
template <class V>
PK_HOST_DEVICE static inline V inverse(V x) {
#if defined(PK_DEVICE_MATH)
  return __fdividef(1.0f, x);  // to 2 ulps, without the subroutine that a division calls
#else
  return (V{} + 1.0f) / x;
#endif
}

// act(x) and act'(x).
template <class V>
struct Activated {
  V value, slope;
};

// Phi of gelu(x) = x Phi(x), as 0.5 + x Q(x^2) clamped to [0, 1]. Q minimises the largest |x| times the error, which is
// below 1.9e-4 (finer than bfloat16), and beyond |x| = 4.3 the clamp gives exactly 0 and 1. Ten instructions.
template <class V>
PK_HOST_DEVICE static inline V gelu_phi(V x) {
  const V t = x * x;
  V q = t * 2.7135929e-8f - 1.8126478e-6f;
  q = q * t + 5.2006098e-5f;
  q = q * t - 8.5080146e-4f;
  q = q * t + 8.9339546e-3f;
  q = q * t - 6.4869879e-2f;
  q = q * t + 0.39802214f;
  return unit_interval(x * q + 0.5f);
}

// gelu'(x): 0.5 plus an odd polynomial up to |x| = 4.4, with an error below 2.1e-4; beyond that exactly 0 or 1.
template <class V>
PK_HOST_DEVICE static inline V gelu_slope(V x) {
  const V t = x * x;
  V q = t * 4.74744632e-10f - 4.71619011e-8f;
  q = q * t + 2.03031345e-6f;
  q = q * t - 4.99222479e-5f;
  q = q * t + 7.78961228e-4f;
  q = q * t - 8.09879694e-3f;
  q = q * t + 5.68951294e-2f;
  q = q * t - 0.263077706f;
  q = q * t + 0.797051489f;
  const V slope = x * q + 0.5f, above = x > 4.4f ? V{} + 1.0f : slope;
  return x < -4.4f ? V{} : above;
}

// The activation A of x. EXACT: to about an ulp of float32, else as exact as bfloat16 needs. exp(V) computes e^x.
template <Activation A, bool EXACT, class V, class Exp>
PK_HOST_DEVICE static inline Activated<V> activate(V x, const Exp& exp) {
  const V one = V{} + 1.0f;
  if constexpr (A == Activation::gelu && !EXACT) {
    return {x * gelu_phi(x), gelu_slope(x)};
  } else if constexpr (A == Activation::gelu) {
    // Phi(-|x|) = t P(t) exp(-x^2 / 2) / 2, t = 1 / (1 + p |x| / sqrt 2): Abramowitz and Stegun 7.1.26
    const V a = x < 0.0f ? -x : x, bell = exp(a * a * -0.5f), t = one / (a * 0.23164189f + 1.0f);
    V q = t * 0.53070271f - 0.72657601f;
    q = q * t + 0.71070687f;
    q = q * t - 0.14224837f;
    q = q * t + 0.12741480f;
    const V tail = q * t * bell, phi = x < 0.0f ? tail : one - tail;
    return {x * phi, x * bell * 0.39894228f + phi};
  } else if constexpr (A == Activation::gelu_tanh) {
    const V square = x * x, u = x * (square * 0.07135481f + 1.5957691f);  // 2 sqrt(2 / pi) (x + 0.044715 x^3)
    const V s = inverse(exp(-u) + 1.0f);                                  // (1 + tanh(u / 2)) / 2
    return {x * s, x * s * (one - s) * (square * 0.21406444f + 1.5957691f) + s};
  } else if constexpr (A == Activation::silu) {
    const V s = inverse(exp(-x) + 1.0f);
    return {x * s, s * (x * (one - s) + 1.0f)};
  } else if constexpr (A == Activation::relu_squared) {
    const V relu = x < 0.0f ? V{} : x;
    return {relu * relu, relu + relu};
  } else {
    return {x < 0.0f ? V{} : x, x <= 0.0f ? V{} : one};
  }
}

}  // namespace pk
