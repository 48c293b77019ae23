// What the kernels share: elements in 16-byte packs, parameters, shared memory, statistics of a sample.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "../../common/chan.h"
#include "../../common/window_count.h"

// PK_SHARED(memory) declares `memory`, the dynamic shared memory of a block.
#if defined(PK_EXECUTOR)  // tests/cuda_executor runs this source on the host
#define PK_SHARED(memory) char* const memory = executor::dynamic_shared()
#else
#define PK_SHARED(memory) extern __shared__ __align__(1024) char memory[]
#endif

namespace pk {

// A vector of parameters of any float dtype and stride, or none.
struct Vector {
  const void* data = nullptr;  // null: there is no such parameter
  int64_t stride = 0;          // elements
  int dtype = 0;               // dtype_index

  // Element i in float32; `absent` where there is no such parameter.
  __device__ float at(int64_t i, float absent) const {
    if (data == nullptr) return absent;
    i *= stride;
    if (dtype == 0) return static_cast<const float*>(data)[i];
    if (dtype == 1) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    return __half2float(static_cast<const __half*>(data)[i]);
  }
};

namespace {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr unsigned kWarp = 0xffffffffu;

// ---- elements

// N elements as the memory holds them, moved by one instruction: in 32-bit words, of which 16-bit elements share one.
template <class T, int N>
struct alignas(sizeof(T) * N < 4 ? 4 : sizeof(T) * N) Pack {
  static constexpr int kBytes = sizeof(T) * N;
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
  uint32_t packed32[kBytes / 4 + (kBytes < 4)];
};

template <class T, int N>
__device__ inline Pack<T, N> load(const T* source) {
  Pack<T, N> out;
  if constexpr (out.kBytes == 16) {
    const uint4 v = *reinterpret_cast<const uint4*>(source);
    out.packed32[0] = v.x, out.packed32[1] = v.y, out.packed32[2] = v.z, out.packed32[3] = v.w;
  } else if constexpr (out.kBytes == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(source);
    out.packed32[0] = v.x, out.packed32[1] = v.y;
  } else if constexpr (out.kBytes == 4) {
    out.packed32[0] = *reinterpret_cast<const uint32_t*>(source);
  } else {
    out.packed32[0] = *reinterpret_cast<const uint16_t*>(source);
  }
  return out;
}

template <class T, int N>
__device__ inline void store(T* target, const Pack<T, N>& v) {
  if constexpr (v.kBytes == 16)
    *reinterpret_cast<uint4*>(target) = make_uint4(v.packed32[0], v.packed32[1], v.packed32[2], v.packed32[3]);
  else if constexpr (v.kBytes == 8)
    *reinterpret_cast<uint2*>(target) = make_uint2(v.packed32[0], v.packed32[1]);
  else if constexpr (v.kBytes == 4)
    *reinterpret_cast<uint32_t*>(target) = v.packed32[0];
  else
    *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(v.packed32[0]);
}

// Element i of a pack in float32; i is a constant after unrolling.
template <class T, int N>
__device__ inline float element(const Pack<T, N>& v, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(v.packed32[i]);
  } else if constexpr (std::is_same_v<T, bf16>) {
    return __uint_as_float(i % 2 ? v.packed32[i / 2] & 0xffff0000u : v.packed32[i / 2] << 16);
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(v.packed32[i / 2] >> (i % 2 * 16))));
  }
}

// Two float32 rounded to nearest even and packed, `low` in the low half.
template <class T>
__device__ inline uint32_t pair(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}

template <class T, int N>
__device__ inline Pack<T, N> packed(const float (&value)[N]) {
  Pack<T, N> out;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) out.packed32[i] = __float_as_uint(value[i]);
  } else if constexpr (N == 1) {
    out.packed32[0] = pair<T>(value[0], 0.0f) & 0xffffu;
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) out.packed32[i] = pair<T>(value[2 * i], value[2 * i + 1]);
  }
  return out;
}

// ---- statistics

// Sum over a warp, the same bits in every lane.
__device__ inline float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kWarp, value, offset);
  return value;
}

// Sum over a block of whole warps, the same bits in every thread; `scratch` has a float for each warp.
__device__ inline float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  __syncthreads();  // the previous sum has been read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp) total += scratch[warp];
  return total;
}

// Moments of all lanes of a warp, merged in a fixed order, the same bits in every lane.
__device__ inline Moments<float> warp_merged(Moments<float> m) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const float count = __shfl_down_sync(kWarp, m.count, offset);
    const float mean = __shfl_down_sync(kWarp, m.mean, offset), m2 = __shfl_down_sync(kWarp, m.m2, offset);
    if (threadIdx.x % 32 < offset) m.merge(count, mean, m2);
  }
  m.count = __shfl_sync(kWarp, m.count, 0);
  m.mean = __shfl_sync(kWarp, m.mean, 0);
  m.m2 = __shfl_sync(kWarp, m.m2, 0);
  return m;
}

// Moments of a sample from its `n` partials (count, mean, M2), by a whole warp.
__device__ inline Moments<float> merged(const float* partials, int64_t n) {
  Moments<float> m;
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32; i < n; i += 32) m.merge(partials[3 * i], partials[3 * i + 1], partials[3 * i + 2]);
  return warp_merged(m);
}

__device__ inline float rstd_of(const Moments<float>& m, float eps) { return 1.0f / sqrtf(m.m2 / m.count + eps); }

}  // namespace
}  // namespace pk
