// The MLP's forward on the CPU: output tensors, and how torch's threads share the work.
#include <cmath>
#include <tuple>

#include "call.h"
#include "shared_plan.h"

namespace pk {
namespace {

// Fills in the call's mean and rstd, from `stats` or else from x, whose elements have `element` bytes. `saved` [B, 2]
// gets both, too, where it is not null.
void fill_statistics(MlpCall& call, const MlpKernels& kernels, Partials stats, double eps, int64_t element,
                     float* saved) {
  const MlpParams& p = call.p;
  const int64_t sample = p.channels * p.pixels;
  std::vector<float> own;
  if (!stats.data) {
    const int64_t tiles = (sample + kStatsChunk - 1) / kStatsChunk;
    own.resize(3 * p.batch * tiles);
    stats = {own.data(), tiles};
    torch::stable::parallel_for(0, p.batch * tiles, kGrainChunks, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t b = begin / tiles, stop = std::min(end, (b + 1) * tiles);
        kernels.stats(static_cast<const char*>(p.x) + b * sample * element, sample, begin - b * tiles, stop - b * tiles,
                      own.data() + 3 * b * tiles);
        begin = stop;
      }
    });
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    const auto m = merged(stats.data + 3 * b * stats.tiles, stats.tiles);
    call.mean[b] = m.mean;
    call.rstd[b] = 1.0 / std::sqrt(m.m2 / m.count + eps);
    if (!saved) continue;
    saved[2 * b] = call.mean[b];
    saved[2 * b + 1] = call.rstd[b];
  }
}

// Whether tokens are the rows of the products (rows_forward.h), where the level has such kernels. The results are the
// same, to the last bit, as where they are columns.
bool rows_fit(const MlpParams& p) {
  const int64_t wide = std::max(p.channels, p.out);
  return p.channels_last && !p.saved && wide <= kRowsChannels && p.tokens >= kRowsTokensPerChannel * wide &&
         p.channels % 32 == 0 && p.out % 32 == 0 && p.hidden % 32 == 0;
}

// Whether float_rows.h can compute the call. Whether it does depends on the tokens of a panel, too.
bool float_rows_fit(const MlpParams& p) {
  return p.channels_last && !p.saved && p.channels % 32 == 0 && p.out % 32 == 0 && p.hidden % 32 == 0;
}

// y of all tokens, with tokens as rows. The threads pack the weights together; nothing of it is kept for another call.
void run_rows(MlpCall& call, const MlpKernels& kernels) {
  MlpParams& p = call.p;
  thread_local std::vector<float> kept;
  uint32_t* packed = reinterpret_cast<uint32_t*>(grown(kept, kernels.rows_packed(p)));
  p.packed = packed;
  call.for_items(kernels.rows_items(p), [&](int64_t item) { kernels.rows_pack(p, item, packed); });
  const int64_t threads = call.work() < kSerialWork ? 1 : torch::stable::get_num_threads();
  const int64_t rounds = (p.tokens + threads * kRowsPanel - 1) / (threads * kRowsPanel), panels = rounds * threads;
  p.lanes = (p.tokens + panels - 1) / panels;
  const int64_t words = kernels.rows_scratch(p);
  call.for_items(panels, [&](int64_t i) {
    const int64_t first = i * p.tokens / panels, last = (i + 1) * p.tokens / panels;
    if (first < last) kernels.rows_forward(p, first, last - first, worker_scratch(words));
  });
}

// y of few tokens, step by step; the threads share the weights.
void run_shared(MlpCall& call, const SharedForwardKernels& kernels) {
  MlpParams& p = call.p;
  thread_local std::vector<float> kept;
  std::vector<float> large;  // what is not kept for another call
  p.lanes = (p.tokens + kLanesMax - 1) / kLanesMax * kLanesMax;
  const int64_t shared = kernels.words(p);
  p.shared = reinterpret_cast<uint32_t*>(grown(shared <= kKeptFloats ? kept : large, shared));
  const int64_t words = kernels.scratch(p);
  const auto step = [&](const auto& kernel, int64_t size, int64_t of_item) {
    call.for_items((size + of_item - 1) / of_item, [&](int64_t i) { kernel(p, i, worker_scratch(words)); });
  };
  step(kernels.input, p.tokens, kSharedTokens);
  step(kernels.hidden, p.hidden, kSharedHidden);
  step(kernels.output, p.out, kSharedOutput);
  if (p.token_moments) step(kernels.moments, p.tokens, kSharedTokens);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp(Tensor input, Tensor w1, OptionalTensor b1, Tensor w2, OptionalTensor b2,
                                               OptionalTensor norm_weight, OptionalTensor norm_bias,
                                               OptionalTensor layer_scale, OptionalTensor drop_scale,
                                               OptionalTensor stats, std::string activation, double eps, bool norm,
                                               bool residual, bool return_stats, bool save_hidden,
                                               std::optional<ScalarType> operand) {
  check(input, eps);
  const bool channels_last = is_channels_last(input);
  const Tensor x = in_layout(input, channels_last);
  const Images images = images_of(x, channels_last);
  const int64_t b = images.batch, c = w2.size(0), h = images.height, w = images.width, rows = w1.size(0);
  const int32_t f32 = aoti_torch_dtype_float32();
  Tensor y = channels_last ? empty({b, c, h, w}, {c * h * w, 1, w * c, c}, dtype_of(x))
                           : empty({b, c, h, w}, {c * h * w, h * w, w, 1}, dtype_of(x));
  Tensor mean_rstd = norm ? empty({b, 2}, {2, 1}, f32) : empty({0}, {1}, f32);
  Tensor y_stats = return_stats ? empty({b, 1, 3}, {3, 3, 1}, f32) : empty({0}, {1}, f32);
  Tensor hidden =
      empty({save_hidden ? b * h * w * rows : 0}, {1}, dtype_code(operand_of(x.scalar_type(), w1, operand)));
  Tensor given;
  run_mlp(images,
          {w1, w2, b1, b2, norm_weight, norm_bias, layer_scale, drop_scale, activation, eps, norm, residual, operand},
          partials_of(stats, "mlp_cpp", b, given), y.mutable_data_ptr(),
          norm ? static_cast<float*>(mean_rstd.mutable_data_ptr()) : nullptr,
          return_stats ? static_cast<float*>(y_stats.mutable_data_ptr()) : nullptr,
          save_hidden ? hidden.mutable_data_ptr() : nullptr);
  return {y, mean_rstd, y_stats, hidden};
}

}  // namespace

void run_mlp(const Images& x, const MlpArguments& args, const Partials& stats, void* y, float* mean_rstd,
             float* y_stats, void* hidden) {
  const MlpKernels& kernels = kernels_for(x.dtype, operand_of(x.dtype, args.w1, args.operand));
  MlpArguments dense = args;
  dense.w1 = dense_rows(args.w1, "w1", x.channels);
  dense.w2 = dense_rows(args.w2, "w2", args.w1.size(0));
  ScratchArena arena(call_scratch(MlpCall::tables(x, dense)));
  MlpCall call(x, dense, arena);
  MlpParams& p = call.p;
  if (p.batch == 0) return;

  p.y = y;
  p.saved = hidden;
  if (args.norm) fill_statistics(call, kernels, stats, args.eps, x.element_size(), mean_rstd);
  std::vector<float> moments(y_stats ? 2 * p.tokens : 0);
  p.token_moments = y_stats ? moments.data() : nullptr;
  // Where tokens are few, threads share wide weights instead of tokens. That depends on shapes alone, so that sums are
  // the same for any number of threads.
  const bool few = std::max(x.batch, args.batch) * p.pixels <= kTileTokens && p.hidden >= kPartsHidden;
  const bool shared = few && kernels.shared_forward;
  if (shared || (!few && kernels.rows_forward && rows_fit(p))) {
    if (shared)
      run_shared(call, *kernels.shared_forward);
    else
      run_rows(call, kernels);
    if (y_stats) merge_tokens(p.token_moments, p.batch, p.pixels, p.out, p.out, y_stats);
    return;
  }
  int64_t unit = kLanesMax, units, tiles;  // tiles are whole units of tokens
  const auto cut = [&](int64_t size, int64_t most) {
    unit = size, units = (p.tokens + unit - 1) / unit, tiles = call.tiles(units, most, unit);
  };
  if (!few && kernels.float_rows && float_rows_fit(p)) {
    cut(kFloatRowsBlock, kFloatRowsPanel);
    p.float_rows = p.tokens / tiles >= kFloatRowsLeast;
  }
  if (!p.float_rows) cut(kLanesMax, kernels.rows_forward ? kTilesTokens : kTileTokens);
  p.parts = few ? kParts : 1;
  p.lanes = few ? units * unit : (units + tiles - 1) / tiles * unit;
  const int64_t words = kernels.forward_scratch(p);
  const auto each_tile = [&](const auto& kernel) {
    call.for_items(tiles, [&](int64_t i) {
      const int64_t first = i * units / tiles * unit, last = (i + 1) * units / tiles * unit;
      kernel(p, first, std::min(last, p.tokens) - first, worker_scratch(words));
    });
  };
  if (few) {
    thread_local std::vector<float> kept;
    p.part_sums = grown(kept, kParts * ((p.out + kRowsMax - 1) / kRowsMax * kRowsMax) * p.lanes);
    call.for_items(kParts, [&](int64_t part) { kernels.forward_part(p, part, worker_scratch(words)); });
    each_tile(kernels.forward_join);
  } else {
    each_tile(kernels.forward);
  }
  if (y_stats) merge_tokens(p.token_moments, p.batch, p.pixels, p.out, p.out, y_stats);
}

}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(poolformer_kernels, CPU, m) { m.impl("mlp_cpp", TORCH_BOX(&pk::mlp)); }
