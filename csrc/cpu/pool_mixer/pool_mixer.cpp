// The token mixer's CPU operators: checks, output tensors, and how torch's threads share the work.
#include "pool_mixer.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../../common/window_count.h"
#include "../isa/isa.h"
#include "../core/operators.h"
#include "../core/tensors.h"
#include "../tuning.h"

namespace pk {
namespace {

const PoolMixerKernels& kernels_for(ScalarType dtype) {
  static const PoolMixerKernels* table = [] {
#if defined(__x86_64__)
    if (isa_chosen() >= Isa::avx512_bf16) return pool_mixer_avx512_bf16;
    if (isa_chosen() == Isa::avx512) return pool_mixer_avx512;
    if (isa_chosen() == Isa::avx2) return pool_mixer_avx2;
#endif
    return pool_mixer_baseline;
  }();
  return table[dtype_index(dtype)];
}

float* worker_scratch(const PoolMixerParams& p) {
  thread_local std::vector<float> buffer;
  // channels_last, `sweep`: a pair of vectors for each column, once with and once without borders
  const int64_t columns = 4 * (p.width + p.half_w) * kLanesMax;
  // NCHW, `Strip`: padded rows, then a vector for each
  const int64_t rows = std::min(p.height, p.strip_rows + 2 * p.half_h);
  const int64_t planes = (rows + 1) * (p.width + p.half_w + 3 * kLanesMax);
  return grown(buffer, p.channels_last ? (p.pool == 3 ? 0 : columns) : planes);
}

// The arguments of the kernels, and how the work is cut into items.
struct PoolMixerCall {
  PoolMixerParams p{};
  int64_t items = 0;                     // work items of one sample
  float *coef, *mean, *scale, *correct;  // what p's pointers of these names show
  float *gamma, *layer;                  // [C] norm weight and LayerScale

  PoolMixerCall(const Images& x, int64_t pool, bool residual) {
    const bool channels_last = x.channels_last;
    p.batch = x.batch, p.channels = x.channels, p.height = x.height, p.width = x.width;
    p.pool = pool = std::min(pool, 2 * std::max(p.height, p.width) - 1);  // a larger one covers nothing more
    p.residual = residual;
    p.channels_last = channels_last;
    p.chunks = (sample() + kStatsChunk - 1) / kStatsChunk;
    p.half_h = pool == 3 ? 1 : std::min(pool / 2, p.height - 1);
    p.half_w = pool == 3 ? 1 : std::min(pool / 2, p.width - 1);
    p.strip_rows = channels_last ? kStripElements / (p.width * p.channels)
                                 : std::max(kPlaneElements / (p.width + kLanesMax), p.half_h);
    p.strip_rows = std::min(p.height, std::max<int64_t>(1, p.strip_rows));
    p.strip_rows += channels_last && p.strip_rows % 2;  // rows are swept two at a time
    p.strips = (p.height + p.strip_rows - 1) / p.strip_rows;
    items = channels_last ? p.strips : p.channels * p.strips;
  }

  int64_t sample() const { return p.channels * p.height * p.width; }
  // Words of what `fill` takes.
  int64_t tables() const {
    const auto array = ScratchArena::whole_lines;
    return array(p.channels + kLanesMax) + 2 * array(p.channels) + 3 * array(p.batch) + array(p.height) +
           array(p.height + kLanesMax) + array(p.width) + array(p.width + kLanesMax) +
           array((std::min(p.pool, p.height) + 1) * p.width + kLanesMax);
  }

  void fill(ScratchArena& arena, const OptionalTensor& weight, const OptionalTensor& bias,
            const OptionalTensor& layer_scale) {
    p.coef = coef = arena.floats(p.channels + kLanesMax);
    p.mean = mean = arena.floats(p.batch);
    p.scale = scale = arena.floats(p.batch);
    p.correct = correct = arena.floats(p.batch);
    gamma = arena.floats(p.channels);
    layer = arena.floats(p.channels);
    read_vector(weight, "weight", gamma, p.channels, 1);
    read_vector(bias, "bias", coef, p.channels, 0);
    read_vector(layer_scale, "layer_scale", layer, p.channels, 1);
    // Where gamma or beta is infinite, eager subtracts infinities: 0 * inf carries the NaN over.
    for (int64_t c = 0; c < p.channels; ++c) coef[c] = (gamma[c] + 0.0f * (gamma[c] + coef[c])) * layer[c];
    p.area = fill_counts(arena, p.height, &p.row_counts, &p.row_weight) *
             fill_counts(arena, p.width, &p.col_counts, &p.col_weight);
    float* inv = arena.floats((std::min(p.pool, p.height) + 1) * p.width + kLanesMax);
    p.inv = inv;
    for (int64_t rows = 1; rows <= std::min(p.pool, p.height); ++rows)
      for (int64_t w = 0; w < p.width; ++w) inv[rows * p.width + w] = 1.0f / (rows * p.col_counts[w]);
  }

  // Along one direction of `size` pixels: the windows' counts, and the backward's weights, which are a common factor
  // divided by the count. Returns that factor: the largest count, times a power of two that keeps sums in range.
  float fill_counts(ScratchArena& arena, int64_t size, const float** count, const float** weight) const {
    float *n = arena.floats(size), *relative = arena.floats(size + kLanesMax);  // weights are read a vector at a time
    const float most = window_count(size / 2, size, p.pool), part = std::exp2(-std::ceil(std::log2(most)));
    for (int64_t i = 0; i < size; ++i) {
      n[i] = window_count(i, size, p.pool);
      relative[i] = most / n[i] * part;
    }
    std::fill(relative + size, relative + size + kLanesMax, 0.0f);
    *count = n;
    *weight = relative;
    return most * part;
  }

  // Whether a thread works on whole samples: where the shares are even enough, as its second pass over a sample then
  // finds it in the cache.
  bool whole_samples() const {
    const int64_t threads = torch::stable::get_num_threads();
    return threads == 1 || p.batch * sample() < kSerialElements || p.batch % threads == 0 ||
           p.batch >= kSamplesPerThread * threads;
  }

  // Calls f(b, first, last) for runs of the `count` items of each sample, on torch's threads.
  template <class F>
  void for_items(int64_t count, const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kSerialElements / std::max<int64_t>(1, sample() / count));
    torch::stable::parallel_for(0, p.batch * count, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t b = begin / count, stop = std::min(end, (b + 1) * count);
        f(b, begin - b * count, stop - b * count);
        begin = stop;
      }
    });
  }
};

void check(const Tensor& x, int64_t pool, double eps) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "pool_mixer_cpp: x must be a CPU tensor of 4 dimensions");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "pool_mixer_cpp: x must have channels and pixels");
  STD_TORCH_CHECK(pool > 0 && pool % 2 == 1, "pool_mixer_cpp: pool_size must be odd and positive, got ", pool);
  STD_TORCH_CHECK(eps >= 0, "pool_mixer_cpp: eps must not be negative, got ", eps);
}

std::tuple<Tensor, Tensor, Tensor> pool_mixer(Tensor input, OptionalTensor weight, OptionalTensor bias,
                                              OptionalTensor layer_scale, OptionalTensor drop_scale,
                                              OptionalTensor stats, int64_t pool_size, double eps, bool residual,
                                              bool return_stats) {
  check(input, pool_size, eps);
  const bool channels_last = is_channels_last(input);
  const Tensor x = in_layout(input, channels_last);
  const Images images = images_of(x, channels_last);
  const int64_t batch = images.batch;
  const int32_t f32 = aoti_torch_dtype_float32();
  Tensor y = empty_like(x, channels_last);
  Tensor mean_rstd = empty({batch, 2}, {2, 1}, f32);
  Tensor y_stats = return_stats ? empty({batch, 1, 3}, {3, 3, 1}, f32) : empty({0}, {1}, f32);
  Tensor given;
  run_pool_mixer(images, {weight, bias, layer_scale, drop_scale, pool_size, eps, residual},
                 partials_of(stats, "pool_mixer_cpp", batch, given), y.mutable_data_ptr(),
                 static_cast<float*>(mean_rstd.mutable_data_ptr()),
                 return_stats ? static_cast<float*>(y_stats.mutable_data_ptr()) : nullptr);
  return {y, mean_rstd, y_stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pool_mixer_backward(Tensor grad, Tensor input, Tensor mean_rstd,
                                                               OptionalTensor weight, OptionalTensor bias,
                                                               OptionalTensor layer_scale, OptionalTensor drop_scale,
                                                               int64_t pool_size, bool residual) {
  check(input, pool_size, 0);
  const PoolMixerKernels& kernels = kernels_for(input.scalar_type());
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == input.scalar_type() && grad.dim() == 4 &&
                      grad.size(0) == input.size(0) && grad.size(1) == input.size(1) && grad.size(2) == input.size(2) &&
                      grad.size(3) == input.size(3),
                  "pool_mixer_cpp_backward: grad must have x's device, dtype and shape");
  const bool channels_last = is_channels_last(input);
  const Tensor x = in_layout(input, channels_last), g = in_layout(grad, channels_last);
  PoolMixerCall call(images_of(x, channels_last), pool_size, residual);
  PoolMixerParams& p = call.p;
  const int64_t batch = p.batch, channels = p.channels;
  const Tensor saved = in_layout(mean_rstd, false);
  STD_TORCH_CHECK(saved.is_cpu() && saved.scalar_type() == ScalarType::Float && saved.dim() == 2 &&
                      saved.size(0) == batch && saved.size(1) == 2,
                  "pool_mixer_cpp_backward: mean_rstd must be a float32 CPU tensor of shape [B, 2]");

  const int32_t f32 = aoti_torch_dtype_float32();
  Tensor dx = empty_like(x, channels_last);
  Tensor dweight = empty({channels}, {1}, f32), dlayer_scale = empty({channels}, {1}, f32);
  Tensor ddrop_scale = empty({batch}, {1}, f32);

  // q per (strip, channel) in channels_last and per (channel, strip) in NCHW
  const auto array = ScratchArena::whole_lines;
  const int64_t partials = batch * call.items * (channels_last ? channels : 1);
  ScratchArena arena(call_scratch(call.tables() + array(partials) + array(batch * channels) + array(batch)));
  call.fill(arena, weight, std::nullopt, layer_scale);
  p.x = x.data_ptr();
  p.grad = g.data_ptr();
  p.out = dx.mutable_data_ptr();
  p.q_partials = arena.floats(partials);
  float *q = arena.floats(batch * channels), *drop = arena.floats(batch);
  read_vector(drop_scale, "drop_scale", drop, batch, 1);
  const float* mr = static_cast<const float*>(saved.data_ptr());
  float* drop_out = static_cast<float*>(ddrop_scale.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    call.mean[b] = mr[2 * b];
    call.scale[b] = drop[b] * mr[2 * b + 1];
  }

  // q and k of docs/algebra.md, "Token mixer". The partials are sum g (P x - x), which equals sum (x - mean) e; pooling
  // x instead of g costs no digits where a channel's mean is large.
  const auto reduce_sample = [&](int64_t b) {
    const double rstd = mr[2 * b + 1];
    double projected = 0;
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      if (channels_last)
        for (int64_t s = 0; s < p.strips; ++s) sum += p.q_partials[(b * p.strips + s) * channels + c];
      else
        for (int64_t s = 0; s < p.strips; ++s) sum += p.q_partials[(b * channels + c) * p.strips + s];
      q[b * channels + c] = rstd * sum;
      projected += call.coef[c] * (rstd * sum);
    }
    drop_out[b] = projected;
    call.correct[b] = rstd * rstd * (projected * drop[b] / call.sample());
  };
  if (call.whole_samples()) {
    call.for_items(1, [&](int64_t b, int64_t, int64_t) {
      float* scratch = worker_scratch(p);
      kernels.backward_reduce(p, b, 0, call.items, scratch);
      reduce_sample(b);
      kernels.backward_apply(p, b, 0, call.items, scratch);
    });
  } else {
    call.for_items(call.items, [&](int64_t b, int64_t first, int64_t last) {
      kernels.backward_reduce(p, b, first, last, worker_scratch(p));
    });
    for (int64_t b = 0; b < batch; ++b) reduce_sample(b);
    call.for_items(call.items, [&](int64_t b, int64_t first, int64_t last) {
      kernels.backward_apply(p, b, first, last, worker_scratch(p));
    });
  }
  float* dw = static_cast<float*>(dweight.mutable_data_ptr());
  float* ds = static_cast<float*>(dlayer_scale.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0;
    for (int64_t b = 0; b < batch; ++b) total += static_cast<double>(drop[b]) * q[b * channels + c];
    dw[c] = call.layer[c] * total;
    ds[c] = call.gamma[c] * total;
  }
  return {dx, dweight, dlayer_scale, ddrop_scale};
}

}  // namespace

void run_pool_mixer(const Images& x, const PoolMixerArguments& args, const Partials& stats, void* y, float* mean_rstd,
                    float* y_stats) {
  const PoolMixerKernels& kernels = kernels_for(x.dtype);
  PoolMixerCall call(x, args.pool_size, args.residual);
  PoolMixerParams& p = call.p;
  const int64_t batch = p.batch;
  if (batch == 0) return;

  const auto array = ScratchArena::whole_lines;
  ScratchArena arena(call_scratch(call.tables() + array(3 * batch * p.chunks) + array(3 * batch * call.items)));
  call.fill(arena, args.weight, args.bias, args.layer_scale);
  p.x = x.data;
  p.out = y;
  p.x_partials = arena.floats(3 * batch * p.chunks);
  p.y_partials = y_stats ? arena.floats(3 * batch * call.items) : nullptr;
  read_vector(args.drop_scale, "drop_scale", call.scale, batch, 1);

  const auto stats_of = [&](int64_t b, int64_t first, int64_t last) {
    const char* sample = static_cast<const char*>(p.x) + b * call.sample() * x.element_size();
    kernels.stats(sample, call.sample(), first, last, p.x_partials + 3 * b * p.chunks);
  };
  const auto begin_sample = [&](int64_t b) {
    const auto m = stats.data ? merged(stats.data + b * stats.tiles * 3, stats.tiles)
                              : merged(p.x_partials + b * p.chunks * 3, p.chunks);
    const float rstd = 1.0 / std::sqrt(m.m2 / m.count + args.eps);
    call.mean[b] = m.mean;
    call.scale[b] *= rstd;
    if (!mean_rstd) return;
    mean_rstd[2 * b] = m.mean;
    mean_rstd[2 * b + 1] = rstd;
  };
  const auto end_sample = [&](int64_t b) {
    if (!y_stats) return;
    const auto m = merged(p.y_partials + b * call.items * 3, call.items);
    y_stats[3 * b] = m.count;
    y_stats[3 * b + 1] = m.mean;
    y_stats[3 * b + 2] = m.m2;
  };
  if (call.whole_samples()) {
    call.for_items(1, [&](int64_t b, int64_t, int64_t) {
      if (!stats.data) stats_of(b, 0, p.chunks);
      begin_sample(b);
      kernels.forward(p, b, 0, call.items, worker_scratch(p));
      end_sample(b);
    });
  } else {
    if (!stats.data) call.for_items(p.chunks, stats_of);
    for (int64_t b = 0; b < batch; ++b) begin_sample(b);
    call.for_items(call.items, [&](int64_t b, int64_t first, int64_t last) {
      kernels.forward(p, b, first, last, worker_scratch(p));
    });
    for (int64_t b = 0; b < batch; ++b) end_sample(b);
  }
}

}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(poolformer_kernels, CPU, m) {
  m.impl("pool_mixer_cpp", TORCH_BOX(&pk::pool_mixer));
  m.impl("pool_mixer_cpp_backward", TORCH_BOX(&pk::pool_mixer_backward));
}
