"""The static configuration of the Triton MLP: which kernels run and their tiles, no tuning at run time.

No triton import here: fakes need `mlp_stats_tiles` on machines without a GPU.
"""

from functools import cache
from typing import NamedTuple

from .config import flat_block, next_power_of_2

__all__ = [
    "FEW_PIXELS",
    "FOLD_DEPTH",
    "FOLD_ROWS",
    "FUSED_CHANNELS",
    "STATS_ROWS",
    "Fused",
    "Gemm",
    "fused",
    "gemm",
    "mlp_stats_tiles",
    "out_tile",
    "split",
]

FUSED_CHANNELS = 192  # above it the fused kernel spills and gains nothing at the roofline
FEW_PIXELS = 32  # samples of fewer are too many in one tile: the pair of GEMMs, y's statistics by their own kernel
FOLD_ROWS, FOLD_DEPTH = 16, 128  # a tile of fc1's weight while the norm is folded into it
STATS_ROWS = 64  # a tile has at least so many rows (tokens)


class Fused(NamedTuple):
    """Tiles of the fused kernel."""

    rows: int
    hidden: int  # of a chunk of the hidden dimension
    warps: int
    stages: int
    registers: int | None = None


class Gemm(NamedTuple):
    """Tiles of one GEMM; fc2's columns are `out_tile`'s."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def split(n: int) -> tuple[int, int]:
    """n as two powers of two from 16 on, the second 0 where one will do; padded where neither fits."""
    first = 1 << (max(n, 16).bit_length() - 1)
    if n <= first:
        return first, 0
    second = next_power_of_2(max(n - first, 16))
    return (2 * first, 0) if second == first else (first, second)


@cache
def out_tile(out: int) -> tuple[int, int]:
    """Columns of a tile of y, as `split` has them."""
    if out <= 192:
        return split(out)
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


_FUSED = {
    # (C up to, bytes of an operand): tiles
    (64, 2): Fused(128, 64, 8, 2, 128),
    (96, 2): Fused(128, 32, 8, 2, 128),
    (128, 2): Fused(128, 32, 8, 3),
    (192, 2): Fused(128, 32, 8, 2),
    (64, 4): Fused(64, 32, 8, 1),
    (96, 4): Fused(64, 32, 8, 1),
    (128, 4): Fused(64, 32, 8, 1),
    (192, 4): Fused(64, 16, 8, 1),
}


def fused(channels: int, itemsize: int) -> Fused:
    """Tiles of the fused kernel at C channels, for operands of ``itemsize`` bytes."""
    bound = next(c for c in (64, 96, 128, 192) if channels <= c)
    return _FUSED[bound, itemsize]


def gemm(itemsize: int, second: bool) -> Gemm:
    """Tiles of fc1, or of fc2 where ``second``."""
    if itemsize == 4:
        return Gemm(64, 64, 32, 8, 2)
    return Gemm(128, 128, 64, 8, 3)
