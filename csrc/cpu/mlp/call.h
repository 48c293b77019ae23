// What the MLP's forward and backward operators share: checks, the kernels of a call, its parameters.
#pragma once

#include <string>

#include "../isa/isa.h"
#include "mlp.h"
#include "../core/tensors.h"

namespace pk {
namespace {

constexpr int64_t kSerialWork = 1 << 18;  // multiply-adds below which a second thread does not pay

inline const MlpKernels& kernels_for(ScalarType x, ScalarType w) {
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

// A weight [rows, cols] or [rows, cols, 1, 1] with dense rows.
inline Tensor dense_rows(const Tensor& w, const char* name, int64_t cols) {
  STD_TORCH_CHECK(w.is_cpu() && (w.dim() == 2 || (w.dim() == 4 && w.size(2) == 1 && w.size(3) == 1)) && w.size(0) > 0 &&
                      w.size(1) == cols,
                  "mlp_cpp: ", name, " must be a CPU tensor [out, in] with in = ", cols);
  return w.stride(1) == 1 || cols == 1 ? w : torch::stable::contiguous(w);
}

inline Weight weight(const Tensor& w) { return {w.data_ptr(), w.stride(0), dtype_index(w.scalar_type())}; }

struct Parameters {
  const Tensor w1, w2;
  OptionalTensor b1, b2, norm_weight, norm_bias, layer_scale, drop_scale;
};

// The call's shapes and its parameters as padded float vectors.
struct Call {
  MlpParams p{};
  float *mean, *rstd;

  static int64_t tables(const Images& x, const Parameters& of) {
    return padded(of.w1.size(0)) + 2 * padded(of.w2.size(0)) + 2 * padded(x.channels) + 3 * padded(x.batch);
  }

  Call(const Images& x, const Parameters& of, const std::string& activation, bool norm, bool residual, Arena& arena) {
    p.batch = x.batch, p.channels = x.channels, p.hidden = of.w1.size(0), p.out = of.w2.size(0);
    p.pixels = x.height * x.width;
    p.tokens = p.batch * p.pixels;
    p.channels_last = x.channels_last || p.pixels == 1;
    p.residual = residual;
    p.norm = norm;
    p.activation = activation_named(activation);
    p.w1 = weight(of.w1);
    p.w2 = weight(of.w2);
    p.x = x.data;
    STD_TORCH_CHECK(of.w1.scalar_type() == of.w2.scalar_type(), "mlp_cpp: w1 and w2 must have one dtype");
    STD_TORCH_CHECK(!residual || p.out == p.channels, "mlp_cpp: with a residual w2 must have C rows");
    p.b1 = padded_vector(arena, of.b1, "b1", p.hidden, 0);
    p.b2 = padded_vector(arena, of.b2, "b2", p.out, 0);
    p.gamma = padded_vector(arena, of.norm_weight, "norm_weight", p.channels, 1);
    p.beta = padded_vector(arena, of.norm_bias, "norm_bias", p.channels, 0);
    p.scale = padded_vector(arena, of.layer_scale, "layer_scale", p.out, 1);
    p.drop = padded_vector(arena, of.drop_scale, "drop_scale", p.batch, 1);
    p.mean = mean = arena.take(padded(p.batch));
    p.rstd = rstd = arena.take(padded(p.batch));
  }

  // How many tiles of `most` tokens at most share so many vectors of tokens: as many for each thread.
  int64_t tiles(int64_t vectors, int64_t most) const {
    const int64_t threads = work() < kSerialWork ? 1 : torch::stable::get_num_threads(), round = threads * most;
    return std::min(vectors, threads * ((vectors * kLanesMax + round - 1) / round));
  }

  double work() const { return double(p.tokens) * p.hidden * (p.channels + p.out); }

  // f(i) over `count` items that share `work()`
  template <class F>
  void over(int64_t count, const F& f) const {
    each_item(count, std::max<int64_t>(1, int64_t(kSerialWork / (work() / count + 1))), f);
  }
};

inline void check(const Tensor& x, double eps) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "mlp_cpp: x must be a CPU tensor of 4 dimensions");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "mlp_cpp: x must have channels and pixels");
  STD_TORCH_CHECK(eps >= 0, "mlp_cpp: eps must not be negative, got ", eps);
}

// The tensor that has the dtype of the products' operands, and of the hidden activations that are saved.
inline const Tensor& operand_of(const Tensor& x, const Tensor& w1) {
  return x.scalar_type() == ScalarType::Float ? w1 : x;
}

}  // namespace
}  // namespace pk
