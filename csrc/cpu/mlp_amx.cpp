#if defined(__x86_64__)
#define PK_LEVEL 4
#include "mlp.h"
// The level applies from here on.
#include "level.h"

namespace pk {
namespace {
#include "vec.h"
// After vec.h.
#include "mlp_kernels.h"
}  // namespace

const MlpKernels PK_TABLE(mlp)[2] = PK_MLP_TABLE;

}  // namespace pk
#endif
