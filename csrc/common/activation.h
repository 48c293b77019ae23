// The MLP's activations, for host and device.
#pragma once

namespace pk {

enum class Activation { gelu, gelu_tanh, relu, relu_squared, silu };

}  // namespace pk
