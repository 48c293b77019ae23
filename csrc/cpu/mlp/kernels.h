// The MLP's kernels for one instruction-set level.
#pragma once

#include "../core/sample_stats.h"
#include "backward.h"
#include "forward.h"
#include "mlp.h"
#if PK_LEVEL == 4
#include "narrow_forward.h"
#include "rows_backward.h"
#include "tiles_forward.h"
#endif

namespace pk {
namespace {

// The backward with tokens as rows, which is for operands of bfloat16 on AMX tiles.
template <class T>
constexpr const RowsBackwardKernels* rows_backward_of() {
#if PK_LEVEL == 4
  return &rows_backward_kernels<T>;
#else
  return nullptr;
#endif
}

// T: elements of x. S: what the operands of the products are rounded to.
template <class T, class S>
constexpr MlpKernels mlp_kernels() {
  return {sample_stats<T>,
#if PK_LEVEL == 4
          mlp_tiles_scratch<T>,
          mlp_tiles_forward<T>,
          mlp_tiles_part<T>,
          mlp_forward_join<T, S>,
          mlp_rows_scratch,
          mlp_rows_packed,
          mlp_rows_items,
          mlp_rows_pack<T>,
          mlp_rows_forward<T>,
#else
          mlp_forward_scratch<T, S>,
          mlp_forward<T, S>,
          mlp_forward_part<T, S>,
          mlp_forward_join<T, S>,
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          nullptr,
#endif
          mlp_backward_scratch<T, S>,
          OperandOf<S>::Op::kPer,
          mlp_pack_input<T, S>,
          mlp_prepare<T, S>,
          mlp_hidden<T, S>,
          mlp_input<T, S>,
          mlp_reduce<T>,
          mlp_finish<T>,
          mlp_weight_items,
          mlp_weights,
          rows_backward_of<T>()};
}

}  // namespace
}  // namespace pk
