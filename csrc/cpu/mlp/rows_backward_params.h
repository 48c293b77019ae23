// The MLP's backward with tokens as rows of the products (rows_backward.h): its arguments, its kernels, and the order
// in which they are called. For gelu and operands of bfloat16, of tensors in channels_last, whose tokens then are rows
// of memory too.
//
// A block of tokens at a time:
// - `load`, by 32 tokens: the normalised input, and it and the gradient of y with tokens along the products' sums;
// - `hidden`, by 32 hidden channels: h again, its gradient, and the block's part of the weights' products; behind the
//   last block the parameters' gradients are made from these while they are in the caches;
// - `input`, by some hundred tokens: the gradient of the normalised input, beside `load` of the next block;
// - `finish`, by tokens of the samples that are complete: GroupNorm's backward and dx.
// Every sum is computed by one thread, in an order that depends on shapes alone.
#pragma once

#include <cstdint>

#include "mlp.h"

namespace pk {

constexpr int64_t kRowsSide = 32;  // tokens, hidden channels and channels of a block of products

// Tokens first .. first + tokens - 1; `first` is a multiple of the tokens of a block.
struct RowsBlock {
  int64_t first, tokens;
  bool add;   // whether sums of former blocks are in `sums` and `db1`
  bool last;  // of the call

  __attribute__((always_inline)) int64_t subs() const {
    return (tokens + kRowsSide - 1) / kRowsSide;
  }  // of kRowsSide tokens, the last may have less
};

// Arrays named `tiles` hold operands of bfloat16 as product/tile_block.h has them, kRowsSide x kRowsSide elements at a
// time. "Split": of every 32 elements the 16 even ones come first.
struct RowsBackwardParams : MlpGradients {
  int64_t block_tokens;  // of a block at most, a multiple of kRowsSide
  int64_t ring_tokens;   // tokens that `e` has room for, a multiple of kRowsSide: token t is row t % ring_tokens
  bool floats;           // whether x, grad and dx are float32; else bfloat16
  bool dropped;          // whether any of drop_scale is not 1
  bool packed;           // whether w1_tiles and w2_tiles are there; if not, `hidden` packs what it needs

  // The call's vectors and weights
  float *b1_split, *gamma_split, *beta_split;     // 4 b1, 4 gamma and 4 beta: h is needed four times as large
  uint16_t *w1_tiles, *w2_tiles, *w1_rows_tiles;  // W1^T, diag(s) W2 and W1

  // The block
  uint16_t *n_tiles, *x_tiles, *g_tiles;  // normalised x; (x - mean) rstd and d g with tokens along k
  uint16_t* g_copies;                     // [block_tokens, out] g where it is float32; else [32, out], see g_copied
  uint16_t* dh_tiles;                     // dL/dh
  float* drop_rows;                       // [block_tokens] d of each token
  float* g_sums;                          // [subs, out] sum of d g over 32 tokens, split

  // The samples that are not complete
  float* e;                  // [ring_tokens, C] W1^T dh
  float *e_sum, *e_product;  // [ring_tokens] sum over channels of gamma e, and of gamma e (x - mean)
  float *k0, *k1;            // [B] what `finish` subtracts: k0 + (x - mean) k1

  // The call's sums
  float* sums;  // [hidden / 32][2][C / 32][32, 32] of d g p and xhat dh, both indices split
  float* db1;   // [hidden] sum of dh, split
  float *scale_sums, *gamma_sums, *beta_sums;  // [hidden / 32, C] each 32 hidden channels' part of the gradients, split
  double* t;                                   // [out] sum of d g, split

  // Whether rows of 32 tokens of g are read from g_copies: they are to be rounded, or the call's last tokens are less
  // than 32, with zeros behind them.
  __attribute__((always_inline)) bool g_copied(const RowsBlock& block, int64_t sub) const {
    return floats || (sub + 1) * kRowsSide > block.tokens;
  }
  __attribute__((always_inline)) uint16_t* g_copy(int64_t sub) const {
    return g_copies + (floats ? sub * kRowsSide * out : 0);
  }
  __attribute__((always_inline)) const void* g_rows_of(const RowsBlock& block, int64_t sub) const {
    if (g_copied(block, sub)) return g_copy(sub);
    return static_cast<const uint16_t*>(grad) + (block.first + sub * kRowsSide) * out;
  }

  __attribute__((always_inline)) float* e_of(int64_t token) const { return e + token % ring_tokens * channels; }
};

struct RowsBackwardKernels {
  int64_t (*scratch)(const RowsBackwardParams&);  // words that each of the following needs
  // Packs rows 32 j .. of W1 and columns 32 j .. of W2
  void (*pack)(const RowsBackwardParams&, int64_t j);
  void (*load)(const RowsBackwardParams&, const RowsBlock&, int64_t first_sub, int64_t last_sub, uint32_t* scratch);
  void (*hidden)(const RowsBackwardParams&, const RowsBlock&, int64_t j, uint32_t* scratch);
  void (*input)(const RowsBackwardParams&, const RowsBlock&, int64_t first_sub, int64_t last_sub);
  // dx of tokens first .. first + tokens - 1
  void (*finish)(const RowsBackwardParams&, int64_t first, int64_t tokens);
};

}  // namespace pk
