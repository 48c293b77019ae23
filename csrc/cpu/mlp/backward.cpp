// The MLP's backward on the CPU: gradients, workspace, and how torch's threads share the work. The kernels and the
// order they are called in are described in backward.h.
#include <tuple>

#include "call.h"
#include "rows_backward_plan.h"

namespace pk {
namespace {

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The arrays that the backward needs beyond the gradients it returns: one tensor, cut up.
class Workspace {
 public:
  float* g_sums;  // [tiles of a block, out]: sum of d g over a tile's tokens
  double* sums;   // [chunks of a group, 2]: what `reduce` writes

  // `per`: elements of an operand word. `group_tokens`, `group_chunks`: tokens and chunks of a group of samples.
  Workspace(MlpBackwardParams& p, int64_t per, int64_t group_tokens, int64_t group_chunks) {
    ScratchArena measured(nullptr);
    take(measured, p, per, group_tokens, group_chunks);
    tensor_ = empty({measured.taken() + ScratchArena::kLine}, {1}, aoti_torch_dtype_float32());
    const auto address = reinterpret_cast<uintptr_t>(tensor_.mutable_data_ptr());
    ScratchArena arena(reinterpret_cast<void*>((address + 63) / 64 * 64));
    take(arena, p, per, group_tokens, group_chunks);
  }

 private:
  Tensor tensor_;

  void take(ScratchArena& arena, MlpBackwardParams& p, int64_t per, int64_t group_tokens, int64_t group_chunks) {
    constexpr int64_t kSlack = 16;  // words: products read whole vectors, and whole steps of the sum's dimension
    const int64_t block = p.block_lanes, rows = rounded_up(p.hidden, kRowsMax);
    const int64_t in = rounded_up(p.channels, kRowsMax), out = rounded_up(p.out, kRowsMax);
    const int64_t token_words = p.parameter_grads ? block / per : 0;
    p.n = arena.words((in / per + kSlack) * block);
    p.g = arena.words((out / per + kSlack) * block);
    p.dh = arena.words((rows / per + kSlack) * block);
    p.x_tokens = arena.words(token_words * p.channels + kSlack);
    p.g_tokens = arena.words(token_words * p.out + kSlack);
    p.w1t = arena.words(in * (rows / per + kSlack));
    p.drop_lanes = arena.floats(block);
    p.drop_rows = arena.floats(p.drop_grad ? (1 + rows / kRowsMax) * block : 0);
    p.e = arena.floats(group_tokens * p.channels);
    p.g_p = arena.floats(p.parameter_grads ? rows * out : 0);
    p.x_dh = arena.floats(p.parameter_grads ? rows * in : 0);
    p.db1 = arena.floats(rows);
    p.t = arena.floats(out);
    g_sums = arena.floats((block / p.lanes + 1) * p.out);
    sums = reinterpret_cast<double*>(arena.words(2 * 2 * group_chunks));
  }
};

// One call. How it is cut up depends on shapes alone, so that sums are the same for any number of threads.
struct Backward {
  const MlpCall& call;
  const MlpKernels& kernels;
  MlpBackwardParams& p;
  int64_t element;            // bytes of an element of x
  std::vector<double> t;      // [out] sum of d g over tokens
  std::vector<double> drops;  // [B] drop_scale's gradient
  int64_t sample, chunks;     // elements of a sample, and its chunks of kStatsChunk elements
  int64_t group;              // samples of a group
  int64_t block_tokens;       // tokens of a block at most

  Backward(const MlpCall& call, const MlpKernels& kernels, MlpBackwardParams& p, int64_t element)
      : call(call), kernels(kernels), p(p), element(element), t(p.out), drops(p.batch) {
    sample = p.channels * p.pixels;
    chunks = (sample + kStatsChunk - 1) / kStatsChunk;
    const int64_t wide = std::max(p.channels, p.out);
    group = std::max<int64_t>(1, std::min(p.batch, std::min(kGroupTokens, kGroupElements / wide) / p.pixels));
    const int64_t tokens = group * p.pixels;
    const int64_t most = std::max(kBackwardTileTokens, std::min(kBlockTokens, kBlockElements / wide));
    const int64_t blocks = (tokens + most - 1) / most;
    p.lanes = kBackwardTileTokens;
    p.input_lanes = kTileTokens;
    p.block_lanes = block_tokens = rounded_up((tokens + blocks - 1) / blocks, 32);
  }

  void run() {
    Workspace own(p, kernels.operand_per, group * p.pixels, group * chunks);
    const int64_t scratch = kernels.backward_scratch(p), weight_rows = rounded_up(p.hidden, kRowsMax);
    std::fill(p.db1, p.db1 + weight_rows, 0.0f);
    torch::stable::parallel_for(0, (p.channels + kRowsMax - 1) / kRowsMax, 1 + kGrainElements / (p.hidden * kRowsMax),
                                [&](int64_t begin, int64_t end) {
                                  kernels.pack_input(p, begin * kRowsMax, std::min(p.channels, end * kRowsMax));
                                });
    for (int64_t b = 0; b < p.batch; b += group) {
      const int64_t samples = std::min(group, p.batch - b), tokens = samples * p.pixels;
      for (int64_t at = 0; at < tokens; at += block_tokens)
        block(own, b * p.pixels, at, std::min(block_tokens, tokens - at), scratch);
      group_norm(own, b, samples);
    }
    if (!p.parameter_grads) return;
    if (!p.add) {  // there were no tokens
      std::fill(p.g_p, p.g_p + weight_rows * rounded_up(p.out, kRowsMax), 0.0f);
      std::fill(p.x_dh, p.x_dh + weight_rows * rounded_up(p.channels, kRowsMax), 0.0f);
    }
    std::copy(t.begin(), t.end(), p.t);
    std::copy(p.db1, p.db1 + p.hidden, p.db1_out);
    each_item(kernels.weight_items(p), 1 + kGrainHidden / p.hidden, [&](int64_t i) { kernels.weights(p, i); });
  }

  // Tokens at .. at + count - 1 of the group that starts at token `first`.
  void block(const Workspace& own, int64_t first, int64_t at, int64_t count, int64_t scratch) {
    p.block_lanes = rounded_up(count, 32);
    call.for_items((count + p.lanes - 1) / p.lanes, [&](int64_t i) {
      const int64_t lane = i * p.lanes, lanes = std::min(p.lanes, p.block_lanes - lane);
      kernels.prepare(p, first + at + lane, std::min(lanes, count - lane), lane, lanes, own.g_sums + i * p.out,
                      worker_scratch(scratch));
    });
    for (int64_t i = 0; i * p.lanes < count; ++i)
      for (int64_t c = 0; c < p.out; ++c) t[c] += own.g_sums[i * p.out + c];
    const int64_t items = (p.hidden + kRowsMax - 1) / kRowsMax;
    call.for_items(items,
                   [&](int64_t i) { kernels.hidden(p, i * kRowsMax, first + at, count, worker_scratch(scratch)); });
    p.add = true;
    // A token's e does not depend on other tokens, so here tiles may depend on the number of threads.
    const int64_t vectors = (count + kLanesMax - 1) / kLanesMax, tiles = call.tiles(vectors, p.input_lanes);
    call.for_items(tiles, [&](int64_t i) {
      const int64_t lane = i * vectors / tiles * kLanesMax, next = (i + 1) * vectors / tiles * kLanesMax;
      kernels.input(p, at + lane, std::min(next, count) - lane, lane, next - lane, worker_scratch(scratch));
    });
    if (!p.drop_grad) return;
    for (int64_t i = 0; i <= items; ++i)
      for (int64_t l = 0; l < count; ++l) drops[(first + at + l) / p.pixels] += p.drop_rows[i * p.block_lanes + l];
  }

  // dx of samples b .. b + samples - 1 from e and GroupNorm's sums over each sample (docs/algebra.md, "MLP").
  void group_norm(const Workspace& own, int64_t b, int64_t samples) const {
    const auto each_chunk = [&](const auto& f) {
      torch::stable::parallel_for(0, samples * chunks, kGrainNormChunks, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t local = i / chunks, offset = i % chunks * kStatsChunk;
          f(i, local, (b + local) * sample + offset, p.e + local * sample + offset,
            std::min(kStatsChunk, sample - offset));
        }
      });
    };
    const auto at = [&](const void* data, int64_t offset) { return static_cast<const char*>(data) + offset * element; };
    std::vector<float> k(2 * samples);
    if (p.norm) {
      each_chunk([&](int64_t i, int64_t local, int64_t offset, const float* e, int64_t n) {
        kernels.reduce(at(p.x, offset), e, p.mean[b + local], n, own.sums + 2 * i);
      });
      for (int64_t local = 0; local < samples; ++local) {
        double sum = 0, projected = 0;
        for (int64_t i = local * chunks; i < (local + 1) * chunks; ++i) {
          sum += own.sums[2 * i];
          projected += own.sums[2 * i + 1];
        }
        const double rstd = p.rstd[b + local];
        k[2 * local] = rstd * sum / sample;
        k[2 * local + 1] = rstd * rstd * rstd * projected / sample;
      }
    }
    each_chunk([&](int64_t, int64_t local, int64_t offset, const float* e, int64_t n) {
      kernels.finish(p.norm ? at(p.x, offset) : nullptr, p.residual ? at(p.grad, offset) : nullptr, e,
                     p.mean[b + local], p.rstd[b + local], k[2 * local], k[2 * local + 1], n,
                     static_cast<char*>(p.dx) + offset * element);
    });
  }
};

// The call with tokens as rows.
void run_rows(const MlpCall& call, const RowsBackwardKernels& kernels, RowsBackwardParams p, bool floats) {
  p.floats = floats;
  plan_rows_backward(p);
  ScratchArena measured(nullptr);
  take_rows_backward(measured, p);
  // Memory that the system hands out anew in every call would cost a tenth of the call's time.
  thread_local std::vector<float> kept;
  Tensor large = empty({measured.taken() <= kKeptFloats ? 0 : measured.taken() + 16}, {1}, aoti_torch_dtype_float32());
  float* memory = static_cast<float*>(large.mutable_data_ptr());
  if (measured.taken() <= kKeptFloats) memory = grown(kept, measured.taken());
  ScratchArena arena(reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64));
  take_rows_backward(arena, p);
  const int64_t scratch = kernels.scratch(p);
  const auto each = [&](int64_t count, const auto& f) {
    call.for_items(count, [&](int64_t i) { f(i, worker_scratch(scratch)); });
  };
  RowsBackwardRun(kernels, p, torch::stable::get_num_threads(), each)();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(
    Tensor gradient, Tensor input, Tensor mean_rstd, Tensor w1, OptionalTensor b1, Tensor w2, OptionalTensor b2,
    OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor layer_scale, OptionalTensor drop_scale,
    OptionalTensor hidden, std::string activation, bool norm, bool residual, bool parameter_grads, bool drop_grad,
    std::optional<ScalarType> operand) {
  check(input, 0);
  const ScalarType rounded = operand_of(input.scalar_type(), w1, operand);
  const MlpKernels& kernels = kernels_for(input.scalar_type(), rounded);
  const bool channels_last = is_channels_last(input);
  const Tensor x = in_layout(input, channels_last), grad = in_layout(gradient, channels_last);
  const MlpArguments args{dense_rows(w1, "w1", x.size(1)),
                          dense_rows(w2, "w2", w1.size(0)),
                          b1,
                          b2,
                          norm_weight,
                          norm_bias,
                          layer_scale,
                          drop_scale,
                          activation,
                          0,
                          norm,
                          residual};
  const Images images = images_of(x, channels_last);
  ScratchArena arena(call_scratch(MlpCall::tables(images, args)));
  MlpCall call(images, args, arena);
  MlpBackwardParams p{call.p};
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == x.scalar_type() && grad.dim() == 4 &&
                      grad.size(0) == p.batch && grad.size(1) == p.out && grad.size(2) == x.size(2) &&
                      grad.size(3) == x.size(3),
                  "mlp_cpp_backward: grad must have y's device, dtype and shape");
  const Tensor saved = in_layout(mean_rstd, false);
  STD_TORCH_CHECK(!norm || (saved.is_cpu() && saved.scalar_type() == ScalarType::Float && saved.dim() == 2 &&
                            saved.size(0) == p.batch && saved.size(1) == 2),
                  "mlp_cpp_backward: mean_rstd must be a float32 CPU tensor of shape [B, 2]");
  STD_TORCH_CHECK(!hidden.has_value() || (hidden->is_cpu() && hidden->is_contiguous() &&
                                          hidden->scalar_type() == rounded && hidden->numel() == p.tokens * p.hidden),
                  "mlp_cpp_backward: hidden must be what mlp_cpp returned");
  for (int64_t b = 0; norm && b < p.batch; ++b) {
    call.mean[b] = static_cast<const float*>(saved.data_ptr())[2 * b];
    call.rstd[b] = static_cast<const float*>(saved.data_ptr())[2 * b + 1];
  }

  const int32_t f32 = aoti_torch_dtype_float32(), weights = dtype_of(w1);
  const auto like = [&](const Tensor& w) {
    if (!parameter_grads) return empty({0}, {1}, weights);
    const int64_t rows = w.size(0), cols = w.size(1);
    if (w.dim() == 2) return empty({rows, cols}, {cols, 1}, weights);
    return empty({rows, cols, 1, 1}, {cols, 1, 1, 1}, weights);
  };
  const auto vector = [&](int64_t n) { return empty({parameter_grads ? n : 0}, {1}, f32); };
  const auto floats = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  Tensor dx = empty_like(x, channels_last), dw1 = like(w1), dw2 = like(w2);
  Tensor db1 = vector(p.hidden), db2 = vector(p.out), dnorm_weight = vector(p.channels);
  Tensor dnorm_bias = vector(p.channels), dlayer_scale = vector(p.out);
  Tensor ddrop_scale = empty({drop_grad ? p.batch : 0}, {1}, f32);
  p.grad = grad.data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.saved = hidden.has_value() ? const_cast<void*>(static_cast<const void*>(hidden->data_ptr())) : nullptr;
  p.parameter_grads = parameter_grads;
  p.drop_grad = drop_grad;
  p.dw1 = dw1.mutable_data_ptr(), p.dw2 = dw2.mutable_data_ptr();
  p.db2 = floats(db2), p.dgamma = floats(dnorm_weight), p.dbeta = floats(dnorm_bias), p.dscale = floats(dlayer_scale);
  p.db1_out = floats(db1);

  if (kernels.rows_backward && rows_backward_fits(p)) {
    run_rows(call, *kernels.rows_backward, {p}, x.scalar_type() == ScalarType::Float);
  } else {
    Backward backward(call, kernels, p, x.element_size());
    backward.run();
    if (drop_grad) std::copy(backward.drops.begin(), backward.drops.end(), floats(ddrop_scale));
  }
  return {dx, dw1, db1, dw2, db2, dnorm_weight, dnorm_bias, dlayer_scale, ddrop_scale};
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(poolformer_kernels, CPU, m) { m.impl("mlp_cpp_backward", TORCH_BOX(&pk::mlp_backward)); }
