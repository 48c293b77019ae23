"""The static configuration of the Triton MLP: its kernels and their tiles. Nothing is tuned at run time.

``poolformer-kernels bench mlp --device cuda`` decides every number of a tile here: rows, columns, depth,
warps, stages and registers. Only tiles that do not spill are eligible: ``tests/test_triton_mlp_aot.py`` and
``tests/test_triton_mlp_backward_aot.py`` compile them for every architecture.

Triton is not imported here: fakes need `mlp_stats_tiles` on machines without a GPU.
"""

from functools import cache
from typing import NamedTuple

import torch

from ..config import next_power_of_2, power_of_2_parts, stats_block
from ..device import Device

__all__ = [
    "BLOCK_ELEMENTS",
    "BLOCK_ROWS",
    "BLOCK_SAMPLES",
    "CAST_BLOCK",
    "FEW_PIXELS",
    "FOLD_DEPTH",
    "FOLD_ROWS",
    "FUSED_BACKWARD_CHANNELS",
    "FUSED_FORWARD_CHANNELS",
    "IMAGE_CHANNELS",
    "IMAGE_TOKENS",
    "PREPARE_CHANNELS",
    "PREPARE_HIDDEN",
    "SAMPLE_CHANNELS",
    "SAMPLE_TOKENS",
    "SAMPLE_VALUES",
    "STATS_ROWS",
    "SUM_COLUMNS",
    "SUM_GROUP",
    "SUM_LANES",
    "SUM_ROWS",
    "SUM_ROWS_LIMIT",
    "WEIGHT_COLUMNS",
    "WEIGHT_SPLITS",
    "WORKSPACE_SHARE",
    "BackwardGemms",
    "ForwardGemm",
    "FusedBackward",
    "FusedForward",
    "backward_launch",
    "fc1_tiles",
    "fc2_tiles",
    "fused_forward_tiles",
    "mlp_stats_tiles",
    "output_columns",
    "product_precision",
    "uses_fused_forward",
]

# The widest C of the fused forward for operands of two bytes; half of it for float32, and two thirds in TF32.
# Above it the kernel spills, and fc1 and fc2 as two kernels are bound by their products anyway.
FUSED_FORWARD_CHANNELS = 192
# The widest C and output of the fused backward for operands of two bytes; half of it for float32. Above it
# the weight gradients of a block of hidden channels no longer fit in registers beside a tile of hidden
# activations.
FUSED_BACKWARD_CHANNELS = 128
# Samples of fewer pixels are too many in one tile for the fused forward. They take two kernels, and the
# statistics of y a kernel of their own.
FEW_PIXELS = 32
# Of `mlp_prepare`: rows and columns of a tile of fc1's weight that is folded, elements of one that is cast.
FOLD_ROWS, FOLD_DEPTH, CAST_BLOCK = 16, 128, 4096
STATS_ROWS = 64  # tokens that every tile of the forward has at least: `mlp_stats_tiles` counts on it
# Of the backward by GEMMs, see `chunks`: hidden activations of a block, at most; the tokens and samples that
# it has a multiple of; the share of the device's memory, of the free and the used, that a chunk may take.
BLOCK_ELEMENTS, BLOCK_ROWS, BLOCK_SAMPLES = 2**26, 128, 8
WORKSPACE_SHARE = 32
PREPARE_HIDDEN, PREPARE_CHANNELS = 16, 64  # of a tile of a weight in `mlp_bwd_prepare`
IMAGE_TOKENS, IMAGE_CHANNELS = 64, 64  # of a tile of an image there; channels: at most
# Of `mlp_bwd_sample`: values of the sums per token that it adds at a time, at most; then the tokens and
# channels of the gradient that it adds at a time.
SAMPLE_VALUES, SAMPLE_TOKENS, SAMPLE_CHANNELS = 1024, 64, 64
# Of `mlp_bwd_columns` and `mlp_bwd_finish`: rows of partials that a program of the first adds, how many of
# them at a time, and its columns; the most rows that a program of the second adds by itself.
SUM_GROUP, SUM_ROWS, SUM_COLUMNS, SUM_ROWS_LIMIT = 256, 64, 32, 1024
SUM_LANES = 256  # partials of one element that a program of `mlp_bwd_finish` adds at a time
WEIGHT_SPLITS, WEIGHT_COLUMNS = 16, 128  # that `mlp_bwd_finish` adds of a weight's at a time, at most
_PROGRAMS = 528  # programs of a weight gradient's kernel: four for each of the 132 SMs of an H100


class FusedForward(NamedTuple):
    """Launch configuration of `mlp_fwd`."""

    rows: int  # tokens of a tile
    hidden: int  # hidden channels that are computed at a time
    warps: int  # of a program
    stages: int  # of the software pipeline
    registers: int  # of a thread at most


class ForwardGemm(NamedTuple):
    """Launch configuration of `mlp_fc1` or `mlp_fc2`."""

    rows: int  # tokens of a tile
    columns: tuple[int, int]  # output channels of a tile, in two powers of two; the second may be 0
    depth: int  # input channels of one step
    warps: int  # of a program
    stages: int  # of the software pipeline


class FusedBackward(NamedTuple):
    """Launch configuration of `mlp_bwd_wgrad` and `mlp_bwd_dx`.

    The hidden activations stay in registers; they are computed once for the weights and once for x.
    """

    weight_tokens: int  # tokens of a tile of `mlp_bwd_wgrad`
    weight_hidden: int  # hidden channels whose weight gradients one of its programs holds
    weight_warps: int  # of one of its programs
    weight_stages: int  # of its software pipeline
    tokens: int  # tokens of a tile of `mlp_bwd_dx`
    hidden: int  # hidden channels that it computes at a time
    warps: int  # of one of its programs
    stages: int  # of its software pipeline
    registers: int  # of a thread of either kernel at most: 168 leave room for 12 warps on an SM
    programs: int  # of `mlp_bwd_wgrad`, approximately


class BackwardGemms(NamedTuple):
    """Launch configuration of `mlp_bwd_hidden`, `mlp_bwd_outer` and `mlp_bwd_dn`.

    The hidden activations and gradients of a chunk of samples are written to memory for the matrix products.
    """

    tokens: int  # tokens of a tile of `mlp_bwd_hidden` and `mlp_bwd_dn`
    hidden: int  # hidden channels of a tile of `mlp_bwd_hidden`
    columns: int  # channels of a tile of dx in `mlp_bwd_dn`
    rows: int  # rows of a tile of a weight gradient in `mlp_bwd_outer`
    channels: int  # columns of such a tile
    depth: int  # of one step of each product
    warps: int  # of a program
    stages: int  # of the software pipeline
    programs: int  # of `mlp_bwd_outer` for one weight, approximately


def product_precision(operand: torch.dtype, allow_tf32: bool) -> str:
    """Triton's name of how operands of this dtype are multiplied: float32 in TF32 where that is allowed."""
    return "tf32" if allow_tf32 and operand == torch.float32 else "ieee"


@cache
def output_columns(out: int) -> tuple[int, int]:
    """Columns of a tile of y, as one or two powers of two: tiles that divide y where there are such."""
    if out <= 192:
        return power_of_2_parts(out)
    for columns in ((128, 0), (128, 64), (128, 32)):
        if out % sum(columns) == 0:
            return columns
    return 128, 0


def mlp_stats_tiles(shape, channels_last: bool, hidden: int) -> int:
    """How many partials of a sample's statistics the forward returns; some of them may have a count of 0."""
    out, pixels = int(shape[1]), shape[2] * shape[3]
    if pixels < FEW_PIXELS:
        elements = out * pixels
        block, _ = stats_block(elements)
        return (elements + block - 1) // block
    # A sample may start anywhere in a tile of tokens, so it may touch one tile more than it fills.
    return ((pixels + STATS_ROWS - 2) // STATS_ROWS + 1) * -(-out // sum(output_columns(out)))


# For operands of two bytes, by the largest C. 128 registers leave room for two programs of 8 warps on an SM.
_FUSED_FORWARD = {
    64: FusedForward(128, 64, 8, 2, 128),
    96: FusedForward(128, 32, 8, 2, 128),
    128: FusedForward(128, 32, 8, 3, 255),
    192: FusedForward(128, 32, 8, 2, 255),
}


def uses_fused_forward(channels: int, out: int, pixels: int, itemsize: int, precision: str = "ieee") -> bool:
    """Whether one kernel computes fc1 and fc2, for operands of ``itemsize`` bytes; else each has its own."""
    widest = FUSED_FORWARD_CHANNELS * 2 // (3 if precision == "tf32" else itemsize)
    return channels == out <= widest and pixels >= FEW_PIXELS


def fused_forward_tiles(
    channels: int, itemsize: int, device: Device, precision: str = "ieee"
) -> FusedForward:
    """Launch configuration of `mlp_fwd` at C channels, for operands of ``itemsize`` bytes."""
    if precision == "tf32":
        return FusedForward(128, 32, 8, 2, 255)
    if itemsize == 4:
        return FusedForward(64, 16, 8, 1, 255)
    if channels <= 64 and device.register_operands:  # 64 hidden channels at a time would spill
        return FusedForward(128, 32, 8, 2, 128)
    if 64 < channels <= 96 and device.architecture >= 120:  # 32 hidden channels at a time would spill
        return FusedForward(128, 16, 8, 2, 128)
    return _FUSED_FORWARD[next(bound for bound in _FUSED_FORWARD if channels <= bound)]


def fc1_tiles(x_itemsize: int, itemsize: int, device: Device, precision: str = "ieee") -> ForwardGemm:
    """Launch configuration of `mlp_fc1` for an x and operands of so many bytes an element.

    The pipeline has as many stages as the shared memory of a block holds, but at most 3.
    """
    if itemsize == 4 and precision == "ieee":
        return ForwardGemm(64, (64, 0), 16, 8, 2)  # the operands of a step lie in registers
    depth = 128 // itemsize
    return ForwardGemm(
        128, (128, 0), depth, 8, min(3, device.shared // (depth * 128 * (x_itemsize + itemsize)))
    )


def fc2_tiles(out: int, itemsize: int, device: Device, precision: str = "ieee") -> ForwardGemm:
    """Launch configuration of `mlp_fc2` for operands of ``itemsize`` bytes.

    The pipeline has as many stages as the shared memory of a block holds, but at most 4.
    """
    columns = output_columns(out)
    if itemsize == 4 and precision == "ieee":
        return ForwardGemm(64, columns, 16, 8, 2)
    stages = min(4, device.shared // (128 * (128 + sum(columns))))  # a step has 128 bytes of each row
    return ForwardGemm(128, columns, 128 // itemsize, 8, stages)


# For operands of two bytes, by the largest C or output.
_FUSED_BACKWARD = {
    64: FusedBackward(32, 64, 4, 2, 64, 32, 4, 2, 168, _PROGRAMS),
    96: FusedBackward(32, 64, 4, 2, 64, 32, 4, 2, 255, _PROGRAMS),
    128: FusedBackward(32, 64, 4, 2, 64, 32, 4, 2, 255, _PROGRAMS),
}


@cache
def backward_launch(
    channels: int, out: int, hidden: int, itemsize: int, device: Device, precision: str = "ieee"
) -> FusedBackward | BackwardGemms:
    """Launch configuration of the backward for one shape, operands of ``itemsize`` bytes and one device."""
    width = max(sum(power_of_2_parts(channels)), sum(power_of_2_parts(out)))
    block = max(16, next_power_of_2(hidden))
    if width <= (FUSED_BACKWARD_CHANNELS if itemsize == 2 else FUSED_BACKWARD_CHANNELS // 2):
        launch = next(launch for limit, launch in _FUSED_BACKWARD.items() if width <= limit)
        if itemsize == 4 and precision == "ieee":
            launch = FusedBackward(16, 32, 8, 2, 32, 32, 4, 2, 255, _PROGRAMS)
        elif device.register_operands:  # tiles that suit wgmma and tcgen05 would spill
            launch = launch._replace(weight_tokens=16, hidden=16 if width <= 64 else launch.hidden)
        if precision == "tf32":
            launch = launch._replace(registers=255)
        return launch._replace(
            weight_hidden=min(launch.weight_hidden, block), hidden=min(launch.hidden, block)
        )
    if itemsize == 4 and precision == "ieee":
        return BackwardGemms(64, min(64, block), 64, 64, 64, 16, 8, 2, _PROGRAMS // 2)
    wide = 32 if precision == "tf32" and device.register_operands else 64  # 64 would spill
    return BackwardGemms(
        128, min(wide, block), 64, 128, 64 if channels % 128 else 128, 128 // itemsize, 8, 3, _PROGRAMS // 4
    )
