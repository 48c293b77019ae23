// float16 as device code uses it, for the executor.
#pragma once

#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
  explicit operator float() const { return torch::headeronly::Half(bits, torch::headeronly::Half::from_bits()); }
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __half2float(__half v) { return static_cast<float>(v); }
inline __half __float2half(float v) { return {torch::headeronly::Half(v).x}; }
inline __half __float2half_rn(float v) { return __float2half(v); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
