// The operators' forward on memory that the caller owns, for launchers that call one after another (chain.cpp).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

namespace pk {

// Images [B, C, H, W] in memory: contiguous, or channels_last.
struct Images {
  void* data;
  int64_t batch, channels, height, width;
  bool channels_last;
  torch::headeronly::ScalarType dtype;

  int64_t elements() const { return batch * channels * height * width; }
  int64_t element_size() const { return dtype == torch::headeronly::ScalarType::Float ? 4 : 2; }
};

// Statistics as partials [B, tiles, 3] of (count, mean, M2); without any they are computed.
struct Partials {
  const float* data = nullptr;
  int64_t tiles = 0;
};

using Parameter = std::optional<torch::stable::Tensor>;  // None: absent

struct PoolMixerArguments {
  Parameter weight, bias, layer_scale, drop_scale;
  int64_t pool_size;
  double eps;
  bool residual;
};

// Writes y of x's shape; mean and rstd [B, 2] and y's partials [B, 1, 3] where not null.
void run_pool_mixer(const Images& x, const PoolMixerArguments& of, const Partials& stats, void* y, float* mean_rstd,
                    float* y_stats);

struct MlpArguments {
  torch::stable::Tensor w1, w2;
  Parameter b1, b2, norm_weight, norm_bias, layer_scale, drop_scale;
  std::string activation;
  double eps;
  bool norm, residual;
  int64_t batch = 0;  // of the whole call, of which x may be a part
};

// The same, with y [B, w2's rows, H, W]: y may be x. `hidden` [w1's rows, B H W] gets fc1's output where not null.
void run_mlp(const Images& x, const MlpArguments& of, const Partials& stats, void* y, float* mean_rstd, float* y_stats,
             void* hidden);

struct PatchEmbedArguments {
  torch::stable::Tensor weight;  // [out, C, kernel_h, kernel_w] in channels_last, or [out, C], of x's dtype
  Parameter bias;
  int64_t stride, padding;
};

inline int64_t kernel_size(const torch::stable::Tensor& weight, int64_t dim) {
  return weight.dim() == 4 ? weight.size(dim) : 1;
}

// The size of an image's side after the convolution.
inline int64_t embedded_size(int64_t size, int64_t kernel, const PatchEmbedArguments& of) {
  const int64_t room = size + 2 * of.padding - kernel;
  return room < 0 ? 0 : room / of.stride + 1;
}

// Writes y [B, out, out_h, out_w] in channels_last; x must be so too.
void run_patch_embed(const Images& x, const PatchEmbedArguments& of, void* y, float* y_stats);

}  // namespace pk
