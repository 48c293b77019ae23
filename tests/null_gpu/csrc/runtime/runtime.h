// The null GPU's CUDA runtime, over its driver's documented functions alone. NVIDIA's own runtime asks a driver to
// prove where it comes from, which this one cannot and should not; so it is replaced.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#define API extern "C" __attribute__((visibility("default"))) cudaError_t
// The body of a function that is one function of the driver, in the context of the thread's device.
#define DRIVER(call)                                                 \
  {                                                                  \
    if (cudaError_t unavailable = use_context()) return unavailable; \
    return result(call);                                             \
  }

namespace null_gpu {

// The same number; remembered for cudaGetLastError.
cudaError_t result(CUresult error);
// Starts the driver and makes the context of the thread's device current.
cudaError_t use_context();
// The kernel of a function of nvcc's host code, or of cudaLibraryGetKernel.
cudaError_t find_kernel(CUkernel* kernel, const void* function);

inline CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }
inline CUfunction function_of(CUkernel kernel) { return reinterpret_cast<CUfunction>(kernel); }

}  // namespace null_gpu
