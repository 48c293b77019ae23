#include "driver.h"

#include <dlfcn.h>

namespace pk::driver {
namespace {

constexpr int kSuccess = 0;  // CUresult

// CUDA Driver API: module and execution control, primary contexts, stream capture.
struct Driver {
  int (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**);
  int (*error_name)(int, const char**);
  int (*get_context)(void**);
  int (*retain_context)(void**, int);
  int (*set_context)(void*);
  int (*exchange_mode)(int*);
  const char* unavailable = nullptr;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      unavailable = "there is no CUDA driver (libcuda.so.1)";
      return;
    }
    find(library, "cuLaunchKernel", launch);
    find(library, "cuGetErrorName", error_name);
    find(library, "cuCtxGetCurrent", get_context);
    find(library, "cuDevicePrimaryCtxRetain", retain_context);
    find(library, "cuCtxSetCurrent", set_context);
    find(library, "cuThreadExchangeStreamCaptureMode", exchange_mode);
  }

  template <class F>
  void find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (function == nullptr) unavailable = "the CUDA driver lacks a function";
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

}  // namespace

const char* unavailable() { return driver().unavailable; }

const char* launch(const Kernel& kernel, unsigned blocks, int device, Stream stream, void** parameters) {
  const Driver& d = driver();
  void* context = nullptr;
  int error = d.get_context(&context);
  if (error == kSuccess && context == nullptr) {  // a thread that has not used CUDA yet
    error = d.retain_context(&context, device);
    if (error == kSuccess) error = d.set_context(context);
  }
  if (error == kSuccess)
    error = d.launch(kernel.function, blocks, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, parameters, nullptr);
  if (error == kSuccess) return nullptr;
  const char* name = nullptr;
  d.error_name(error, &name);
  return name == nullptr ? "an unknown error" : name;
}

int exchange_capture_mode(int mode) {
  if (driver().unavailable != nullptr) return -1;
  return driver().exchange_mode(&mode) == kSuccess ? mode : -1;
}

}  // namespace pk::driver
