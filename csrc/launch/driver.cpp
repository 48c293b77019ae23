#include "driver.h"

#include <dlfcn.h>

namespace pk::driver {
namespace {

constexpr int kSuccess = 0, kInvalidContext = 201;  // CUresult

// CUDA Driver API: module and execution control, primary contexts, stream capture.
struct Driver {
  int (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**);
  int (*error_name)(int, const char**);
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
  const auto call = [&] {
    return d.launch(kernel.function, blocks, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, parameters, nullptr);
  };
  int error = call();
  if (error == kInvalidContext) {  // a thread that has not used CUDA yet
    void* context = nullptr;
    error = d.retain_context(&context, device);
    if (error == kSuccess) error = d.set_context(context);
    if (error == kSuccess) error = call();
  }
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
