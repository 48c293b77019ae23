// The MLP's CPU kernels: plain parameters, and one table of functions per instruction-set level and dtypes.
#pragma once

#include <cstdint>

#include "../../common/activation.h"
#include "../core/stats.h"
#include "../product/weight.h"

namespace pk {

struct MlpParams {
  const void* x;  // [B, C, H, W], contiguous or channels_last
  void* y;        // [B, out, H, W] in x's layout
  void* saved;    // fc1's output [hidden, tokens], or null
  int64_t batch, channels, hidden, out, pixels;
  int64_t tokens;  // batch * pixels
  bool channels_last, residual, norm;
  Activation activation;
  Weight w1, w2;  // [hidden, C], [out, hidden]

  // Padded with zeros: vectors are read kRowsMax elements at a time
  const float *b1, *b2, *gamma, *beta, *scale;  // [hidden], [out], norm [C] twice, LayerScale [out]
  const float *mean, *rstd, *drop;              // [B]

  int64_t lanes;         // tokens of a forward tile, padded to vectors
  int64_t parts = 1;     // of the hidden channels, which threads share where tokens are few; else 1
  float* part_sums;      // [parts, out, tokens], padded to kRowsMax and to vectors: fc2's sums of each part, or null
  float* token_moments;  // [tokens, 2]: mean and M2 of every token of y, or null
};

// Arrays are padded as vectors of channels are read: to kRowsMax channels and kLanesMax tokens more. A word is an
// operand of the products: a float, or two bfloat16.
struct MlpBackwardParams : MlpParams {
  const void* grad;  // dL/dy [B, out, H, W] in x's layout
  void* dx;
  bool parameter_grads, drop_grad;

  // A block of tokens, in lanes: a multiple of 32. `lanes` are those of a tile of `prepare` and `hidden`.
  int64_t block_lanes, input_lanes;
  uint32_t *n, *g, *dh;           // operands [channels | out | hidden, block_lanes]: of fc1, s g, and dL/dh
  uint32_t *x_tokens, *g_tokens;  // words along tokens [block_lanes, C | out]: normalised x, d g
  float* drop_lanes;              // [block_lanes], 0 where there is no token
  float* drop_rows;               // [1 + hidden items, block_lanes]: terms of drop_scale's gradient
  uint32_t* w1t;                  // W1^T in operand words
  float* e;                       // gamma W1^T dh of the group's samples, in x's layout
  bool add;                       // whether this is not the first block

  // Of the whole call, padded
  float *g_p, *x_dh, *db1;  // [hidden, out], [hidden, C], [hidden]: sum d g p, sum dh xhat, sum dh over tokens
  float* t;                 // [out]: sum d g
  void *dw1, *dw2;
  float *db1_out, *db2, *dgamma, *dbeta, *dscale;
};

struct MlpKernels {
  StatsKernel stats;
  // Scratch is counted in words of 32 bits.
  int64_t (*forward_scratch)(const MlpParams&);
  void (*forward)(const MlpParams&, int64_t first_token, int64_t tokens, uint32_t* scratch);
  void (*forward_part)(const MlpParams&, int64_t part, uint32_t* scratch);
  void (*forward_join)(const MlpParams&, int64_t first_token, int64_t tokens, uint32_t* scratch);

  // See backward.h
  int64_t (*backward_scratch)(const MlpBackwardParams&);
  int operand_per;  // elements of an operand word
  void (*pack_input)(const MlpBackwardParams&, int64_t first_channel, int64_t last_channel);
  void (*prepare)(const MlpBackwardParams&, int64_t first_token, int64_t tokens, int64_t lane, int64_t lanes,
                  float* g_sums, uint32_t* scratch);
  void (*hidden)(const MlpBackwardParams&, int64_t row, int64_t first_token, int64_t tokens, uint32_t* scratch);
  void (*input)(const MlpBackwardParams&, int64_t token_of_group, int64_t tokens, int64_t lane, int64_t lanes,
                uint32_t* scratch);
  void (*reduce)(const void* x, const float* e, float mean, int64_t n, double* sums);
  void (*finish)(const void* x, const void* grad, const float* e, float mean, float rstd, float k0, float k1, int64_t n,
                 void* dx);
  int64_t (*weight_items)(const MlpBackwardParams&);
  void (*weights)(const MlpBackwardParams&, int64_t item);
};

// (float32, float32), (bfloat16, bfloat16), (float16, float16), (float32, bfloat16), (float32, float16): elements of x
// and of the operands of the products
extern const MlpKernels mlp_baseline[5];
extern const MlpKernels mlp_avx2[5];
extern const MlpKernels mlp_avx512[5];
extern const MlpKernels mlp_avx512_bf16[5];
extern const MlpKernels mlp_amx[2];  // those whose operands are bfloat16

}  // namespace pk
