// Errors, devices, memory, streams, events and graphs of the runtime: nearly all are the driver's, under other names.
#include "runtime.h"

#include <cstring>
#include <utility>

namespace null_gpu {
namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local int thread_device = 0;

cudaError_t start() {
  static const CUresult started = cuInit(0);
  return result(started ? started : cuInit(0));  // a fork's child is refused
}

cudaError_t use_device(int device) {
  CUcontext context;
  if (CUresult error = cuDevicePrimaryCtxRetain(&context, device)) return result(error);
  return result(cuCtxSetCurrent(context));
}

}  // namespace

cudaError_t result(CUresult error) {
  const auto out = static_cast<cudaError_t>(error);
  if (out != cudaSuccess && out != cudaErrorNotReady) last_error = out;
  return out;
}

cudaError_t use_context() {
  if (cudaError_t error = start()) return error;
  CUcontext context = nullptr;
  cuCtxGetCurrent(&context);
  return context ? cudaSuccess : use_device(thread_device);
}

}  // namespace null_gpu

using namespace null_gpu;

// ---- errors and versions ----

API cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
API cudaPeekAtLastError() { return last_error; }

extern "C" __attribute__((visibility("default"))) const char* cudaGetErrorString(cudaError_t error) {
  const char* text = nullptr;
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  if (error == cudaErrorInvalidDeviceFunction) return "invalid device function";
  if (error == cudaErrorInvalidSymbol) return "invalid device symbol";
  cuGetErrorString(static_cast<CUresult>(error), &text);
  return text ? text : "unrecognized error code";
}

extern "C" __attribute__((visibility("default"))) const char* cudaGetErrorName(cudaError_t error) {
  const char* name = nullptr;
  cuGetErrorName(static_cast<CUresult>(error), &name);
  return name ? name : "unrecognized error code";
}

API cudaDriverGetVersion(int* version) { return result(cuDriverGetVersion(version)); }

API cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

API cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long flags,
                                     cudaDriverEntryPointQueryResult* status) {
  CUdriverProcAddressQueryResult found;
  const CUresult error = cuGetProcAddress(name, function, int(version), flags, &found);
  if (status) *status = static_cast<cudaDriverEntryPointQueryResult>(found);
  return result(error);
}

// ---- devices ----

API cudaGetDeviceCount(int* count) {
  *count = 0;
  if (cudaError_t error = start()) return error;
  return result(cuDeviceGetCount(count));
}

API cudaGetDevice(int* device) {
  if (cudaError_t error = start()) return error;
  CUcontext context = nullptr;
  cuCtxGetCurrent(&context);
  if (context) return result(cuCtxGetDevice(device));
  *device = thread_device;
  return cudaSuccess;
}

API cudaSetDevice(int device) {
  if (cudaError_t error = start()) return error;
  CUdevice found;
  if (CUresult error = cuDeviceGet(&found, device)) return result(error);
  thread_device = device;
  return use_device(device);
}

API cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  if (cudaError_t error = start()) return error;
  return result(cuDeviceGetAttribute(value, static_cast<CUdevice_attribute>(name), device));
}

API cudaDeviceGetPCIBusId(char* id, int size, int device) DRIVER(cuDeviceGetPCIBusId(id, size, device)) API
    cudaDeviceCanAccessPeer(int* can, int device, int peer) DRIVER(cuDeviceCanAccessPeer(can, device, peer)) API
    cudaDeviceEnablePeerAccess(int, unsigned) DRIVER(CUDA_SUCCESS) API
    cudaDeviceGetStreamPriorityRange(int* least, int* greatest) DRIVER(cuCtxGetStreamPriorityRange(least, greatest)) API
    cudaDeviceSynchronize() DRIVER(cuCtxSynchronize())

        API cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
  if (cudaError_t error = start()) return error;
  *out = {};
  if (CUresult error = cuDeviceGetName(out->name, sizeof out->name, device)) return result(error);
  cuDeviceGetUuid(reinterpret_cast<CUuuid*>(&out->uuid), device);
  cuDeviceTotalMem(&out->totalGlobalMem, device);
  auto get = [device](CUdevice_attribute name) {
    int value = 0;
    cuDeviceGetAttribute(&value, name, device);
    return value;
  };
#define GET(member, name) out->member = get(CU_DEVICE_ATTRIBUTE_##name)
  GET(major, COMPUTE_CAPABILITY_MAJOR);
  GET(minor, COMPUTE_CAPABILITY_MINOR);
  GET(multiProcessorCount, MULTIPROCESSOR_COUNT);
  GET(warpSize, WARP_SIZE);
  GET(maxThreadsPerBlock, MAX_THREADS_PER_BLOCK);
  GET(maxThreadsDim[0], MAX_BLOCK_DIM_X);
  GET(maxThreadsDim[1], MAX_BLOCK_DIM_Y);
  GET(maxThreadsDim[2], MAX_BLOCK_DIM_Z);
  GET(maxGridSize[0], MAX_GRID_DIM_X);
  GET(maxGridSize[1], MAX_GRID_DIM_Y);
  GET(maxGridSize[2], MAX_GRID_DIM_Z);
  GET(maxThreadsPerMultiProcessor, MAX_THREADS_PER_MULTIPROCESSOR);
  GET(maxBlocksPerMultiProcessor, MAX_BLOCKS_PER_MULTIPROCESSOR);
  GET(regsPerBlock, MAX_REGISTERS_PER_BLOCK);
  GET(regsPerMultiprocessor, MAX_REGISTERS_PER_MULTIPROCESSOR);
  GET(sharedMemPerBlock, MAX_SHARED_MEMORY_PER_BLOCK);
  GET(sharedMemPerBlockOptin, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  GET(sharedMemPerMultiprocessor, MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
  GET(reservedSharedMemPerBlock, RESERVED_SHARED_MEMORY_PER_BLOCK);
  GET(l2CacheSize, L2_CACHE_SIZE);
  GET(memoryBusWidth, GLOBAL_MEMORY_BUS_WIDTH);
  GET(totalConstMem, TOTAL_CONSTANT_MEMORY);
  GET(memPitch, MAX_PITCH);
  GET(textureAlignment, TEXTURE_ALIGNMENT);
  GET(texturePitchAlignment, TEXTURE_PITCH_ALIGNMENT);
  GET(asyncEngineCount, ASYNC_ENGINE_COUNT);
  GET(concurrentKernels, CONCURRENT_KERNELS);
  GET(canMapHostMemory, CAN_MAP_HOST_MEMORY);
  GET(unifiedAddressing, UNIFIED_ADDRESSING);
  GET(streamPrioritiesSupported, STREAM_PRIORITIES_SUPPORTED);
  GET(globalL1CacheSupported, GLOBAL_L1_CACHE_SUPPORTED);
  GET(localL1CacheSupported, LOCAL_L1_CACHE_SUPPORTED);
  GET(ECCEnabled, ECC_ENABLED);
  GET(cooperativeLaunch, COOPERATIVE_LAUNCH);
  GET(clusterLaunch, CLUSTER_LAUNCH);
  GET(memoryPoolsSupported, MEMORY_POOLS_SUPPORTED);
  GET(pciBusID, PCI_BUS_ID);
  GET(pciDeviceID, PCI_DEVICE_ID);
#undef GET
  return cudaSuccess;
}

// ---- memory ----

API cudaMalloc(void** out, size_t size) {
  if (cudaError_t error = use_context()) return error;
  *out = nullptr;
  return size ? result(cuMemAlloc(reinterpret_cast<CUdeviceptr*>(out), size)) : cudaSuccess;
}

API cudaMemGetInfo(size_t* available, size_t* total) DRIVER(cuMemGetInfo(available, total)) API cudaFree(void* pointer)
    DRIVER(cuMemFree(address(pointer))) API cudaMallocAsync(void** out, size_t size, cudaStream_t stream)
        DRIVER(cuMemAllocAsync(reinterpret_cast<CUdeviceptr*>(out), size, stream)) API
    cudaFreeAsync(void* pointer, cudaStream_t stream) DRIVER(cuMemFreeAsync(address(pointer), stream)) API
    cudaHostAlloc(void** out, size_t size, unsigned flags) DRIVER(cuMemHostAlloc(out, size, flags)) API
    cudaFreeHost(void* pointer) DRIVER(cuMemFreeHost(pointer)) API
    cudaHostRegister(void* pointer, size_t size, unsigned flags) DRIVER(cuMemHostRegister(pointer, size, flags)) API
    cudaHostUnregister(void* pointer) DRIVER(cuMemHostUnregister(pointer)) API
    cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind)
        DRIVER(cuMemcpy(address(to), address(from), size)) API
    cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream)
        DRIVER(cuMemcpyAsync(address(to), address(from), size, stream)) API
    cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream)
        DRIVER(cuMemcpyAsync(address(to), address(from), size, stream)) API cudaMemset(void* to, int value, size_t size)
            DRIVER(cuMemsetD8(address(to), static_cast<unsigned char>(value), size)) API
    cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream)
        DRIVER(cuMemsetD8Async(address(to), static_cast<unsigned char>(value), size, stream))

    // Memory that CUDA does not know is the host's, and no error.
    API cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  if (cudaError_t error = use_context()) return error;
  *out = {};
  out->device = -1;
  unsigned type;
  const bool known = !cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address(pointer));
  const bool on_device = known && type == CU_MEMORYTYPE_DEVICE;
  if (!on_device) out->hostPointer = const_cast<void*>(pointer);
  if (!known) return cudaSuccess;
  cuPointerGetAttribute(&out->device, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address(pointer));
  out->type = on_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  out->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

// A pool has no settings and keeps nothing.
API cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) DRIVER(cuDeviceGetDefaultMemPool(pool, device)) API
    cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) DRIVER(CUDA_SUCCESS) API
    cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) DRIVER(CUDA_SUCCESS) API
    cudaMemPoolTrimTo(cudaMemPool_t, size_t) DRIVER(CUDA_SUCCESS)

    // ---- streams and events ----

    API cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority)
        DRIVER(cuStreamCreateWithPriority(out, flags, priority)) API
    cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) DRIVER(cuStreamCreateWithPriority(out, flags, 0)) API
    cudaStreamCreate(cudaStream_t* out) DRIVER(cuStreamCreateWithPriority(out, CU_STREAM_DEFAULT, 0)) API
    cudaStreamDestroy(cudaStream_t stream) DRIVER(cuStreamDestroy(stream)) API
    cudaStreamGetPriority(cudaStream_t stream, int* priority) DRIVER(cuStreamGetPriority(stream, priority)) API
    cudaStreamQuery(cudaStream_t stream) DRIVER(cuStreamQuery(stream)) API cudaStreamSynchronize(cudaStream_t stream)
        DRIVER(cuStreamSynchronize(stream)) API
    cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
        DRIVER(cuStreamWaitEvent(stream, event, flags)) API
    cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data)
        DRIVER(cuLaunchHostFunc(stream, function, data)) API cudaEventCreate(cudaEvent_t* out)
            DRIVER(cuEventCreate(out, CU_EVENT_DEFAULT)) API cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags)
                DRIVER(cuEventCreate(out, flags)) API cudaEventDestroy(cudaEvent_t event)
                    DRIVER(cuEventDestroy(event)) API cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
                        DRIVER(cuEventRecord(event, stream)) API
    cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags)
        DRIVER(cuEventRecordWithFlags(event, stream, flags)) API cudaEventQuery(cudaEvent_t event)
            DRIVER(cuEventQuery(event)) API cudaEventSynchronize(cudaEvent_t event)
                DRIVER(cuEventSynchronize(event)) API
    cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to)
        DRIVER(cuEventElapsedTime(milliseconds, from, to))

    // ---- capture and graphs ----

    API cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode)
        DRIVER(cuThreadExchangeStreamCaptureMode(reinterpret_cast<CUstreamCaptureMode*>(mode))) API
    cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode)
        DRIVER(cuStreamBeginCapture(stream, static_cast<CUstreamCaptureMode>(mode))) API
    cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) DRIVER(cuStreamEndCapture(stream, graph))

        API cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  if (cudaError_t error = use_context()) return error;
  cuuint64_t number = 0;
  const CUresult error =
      cuStreamGetCaptureInfo(stream, reinterpret_cast<CUstreamCaptureStatus*>(status), &number, graph, dependencies,
                             reinterpret_cast<const CUgraphEdgeData**>(edges), count);
  if (id) *id = number;
  return result(error);
}

API cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

API cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count)
    DRIVER(cuGraphGetNodes(graph, nodes, count)) API
    cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long flags)
        DRIVER(cuGraphInstantiateWithFlags(out, graph, flags)) API
    cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) DRIVER(cuGraphLaunch(graph, stream)) API
    cudaGraphDestroy(cudaGraph_t graph) DRIVER(cuGraphDestroy(graph)) API cudaGraphExecDestroy(cudaGraphExec_t graph)
        DRIVER(cuGraphExecDestroy(graph))

    // torch hands a graph what it shall keep alive; here that lives until the process ends.
    API cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  *object = nullptr;
  return cudaSuccess;
}
API cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }
API cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }

// A profiler would start and stop.
API cudaProfilerStart() { return cudaSuccess; }
API cudaProfilerStop() { return cudaSuccess; }

// ---- what torch wants to exist, for features that this GPU does not have ----

extern "C" void null_gpu_complain(const char* text);
#define NOT_SUPPORTED(name)                                                                      \
  extern "C" __attribute__((visibility("default"))) cudaError_t name##_refused() __asm__(#name); \
  extern "C" __attribute__((visibility("default"))) cudaError_t name##_refused() {               \
    null_gpu_complain(#name " is not implemented");                                              \
    return result(CUDA_ERROR_NOT_SUPPORTED);                                                     \
  }
NOT_SUPPORTED(cudaDeviceGetGraphMemAttribute)
NOT_SUPPORTED(cudaDeviceSetGraphMemAttribute)
NOT_SUPPORTED(cudaGraphAddNode)
NOT_SUPPORTED(cudaGraphConditionalHandleCreate)
NOT_SUPPORTED(cudaGraphNodeGetDependencies)
NOT_SUPPORTED(cudaIpcCloseMemHandle)
NOT_SUPPORTED(cudaIpcGetEventHandle)
NOT_SUPPORTED(cudaIpcGetMemHandle)
NOT_SUPPORTED(cudaIpcOpenEventHandle)
NOT_SUPPORTED(cudaIpcOpenMemHandle)
NOT_SUPPORTED(cudaMemcpy2DAsync)
NOT_SUPPORTED(cudaMemPoolGetAttribute)
NOT_SUPPORTED(cudaStreamAddCallback)
NOT_SUPPORTED(cudaStreamBeginCaptureToGraph)
NOT_SUPPORTED(cudaStreamUpdateCaptureDependencies)
