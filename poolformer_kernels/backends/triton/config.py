"""The static configuration of the Triton kernels: tile sizes by shape and layout, no tuning at run time.

No triton import here: fakes and the ahead-of-time table need these numbers on machines without a GPU.
"""

from functools import cache
from typing import NamedTuple

__all__ = [
    "FLAT",
    "MAX_ROLLED_POOL",
    "MERGED",
    "OPTIONS",
    "ROWS",
    "Plan",
    "flat_block",
    "next_power_of_2",
    "pieces",
    "plan",
    "stats_tiles",
]

ROWS = 7  # rows of a strip: 7 divides the height of every stage at 224x224
FLAT = 16384  # elements of one partial of the statistics kernel
MERGED = 256  # a kernel merges at most so many partials itself; more are merged by a kernel of their own
OPTIONS = {
    "enable_fp_fusion": True
}  # of every launch: Triton is about to stop fusing multiply and add unless asked
MAX_ROLLED_POOL = 9  # larger pools loop over their window instead of unrolling it


class Plan(NamedTuple):
    """Launch configuration of the mixer kernels for one shape and layout."""

    columns: int  # of a tile; a column is ROWS pixels of one strip
    channels: int  # of a tile
    tiles: int  # of a sample
    pool: int  # the pool size, no larger than the image can show
    even: bool  # ROWS divides the height
    wide: bool  # offsets inside a sample need 64 bits
    warps: int
    registers: int  # of a thread at most: 128 leave room for 16 warps on an SM
    reduce_columns: int  # as above, of the backward's reduction
    reduce_column_tiles: int
    reduce_warps: int


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def pieces(size: int) -> tuple[int, int]:
    """One or two powers of two that cover the size with less padding than one alone: 96 is 64 + 32."""
    whole = max(16, next_power_of_2(size))
    half = whole // 2
    rest = max(16, next_power_of_2(max(1, size - half)))
    return (half, rest) if half + rest < whole or size > 64 else (whole, 0)


def _tile(shape, channels_last: bool, pool_size: int) -> tuple[int, int]:
    """(columns, channels) of a tile. Height and width may be symbolic: they are compared, never converted."""
    channels, height, width = int(shape[1]), shape[2], shape[3]
    columns = (height + ROWS - 1) // ROWS * width
    lanes = 512 if not channels_last else 2048 if pool_size == 3 and height % ROWS == 0 else 1024
    if channels_last:
        divisor = (
            channels & -channels
        )  # a tile that divides C needs no channel mask: loads stay 128 bits wide
        tile_channels = min(divisor, 128) if divisor >= 16 else min(next_power_of_2(channels), 128)
        tile_columns = lanes // tile_channels
        half = max(1, tile_columns // 2)
        if columns > half and columns % tile_columns != 0 and columns % half == 0:
            tile_columns = half  # no idle lanes
    else:
        tile_columns = 64
    while tile_columns > 1 and columns <= tile_columns // 2:
        tile_columns //= 2
    if not channels_last:
        tile_channels = min(lanes // tile_columns, next_power_of_2(channels))
    return tile_columns, tile_channels


def stats_tiles(shape, channels_last: bool, pool_size: int) -> int:
    """How many partials of a sample's statistics the forward kernel returns: one per tile."""
    columns, channels = _tile(shape, channels_last, pool_size)
    strips = (shape[2] + ROWS - 1) // ROWS
    return -(-(strips * shape[3]) // columns) * -(-shape[1] // channels)


@cache
def plan(
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    pool_size: int,
    itemsize: int,
    aligned: bool = True,
) -> Plan:
    """Launch configuration for samples of this shape and of elements of ``itemsize`` bytes.

    ``aligned``: the images start at 16 bytes, so that loads can be 128 bits wide.
    """
    shape = (1, channels, height, width)
    columns, tile_channels = _tile(shape, channels_last, pool_size)
    tiles = stats_tiles(shape, channels_last, pool_size)
    reach = 2 * max(height, width) - 1  # a pool this large sees the whole image from every pixel
    even = height % ROWS == 0
    # Lanes of a thread: one 128-bit load in channels_last, half of it where a larger pool keeps more rows.
    lanes = 2 if not channels_last else 8 if pool_size == 3 and itemsize == 2 and aligned else 4
    warps = max(1, columns * tile_channels // (32 * lanes))
    reduce_warps = min(warps, 4)  # the reduction spills at 128 registers: smaller programs, unlimited
    reduce_columns = max(1, columns * reduce_warps // warps)
    return Plan(
        columns=columns,
        channels=tile_channels,
        tiles=tiles,
        pool=min(pool_size, reach),
        even=even,
        # a tile may point (not load) past the sample's last row by a strip and a pool
        wide=channels * (height + 2 * ROWS + pool_size) * (width + pool_size) >= 2**31,
        warps=warps,
        registers=255 if pool_size != 3 else 128 if even or not channels_last else 168,
        reduce_columns=reduce_columns,
        reduce_column_tiles=-(-(-(-height // ROWS) * width) // reduce_columns),
        reduce_warps=reduce_warps,
    )


def flat_block(elements: int) -> tuple[int, int]:
    """(elements per partial, warps) of the statistics kernel for samples of so many elements."""
    return (1024, 4) if elements <= 4096 else (FLAT, 8)
