// The first use of a kernel on a device.
#include <mutex>
#include <set>
#include <shared_mutex>
#include <utility>

#include "launch.cuh"

namespace pk {
namespace {

// While it lives, captures do not forbid this thread what could make other graphs wrong.
class Relaxed {
 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the thread's own
};

}  // namespace

// CUDA loads a kernel when it is first used. That is no work of a stream, and a capture in the usual mode may refuse
// it, but no graph can depend on it.
void load_kernel(const char* name, const void* function, int device) {
  static std::shared_mutex mutex;
  static std::set<std::pair<const void*, int>> loaded;
  const std::pair key(function, device);
  {
    std::shared_lock lock(mutex);
    if (loaded.count(key)) return;
  }
  std::unique_lock lock(mutex);
  if (loaded.count(key)) return;
  const Relaxed relaxed;
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, function), "attributes of ", name);
  // The attribute belongs to the device, not to a launch: it is the most that a block of this kernel may have.
  int most = 0;
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory for ",
             name);
  most -= static_cast<int>(attributes.sharedSizeBytes);
  check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory of ",
             name);
  loaded.insert(key);
}

}  // namespace pk
