// A chain of layers as one operator, for inference (poolformer_kernels/ops/chain.py): activations and statistics go
// from one layer to the next in here, so a layer costs neither a call from Python nor an allocation.
#include <cmath>

#include "../core/operators.h"
#include "../core/tensors.h"
#include "../tuning.h"

namespace pk {
namespace {

enum Kind : int64_t { patch_embed, pool_mixer, mlp, pool_official, pool_timm };

// Reads the operator's lists from front to back.
struct Reader {
  const std::vector<Tensor>& parameters;
  const std::vector<int64_t>& steps;  // for each layer its kind, a bit for each optional parameter, its integers
  const std::vector<double>& epsilons;
  size_t parameter = 0, step = 0, epsilon = 0;  // the next of each list

  bool done() const { return step == steps.size(); }
  int64_t integer() {
    STD_TORCH_CHECK(step < steps.size(), "chain_cpp: steps ends within a layer");
    return steps[step++];
  }
  double eps() {
    STD_TORCH_CHECK(epsilon < epsilons.size(), "chain_cpp: a layer lacks its eps");
    return epsilons[epsilon++];
  }
  Tensor tensor() {
    STD_TORCH_CHECK(parameter < parameters.size(), "chain_cpp: a layer lacks a parameter");
    return parameters[parameter++];
  }
  // The next parameter if the lowest bit of `present` is set, which is shifted out.
  Parameter optional(int64_t& present) {
    const bool given = present & 1;
    present >>= 1;
    return given ? Parameter(tensor()) : std::nullopt;
  }
};

// Activations by the operators' names, in the order of poolformer_kernels.reference.ACTIVATIONS.
constexpr const char* kActivations[] = {"gelu", "gelu_tanh", "relu", "relu_squared", "silu"};

struct Layer {
  Kind kind;
  PatchEmbedArguments conv;
  PoolMixerArguments mixer;
  std::optional<MlpArguments> mlp;
  Parameter weight, bias;  // [C] gamma and beta of the pooling's norm
  double eps;              // of the pooling's norm
  bool normalises() const { return kind == Kind::pool_mixer || kind == Kind::mlp || kind == Kind::pool_official; }
};

void check_vector(const Parameter& t, const char* name, int64_t n) {
  STD_TORCH_CHECK(!t.has_value() || (t->is_cpu() && t->dim() == 1 && t->size(0) == n), "chain_cpp: ", name,
                  " must be a CPU tensor of ", n, " elements");
  if (t.has_value()) dtype_index(t->scalar_type());
}

// A weight [rows, cols] or [rows, cols, 1, 1] as the kernels read it, with dense rows.
Tensor checked_weight(const Tensor& w, const char* name, int64_t cols) {
  STD_TORCH_CHECK(w.is_cpu() && (w.dim() == 2 || (w.dim() == 4 && w.size(2) == 1 && w.size(3) == 1)) && w.size(0) > 0 &&
                      w.size(1) == cols,
                  "chain_cpp: ", name, " must be a CPU tensor [out, ", cols, "]");
  dtype_index(w.scalar_type());
  return w.stride(1) == 1 || cols == 1 ? w : torch::stable::contiguous(w);
}

// `present` keeps the bits that belong to no parameter of the layer.
Layer read_layer(Reader& reader, int64_t& present) {
  Layer layer{};
  layer.kind = Kind(reader.integer());
  present = reader.integer();
  switch (layer.kind) {
    case Kind::patch_embed:
      layer.conv.weight = reader.tensor();
      layer.conv.bias = reader.optional(present);
      layer.conv.stride = reader.integer();
      layer.conv.padding = reader.integer();
      STD_TORCH_CHECK(layer.conv.stride > 0 && layer.conv.padding >= 0,
                      "chain_cpp: a stride must be positive and a padding not negative");
      return layer;
    case Kind::pool_mixer:
      layer.mixer.weight = reader.optional(present);
      layer.mixer.bias = reader.optional(present);
      layer.mixer.layer_scale = reader.optional(present);
      layer.mixer.pool_size = reader.integer();
      layer.mixer.eps = reader.eps();
      layer.mixer.residual = true;
      STD_TORCH_CHECK(layer.mixer.pool_size > 0 && layer.mixer.pool_size % 2 == 1,
                      "chain_cpp: pool_size must be odd and positive, got ", layer.mixer.pool_size);
      return layer;
    case Kind::mlp: {
      Tensor w1 = reader.tensor(), w2 = reader.tensor();
      MlpArguments& args = layer.mlp.emplace(MlpArguments{.w1 = w1, .w2 = w2});
      args.b1 = reader.optional(present);
      args.b2 = reader.optional(present);
      args.norm_weight = reader.optional(present);
      args.norm_bias = reader.optional(present);
      args.layer_scale = reader.optional(present);
      const int64_t activation = reader.integer();
      STD_TORCH_CHECK(activation >= 0 && activation < int64_t(std::size(kActivations)), "chain_cpp: no activation ",
                      activation);
      args.activation = kActivations[activation];
      args.eps = reader.eps();
      args.norm = args.residual = true;
      return layer;
    }
    case Kind::pool_official:
    case Kind::pool_timm:
      layer.weight = reader.optional(present);
      layer.bias = reader.optional(present);
      layer.eps = reader.eps();
      return layer;
  }
  STD_TORCH_CHECK(false, "chain_cpp: no layer of kind ", int64_t(layer.kind));
}

// ---- the head: mean over pixels and norm, in either order

// The mean over pixels of each channel of sample b.
template <class T>
void pool_sample(const Images& x, int64_t b, double* mean) {
  const int64_t pixels = x.height * x.width;
  const T* sample = static_cast<const T*>(x.data) + b * pixels * x.channels;
  std::fill(mean, mean + x.channels, 0.0);
  if (x.channels_last) {
    for (int64_t t = 0; t < pixels; ++t)
      for (int64_t c = 0; c < x.channels; ++c) mean[c] += to_float(sample[t * x.channels + c]);
  } else {
    for (int64_t c = 0; c < x.channels; ++c)
      for (int64_t t = 0; t < pixels; ++t) mean[c] += to_float(sample[c * pixels + t]);
  }
  for (int64_t c = 0; c < x.channels; ++c) mean[c] /= pixels;
}

// pool_official: GroupNorm, whose statistics `stats` [B, 1, 3] are, and then the mean. pool_timm: the mean and then
// LayerNorm. y [B, C].
template <class T>
void run_pool(const Images& x, const Layer& layer, const float* stats, T* y) {
  const int64_t channels = x.channels;
  ScratchArena arena(call_scratch(2 * ScratchArena::whole_lines(channels)));
  float *gamma = arena.floats(channels), *beta = arena.floats(channels);
  read_vector(layer.weight, "norm.weight", gamma, channels, 1);
  read_vector(layer.bias, "norm.bias", beta, channels, 0);
  torch::stable::parallel_for(
      0, x.batch, 1 + kGrainElements / (channels * x.height * x.width), [&](int64_t begin, int64_t end) {
        std::vector<double> mean(channels);
        for (int64_t b = begin; b < end; ++b) {
          pool_sample<T>(x, b, mean.data());
          double shift = 0, variance = 0;
          for (int64_t c = 0; c < channels; ++c) shift += mean[c] / channels;
          if (layer.kind == Kind::pool_official)  // the mean over pixels commutes with GroupNorm
            variance = double(stats[3 * b + 2]) / stats[3 * b];
          else
            for (int64_t c = 0; c < channels; ++c) variance += (mean[c] - shift) * (mean[c] - shift) / channels;
          const double rstd = 1.0 / std::sqrt(variance + layer.eps);
          for (int64_t c = 0; c < channels; ++c)
            y[b * channels + c] = T(float((mean[c] - shift) * rstd * gamma[c] + beta[c]));
        }
      });
}

// ---- the chain

// Checks a layer on x, brings its weights into the kernels' layout, and returns its output's shape. All checks are made
// here, as the layers run on other threads, where nothing may throw.
Images prepare(Layer& layer, Images x) {
  const int64_t c = x.channels;
  switch (layer.kind) {
    case Kind::patch_embed: {
      Tensor& w = layer.conv.weight;
      STD_TORCH_CHECK(x.channels_last, "chain_cpp: convolutions are computed in channels_last");
      STD_TORCH_CHECK(w.is_cpu() && w.scalar_type() == x.dtype && w.size(0) > 0 && w.size(1) == c &&
                          kernel_size(w, 2) > 0 && kernel_size(w, 3) > 0,
                      "chain_cpp: a convolution's weight must be a CPU tensor [out, ", c, ", h, w] of x's dtype");
      if (w.dim() != 4 || !w.is_contiguous() || !patch_embed_takes_planar(x, layer.conv))
        w = in_layout(w, w.dim() == 4);
      x.channels = w.size(0);
      x.height = embedded_size(x.height, kernel_size(w, 2), layer.conv);
      x.width = embedded_size(x.width, kernel_size(w, 3), layer.conv);
      STD_TORCH_CHECK(x.height > 0 && x.width > 0, "chain_cpp: x is smaller than a convolution's kernel");
      check_vector(layer.conv.bias, "a convolution's bias", x.channels);
      return x;
    }
    case Kind::pool_mixer:
      check_vector(layer.mixer.weight, "norm1.weight", c);
      check_vector(layer.mixer.bias, "norm1.bias", c);
      check_vector(layer.mixer.layer_scale, "layer_scale_1", c);
      return x;
    case Kind::mlp: {
      MlpArguments& args = *layer.mlp;
      args.w1 = checked_weight(args.w1, "fc1.weight", c);
      args.w2 = checked_weight(args.w2, "fc2.weight", args.w1.size(0));
      STD_TORCH_CHECK(args.w2.size(0) == c && args.w1.scalar_type() == args.w2.scalar_type(),
                      "chain_cpp: fc2.weight must have ", c, " rows and fc1.weight's dtype");
      check_vector(args.b1, "fc1.bias", args.w1.size(0));
      check_vector(args.b2, "fc2.bias", c);
      check_vector(args.norm_weight, "norm2.weight", c);
      check_vector(args.norm_bias, "norm2.bias", c);
      check_vector(args.layer_scale, "layer_scale_2", c);
      return x;
    }
    case Kind::pool_official:
    case Kind::pool_timm:
      check_vector(layer.weight, "norm.weight", c);
      check_vector(layer.bias, "norm.bias", c);
      x.height = x.width = 1;
      x.channels_last = true;
      return x;
  }
  return x;
}

void run(const Layer& layer, const Images& x, const Partials& stats, void* y, float* y_stats) {
  switch (layer.kind) {
    case Kind::patch_embed: return run_patch_embed(x, layer.conv, y, y_stats);
    case Kind::pool_mixer: return run_pool_mixer(x, layer.mixer, stats, y, nullptr, y_stats);
    case Kind::mlp: return run_mlp(x, *layer.mlp, stats, y, nullptr, y_stats, nullptr);
    default: break;
  }
  switch (x.dtype) {
    case ScalarType::Float: return run_pool(x, layer, stats.data, static_cast<float*>(y));
    case ScalarType::BFloat16: return run_pool(x, layer, stats.data, static_cast<BFloat16*>(y));
    default: return run_pool(x, layer, stats.data, static_cast<Half*>(y));
  }
}

int64_t sample_bytes(const Images& x) { return x.elements() / x.batch * x.element_size(); }

// Samples first .. first + count - 1.
Images samples(Images x, int64_t first, int64_t count) {
  x.data = static_cast<char*>(x.data) + first * sample_bytes(x);
  x.batch = count;
  return x;
}

// Layers from one convolution to the next, or to the end. No statistics are handed from one segment to another.
struct Segment {
  const Layer* begin;
  const Layer* end;
  const Images* in;  // the input of each layer, and the last one's output; without data
  int64_t room;      // bytes of the largest activation between its layers, for one sample

  // Layers write to the two buffers in turn, the last one to y. The MLP may write to its own input, whose tiles it
  // reads before it writes them.
  void run(const Images& x, void* y, char* const buffers[2]) const {
    std::vector<float> partials(6 * x.batch);
    float* const sums[] = {partials.data(), partials.data() + 3 * x.batch};
    Partials stats;
    Images now = x;
    for (const Layer* layer = begin; layer < end; ++layer) {
      Images next = in[layer - begin + 1];
      next.batch = x.batch;
      next.data = layer + 1 == end ? y : layer->mlp && now.data != x.data ? now.data : buffers[now.data == buffers[0]];
      float* y_stats = layer + 1 < end && layer[1].normalises() ? sums[stats.data == sums[0]] : nullptr;
      pk::run(*layer, now, stats, next.data, y_stats);
      stats = {y_stats, y_stats ? 1 : 0};
      now = next;
    }
  }
};

Tensor chain(Tensor input, std::vector<Tensor> parameters, std::vector<int64_t> steps, std::vector<double> epsilons,
             bool channels_last) {
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4 && input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0,
                  "chain_cpp: x must be a CPU tensor [B, C, H, W] with channels and pixels");
  dtype_index(input.scalar_type());
  Reader reader{parameters, steps, epsilons};
  std::vector<Layer> layers;
  while (!reader.done()) {
    int64_t present;
    layers.push_back(read_layer(reader, present));
    STD_TORCH_CHECK(present == 0, "chain_cpp: a layer has no such parameters");
  }
  STD_TORCH_CHECK(!layers.empty(), "chain_cpp: steps must hold a layer");
  bool pooled = false;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Kind kind = layers[i].kind;
    STD_TORCH_CHECK(kind == Kind::patch_embed ? layers[i].conv.weight.dim() == (pooled ? 2 : 4) : !pooled,
                    "chain_cpp: linear layers, with weights [out, C], and no others may follow the pooling");
    pooled = pooled || kind == Kind::pool_official || kind == Kind::pool_timm;
    STD_TORCH_CHECK(kind != Kind::pool_official || i > 0, "chain_cpp: the pooling must follow another layer");
  }
  const Tensor x = in_layout(input, channels_last);
  std::vector<Images> shapes{images_of(x, channels_last)};
  for (Layer& layer : layers) {
    shapes.push_back(prepare(layer, shapes.back()));
    if (layer.mlp) layer.mlp->batch = shapes[0].batch;
  }
  STD_TORCH_CHECK(reader.parameter == parameters.size() && reader.epsilon == epsilons.size(),
                  "chain_cpp: there are more parameters or epsilons than the layers take");
  const Images& last = shapes.back();
  const int64_t b = last.batch, c = last.channels, h = last.height, w = last.width;
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  Tensor y = pooled          ? empty({b, c}, {c, 1}, dtype)
             : channels_last ? empty({b, c, h, w}, {c * h * w, 1, w * c, c}, dtype)
                             : empty({b, c, h, w}, {c * h * w, h * w, w, 1}, dtype);
  if (b == 0) return y;

  std::vector<Segment> segments;
  int64_t between = 0;  // bytes a sample of the largest activation between segments
  for (size_t i = 0; i < layers.size();) {
    size_t next = i + 1;
    int64_t room = 0;
    for (; next < layers.size() && layers[next].kind != Kind::patch_embed; ++next)
      room = std::max(room, sample_bytes(shapes[next]));
    segments.push_back({&layers[i], layers.data() + next, &shapes[i], room});
    if (next < layers.size()) between = std::max(between, sample_bytes(shapes[next]));
    i = next;
  }

  // Where samples can be shared out evenly, each thread takes its own through the whole chain, as many at a time as its
  // cache holds: no thread waits for another between layers. Otherwise the threads share every layer.
  const int64_t threads = torch::stable::get_num_threads();
  const bool share_samples = threads == 1 || b % threads == 0 || b >= kSamplesPerThread * threads;
  const int64_t parts = share_samples ? std::min(threads, b) : 1, most = (b + parts - 1) / parts;
  const auto at_once = [&](const Segment& s) {
    return share_samples ? std::clamp<int64_t>(kCacheBytes / std::max<int64_t>(1, s.room), 1, most) : b;
  };
  int64_t room = 0;
  for (const Segment& s : segments) room = std::max(room, at_once(s) * s.room);
  room = (room + 63) / 64 * 64;
  Tensor memory = empty({2 * (b * between + parts * room) + 64}, {1}, aoti_torch_dtype_uint8());
  advise_huge_pages(memory.mutable_data_ptr(), memory.numel());  // the pages stay huge for the next call
  const auto address = (reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + 63) / 64 * 64;
  char* const base = reinterpret_cast<char*>(address);

  const auto run_part = [&](int64_t part) {
    const int64_t first = part * b / parts, count = (part + 1) * b / parts - first;
    char* const between_segments[] = {base + first * between, base + (b + first) * between};
    char* const buffers[] = {base + 2 * b * between + 2 * part * room, base + 2 * b * between + (2 * part + 1) * room};
    Images now = samples(shapes[0], first, count);
    for (size_t i = 0; i < segments.size(); ++i) {
      const Segment& s = segments[i];
      Images next = s.in[s.end - s.begin];
      next.data = y.mutable_data_ptr();
      if (i + 1 == segments.size()) {
        next = samples(next, first, count);
      } else {
        next.data = between_segments[i % 2];
        next.batch = count;
      }
      const int64_t rounds = (count + at_once(s) - 1) / at_once(s);
      for (int64_t r = 0; r < rounds; ++r) {
        const int64_t from = r * count / rounds, size = (r + 1) * count / rounds - from;
        s.run(samples(now, from, size), samples(next, from, size).data, buffers);
      }
      now = next;
    }
  };
  if (parts == 1)
    run_part(0);
  else
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) run_part(part);
    });
  return y;
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(poolformer_kernels, CPU, m) { m.impl("chain_cpp", TORCH_BOX(&pk::chain)); }
