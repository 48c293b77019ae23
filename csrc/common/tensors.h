// Tensors of the stable ABI, for the launchers of both devices.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "activation.h"

namespace pk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The index of a dtype in the tables of kernels.
inline int dtype_index(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return 0;
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    default: STD_TORCH_CHECK(false, "poolformer_kernels: tensors must be float32, bfloat16 or float16");
  }
}

inline Activation activation_named(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "relu_squared") return Activation::relu_squared;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(false, "mlp: activation must be gelu, gelu_tanh, relu, relu_squared or silu, got ", name);
}

// The output's layout (poolformer_kernels.layout.memory_format_of).
inline bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && x.stride(1) == 1; }

// Whether t is contiguous, or in channels_last without gaps. A dimension of size 1 has any stride.
inline bool is_dense(const Tensor& t, bool channels_last) {
  if (!channels_last) return t.is_contiguous();
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const auto has = [&t](int dim, int64_t stride) { return t.size(dim) == 1 || t.stride(dim) == stride; };
  return has(1, 1) && has(3, c) && has(2, w * c) && has(0, h * w * c);
}

// t itself where it is dense in that layout, else a copy.
inline Tensor in_layout(const Tensor& t, bool channels_last) {
  if (is_dense(t, channels_last)) return t;
  if (!channels_last) return torch::stable::contiguous(t);
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

// A new tensor on the device of `like`.
inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                       int32_t dtype) {
  const bool cpu = like.is_cpu();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.begin(), dtype,
                                                  cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(),
                                                  cpu ? 0 : like.get_device(), &handle));
  return Tensor(handle);
}

inline int32_t dtype_of(const Tensor& x) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

inline Tensor empty_images(const Tensor& like, int64_t b, int64_t c, int64_t h, int64_t w, bool channels_last) {
  if (channels_last) return empty_on(like, {b, c, h, w}, {c * h * w, 1, w * c, c}, dtype_of(like));
  return empty_on(like, {b, c, h, w}, {c * h * w, h * w, w, 1}, dtype_of(like));
}

inline Tensor empty_like(const Tensor& x, bool channels_last) {
  return empty_images(x, x.size(0), x.size(1), x.size(2), x.size(3), channels_last);
}

}  // namespace
}  // namespace pk
