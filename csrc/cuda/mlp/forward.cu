// The MLP's forward: checks, output tensors, and which kernel runs. Formulas: docs/algebra.md, "MLP".
#include "forward.cuh"

#include <tuple>

#include "../core/launch.cuh"
#include "forward_sm90.h"

namespace pk {
namespace {

// ---- weights of another dtype, rounded to the operands'

struct RoundParams {
  const void* source;  // [n] of float32
  void* target;        // [n] of T
  int64_t n;           // elements
};

template <class T>
__global__ void __launch_bounds__(256) mlp_round(RoundParams p) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= p.n) return;
  const float value[1] = {static_cast<const float*>(p.source)[i]};
  store(static_cast<T*>(p.target) + i, packed<T>(value));
}

// The weight's elements as operands, dense; `owner` keeps them alive.
template <class T>
const void* operand(const Tensor& w, int32_t dtype, Tensor& owner, const Launcher& launcher) {
  owner = aligned(w, false);
  if (dtype_of(owner) == dtype) return owner.data_ptr();
  const Tensor source = owner;
  const int64_t n = source.numel();
  owner = empty_on(w, {n}, {1}, dtype);
  launcher.launch("mlp_round", mlp_round<T>, (n + 255) / 256, 256,
                  RoundParams{source.data_ptr(), owner.mutable_data_ptr(), n});
  return owner.data_ptr();
}

template <class T, int C>
void launch(const MlpParams& p, const Launcher& launcher) {
  using Config = MlpFwdConfig<C>;
  launcher.launch("mlp_fwd", mlp_fwd<T, C>, (p.tokens + Config::kRows - 1) / Config::kRows, 32 * Config::kWarps, p,
                  Config::shared(p.hidden));
}

template <class T>
void run(MlpParams& p, int channels, const Tensor& w1, const Tensor& w2, int32_t dtype, const Launcher& launcher) {
  if (run_mlp_sm90(p, channels, w1, w2, dtype)) return;
  Tensor owner1, owner2;
  p.w1 = operand<T>(w1, dtype, owner1, launcher);
  p.w2 = operand<T>(w2, dtype, owner2, launcher);
  switch (channels) {
    case 64: return launch<T, 64>(p, launcher);
    case 96: return launch<T, 96>(p, launcher);
    case 128: return launch<T, 128>(p, launcher);
    case 192: return launch<T, 192>(p, launcher);
    default: STD_TORCH_CHECK(false, "mlp_cuda: x must have 64, 96, 128 or 192 channels, got ", channels);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_cuda(Tensor input, Tensor w1, OptionalTensor b1, Tensor w2,
                                                    OptionalTensor b2, OptionalTensor norm_weight,
                                                    OptionalTensor norm_bias, OptionalTensor layer_scale,
                                                    OptionalTensor drop_scale, OptionalTensor stats,
                                                    std::string activation, double eps, bool norm, bool residual,
                                                    bool return_stats, bool save_hidden) {
  check_images(input, "mlp_cuda");
  const int64_t batch = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3), pixels = h * w;
  const int64_t hidden = w1.dim() > 0 ? w1.size(0) : 0;
  STD_TORCH_CHECK(hidden > 0 && hidden % kUnit == 0 && hidden <= 4096 && is_weight(input, w1, hidden, c),
                  "mlp_cuda: w1 must be a tensor [hidden, ", c,
                  "] on x's device, hidden a multiple of 64 up to 4096, got ", hidden);
  STD_TORCH_CHECK(is_weight(input, w2, c, hidden), "mlp_cuda: w2 must be a tensor [", c, ", ", hidden,
                  "] on x's device");
  STD_TORCH_CHECK(w1.scalar_type() == w2.scalar_type(), "mlp_cuda: w2 must be of w1's dtype");
  STD_TORCH_CHECK(eps >= 0, "mlp_cuda: eps must not be negative, got ", eps);
  const bool x_float = dtype_index(input.scalar_type()) == 0;
  const Tensor& operand_like = x_float ? w1 : input;
  STD_TORCH_CHECK(dtype_index(operand_like.scalar_type()) != 0,
                  "mlp_cuda: the products' operands must be halves, got float32");
  STD_TORCH_CHECK(operand_like.scalar_type() == w1.scalar_type() || dtype_index(w1.scalar_type()) == 0,
                  "mlp_cuda: the weights must be of x's dtype or float32");

  const Launcher launcher(input);
  const bool channels_last = is_channels_last(input);
  const Tensor x = aligned(input, true);
  const bool by_tile = return_stats && pixels >= kUnit;
  const int64_t slots = (pixels + kUnit - 2) / kUnit + 1;
  Tensor y = empty_like(x, true);
  Tensor mean_rstd = norm ? empty_floats(x, {batch, 2}) : empty_floats(x, {0});
  Tensor y_stats = by_tile ? empty_floats(x, {batch, slots, 3}) : empty_floats(x, {0});
  Tensor saved = empty_on(x, {save_hidden ? batch * pixels * hidden : 0}, {1}, dtype_of(operand_like));
  Tensor given;

  MlpParams p{};
  p.x = x.data_ptr();
  p.y = y.mutable_data_ptr();
  p.b1 = vector_of(x, b1, "b1", hidden);
  p.b2 = vector_of(x, b2, "b2", c);
  p.gamma = vector_of(x, norm_weight, "norm_weight", c);
  p.beta = vector_of(x, norm_bias, "norm_bias", c);
  p.layer_scale = vector_of(x, layer_scale, "layer_scale", c);
  p.drop_scale = vector_of(x, drop_scale, "drop_scale", batch);
  p.activation = activation_named(activation);
  if (norm && batch > 0) {
    p.stats = partials_of(x, stats.has_value() ? *stats : norm_stats_cuda(x), batch, given, p.partials);
    merge_many(batch, given, p.stats, p.partials);
  }
  p.mean_rstd = norm ? floats(mean_rstd) : nullptr;
  p.y_stats = by_tile ? floats(y_stats) : nullptr;
  p.slots = slots;
  p.saved = save_hidden ? saved.mutable_data_ptr() : nullptr;
  p.tokens = batch * pixels;
  p.pixels = pixels;
  p.hidden = static_cast<int>(hidden);
  p.eps = static_cast<float>(eps);
  p.x_float = x_float;
  p.residual = residual;
  if (dtype_index(operand_like.scalar_type()) == 1)
    run<bf16>(p, static_cast<int>(c), w1, w2, dtype_of(operand_like), launcher);
  else
    run<f16>(p, static_cast<int>(c), w1, w2, dtype_of(operand_like), launcher);
  if (return_stats && !by_tile) y_stats = norm_stats_cuda(y);
  return {channels_last ? y : torch::stable::contiguous(y), mean_rstd, y_stats, saved};
}

namespace {

template <int C>
void list() {
  list_kernels<mlp_fwd<bf16, C>, mlp_fwd<f16, C>>(32 * MlpFwdConfig<C>::kWarps, MlpFwdConfig<C>::shared(4 * C));
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(poolformer_kernels, PK_DISPATCH_KEY, m) {
  m.impl("mlp_cuda", TORCH_BOX(&pk::mlp_cuda));
  pk::list<64>();
  pk::list<96>();
  pk::list<128>();
  pk::list<192>();
  pk::list_kernels<pk::mlp_round<pk::bf16>, pk::mlp_round<pk::f16>>(256);
  pk::list_mlp_sm90();
}
