"""The static configuration of the Triton MLP: which kernels run and their tiles, no tuning at run time.

No triton import here: fakes need `mlp_stats_tiles` on machines without a GPU.
"""

from functools import cache
from typing import NamedTuple

from ..config import flat_block, pieces
from ..device import Device

__all__ = [
    "FEW_PIXELS",
    "FOLD_DEPTH",
    "FOLD_ROWS",
    "FUSED_CHANNELS",
    "STATS_ROWS",
    "Fused",
    "Gemm",
    "fc1",
    "fc2",
    "fused",
    "fuses",
    "mlp_stats_tiles",
    "out_tile",
]

# Above so many channels, half of them in fp32, the fused kernel spills and gains nothing at the roofline.
FUSED_CHANNELS = 192
FEW_PIXELS = 32  # samples of fewer are too many in one tile: the pair, and y's statistics by their own kernel
FOLD_ROWS, FOLD_DEPTH = 16, 128  # a tile of fc1's weight while the norm is folded into it
STATS_ROWS = 64  # a tile has at least so many rows (tokens)


class Fused(NamedTuple):
    """Tiles of the fused kernel."""

    rows: int
    hidden: int  # of a chunk of the hidden dimension
    warps: int
    stages: int
    registers: int  # of a thread at most


class Gemm(NamedTuple):
    """Tiles of one GEMM."""

    rows: int
    columns: tuple[int, int]  # of two parts, each a power of two; the second may be 0
    depth: int
    warps: int
    stages: int


@cache
def out_tile(out: int) -> tuple[int, int]:
    """Columns of a tile of y, as one or two powers of two."""
    if out <= 192:
        return pieces(out)
    for columns in ((128, 0), (128, 64), (128, 32)):
        if out % sum(columns) == 0:
            return columns
    return 128, 0


def mlp_stats_tiles(shape, channels_last: bool, hidden: int) -> int:
    """How many partials of a sample's statistics the forward returns; some of them may count nothing."""
    out, pixels = int(shape[1]), shape[2] * shape[3]
    if pixels < FEW_PIXELS:
        elements = out * pixels
        block, _ = flat_block(elements)
        return (elements + block - 1) // block
    # a sample starts anywhere in a tile of tokens
    return ((pixels + STATS_ROWS - 2) // STATS_ROWS + 1) * -(-out // sum(out_tile(out)))


# operands of two bytes, up to C. 128 registers make room for two programs on an SM.
_FUSED = {
    64: Fused(128, 64, 8, 2, 128),
    96: Fused(128, 32, 8, 2, 128),
    128: Fused(128, 32, 8, 3, 255),
    192: Fused(128, 32, 8, 2, 255),
}


def fuses(channels: int, out: int, pixels: int, itemsize: int) -> bool:
    """Whether one kernel does it all, for operands of ``itemsize`` bytes."""
    return channels == out <= FUSED_CHANNELS * 2 // itemsize and pixels >= FEW_PIXELS


def fused(channels: int, itemsize: int, device: Device) -> Fused:
    """Tiles of the fused kernel at C channels, for operands of ``itemsize`` bytes."""
    if itemsize == 4:
        return Fused(64, 16, 8, 1, 255)
    if channels <= 64 and device.register_operands:  # 64 hidden channels at a time would spill
        return Fused(128, 32, 8, 2, 128)
    if 64 < channels <= 96 and device.architecture >= 120:  # 32 would spill there
        return Fused(128, 16, 8, 2, 128)
    return _FUSED[next(bound for bound in _FUSED if channels <= bound)]


def fc1(x_itemsize: int, itemsize: int, device: Device) -> Gemm:
    """Tiles of fc1 where fc2 is a kernel of its own, and as many stages as a block's shared memory holds."""
    if itemsize == 4:
        return Gemm(64, (64, 0), 16, 8, 2)  # operands of a step lie in registers
    return Gemm(128, (128, 0), 64, 8, min(3, device.shared // (64 * 128 * (x_itemsize + itemsize))))


def fc2(out: int, itemsize: int, device: Device) -> Gemm:
    """Tiles of that kernel, likewise."""
    columns = out_tile(out)
    if itemsize == 4:
        return Gemm(64, columns, 16, 8, 2)
    return Gemm(128, columns, 64, 8, min(4, device.shared // (64 * (128 + sum(columns)) * itemsize)))
