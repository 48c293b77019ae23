// The entry points of forward_sm90.cu, for forward.cu.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace pk {

struct MlpParams;

// Runs the MLP's forward on Hopper. Returns false, with nothing done, where that kernel does not cover the call or
// the device.
bool run_mlp_sm90(const MlpParams& p, int64_t channels, const torch::stable::Tensor& w1,
                  const torch::stable::Tensor& w2, int32_t dtype);

// Lists the kernels' instantiations (core/kernels.h).
void list_mlp_sm90();

}  // namespace pk
