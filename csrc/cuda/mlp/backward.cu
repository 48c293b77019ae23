// The MLP's backward for narrow streams of halves: checks, scratch, and the launches of its kernels.
//
// Operands are prepared; mlp_bwd_wgrad keeps the weights' gradients in registers and leaves GroupNorm's sums per token;
// mlp_bwd_dgrad has those sums and writes dx. The hidden activations stay in registers and are computed twice.
#include <tuple>

#include "../core/launch.cuh"
#include "backward_dgrad.cuh"
#include "backward_small.cuh"
#include "backward_wgrad.cuh"

namespace pk {
namespace {

constexpr const char* kName = "mlp_cuda_backward";

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

Tensor empty_vector(const Tensor& like, int64_t n, int32_t dtype) { return empty_on(like, {n}, {1}, dtype); }

Tensor empty_weight(const Tensor& w) {
  const int64_t rows = w.size(0), columns = w.size(1);
  if (w.dim() == 2) return empty_on(w, {rows, columns}, {columns, 1}, dtype_of(w));
  return empty_on(w, {rows, columns, 1, 1}, {columns, 1, 1, 1}, dtype_of(w));
}

// A weight [rows, columns] or [rows, columns, 1, 1], dense.
Tensor dense_weight(const Tensor& x, const Tensor& w, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(is_weight(x, w, rows, columns), kName, ": ", name, " must be a tensor [", rows, ", ", columns,
                  "] on x's device");
  return in_layout(w, false);
}

// Sums over rows [count, width] in a fixed order; `owner` keeps them alive.
const float* column_sums(const Launcher& launcher, const float* rows, int64_t count, int width, Tensor& owner) {
  do {
    const int64_t groups = ceil_div(count, kSumGroup);
    Tensor sums = empty_floats(owner, {groups, width});
    const ColumnsParams p{rows, floats(sums), count, width};
    launcher.launch("mlp_bwd_columns", mlp_bwd_columns, groups * (width / kSumColumns), kSmallThreads, p);
    owner = sums;
    rows = floats(owner);
    count = groups;
  } while (count > 1);
  return rows;
}

template <class T, class W, int C>
void launch(MlpBwdParams& p, int64_t batch, const Launcher& launcher, Tensor& columns) {
  using Wgrad = MlpBwdWgradConfig<C>;
  using Dgrad = MlpBwdDgradConfig<C>;
  const bool saved = p.saved != nullptr;
  launcher.launch("mlp_bwd_prepare", mlp_bwd_prepare<T, W>, p.hidden / kPrepared, kSmallThreads, p);
  if (p.n_to != nullptr)
    launcher.launch("mlp_bwd_tokens", mlp_bwd_tokens<T>, ceil_div(p.tokens, tokens_of_block(C)), kSmallThreads, p);
  if (p.rows != nullptr || p.partials != nullptr)
    launcher.launch("mlp_bwd_wgrad", mlp_bwd_wgrad<T, C>, p.splits * (p.hidden / kHiddenBlock), Wgrad::kThreads, p,
                    Wgrad::shared(saved));
  if (p.rows != nullptr) launcher.launch("mlp_bwd_sample", mlp_bwd_sample<T>, 3 * batch, 2 * kSmallThreads, p);
  const int64_t tiles = ceil_div(p.tokens, Dgrad::kTokens);
  if (p.partials != nullptr) {
    columns = empty_floats(columns, {tiles, 3 * C});
    p.columns = floats(columns);
  }
  launcher.launch("mlp_bwd_dgrad", mlp_bwd_dgrad<T, C>, tiles, Dgrad::kThreads, p, Dgrad::shared(saved));
  if (p.partials == nullptr) return;
  p.columns = const_cast<float*>(column_sums(launcher, p.columns, tiles, 3 * C, columns));
  launcher.launch("mlp_bwd_weights", mlp_bwd_weights<W>, ceil_div(p.width(), kSmallThreads / kSumLanes * 4),
                  kSmallThreads, p);
  launcher.launch("mlp_bwd_finish", mlp_bwd_finish<W>, C / 8, kSmallThreads, p);
}

template <class T, class W>
void launch(MlpBwdParams& p, int64_t batch, const Launcher& launcher, Tensor& columns) {
  switch (p.channels) {
    case 64: return launch<T, W, 64>(p, batch, launcher, columns);
    case 96: return launch<T, W, 96>(p, batch, launcher, columns);
    default: return launch<T, W, 128>(p, batch, launcher, columns);
  }
}

template <int C>
void list_channels() {
  using Wgrad = MlpBwdWgradConfig<C>;
  using Dgrad = MlpBwdDgradConfig<C>;
  list_kernels<mlp_bwd_wgrad<bf16, C>, mlp_bwd_wgrad<f16, C>>(Wgrad::kThreads, Wgrad::shared(true));
  list_kernels<mlp_bwd_dgrad<bf16, C>, mlp_bwd_dgrad<f16, C>>(Dgrad::kThreads, Dgrad::shared(true));
}

void list_all() {
  list_channels<64>();
  list_channels<96>();
  list_channels<128>();
  list_kernels<mlp_bwd_prepare<bf16, bf16>, mlp_bwd_prepare<bf16, float>, mlp_bwd_prepare<f16, f16>,
               mlp_bwd_prepare<f16, float>, mlp_bwd_tokens<bf16>, mlp_bwd_tokens<f16>, mlp_bwd_weights<float>,
               mlp_bwd_weights<bf16>, mlp_bwd_weights<f16>, mlp_bwd_columns, mlp_bwd_finish<float>,
               mlp_bwd_finish<bf16>, mlp_bwd_finish<f16>>(kSmallThreads);
  list_kernels<mlp_bwd_sample<bf16>, mlp_bwd_sample<f16>>(2 * kSmallThreads);
}

}  // namespace

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients mlp_cuda_backward(Tensor grad, Tensor x, Tensor mean_rstd, Tensor w1, OptionalTensor b1, Tensor w2,
                            OptionalTensor b2, OptionalTensor norm_weight, OptionalTensor norm_bias,
                            OptionalTensor layer_scale, OptionalTensor drop_scale, OptionalTensor hidden,
                            std::string activation, bool norm, bool residual, bool parameter_grads, bool drop_grad) {
  check_images(x, kName);
  const int64_t batch = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3),
                width = w1.dim() > 0 ? w1.size(0) : 0;
  const int64_t tokens = batch * pixels;
  STD_TORCH_CHECK((channels == 64 || channels == 96 || channels == 128) && width > 0 && width % kHiddenBlock == 0,
                  kName, ": x must have 64, 96 or 128 channels and w1 rows in multiples of ", kHiddenBlock, ", got ",
                  channels, " and ", width);
  const ScalarType dtype = x.scalar_type(), operand = dtype == ScalarType::Float ? w1.scalar_type() : dtype;
  STD_TORCH_CHECK((operand == ScalarType::BFloat16 || operand == ScalarType::Half) &&
                      (w1.scalar_type() == operand || w1.scalar_type() == ScalarType::Float) &&
                      w2.scalar_type() == w1.scalar_type(),
                  kName, ": x or the weights must be bfloat16 or float16, the others likewise or float32");
  const Tensor w1_dense = dense_weight(x, w1, "w1", width, channels),
               w2_dense = dense_weight(x, w2, "w2", channels, width);
  STD_TORCH_CHECK(is_beside(x, grad) && grad.dim() == 4 && grad.scalar_type() == dtype && grad.size(0) == batch &&
                      grad.size(1) == channels && grad.size(2) == x.size(2) && grad.size(3) == x.size(3),
                  kName, ": grad must be a CUDA tensor of x's shape and dtype");
  STD_TORCH_CHECK(!norm || (is_beside(x, mean_rstd) && mean_rstd.scalar_type() == ScalarType::Float &&
                            mean_rstd.dim() == 2 && mean_rstd.size(0) == batch && mean_rstd.size(1) == 2),
                  kName, ": mean_rstd must be a float32 CUDA tensor of shape [B, 2]");
  STD_TORCH_CHECK(!hidden.has_value() ||
                      (is_beside(x, *hidden) && hidden->scalar_type() == operand && hidden->numel() == tokens * width),
                  kName, ": hidden must be a CUDA tensor of B H W hidden elements, of the products' dtype");
  MlpBwdParams p{};
  p.w1 = w1_dense.data_ptr(), p.w2 = w2_dense.data_ptr();
  p.b1 = vector_of(x, b1, "b1", width), p.b2 = vector_of(x, b2, "b2", channels);
  p.gamma = vector_of(x, norm_weight, "norm_weight", channels), p.beta = vector_of(x, norm_bias, "norm_bias", channels);
  p.layer_scale = vector_of(x, layer_scale, "layer_scale", channels);
  p.drop_scale = vector_of(x, drop_scale, "drop_scale", batch);
  p.activation = activation_named(activation);
  p.tokens = tokens, p.pixels = pixels;
  p.hidden = static_cast<int>(width), p.channels = static_cast<int>(channels);
  p.x_float = dtype == ScalarType::Float, p.norm = norm, p.residual = residual, p.drop_grad = drop_grad;
  p.divided = operand == ScalarType::Half && layer_scale.has_value();

  const Launcher launcher(x);
  const bool last = is_channels_last(x), rows = last || pixels == 1;  // x's memory is rows of tokens
  const int32_t float32 = aoti_torch_dtype_float32();
  Tensor dx = empty_like(x, last), dw1, dw2, db1, db2, dgamma, dbeta, dscale;
  if (parameter_grads) {
    dw1 = empty_weight(w1), dw2 = empty_weight(w2);
    db1 = empty_vector(x, width, float32);
    for (Tensor* t : {&db2, &dgamma, &dbeta, &dscale}) *t = empty_vector(x, channels, float32);
  } else {
    dw1 = empty_vector(x, 0, dtype_of(w1)), dw2 = empty_vector(x, 0, dtype_of(w2));
    for (Tensor* t : {&db1, &db2, &dgamma, &dbeta, &dscale}) *t = empty_vector(x, 0, float32);
  }
  Tensor ddrop = empty_vector(x, drop_grad ? batch : 0, float32);
  const auto gradients = [&] { return Gradients{dx, dw1, db1, dw2, db2, dgamma, dbeta, dscale, ddrop}; };
  if (batch == 0) {
    for (Tensor* t : {&dw1, &db1, &dw2, &db2, &dgamma, &dbeta, &dscale}) torch::stable::zero_(*t);
    return gradients();
  }

  // The tensors that the kernels read and write: they must live until the last launch has been queued.
  const Tensor x_rows = aligned(x, last || !rows), grad_rows = aligned(grad, last || !rows);
  const Tensor saved = hidden.has_value() ? aligned(*hidden, false) : Tensor();
  const Tensor statistics = norm ? in_layout(mean_rstd, false) : Tensor();
  Tensor dx_rows = rows ? dx : empty_like(x, true);
  const int32_t half = dtype_of(dtype == ScalarType::Float ? w1 : x);
  Tensor w1_rows = empty_vector(x, width * channels, half), w2t = empty_vector(x, width * channels, half);
  Tensor table = empty_floats(x, {4 * width + 2 * channels}), n, g, sums, k, partials, g2t, columns = x;
  p.x = x_rows.data_ptr(), p.grad = grad_rows.data_ptr();
  p.n = p.x, p.g = p.grad;
  if (norm || p.x_float) {
    n = empty_vector(x, tokens * channels, half);
    p.n = p.n_to = n.mutable_data_ptr();
  }
  if (p.x_float) {
    g = empty_vector(x, tokens * channels, half);
    p.g = p.g_to = g.mutable_data_ptr();
  }
  p.mean_rstd = norm ? static_cast<const float*>(statistics.data_ptr()) : nullptr;
  p.saved = hidden.has_value() ? saved.data_ptr() : nullptr;
  p.w1_rows = w1_rows.mutable_data_ptr(), p.w2t = w2t.mutable_data_ptr();
  p.table = floats(table), p.affine = p.table + 4 * width;
  p.dx = dx_rows.mutable_data_ptr();

  const int64_t blocks = width / kHiddenBlock;
  const int resident = channels == 64 ? MlpBwdWgradConfig<64>::kBlocks : MlpBwdWgradConfig<128>::kBlocks;
  const int64_t programs = int64_t{resident} * launcher.attribute(cudaDevAttrMultiProcessorCount);
  p.tiles = ceil_div(tokens, kSplitTokens);
  p.tiles_per_split = ceil_div(p.tiles, std::max<int64_t>(1, programs / blocks));
  p.splits = ceil_div(p.tiles, p.tiles_per_split);
  if (norm || drop_grad) {
    sums = empty_floats(x, {3, blocks, tokens});
    k = empty_floats(x, {batch, 2});
    p.rows = floats(sums), p.k = floats(k);
  }
  if (drop_grad) p.ddrop_scale = floats(ddrop);
  if (parameter_grads) {
    partials = empty_floats(x, {p.splits, p.width()});
    g2t = empty_floats(x, {width, channels});
    p.partials = floats(partials), p.g2t = floats(g2t);
    p.dw1 = dw1.mutable_data_ptr(), p.dw2 = dw2.mutable_data_ptr();
    p.db1 = floats(db1), p.db2 = floats(db2), p.dgamma = floats(dgamma), p.dbeta = floats(dbeta);
    p.dlayer_scale = floats(dscale);
  }
  const bool float_weights = w1.scalar_type() == ScalarType::Float;
  if (operand == ScalarType::BFloat16)
    float_weights ? launch<bf16, float>(p, batch, launcher, columns) : launch<bf16, bf16>(p, batch, launcher, columns);
  else
    float_weights ? launch<f16, float>(p, batch, launcher, columns) : launch<f16, f16>(p, batch, launcher, columns);
  if (!rows) dx = in_layout(dx_rows, false);
  return gradients();
}

}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(poolformer_kernels, PK_DISPATCH_KEY, m) {
  m.impl("mlp_cuda_backward", TORCH_BOX(&pk::mlp_cuda_backward));
  pk::list_all();
}
