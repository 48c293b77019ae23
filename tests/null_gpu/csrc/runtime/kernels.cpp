// Kernels: what nvcc's host code registers and calls, launches, attributes, occupancy.
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "runtime.h"

namespace null_gpu {
namespace {

struct Module {
  const void* code;
  CUlibrary library = nullptr;  // once one of its kernels is used
};
struct Function {
  Module* module;
  const char* name;
  CUkernel kernel = nullptr;
};
struct Variable {
  Module* module;
  const char* name;
};
struct Registered {
  std::mutex mutex;
  std::map<const void*, Function> functions;
  std::map<const void*, Variable> variables;
};
// Never destroyed: libraries register before this one's objects exist and launch after they are gone.
Registered& registered() {
  static auto* all = new Registered;
  return *all;
}

struct Configuration {  // of a <<<...>>>
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> configurations;

CUresult load(Module* module) {
  if (module->library) return CUDA_SUCCESS;
  return cuLibraryLoadData(&module->library, module->code, nullptr, nullptr, 0, nullptr, nullptr, 0);
}

// The runtime has an error of its own for a grid or a block that no device takes.
cudaError_t launched(CUresult error, dim3 grid, dim3 block) {
  const bool possible = grid.x && grid.y && grid.z && block.x && block.y && block.z && grid.x <= 2147483647 &&
                        grid.y <= 65535 && grid.z <= 65535 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
                        size_t(block.x) * block.y * block.z <= 1024;
  if (error == CUDA_ERROR_INVALID_VALUE && !possible) return result(CUresult(cudaErrorInvalidConfiguration));
  return result(error);
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream,
                   cudaLaunchAttribute* attributes, unsigned count) {
  static_assert(sizeof(cudaLaunchAttribute) == sizeof(CUlaunchAttribute));
  CUkernel kernel;
  if (cudaError_t error = find_kernel(&kernel, function)) return error;
  if (cudaError_t error = use_context()) return error;
  const CUlaunchConfig config{grid.x,
                              grid.y,
                              grid.z,
                              block.x,
                              block.y,
                              block.z,
                              unsigned(shared),
                              stream,
                              reinterpret_cast<CUlaunchAttribute*>(attributes),
                              count};
  return launched(cuLaunchKernelEx(&config, function_of(kernel), arguments, nullptr), grid, block);
}

}  // namespace

cudaError_t find_kernel(CUkernel* kernel, const void* function) {
  if (!function) return result(CUresult(cudaErrorInvalidDeviceFunction));
  if (cudaError_t error = use_context()) return error;
  std::lock_guard<std::mutex> lock(registered().mutex);
  const auto it = registered().functions.find(function);
  if (it == registered().functions.end()) {
    *kernel = static_cast<CUkernel>(const_cast<void*>(function));
    return cudaSuccess;
  }
  Function& found = it->second;
  if (!found.kernel) {
    if (CUresult error = load(found.module)) return result(error);
    if (CUresult error = cuLibraryGetKernel(&found.kernel, found.module->library, found.name)) return result(error);
  }
  *kernel = found.kernel;
  return cudaSuccess;
}

}  // namespace null_gpu

using namespace null_gpu;

// ---- nvcc's host code ----

#define NVCC extern "C" __attribute__((visibility("default")))

NVCC void** __cudaRegisterFatBinary(void* code) { return reinterpret_cast<void**>(new Module{code}); }
NVCC void __cudaRegisterFatBinaryEnd(void**) {}
NVCC void __cudaUnregisterFatBinary(void**) {}
NVCC char __cudaInitModule(void**) { return 1; }

NVCC void __cudaRegisterFunction(void** module, const char* function, char*, const char* name, int, uint3*, uint3*,
                                 dim3*, dim3*, int*) {
  std::lock_guard<std::mutex> lock(registered().mutex);
  registered().functions[function] = {reinterpret_cast<Module*>(module), name};
}

NVCC void __cudaRegisterVar(void** module, char* variable, char*, const char* name, int, size_t, int, int) {
  std::lock_guard<std::mutex> lock(registered().mutex);
  registered().variables[variable] = {reinterpret_cast<Module*>(module), name};
}

NVCC unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

NVCC cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return result(CUresult(cudaErrorMissingConfiguration));
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}

// The host code asks once and keeps the answer. It is the function itself: an error is then each launch's.
NVCC cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

NVCC cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                    cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared, stream, nullptr, 0);
}

// ---- launches ----

API cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                     cudaStream_t stream) {
  return launch(function, grid, block, arguments, shared, stream, nullptr, 0);
}

API cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream,
                config->attrs, config->numAttrs);
}

API cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                                cudaStream_t stream) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  return launch(function, grid, block, arguments, shared, stream, &cooperative, 1);
}

// ---- attributes ----

API cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
  CUkernel kernel;
  if (cudaError_t error = find_kernel(&kernel, function)) return error;
  auto get = [kernel](CUfunction_attribute name) {
    int value = 0;
    cuFuncGetAttribute(&value, name, function_of(kernel));
    return value;
  };
  *out = {};
  out->sharedSizeBytes = get(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
  out->constSizeBytes = get(CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES);
  out->localSizeBytes = get(CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES);
  out->maxThreadsPerBlock = get(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  out->numRegs = get(CU_FUNC_ATTRIBUTE_NUM_REGS);
  out->ptxVersion = get(CU_FUNC_ATTRIBUTE_PTX_VERSION);
  out->binaryVersion = get(CU_FUNC_ATTRIBUTE_BINARY_VERSION);
  out->maxDynamicSharedSizeBytes = get(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
  out->preferredShmemCarveout = get(CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT);
  return cudaSuccess;
}

API cudaFuncSetAttribute(const void* function, cudaFuncAttribute name, int value) {
  CUkernel kernel;
  if (cudaError_t error = find_kernel(&kernel, function)) return error;
  return result(cuFuncSetAttribute(function_of(kernel), static_cast<CUfunction_attribute>(name), value));
}

API cudaKernelSetAttributeForDevice(cudaKernel_t kernel, cudaFuncAttribute name, int value, int) {
  return cudaFuncSetAttribute(kernel, name, value);
}

API cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                           size_t shared, unsigned flags) {
  CUkernel kernel;
  if (cudaError_t error = find_kernel(&kernel, function)) return error;
  return result(
      cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function_of(kernel), threads, shared, flags));
}

API cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

// ---- libraries and variables ----

API cudaLibraryLoadData(cudaLibrary_t* library, const void* code, cudaJitOption*, void**, unsigned, cudaLibraryOption*,
                        void**, unsigned)
    DRIVER(cuLibraryLoadData(reinterpret_cast<CUlibrary*>(library), code, nullptr, nullptr, 0, nullptr, nullptr, 0))

        API cudaLibraryUnload(cudaLibrary_t library) DRIVER(cuLibraryUnload(reinterpret_cast<CUlibrary>(library)))

            API
    cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t library, const char* name)
        DRIVER(cuLibraryGetKernel(reinterpret_cast<CUkernel*>(kernel), reinterpret_cast<CUlibrary>(library), name))

            API cudaGetSymbolAddress(void** out, const void* symbol) {
  if (cudaError_t error = use_context()) return error;
  std::lock_guard<std::mutex> lock(registered().mutex);
  const auto it = registered().variables.find(symbol);
  if (it == registered().variables.end()) return result(CUresult(cudaErrorInvalidSymbol));
  Module* module = it->second.module;
  if (CUresult error = load(module)) return result(error);
  size_t size;
  return result(cuLibraryGetGlobal(reinterpret_cast<CUdeviceptr*>(out), &size, module->library, it->second.name));
}

API cudaMemcpyToSymbol(const void* symbol, const void* from, size_t size, size_t offset, cudaMemcpyKind) {
  void* to;
  if (cudaError_t error = cudaGetSymbolAddress(&to, symbol)) return error;
  return result(cuMemcpy(address(to) + offset, address(from), size));
}
