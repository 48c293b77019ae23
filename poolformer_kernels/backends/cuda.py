"""The CUDA C++ backend: the extension registers its kernels for CUDA when `cpp` imports it.

The numbers here are those of csrc/cuda: fakes and `explain` need them on machines without a GPU.
"""

import math
import re
import sys
from collections.abc import Iterable
from functools import cache

import torch

from ..ops.dispatch import register
from ..ops.norm_stats import CHUNK
from . import cpp

__all__ = [
    "DEVICES",
    "UNAVAILABLE",
    "code_for",
    "hidden_kept_from",
    "mlp_stats_tiles",
    "mlp_unsupported",
    "stats_tiles",
    "unavailable",
]

_BUILD = cpp.build_info()
DEVICES = ("cuda",)
UNAVAILABLE: str | None = cpp.UNAVAILABLE  # whatever the device

if UNAVAILABLE is None and not _BUILD["cuda_archs"]:
    UNAVAILABLE = "the extension was built without CUDA (nvcc is needed at install time)"
elif UNAVAILABLE is None and torch.version.hip is not None:
    UNAVAILABLE = "the kernels are for NVIDIA's devices, and this torch is built for AMD's"
elif UNAVAILABLE is None and "cuda_stream_bound" not in _BUILD:
    UNAVAILABLE = "the extension is older than the package: build it again"
elif UNAVAILABLE is None and not _BUILD["cuda_stream_bound"]:
    UNAVAILABLE = f"torch {torch.__version__} is built without CUDA, or the extension is not linked to it"


_TEGRA = ((8, 7),)  # these run machine code of their own only


def code_for(archs: Iterable[str], capability: tuple[int, int]) -> str | None:
    """Which code of a build for these architectures ("8.0", "9.0a", "10.0+PTX") such a device runs, or None.

    ``sm_90a`` is machine code, ``compute_100`` PTX that the driver compiles before the first launch. Source:
    CUDA C++ Programming Guide, "Binary Compatibility", "PTX Compatibility", "Family-Specific Features".
    """
    images, ptx = [], []
    for arch in archs:
        major, minor, suffix, has_ptx = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch).groups()
        built = int(major), int(minor)
        number = f"{major}{minor}{suffix}"
        newer = built[0] == capability[0] and built < capability and capability not in _TEGRA
        if built == capability or (newer and suffix != "a"):
            images.append((built, f"sm_{number}"))
        if has_ptx and not suffix and built <= capability:
            ptx.append((built, f"compute_{number}"))
    return max(images or ptx, default=(None, None))[1]


def unavailable(device: torch.device) -> str | None:
    """Why the kernels do not run on this CUDA device, or None; the first call initialises CUDA."""
    return UNAVAILABLE or _unavailable(device)


@cache
def _unavailable(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    archs = _BUILD["cuda_archs"]
    if code_for(archs, capability) is not None:
        return None
    return (
        f"the extension was built for {', '.join(archs)}, not for this device's"
        f" {'.'.join(map(str, capability))} (see TORCH_CUDA_ARCH_LIST)"
    )


TILE_CELLS = 128  # of a tile, at most: 8 channels x 2 columns in channels_last, 1 channel x 8 columns in NCHW
CELL = 8
MLP_CHANNELS = (64, 96, 128, 192)  # of the fused forward
MLP_BACKWARD_CHANNELS = (64, 96, 128)
HIDDEN_BLOCK, HIDDEN_MAX = 64, 4096  # hidden channels must be a multiple of 64, and 4096 at most
STATS_ROWS = 64  # tokens of a tile of the MLP's output, whose statistics are one partial
_HALVES = (torch.bfloat16, torch.float16)


def stats_tiles(shape: torch.Size, channels_last: bool, pool_size: int) -> int:
    """How many partials of a sample's statistics the mixer's forward returns; some may count nothing.

    As many as the smallest tiles give, whatever tiles a batch gets. Height and width may be symbolic: they
    are compared, never converted. See ``tiling_of`` in csrc/cuda/pool_mixer.
    """
    channels, height, width = int(shape[1]), shape[2], shape[3]
    rows = 2 if height < 64 else 4 if height < 160 else 14
    strips = (height + rows - 1) // rows
    if channels_last:
        groups = -(-channels // CELL)
        tile_groups = -(-groups // -(-groups // TILE_CELLS))
        tile_columns = TILE_CELLS // tile_groups
        columns = strips * ((width + 1) // 2)
        return (columns + tile_columns - 1) // tile_columns * -(-groups // tile_groups)
    columns = strips * ((width + CELL - 1) // CELL)
    if columns >= TILE_CELLS:
        return (columns + TILE_CELLS - 1) // TILE_CELLS * channels
    tile_groups = TILE_CELLS // columns
    return (channels + tile_groups - 1) // tile_groups


def mlp_stats_tiles(shape: torch.Size, channels_last: bool, hidden: int) -> int:
    """How many partials of a sample's statistics the MLP's forward returns; some may count nothing."""
    pixels = shape[2] * shape[3]
    if pixels < STATS_ROWS:
        return (shape[1] * pixels + CHUNK - 1) // CHUNK
    return (pixels + STATS_ROWS - 2) // STATS_ROWS + 1  # a sample starts anywhere in a tile of tokens


def mlp_unsupported(
    channels: int, hidden: int, out: int, operand: torch.dtype, backward: bool = False
) -> str | None:
    """Why no kernel here computes an MLP of these sizes and operands, which then runs in Triton, or None."""
    widths = MLP_BACKWARD_CHANNELS if backward else MLP_CHANNELS
    if operand not in _HALVES:
        return f"products of {str(operand).removeprefix('torch.')}"
    if channels != out or channels not in widths:
        return f"{channels} to {out} channels, not {', '.join(map(str, widths))} to as many"
    if hidden % HIDDEN_BLOCK != 0 or hidden > HIDDEN_MAX:
        return f"{hidden} hidden channels, not a multiple of {HIDDEN_BLOCK} up to {HIDDEN_MAX}"
    return None


def hidden_kept_from(operand: torch.dtype) -> float:
    """Infinite: a wide MLP is Triton's, and that backend is asked then."""
    return math.inf


register("cuda", sys.modules[__name__])
