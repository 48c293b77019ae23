"""The C++ backend: the extension registers its kernels for the CPU when it is imported."""

import importlib.util
import math
import sys
import warnings
from typing import TypedDict

import torch

from .. import environment
from ..ops.dispatch import register
from ..ops.library import LIBRARY  # noqa: F401  (the schemas come first)

__all__ = [
    "DEVICES",
    "ISA",
    "UNAVAILABLE",
    "BuildInfo",
    "build_info",
    "hidden_kept_from",
    "mlp_stats_tiles",
    "mlp_unsupported",
    "multiply_rate",
    "stats_tiles",
    "unavailable",
]

DEVICES = ("cpu",)
UNAVAILABLE: str | None = None
_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")  # those of csrc/cpu/isa/isa.h


class BuildInfo(TypedDict, total=False):
    """Facts about the compiled extension; none of them where there is none."""

    isa_compiled: list[str]  # instruction-set levels, the lowest first
    isa_supported: list[str]  # those that this processor runs
    isa_chosen: str  # the kernels' own
    compiler: str  # "gcc 12.2.0"
    torch_built_with: str
    cuda_built_with: str  # CUDA's version, empty without nvcc
    cuda_archs: list[str]  # "9.0a", "10.0+PTX"; empty without nvcc
    cuda_stream_bound: bool  # torch's stream function was found


try:
    from .._C import build_info
    from .._C import multiply_rate as _multiply_rate
except ImportError as error:
    if str(error).startswith("POOLFORMER_KERNELS_ISA"):  # isa.cpp, which knows the levels, refuses this one
        raise ValueError(str(error)) from None
    environment.choice("POOLFORMER_KERNELS_ISA", _LEVELS)  # a wrong name is told without the extension, too
    if importlib.util.find_spec("poolformer_kernels._C") is None:
        UNAVAILABLE = (
            "the extension poolformer_kernels._C was not built: when this was installed there was no C++ "
            "compiler or no torch, or POOLFORMER_KERNELS_SKIP_EXT was set"
        )
    else:
        UNAVAILABLE = f"the extension poolformer_kernels._C cannot be loaded: {error}"
    warnings.warn(f"poolformer_kernels: no C++ backend, {UNAVAILABLE}", stacklevel=2)

    def build_info() -> BuildInfo:
        """Facts about the compiled extension; empty where there is none."""
        return {}


def unavailable(device: torch.device) -> str | None:
    """Why the kernels do not run here, or None."""
    return UNAVAILABLE


ISA: str | None = build_info().get("isa_chosen")  # the instruction-set level of the kernels


def stats_tiles(shape: torch.Size, channels_last: bool, pool_size: int) -> int:
    """How many partials of a sample's statistics the kernel returns: it merges them itself."""
    return 1


def mlp_stats_tiles(shape: torch.Size, channels_last: bool, hidden: int) -> int:
    """`stats_tiles` of the MLP's output of this shape."""
    return 1


def mlp_unsupported(
    channels: int, hidden: int, out: int, operand: torch.dtype, backward: bool = False
) -> str | None:
    """None: there is a kernel for every MLP."""
    return None


def hidden_kept_from(operand: torch.dtype) -> float:
    """From how many channels on it is faster to keep fc1's output (`poolformer-kernels bench mlp`).

    With fewer there is more to keep and less to compute again, and a matrix unit, which multiplies bfloat16
    only, computes it sooner.
    """
    return math.inf if ISA == "amx" and operand == torch.bfloat16 else 256


def multiply_rate(bfloat16: bool, seconds: float, level: str | None = None) -> float:
    """FLOPs a second that the processor multiplies just now, all of torch's threads together.

    Args:
        bfloat16: with the instructions for it, where the level has some; else float32.
        seconds: how long each thread multiplies.
        level: an instruction-set level; by default the best that runs here, whatever the kernels' is.

    Raises:
        ValueError: a level that does not run here, or seconds that are not in (0, 60].
    """
    return _multiply_rate(level or build_info()["isa_supported"][-1], bfloat16, seconds)


register("cpp", sys.modules[__name__])
