// The operators' forward on memory that the caller owns, for the chain of layers (chain/chain.cpp).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

namespace pk {

// A tensor [B, C, H, W], dense in memory: contiguous, or channels_last.
struct Images {
  void* data;
  int64_t batch, channels, height, width;
  bool channels_last;
  torch::headeronly::ScalarType dtype;

  int64_t elements() const { return batch * channels * height * width; }
  int64_t element_size() const { return dtype == torch::headeronly::ScalarType::Float ? 4 : 2; }
};

// Statistics of the operator's input, [B, tiles, 3] of (count, mean, M2). Without data the operator computes them.
struct Partials {
  const float* data = nullptr;
  int64_t tiles = 0;
};

using Parameter = std::optional<torch::stable::Tensor>;  // None: absent

struct PoolMixerArguments {
  Parameter weight, bias;  // [C] gamma and beta of GroupNorm; absent: 1 and 0
  Parameter layer_scale;   // [C]; absent: 1
  Parameter drop_scale;    // [B]; absent: 1
  int64_t pool_size;       // odd
  double eps;              // of GroupNorm
  bool residual;           // whether x is added
};

// Writes y of x's shape, and where they are not null mean and rstd [B, 2] and the statistics of y [B, 1, 3].
void run_pool_mixer(const Images& x, const PoolMixerArguments& args, const Partials& stats, void* y, float* mean_rstd,
                    float* y_stats);

struct MlpArguments {
  torch::stable::Tensor w1, w2;      // fc1 [hidden, C] and fc2 [out, hidden], or the same with [.., 1, 1], of one dtype
  Parameter b1, b2;                  // [hidden], [out]; absent: 0
  Parameter norm_weight, norm_bias;  // [C] gamma and beta of GroupNorm; absent: 1 and 0
  Parameter layer_scale;             // [out]; absent: 1
  Parameter drop_scale;              // [B]; absent: 1
  std::string activation;            // a name that activation_named knows
  double eps;                        // of GroupNorm
  bool norm, residual;               // whether x is normalised, whether x is added
  // What the products' operands are rounded to where x is float32 (operand_of in mlp/call.h); absent: w1's dtype
  std::optional<torch::headeronly::ScalarType> operand = {};
  int64_t batch = 0;  // samples of the whole call where x is a part of it, else 0
};

// Writes y [B, out, H, W], which may be x, and where they are not null mean and rstd [B, 2], the statistics of y
// [B, 1, 3] and fc1's output `hidden` [hidden, B H W].
void run_mlp(const Images& x, const MlpArguments& args, const Partials& stats, void* y, float* mean_rstd,
             float* y_stats, void* hidden);

struct PatchEmbedArguments {
  // [out, C, kernel_h, kernel_w], dense in channels_last or as patch_embed_takes_planar says, or [out, C]; of x's dtype
  torch::stable::Tensor weight;
  Parameter bias;           // [out]; absent: 0
  int64_t stride, padding;  // pixels
};

// Pixels of the convolution's kernel along dimension `dim` of its weight.
inline int64_t kernel_size(const torch::stable::Tensor& weight, int64_t dim) {
  return weight.dim() == 4 ? weight.size(dim) : 1;
}

// Pixels along one side of the convolution's output.
inline int64_t embedded_size(int64_t size, int64_t kernel, const PatchEmbedArguments& args) {
  const int64_t room = size + 2 * args.padding - kernel;
  return room < 0 ? 0 : room / args.stride + 1;
}

// Whether a contiguous weight, [out, C, kernel_h, kernel_w], may be given as it is.
bool patch_embed_takes_planar(const Images& x, const PatchEmbedArguments& args);

// Writes y [B, out, out_h, out_w] in channels_last, as x must be, and the statistics of y [B, 1, 3] where not null.
void run_patch_embed(const Images& x, const PatchEmbedArguments& args, void* y, float* y_stats);

}  // namespace pk
