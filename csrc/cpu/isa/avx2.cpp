// Every operator's kernels for AVX2.
#if defined(__x86_64__)
#define PK_LEVEL 1
#include "../chain/patch_embed_kernels.h"
#include "../mlp/kernels.h"
#include "../pool_mixer/kernels.h"
#include "../rate/kernels.h"

namespace pk {

const PoolMixerKernels pool_mixer_avx2[3] = {pool_mixer_kernels<float>(), pool_mixer_kernels<bf16>(),
                                             pool_mixer_kernels<fp16>()};

const MlpKernels mlp_avx2[5] = {mlp_kernels<float, float>(), mlp_kernels<bf16, bf16>(), mlp_kernels<fp16, fp16>(),
                                mlp_kernels<float, bf16>(), mlp_kernels<float, fp16>()};

const PatchEmbedKernels patch_embed_avx2[3] = {patch_embed_kernels<float>(), patch_embed_kernels<bf16>(),
                                               patch_embed_kernels<fp16>()};

const RateKernel rate_avx2[1] = {rate_of_vectors<Floats>()};

}  // namespace pk
#endif
