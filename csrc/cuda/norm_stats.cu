// Statistics of each sample for GroupNorm(1, C), as partials (count, mean, M2): the head of a chain of fused kernels.
//
// A sample is one contiguous run in NCHW and channels_last alike, so one flat kernel serves both. A block keeps its
// chunk in registers: the mean first, then the squared deviations from it, with no difference of large sums. As many
// blocks as there are chunks, so that a batch of one still fills the chip.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "launch.cuh"

namespace pk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kPerThread = 32;
constexpr int64_t kChunkElements = int64_t{kThreads} * kPerThread;

struct NormStatsParams {
  const void* x;    // [B, sample]
  float* partials;  // [B, chunks, 3]
  int64_t sample;   // elements of one
  int64_t chunks;   // ceil(sample / kChunkElements)
};

__device__ inline float block_sum(float value) {
  __shared__ float warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  __syncthreads();  // the previous sum has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += warps[warp];
  return total;
}

// VECTOR: every sample starts at a multiple of 16 bytes.
template <class T, bool VECTOR>
__global__ void __launch_bounds__(kThreads, 2) norm_stats(NormStatsParams p) {
  constexpr int kWidth = VECTOR ? 16 / sizeof(T) : 1, kLoads = kPerThread / kWidth;
  const int64_t b = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks, begin = chunk * kChunkElements;
  const int count = static_cast<int>(min(kChunkElements, p.sample - begin));
  const T* x = static_cast<const T*>(p.x) + b * p.sample + begin;

  float values[kPerThread];
  float sum = 0;
#pragma unroll
  for (int load = 0; load < kLoads; ++load) {
    const int at = (load * kThreads + threadIdx.x) * kWidth;  // count is a multiple of kWidth where VECTOR holds
    alignas(16) T raw[kWidth];
    if (at < count) {
      if constexpr (VECTOR)
        *reinterpret_cast<uint4*>(raw) = __ldg(reinterpret_cast<const uint4*>(x + at));
      else
        raw[0] = x[at];
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float value = at < count ? static_cast<float>(raw[i]) : 0.0f;
      values[load * kWidth + i] = value;
      sum += value;
    }
  }
  const float mean = block_sum(sum) / count;
  float first = 0, second = 0;
#pragma unroll
  for (int load = 0; load < kLoads; ++load)
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const bool used = (load * kThreads + threadIdx.x) * kWidth < count;
      const float d = used ? values[load * kWidth + i] - mean : 0.0f;
      first += d;
      second += d * d;
    }
  first = block_sum(first);  // what rounding left in the mean
  second = block_sum(second);
  if (threadIdx.x == 0) {
    float* out = p.partials + static_cast<int64_t>(blockIdx.x) * 3;
    out[0] = count;
    out[1] = mean + first / count;
    out[2] = fmaxf(second - first * (first / count), 0.0f);
    if (isnan(second)) out[2] = second;
  }
}

template <class T>
void launch(const NormStatsParams& p, int64_t batch, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.sample * sizeof(T) % 16 == 0;
  const unsigned blocks = static_cast<unsigned>(batch * p.chunks);
  if (aligned)
    norm_stats<T, true><<<blocks, kThreads, 0, stream>>>(p);
  else
    norm_stats<T, false><<<blocks, kThreads, 0, stream>>>(p);
  check_launch("norm_stats");
}

Tensor norm_stats_cuda(Tensor x) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4, "norm_stats_cuda: x must be a CUDA tensor of 4 dimensions");
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t sample = channels * height * width;
  STD_TORCH_CHECK(sample > 0, "norm_stats_cuda: x must have at least one channel and one pixel");
  const bool dense = x.is_contiguous() || (x.stride(1) == 1 && x.stride(3) == channels &&
                                           x.stride(2) == width * channels && x.stride(0) == sample);
  STD_TORCH_CHECK(dense, "norm_stats_cuda: x must be contiguous or channels_last");
  const int64_t chunks = (sample + kChunkElements - 1) / kChunkElements;
  STD_TORCH_CHECK(batch * chunks < (int64_t{1} << 31), "norm_stats_cuda: x has too many elements for one launch");
  const Launch on(x);
  Tensor partials = on.empty_floats({batch, chunks, 3});
  if (batch == 0) return partials;
  const NormStatsParams p{x.data_ptr(), static_cast<float*>(partials.mutable_data_ptr()), sample, chunks};
  switch (x.scalar_type()) {
    case ScalarType::Float: launch<float>(p, batch, on.stream()); break;
    case ScalarType::BFloat16: launch<__nv_bfloat16>(p, batch, on.stream()); break;
    case ScalarType::Half: launch<__half>(p, batch, on.stream()); break;
    default: STD_TORCH_CHECK(false, "norm_stats_cuda: x must be float32, bfloat16 or float16");
  }
  return partials;
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(poolformer_kernels, CUDA, m) { m.impl("norm_stats_cuda", TORCH_BOX(&pk::norm_stats_cuda)); }
