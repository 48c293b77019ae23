// The convolution between stages: plain parameters, and one table of functions per instruction-set level and dtype.
#pragma once

#include <cstdint>

#include "../product/weight.h"

namespace pk {

struct PatchEmbedParams {
  const void* x;  // [B, C, H, W], channels_last
  void* y;        // [B, out, out_h, out_w], channels_last
  int64_t batch, channels, height, width;
  int64_t out, out_h, out_w, kernel_h, kernel_w, stride, padding;
  Weight w;           // [out, kernel_h, kernel_w, C]
  const float* bias;  // [out], padded as the MLP's vectors are
  int64_t tokens;     // batch * out_h * out_w
  int64_t lanes;      // tokens of a tile, padded to vectors

  int64_t group;         // rows of w that one work item multiplies: a multiple of kRowsMax
  float* token_moments;  // [groups, tokens, 2]: mean and M2 of every token's channels of a group, or null

  // Forced into their callers, so that the linker has no function to share between levels.
  __attribute__((always_inline)) int64_t taps() const { return kernel_h * kernel_w * channels; }
  __attribute__((always_inline)) int64_t groups() const { return (out + group - 1) / group; }
};

struct PatchEmbedKernels {
  int64_t (*scratch)(const PatchEmbedParams&);  // in words of 32 bits
  void (*forward)(const PatchEmbedParams&, int64_t first_token, int64_t tokens, int64_t first_group, int64_t last_group,
                  uint32_t* scratch);
};

// float32, bfloat16, float16; the level of AMX has bfloat16 alone
extern const PatchEmbedKernels patch_embed_baseline[3];
extern const PatchEmbedKernels patch_embed_avx2[3];
extern const PatchEmbedKernels patch_embed_avx512[3];
extern const PatchEmbedKernels patch_embed_avx512_bf16[3];
extern const PatchEmbedKernels patch_embed_amx[1];

}  // namespace pk
