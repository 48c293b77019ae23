// What every CUDA entry function needs: x's device made current, its stream, launches whose errors name the kernel.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../../common/tensors.h"
#include "device.cuh"
#include "kernels.h"
#include "stream.h"

#ifndef PK_DISPATCH_KEY
#define PK_DISPATCH_KEY CUDA
#endif

namespace pk {

// norm_stats.cu
torch::stable::Tensor norm_stats_cuda(torch::stable::Tensor x);
// Where samples have many partials, which every block would merge again, merges them once beforehand: `stats`, which
// `owner` keeps alive, becomes [B, 3], and `partials` 1.
void merge_many(int64_t batch, torch::stable::Tensor& owner, const float*& stats, int64_t& partials);

namespace {

#if defined(PK_EXECUTOR)
inline bool is_device(const Tensor& t) { return t.is_cpu(); }
#else
inline bool is_device(const Tensor& t) { return t.is_cuda(); }
#endif

inline bool is_beside(const Tensor& x, const Tensor& t) { return is_device(t) && t.get_device() == x.get_device(); }

// `what` of `of`, a kernel, is what has the error.
inline void check_cuda(cudaError_t error, const char* what, const char* of = "") {
  STD_TORCH_CHECK(error == cudaSuccess, what, of, ": ", cudaGetErrorString(error));
}

// Launches kernels on the current stream of x's device, which is the current device while this object lives.
class Launcher {
 public:
  explicit Launcher(const Tensor& x) {
#if defined(PK_EXECUTOR)
    device_ = 0;
#else
    device_ = x.get_device();
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "poolformer_kernels: torch's function for the current CUDA stream is not bound");
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    guard_.emplace(device_);
#endif
  }
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  // A grid of `blocks` blocks, each with `shared` bytes of dynamic shared memory; `name` is for error messages.
  template <class Params>
  void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, const Params& params,
              int shared = 0) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), name, ": the tensors are too large for one launch, ", blocks,
                    " blocks");
    load_kernel(name, reinterpret_cast<const void*>(kernel), device_);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream_;
    check_cuda(cudaLaunchKernelEx(&config, kernel, Params(params)), "launch of ", name);
  }

  // An attribute of the device, such as cudaDevAttrMultiProcessorCount.
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device_), "cudaDeviceGetAttribute");
    return value;
  }

 private:
  int device_ = 0;
  cudaStream_t stream_ = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// The tensor, or a copy of it, dense and starting at a multiple of 16 bytes; channels_last where `rows`.
inline Tensor aligned(const Tensor& t, bool rows) {
  const Tensor dense = in_layout(t, rows);
  return reinterpret_cast<uintptr_t>(dense.data_ptr()) % 16 == 0 ? dense : torch::stable::clone(dense);
}

inline Tensor empty_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  int64_t strides[4] = {}, stride = 1;
  int i = static_cast<int>(sizes.size());
  for (auto size = std::rbegin(sizes); size != std::rend(sizes); ++size) {
    strides[--i] = stride;
    stride *= *size;
  }
  const auto all = {strides[0], strides[1], strides[2], strides[3]};
  return empty_on(like, sizes, all, aoti_torch_dtype_float32());
}

inline float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline bool is_float(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// A parameter of `n` elements, or none.
inline Vector vector_of(const Tensor& x, const OptionalTensor& t, const char* name, int64_t n) {
  if (!t.has_value()) return {};
  STD_TORCH_CHECK(is_beside(x, *t) && is_float(*t) && t->dim() == 1 && t->size(0) == n, "poolformer_kernels: ", name,
                  " must be a tensor of ", n, " elements on x's device, float32, bfloat16 or float16");
  return {t->data_ptr(), t->stride(0), dtype_index(t->scalar_type())};
}

// Whether a weight is [rows, columns] or [rows, columns, 1, 1].
inline bool is_weight(const Tensor& x, const Tensor& w, int64_t rows, int64_t columns) {
  return is_beside(x, w) && is_float(w) && (w.dim() == 2 || (w.dim() == 4 && w.size(2) == 1 && w.size(3) == 1)) &&
         w.size(0) == rows && w.size(1) == columns;
}

// Statistics given to an operator, dense: [B, T, 3]. `owner` keeps them alive; `partials` becomes T.
inline const float* partials_of(const Tensor& x, const Tensor& stats, int64_t batch, Tensor& owner, int64_t& partials) {
  STD_TORCH_CHECK(is_beside(x, stats) && stats.scalar_type() == ScalarType::Float && stats.dim() == 3 &&
                      stats.size(0) == batch && stats.size(1) > 0 && stats.size(2) == 3,
                  "poolformer_kernels: stats must be a float32 tensor of shape [B, T, 3] on x's device");
  owner = in_layout(stats, false);
  partials = owner.size(1);
  return static_cast<const float*>(owner.data_ptr());
}

inline void check_images(const Tensor& x, const char* op) {
  STD_TORCH_CHECK(is_device(x) && is_float(x) && x.dim() == 4, op,
                  ": x must be a CUDA tensor of 4 dimensions, float32, bfloat16 or float16");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, op, ": x must have channels and pixels");
}

}  // namespace
}  // namespace pk
