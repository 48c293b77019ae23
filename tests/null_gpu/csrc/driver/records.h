// What the tests read of the null GPU: launches and complaints.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>
#include <vector>

namespace null_gpu {

struct Launch {
  std::string kernel;                       // mangled
  bool known = false;                       // the kernel's figures were read from its binary
  bool library = false;                     // a call of cuBLAS or cuDNN: what they would launch is not known
  bool captured = false, replayed = false;  // recorded for a graph, not run; run by a graph
  unsigned grid[3] = {}, block[3] = {}, cluster[3] = {}, dynamic_shared = 0;
  int static_shared = 0, registers = 0, local = 0, device = 0;
  uint64_t function = 0;            // the kernel's handle
  uint64_t stream = 0;              // its handle; 0: the legacy stream
  std::vector<uint64_t> arguments;  // the first word of each
};

extern long graph_launches;

void add_complaint(const char* text);
// Records a launch; in a capture also its replays, as they happen.
CUresult record(const Launch& launch);

}  // namespace null_gpu
