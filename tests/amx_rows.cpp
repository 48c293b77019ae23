// The MLP's backward with tokens as rows (csrc/cpu/mlp/rows_backward_params.h) on AMX tiles, emulated
// (PK_EMULATE_TILES), against the formulas of docs/algebra.md in double precision, of weights rounded to bfloat16. For
// each problem, with x and weights of either type, and gradient a line: problem, gradient, the L2 deviation over the L2
// norm, and whether it is bitwise the same when the items of the call are taken in another order, as by more threads.
//
// Every array is an allocation of its own, so that AddressSanitizer sees what goes beyond one, and is NaN before it is
// written, so that a deviation is NaN where padding is used that was not cleared.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../csrc/cpu/mlp/mlp.h"
#include "../csrc/cpu/mlp/rows_backward_plan.h"

namespace {

struct Problem {
  const char* name;
  int64_t batch, pixels, channels, hidden;
  bool norm, residual, dropped, parameter_grads;
  int64_t weight_gap, block_tokens;  // elements between a weight's rows; 0: as planned
  int64_t tokens() const { return batch * pixels; }
};

std::mt19937 generator;

std::vector<float> normal(int64_t n, float mean, float sigma) {
  std::normal_distribution<float> value(mean, sigma);
  std::vector<float> out(n);
  for (float& v : out) v = value(generator);
  return out;
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
// Elements of float32 or bfloat16, at first all NaN.
class Tensor {
 public:
  Tensor(bool floats, int64_t n) : floats_(floats), words_(floats ? n : 0, NAN), halves_(floats ? 0 : n, 0xffff) {}
  Tensor(bool floats, const std::vector<float>& values) : Tensor(floats, values.size()) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  void set(int64_t i, float v) {
    if (floats_)
      words_[i] = v;
    else
      halves_[i] = to_bf16(v);
  }
  double operator[](int64_t i) const { return floats_ ? words_[i] : from_bf16(halves_[i]); }
  int64_t size() const { return floats_ ? words_.size() : halves_.size(); }
  int dtype() const { return floats_ ? 0 : 1; }
  void* data() { return floats_ ? static_cast<void*>(words_.data()) : halves_.data(); }
  const void* data() const { return const_cast<Tensor*>(this)->data(); }

 private:
  bool floats_;
  std::vector<float> words_;
  std::vector<uint16_t> halves_;
};
// [rows, cols], rows `cols + gap` apart with NaN between them, and nothing after the last one
Tensor weights(bool floats, int64_t rows, int64_t cols, int64_t gap) {
  Tensor out(floats, (rows - 1) * (cols + gap) + cols);
  const std::vector<float> all = normal(rows * cols, 0.02f / cols, 1 / std::sqrt(float(cols)));
  for (int64_t i = 0; i < rows * cols; ++i) out.set(i / cols * (cols + gap) + i % cols, all[i]);
  return out;
}
std::vector<float> parameter(int64_t n, float mean, float sigma) {
  std::vector<float> out = normal(n, mean, sigma);
  out.resize((n + pk::kRowsMax + 15) / 16 * 16, 0.0f);
  return out;
}

struct Inputs {
  Tensor x, g, w1, w2;
  std::vector<float> b1, b2, gamma, beta, scale, mean, rstd, drop;

  Inputs(const Problem& q, bool floats, bool float_weights)
      : x(floats, normal(q.tokens() * q.channels, -2.3f, 0.5f)),
        g(floats, normal(q.tokens() * q.channels, 0.3f, 1)),
        w1(weights(float_weights, q.hidden, q.channels, q.weight_gap)),
        w2(weights(float_weights, q.channels, q.hidden, q.weight_gap)),
        b1(parameter(q.hidden, 0.2f, 0.5f)),
        b2(parameter(q.channels, -0.1f, 0.5f)),
        gamma(parameter(q.channels, q.norm ? 0.9f : 1, q.norm ? 0.3f : 0)),
        beta(parameter(q.channels, q.norm ? 0.2f : 0, q.norm ? 0.5f : 0)),
        scale(parameter(q.channels, 0.1f, 0.4f)),
        mean(parameter(q.batch, -2.3f, 0.01f)),
        rstd(parameter(q.batch, 2, 0.01f)),
        drop(parameter(q.batch, q.dropped ? 1.25f : 1, 0)) {
    if (q.dropped) drop[q.batch / 2] = 0;
  }
};

using Results = std::vector<std::pair<std::string, std::vector<double>>>;

// ---- the kernels

// Hands out arrays that are NaN and end where they should.
struct Arrays {
  std::vector<std::unique_ptr<void, void (*)(void*)>> all;
  uint32_t* words(int64_t n) {
    void* p = std::aligned_alloc(64, (n * 4 + 63) / 64 * 64);
    std::memset(p, 0xff, (n * 4 + 63) / 64 * 64);
    all.emplace_back(p, std::free);
    return static_cast<uint32_t*>(p);
  }
  float* floats(int64_t n) { return reinterpret_cast<float*>(words(n)); }
};

Results rows_backward(const pk::RowsBackwardKernels& kernels, const Problem& q, const Inputs& in, int64_t threads) {
  pk::RowsBackwardParams p{};
  p.batch = q.batch, p.channels = p.out = q.channels, p.hidden = q.hidden, p.pixels = q.pixels, p.tokens = q.tokens();
  p.channels_last = true, p.residual = q.residual, p.norm = q.norm, p.activation = pk::Activation::gelu;
  p.x = in.x.data(), p.grad = in.g.data();
  p.floats = in.x.dtype() == 0;
  p.w1 = {in.w1.data(), q.channels + q.weight_gap, in.w1.dtype()};
  p.w2 = {in.w2.data(), q.hidden + q.weight_gap, in.w2.dtype()};
  p.b1 = in.b1.data(), p.b2 = in.b2.data(), p.gamma = in.gamma.data(), p.beta = in.beta.data();
  p.scale = in.scale.data(), p.mean = in.mean.data(), p.rstd = in.rstd.data(), p.drop = in.drop.data();
  p.parameter_grads = q.parameter_grads;
  Tensor dx(p.floats, in.x.size()), dw1(in.w1.dtype() == 0, q.hidden * q.channels), dw2 = dw1;
  std::vector<float> db1(q.hidden, NAN), db2(q.channels, NAN), dgamma = db2, dbeta = db2, dscale = db2;
  p.dx = dx.data(), p.dw1 = dw1.data(), p.dw2 = dw2.data(), p.db1_out = db1.data(), p.db2 = db2.data();
  p.dgamma = dgamma.data(), p.dbeta = dbeta.data(), p.dscale = dscale.data();
  pk::plan_rows_backward(p, q.block_tokens);
  Arrays arrays;
  pk::take_rows_backward(arrays, p);
  const int64_t scratch = kernels.scratch(p);
  const auto each = [&](int64_t count, const auto& f) {
    for (int64_t i = 0; i < count; ++i) {
      Arrays own;
      f(threads == 1 ? i : count - 1 - i, own.words(scratch));
    }
  };
  pk::RowsBackwardRun(kernels, p, threads, each)();

  const auto plain = [](const Tensor& v) {
    std::vector<double> out;
    for (int64_t i = 0; i < v.size(); ++i) out.push_back(v[i]);
    return out;
  };
  const auto wide = [](const std::vector<float>& v) { return std::vector<double>(v.begin(), v.end()); };
  Results results{{"dx", plain(dx)}};
  if (!q.parameter_grads) return results;
  results.insert(results.end(), {{"dw1", plain(dw1)}, {"db1", wide(db1)}, {"dw2", plain(dw2)}, {"db2", wide(db2)}});
  results.insert(results.end(), {{"dgamma", wide(dgamma)}, {"dbeta", wide(dbeta)}, {"dscale", wide(dscale)}});
  return results;
}

// ---- the formulas

Results formulas(const Problem& q, const Inputs& in) {
  const int64_t C = q.channels, H = q.hidden;
  std::vector<double> dx(in.x.size()), dw1(H * C), db1(H), dw2(C * H), db2(C), dgamma(C), dbeta(C), dscale(C);
  std::vector<double> w1(H * C), w2(C * H), hat(C), n(C), g(C), o(C), e(C), slope(H), p(H);
  for (int64_t j = 0; j < H; ++j)
    for (int64_t c = 0; c < C; ++c) {
      w1[j * C + c] = from_bf16(to_bf16(in.w1[j * (C + q.weight_gap) + c]));
      w2[j * C + c] = from_bf16(to_bf16(in.w2[c * (H + q.weight_gap) + j]));  // transposed
    }
  for (int64_t b = 0; b < q.batch; ++b) {
    const double d = in.drop[b], mean = q.norm ? in.mean[b] : 0, rstd = q.norm ? in.rstd[b] : 1;
    double sum = 0, product = 0;
    const int64_t begin = b * q.pixels * C, end = begin + q.pixels * C;
    for (int64_t row = begin; row < end; row += C) {
      for (int64_t c = 0; c < C; ++c) {
        hat[c] = (in.x[row + c] - mean) * rstd;
        n[c] = hat[c] * in.gamma[c] + in.beta[c];
        g[c] = in.g[row + c] * d;
        db2[c] += g[c] * in.scale[c];
        o[c] = in.b2[c];
        e[c] = 0;
      }
      for (int64_t j = 0; j < H; ++j) {
        double h = in.b1[j], dp = 0;
        for (int64_t c = 0; c < C; ++c) h += n[c] * w1[j * C + c], dp += g[c] * in.scale[c] * w2[j * C + c];
        const double phi = 0.5 * std::erfc(-h / std::sqrt(2.0)), density = std::exp(-h * h / 2) / std::sqrt(2 * M_PI);
        const double value = h * phi, dh = dp * (phi + h * density);
        db1[j] += dh;
        for (int64_t c = 0; c < C; ++c) {
          o[c] += value * w2[j * C + c];
          dw2[c * H + j] += g[c] * in.scale[c] * value;
          dw1[j * C + c] += dh * n[c];
          e[c] += dh * w1[j * C + c];
        }
      }
      for (int64_t c = 0; c < C; ++c) {
        dscale[c] += g[c] * o[c];
        dgamma[c] += e[c] * hat[c];
        dbeta[c] += e[c];
        dx[row + c] = e[c] * in.gamma[c];
        sum += dx[row + c];
        product += dx[row + c] * hat[c];
      }
    }
    const double size = end - begin;
    for (int64_t i = begin; i < end; ++i) {
      const double normed = (in.x[i] - mean) * rstd;
      if (q.norm) dx[i] = rstd * (dx[i] - sum / size - normed * product / size);
      if (q.residual) dx[i] += in.g[i];
    }
  }
  return {{"dx", dx},   {"dw1", dw1},       {"db1", db1},     {"dw2", dw2},
          {"db2", db2}, {"dgamma", dgamma}, {"dbeta", dbeta}, {"dscale", dscale}};
}

}  // namespace

namespace pk {
extern const MlpKernels mlp_amx[2];
}

int main() {
  const Problem problems[] = {
      // batch, pixels, channels, hidden; norm, residual, dropped, parameter_grads; weight_gap, block_tokens
      {"c64", 2, 163, 64, 256, true, true, false, true, 0, 0},
      {"c64_blocks", 2, 163, 64, 256, true, true, true, true, 0, 64},
      {"c32_blocks_rest", 3, 37, 32, 96, true, false, false, true, 7, 32},
      {"c96_small_samples", 45, 3, 96, 64, true, true, true, true, 0, 96},
      {"c128_plain", 1, 100, 128, 512, false, false, false, true, 0, 0},
      {"c128_frozen", 2, 50, 128, 512, true, true, true, false, 8, 32},
      {"c224_blocks", 1, 130, 224, 160, false, true, false, true, 0, 64},
      {"c256", 2, 33, 256, 352, true, true, true, true, 0, 0},
      {"c320_blocks", 3, 49, 320, 1280, true, true, false, true, 32, 64},
      {"c320_frozen", 1, 47, 320, 96, true, false, false, false, 0, 32},
      {"c416", 1, 49, 416, 96, true, true, false, true, 0, 0},
      {"c352_blocks", 2, 37, 352, 64, true, false, false, true, 1, 32},
      {"c416_blocks", 2, 37, 416, 64, true, true, true, true, 1, 32},
      {"one_token", 1, 1, 64, 512, true, true, false, true, 0, 0},
      {"long_sample", 2, 321, 32, 32, true, true, true, true, 0, 64},
  };
  for (int kind = 0; kind < 4; ++kind)
    for (const Problem& q : problems) {
      // One token's dscale is a single term that may cancel: of bfloat16 too, other draws exceed its bound.
      if (kind && q.tokens() == 1) continue;
      const Inputs in(q, kind & 1, kind & 2);
      const pk::RowsBackwardKernels& kernels = *pk::mlp_amx[kind & 1].rows_backward;
      const Results actual = rows_backward(kernels, q, in, 1), other = rows_backward(kernels, q, in, 3),
                    exact = formulas(q, in);
      for (size_t i = 0; i < actual.size(); ++i) {
        double squares = 0, norm = 0;
        for (size_t k = 0; k < exact[i].second.size(); ++k) {
          const double off = actual[i].second[k] - exact[i].second[k];
          squares += off * off;  // NaN stays in it
          norm += exact[i].second[k] * exact[i].second[k];
        }
        std::printf("%s_%s_%s %s %g %s\n", q.name, kind & 1 ? "floats" : "halves", kind & 2 ? "floats" : "halves",
                    actual[i].first.c_str(), std::sqrt(squares / norm),
                    actual[i].second == other[i].second ? "same" : "different");
      }
    }
}
