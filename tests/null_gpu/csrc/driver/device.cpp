// The device: its model, chosen by NULL_GPU_CAPABILITY, and its attributes.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "driver.h"

namespace null_gpu {
namespace {

// CUDA C++ Programming Guide, "Compute Capabilities", and what deviceQuery says of the product.
constexpr Model kModels[] = {
    {80, "A100", 108, 164 << 10, 163 << 10, 2048, 32, 40, 1410, 1593, 5120, 80},
    {86, "A40", 84, 100 << 10, 99 << 10, 1536, 16, 6, 1740, 7251, 384, 48},
    {89, "L40", 142, 100 << 10, 99 << 10, 1536, 24, 96, 2490, 9001, 384, 48},
    {90, "H200", 132, 228 << 10, 227 << 10, 2048, 32, 60, 1980, 3201, 6144, 141},
    {100, "B200", 148, 228 << 10, 227 << 10, 2048, 32, 126, 1965, 3996, 8192, 180},
    {103, "B300", 148, 228 << 10, 227 << 10, 2048, 32, 126, 1920, 3996, 8192, 270},
    {120, "RTX PRO 6000", 188, 100 << 10, 99 << 10, 1536, 24, 128, 2430, 14001, 512, 96},
};

const char* option(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value ? value : otherwise;
}

const Model* chosen_model() {
  const char* text = option("NULL_GPU_CAPABILITY", "9.0");
  int major = 0, minor = 0;
  sscanf(text, "%d.%d", &major, &minor);
  for (const Model& m : kModels)
    if (m.capability == major * 10 + minor) return &m;
  fprintf(stderr, "null GPU: NULL_GPU_CAPABILITY=%s is none of 8.0, 8.6, 8.9, 9.0, 10.0, 10.3, 12.0\n", text);
  return nullptr;
}

// What this driver lacks (managed memory, virtual memory, sparse textures, ...) is not claimed: 0.
int attribute(CUdevice_attribute name, CUdevice device) {
  const Model* model = options().model;
  const bool hopper = model->capability >= 90;
  switch (name) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return kMaxThreads;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: return kMaxThreads;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return kMaxThreads;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return kMaxThreadsZ;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return kMaxGridX;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: return kMaxGridYZ;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return kMaxGridYZ;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return kDefaultShared;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return model->shared_of_block;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return model->shared;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return kReservedShared;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return kRegisters;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return kRegisters;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return model->threads;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return model->blocks;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return model->multiprocessors;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return model->capability / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return model->capability % 10;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return model->clock_mhz * 1000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return model->memory_clock_mhz * 1000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return model->bus_bits;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return model->l2_mib << 20;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 64 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_PITCH_ALIGNMENT: return 32;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 3;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: return 1;
    case CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID: return device;
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: return hopper;
    case CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED: return hopper;
    case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_ECC_ENABLED:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_L1_CACHE_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_LOCAL_L1_CACHE_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_COMPUTE_PREEMPTION_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: return 1;
    default: return 0;
  }
}

// As many of the devices, which are all alike, as CUDA_VISIBLE_DEVICES names before something else.
int visible(int devices) {
  const char* at = getenv("CUDA_VISIBLE_DEVICES");
  if (!at) return devices;
  for (int count = 0;; ++count) {
    char* end;
    const long number = strtol(at, &end, 10);
    if (end == at || number < 0 || number >= devices) return count;
    if (*end != ',') return count + 1;
    at = end + 1;
  }
}

bool exists(CUdevice device) { return device >= 0 && device < options().devices; }

}  // namespace

const Options& options() {
  static const Options all = [] {
    const Model* model = chosen_model();
    const char* memory = getenv("NULL_GPU_MEMORY_GIB");
    const size_t gib = memory ? atol(memory) : model ? model->memory_gib : 0;
    return Options{model, visible(atoi(option("NULL_GPU_COUNT", "1"))), gib << 30};
  }();
  return all;
}

}  // namespace null_gpu

using namespace null_gpu;

API cuDeviceGetCount(int* count) {
  ENTER;
  *count = options().devices;
  return CUDA_SUCCESS;
}

API cuDeviceGet(CUdevice* device, int ordinal) {
  ENTER;
  if (!exists(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

API cuDeviceGetName(char* name, int size, CUdevice device) {
  ENTER;
  if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  snprintf(name, size, "Null %s", options().model->name);
  return CUDA_SUCCESS;
}

API cuDeviceTotalMem(size_t* bytes, CUdevice device) {
  ENTER;
  if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = options().memory;
  return CUDA_SUCCESS;
}

API cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  ENTER;
  if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  memset(uuid, 0, sizeof *uuid);
  uuid->bytes[15] = char(device + 1);
  return CUDA_SUCCESS;
}

API cuDeviceGetAttribute(int* value, CUdevice_attribute name, CUdevice device) {
  ENTER;
  if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  if (name < 1 || name >= CU_DEVICE_ATTRIBUTE_MAX) return CUDA_ERROR_INVALID_VALUE;
  *value = attribute(name, device);
  return CUDA_SUCCESS;
}

API cuDeviceGetPCIBusId(char* id, int size, CUdevice device) {
  ENTER;
  if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  snprintf(id, size, "0000:01:%02x.0", device);
  return CUDA_SUCCESS;
}

API cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
  ENTER;
  if (!exists(device) || !exists(peer)) return CUDA_ERROR_INVALID_DEVICE;
  *can = device != peer;
  return CUDA_SUCCESS;
}
