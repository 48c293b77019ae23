// CUDA's language for a host compiler, with the executor behind it: blocks run one after another, the threads of a
// block as fibers that change places where they wait for each other.
#pragma once

#include <stdint.h>

#include <math.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static thread_local  // all fibers are of one thread; the executor finds and poisons such memory
#define __grid_constant__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace executor {

// ---- what a fiber sees

char* dynamic_shared();

// Where memory is in the block's window of shared memory, and the memory of such an address, of which the block has
// `bytes`. Both fail for what is not the block's shared memory.
uint32_t shared_address(const void* pointer);
char* shared_pointer(uint32_t address, size_t bytes);

// Aborts with a message.
[[noreturn]] void fail(const char* what);

constexpr int kValue = 128;  // the most bytes of a thread's value

// Values of a warp: deposits this lane's bytes, waits for the lanes in `mask`, and returns all lanes', kValue bytes
// each, until the lane's next exchange. The same of a warpgroup, which are four whole warps.
const char* exchange(unsigned mask, const void* value, int bytes);
const char* exchange_in_warpgroup(const void* value, int bytes);
// After an exchange: whether this is the first thread to ask.
bool first_of_warp();
bool first_of_warpgroup();
// Of this thread's warpgroup products; it may not return before they have landed.
int& products_under_way();

// Barrier `id` of `threads` threads of the block; 0 threads: of all.
void barrier(int id, int threads);

// Lets the other fibers run until `ready()`.
void wait_until(const std::function<bool()>& ready);

// Asynchronous copies of 16 bytes: each lands when its group is waited for, so that reading too early shows.
void copy_async(void* to, const void* from, bool exists);
void copy_commit();
void copy_wait(int groups_under_way);

// ---- what a launch does

extern int architecture, shared_of_block;  // of the device: 80, 90 ...; bytes that a block may have

// Runs a grid. Fails where threads wait for each other forever or write past shared memory.
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body);

}  // namespace executor

// Of the fiber that runs: the executor sets them at every change.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { executor::barrier(0, 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { executor::exchange(mask, nullptr, 0); }
inline void __threadfence() {}

template <class T>
inline T executor_shuffle(unsigned mask, T value, int source, int self) {
  const char* all = executor::exchange(mask, &value, sizeof value);
  T out;
  std::memcpy(&out, all + executor::kValue * (source < 0 || source > 31 ? self : source), sizeof out);
  return out;
}
inline int executor_lane() { return static_cast<int>(threadIdx.x % 32); }
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const int self = executor_lane();
  return executor_shuffle(mask, value, self / width * width + lane % width, self);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int with) {
  return executor_shuffle(mask, value, executor_lane() ^ with, executor_lane());
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, int by) {
  return executor_shuffle(mask, value, executor_lane() + by, executor_lane());
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, int by) {
  return executor_shuffle(mask, value, executor_lane() - by, executor_lane());
}

// ---- types and functions of device code

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From>
inline To executor_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}
inline float __uint_as_float(uint32_t v) { return executor_bits<float>(v); }
inline uint32_t __float_as_uint(float v) { return executor_bits<uint32_t>(v); }
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
inline float __expf(float x) { return std::exp(x); }
// As the manual of the intrinsics has them: a NaN becomes 0, and a divisor above 2^126 gives 0, or a NaN of infinity.
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __fdividef(float a, float b) {
  if (std::fabs(b) > 0x1p126f && std::fabs(b) < INFINITY) return std::isinf(a) ? NAN : 0.0f;
  return a / b;
}
inline size_t __cvta_generic_to_shared(const void* pointer) { return executor::shared_address(pointer); }
using std::isinf;
using std::isnan;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// ---- the runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes = 0;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
  *of = {};
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "refused by the executor"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= executor::shared_of_block ? cudaSuccess : cudaErrorInvalidValue;
}
// Few multiprocessors, so that a persistent grid gives each block several tiles.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 2; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = executor::shared_of_block; break;
    case cudaDevAttrComputeCapabilityMajor: *value = executor::architecture / 10; break;
    default: *value = executor::architecture % 10;
  }
  return cudaSuccess;
}
template <class Params>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), Params params) {
  const dim3 block = config->blockDim;
  if (block.x * block.y * block.z > 1024 || config->dynamicSmemBytes > static_cast<size_t>(executor::shared_of_block))
    return cudaErrorInvalidValue;
  executor::run(config->gridDim, block, config->dynamicSmemBytes, [&] { kernel(params); });
  return cudaSuccess;
}
