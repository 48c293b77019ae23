"""The Triton backend: for CUDA tensors, and for CPU tensors if ``TRITON_INTERPRET=1`` is set before import.

Triton and the kernels are imported by the first call. Importing the package imports neither, and touches no
device.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch

from ...ops.chain import register_cuda_chain
from ...ops.dispatch import register
from ...ops.library import LIBRARY, register_replay
from .config import stats_tiles
from .mlp.config import mlp_stats_tiles

__all__ = [
    "DEVICES",
    "UNAVAILABLE",
    "hidden_kept_from",
    "mlp_stats_tiles",
    "mlp_unsupported",
    "stats_tiles",
    "unavailable",
]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if _INTERPRETED else ("cuda",)
UNAVAILABLE: str | None = None  # why no device can run the kernels
OLDEST = (8, 0)  # compute capability that is needed: the kernels use cp.async and bfloat16 products

if importlib.util.find_spec("triton") is None:
    UNAVAILABLE = "triton is not installed"
elif torch.version.hip is not None:
    UNAVAILABLE = "the kernels are for NVIDIA's devices, and this torch is built for AMD's"


def unavailable(device: torch.device) -> str | None:
    """Why the kernels do not run on this device, or None; the first call initialises CUDA."""
    return UNAVAILABLE or _unavailable(device)


@cache
def _unavailable(device: torch.device) -> str | None:
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            wanted, found = (".".join(map(str, version)) for version in (OLDEST, capability))
            return f"it needs compute capability {wanted} or newer, this device has {found}"
    try:
        for module in {module for _, module, *_ in _KERNELS}:
            import_module(f".{module}", __name__)
    except ImportError as error:  # a Triton that the kernels are not made for, or a broken one
        return f"triton cannot be imported: {error}"
    return None


def mlp_unsupported(
    channels: int, hidden: int, out: int, operand: torch.dtype, backward: bool = False
) -> str | None:
    """None: there is a kernel for every MLP."""
    return None


def hidden_kept_from(operand: torch.dtype) -> float:
    """320: from there on fc1 computed again takes longer than its output, 2 bytes each, read from memory."""
    return 320


def _kernel(module: str, function: str) -> Callable:
    """A function of a module of this package, which is imported by the first call."""

    def kernel(*args):
        nonlocal loaded
        if loaded is None:
            loaded = getattr(import_module(f".{module}", __name__), function)
        return loaded(*args)

    loaded = None
    return kernel


def _replayed(module: str, function: str, tensors: int) -> Callable:
    """`replay.Replayed` of a function of a module of this package, made by the first call."""

    def replay(args: tuple):
        nonlocal loaded
        if loaded is None:
            launcher = getattr(import_module(f".{module}", __name__), function)
            loaded = import_module(".replay", __name__).Replayed(launcher, tensors, function == "backward")
        return loaded(args)

    loaded = None
    return replay


# operator, module, function, how many of its first arguments are tensors
_KERNELS = (
    ("pool_mixer_triton", "pool_mixer", "forward", 6),
    ("pool_mixer_triton_backward", "pool_mixer", "backward", 7),
    ("mlp_triton", "mlp.forward", "forward", 10),
    ("mlp_triton_backward", "mlp.backward", "backward", 12),
)
for _operator, _module, _function, _tensors in _KERNELS:
    for _device in DEVICES:
        LIBRARY.impl(_operator, _kernel(_module, _function), _device.upper())
    register_replay(_operator, _replayed(_module, _function, _tensors))

register_cuda_chain(_kernel("chain", "run"))
register("triton", sys.modules[__name__])
