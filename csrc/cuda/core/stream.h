// The current CUDA stream of a device, from libtorch_cuda. A weak name: null beside a torch without CUDA, where the
// extension loads all the same.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
