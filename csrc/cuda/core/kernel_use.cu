// What the device says of the kernels: compare with what ptxas said when they were built.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

#if !defined(PK_EXECUTOR)  // the tests' host executor has no registers to report

namespace pk {

static void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

KernelUse kernel_use(const KernelFact& kernel) {
  cudaFuncAttributes found;
  check(cudaFuncGetAttributes(&found, kernel.function), "cudaFuncGetAttributes");
  int blocks = 0;
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  most -= static_cast<int>(found.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "cudaFuncSetAttribute");
  // A kernel that needs more shared memory than this device has cannot run here: no block fits.
  if (kernel.shared <= most)
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads,
                                                        static_cast<size_t>(kernel.shared)),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return {found.binaryVersion, found.numRegs, static_cast<int>(found.localSizeBytes),
          static_cast<int>(found.sharedSizeBytes), blocks};
}

}  // namespace pk
#endif
