"""The static configuration of the Triton kernels: tiles by shape and layout. Nothing is tuned at run time.

``poolformer-kernels bench pool-mixer --device cuda`` decides every number of a tile here: strips, lanes,
warps and registers. Only tiles that do not spill are eligible: ``tests/test_triton_aot.py`` compiles them for
every architecture.

Triton is not imported here: fakes and the ahead-of-time table need these numbers on machines without a GPU.
"""

from functools import cache
from typing import NamedTuple

__all__ = [
    "MAX_PARTIALS",
    "MAX_ROLLED_POOL",
    "OPTIONS",
    "PARAMS_CHANNELS",
    "PARAMS_SAMPLES",
    "ROWS",
    "SAMPLE_CHANNELS",
    "SAMPLE_PARTIALS",
    "STATS_BLOCK",
    "MixerLaunch",
    "ceil_div",
    "mixer_launch",
    "next_power_of_2",
    "power_of_2_parts",
    "stats_block",
    "stats_tiles",
]

ROWS = 7  # rows of a strip: 7 divides the height of every stage at 224x224
STATS_BLOCK = 16384  # elements of one partial of `sample_stats`, for samples of more than a few thousand
MAX_PARTIALS = 256  # partials of a sample that a kernel merges itself; if there are more, `merge_stats` does
# Options of every launch. Newer versions of Triton fuse multiply and add only on request.
OPTIONS = {"enable_fp_fusion": True}
SAMPLE_CHANNELS, SAMPLE_PARTIALS = 128, 16  # that `pool_mixer_bwd_sample` adds at a time, at most
# Of a program of `pool_mixer_bwd_dx` for parameters: channels, at most; samples that a warp adds at a time.
PARAMS_CHANNELS, PARAMS_SAMPLES = 32, 8
MAX_ROLLED_POOL = 9  # the largest pool whose window is unrolled; a larger one is looped over


class MixerLaunch(NamedTuple):
    """Launch configuration of the token mixer's kernels for one shape and layout."""

    columns: int  # of a tile; a column is ROWS pixels, one above the other, of one strip
    channels: int  # of a tile
    tiles: int  # of a sample
    pool: int  # the pool size, at most the smallest one that sees the whole image from every pixel
    even: bool  # whether ROWS divides the height
    wide: bool  # whether offsets inside a sample need 64 bits
    warps: int  # of a program
    registers: int  # of a thread at most: 128 leave room for 16 warps on an SM, 168 for 12
    reduce_columns: int  # columns of a tile of `pool_mixer_bwd_reduce`
    reduce_column_tiles: int  # how many of them cover a sample's columns
    reduce_warps: int  # of one of its programs


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` takes longer than an allocation."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def power_of_2_parts(size: int) -> tuple[int, int]:
    """One or two powers of two that cover the size with less padding than one alone: 96 is 64 + 32."""
    whole = max(16, next_power_of_2(size))
    half = whole // 2
    rest = max(16, next_power_of_2(max(1, size - half)))
    return (half, rest) if half + rest < whole or size > 64 else (whole, 0)


def _tile(shape, channels_last: bool, pool_size: int) -> tuple[int, int]:
    """(columns, channels) of a tile, both powers of two.

    Height and width may be symbolic integers of a trace: they are compared, never converted.
    """
    channels, height, width = int(shape[1]), shape[2], shape[3]
    columns = (height + ROWS - 1) // ROWS * width
    # A lane is one channel of one column. The tiles of a strip that is cut off below, or of a larger pool,
    # are smaller: their lanes need more registers.
    lanes = 512 if not channels_last else 2048 if pool_size == 3 and height % ROWS == 0 else 1024
    if channels_last:
        # A tile that divides C needs no mask of channels, so its loads stay 128 bits wide.
        divisor = channels & -channels  # the largest power of two that divides C
        tile_channels = min(divisor, 128) if divisor >= 16 else min(next_power_of_2(channels), 128)
        tile_columns = lanes // tile_channels
        half = max(1, tile_columns // 2)
        if columns > half and columns % tile_columns != 0 and columns % half == 0:
            tile_columns = half  # it divides the columns, so no lane idles
    else:
        tile_columns = 64
    while tile_columns > 1 and columns <= tile_columns // 2:
        tile_columns //= 2
    if not channels_last:
        tile_channels = min(lanes // tile_columns, next_power_of_2(channels))
    return tile_columns, tile_channels


def stats_tiles(shape, channels_last: bool, pool_size: int) -> int:
    """How many partials of a sample's statistics `pool_mixer_fwd` returns: one for each tile."""
    columns, channels = _tile(shape, channels_last, pool_size)
    strips = (shape[2] + ROWS - 1) // ROWS
    return -(-(strips * shape[3]) // columns) * -(-shape[1] // channels)


@cache
def mixer_launch(
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    pool_size: int,
    itemsize: int,
    aligned: bool = True,
) -> MixerLaunch:
    """Launch configuration for samples of this shape and of elements of ``itemsize`` bytes.

    ``aligned``: the images start at multiples of 16 bytes, so that loads can be 128 bits wide.
    """
    shape = (1, channels, height, width)
    columns, tile_channels = _tile(shape, channels_last, pool_size)
    tiles = stats_tiles(shape, channels_last, pool_size)
    largest_pool = 2 * max(height, width) - 1  # it sees the whole image from every pixel
    even = height % ROWS == 0
    # Lanes of a thread: in channels_last as many as one 128-bit load has, or half of them where a larger pool
    # keeps more rows in registers.
    lanes = 2 if not channels_last else 8 if pool_size == 3 and itemsize == 2 and aligned else 4
    warps = max(1, columns * tile_channels // (32 * lanes))
    reduce_warps = min(warps, 4)  # the reduction would spill at 128 registers, so its programs are smaller
    reduce_columns = max(1, columns * reduce_warps // warps)
    return MixerLaunch(
        columns=columns,
        channels=tile_channels,
        tiles=tiles,
        pool=min(pool_size, largest_pool),
        even=even,
        # A tile computes addresses, though it loads nothing, up to a strip and a pool past the sample's end.
        wide=channels * (height + 2 * ROWS + pool_size) * (width + pool_size) >= 2**31,
        warps=warps,
        registers=255 if pool_size != 3 else 128 if even or not channels_last else 168,
        reduce_columns=reduce_columns,
        reduce_column_tiles=-(-(-(-height // ROWS) * width) // reduce_columns),
        reduce_warps=reduce_warps,
    )


def stats_block(elements: int) -> tuple[int, int]:
    """(elements of a partial, warps of a program) of `sample_stats` for samples of so many elements."""
    return (1024, 4) if elements <= 4096 else (STATS_BLOCK, 8)
