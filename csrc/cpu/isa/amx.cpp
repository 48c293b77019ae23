// The kernels that multiply bfloat16, on AMX tiles; the others are those of avx512_bf16.cpp.
#if defined(__x86_64__)
#define PK_LEVEL 4
#include "../chain/patch_embed_kernels.h"
#include "../mlp/kernels.h"
#include "../rate/kernels.h"

namespace pk {

const MlpKernels mlp_amx[2] = {mlp_kernels<bf16, bf16>(), mlp_kernels<float, bf16>()};

const PatchEmbedKernels patch_embed_amx[1] = {patch_embed_kernels<bf16>()};

const RateKernel rate_amx[1] = {rate_of_tiles()};

}  // namespace pk
#endif
