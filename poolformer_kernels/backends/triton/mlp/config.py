"""The static configuration of the Triton MLP: which kernels run and their tiles, no tuning at run time.

No triton import here: fakes need `mlp_stats_tiles` on machines without a GPU.
"""

from functools import cache
from typing import NamedTuple

from ..config import flat_block, next_power_of_2, pieces
from ..device import Device

__all__ = [
    "FEW_PIXELS",
    "FOLD_DEPTH",
    "FOLD_ROWS",
    "FUSED_BACKWARD_CHANNELS",
    "FUSED_FORWARD_CHANNELS",
    "STATS_ROWS",
    "WORKSPACE",
    "BackwardGemms",
    "ForwardGemm",
    "FusedBackward",
    "FusedForward",
    "backward_launch",
    "fc1",
    "fc2",
    "fused",
    "fuses",
    "mlp_stats_tiles",
    "out_tile",
]

# Above so many channels, half of them in fp32, the fused kernel spills and gains nothing at the roofline.
FUSED_FORWARD_CHANNELS = 192
FEW_PIXELS = 32  # samples of fewer are too many in one tile: the pair, and y's statistics by their own kernel
FOLD_ROWS, FOLD_DEPTH = 16, 128  # a tile of fc1's weight while the norm is folded into it
STATS_ROWS = 64  # a tile has at least so many rows (tokens)
FUSED_BACKWARD_CHANNELS = (
    128  # the widest stream whose weight gradients fit in registers beside a tile of hidden activations
)
WORKSPACE = 2**23  # elements of one hidden buffer of the wider form, which works chunk by chunk
_PROGRAMS = 528  # four for each of 132 SMs


class FusedForward(NamedTuple):
    """Tiles of the fused kernel."""

    rows: int
    hidden: int  # of a chunk of the hidden dimension
    warps: int
    stages: int
    registers: int  # of a thread at most


class ForwardGemm(NamedTuple):
    """Tiles of one GEMM."""

    rows: int
    columns: tuple[int, int]  # of two parts, each a power of two; the second may be 0
    depth: int
    warps: int
    stages: int


class FusedBackward(NamedTuple):
    """C <= FUSED_BACKWARD_CHANNELS: the activations stay in registers; a pass for the weights, one for x."""

    weight_tokens: int  # of a tile of the weight gradients' kernel
    weight_hidden: int
    weight_warps: int
    weight_stages: int
    tokens: int  # of a tile of dx's kernel
    hidden: int
    warps: int
    stages: int
    registers: int  # of a thread at most: 168 leave room for 12 warps on an SM
    programs: int  # of the weight gradients' kernel, about


class BackwardGemms(NamedTuple):
    """Wider streams: the hidden gradient and activation of a chunk of samples, then matrix products."""

    tokens: int  # of a tile of the hidden kernel and of dx's
    hidden: int
    columns: int  # channels of a tile of dx
    rows: int  # of a tile of the weight gradients
    channels: int
    depth: int  # of a step of every product
    warps: int
    stages: int
    programs: int  # of one weight gradient's kernel, about


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
_FUSED_FORWARD = {
    64: FusedForward(128, 64, 8, 2, 128),
    96: FusedForward(128, 32, 8, 2, 128),
    128: FusedForward(128, 32, 8, 3, 255),
    192: FusedForward(128, 32, 8, 2, 255),
}


def fuses(channels: int, out: int, pixels: int, itemsize: int) -> bool:
    """Whether one kernel does it all, for operands of ``itemsize`` bytes."""
    return channels == out <= FUSED_FORWARD_CHANNELS * 2 // itemsize and pixels >= FEW_PIXELS


def fused(channels: int, itemsize: int, device: Device) -> FusedForward:
    """Tiles of the fused kernel at C channels, for operands of ``itemsize`` bytes."""
    if itemsize == 4:
        return FusedForward(64, 16, 8, 1, 255)
    if channels <= 64 and device.register_operands:  # 64 hidden channels at a time would spill
        return FusedForward(128, 32, 8, 2, 128)
    if 64 < channels <= 96 and device.architecture >= 120:  # 32 would spill there
        return FusedForward(128, 16, 8, 2, 128)
    return _FUSED_FORWARD[next(bound for bound in _FUSED_FORWARD if channels <= bound)]


def fc1(x_itemsize: int, itemsize: int, device: Device) -> ForwardGemm:
    """Tiles of fc1 where fc2 is a kernel of its own, and as many stages as a block's shared memory holds."""
    if itemsize == 4:
        return ForwardGemm(64, (64, 0), 16, 8, 2)  # operands of a step lie in registers
    return ForwardGemm(128, (128, 0), 64, 8, min(3, device.shared // (64 * 128 * (x_itemsize + itemsize))))


def fc2(out: int, itemsize: int, device: Device) -> ForwardGemm:
    """Tiles of that kernel, likewise."""
    columns = out_tile(out)
    if itemsize == 4:
        return ForwardGemm(64, columns, 16, 8, 2)
    return ForwardGemm(128, columns, 64, 8, min(4, device.shared // (64 * (128 + sum(columns)) * itemsize)))


# up to C: the fields of FusedBackward
_FUSED_BACKWARD = {
    64: FusedBackward(32, 64, 4, 2, 64, 32, 4, 2, 168, _PROGRAMS),
    96: FusedBackward(32, 64, 4, 2, 64, 32, 4, 2, 255, _PROGRAMS),
    128: FusedBackward(32, 64, 4, 2, 64, 32, 4, 2, 255, _PROGRAMS),
}


@cache
def backward_launch(
    channels: int, out: int, hidden: int, itemsize: int, device: Device
) -> FusedBackward | BackwardGemms:
    """Launch configuration for one shape, size of the products' operands and device."""
    width = max(sum(pieces(channels)), sum(pieces(out)))
    block = max(16, next_power_of_2(hidden))
    if width <= (FUSED_BACKWARD_CHANNELS if itemsize == 2 else FUSED_BACKWARD_CHANNELS // 2):
        p = next(p for limit, p in _FUSED_BACKWARD.items() if width <= limit)
        if itemsize == 4:
            p = FusedBackward(16, 32, 8, 2, 32, 32, 4, 2, 255, _PROGRAMS)
        elif device.register_operands:
            p = p._replace(weight_tokens=16, hidden=16 if width <= 64 else p.hidden)
        return p._replace(weight_hidden=min(p.weight_hidden, block), hidden=min(p.hidden, block))
    if itemsize == 4:
        return BackwardGemms(64, min(64, block), 64, 64, 64, 16, 8, 2, _PROGRAMS // 2)
    return BackwardGemms(
        128, min(64, block), 64, 128, 64 if channels % 128 else 128, 64, 8, 3, _PROGRAMS // 4
    )
