// Contexts, streams and events. Work is done when it is submitted; a capture keeps it for its graph.
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <new>
#include <set>

#include "driver.h"
#include "records.h"

namespace null_gpu {

std::recursive_mutex mutex;

namespace {

struct Event {
  unsigned flags = 0;
  bool recorded = false;
  std::chrono::steady_clock::time_point when{};
  std::shared_ptr<Capture> capture;  // of the stream that it was last recorded in
  Clock clock;
};

bool initialized = false, forked = false;
std::set<Stream*> streams;
std::set<Event*> events;
thread_local std::vector<Context*> context_stack;

Stream* legacy_stream(int device) {
  static std::vector<Stream> all = [] {
    std::vector<Stream> made(options().devices);
    for (size_t i = 0; i < made.size(); ++i) made[i].device = int(i);
    return made;
  }();
  return &all[device];
}

Event* find_event(CUevent event) {
  const auto it = events.find(reinterpret_cast<Event*>(event));
  if (it != events.end()) return *it;
  complain(CUDA_ERROR_INVALID_HANDLE, "event %p does not exist", static_cast<void*>(event));
  return nullptr;
}

}  // namespace

CUresult initialize() {
  if (forked) return CUDA_ERROR_NOT_INITIALIZED;
  if (!options().model) return CUDA_ERROR_NO_DEVICE;
  if (!initialized) {
    pthread_atfork(
        [] {
          mutex.lock();
          protect_from_forks();
        },
        [] { mutex.unlock(); },
        [] {
          new (&mutex) std::recursive_mutex;  // the parent's thread has it locked, not the child's
          forked = true;
        });
  }
  initialized = true;
  return CUDA_SUCCESS;
}

CUresult entered() { return initialized && !forked ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED; }

CUresult complain(CUresult error, const char* format, ...) {
  char text[1024];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  add_complaint(text);
  return error;
}

Context* primary_context(int device) {
  static std::vector<Context> all = [] {
    std::vector<Context> made(options().devices);
    for (size_t i = 0; i < made.size(); ++i) made[i].device = int(i);
    return made;
  }();
  return &all[device];
}

Context* current_context() { return context_stack.empty() ? nullptr : context_stack.back(); }
int current_device() { return current_context() ? current_context()->device : 0; }

bool is_legacy(const Stream* stream) { return stream == legacy_stream(stream->device); }

uint64_t next_id() {
  static uint64_t id = 0;
  return ++id;
}

Stream* find_stream(CUstream stream) {
  if (stream == nullptr || stream == CU_STREAM_LEGACY) return legacy_stream(current_device());
  const auto it = streams.find(reinterpret_cast<Stream*>(stream));
  if (it != streams.end()) return *it;
  complain(CUDA_ERROR_INVALID_HANDLE, "stream %p does not exist", static_cast<void*>(stream));
  return nullptr;
}

}  // namespace null_gpu

using namespace null_gpu;

// ---- contexts ----

API cuInit(unsigned) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return initialize();
}

API cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ENTER;
  if (device < 0 || device >= options().devices) return CUDA_ERROR_INVALID_DEVICE;
  ++primary_context(device)->retained;
  *context = reinterpret_cast<CUcontext>(primary_context(device));
  return CUDA_SUCCESS;
}

API cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  ENTER;
  if (device < 0 || device >= options().devices) return CUDA_ERROR_INVALID_DEVICE;
  *flags = primary_context(device)->flags;
  *active = primary_context(device)->retained > 0;
  return CUDA_SUCCESS;
}

API cuCtxGetCurrent(CUcontext* context) {
  ENTER;
  *context = reinterpret_cast<CUcontext>(current_context());
  return CUDA_SUCCESS;
}

API cuCtxSetCurrent(CUcontext context) {
  ENTER;
  if (!context_stack.empty()) context_stack.pop_back();
  if (context) context_stack.push_back(reinterpret_cast<Context*>(context));
  return CUDA_SUCCESS;
}

API cuCtxPushCurrent(CUcontext context) {
  ENTER;
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  context_stack.push_back(reinterpret_cast<Context*>(context));
  return CUDA_SUCCESS;
}

API cuCtxPopCurrent(CUcontext* context) {
  ENTER;
  if (context_stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context) *context = reinterpret_cast<CUcontext>(context_stack.back());
  context_stack.pop_back();
  return CUDA_SUCCESS;
}

API cuCtxGetDevice(CUdevice* device) {
  ENTER;
  if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
  *device = current_device();
  return CUDA_SUCCESS;
}

API cuCtxSynchronize() {
  ENTER;
  return refuse_in_capture(nullptr, "cuCtxSynchronize");
}

API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  ENTER;
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return CUDA_SUCCESS;
}

// Triton reads and raises the stack's limit; nothing here has a stack.
API cuCtxGetLimit(size_t* value, CUlimit limit) {
  ENTER;
  if (limit != CU_LIMIT_STACK_SIZE) return complain(CUDA_ERROR_NOT_SUPPORTED, "cuCtxGetLimit %d", int(limit));
  *value = 1024;
  return CUDA_SUCCESS;
}

API cuCtxSetLimit(CUlimit limit, size_t) {
  ENTER;
  if (limit != CU_LIMIT_STACK_SIZE) return complain(CUDA_ERROR_NOT_SUPPORTED, "cuCtxSetLimit %d", int(limit));
  return CUDA_SUCCESS;
}

// ---- streams ----

API cuStreamCreateWithPriority(CUstream* out, unsigned flags, int priority) {
  ENTER;
  if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
  auto* stream = new Stream{current_device(), flags, std::clamp(priority, -5, 0), next_id(), nullptr};
  streams.insert(stream);
  *out = reinterpret_cast<CUstream>(stream);
  return CUDA_SUCCESS;
}

API cuStreamDestroy(CUstream handle) {
  ENTER;
  Stream* stream = find_stream(handle);
  if (!stream || is_legacy(stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) return complain(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "cuStreamDestroy of a captured stream");
  streams.erase(stream);
  delete stream;
  return CUDA_SUCCESS;
}

API cuStreamSynchronize(CUstream handle) {
  ENTER;
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (is_legacy(stream))
    if (CUresult refused = use_legacy_stream(stream->device)) return refused;
  return refuse_in_capture(stream, "cuStreamSynchronize");
}

API cuStreamQuery(CUstream handle) {
  ENTER;
  Stream* stream = find_stream(handle);
  return stream ? refuse_in_capture(stream, "cuStreamQuery") : CUDA_ERROR_INVALID_HANDLE;
}

API cuStreamGetPriority(CUstream handle, int* priority) {
  ENTER;
  const Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  *priority = stream->priority;
  return CUDA_SUCCESS;
}

API cuLaunchHostFunc(CUstream handle, CUhostFn function, void* data) {
  ENTER;
  return submit(handle, [=](CUstream) { function(data); });
}

// An event of a capture draws the stream into it.
API cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned) {
  ENTER;
  Stream* stream = find_stream(handle);
  const Event* event = find_event(event_handle);
  if (!stream || !event) return CUDA_ERROR_INVALID_HANDLE;
  if (!event->recorded) return CUDA_SUCCESS;
  const auto& capture = event->capture;
  if (stream->capture && stream->capture->broken) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (stream->capture && !capture) {
    stream->capture->broken = true;
    return complain(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "a captured stream waits for an event from outside");
  }
  if (!capture) return CUDA_SUCCESS;
  if (std::find(captures.begin(), captures.end(), capture) == captures.end())
    return complain(CUDA_ERROR_CAPTURED_EVENT, "cuStreamWaitEvent: an event of a capture that has ended");
  if (stream->capture && stream->capture != capture) {
    stream->capture->broken = capture->broken = true;
    return complain(CUDA_ERROR_STREAM_CAPTURE_MERGE, "a captured stream waits for another capture's event");
  }
  if (is_legacy(stream)) {
    capture->broken = true;
    return complain(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "the legacy stream waits for an event of a capture");
  }
  stream->capture = capture;
  for (const auto& [other, work] : event->clock) {
    uint64_t& seen = capture->clocks[stream][other];
    seen = std::max(seen, work);
  }
  return CUDA_SUCCESS;
}

// ---- events ----

API cuEventCreate(CUevent* out, unsigned flags) {
  ENTER;
  if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
  auto* event = new Event;
  event->flags = flags;
  events.insert(event);
  *out = reinterpret_cast<CUevent>(event);
  return CUDA_SUCCESS;
}

API cuEventDestroy(CUevent handle) {
  ENTER;
  Event* event = find_event(handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  events.erase(event);
  delete event;
  return CUDA_SUCCESS;
}

API cuEventRecordWithFlags(CUevent handle, CUstream stream_handle, unsigned) {
  ENTER;
  Event* event = find_event(handle);
  Stream* stream = find_stream(stream_handle);
  if (!event || !stream) return CUDA_ERROR_INVALID_HANDLE;
  if (is_legacy(stream))
    if (CUresult refused = use_legacy_stream(stream->device)) return refused;
  if (stream->capture && stream->capture->broken) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  event->recorded = true;
  event->capture = stream->capture;
  event->clock = stream->capture ? stream->capture->clocks[stream] : Clock();
  event->when = std::chrono::steady_clock::now();
  return CUDA_SUCCESS;
}

API cuEventRecord(CUevent handle, CUstream stream) { return cuEventRecordWithFlags(handle, stream, 0); }

static CUresult wait_for(CUevent handle, const char* call) {
  Event* event = find_event(handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  if (!event->capture) return CUDA_SUCCESS;
  event->capture->broken = true;
  return complain(CUDA_ERROR_CAPTURED_EVENT, "%s of an event that was recorded in a capture", call);
}

API cuEventQuery(CUevent handle) {
  ENTER;
  if (CUresult refused = refuse_unsafe_in_capture("cuEventQuery")) return refused;
  return wait_for(handle, "cuEventQuery");
}

API cuEventSynchronize(CUevent handle) {
  ENTER;
  if (CUresult refused = refuse_unsafe_in_capture("cuEventSynchronize")) return refused;
  return wait_for(handle, "cuEventSynchronize");
}

API cuEventElapsedTime(float* milliseconds, CUevent from, CUevent to) {
  ENTER;
  const Event *first = find_event(from), *second = find_event(to);
  if (!first || !second || !first->recorded || !second->recorded) return CUDA_ERROR_INVALID_HANDLE;
  if ((first->flags | second->flags) & CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_HANDLE;
  *milliseconds = std::chrono::duration<float, std::milli>(second->when - first->when).count();
  return CUDA_SUCCESS;
}
