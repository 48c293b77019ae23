// bfloat16 as device code uses it, for the executor.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  unsigned short bits;
  explicit operator float() const { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 v) { return static_cast<float>(v); }
inline __nv_bfloat16 __float2bfloat16(float v) { return {torch::headeronly::BFloat16(v).x}; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __float2bfloat16(v); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
