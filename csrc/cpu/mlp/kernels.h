// The MLP's kernels for one instruction-set level. Included after vec.h.

#include "../../common/activation_math.h"
#include "../product/gemm.h"
#include "../core/sample_stats.h"
#include "../product/token_tile.h"
// After them.
#include "../product/operands.h"
// After that.
#include "forward.h"
// After that.
#include "backward.h"

// T: elements of x. S: what the operands of the products are rounded to.
template <class T, class S>
constexpr MlpKernels kernels() {
  return {stats<T>,
          forward_scratch<T, S>,
          mlp_forward<T, S>,
          mlp_forward_part<T, S>,
          mlp_forward_join<T, S>,
          backward_scratch<T, S>,
          OperandOf<S>::Op::kPer,
          mlp_pack_input<T, S>,
          mlp_prepare<T, S>,
          mlp_hidden<T, S>,
          mlp_input<T, S>,
          mlp_reduce<T>,
          mlp_finish<T>,
          weight_items,
          mlp_weights};
}

#if PK_LEVEL == 4
#define PK_MLP_TABLE {kernels<bf16, bf16>(), kernels<float, bf16>()}
#else
#define PK_MLP_TABLE                                                                              \
  {kernels<float, float>(), kernels<bf16, bf16>(), kernels<fp16, fp16>(), kernels<float, bf16>(), \
   kernels<float, fp16>()}
#endif
