// The MLP's CPU kernels: their arguments, and one table of functions per instruction-set level and dtypes.
#pragma once

#include <cstdint>

#include "../../common/activation.h"
#include "../core/stats.h"
#include "../product/weight.h"

namespace pk {

constexpr int64_t kFloatRowsBlock = 14;  // tokens of a block of float_rows.h

// A token is a pixel of a sample; tokens are numbered through the batch. Tokens run along the lanes of vectors.
struct MlpParams {
  const void* x;  // [B, C, H, W], contiguous or channels_last
  void* y;        // [B, out, H, W] in x's layout
  void* saved;    // fc1's output [hidden, tokens] in the operands' dtype, or null; the backward reads it
  int64_t batch, channels, hidden, out;
  int64_t pixels;  // H * W, tokens of a sample
  int64_t tokens;  // batch * pixels
  bool channels_last, residual, norm;
  Activation activation;
  Weight w1, w2;  // [hidden, C], [out, hidden]

  // Vectors with zeros behind them, as they are read kRowsMax elements at a time (`padded` in core/tensors.h)
  const float *b1, *b2;             // [hidden], [out]
  const float *gamma, *beta;        // [C] of the norm
  const float* scale;               // [out] LayerScale
  const float *mean, *rstd, *drop;  // [B] statistics of x, stochastic depth

  int64_t lanes;      // most tokens of a tile of the forward, or of `prepare` and `hidden`, in whole vectors or blocks
  int64_t parts = 1;  // parts of the hidden channels, which threads share where tokens are few
  const uint32_t* packed;   // both weights for `rows_forward`
  bool float_rows = false;  // whether `forward` has tokens as rows of products of floats (float_rows.h)
  // [parts, out, tokens]: fc2's sums over each part; out and tokens are rounded up (kRowsMax, vectors)
  float* part_sums;
  uint32_t* shared;      // both products' operands, where threads share the weights without parts (shared_forward.h)
  float* token_moments;  // [tokens, 2]: mean and M2 of every token of y, or null
};

// What the backward is given and writes.
struct MlpGradients : MlpParams {
  const void* grad;      // dL/dy [B, out, H, W] in x's layout
  void* dx;              // [B, C, H, W]
  bool parameter_grads;  // whether the gradients of weights, biases, norm and LayerScale are computed
  bool drop_grad;        // whether drop_scale's is

  void *dw1, *dw2;        // [hidden, C], [out, hidden] in the weights' dtype
  float* db1_out;         // [hidden]
  float *db2, *dscale;    // [out]
  float *dgamma, *dbeta;  // [C]
};

// Operands of products are arrays of words of 32 bits: a float, or two bfloat16 that are neighbours along the dimension
// marked "in words", over which the product sums. Arrays have room for more: kRowsMax channels and kLanesMax tokens.
struct MlpBackwardParams : MlpGradients {
  // The block of tokens at work
  int64_t block_lanes;  // its tokens, rounded up to a multiple of 32
  int64_t input_lanes;  // most tokens of a tile of `input`
  uint32_t* n;          // [channels in words, block_lanes] operand of fc1: the normalised x
  uint32_t* g;          // [out in words, block_lanes] s * dL/dy
  uint32_t* dh;         // [hidden in words, block_lanes] dL/dh
  uint32_t* x_tokens;   // [block_lanes in words, C] (x - mean) * rstd
  uint32_t* g_tokens;   // [block_lanes in words, out] d * dL/dy
  float* drop_lanes;    // [block_lanes] drop_scale of each token, 0 where there is none
  float* drop_rows;     // [1 + items of `hidden`, block_lanes] terms of drop_scale's gradient
  bool add;             // whether sums of former blocks are in g_p and x_dh

  // The group of samples at work
  float* e;  // gamma W1^T dh, in x's layout

  // The whole call; rows and vectors are rounded up
  uint32_t* w1t;  // [C, hidden in words] W1^T
  float* g_p;     // [hidden, out] sum over tokens of d g p
  float* x_dh;    // [hidden, C] sum of dh xhat
  float* db1;     // [hidden] sum of dh
  float* t;       // [out] sum of d g
};

struct RowsBackwardKernels;   // rows_backward_plan.h
struct SharedForwardKernels;  // shared_plan.h

// Scratch is counted in words of 32 bits.
struct MlpKernels {
  StatsKernel stats;

  // ---- forward
  int64_t (*forward_scratch)(const MlpParams&);  // words that each of the following needs
  // y of tokens first_token .. first_token + tokens - 1
  void (*forward)(const MlpParams&, int64_t first_token, int64_t tokens, uint32_t* scratch);
  // part_sums of one part of the hidden channels, for all tokens; null where there is `shared_forward`
  void (*forward_part)(const MlpParams&, int64_t part, uint32_t* scratch);
  // y of the tokens from part_sums
  void (*forward_join)(const MlpParams&, int64_t first_token, int64_t tokens, uint32_t* scratch);
  const SharedForwardKernels* shared_forward;  // or null

  // ---- forward with tokens as rows, see rows_forward.h; null where the level or the dtypes have none
  int64_t (*rows_scratch)(const MlpParams&);  // words that `rows_forward` needs
  int64_t (*rows_packed)(const MlpParams&);   // words of the packed weights
  int64_t (*rows_items)(const MlpParams&);    // items of `rows_pack`
  void (*rows_pack)(const MlpParams&, int64_t item, uint32_t* packed);
  // y of tokens first_token .. first_token + tokens - 1, of which there are `lanes` at most
  void (*rows_forward)(const MlpParams&, int64_t first_token, int64_t tokens, uint32_t* scratch);

  bool float_rows;  // whether `forward` can do what MlpParams::float_rows asks for

  // ---- backward, see backward.h
  int64_t (*backward_scratch)(const MlpBackwardParams&);  // words that `prepare`, `hidden` and `input` need
  int operand_per;                                        // elements of an operand word
  // w1t of input channels first_channel .. last_channel - 1
  void (*pack_input)(const MlpBackwardParams&, int64_t first_channel, int64_t last_channel);
  // n, g, x_tokens, g_tokens, drop_lanes and drop_rows[0] of the block's lanes from `lane` on, of which the first are
  // `tokens` tokens from first_token on; g_sums [out]: sum of d g over them
  void (*prepare)(const MlpBackwardParams&, int64_t first_token, int64_t tokens, int64_t lane, int64_t lanes,
                  float* g_sums, uint32_t* scratch);
  // dh, drop_rows, and sums for g_p, x_dh and db1 of hidden channels row .. row + kRowsMax - 1, over the block, which
  // starts at first_token
  void (*hidden)(const MlpBackwardParams&, int64_t row, int64_t first_token, int64_t tokens, uint32_t* scratch);
  // e of the block's lanes from `lane` on, of which the first are `tokens` tokens from token_of_group on
  void (*input)(const MlpBackwardParams&, int64_t token_of_group, int64_t tokens, int64_t lane, int64_t lanes,
                uint32_t* scratch);
  // sums[0] and sums[1]: of e and of e (x - mean), over n elements
  void (*reduce)(const void* x, const float* e, float mean, int64_t n, double* sums);
  // dx = e rstd - k0 - (x - mean) k1 over n elements, or dx = e where x is null; plus grad where it is not null
  void (*finish)(const void* x, const void* grad, const float* e, float mean, float rstd, float k0, float k1, int64_t n,
                 void* dx);
  // The parameters' gradients from g_p, x_dh, db1 and t, one work item at a time
  int64_t (*weight_items)(const MlpBackwardParams&);
  void (*weights)(const MlpBackwardParams&, int64_t item);

  const RowsBackwardKernels* rows_backward;  // the backward with tokens as rows, or null: the level has none
};

// For pairs of the elements of x and of the operands that products are computed from: (float32, float32), (bfloat16,
// bfloat16), (float16, float16), (float32, bfloat16), (float32, float16)
extern const MlpKernels mlp_baseline[5];
extern const MlpKernels mlp_avx2[5];
extern const MlpKernels mlp_avx512[5];
extern const MlpKernels mlp_avx512_bf16[5];
extern const MlpKernels mlp_amx[2];  // those whose operands are bfloat16

}  // namespace pk
