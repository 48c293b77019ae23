// What every CUDA entry function needs: x's device made current, its stream, outputs beside x, launch errors by name.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

// libtorch_cuda has it. Weak, so that the extension also loads beside a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace pk {

inline void check_cuda(cudaError_t error, const std::string& what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), std::string("launch of ") + kernel); }

class Launch {
 public:
  explicit Launch(const torch::stable::Tensor& x) : device_(x.get_device()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~Launch() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  cudaStream_t stream() const { return stream_; }

  torch::stable::Tensor empty_floats(const std::vector<int64_t>& sizes) const {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                    aoti_torch_dtype_float32(), aoti_torch_device_type_cuda(), device_,
                                                    &handle));
    return torch::stable::Tensor(handle);
  }

 private:
  int device_, previous_ = 0;
  cudaStream_t stream_;
};

}  // namespace pk
