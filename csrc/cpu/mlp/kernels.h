// The MLP's kernels for one instruction-set level.
#pragma once

#include "../core/sample_stats.h"
#include "backward.h"
#include "forward.h"
#if PK_LEVEL == 2 || PK_LEVEL == 3
#include "float_rows.h"
#endif
#include "mlp.h"
#if PK_LEVEL == 4
#include "narrow_forward.h"
#include "rows_backward.h"
#include "shared_forward.h"
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

// The forward where tokens are columns or, of floats at the levels of AVX-512, rows.
template <class T, class S>
struct ForwardOf {
#if PK_LEVEL == 2 || PK_LEVEL == 3
  static constexpr bool kRows = OperandOf<S>::Op::kPer == 1;
#else
  static constexpr bool kRows = false;
#endif
  static int64_t scratch(const MlpParams& p) {
#if PK_LEVEL == 2 || PK_LEVEL == 3
    if constexpr (kRows)
      if (p.float_rows) return float_rows_scratch(p);
#endif
    return mlp_forward_scratch<T, S>(p);
  }
  static void run(const MlpParams& p, int64_t first, int64_t count, packed32* scratch) {
#if PK_LEVEL == 2 || PK_LEVEL == 3
    if constexpr (kRows)
      if (p.float_rows) return mlp_float_rows<T, S>(p, first, count, scratch);
#endif
    mlp_forward<T, S>(p, first, count, scratch);
  }
};

// T: elements of x. S: what the operands of the products are rounded to.
template <class T, class S>
constexpr MlpKernels mlp_kernels() {
  return {sample_stats<T>,
#if PK_LEVEL == 4
          mlp_tiles_scratch,
          mlp_tiles_forward<T>,
          nullptr,
          nullptr,
          &shared_forward_kernels<T>,
          mlp_rows_scratch,
          mlp_rows_packed,
          mlp_rows_items,
          mlp_rows_pack<T>,
          mlp_rows_forward<T>,
          false,
#else
          ForwardOf<T, S>::scratch,
          ForwardOf<T, S>::run,
          mlp_forward_part<T, S>,
          mlp_forward_join<T, S>,
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          ForwardOf<T, S>::kRows,
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
