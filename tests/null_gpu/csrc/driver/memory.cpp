// Memory. A device's is a range of addresses that the host can neither read nor write, as with a GPU: a file of which
// the driver has a second, readable view. Pages exist once they are written to.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "driver.h"

namespace null_gpu {
namespace {

struct Memory {  // of one device
  char* addresses = nullptr;
  char* view = nullptr;
  std::map<size_t, size_t> holes;  // offset: size
  size_t used = 0;
};

constexpr size_t kSmall = 512, kLarge = 2 << 20;  // the units that allocations are made of
constexpr size_t kPage = 4096;
// Far from the host's own addresses: no number and no mixture of two halves looks like one of these.
constexpr uintptr_t kFirstAddress = 0x5a5b00000000;
// Of a device: more than any has memory. Allocations are kept apart, so that the end of one is not in the next.
constexpr size_t kAddresses = 1ull << 39;

std::map<CUdeviceptr, Allocation> allocations;

Memory& memory_of(int device) {
  static std::vector<Memory> memories(options().devices);
  return memories[device];
}

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }
size_t unit_of(size_t size) { return size < (1 << 20) ? kSmall : kLarge; }

void open(Memory& memory, int device) {
  if (memory.addresses) return;
  const int file = memfd_create("null GPU", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, off_t(kAddresses))) abort();
  void* at = reinterpret_cast<void*>(kFirstAddress + device * kAddresses);
  const int flags = MAP_SHARED | MAP_NORESERVE;
  void* addresses = mmap(at, kAddresses, PROT_NONE, flags | MAP_FIXED_NOREPLACE, file, 0);
  void* view = mmap(nullptr, kAddresses, PROT_READ | PROT_WRITE, flags, file, 0);
  if (addresses == MAP_FAILED || view == MAP_FAILED) abort();
  close(file);
  memory.addresses = static_cast<char*>(addresses);
  memory.view = static_cast<char*>(view);
  memory.holes[0] = kAddresses;
}

CUresult allocate(CUdeviceptr* out, size_t size, int device) {
  if (!size) return CUDA_ERROR_INVALID_VALUE;
  Memory& memory = memory_of(device);
  open(memory, device);
  const size_t unit = unit_of(size);
  if (size > options().memory || memory.used + round_up(size, unit) > options().memory) return CUDA_ERROR_OUT_OF_MEMORY;
  const size_t rounded = round_up(size, unit), taken = rounded + unit;
  for (auto hole = memory.holes.begin(); hole != memory.holes.end(); ++hole) {
    const size_t first = hole->first, end = first + hole->second, start = round_up(first, unit);
    if (start + taken > end) continue;
    memory.holes.erase(hole);
    if (start > first) memory.holes[first] = start - first;
    if (end > start + taken) memory.holes[start + taken] = end - start - taken;
    memory.used += rounded;
    *out = reinterpret_cast<CUdeviceptr>(memory.addresses) + start;
    allocations[*out] = {size, Kind::kDevice, device};
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult release(CUdeviceptr address) {
  if (!address) return CUDA_SUCCESS;
  const auto it = allocations.find(address);
  if (it == allocations.end() || it->second.kind != Kind::kDevice)
    return complain(CUDA_ERROR_INVALID_VALUE, "free of %#llx, which is not an allocation", address);
  Memory& memory = memory_of(it->second.device);
  size_t start = address - reinterpret_cast<CUdeviceptr>(memory.addresses);
  const size_t unit = unit_of(it->second.size), rounded = round_up(it->second.size, unit);
  size_t size = rounded + unit;
  allocations.erase(it);
  memory.used -= rounded;
  if (size >= kLarge) madvise(memory.view + start, size, MADV_REMOVE);  // gives the pages back
  auto next = memory.holes.lower_bound(start);
  if (next != memory.holes.end() && next->first == start + size) {
    size += next->second;
    next = memory.holes.erase(next);
  }
  if (next != memory.holes.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == start) {
      start = before->first;
      size += before->second;
      memory.holes.erase(before);
    }
  }
  memory.holes[start] = size;
  return CUDA_SUCCESS;
}

// Where the driver reads or writes `size` bytes at the address; null, and a complaint, where they are not allocated.
char* host_view(CUdeviceptr address, size_t size, const char* access) {
  const int device = device_with_address(address);
  if (device < 0) return reinterpret_cast<char*>(address);
  const auto* found = allocation_at(address);
  if (!found || address + size > found->first + found->second.size) {
    complain(CUDA_ERROR_INVALID_VALUE, "%s of %zu bytes at %#llx, which are not in one allocation", access, size,
             address);
    return nullptr;
  }
  return memory_of(device).view + (address - reinterpret_cast<CUdeviceptr>(memory_of(device).addresses));
}

// Bytes that no host reads at once: with NULL_GPU_DATA=0 they are checked and submitted, but not moved.
bool is_moved(bool inside_a_device) {
  static const char* data = getenv("NULL_GPU_DATA");
  return !inside_a_device || !data || strcmp(data, "0");
}

CUresult copy(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  if (!size) return CUDA_SUCCESS;
  char* target = host_view(to, size, "write");
  const char* source = host_view(from, size, "read");
  if (!target || !source) return CUDA_ERROR_INVALID_VALUE;
  if (!is_moved(device_with_address(to) >= 0 && device_with_address(from) >= 0)) return submit(stream, [](CUstream) {});
  return submit(stream, [=](CUstream) { memmove(target, source, size); });
}

template <class T>
CUresult fill(CUdeviceptr to, T value, size_t count, CUstream stream) {
  if (!count) return CUDA_SUCCESS;
  char* target = host_view(to, count * sizeof(T), "memset");
  if (!target) return CUDA_ERROR_INVALID_VALUE;
  if (!is_moved(device_with_address(to) >= 0)) return submit(stream, [](CUstream) {});
  return submit(stream, [=](CUstream) { std::fill_n(reinterpret_cast<T*>(target), count, value); });
}

}  // namespace

const std::pair<const CUdeviceptr, Allocation>* allocation_at(CUdeviceptr address) {
  auto it = allocations.upper_bound(address);
  if (it == allocations.begin()) return nullptr;
  --it;
  return address < it->first + it->second.size ? &*it : nullptr;
}

int device_with_address(CUdeviceptr address) {
  for (int i = 0; i < options().devices; ++i) {
    const CUdeviceptr first = reinterpret_cast<CUdeviceptr>(memory_of(i).addresses);
    if (first && address >= first && address < first + options().memory) return i;
  }
  return -1;
}

bool is_pageable_host_memory(CUdeviceptr address) {
  constexpr CUdeviceptr kLowest = 1ull << 32, kEnd = 1ull << 47;  // numbers are smaller
  if (address < kLowest || address >= kEnd || device_with_address(address) >= 0 || allocation_at(address)) return false;
  // msync refuses pages that are not mapped, and writes nothing of memory without a file.
  return !msync(reinterpret_cast<void*>(address / kPage * kPage), kPage, MS_ASYNC);
}

void protect_from_forks() {
  for (int i = 0; i < options().devices; ++i)
    if (memory_of(i).view) madvise(memory_of(i).view, kAddresses, MADV_DONTFORK);
}

}  // namespace null_gpu

using namespace null_gpu;

API cuMemGetInfo(size_t* available, size_t* total) {
  ENTER;
  *total = options().memory;
  *available = options().memory - memory_of(current_device()).used;
  return CUDA_SUCCESS;
}

API cuMemAlloc(CUdeviceptr* address, size_t size) {
  ENTER;
  if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
  if (CUresult refused = refuse_unsafe_in_capture("cuMemAlloc")) return refused;
  return allocate(address, size, current_device());
}

API cuMemFree(CUdeviceptr address) {
  ENTER;
  if (CUresult refused = refuse_unsafe_in_capture("cuMemFree")) return refused;
  return release(address);
}

// Pools are their device's memory; a capture would have to give its graph allocation nodes.
API cuMemAllocAsync(CUdeviceptr* address, size_t size, CUstream stream) {
  ENTER;
  const Stream* found = find_stream(stream);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  if (found->capture) return complain(CUDA_ERROR_NOT_SUPPORTED, "cuMemAllocAsync in a capture is not implemented");
  return allocate(address, size, found->device);
}

API cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
  ENTER;
  const Stream* found = find_stream(stream);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  if (found->capture) return complain(CUDA_ERROR_NOT_SUPPORTED, "cuMemFreeAsync in a capture is not implemented");
  return release(address);
}

API cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice device) {
  ENTER;
  if (device < 0 || device >= options().devices) return CUDA_ERROR_INVALID_DEVICE;
  *pool = reinterpret_cast<CUmemoryPool>(&memory_of(device));
  return CUDA_SUCCESS;
}

API cuMemHostAlloc(void** address, size_t size, unsigned) {
  ENTER;
  if (!size) return CUDA_ERROR_INVALID_VALUE;
  if (CUresult refused = refuse_unsafe_in_capture("cuMemHostAlloc")) return refused;
  void* pages = mmap(nullptr, round_up(size, kPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  allocations[reinterpret_cast<CUdeviceptr>(pages)] = {size, Kind::kPinned, current_device()};
  *address = pages;
  return CUDA_SUCCESS;
}

API cuMemFreeHost(void* address) {
  ENTER;
  const auto it = allocations.find(reinterpret_cast<CUdeviceptr>(address));
  if (it == allocations.end() || it->second.kind != Kind::kPinned)
    return complain(CUDA_ERROR_INVALID_VALUE, "free of %p, which is not pinned memory", address);
  munmap(address, round_up(it->second.size, kPage));
  allocations.erase(it);
  return CUDA_SUCCESS;
}

API cuMemHostRegister(void* address, size_t size, unsigned) {
  ENTER;
  const auto key = reinterpret_cast<CUdeviceptr>(address);
  if (!size || !address) return CUDA_ERROR_INVALID_VALUE;
  if (allocation_at(key)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  allocations[key] = {size, Kind::kRegistered, current_device()};
  return CUDA_SUCCESS;
}

API cuMemHostUnregister(void* address) {
  ENTER;
  const auto it = allocations.find(reinterpret_cast<CUdeviceptr>(address));
  if (it == allocations.end() || it->second.kind != Kind::kRegistered) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
  allocations.erase(it);
  return CUDA_SUCCESS;
}

API cuMemGetAddressRange(CUdeviceptr* base, size_t* size, CUdeviceptr address) {
  ENTER;
  const auto* found = allocation_at(address);
  if (!found) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = found->first;
  if (size) *size = found->second.size;
  return CUDA_SUCCESS;
}

API cuPointerGetAttribute(void* out, CUpointer_attribute name, CUdeviceptr address) {
  ENTER;
  const auto* found = allocation_at(address);
  if (!found) return CUDA_ERROR_INVALID_VALUE;
  const Allocation& allocation = found->second;
  const bool host = allocation.kind != Kind::kDevice;
  switch (name) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *static_cast<void**>(out) = primary_context(allocation.device); break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<unsigned*>(out) = host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
      break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      if (!host) return CUDA_ERROR_INVALID_VALUE;
      [[fallthrough]];
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *static_cast<CUdeviceptr*>(out) = address; break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *static_cast<unsigned*>(out) = 0; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(out) = allocation.device; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *static_cast<CUdeviceptr*>(out) = found->first; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *static_cast<size_t*>(out) = allocation.size; break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *static_cast<unsigned long long*>(out) = found->first; break;
    default: return complain(CUDA_ERROR_NOT_SUPPORTED, "cuPointerGetAttribute %d is not implemented", int(name));
  }
  return CUDA_SUCCESS;
}

API cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  ENTER;
  return copy(to, from, size, stream);
}

// The copy that waits is work of the legacy stream.
API cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t size) {
  ENTER;
  return copy(to, from, size, nullptr);
}

API cuMemsetD8(CUdeviceptr to, unsigned char value, size_t count) {
  ENTER;
  return fill(to, value, count, nullptr);
}

API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
  ENTER;
  return fill(to, value, count, stream);
}

API cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
  ENTER;
  return fill(to, value, count, stream);
}
