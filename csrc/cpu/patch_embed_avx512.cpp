#if defined(__x86_64__)
#define PK_LEVEL 2
#include "chain/patch_embed.h"
// The level applies from here on.
#include "isa/level.h"

namespace pk {
namespace {
#include "isa/vec.h"
// After vec.h.
#include "chain/patch_embed_kernels.h"
}  // namespace

const PatchEmbedKernels PK_TABLE(patch_embed)[3] = {kernels<float>(), kernels<bf16>(), kernels<fp16>()};

}  // namespace pk
#endif
