// The MLP's CPU kernels: plain parameters, and one table of functions per instruction-set level and dtypes.
#pragma once

#include <cstdint>

#include "../common/activation.h"
#include "stats.h"

namespace pk {

struct Weight {
  const void* data;  // [rows, cols], rows `step` elements apart
  int64_t step;
  int dtype;  // 0 float32, 1 bfloat16, 2 float16
};

struct MlpParams {
  const void* x;     // [B, C, H, W], contiguous or channels_last
  const void* grad;  // backward: dL/dy in x's layout
  void* y;           // [B, out, H, W] in x's layout
  void* dx;
  void* saved;  // fc1's output [hidden, tokens], or null
  int64_t batch, channels, hidden, out, pixels;
  int64_t tokens;  // batch * pixels
  bool channels_last, residual, norm;
  Activation activation;
  Weight w1, w2;  // [hidden, C], [out, hidden]

  // Padded with zeros: vectors are read kRowsMax elements at a time
  const float *b1, *b2, *gamma, *beta, *scale;  // [hidden], [out], norm [C] twice, LayerScale [out]
  const float *mean, *rstd, *drop;              // [B]

  int64_t lanes;         // tokens of a forward tile, padded to vectors
  float* token_moments;  // [tokens, 2]: mean and M2 of every token of y, or null
};

constexpr int64_t kRowsMax = 32;    // output channels of one product at any level

struct MlpKernels {
  StatsKernel stats;
  int64_t (*forward_scratch)(const MlpParams&);  // words
  void (*forward)(const MlpParams&, int64_t first_token, int64_t tokens, uint32_t* scratch);
};

// (float32, float32), (bfloat16, bfloat16), (float16, float16), (float32, bfloat16), (float32, float16): elements of x
// and of the operands of the products
extern const MlpKernels mlp_baseline[5];
extern const MlpKernels mlp_avx2[5];
extern const MlpKernels mlp_avx512[5];
extern const MlpKernels mlp_avx512_bf16[5];

}  // namespace pk
