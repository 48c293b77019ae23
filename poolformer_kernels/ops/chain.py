"""Layers in a row as one operator, for inference: activations and statistics pass from one to the next inside it."""

import torch
from torch import Tensor

from .. import reference
from .backend import select_backend
from .library import LIBRARY, NAMESPACE, call, refuse_forward_derivatives

__all__ = ["CONV", "MIXER", "MLP", "POOLS", "Chain", "chainable"]

# Kinds of layers, as csrc/cpu/chain.cpp numbers them
CONV, MIXER, MLP = range(3)
POOLS = {"official": 3, "timm": 4}
_ACTIVATIONS = {name: i for i, name in enumerate(reference.ACTIVATIONS)}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SCHEMA = "chain_cpp(Tensor x, Tensor[] parameters, int[] steps, float[] epsilons, bool channels_last) -> Tensor"


def chainable(x: Tensor) -> bool:
    """Whether layers on x may be a chain: inference by the cpp backend, outside of autocast and transforms."""
    return (
        isinstance(x, Tensor)
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in _FLOATS
        and x.dim() == 4
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and (torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None)
        and select_backend("cpu", x.dtype) == "cpp"
    )


class Chain:
    """Layers collected for one call on x, which must be `chainable`.

    A method that adds a layer returns False, and adds nothing, where a parameter is of another dtype than the
    operators take as they are; the caller then goes layer by layer, which computes or refuses it.

    Args:
        x: ``[B, C, H, W]``.
        channels_last: the layout of the chain's activations and result.
    """

    def __init__(self, x: Tensor, channels_last: bool) -> None:
        self._x, self._channels_last = x, channels_last
        self._parameters: list[Tensor] = []
        self._steps: list[int] = []
        self._epsilons: list[float] = []

    def _add(self, kind: int, weights: tuple[Tensor, ...], vectors: tuple[Tensor | None, ...]) -> bool:
        dtype = self._x.dtype
        for weight in weights:
            if weight.dtype != dtype:
                return False
        present = 0
        given = []
        for i, vector in enumerate(vectors):
            if vector is not None:
                if vector.dtype != dtype and vector.dtype != torch.float32:
                    return False
                present |= 1 << i
                given.append(vector)
        self._steps += (kind, present)
        self._parameters += weights
        self._parameters += given
        return True

    def conv(self, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> bool:
        """A convolution ``[out, C, h, w]``, computed in channels_last."""
        if not self._channels_last or not self._add(CONV, (weight,), (bias,)):
            return False
        self._steps += (stride, padding)
        return True

    def mixer(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        pool_size: int,
        eps: float,
    ) -> bool:
        """`pool_mixer` with the residual."""
        if not self._add(MIXER, (), (weight, bias, layer_scale)):
            return False
        self._steps.append(pool_size)
        self._epsilons.append(eps)
        return True

    def mlp(
        self,
        w1: Tensor,
        w2: Tensor,
        vectors: tuple[Tensor | None, ...],
        activation: str,
        eps: float,
    ) -> bool:
        """`mlp` with the norm and the residual; vectors: b1, b2, norm_weight, norm_bias, layer_scale."""
        if not self._add(MLP, (w1, w2), vectors):
            return False
        self._steps.append(_ACTIVATIONS[activation])
        self._epsilons.append(eps)
        return True

    def pool(self, mode: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> bool:
        """The head's norm and mean over pixels, the last layer: ``[B, C]``. See `PoolFormer`'s head modes."""
        if not self._add(POOLS[mode], (), (weight, bias)):
            return False
        self._epsilons.append(eps)
        return True

    def run(self) -> Tensor:
        """The last layer's result."""
        refuse_forward_derivatives("the inference chain", "cpp", (self._x, *self._parameters))
        arguments = (self._x, self._parameters, self._steps, self._epsilons, self._channels_last)
        return call(torch.ops.poolformer_kernels.chain_cpp.default, *arguments)


def _fake(
    x: Tensor, parameters: list[Tensor], steps: list[int], epsilons: list[float], channels_last: bool
) -> Tensor:
    batch, channels, height, width = x.shape
    steps, parameters = iter(steps), iter(parameters)
    for kind in steps:
        present = next(steps)
        if kind == CONV:
            weight = next(parameters)
            stride, padding = next(steps), next(steps)
            channels = weight.shape[0]
            height, width = (
                (size + 2 * padding - kernel) // stride + 1
                for size, kernel in zip((height, width), weight.shape[2:], strict=True)
            )
        elif kind in POOLS.values():
            return x.new_empty((batch, channels))
        else:
            next(steps)
            for _ in range(2 if kind == MLP else 0):
                next(parameters)
        for _ in range(present.bit_count()):
            next(parameters)
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=fmt)


LIBRARY.define(_SCHEMA)
torch.library.register_fake(f"{NAMESPACE}::chain_cpp", _fake, lib=LIBRARY)
