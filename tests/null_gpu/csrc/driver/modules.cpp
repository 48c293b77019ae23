// Modules, libraries and kernels. A library is its module, here, and a function its kernel.
#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>

#include "driver.h"

namespace null_gpu {
namespace {

CUresult find(Kernel** out, Module* module, const char* name) {
  parse(*module);
  auto it = module->kernels.find(name);
  if (it == module->kernels.end()) {
    const bool readable = !module->image.empty() && !module->ptx;
    if (readable) return complain(CUDA_ERROR_NOT_FOUND, "no kernel %s in its module (sm_%d)", name, module->arch);
    if (module->ptx && !strstr(module->image.data(), name)) return CUDA_ERROR_NOT_FOUND;
    auto kernel = std::make_unique<Kernel>();
    kernel->module = module;
    kernel->name = name;
    it = module->kernels.emplace(name, std::move(kernel)).first;
  }
  *out = it->second.get();
  return CUDA_SUCCESS;
}

CUresult get_attribute(int* value, CUfunction_attribute name, const Kernel& kernel) {
  const int arch = kernel.module->ptx || !kernel.module->arch ? options().model->capability : kernel.module->arch;
  switch (name) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = max_threads(kernel); break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = kernel.static_shared; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = kernel.local; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel.registers; break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = arch; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = max_dynamic_shared(kernel); break;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: *value = -1; break;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: *value = kernel.any_cluster_size; break;
    case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_CACHE_MODE_CA: *value = 0; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

// Triton tries attributes of later drivers and takes another way where they are refused.
CUresult set_attribute(Kernel& kernel, CUfunction_attribute name, int value) {
  switch (name) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      if (value < 0 || value + kernel.static_shared > options().model->shared_of_block)
        return complain(CUDA_ERROR_INVALID_VALUE, "%s: %d bytes of dynamic and %d of static shared memory, at most %d",
                        kernel.name.c_str(), value, kernel.static_shared, options().model->shared_of_block);
      kernel.max_dynamic_shared[current_device()] = value;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: kernel.any_cluster_size = value != 0; return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
}

}  // namespace

// NVIDIA's manuals do not say that a capture allows it; those of its Warp say that drivers before CUDA 12.3 do not.
// torch's own tests capture kernels of torch that were never used before.
CUresult load(Kernel& kernel) {
  if (kernel.devices.count(current_device())) return CUDA_SUCCESS;
  if (!kernel.module->of_torch)
    if (CUresult refused = refuse_unsafe_in_capture(("the first use of " + kernel.name).c_str())) return refused;
  kernel.devices.insert(current_device());
  return CUDA_SUCCESS;
}

}  // namespace null_gpu

using namespace null_gpu;

API cuModuleLoadData(CUmodule* module, const void* code) {
  ENTER;
  if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
  if (CUresult refused = refuse_unsafe_in_capture("cuModuleLoadData")) return refused;
  return load(reinterpret_cast<Module**>(module), code);
}

API cuModuleLoad(CUmodule* module, const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return complain(CUDA_ERROR_FILE_NOT_FOUND, "cuModuleLoad: no file %s", path);
  const std::string code{std::istreambuf_iterator<char>(file), {}};
  return cuModuleLoadData(module, code.c_str());
}

API cuModuleLoadDataEx(CUmodule* module, const void* code, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, code);
}

API cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned, CUlibraryOption*, void**,
                      unsigned) {
  ENTER;
  return load(reinterpret_cast<Module**>(library), code);
}

// Kernels stay: graphs may still have them.
API cuModuleUnload(CUmodule) {
  ENTER;
  return CUDA_SUCCESS;
}

API cuLibraryUnload(CUlibrary) {
  ENTER;
  return CUDA_SUCCESS;
}

API cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  ENTER;
  if (CUresult error = find(reinterpret_cast<Kernel**>(function), reinterpret_cast<Module*>(module), name))
    return error;
  return load(*reinterpret_cast<Kernel*>(*function));
}

API cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  ENTER;
  return find(reinterpret_cast<Kernel**>(kernel), reinterpret_cast<Module*>(library), name);
}

// Variables are memory of the device on which they are asked for first; they start as zeros.
API cuLibraryGetGlobal(CUdeviceptr* address, size_t* size, CUlibrary library, const char* name) {
  ENTER;
  auto& module = *reinterpret_cast<Module*>(library);
  parse(module);
  const auto it = module.variables.find(name);
  if (it == module.variables.end()) return CUDA_ERROR_NOT_FOUND;
  CUdeviceptr& found = module.addresses[name];
  if (!found)
    if (CUresult refused = cuMemAlloc(&found, std::max<size_t>(1, it->second))) return refused;
  if (address) *address = found;
  if (size) *size = it->second;
  return CUDA_SUCCESS;
}

API cuFuncGetAttribute(int* value, CUfunction_attribute name, CUfunction function) {
  ENTER;
  if (CUresult refused = load(*reinterpret_cast<Kernel*>(function))) return refused;
  return get_attribute(value, name, *reinterpret_cast<Kernel*>(function));
}

API cuFuncSetAttribute(CUfunction function, CUfunction_attribute name, int value) {
  ENTER;
  if (CUresult refused = load(*reinterpret_cast<Kernel*>(function))) return refused;
  return set_attribute(*reinterpret_cast<Kernel*>(function), name, value);
}

API cuFuncSetCacheConfig(CUfunction, CUfunc_cache) {
  ENTER;
  return CUDA_SUCCESS;
}
