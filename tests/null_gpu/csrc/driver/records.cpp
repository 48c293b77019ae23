// The records of launches and complaints, and the functions through which Python reads them: null_gpu.py.
#include "records.h"

#include <cxxabi.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "driver.h"

namespace null_gpu {

long graph_launches = 0;

namespace {

std::vector<Launch> launches;
std::vector<std::string> complaints;

std::string demangled(const std::string& name) {
  int status;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string out = text ? text : name;
  free(text);
  return out;
}

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) {
  char out[256];
  va_list list;
  va_start(list, text);
  vsnprintf(out, sizeof out, text, list);
  va_end(list);
  return out;
}

const char* boolean(bool value) { return value ? "true" : "false"; }

std::string json(const Launch& l) {
  auto numbers = [](const unsigned (&n)[3]) { return format("[%u, %u, %u]", n[0], n[1], n[2]); };
  std::string arguments;
  for (uint64_t a : l.arguments) arguments += (arguments.empty() ? "" : ", ") + std::to_string(a);
  return "{\"mangled\": \"" + l.kernel + "\", \"kernel\": \"" + demangled(l.kernel) +
         format("\", \"known\": %s, \"library\": %s, \"captured\": %s, \"replayed\": %s", boolean(l.known),
                boolean(l.library), boolean(l.captured), boolean(l.replayed)) +
         ", \"grid\": " + numbers(l.grid) + ", \"block\": " + numbers(l.block) +
         ", \"cluster\": " + numbers(l.cluster) +
         format(", \"dynamic_shared\": %u, \"static_shared\": %d, \"registers\": %d, \"local\": %d", l.dynamic_shared,
                l.static_shared, l.registers, l.local) +
         format(", \"device\": %d, \"function\": %lu, \"stream\": %lu", l.device, l.function, l.stream) +
         ", \"arguments\": [" + arguments + "]}\n";
}

}  // namespace

void add_complaint(const char* text) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  complaints.push_back(text);
  if (getenv("NULL_GPU_VERBOSE")) fprintf(stderr, "null GPU: %s\n", text);
}

CUresult record(const Launch& launch) {
  Launch now = launch;
  const auto handle = reinterpret_cast<CUstream>(launch.stream);
  const Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  now.captured = stream->capture != nullptr;
  const CUresult result = submit(handle, [launch, captured = now.captured](CUstream replayed_in) {
    if (!captured) return;
    launches.push_back(launch);
    launches.back().replayed = true;
    launches.back().stream = reinterpret_cast<uint64_t>(replayed_in);
  });
  if (!result) launches.push_back(now);
  return result;
}

}  // namespace null_gpu

using namespace null_gpu;

// A call of cuBLAS or cuDNN, which are not there either: a launch of that name on these addresses.
API null_gpu_library_call_on(const char* name, CUstream stream, void* const* addresses, int count) {
  ENTER;
  Launch launch;
  launch.kernel = name;
  launch.library = true;
  launch.device = current_device();
  launch.stream = reinterpret_cast<uint64_t>(stream);
  for (int i = 0; i < count; ++i) launch.arguments.push_back(reinterpret_cast<uint64_t>(addresses[i]));
  return record(launch);
}

API null_gpu_library_call(const char* name, CUstream stream) {
  return null_gpu_library_call_on(name, stream, nullptr, 0);
}

extern "C" EXPORTED void null_gpu_complain(const char* text) { add_complaint(text); }

// A line of JSON for each launch; valid until the next call.
extern "C" EXPORTED const char* null_gpu_launches(int clear) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  static std::string text;
  text.clear();
  for (const Launch& launch : launches) text += json(launch);
  if (clear) launches.clear();
  return text.c_str();
}

extern "C" EXPORTED const char* null_gpu_complaints(int clear) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  static std::string text;
  text.clear();
  for (const std::string& complaint : complaints) text += complaint + "\n";
  if (clear) complaints.clear();
  return text.c_str();
}

extern "C" EXPORTED long null_gpu_graph_launches() { return graph_launches; }
