"""What `torch.utils.flop_counter.FlopCounterMode` counts for our operators: the model's FLOPs, as for eager.

As it does, two for each multiply-accumulate of a convolution or matrix product and nothing for the rest, so
nothing for `pool_mixer`. A backward counts the products of the input's gradient, and those of both weights'
where any parameter needs one, as eager's does of a model in training. Of an MLP that is frozen in part eager
computes fewer, our kernels do not. What our kernels compute again instead of keeping it is not counted.
"""

import math
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

from .chain import layer_shapes
from .mlp import mlp  # noqa: F401  (its operators come first)

__all__: list[str] = []

Shape = Sequence[int]
_COUNTER = "torch.utils.flop_counter"


def _products(x: Shape, *weights: Shape) -> int:
    """FLOPs of each pixel of x [B, C, H, W] times these matrices."""
    return 2 * x[0] * x[2] * x[3] * sum(map(math.prod, weights))


def _mlp(x: Shape, w1: Shape, b1: Shape | None, w2: Shape, *_: Any, **__: Any) -> int:
    return _products(x, w1, w2)


def _mlp_backward(
    grad, x, mean_rstd, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, hidden,
    activation, norm, residual, parameter_grads, *_, **__,
) -> int:  # fmt: skip
    return _products(x, w1, w2) * (2 if parameter_grads else 1)


def _chain(x: Shape, parameters: list[Shape], steps: list[int], *_: Any, **__: Any) -> int:
    layers = layer_shapes(x, parameters, steps)
    return sum(_products((x[0], *layer.output), *layer.weights) for layer in layers)


def _register(counter: ModuleType) -> None:
    ours = torch.ops.poolformer_kernels
    register = counter.register_flop_formula
    register([ours.mlp_cpp, ours.mlp_triton, ours.mlp_cuda])(_mlp)
    register([ours.mlp_cpp_backward, ours.mlp_triton_backward, ours.mlp_cuda_backward])(_mlp_backward)
    register(ours.chain_cpp)(_chain)


class _Registering(MetaPathFinder):
    """Registers the formulas when PyTorch's module is imported, which brings Triton: not with the package."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _Registering())
