// The convolution between stages: its kernels' arguments, and one table of functions per level and dtype.
#pragma once

#include <cstdint>

#include "../product/weight.h"

namespace pk {

struct PatchEmbedParams {
  const void* x;  // [B, C, H, W], channels_last
  void* y;        // [B, out, out_h, out_w], channels_last
  int64_t batch, channels, height, width;
  int64_t out, out_h, out_w;                    // channels and pixels of y
  int64_t kernel_h, kernel_w, stride, padding;  // pixels
  Weight w;                                     // [out, kernel_h, kernel_w, C]
  bool planar_w;                                // for `rows` alone: w is [out, C, kernel_h, kernel_w]
  const float* bias;                            // [out], with zeros behind it (`padded` in core/tensors.h)
  int64_t tokens;                               // pixels of y in all samples: batch * out_h * out_w
  int64_t lanes;                                // tokens of a tile, rounded up to whole vectors

  int64_t group;         // rows of w that one work item multiplies: a multiple of kRowsMax
  float* token_moments;  // [groups, tokens, 2]: mean and M2 of every token's channels of a group, or null

  // The same for `rows`, [batch * out_h, row_runs, blocks, 3]: count, mean and M2 of a run's tokens and kRowsMax
  // channels.
  float* run_moments;

  // Elements of a patch, the part of x that one token is computed from. Like `groups` it is forced into its callers, so
  // that there is no function for the linker to share between levels.
  __attribute__((always_inline)) int64_t patch_size() const { return kernel_h * kernel_w * channels; }
  __attribute__((always_inline)) int64_t groups() const { return (out + group - 1) / group; }
  __attribute__((always_inline)) int64_t blocks() const { return (out + kRowsMax - 1) / kRowsMax; }
};

struct PatchEmbedKernels {
  int64_t (*scratch)(const PatchEmbedParams&);  // words of 32 bits that `forward` needs
  // Tokens first_token .. first_token + tokens - 1 of y, its channels of groups first_group .. last_group - 1.
  void (*forward)(const PatchEmbedParams&, int64_t first_token, int64_t tokens, int64_t first_group, int64_t last_group,
                  uint32_t* scratch);

  // Another form, faster where a sample has many tokens (patch_embed_rows.h), from AVX-512 on. Which form it is depends
  // on nothing but a sample's shape, as their last digits differ.
  int64_t (*row_runs)(const PatchEmbedParams&);      // runs that a row of y is cut into; 0: use `forward`
  int64_t (*rows_scratch)(const PatchEmbedParams&);  // words of 32 bits that `rows` needs
  // Rows first_row .. last_row - 1 of y, counted through all samples, its channels of blocks first_block ..
  // last_block - 1, which are kRowsMax channels each.
  void (*rows)(const PatchEmbedParams&, int64_t first_row, int64_t last_row, int64_t first_block, int64_t last_block,
               uint32_t* scratch);
};

// Elements of x: float32, bfloat16, float16; on AMX tiles bfloat16 alone
extern const PatchEmbedKernels patch_embed_baseline[3];
extern const PatchEmbedKernels patch_embed_avx2[3];
extern const PatchEmbedKernels patch_embed_avx512[3];
extern const PatchEmbedKernels patch_embed_avx512_bf16[3];
extern const PatchEmbedKernels patch_embed_amx[1];

}  // namespace pk
