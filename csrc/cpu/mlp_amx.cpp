#if defined(__x86_64__)
#define PK_LEVEL 4
#include "mlp/mlp.h"
// The level applies from here on.
#include "isa/level.h"

namespace pk {
namespace {
#include "isa/vec.h"
// After vec.h.
#include "mlp/kernels.h"
}  // namespace

const MlpKernels PK_TABLE(mlp)[2] = PK_MLP_TABLE;

}  // namespace pk
#endif
