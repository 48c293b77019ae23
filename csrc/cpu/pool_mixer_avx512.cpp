#if defined(__x86_64__)
#define PK_LEVEL 2
#include "pool_mixer/pool_mixer.h"
// The level applies from here on.
#include "isa/level.h"

namespace pk {
namespace {
#include "isa/vec.h"
// After vec.h.
#include "pool_mixer/kernels.h"
}  // namespace

const PoolMixerKernels PK_TABLE(pool_mixer)[3] = {kernels<float>(), kernels<bf16>(), kernels<fp16>()};

}  // namespace pk
#endif
