// Launches: every limit that can be known without running the kernel, then the record.
#include <algorithm>
#include <cstring>

#include "driver.h"
#include "records.h"

namespace null_gpu {
namespace {

constexpr int kWarp = 32, kQuarters = 4;  // of a multiprocessor: each has its own warps and registers
constexpr int kRegisterUnit = 256;        // registers allocated at a time, to a warp
constexpr int kSharedUnit = 128;          // bytes allocated at a time, to a block
constexpr unsigned kPortableCluster = 8, kLargestCluster = 16;

int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }
unsigned volume(const unsigned (&n)[3]) { return n[0] * n[1] * n[2]; }

// Warps of a multiprocessor that have registers.
int warps_with_registers(const Kernel& kernel) {
  const int of_warp = round_up(std::max(1, kernel.registers) * kWarp, kRegisterUnit);
  return kRegisters / kQuarters / of_warp * kQuarters;
}

CUresult check_sizes(const Kernel& kernel, const Launch& l) {
  const char* name = kernel.name.c_str();
  for (int i = 0; i < 3; ++i) {
    if (l.grid[i] == 0 || l.grid[i] > (i ? kMaxGridYZ : kMaxGridX))
      return complain(CUDA_ERROR_INVALID_VALUE, "%s: a grid of %u x %u x %u", name, l.grid[0], l.grid[1], l.grid[2]);
    if (l.block[i] == 0 || l.block[i] > unsigned(i == 2 ? kMaxThreadsZ : kMaxThreads))
      return complain(CUDA_ERROR_INVALID_VALUE, "%s: a block of %u x %u x %u", name, l.block[0], l.block[1],
                      l.block[2]);
  }
  const unsigned threads = volume(l.block);
  if (threads > kMaxThreads) return complain(CUDA_ERROR_INVALID_VALUE, "%s: a block of %u threads", name, threads);
  if (threads > unsigned(kernel.max_threads))
    return complain(CUDA_ERROR_INVALID_VALUE, "%s: %u threads, launch bounds of %d", name, threads, kernel.max_threads);
  if (threads > unsigned(max_threads(kernel)))
    return complain(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%s: %u threads of %d registers, at most %d threads", name,
                    threads, kernel.registers, max_threads(kernel));
  if (int64_t(l.dynamic_shared) > max_dynamic_shared(kernel))
    return complain(CUDA_ERROR_INVALID_VALUE, "%s: %u bytes of dynamic shared memory, at most %d", name,
                    l.dynamic_shared, max_dynamic_shared(kernel));
  return CUDA_SUCCESS;
}

CUresult check_cluster(const Kernel& kernel, const Launch& l) {
  const char* name = kernel.name.c_str();
  const unsigned blocks = volume(l.cluster);
  for (int i = 0; i < 3; ++i) {
    if (l.cluster[i] == 0 || l.grid[i] % l.cluster[i])
      return complain(CUDA_ERROR_INVALID_VALUE, "%s: a grid that is no multiple of its cluster", name);
    if (kernel.cluster[i] && kernel.cluster[i] != l.cluster[i])
      return complain(CUDA_ERROR_INVALID_CLUSTER_SIZE, "%s: a cluster that it was not compiled for", name);
  }
  if (blocks > 1 && options().model->capability < 90)
    return complain(CUDA_ERROR_INVALID_CLUSTER_SIZE, "%s: this device has no clusters", name);
  if (blocks > (kernel.any_cluster_size ? kLargestCluster : kPortableCluster))
    return complain(CUDA_ERROR_INVALID_CLUSTER_SIZE, "%s: a cluster of %u blocks", name, blocks);
  return CUDA_SUCCESS;
}

CUresult check_cooperative(const Kernel& kernel, const Launch& l) {
  const int resident = resident_blocks(kernel, int(volume(l.block)), l.dynamic_shared);
  const uint64_t blocks = uint64_t(l.grid[0]) * l.grid[1] * l.grid[2];
  if (blocks > uint64_t(resident) * options().model->multiprocessors)
    return complain(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, "%s: %lu blocks that wait for each other, %d fit",
                    kernel.name.c_str(), blocks, resident * options().model->multiprocessors);
  return CUDA_SUCCESS;
}

// An address that the kernel could not use: a GPU reports it later, and by each call after it.
CUresult check_address(const Kernel& kernel, const Launch& l, size_t argument, int offset, CUdeviceptr address) {
  const char* wrong = nullptr;
  const int device = device_with_address(address);
  // The end of an allocation may be an argument.
  if (device >= 0 && !allocation_at(address) && !allocation_at(address - 1)) wrong = "not allocated";
  if (device >= 0 && device != l.device) wrong = "another device's";
  if (device < 0 && is_pageable_host_memory(address)) wrong = "the host's";
  if (!wrong) return CUDA_SUCCESS;
  return complain(CUDA_ERROR_ILLEGAL_ADDRESS, "%s: argument %zu at byte %d: memory at %#llx is %s", kernel.name.c_str(),
                  argument, offset, address, wrong);
}

// Whether a word of an argument may be an address that nobody passed: what lay there before in a structure's padding
// or, as large as an address, in one of torch's functions without a state.
bool may_be_padding(uint64_t word, int size, bool torch) {
  const bool small_number = uint32_t(word) < 1 << 16;  // an int, and half of an address in the padding behind it
  return size > 8 ? torch || small_number || device_with_address(word) < 0 : torch && device_with_address(word) < 0;
}

// Words that look like addresses.
CUresult check_arguments(const Kernel& kernel, Launch& l, void** arguments) {
  const bool torch = !kernel.name.compare(0, 6, "_ZN2at");
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    const int size = kernel.parameters[i].size;
    for (int at = 0; at < size; at += 8) {
      uint64_t word = 0;
      memcpy(&word, static_cast<char*>(arguments[i]) + at, std::min(8, size - at));
      if (at == 0) l.arguments.push_back(word);
      if (size - at < 8 || may_be_padding(word, size, torch)) continue;
      if (CUresult refused = check_address(kernel, l, i, at, word)) return refused;
    }
  }
  return CUDA_SUCCESS;
}

}  // namespace

int max_threads(const Kernel& kernel) {
  return std::min({kernel.max_threads, kMaxThreads, warps_with_registers(kernel) * kWarp});
}

int max_dynamic_shared(const Kernel& kernel) {
  const auto set = kernel.max_dynamic_shared.find(current_device());
  return set == kernel.max_dynamic_shared.end() ? kDefaultShared - kernel.static_shared : set->second;
}

int resident_blocks(const Kernel& kernel, int threads, size_t dynamic_shared) {
  const Model& model = *options().model;
  const int warps = round_up(threads, kWarp) / kWarp;
  const int shared = int(dynamic_shared) + kernel.static_shared;
  if (threads <= 0 || threads > max_threads(kernel) || shared > model.shared_of_block) return 0;
  return std::min({model.blocks, model.threads / kWarp / warps, warps_with_registers(kernel) / warps,
                   model.shared / round_up(shared + kReservedShared, kSharedUnit)});
}

CUresult launch(const CUlaunchConfig& config, Kernel* kernel, void** arguments, void** extra) {
  if (!kernel) return CUDA_ERROR_INVALID_HANDLE;
  const char* name = kernel->name.c_str();
  if (!current_context()) return complain(CUDA_ERROR_INVALID_CONTEXT, "%s: no context is current", name);
  if (extra) return complain(CUDA_ERROR_NOT_SUPPORTED, "%s: arguments in a buffer are not implemented", name);
  const Stream* stream = find_stream(config.hStream);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (CUresult refused = load(*kernel)) return refused;
  Launch l;
  l.kernel = kernel->name;
  l.function = reinterpret_cast<uint64_t>(kernel);
  l.known = kernel->known;
  l.grid[0] = config.gridDimX, l.grid[1] = config.gridDimY, l.grid[2] = config.gridDimZ;
  l.block[0] = config.blockDimX, l.block[1] = config.blockDimY, l.block[2] = config.blockDimZ;
  for (int i = 0; i < 3; ++i) l.cluster[i] = std::max(1u, kernel->cluster[i]);
  l.dynamic_shared = config.sharedMemBytes;
  l.static_shared = kernel->static_shared;
  l.registers = kernel->registers;
  l.local = kernel->local;
  l.device = current_device();
  l.stream = reinterpret_cast<uint64_t>(config.hStream);
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) cooperative = attribute.value.cooperative != 0;
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) memcpy(l.cluster, &attribute.value.clusterDim, 12);
  }
  if (stream->device != l.device)
    return complain(CUDA_ERROR_INVALID_HANDLE, "%s: a stream of device %d in a context of device %d", name,
                    stream->device, l.device);
  if (CUresult refused = check_sizes(*kernel, l)) return refused;
  if (CUresult refused = check_cluster(*kernel, l)) return refused;
  if (cooperative)
    if (CUresult refused = check_cooperative(*kernel, l)) return refused;
  if (!arguments && !kernel->parameters.empty())
    return complain(CUDA_ERROR_INVALID_VALUE, "%s: no arguments for %zu parameters", name, kernel->parameters.size());
  if (CUresult refused = check_arguments(*kernel, l, arguments)) return refused;
  return record(l);
}

}  // namespace null_gpu

using namespace null_gpu;

API cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction kernel, void** arguments, void** extra) {
  ENTER;
  return launch(*config, reinterpret_cast<Kernel*>(kernel), arguments, extra);
}

API cuLaunchKernel(CUfunction kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** arguments,
                   void** extra) {
  const CUlaunchConfig config{grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, nullptr, 0};
  return cuLaunchKernelEx(&config, kernel, arguments, extra);
}

API cuLaunchCooperativeKernel(CUfunction kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                              unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** arguments) {
  CUlaunchAttribute cooperative{};
  cooperative.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
  cooperative.value.cooperative = 1;
  const CUlaunchConfig config{grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, &cooperative, 1};
  return cuLaunchKernelEx(&config, kernel, arguments, nullptr);
}

API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction kernel, int threads, size_t shared,
                                                         unsigned) {
  ENTER;
  if (threads <= 0) return CUDA_ERROR_INVALID_VALUE;
  if (CUresult refused = load(*reinterpret_cast<Kernel*>(kernel))) return refused;
  *blocks = resident_blocks(*reinterpret_cast<Kernel*>(kernel), threads, shared);
  return CUDA_SUCCESS;
}

API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction kernel, int threads, size_t shared) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, threads, shared, 0);
}

// The documented rules are checked; nothing is encoded.
API cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* address,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                           CUtensorMapFloatOOBfill) {
  ENTER;
  bool valid = rank >= 1 && rank <= 5 && reinterpret_cast<uintptr_t>(address) % 16 == 0 &&
               reinterpret_cast<uintptr_t>(map) % 64 == 0;
  for (cuuint32_t i = 0; valid && i < rank; ++i) {
    valid = sizes[i] > 0 && sizes[i] <= (1ull << 32) && box[i] > 0 && box[i] <= 256 && steps[i] > 0 && steps[i] <= 8;
    if (i + 1 < rank) valid = valid && strides[i] % 16 == 0 && strides[i] < (1ull << 40);
  }
  if (!valid) return complain(CUDA_ERROR_INVALID_VALUE, "cuTensorMapEncodeTiled: an invalid tensor map");
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}
