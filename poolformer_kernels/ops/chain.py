"""Layers in a row as one operator, for inference: activations and statistics stay inside it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .batching import register_batching
from .dispatch import select_backend
from .library import LIBRARY, NAMESPACE, call, refuse_forward_derivatives
from .torch_private import forward_mode, in_transform, observed

__all__ = [
    "CONV",
    "MIXER",
    "MLP",
    "POOLS",
    "Chain",
    "Layer",
    "LayerShape",
    "chainable",
    "layer_shapes",
    "register_cuda_chain",
]

# Kinds of layers, as csrc/cpu/chain/chain.cpp numbers them
CONV, MIXER, MLP = range(3)
POOLS = {"official": 3, "timm": 4}
_ACTIVATIONS = {name: i for i, name in enumerate(reference.ACTIVATIONS)}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


_cuda_chain: Callable[["Chain", Tensor], Tensor | None] | None = None


def register_cuda_chain(run: Callable[["Chain", Tensor], Tensor | None]) -> None:
    """``run(chain, x)`` computes a chain on a channels_last CUDA tensor, or returns None where it cannot."""
    global _cuda_chain
    _cuda_chain = run


def chainable(x: Tensor) -> bool:
    """Whether layers on x may run as a chain: inference by kernels without autocast and transforms.

    On CUDA a chain calls no operator that something else could watch or replace, so nothing may do that.
    """
    if not isinstance(x, Tensor) or torch.is_grad_enabled() or x.dtype not in _FLOATS or x.dim() != 4:
        return False
    if x.is_cuda:
        return (
            not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not forward_mode()
            and x.numel() > 0
            and not torch.is_autocast_enabled("cuda")
            and not in_transform()
            and not observed(x)
            and select_backend(x.device, x.dtype) in ("triton", "cuda")
        )
    return (
        x.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and (torch.compiler.is_compiling() or not in_transform())
        and select_backend("cpu", x.dtype) == "cpp"
        and x.numel() > 0  # last: a trace, which no backend computes, would record the question
    )


class Layer(NamedTuple):
    """A layer of a chain; its vectors are in the order of `Chain`'s method, None where not given."""

    kind: int  # CONV, MIXER, MLP or one of POOLS
    weights: tuple[Tensor, ...]
    vectors: tuple[Tensor | None, ...]
    numbers: tuple[int, ...]  # stride and padding, the pool size, or the activation's index
    eps: float | None


class Chain:
    """The layers of one call of the operator; each method appends one."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.plans: dict[object, object] = {}  # what the CUDA backends keep for the calls to come
        self._weights: list[Tensor] = []
        self._vectors: list[Tensor] = []
        self._parameters: list[Tensor] = []  # all of them, in the order of the layers
        self._distinct: list[Tensor] | None = None
        self._steps: list[int] = []
        self._epsilons: list[float] = []
        self._convolves = False
        self._in_channels: int | None = None  # of the first layer, if it has a parameter that says so

    @property
    def parameters(self) -> list[Tensor]:
        """Of all layers, in their order."""
        return self._parameters

    @property
    def distinct_parameters(self) -> list[Tensor]:
        """Each parameter once, however many layers have it."""
        if self._distinct is None:
            self._distinct = [*{id(p): p for p in self._parameters}.values()]
        return self._distinct

    def _add(
        self,
        kind: int,
        weights: tuple[Tensor, ...],
        vectors: tuple[Tensor | None, ...],
        numbers: tuple[int, ...] = (),
        eps: float | None = None,
    ) -> None:
        self.layers.append(Layer(kind, weights, vectors, numbers, eps))
        given = [vector for vector in vectors if vector is not None]
        if not self._steps and (weights or given):
            self._in_channels = weights[0].shape[1] if weights else given[0].shape[0]
        self._steps += (kind, sum(1 << i for i, vector in enumerate(vectors) if vector is not None), *numbers)
        self._epsilons += () if eps is None else (eps,)
        self._parameters += (*weights, *given)
        self._weights += weights
        self._vectors += given

    def conv(self, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> None:
        """A convolution ``[out, C, h, w]``, or after `pool` a linear layer ``[out, C]``."""
        self._add(CONV, (weight,), (bias,), (stride, padding))
        self._convolves = True

    def mixer(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        pool_size: int,
        eps: float,
    ) -> None:
        """`pool_mixer` with the residual."""
        self._add(MIXER, (), (weight, bias, layer_scale), (pool_size,), eps)

    def mlp(
        self, w1: Tensor, w2: Tensor, vectors: tuple[Tensor | None, ...], activation: str, eps: float
    ) -> None:
        """`mlp` with the norm and the residual; vectors: b1, b2, norm_weight, norm_bias, layer_scale."""
        self._add(MLP, (w1, w2), vectors, (_ACTIVATIONS[activation],), eps)

    def pool(self, mode: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        """The head's norm and mean over pixels, as `PoolFormer`'s head mode says: ``[B, C]``."""
        self._add(POOLS[mode], (), (weight, bias), (), eps)

    def takes(self, x: Tensor, channels_last: bool) -> bool:
        """Whether it computes on x, which must be `chainable`: layout, dtypes, devices and channels fit.

        Otherwise the caller goes layer by layer, which computes or refuses it. On CUDA `run` looks at the
        parameters.
        """
        if self._in_channels not in (None, x.shape[1]):
            return False
        if x.is_cuda:  # one convolution alone is torch's
            return channels_last and _cuda_chain is not None and any(la.kind != CONV for la in self.layers)
        dtype = x.dtype
        return (
            (channels_last or not self._convolves)
            and all(w.dtype is dtype and w.is_cpu for w in self._weights)
            and all((v.dtype is dtype or v.dtype is torch.float32) and v.is_cpu for v in self._vectors)
        )

    def run(self, x: Tensor, channels_last: bool) -> Tensor | None:
        """The last layer's result: images in this layout, or ``[B, C]`` where there is a `pool`.

        None on CUDA, where the backends have no chain for these tensors.
        """
        if x.is_cuda:
            return _cuda_chain(self, x)
        refuse_forward_derivatives("the inference chain", "cpp", (x, *self._parameters))
        arguments = (x, self._parameters, self._steps, self._epsilons, channels_last)
        return call(torch.ops.poolformer_kernels.chain_cpp.default, *arguments)


class LayerShape(NamedTuple):
    """The sizes of a layer within a call."""

    kind: int
    weights: tuple[Sequence[int], ...]  # the shapes of its matrices or kernels
    output: tuple[int, int, int]  # channels, height, width


def layer_shapes(
    x: Sequence[int], parameters: Iterable[Sequence[int]], steps: Iterable[int]
) -> Iterator[LayerShape]:
    """Of every layer of a chain, given the operator's arguments, each tensor by its shape."""
    _, channels, height, width = x
    steps, parameters = iter(steps), iter(parameters)
    for kind in steps:
        present = next(steps)
        weights = tuple(next(parameters) for _ in range({CONV: 1, MLP: 2}.get(kind, 0)))
        if kind == CONV:
            channels, _, *kernel = weights[0]
            stride, padding = next(steps), next(steps)
            height, width = (
                (size + 2 * padding - k) // stride + 1
                for size, k in zip((height, width), kernel or (1, 1), strict=True)
            )
        elif kind in POOLS.values():
            height = width = 1
        else:
            next(steps)  # the pool size or the activation
        for _ in range(present.bit_count()):
            next(parameters)
        yield LayerShape(kind, weights, (channels, height, width))


def _fake(
    x: Tensor, parameters: list[Tensor], steps: list[int], epsilons: list[float], channels_last: bool
) -> Tensor:
    layers = [*layer_shapes(x.shape, (p.shape for p in parameters), steps)]
    channels, height, width = layers[-1].output
    if any(layer.kind in POOLS.values() for layer in layers):
        return x.new_empty((x.shape[0], channels))
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=fmt)


LIBRARY.define("replay(Tensor[] tensors, int settings) -> Tensor[]")  # backends/triton/replay.py
LIBRARY.define("chain_cuda(Tensor x, Tensor[] parameters, int plan) -> Tensor[]")
LIBRARY.define(
    "chain_cpp(Tensor x, Tensor[] parameters, int[] steps, float[] epsilons, bool channels_last) -> Tensor"
)
torch.library.register_fake(f"{NAMESPACE}::chain_cpp", _fake, lib=LIBRARY)
register_batching(torch.ops.poolformer_kernels.chain_cpp.default, LIBRARY, per_sample=(0,))
