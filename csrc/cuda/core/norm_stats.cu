// Statistics of each sample for GroupNorm(1, C), as partials (count, mean, M2): the head of a chain of fused kernels.
// And the merging of many partials, before a kernel whose every block would merge them.
//
// A sample is one contiguous run in NCHW and channels_last alike, so one flat kernel serves both. A block keeps its
// chunk in registers: the mean first, then the squared deviations from it, with no difference of large sums. As many
// blocks as there are chunks, so that a batch of one still fills the chip.
#include "launch.cuh"

namespace pk {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;  // small chunks: 98 blocks for one sample of 64 x 56 x 56
constexpr int64_t kChunkElements = int64_t{kThreads} * kPerThread;

struct NormStatsParams {
  const void* x;    // [B, sample] of T
  float* partials;  // [B, chunks, 3]: count, mean and M2 of each chunk
  int64_t sample;   // elements of one sample
  int64_t chunks;   // of a sample: ceil(sample / kChunkElements)
};

// VECTOR: every sample starts at a multiple of 16 bytes.
template <class T, bool VECTOR>
__global__ void __launch_bounds__(kThreads, 6) norm_stats(NormStatsParams p) {
  constexpr int kWidth = VECTOR ? 16 / sizeof(T) : 1, kLoads = kPerThread / kWidth;
  const int64_t b = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks, begin = chunk * kChunkElements;
  const int count = static_cast<int>(min(kChunkElements, p.sample - begin));
  const T* x = static_cast<const T*>(p.x) + b * p.sample + begin;

  __shared__ float scratch[kThreads / 32];
  float values[kPerThread];
  float sum = 0;
#pragma unroll
  for (int each = 0; each < kLoads; ++each) {
    const int offset = (each * kThreads + threadIdx.x) * kWidth;  // count is a multiple of kWidth where VECTOR holds
    Pack<T, kWidth> raw{};
    if (offset < count) raw = load<T, kWidth>(x + offset);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float value = offset < count ? element(raw, i) : 0.0f;
      values[each * kWidth + i] = value;
      sum += value;
    }
  }
  const float mean = block_sum(sum, scratch) / count;
  float first = 0, second = 0;
#pragma unroll
  for (int each = 0; each < kLoads; ++each)
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const bool used = (each * kThreads + threadIdx.x) * kWidth < count;
      const float d = used ? values[each * kWidth + i] - mean : 0.0f;
      first += d;
      second += d * d;
    }
  first = block_sum(first, scratch);  // not zero, because the mean is rounded: corrects mean and M2 below
  second = block_sum(second, scratch);
  if (threadIdx.x == 0) {
    float* out = p.partials + static_cast<int64_t>(blockIdx.x) * 3;
    out[0] = count;
    out[1] = mean + first / count;
    out[2] = fmaxf(second - first * (first / count), 0.0f);
    if (isnan(second) || isinf(second)) out[2] = second;
  }
}

template <class T>
void launch(const NormStatsParams& p, int64_t batch, const Launcher& launcher) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.sample * sizeof(T) % 16 == 0;
  launcher.launch("norm_stats", aligned ? norm_stats<T, true> : norm_stats<T, false>, batch * p.chunks, kThreads, p);
}

constexpr int64_t kMerged = 128;  // partials of a sample that the kernels merge themselves

struct MergeParams {
  const float* partials;  // [B, n, 3]: count, mean and M2 of parts of a sample
  float* merged;          // [B, 3]: of the whole sample
  int64_t n;              // partials of a sample
};

// Merges each sample's partials into one, a block per sample.
__global__ void __launch_bounds__(kThreads) stats_merge(MergeParams p) {
  __shared__ float each[3 * kThreads / 32];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t b = blockIdx.x, part = (p.n + warps - 1) / warps, begin = min(warp * part, p.n);
  const Moments<float> m = merged(p.partials + (b * p.n + begin) * 3, min(part, p.n - begin));
  if (threadIdx.x % 32 == 0) {
    each[3 * warp] = m.count;
    each[3 * warp + 1] = m.mean;
    each[3 * warp + 2] = m.m2;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  Moments<float> all;
  for (int i = 0; i < warps; ++i) all.merge(each[3 * i], each[3 * i + 1], each[3 * i + 2]);
  p.merged[3 * b] = all.count;
  p.merged[3 * b + 1] = all.mean;
  p.merged[3 * b + 2] = all.m2;
}

}  // namespace

void merge_many(int64_t batch, Tensor& owner, const float*& stats, int64_t& partials) {
  if (partials <= kMerged) return;
  Tensor one = empty_floats(owner, {batch, 3});
  Launcher(owner).launch("stats_merge", stats_merge, batch, kThreads, MergeParams{stats, floats(one), partials});
  stats = floats(one);
  partials = 1;
  owner = one;
}

Tensor norm_stats_cuda(Tensor x) {
  check_images(x, "norm_stats_cuda");
  const int64_t batch = x.size(0), sample = x.size(1) * x.size(2) * x.size(3);
  STD_TORCH_CHECK(is_dense(x, is_channels_last(x)), "norm_stats_cuda: x must be contiguous or channels_last");
  const int64_t chunks = (sample + kChunkElements - 1) / kChunkElements;
  const Launcher launcher(x);
  Tensor partials = empty_floats(x, {batch, chunks, 3});
  const NormStatsParams p{x.data_ptr(), floats(partials), sample, chunks};
  switch (dtype_index(x.scalar_type())) {
    case 0: launch<float>(p, batch, launcher); break;
    case 1: launch<bf16>(p, batch, launcher); break;
    default: launch<f16>(p, batch, launcher);
  }
  return partials;
}

}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(poolformer_kernels, PK_DISPATCH_KEY, m) {
  m.impl("norm_stats_cuda", TORCH_BOX(&pk::norm_stats_cuda));
  pk::list_kernels<pk::norm_stats<float, true>, pk::norm_stats<float, false>, pk::norm_stats<pk::bf16, true>,
                   pk::norm_stats<pk::bf16, false>, pk::norm_stats<pk::f16, true>, pk::norm_stats<pk::f16, false>,
                   pk::stats_merge>(pk::kThreads);
}
