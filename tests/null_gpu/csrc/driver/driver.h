// The null GPU's driver: what its parts share. Memory and copies are real, kernels are looked up, checked and recorded.
//
// Everything is done when it is submitted, under one lock. What a GPU would refuse is refused with the GPU's error and
// leaves a complaint, which the tests read; what is not implemented says so in a complaint, too.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define EXPORTED __attribute__((visibility("default")))
#define API extern "C" EXPORTED CUresult
// The first line of every function of the driver's interface.
#define ENTER                                       \
  if (CUresult refused = entered()) return refused; \
  std::lock_guard<std::recursive_mutex> lock(mutex)

namespace null_gpu {

extern std::recursive_mutex mutex;

// Success once cuInit was called in this process; a fork's child has CUDA_ERROR_NOT_INITIALIZED for good, as on a GPU.
CUresult entered();
CUresult initialize();

// Keeps the text for the tests and gives the error back.
CUresult complain(CUresult error, const char* format, ...) __attribute__((format(printf, 2, 3)));

// ---- device.cpp ----

struct Model {
  int capability;  // 90
  const char* name;
  int multiprocessors, shared, shared_of_block, threads, blocks;  // of a multiprocessor, but for shared_of_block
  int l2_mib, clock_mhz, memory_clock_mhz, bus_bits, memory_gib;
};
struct Options {
  const Model* model;  // null: no such capability
  int devices;
  size_t memory;  // bytes of a device
};
const Options& options();

constexpr int kRegisters = 65536;         // of a multiprocessor
constexpr int kDefaultShared = 48 << 10;  // bytes of a block's shared memory without a kernel's consent
constexpr int kReservedShared = 1024;     // bytes of each block that are the system's
constexpr int kMaxThreads = 1024, kMaxThreadsZ = 64;
constexpr unsigned kMaxGridX = 2147483647, kMaxGridYZ = 65535;

// ---- memory.cpp ----

enum class Kind { kDevice, kPinned, kRegistered };
struct Allocation {
  size_t size;
  Kind kind;
  int device;
};
// The allocation that has this address; null where none has.
const std::pair<const CUdeviceptr, Allocation>* allocation_at(CUdeviceptr address);
int device_with_address(CUdeviceptr address);  // whose address range it is in, allocated or not; -1: no device's
bool is_pageable_host_memory(CUdeviceptr address);
void protect_from_forks();

// ---- streams.cpp, graphs.cpp ----

using Work = std::function<void(CUstream)>;  // the stream that it is done in
struct Graph {
  std::vector<Work> nodes;
};
struct Stream;
using Clock = std::map<const Stream*, uint64_t>;  // the latest work of every stream that something comes after
struct Capture {
  uint64_t id;
  Stream* origin;
  CUstreamCaptureMode mode;
  std::thread::id thread;
  bool broken = false;
  uint64_t works = 0;
  std::unique_ptr<Graph> graph = std::make_unique<Graph>();
  std::map<Stream*, Clock> clocks;  // of the streams in it
};
struct Context {
  int device;
  unsigned flags = 0;
  int retained = 0;
};
struct Stream {
  int device;
  unsigned flags = 0;
  int priority = 0;
  uint64_t id = 0;
  std::shared_ptr<Capture> capture;
};
extern std::vector<std::shared_ptr<Capture>> captures;  // that have not ended

Context* primary_context(int device);
Context* current_context();
int current_device();  // 0 without a context
uint64_t next_id();
Stream* find_stream(CUstream stream);  // null, and a complaint: there is no such stream
bool is_legacy(const Stream* stream);
// The legacy stream waits for other streams but those made with CU_STREAM_NON_BLOCKING, which no capture may have.
CUresult use_legacy_stream(int device);
// Does the work now, or adds it to the graph of the capture that the stream is in.
CUresult submit(CUstream stream, Work work);
// A call that waits for the stream (null: for the device): refused in a capture, which it breaks.
CUresult refuse_in_capture(Stream* stream, const char* call);
// A call that may wait for the device, such as cuMemAlloc: refused by the capture's mode.
CUresult refuse_unsafe_in_capture(const char* call);

// ---- modules.cpp ----

struct Module;
struct Parameter {
  int offset, size;
};
struct Kernel {
  Module* module;
  std::string name;
  bool known = false;  // the rest was read from its binary
  int registers = 32, static_shared = 0, local = 0, max_threads = kMaxThreads;
  unsigned cluster[3] = {0, 0, 0};  // that it was compiled for; 0: any
  std::vector<Parameter> parameters;
  std::map<int, int> max_dynamic_shared;  // as set, by device
  bool any_cluster_size = false;
  std::set<int> devices;  // that have loaded it
};
struct Module {
  const void* packed = nullptr;  // the image in a fat binary, until a kernel is asked for
  std::vector<char> image;
  int arch = 0;
  bool ptx = false, parsed = false;
  bool of_torch = false;  // in torch's library
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  std::map<std::string, size_t> variables;
  std::map<std::string, CUdeviceptr> addresses;  // of variables that were asked for
};
// The image of a cubin, PTX or fat binary that the device runs: fat_binary.cpp.
CUresult load(Module** module, const void* code);
// A kernel is loaded when a device first uses it: in a capture as cuModuleLoadData is.
CUresult load(Kernel& kernel);
bool unpack(const void* packed, std::vector<char>& image);
// Reads a cubin's kernels and variables: cubin.cpp.
void parse(Module& module);
int arch_of_cubin(const void* elf);

// ---- launches.cpp ----

int max_threads(const Kernel& kernel);
int max_dynamic_shared(const Kernel& kernel);
int resident_blocks(const Kernel& kernel, int threads, size_t dynamic_shared);
CUresult launch(const CUlaunchConfig& config, Kernel* kernel, void** arguments, void** extra);

}  // namespace null_gpu
