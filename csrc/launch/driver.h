// The few functions of the CUDA driver that launch a Triton kernel, looked up when they are first needed: the extension
// loads without a driver, and is built without CUDA's headers.
#pragma once

#include <cstdint>

namespace pk::driver {

using Function = void*;  // CUfunction
using Stream = void*;    // CUstream

// A kernel that is ready to be launched, as Triton has loaded it.
struct Kernel {
  Function function = nullptr;
  unsigned threads = 0;  // of a block
  unsigned shared = 0;   // bytes of dynamic shared memory of a block
};

// Why nothing can be launched here, or null.
const char* unavailable();

// Launches on the current device, which is `device`; parameters are addresses of the arguments. Returns null, or what
// the driver calls the error.
const char* launch(const Kernel& kernel, unsigned blocks, int device, Stream stream, void** parameters);

// Exchanges how this thread's calls that are unsafe in a capture are judged (CUstreamCaptureMode: 0 global, 1 thread
// local, 2 relaxed); returns the mode before, or -1 where there is no driver.
int exchange_capture_mode(int mode);

}  // namespace pk::driver
