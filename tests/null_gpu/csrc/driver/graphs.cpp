// Captures and their graphs, by the rules of the CUDA C++ Programming Guide, "Stream Capture".
#include <algorithm>

#include "driver.h"
#include "records.h"

namespace null_gpu {

std::vector<std::shared_ptr<Capture>> captures;

namespace {

thread_local CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

}  // namespace

CUresult use_legacy_stream(int device) {
  for (const auto& capture : captures)
    for (const auto& [stream, clock] : capture->clocks) {
      if (stream->device != device) continue;
      if (!(stream->flags & CU_STREAM_NON_BLOCKING)) {
        capture->broken = true;
        return complain(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                        "work in the legacy stream while a stream that it waits for is captured");
      }
      complain(CUDA_SUCCESS, "work in the legacy stream while another is captured: the graph will not have it");
    }
  return CUDA_SUCCESS;
}

CUresult submit(CUstream handle, Work work) {
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (Capture* capture = stream->capture.get()) {
    if (capture->broken) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    capture->graph->nodes.push_back(std::move(work));
    capture->clocks[stream][stream] = ++capture->works;
    return CUDA_SUCCESS;
  }
  if (is_legacy(stream))
    if (CUresult refused = use_legacy_stream(stream->device)) return refused;
  work(handle);
  return CUDA_SUCCESS;
}

CUresult refuse_in_capture(Stream* stream, const char* call) {
  bool captured = false;
  for (const auto& capture : captures) {
    if (stream ? stream->capture != capture : capture->origin->device != current_device()) continue;
    capture->broken = captured = true;
  }
  if (!captured) return CUDA_SUCCESS;
  return complain(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "%s while a stream is captured", call);
}

// cuThreadExchangeStreamCaptureMode tells the rules.
CUresult refuse_unsafe_in_capture(const char* call) {
  if (thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
  for (const auto& capture : captures) {
    const bool own = capture->thread == std::this_thread::get_id();
    const bool global = capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
    if (own ? capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED : !global || thread_mode != CU_STREAM_CAPTURE_MODE_GLOBAL)
      continue;
    capture->broken = true;
    return complain(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "%s while a stream is captured", call);
  }
  return CUDA_SUCCESS;
}

}  // namespace null_gpu

using namespace null_gpu;

API cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  ENTER;
  std::swap(*mode, thread_mode);
  return CUDA_SUCCESS;
}

API cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
  ENTER;
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (is_legacy(stream)) return complain(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "capture of the legacy stream");
  if (stream->capture) return complain(CUDA_ERROR_ILLEGAL_STATE, "the stream is captured already");
  auto capture = std::make_shared<Capture>();
  capture->id = next_id();
  capture->origin = stream;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->clocks[stream];
  stream->capture = capture;
  captures.push_back(capture);
  return CUDA_SUCCESS;
}

API cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  ENTER;
  *graph = nullptr;
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  const auto capture = stream->capture;
  if (!capture) return complain(CUDA_ERROR_ILLEGAL_STATE, "the stream is not captured");
  if (capture->origin != stream) {
    capture->broken = true;
    return complain(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "the capture began in another stream");
  }
  if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != std::this_thread::get_id())
    return complain(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "the capture began in another thread");
  captures.erase(std::find(captures.begin(), captures.end(), capture));
  CUresult result = capture->broken ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
  Clock& last = capture->clocks[stream];
  for (auto& [other, clock] : capture->clocks) {
    other->capture = nullptr;
    if (!result && last[other] < clock[other])
      result = complain(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "a stream of the capture was not joined to its first");
  }
  if (!result) *graph = reinterpret_cast<CUgraph>(capture->graph.release());
  return result;
}

API cuStreamGetCaptureInfo(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                           const CUgraphNode** dependencies, const CUgraphEdgeData** edges, size_t* count) {
  ENTER;
  const Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  const Capture* capture = stream->capture.get();
  *status = !capture          ? CU_STREAM_CAPTURE_STATUS_NONE
            : capture->broken ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                              : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? reinterpret_cast<CUgraph>(capture->graph.get()) : nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return CUDA_SUCCESS;
}

// ---- graphs ----

API cuGraphDestroy(CUgraph graph) {
  ENTER;
  delete reinterpret_cast<Graph*>(graph);
  return CUDA_SUCCESS;
}

API cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* count) {
  ENTER;
  const size_t size = reinterpret_cast<Graph*>(handle)->nodes.size();
  for (size_t i = 0; nodes && i < *count; ++i)
    nodes[i] = i < size ? reinterpret_cast<CUgraphNode>(&reinterpret_cast<Graph*>(handle)->nodes[i]) : nullptr;
  *count = nodes ? std::min(*count, size) : size;
  return CUDA_SUCCESS;
}

API cuGraphInstantiateWithFlags(CUgraphExec* out, CUgraph graph, unsigned long long) {
  ENTER;
  *out = reinterpret_cast<CUgraphExec>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return CUDA_SUCCESS;
}

API cuGraphExecDestroy(CUgraphExec graph) {
  ENTER;
  delete reinterpret_cast<Graph*>(graph);
  return CUDA_SUCCESS;
}

API cuGraphLaunch(CUgraphExec graph, CUstream stream) {
  ENTER;
  return submit(stream, [nodes = reinterpret_cast<Graph*>(graph)->nodes](CUstream replayed_in) {
    ++graph_launches;
    for (const Work& work : nodes) work(replayed_in);
  });
}
