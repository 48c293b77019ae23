// The MLP's forward on the CPU: output tensors, and the plan of the work over torch's threads.
#include <cmath>
#include <tuple>

#include "mlp_call.h"

namespace pk {
namespace {

constexpr int64_t kTileTokens = 208;  // of a forward tile at most

// Mean and rstd of x's samples, from the statistics given or from x.
void fill_statistics(Call& call, const MlpKernels& kernels, const OptionalTensor& stats, double eps, int64_t element,
                     float* saved) {
  const MlpParams& p = call.p;
  const int64_t sample = p.channels * p.pixels;
  int64_t tiles = (sample + kStatsChunk - 1) / kStatsChunk;
  const float* partials;
  std::vector<float> own;
  Tensor given;
  if (stats.has_value()) {
    given = in_layout(*stats, false);
    STD_TORCH_CHECK(given.is_cpu() && given.scalar_type() == ScalarType::Float && given.dim() == 3 &&
                        given.size(0) == p.batch && given.size(2) == 3,
                    "mlp_cpp: stats must be a float32 CPU tensor of shape [B, T, 3]");
    tiles = given.size(1);
    partials = static_cast<const float*>(given.data_ptr());
  } else {
    own.resize(3 * p.batch * tiles);
    partials = own.data();
    torch::stable::parallel_for(0, p.batch * tiles, 4, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t b = begin / tiles, stop = std::min(end, (b + 1) * tiles);
        kernels.stats(static_cast<const char*>(p.x) + b * sample * element, sample, begin - b * tiles, stop - b * tiles,
                      own.data() + 3 * b * tiles);
        begin = stop;
      }
    });
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    const auto m = merged(partials + 3 * b * tiles, tiles);
    call.mean[b] = saved[2 * b] = m.mean;
    call.rstd[b] = saved[2 * b + 1] = 1.0 / std::sqrt(m.m2 / m.count + eps);
  }
}

// A sample's partial from those of its tokens, of `size` elements each.
void merge_tokens(const float* moments, int64_t tokens, int64_t size, float* out) {
  double sum = 0, m2 = 0, spread = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    sum += moments[2 * t];
    m2 += moments[2 * t + 1];
  }
  const double mean = sum / tokens;
  for (int64_t t = 0; t < tokens; ++t) spread += (moments[2 * t] - mean) * (moments[2 * t] - mean);
  out[0] = tokens * size;
  out[1] = mean;
  out[2] = m2 + spread * size;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp(Tensor input, Tensor w1, OptionalTensor b1, Tensor w2, OptionalTensor b2,
                                               OptionalTensor norm_weight, OptionalTensor norm_bias,
                                               OptionalTensor layer_scale, OptionalTensor drop_scale,
                                               OptionalTensor stats, std::string activation, double eps, bool norm,
                                               bool residual, bool return_stats, bool save_hidden) {
  check(input, eps);
  const MlpKernels& kernels = kernels_for(input.scalar_type(), w1.scalar_type());
  const bool channels_last = is_channels_last(input);
  const Tensor x = in_layout(input, channels_last);
  const Parameters of{dense_rows(w1, "w1", x.size(1)),
                      dense_rows(w2, "w2", w1.size(0)),
                      b1,
                      b2,
                      norm_weight,
                      norm_bias,
                      layer_scale,
                      drop_scale};
  Arena arena(Call::tables(x, of));
  Call call(x, of, activation, norm, residual, channels_last, arena);
  MlpParams& p = call.p;

  const int32_t f32 = aoti_torch_dtype_float32();
  const int64_t h = x.size(2), w = x.size(3), c = p.out;
  Tensor y = channels_last ? empty({p.batch, c, h, w}, {c * h * w, 1, w * c, c}, dtype_of(x))
                           : empty({p.batch, c, h, w}, {c * h * w, h * w, w, 1}, dtype_of(x));
  Tensor mean_rstd = norm ? empty({p.batch, 2}, {2, 1}, f32) : empty({0}, {1}, f32);
  Tensor y_stats = return_stats ? empty({p.batch, 1, 3}, {3, 3, 1}, f32) : empty({0}, {1}, f32);
  Tensor hidden = empty({save_hidden ? p.tokens * p.hidden : 0}, {1}, dtype_of(operand_of(x, w1)));
  if (p.batch == 0) return {y, mean_rstd, y_stats, hidden};

  p.y = y.mutable_data_ptr();
  p.saved = save_hidden ? hidden.mutable_data_ptr() : nullptr;
  if (norm)
    fill_statistics(call, kernels, stats, eps, x.element_size(), static_cast<float*>(mean_rstd.mutable_data_ptr()));
  std::vector<float> moments(return_stats ? 2 * p.tokens : 0);
  p.token_moments = return_stats ? moments.data() : nullptr;
  const int64_t vectors = (p.tokens + kLanesMax - 1) / kLanesMax, tiles = call.tiles(vectors, kTileTokens);
  p.lanes = (vectors + tiles - 1) / tiles * kLanesMax;
  const int64_t words = kernels.forward_scratch(p);
  call.over(tiles, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * vectors / tiles * kLanesMax, last = (i + 1) * vectors / tiles * kLanesMax;
      kernels.forward(p, first, std::min(last, p.tokens) - first, worker_scratch(words));
    }
  });
  if (return_stats) {
    float* out = static_cast<float*>(y_stats.mutable_data_ptr());
    torch::stable::parallel_for(0, p.batch, 1 + 16384 / p.pixels, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        merge_tokens(p.token_moments + 2 * b * p.pixels, p.pixels, p.out, out + 3 * b);
    });
  }
  return {y, mean_rstd, y_stats, hidden};
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(poolformer_kernels, CPU, m) { m.impl("mlp_cpp", TORCH_BOX(&pk::mlp)); }
