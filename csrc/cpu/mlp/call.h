// What the MLP's forward and backward operators share: checks, and a call's kernels and arguments.
#pragma once

#include <string>

#include "../isa/isa.h"
#include "../tuning.h"
#include "mlp.h"
#include "../core/tensors.h"

namespace pk {
namespace {

inline const MlpKernels& kernels_for(ScalarType x, ScalarType operand) {
  const int io = dtype_index(x), to = dtype_index(operand), index = io == 0 && to > 0 ? 2 + to : io;
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

// The kernels' arguments that forward and backward share. args.w1 and args.w2 have dense rows.
struct MlpCall {
  MlpParams p{};
  float *mean, *rstd;  // [B] what p.mean and p.rstd show, to be filled in

  // Words of the vectors that the constructor takes.
  static int64_t tables(const Images& x, const MlpArguments& args) {
    return padded(args.w1.size(0)) + 2 * padded(args.w2.size(0)) + 2 * padded(x.channels) + 3 * padded(x.batch);
  }

  MlpCall(const Images& x, const MlpArguments& args, ScratchArena& arena) {
    p.batch = x.batch, p.channels = x.channels, p.hidden = args.w1.size(0), p.out = args.w2.size(0);
    p.pixels = x.height * x.width;
    p.tokens = p.batch * p.pixels;
    p.channels_last = x.channels_last || p.pixels == 1;
    p.residual = args.residual;
    p.norm = args.norm;
    p.activation = activation_named(args.activation);
    p.w1 = weight(args.w1);
    p.w2 = weight(args.w2);
    p.x = x.data;
    STD_TORCH_CHECK(args.w1.scalar_type() == args.w2.scalar_type(), "mlp_cpp: w1 and w2 must have one dtype");
    STD_TORCH_CHECK(!p.residual || p.out == p.channels, "mlp_cpp: with a residual w2 must have C rows");
    p.b1 = padded_vector(arena, args.b1, "b1", p.hidden, 0);
    p.b2 = padded_vector(arena, args.b2, "b2", p.out, 0);
    p.gamma = padded_vector(arena, args.norm_weight, "norm_weight", p.channels, 1);
    p.beta = padded_vector(arena, args.norm_bias, "norm_bias", p.channels, 0);
    p.scale = padded_vector(arena, args.layer_scale, "layer_scale", p.out, 1);
    p.drop = padded_vector(arena, args.drop_scale, "drop_scale", p.batch, 1);
    p.mean = mean = arena.floats(padded(p.batch));
    p.rstd = rstd = arena.floats(padded(p.batch));
  }

  // How many tiles `units` times `unit` tokens are cut into: none has more than `most` tokens, and each thread gets
  // equally many.
  int64_t tiles(int64_t units, int64_t most, int64_t unit = kLanesMax) const {
    const int64_t threads = work() < kSerialWork ? 1 : torch::stable::get_num_threads(), round = threads * most;
    return std::min(units, threads * ((units * unit + round - 1) / round));
  }

  // Multiply-adds of the forward.
  double work() const { return double(p.tokens) * p.hidden * (p.channels + p.out); }

  // Calls f(i) for `count` items, on as many threads as their work pays for.
  template <class F>
  void for_items(int64_t count, const F& f) const {
    each_item(count, std::max<int64_t>(1, int64_t(kSerialWork / (work() / count + 1))), f);
  }
};

inline void check(const Tensor& x, double eps) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "mlp_cpp: x must be a CPU tensor of 4 dimensions");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "mlp_cpp: x must have channels and pixels");
  STD_TORCH_CHECK(eps >= 0, "mlp_cpp: eps must not be negative, got ", eps);
}

// The dtype of the products' operands and of the saved fc1 output: x's, or where x is float32 the one that is asked
// for, else that of the weights.
inline ScalarType operand_of(ScalarType x, const Tensor& w1, const std::optional<ScalarType>& operand) {
  const ScalarType chosen = operand.value_or(x == ScalarType::Float ? w1.scalar_type() : x);
  STD_TORCH_CHECK(x == ScalarType::Float
                      ? chosen == ScalarType::Float || chosen == ScalarType::BFloat16 || chosen == ScalarType::Half
                      : chosen == x,
                  "mlp_cpp: operand must be float32, bfloat16 or float16 where x is float32, else x's dtype; got ",
                  torch::headeronly::toString(chosen), " for x of ", torch::headeronly::toString(x));
  return chosen;
}

// As the C interface of torch has it.
inline int32_t dtype_code(ScalarType dtype) {
  if (dtype == ScalarType::Float) return aoti_torch_dtype_float32();
  return dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float16();
}

}  // namespace
}  // namespace pk
