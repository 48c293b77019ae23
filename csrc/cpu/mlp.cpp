// The MLP's CPU operators: checks, output tensors, the plan of the work over torch's threads.
#include "mlp.h"

#include <cmath>
#include <string>
#include <tuple>

#include "isa.h"
#include "tensors.h"

namespace pk {
namespace {

constexpr int64_t kTileTokens = 208;      // of a forward tile at most
constexpr int64_t kSerialWork = 1 << 18;  // multiply-adds below which a second thread does not pay

const MlpKernels& kernels_for(ScalarType x, ScalarType w) {
  const int io = dtype_index(x), weights = dtype_index(w), index = io == 0 && weights > 0 ? 2 + weights : io;
#if defined(__x86_64__)
  switch (isa_chosen()) {
    case Isa::amx: return index == 1 ? mlp_amx[0] : index == 3 ? mlp_amx[1] : mlp_avx512_bf16[index];
    case Isa::avx512_bf16: return mlp_avx512_bf16[index];
    case Isa::avx512: return mlp_avx512[index];
    case Isa::avx2: return mlp_avx2[index];
    default: break;
  }
#endif
  return mlp_baseline[index];
}

Activation activation_named(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(false, "mlp_cpp: activation must be gelu, gelu_tanh, relu or silu, got ", name);
}

// A weight [rows, cols] or [rows, cols, 1, 1] with dense rows.
Tensor dense_rows(const Tensor& w, const char* name, int64_t cols) {
  STD_TORCH_CHECK(w.is_cpu() && (w.dim() == 2 || (w.dim() == 4 && w.size(2) == 1 && w.size(3) == 1)) && w.size(0) > 0 &&
                      w.size(1) == cols,
                  "mlp_cpp: ", name, " must be a CPU tensor [out, in] with in = ", cols);
  return w.stride(1) == 1 || cols == 1 ? w : torch::stable::contiguous(w);
}

Weight weight(const Tensor& w) { return {w.data_ptr(), w.stride(0), dtype_index(w.scalar_type())}; }

uint32_t* worker_scratch(int64_t words) {
  thread_local std::vector<float> buffer;
  return reinterpret_cast<uint32_t*>(grown(buffer, words));
}

struct Parameters {
  const Tensor w1, w2;
  OptionalTensor b1, b2, norm_weight, norm_bias, layer_scale, drop_scale;
};

// The call's shapes and its parameters as padded float vectors.
struct Call {
  MlpParams p{};
  float *mean, *rstd;

  static int64_t padded(int64_t n) { return (n + kRowsMax + 15) / 16 * 16; }
  static int64_t tables(const Tensor& x, const Parameters& of) {
    return padded(of.w1.size(0)) + 2 * padded(of.w2.size(0)) + 2 * padded(x.size(1)) + 3 * padded(x.size(0));
  }

  Call(const Tensor& x, const Parameters& of, const std::string& activation, bool norm, bool residual,
       bool channels_last, Arena& arena) {
    p.batch = x.size(0), p.channels = x.size(1), p.hidden = of.w1.size(0), p.out = of.w2.size(0);
    p.pixels = x.size(2) * x.size(3);
    p.tokens = p.batch * p.pixels;
    p.channels_last = channels_last || p.pixels == 1;
    p.residual = residual;
    p.norm = norm;
    p.activation = activation_named(activation);
    p.w1 = weight(of.w1);
    p.w2 = weight(of.w2);
    p.x = x.data_ptr();
    STD_TORCH_CHECK(of.w1.scalar_type() == of.w2.scalar_type(), "mlp_cpp: w1 and w2 must have one dtype");
    STD_TORCH_CHECK(!residual || p.out == p.channels, "mlp_cpp: with a residual w2 must have C rows");
    p.b1 = vector(arena, of.b1, "b1", p.hidden, 0);
    p.b2 = vector(arena, of.b2, "b2", p.out, 0);
    p.gamma = vector(arena, of.norm_weight, "norm_weight", p.channels, 1);
    p.beta = vector(arena, of.norm_bias, "norm_bias", p.channels, 0);
    p.scale = vector(arena, of.layer_scale, "layer_scale", p.out, 1);
    p.drop = vector(arena, of.drop_scale, "drop_scale", p.batch, 1);
    p.mean = mean = arena.take(padded(p.batch));
    p.rstd = rstd = arena.take(padded(p.batch));
  }

  static float* vector(Arena& arena, const OptionalTensor& t, const char* name, int64_t n, float absent) {
    float* out = arena.take(padded(n));
    read_vector(t, name, out, n, absent);
    std::fill(out + n, out + padded(n), 0.0f);
    return out;
  }

  // How many tiles of `most` tokens at most share all tokens: as many for each thread.
  int64_t balanced(int64_t most) const {
    const int64_t threads = work() < kSerialWork ? 1 : torch::stable::get_num_threads();
    return std::min(vectors(), threads * ((vectors() * kLanesMax + threads * most - 1) / (threads * most)));
  }
  int64_t vectors() const { return (p.tokens + kLanesMax - 1) / kLanesMax; }

  double work() const { return double(p.tokens) * p.hidden * (p.channels + p.out); }

  // f(first, last) over `count` items that share `work()`
  template <class F>
  void over(int64_t count, const F& f) const {
    const int64_t grain = std::max<int64_t>(1, int64_t(kSerialWork / (work() / count + 1)));
    torch::stable::parallel_for(0, count, grain, f);
  }
};

void check(const Tensor& x, double eps) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "mlp_cpp: x must be a CPU tensor of 4 dimensions");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "mlp_cpp: x must have channels and pixels");
  STD_TORCH_CHECK(eps >= 0, "mlp_cpp: eps must not be negative, got ", eps);
}

int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

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
  const int32_t operand = dtype_index(x.scalar_type()) == 0 ? dtype_of(w1) : dtype_of(x);
  Tensor hidden = empty({save_hidden ? p.tokens * p.hidden : 0}, {1}, operand);
  if (p.batch == 0) return {y, mean_rstd, y_stats, hidden};

  p.y = y.mutable_data_ptr();
  p.saved = save_hidden ? hidden.mutable_data_ptr() : nullptr;
  if (norm)
    fill_statistics(call, kernels, stats, eps, x.element_size(), static_cast<float*>(mean_rstd.mutable_data_ptr()));
  std::vector<float> moments(return_stats ? 2 * p.tokens : 0);
  p.token_moments = return_stats ? moments.data() : nullptr;
  const int64_t tiles = call.balanced(kTileTokens), vectors = call.vectors();
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

// ---- backward

constexpr int64_t kGroupTokens =
    3136;  // of whole samples whose gradient waits for GroupNorm's sums, if one is no larger
constexpr int64_t kBlockElements = 1 << 18;  // tokens times channels of a block, whose operands stay in the caches
constexpr int64_t kBlockTokens = 1600;

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One tensor of scratch, cut into arrays of whole cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t words) : tensor_(empty({words + 16}, {1}, aoti_torch_dtype_float32())) {
    const auto address = reinterpret_cast<uintptr_t>(tensor_.mutable_data_ptr());
    next_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
  template <class T>
  void take(T*& p, int64_t n) {
    p = reinterpret_cast<T*>(next_);
    next_ += rounded_up(n, 16);
  }

 private:
  Tensor tensor_;
  float* next_;
};

// What the backward keeps beyond the gradients it returns.
struct Workspace {
  uint32_t *n, *g, *dh, *x_tokens, *g_tokens, *w1t;
  float *drop_lanes, *drop_rows, *e, *g_p, *x_dh, *db1, *t, *g_sums;
  double* sums;

  // f(array, words) for each
  template <class F>
  void each(const MlpBackwardParams& p, int per, int64_t group, int64_t chunks, const F& f) {
    const int64_t block = p.block_lanes, rows = rounded_up(p.hidden, kRowsMax), slack = 64;
    const int64_t in = rounded_up(p.channels, kRowsMax), out = rounded_up(p.out, kRowsMax);
    const int64_t tokens = p.parameter_grads ? block / per : 0;
    f(n, (in / per + slack) * block);
    f(g, (out / per + slack) * block);
    f(dh, (rows / per + slack) * block);
    f(x_tokens, tokens * p.channels + slack);
    f(g_tokens, tokens * p.out + slack);
    f(w1t, in * (rows / per + slack));
    f(drop_lanes, block);
    f(drop_rows, p.drop_grad ? (1 + rows / kRowsMax) * block : 0);
    f(e, group * p.channels);
    f(g_p, p.parameter_grads ? rows * out : 0);
    f(x_dh, p.parameter_grads ? rows * in : 0);
    f(db1, rows);
    f(t, out);
    f(g_sums, (block / p.lanes + 1) * out);
    f(sums, 4 * chunks);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(
    Tensor gradient, Tensor input, Tensor mean_rstd, Tensor w1, OptionalTensor b1, Tensor w2, OptionalTensor b2,
    OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor layer_scale, OptionalTensor drop_scale,
    OptionalTensor hidden, std::string activation, bool norm, bool residual, bool parameter_grads, bool drop_grad) {
  check(input, 0);
  const MlpKernels& kernels = kernels_for(input.scalar_type(), w1.scalar_type());
  const bool channels_last = is_channels_last(input);
  const Tensor x = in_layout(input, channels_last), grad = in_layout(gradient, channels_last);
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
  MlpBackwardParams p{call.p};
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == x.scalar_type() && grad.dim() == 4 &&
                      grad.size(0) == p.batch && grad.size(1) == p.out && grad.size(2) == x.size(2) &&
                      grad.size(3) == x.size(3),
                  "mlp_cpp_backward: grad must have y's device, dtype and shape");
  const Tensor saved = in_layout(mean_rstd, false);
  STD_TORCH_CHECK(!norm || (saved.is_cpu() && saved.scalar_type() == ScalarType::Float && saved.dim() == 2 &&
                            saved.size(0) == p.batch && saved.size(1) == 2),
                  "mlp_cpp_backward: mean_rstd must be a float32 CPU tensor of shape [B, 2]");

  const int32_t f32 = aoti_torch_dtype_float32(), weights = dtype_of(w1);
  const auto like = [&](const Tensor& w) {
    if (!parameter_grads) return empty({0}, {1}, weights);
    const int64_t rows = w.size(0), cols = w.size(1);
    if (w.dim() == 2) return empty({rows, cols}, {cols, 1}, weights);
    return empty({rows, cols, 1, 1}, {cols, 1, 1, 1}, weights);
  };
  const auto vector = [&](int64_t n) { return empty({parameter_grads ? n : 0}, {1}, f32); };
  Tensor dx = empty_like(x, channels_last), dw1 = like(w1), dw2 = like(w2);
  Tensor db1 = vector(p.hidden), db2 = vector(p.out), dnorm_weight = vector(p.channels);
  Tensor dnorm_bias = vector(p.channels), dlayer_scale = vector(p.out);
  Tensor ddrop_scale = empty({drop_grad ? p.batch : 0}, {1}, f32);
  const auto floats = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };

  p.grad = grad.data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.saved = hidden.has_value() ? const_cast<void*>(static_cast<const void*>(hidden->data_ptr())) : nullptr;
  p.parameter_grads = parameter_grads;
  p.drop_grad = drop_grad;
  p.dw1 = dw1.mutable_data_ptr(), p.dw2 = dw2.mutable_data_ptr();
  p.db2 = floats(db2), p.dgamma = floats(dnorm_weight), p.dbeta = floats(dnorm_bias), p.dscale = floats(dlayer_scale);
  for (int64_t b = 0; norm && b < p.batch; ++b) {
    call.mean[b] = static_cast<const float*>(saved.data_ptr())[2 * b];
    call.rstd[b] = static_cast<const float*>(saved.data_ptr())[2 * b + 1];
  }

  // The plan, which depends on shapes alone: sums are the same for any number of threads.
  const int64_t sample = p.channels * p.pixels, per = kernels.operand_per, element = x.element_size();
  const int64_t group_samples = std::max<int64_t>(1, std::min(p.batch, kGroupTokens / p.pixels));
  const int64_t group = group_samples * p.pixels;
  const int64_t most = std::max<int64_t>(96, std::min(kBlockTokens, kBlockElements / std::max(p.channels, p.out)));
  const int64_t blocks = (group + most - 1) / most;
  p.lanes = 96, p.input_lanes = 192;
  p.block_lanes = rounded_up((group + blocks - 1) / blocks, 32);
  const int64_t chunks = (sample + kStatsChunk - 1) / kStatsChunk;
  Workspace own;
  int64_t words = 0;
  own.each(p, per, group, group_samples * chunks, [&](auto*&, int64_t n) { words += rounded_up(n, 16); });
  Scratch scratch(words);
  own.each(p, per, group, group_samples * chunks, [&](auto*& array, int64_t n) { scratch.take(array, n); });
  p.n = own.n, p.g = own.g, p.dh = own.dh, p.x_tokens = own.x_tokens, p.g_tokens = own.g_tokens, p.w1t = own.w1t;
  p.drop_lanes = own.drop_lanes, p.drop_rows = own.drop_rows, p.e = own.e;
  p.g_p = own.g_p, p.x_dh = own.x_dh, p.db1 = own.db1, p.t = own.t;
  std::fill(own.db1, own.db1 + rounded_up(p.hidden, kRowsMax), 0.0f);
  std::vector<double> t(p.out), drops(p.batch);
  const int64_t worker_words = kernels.backward_scratch(p), items = (p.hidden + kRowsMax - 1) / kRowsMax;

  torch::stable::parallel_for(0, (p.channels + kRowsMax - 1) / kRowsMax, 1 + 65536 / (p.hidden * kRowsMax),
                              [&](int64_t begin, int64_t end) {
                                kernels.pack_input(p, begin * kRowsMax, std::min(p.channels, end * kRowsMax));
                              });
  for (int64_t b0 = 0; b0 < p.batch; b0 += group_samples) {
    const int64_t samples = std::min(group_samples, p.batch - b0), first = b0 * p.pixels, last = samples * p.pixels;
    for (int64_t at = 0; at < last; at += p.block_lanes) {
      const int64_t count = std::min(p.block_lanes, last - at);
      const auto tiles = [&](int64_t lanes, const auto& f) {
        call.over((p.block_lanes + lanes - 1) / lanes, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t lane = i * lanes, used = std::min(lanes, p.block_lanes - lane);
            f(i, lane, used, std::max<int64_t>(0, std::min(used, count - lane)));
          }
        });
      };
      tiles(p.lanes, [&](int64_t i, int64_t lane, int64_t lanes, int64_t tokens) {
        kernels.prepare(p, first + at + lane, tokens, lane, lanes, own.g_sums + i * p.out,
                        worker_scratch(worker_words));
      });
      for (int64_t i = 0; i * p.lanes < count; ++i)
        for (int64_t c = 0; c < p.out; ++c) t[c] += own.g_sums[i * p.out + c];
      call.over(items, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          kernels.hidden(p, i * kRowsMax, first + at, count, worker_scratch(worker_words));
      });
      p.add = true;
      tiles(p.input_lanes, [&](int64_t, int64_t lane, int64_t lanes, int64_t tokens) {
        if (tokens > 0) kernels.input(p, at + lane, tokens, lane, lanes, worker_scratch(worker_words));
      });
      for (int64_t i = 0; drop_grad && i <= items; ++i)
        for (int64_t l = 0; l < count; ++l) drops[(first + at + l) / p.pixels] += own.drop_rows[i * p.block_lanes + l];
    }
    const auto at_chunk = [&](int64_t i, const auto& f) {
      const int64_t b = i / chunks, begin = i % chunks * kStatsChunk;
      const int64_t offset = (b0 + b) * sample + begin;
      f(b, static_cast<const char*>(p.x) + offset * element, own.e + b * sample + begin, offset * element,
        std::min(kStatsChunk, sample - begin));
    };
    if (norm)
      torch::stable::parallel_for(0, samples * chunks, 2, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          at_chunk(i, [&](int64_t b, const void* in, const float* e, int64_t, int64_t n) {
            kernels.reduce(in, e, call.mean[b0 + b], n, own.sums + 2 * i);
          });
      });
    std::vector<float> k(2 * samples);
    for (int64_t b = 0; norm && b < samples; ++b) {
      double sum = 0, projected = 0;
      for (int64_t i = b * chunks; i < (b + 1) * chunks; ++i) {
        sum += own.sums[2 * i];
        projected += own.sums[2 * i + 1];
      }
      const double rstd = call.rstd[b0 + b];
      k[2 * b] = rstd * sum / sample;
      k[2 * b + 1] = rstd * rstd * rstd * projected / sample;
    }
    torch::stable::parallel_for(0, samples * chunks, 2, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        at_chunk(i, [&](int64_t b, const void* in, const float* e, int64_t offset, int64_t n) {
          kernels.finish(in, residual ? static_cast<const char*>(p.grad) + offset : nullptr, e,
                         norm ? call.mean[b0 + b] : 0, norm ? call.rstd[b0 + b] : 1, k[2 * b], k[2 * b + 1], n,
                         static_cast<char*>(p.dx) + offset);
        });
    });
  }

  if (drop_grad) std::copy(drops.begin(), drops.end(), floats(ddrop_scale));
  if (parameter_grads) {
    if (!p.add) {  // no tokens
      std::fill(own.g_p, own.g_p + rounded_up(p.hidden, kRowsMax) * rounded_up(p.out, kRowsMax), 0.0f);
      std::fill(own.x_dh, own.x_dh + rounded_up(p.hidden, kRowsMax) * rounded_up(p.channels, kRowsMax), 0.0f);
    }
    std::copy(t.begin(), t.end(), own.t);
    std::copy(own.db1, own.db1 + p.hidden, floats(db1));
    torch::stable::parallel_for(0, kernels.weight_items(p), 1 + 4096 / p.hidden,
                                [&](int64_t begin, int64_t end) { kernels.weights(p, begin, end); });
  }
  return {dx, dw1, db1, dw2, db2, dnorm_weight, dnorm_bias, dlayer_scale, ddrop_scale};
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(poolformer_kernels, CPU, m) {
  m.impl("mlp_cpp", TORCH_BOX(&pk::mlp));
  m.impl("mlp_cpp_backward", TORCH_BOX(&pk::mlp_backward));
}
