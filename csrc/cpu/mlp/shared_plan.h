// The steps of the MLP's forward where threads share the weights (shared_forward.h).
#pragma once

#include "mlp.h"

namespace pk {

// What an item of a step covers: tokens, hidden channels, output channels.
constexpr int64_t kSharedTokens = 32, kSharedHidden = 128, kSharedOutput = 32;

// Kernels get the item's number and scratch memory of the thread.
struct SharedForwardKernels {
  int64_t (*scratch)(const MlpParams&);  // words of that memory
  int64_t (*words)(const MlpParams&);    // words of `shared`
  // n of an item's tokens
  void (*input)(const MlpParams&, int64_t item, uint32_t* scratch);
  // the activations of an item's hidden channels
  void (*hidden)(const MlpParams&, int64_t item, uint32_t* scratch);
  // y of an item's output channels
  void (*output)(const MlpParams&, int64_t item, uint32_t* scratch);
  // token_moments of an item's tokens
  void (*moments)(const MlpParams&, int64_t item, uint32_t* scratch);
};

}  // namespace pk
