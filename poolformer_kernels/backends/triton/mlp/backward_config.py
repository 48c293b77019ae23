"""The static configuration of the MLP's backward in Triton; no triton import, like `config`."""

from functools import cache
from typing import NamedTuple

from ..config import next_power_of_2, pieces
from ..device import Device

__all__ = ["FUSED", "WORKSPACE", "Fused", "Gemm", "plan"]

FUSED = 128  # the widest stream whose weight gradients fit in registers beside a tile of hidden activations
WORKSPACE = 2**23  # elements of one hidden buffer of the wider form, which works chunk by chunk
_PROGRAMS = 528  # four for each of 132 SMs


class Fused(NamedTuple):
    """C <= FUSED: hidden activations stay in registers; computed once for the weights and once for x."""

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


class Gemm(NamedTuple):
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


# up to C: the fields of Fused
_FUSED = {
    64: Fused(32, 64, 4, 2, 64, 32, 4, 2, 168, _PROGRAMS),
    96: Fused(32, 64, 4, 2, 64, 32, 4, 2, 255, _PROGRAMS),
    128: Fused(32, 64, 4, 2, 64, 32, 4, 2, 255, _PROGRAMS),
}


@cache
def plan(channels: int, out: int, hidden: int, itemsize: int, device: Device) -> Fused | Gemm:
    """Launch configuration for one shape, size of the products' operands and device."""
    width = max(sum(pieces(channels)), sum(pieces(out)))
    block = max(16, next_power_of_2(hidden))
    if width <= (FUSED if itemsize == 2 else FUSED // 2):
        p = next(p for limit, p in _FUSED.items() if width <= limit)
        if itemsize == 4:
            p = Fused(16, 32, 8, 2, 32, 32, 4, 2, 255, _PROGRAMS)
        elif device.register_operands:
            p = p._replace(weight_tokens=16, hidden=16 if width <= 64 else p.hidden)
        return p._replace(weight_hidden=min(p.weight_hidden, block), hidden=min(p.hidden, block))
    if itemsize == 4:
        return Gemm(64, min(64, block), 64, 64, 64, 16, 8, 2, _PROGRAMS // 2)
    return Gemm(128, min(64, block), 64, 128, 64 if channels % 128 else 128, 64, 8, 3, _PROGRAMS // 4)
