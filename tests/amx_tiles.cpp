// The kernels of the MLP and of the convolution on AMX tiles, emulated (PK_EMULATE_TILES), against those of AVX-512
// with bfloat16: both round the same operands to bfloat16 and sum their products in float32, in another order. For each
// problem, type of x and array a line: problem, type, array, the largest deviation over the largest value, the L2
// deviation over the L2 norm.
//
// Every array has just the size that the launchers give it, so that AddressSanitizer sees what goes beyond one, and is
// NaN before it is written, so that a deviation is NaN where padding is used that was not cleared.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../csrc/cpu/mlp/shared_plan.h"
#include "../csrc/cpu/chain/patch_embed.h"
#include "../csrc/cpu/tuning.h"

namespace {

using pk::kRowsMax;

struct Problem {
  const char* name;
  int64_t batch, pixels, channels, hidden, out;
  bool channels_last, residual, norm, saved;
  pk::Activation activation;
  bool float_weights;   // where x is bfloat16; weights are bfloat16 otherwise
  int64_t weight_gap;   // elements between a weight's rows
  int64_t block_lanes;  // of the backward
  int64_t tokens() const { return batch * pixels; }
};

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- arrays

struct Array {
  int dtype;  // 0 float32, 1 bfloat16
  std::vector<char> bytes;

  Array(int of, int64_t n) : dtype(of), bytes(n * (of ? 2 : 4), char(0xff)) {}  // NaN in both
  void set(int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (!dtype) {
      std::memcpy(&bytes[4 * i], &bits, 4);
      return;
    }
    bits += 0x7fffu + (bits >> 16 & 1);
    const uint16_t upper = bits >> 16;
    std::memcpy(&bytes[2 * i], &upper, 2);
  }
  float get(int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, &bytes[i * (dtype ? 2 : 4)], dtype ? 2 : 4);
    if (dtype) bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  int64_t size() const { return bytes.size() / (dtype ? 2 : 4); }
  void* data() { return bytes.data(); }
};

std::vector<float> floats(const Array& a) {
  std::vector<float> out(a.size());
  for (int64_t i = 0; i < a.size(); ++i) out[i] = a.get(i);
  return out;
}

// n floats or words, NaN
template <class T>
std::vector<T> unwritten(int64_t n) {
  std::vector<T> out(n);
  std::memset(static_cast<void*>(out.data()), 0xff, n * sizeof(T));
  return out;
}

// n words from the beginning of a cache line on, as the launchers' scratch memory, NaN
struct Free {
  void operator()(uint32_t* p) const { std::free(p); }
};
std::unique_ptr<uint32_t, Free> scratch_lines(int64_t n) {
  auto* p = static_cast<uint32_t*>(std::aligned_alloc(64, n * sizeof(uint32_t)));
  std::memset(p, 0xff, n * sizeof(uint32_t));
  return std::unique_ptr<uint32_t, Free>(p);
}

std::mt19937 generator;

Array normal(int dtype, int64_t n, float mean, float sigma) {
  std::normal_distribution<float> value(mean, sigma);
  Array out(dtype, n);
  for (int64_t i = 0; i < n; ++i) out.set(i, value(generator));
  return out;
}

// [rows, cols], rows `step` apart with NaN between them, and nothing after the last one
Array weights(int dtype, int64_t rows, int64_t cols, int64_t step) {
  Array all = normal(dtype, (rows - 1) * step + cols, 0.02f / cols, 1 / std::sqrt(float(cols))), out(dtype, all.size());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) out.set(r * step + c, all.get(r * step + c));
  return out;
}

// A parameter as the launchers pad it.
std::vector<float> parameter(int64_t n, float mean, float sigma) {
  std::vector<float> out = floats(normal(0, n, mean, sigma));
  out.resize((n + kRowsMax + 15) / 16 * 16, 0.0f);
  return out;
}

// ---- a problem's inputs

struct Inputs {
  Array x, grad, w1, w2, saved;
  std::vector<float> b1, b2, gamma, beta, scale, mean, rstd, drop;

  Inputs(const Problem& q, int io)
      : x(normal(io, q.tokens() * q.channels, -2.3f, 0.5f)),
        grad(normal(io, q.tokens() * q.out, 0.3f, 1)),
        w1(weights(weight_dtype(q, io), q.hidden, q.channels, q.channels + q.weight_gap)),
        w2(weights(weight_dtype(q, io), q.out, q.hidden, q.hidden + q.weight_gap)),
        saved(1, q.saved ? q.tokens() * q.hidden : 0),
        b1(parameter(q.hidden, 0.2f, 0.5f)),
        b2(parameter(q.out, -0.1f, 0.5f)),
        gamma(parameter(q.channels, 0.9f, 0.3f)),
        beta(parameter(q.channels, 0.2f, 0.5f)),
        scale(parameter(q.out, 0.1f, 0.4f)),
        mean(parameter(q.batch, -2.3f, 0.01f)),
        rstd(parameter(q.batch, 2, 0.01f)),
        drop(parameter(q.batch, 1.25f, 0)) {
    if (q.batch > 2) drop[1] = 0;
  }
  static int weight_dtype(const Problem& q, int io) { return io == 1 && q.float_weights ? 0 : 1; }

  pk::MlpParams params(const Problem& q) {
    pk::MlpParams p{};
    p.batch = q.batch, p.channels = q.channels, p.hidden = q.hidden, p.out = q.out, p.pixels = q.pixels;
    p.tokens = q.tokens();
    p.channels_last = q.channels_last, p.residual = q.residual, p.norm = q.norm;
    p.activation = q.activation;
    p.x = x.data();
    p.saved = q.saved ? saved.data() : nullptr;
    p.w1 = {w1.data(), q.channels + q.weight_gap, w1.dtype};
    p.w2 = {w2.data(), q.hidden + q.weight_gap, w2.dtype};
    p.b1 = b1.data(), p.b2 = b2.data(), p.gamma = gamma.data(), p.beta = beta.data(), p.scale = scale.data();
    p.mean = mean.data(), p.rstd = rstd.data(), p.drop = drop.data();
    return p;
  }
};

using Results = std::vector<std::pair<std::string, std::vector<float>>>;

// ---- what the launchers (mlp/forward.cpp, mlp/backward.cpp) do, in one thread

Results forward(const pk::MlpKernels& kernels, const Problem& q, Inputs& in) {
  pk::MlpParams p = in.params(q);
  Array y(in.x.dtype, p.tokens * p.out);
  std::vector<float> moments = unwritten<float>(2 * p.tokens);
  p.y = y.data();
  p.token_moments = moments.data();
  const int64_t vectors = (p.tokens + 15) / 16, tiles = (vectors * 16 + pk::kTileTokens - 1) / pk::kTileTokens;
  p.lanes = (vectors + tiles - 1) / tiles * 16;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = i * vectors / tiles * 16, last = (i + 1) * vectors / tiles * 16;
    auto scratch = unwritten<uint32_t>(kernels.forward_scratch(p));
    kernels.forward(p, first, std::min(last, p.tokens) - first, scratch.data());
  }
  Results results{{"y", floats(y)}, {"saved", floats(in.saved)}, {"token_moments", moments}};

  // And as it is done where tokens are few: threads share the weights, or parts of the hidden channels in one tile.
  p.lanes = vectors * 16;
  if (kernels.shared_forward) {
    const pk::SharedForwardKernels& shared = *kernels.shared_forward;
    const std::vector<char> tiled = y.bytes;
    const std::vector<float> tiled_moments = moments;
    const std::vector<char> tiled_saved = in.saved.bytes;
    if (q.saved) std::memset(in.saved.data(), 0xff, in.saved.bytes.size());
    std::memset(y.data(), 0xff, y.bytes.size());
    std::fill(moments.begin(), moments.end(), NAN);
    auto operands = scratch_lines(shared.words(p));
    p.shared = operands.get();
    const auto step = [&](const auto& kernel, int64_t size, int64_t of_item) {
      for (int64_t i = (size + of_item - 1) / of_item; i-- > 0;) kernel(p, i, scratch_lines(shared.scratch(p)).get());
    };
    step(shared.input, p.tokens, pk::kSharedTokens);
    step(shared.hidden, p.hidden, pk::kSharedHidden);
    step(shared.output, p.out, pk::kSharedOutput);
    step(shared.moments, p.tokens, pk::kSharedTokens);
    if (tiled != y.bytes || tiled_saved != in.saved.bytes ||
        std::memcmp(tiled_moments.data(), moments.data(), 4 * moments.size()) != 0) {
      std::fprintf(stderr, "%s: few tokens have other bits than the same tokens in tiles\n", q.name);
      std::exit(1);
    }
    results.emplace_back("y_of_few", floats(y));
    results.emplace_back("token_moments_of_few", moments);
    return results;
  }
  p.parts = pk::kParts;
  auto sums = unwritten<float>(p.parts * rounded_up(p.out, kRowsMax) * p.lanes);
  p.part_sums = sums.data();
  std::memset(y.data(), 0xff, y.bytes.size());
  std::fill(moments.begin(), moments.end(), NAN);
  for (int64_t part = 0; part < p.parts; ++part) {
    auto scratch = unwritten<uint32_t>(kernels.forward_scratch(p));
    kernels.forward_part(p, part, scratch.data());
  }
  for (int64_t first = 0; first < p.tokens; first += 48) {
    auto scratch = unwritten<uint32_t>(kernels.forward_scratch(p));
    kernels.forward_join(p, first, std::min<int64_t>(48, p.tokens - first), scratch.data());
  }
  results.emplace_back("y_of_few", floats(y));
  results.emplace_back("token_moments_of_few", moments);
  return results;
}

// With tokens as rows, in panels of `most` tokens, whose tiles have fewer than 16 rows unless it is a multiple of 32.
Results forward_by_rows(const pk::MlpKernels& kernels, const Problem& q, Inputs& in, int64_t most) {
  pk::MlpParams p = in.params(q);
  p.saved = nullptr;
  Array y(in.x.dtype, p.tokens * p.out);
  std::vector<float> moments = unwritten<float>(2 * p.tokens);
  p.y = y.data();
  p.token_moments = moments.data();
  auto packed = unwritten<uint32_t>(kernels.rows_packed(p));
  for (int64_t item = 0; item < kernels.rows_items(p); ++item) kernels.rows_pack(p, item, packed.data());
  p.packed = packed.data();
  p.lanes = most;
  for (int64_t first = 0; first < p.tokens; first += most) {
    auto scratch = unwritten<uint32_t>(kernels.rows_scratch(p));
    kernels.rows_forward(p, first, std::min(most, p.tokens - first), scratch.data());
  }
  return {{"y_of_rows", floats(y)}, {"token_moments_of_rows", moments}};
}

// Rows of n floats, without the padding of each.
std::vector<float> dense(const std::vector<float>& padded, int64_t rows, int64_t n) {
  std::vector<float> out;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = padded.data() + r * rounded_up(n, 16);
    out.insert(out.end(), row, row + n);
  }
  return out;
}

Results backward(const pk::MlpKernels& kernels, const Problem& q, Inputs& in) {
  pk::MlpBackwardParams p{in.params(q)};
  p.grad = in.grad.data();
  p.parameter_grads = p.drop_grad = true;
  p.lanes = pk::kBackwardTileTokens, p.input_lanes = 192;
  p.block_lanes = q.block_lanes;
  const int64_t block = p.block_lanes, per = kernels.operand_per, slack = 64, rows = rounded_up(p.hidden, kRowsMax);
  const int64_t wide_in = rounded_up(p.channels, kRowsMax), wide_out = rounded_up(p.out, kRowsMax);
  auto n = unwritten<uint32_t>((wide_in / per + slack) * block),
       g = unwritten<uint32_t>((wide_out / per + slack) * block);
  auto dh = unwritten<uint32_t>((rows / per + slack) * block);
  auto x_tokens = unwritten<uint32_t>(block / per * p.channels + slack);
  auto g_tokens = unwritten<uint32_t>(block / per * p.out + slack);
  auto w1t = unwritten<uint32_t>(wide_in * (rows / per + slack));
  auto drop_lanes = unwritten<float>(block), drop_rows = unwritten<float>((1 + rows / kRowsMax) * block);
  auto e = unwritten<float>(p.tokens * p.channels), g_p = unwritten<float>(rows * wide_out);
  auto x_dh = unwritten<float>(rows * wide_in), g_sums = unwritten<float>((block / p.lanes + 1) * p.out);
  std::vector<float> db1(rows), t(wide_out), drops(p.tokens);
  Array dw1(in.w1.dtype, p.hidden * p.channels), dw2(in.w2.dtype, p.out * p.hidden);
  auto db2 = unwritten<float>(p.out), dscale = db2, dgamma = unwritten<float>(p.channels), dbeta = dgamma;
  p.n = n.data(), p.g = g.data(), p.dh = dh.data(), p.x_tokens = x_tokens.data(), p.g_tokens = g_tokens.data();
  p.w1t = w1t.data(), p.drop_lanes = drop_lanes.data(), p.drop_rows = drop_rows.data(), p.e = e.data();
  p.g_p = g_p.data(), p.x_dh = x_dh.data(), p.db1 = db1.data(), p.t = t.data();
  p.dw1 = dw1.data(), p.dw2 = dw2.data(), p.db2 = db2.data(), p.dscale = dscale.data();
  p.dgamma = dgamma.data(), p.dbeta = dbeta.data();
  const auto scratch = [&] { return unwritten<uint32_t>(kernels.backward_scratch(p)); };

  for (int64_t c = 0; c < p.channels; c += kRowsMax) kernels.pack_input(p, c, std::min(p.channels, c + kRowsMax));
  for (int64_t first = 0; first < p.tokens; first += block) {
    const int64_t count = std::min(block, p.tokens - first);
    const auto tiles = [&](int64_t lanes, const auto& f) {
      for (int64_t lane = 0; lane < block; lane += lanes)
        f(lane, std::min(lanes, block - lane), std::max<int64_t>(0, std::min(lanes, count - lane)));
    };
    tiles(p.lanes, [&](int64_t lane, int64_t lanes, int64_t tokens) {
      kernels.prepare(p, first + lane, tokens, lane, lanes, g_sums.data() + lane / p.lanes * p.out, scratch().data());
    });
    for (int64_t i = 0; i * p.lanes < count; ++i)
      for (int64_t c = 0; c < p.out; ++c) t[c] += g_sums[i * p.out + c];
    for (int64_t row = 0; row < p.hidden; row += kRowsMax) kernels.hidden(p, row, first, count, scratch().data());
    p.add = true;
    tiles(p.input_lanes, [&](int64_t lane, int64_t lanes, int64_t tokens) {
      if (tokens > 0) kernels.input(p, first + lane, tokens, lane, lanes, scratch().data());
    });
    for (int64_t i = 0; i <= rows / kRowsMax; ++i)
      for (int64_t l = 0; l < count; ++l) drops[first + l] += drop_rows[i * block + l];
  }
  for (int64_t i = 0; i < kernels.weight_items(p); ++i) kernels.weights(p, i);
  t.resize(p.out), db1.resize(p.hidden);
  return {{"e", e},
          {"g_p", dense(g_p, p.hidden, p.out)},
          {"x_dh", dense(x_dh, p.hidden, p.channels)},
          {"db1", db1},
          {"t", t},
          {"drop_terms", drops},
          {"dw1", floats(dw1)},
          {"dw2", floats(dw2)},
          {"db2", db2},
          {"dgamma", dgamma},
          {"dbeta", dbeta},
          {"dscale", dscale}};
}

// ---- the convolution, as its launcher (chain/patch_embed.cpp) calls it, in one thread

struct Convolution {
  const char* name;
  int64_t batch, channels, height, width, out, kernel_h, kernel_w, stride, padding;
  bool rows;  // whether tokens are rows on the tiles
};

struct ConvolutionInputs {
  Array x, w, planar;  // the weight also as [out, C, kernel_h, kernel_w]
  std::vector<float> bias;

  ConvolutionInputs(const Convolution& q, bool infinite)
      : x(normal(1, q.batch * q.height * q.width * q.channels, -2.3f, 0.5f)),
        w(weights(1, q.out, q.kernel_h * q.kernel_w * q.channels, q.kernel_h * q.kernel_w * q.channels)),
        planar(1, w.size()),
        bias(parameter(q.out, 0.2f, 0.5f)) {
    const int64_t taps = q.kernel_h * q.kernel_w;
    for (int64_t i = 0; i < w.size(); ++i) {
      const int64_t row = i / (taps * q.channels), tap = i / q.channels % taps, c = i % q.channels;
      planar.set((row * q.channels + c) * taps + tap, w.get(i));
    }
    if (infinite) {
      x.set(x.size() / 2, INFINITY);
      x.set(x.size() - 1, -INFINITY);
      x.set(0, NAN);
    }
  }
};

pk::PatchEmbedParams params_of(const Convolution& q, ConvolutionInputs& in, bool planar, Array& y) {
  pk::PatchEmbedParams p{};
  p.batch = q.batch, p.channels = q.channels, p.height = q.height, p.width = q.width;
  p.out = q.out, p.kernel_h = q.kernel_h, p.kernel_w = q.kernel_w, p.stride = q.stride, p.padding = q.padding;
  p.out_h = (q.height + 2 * q.padding - q.kernel_h) / q.stride + 1;
  p.out_w = (q.width + 2 * q.padding - q.kernel_w) / q.stride + 1;
  p.tokens = p.batch * p.out_h * p.out_w;
  p.x = in.x.data();
  p.w = {(planar ? in.planar : in.w).data(), p.patch_size(), 1};
  p.planar_w = planar;
  p.bias = in.bias.data();
  y = Array(1, p.tokens * p.out);
  p.y = y.data();
  return p;
}

// y, with infinities and NaN as numbers that no other value has, and the mean and variance of each sample.
Results convolution_results(const Array& y, const std::vector<double>& sums, int64_t batch) {
  std::vector<float> values = floats(y), moments;
  for (float& v : values) v = std::isnan(v) ? 64.0f : std::isinf(v) ? std::copysign(128.0f, v) : v;
  for (int64_t b = 0; b < batch; ++b) {
    const double mean = sums[3 * b + 1] / sums[3 * b], variance = sums[3 * b + 2] / sums[3 * b] - mean * mean;
    for (const double v : {mean, variance}) moments.push_back(std::isfinite(v) ? v : 64.0);
  }
  return {{"embedded", values}, {"embedded_moments", moments}};
}

// Adds n values of that mean and that sum of squares around it.
void add_moments(double* sums, double n, double mean, double m2) {
  sums[0] += n, sums[1] += n * mean, sums[2] += m2 + n * mean * mean;
}

// Groups of rows in runs of `at_once`, as threads share them.
Results convolved(const pk::PatchEmbedKernels& kernels, const Convolution& q, ConvolutionInputs& in, int64_t at_once) {
  Array y(1, 0);
  pk::PatchEmbedParams p = params_of(q, in, false, y);
  p.group = pk::kEmbedRows;
  std::vector<float> moments = unwritten<float>(2 * p.tokens * p.groups());
  p.token_moments = moments.data();
  const int64_t vectors = (p.tokens + 15) / 16,
                most = std::clamp<int64_t>(pk::kCacheBytes / (2 * p.patch_size()) / 16, 3, pk::kTileTokens / 16);
  const int64_t tiles = (vectors + most - 1) / most;
  p.lanes = (vectors + tiles - 1) / tiles * 16;
  for (int64_t i = 0; i < tiles; ++i)
    for (int64_t g = 0; g < p.groups(); g += at_once) {
      const int64_t first = i * vectors / tiles * 16, last = (i + 1) * vectors / tiles * 16;
      auto scratch = unwritten<uint32_t>(kernels.scratch(p));
      kernels.forward(p, first, std::min(last, p.tokens) - first, g, std::min(g + at_once, p.groups()), scratch.data());
    }
  std::vector<double> sums(3 * p.batch);
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t g = 0; g < p.groups(); ++g)
      add_moments(&sums[t / (p.out_h * p.out_w) * 3], std::min(p.group, p.out - g * p.group),
                  moments[2 * (g * p.tokens + t)], moments[2 * (g * p.tokens + t) + 1]);
  return convolution_results(y, sums, p.batch);
}

// Rows of y and blocks of channels in runs of so many.
Results convolved_by_rows(const pk::PatchEmbedKernels& kernels, const Convolution& q, ConvolutionInputs& in,
                          bool planar, int64_t rows_at_once, int64_t blocks_at_once) {
  Array y(1, 0);
  pk::PatchEmbedParams p = params_of(q, in, planar, y);
  const int64_t rows = p.batch * p.out_h, runs = kernels.row_runs(p), parts = runs * p.blocks();
  std::vector<float> moments = unwritten<float>(3 * rows * parts);
  p.run_moments = moments.data();
  for (int64_t r = 0; r < rows; r += rows_at_once)
    for (int64_t b = 0; b < p.blocks(); b += blocks_at_once) {
      const auto scratch = scratch_lines(kernels.rows_scratch(p));
      kernels.rows(p, r, std::min(rows, r + rows_at_once), b, std::min(p.blocks(), b + blocks_at_once), scratch.get());
    }
  std::vector<double> sums(3 * p.batch);
  for (int64_t i = 0; i < rows * parts; ++i)
    add_moments(&sums[i / (p.out_h * parts) * 3], moments[3 * i], moments[3 * i + 1], moments[3 * i + 2]);
  return convolution_results(y, sums, p.batch);
}

// ---- deviations

void print(const char* name, const char* type, const Results& actual, const Results& expected) {
  for (size_t i = 0; i < actual.size(); ++i) {
    double largest = 0, most = 0, squares = 0, norm = 0;
    for (size_t j = 0; j < actual[i].second.size(); ++j) {
      const double value = expected[i].second[j], off = actual[i].second[j] - value;
      largest = std::max(largest, std::abs(off));
      most = std::max(most, std::abs(value));
      squares += off * off;  // NaN stays in it
      norm += value * value;
    }
    if (actual[i].second.empty()) continue;
    const double l2 = std::sqrt(squares / norm);
    std::printf("%s %s %s %g %g\n", name, type, actual[i].first.c_str(), std::isnan(l2) ? l2 : largest / most, l2);
  }
}

}  // namespace

int main() {
  using enum pk::Activation;
  const Problem problems[] = {
      // batch, pixels, channels, hidden, out; channels_last, residual, norm, saved
      {"c64", 2, 49, 64, 256, 64, false, true, true, false, gelu, false, 0, 128},
      {"c96_last", 3, 75, 96, 384, 96, true, true, true, false, gelu, false, 0, 128},
      {"c17", 3, 37, 17, 70, 17, false, true, true, true, silu, false, 0, 64},
      {"c33_out50_last", 2, 53, 33, 300, 50, true, false, false, true, relu, true, 0, 128},
      {"c33_out7", 5, 50, 33, 132, 7, false, false, true, false, gelu_tanh, true, 3, 96},
      {"c64_strided", 4, 30, 64, 256, 96, false, false, true, false, gelu, false, 8, 128},
      {"c64_odd_step_last", 1, 31, 64, 70, 64, true, true, false, true, gelu, false, 1, 32},
      {"c320_last", 1, 196, 320, 1280, 320, true, true, true, true, gelu, false, 0, 128},
      {"unequal_parts", 1, 33, 32, 2656, 32, false, true, true, false, gelu, false, 0, 64},
      {"one_token", 1, 1, 96, 300, 96, true, true, true, false, gelu, false, 0, 32},
      {"short_block_last", 2, 163, 64, 256, 64, true, true, true, true, gelu, false, 0, 320},
      {"c64_rows", 3, 45, 64, 256, 64, true, true, true, false, gelu, true, 0, 128},
      {"c64_hidden96_rows", 2, 33, 64, 96, 64, true, false, true, false, silu, false, 8, 96},
      {"c32_out160_rows", 2, 41, 32, 160, 160, true, false, false, false, gelu, false, 0, 96},
      {"c128_rows", 2, 57, 128, 768, 128, true, true, true, false, relu_squared, false, 0, 128},
      {"short_block", 2, 163, 64, 256, 64, false, true, true, false, silu, true, 0, 320},
  };
  for (const Problem& q : problems)
    for (const int io : {1, 0}) {
      Inputs in(q, io);
      const pk::MlpKernels &tiles = pk::mlp_amx[io == 1 ? 0 : 1], &vectors = pk::mlp_avx512_bf16[io == 1 ? 1 : 3];
      const char* type = io == 1 ? "bfloat16" : "float32";
      const Results actual = forward(tiles, q, in);
      const Results expected = forward(vectors, q, in);
      print(q.name, type, actual, expected);  // in.saved is now that of the vectors, for both
      if (q.channels_last && q.channels % 32 + q.hidden % 32 + q.out % 32 == 0)
        for (const int64_t most : {50, 64, 224})
          print(q.name, type, forward_by_rows(tiles, q, in, most), {expected[0], expected[2]});
      const Results gradients = backward(tiles, q, in);
      print(q.name, type, gradients, backward(vectors, q, in));
    }
  const Convolution convolutions[] = {
      // batch, channels, height, width, out, kernel_h, kernel_w, stride, padding; rows
      {"stem", 2, 3, 30, 29, 64, 7, 7, 4, 2, true},
      {"stem_wide", 1, 3, 17, 131, 70, 7, 7, 4, 2, true},
      {"down_c64", 3, 64, 13, 14, 128, 3, 3, 2, 1, true},
      {"down_c320", 3, 320, 14, 14, 96, 3, 3, 2, 1, true},
      {"narrow", 5, 32, 17, 8, 40, 3, 3, 2, 1, true},
      {"in_parts", 3, 320, 14, 12, 300, 3, 3, 2, 1, true},
      {"in_strips", 1, 3, 530, 340, 7, 7, 7, 4, 2, true},
      {"wide", 1, 32, 6, 70, 33, 3, 5, 1, 2, true},
      {"gaps", 2, 32, 40, 43, 32, 2, 2, 5, 0, true},
      {"c33_out100", 1, 33, 12, 17, 100, 5, 3, 2, 2, true},
      {"c17_out7", 2, 17, 9, 11, 7, 3, 3, 1, 1, true},
      {"c32_many_tiles", 1, 32, 21, 23, 33, 3, 3, 1, 0, true},
      {"c1_out1", 3, 1, 8, 8, 1, 1, 1, 3, 0, false},
      {"linear", 5, 96, 1, 1, 70, 1, 1, 1, 0, false},
      {"beyond_the_image", 2, 32, 3, 2, 40, 7, 7, 4, 3, false},
      {"rows_beyond_the_image", 2, 32, 9, 9, 40, 7, 7, 1, 6, true},
  };
  const pk::PatchEmbedKernels &tiles = pk::patch_embed_amx[0], &vectors = pk::patch_embed_avx512_bf16[1];
  for (const Convolution& q : convolutions)
    for (const bool infinite : {false, true}) {
      const std::string name = std::string(q.name) + (infinite ? "_infinite" : "");
      ConvolutionInputs in(q, infinite);
      const Results expected = convolved(vectors, q, in, 8);
      print(name.c_str(), "bfloat16", convolved(tiles, q, in, 8), expected);
      print(name.c_str(), "bfloat16", convolved(tiles, q, in, 1), expected);
      Array y(1, 0);
      if ((tiles.row_runs(params_of(q, in, false, y)) > 0) != q.rows) return std::printf("%s: other form\n", q.name), 1;
      if (!q.rows) continue;
      Results first;
      for (const int64_t rows : {1, 3, 1000})
        for (const bool planar : {false, true}) {
          const Results by_rows = convolved_by_rows(tiles, q, in, planar, rows, planar ? 1 : 8);
          print(name.c_str(), "bfloat16", by_rows, expected);
          print(name.c_str(), "bfloat16", convolved_by_rows(vectors, q, in, planar, rows, planar ? 8 : 2), expected);
          if (first.empty()) first = by_rows;
          if (first != by_rows) return std::printf("%s: other bits\n", q.name), 1;
        }
    }
}
