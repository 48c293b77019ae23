"""How the MLP's backward by GEMMs divides the samples: into blocks by their shape, into chunks by the memory.

Sums over tokens end with each block, and the shape alone says which samples a block has. A chunk, whose
hidden activations and gradients are in memory at one time, is as many whole blocks as the workspace holds:
the results are the same bit for bit, whatever its size. The workspace is a share of the device's whole
memory, never of what happens to be free; where it cannot be allocated the chunks are halved, down to one
block. That is the least: at most BLOCK_ELEMENTS hidden activations, or those of one sample if these are more,
in each of two buffers, which are 128 MiB each in bfloat16.

Triton is not imported here, as in `config`.
"""

import math
from typing import NamedTuple

from ..config import ceil_div
from .config import BLOCK_ELEMENTS, BLOCK_ROWS, BLOCK_SAMPLES

__all__ = ["Chunks", "divide"]


class Chunks(NamedTuple):
    """How the samples are divided. The last block, and so the last chunk, may have fewer."""

    block: int  # samples of a block
    chunk: int  # of a chunk: of one block or several

    def halved(self) -> "Chunks | None":
        """With about half the blocks in a chunk; None where it has one."""
        blocks = ceil_div(self.chunk, self.block)
        return self._replace(chunk=ceil_div(blocks, 2) * self.block) if blocks > 1 else None


def divide(shape: tuple[int, ...], itemsize: int, workspace: int) -> Chunks:
    """The chunks that fit in a workspace of so many bytes, or of one block where that does not fit either.

    ``shape``: (samples, pixels of one, C, out, hidden); ``itemsize``: bytes of an operand's element.
    """
    batch, pixels, channels, out, hidden = shape
    fitting = max(1, BLOCK_ELEMENTS // (pixels * hidden))
    if fitting >= batch:
        return Chunks(batch, batch)
    # Blocks of a chunk share tiles of tokens and slices of tensors. Their bits do not depend on the chunk if
    # every block starts with a tile and at a multiple of 16 bytes. Otherwise each is a chunk by itself.
    unit = math.lcm(BLOCK_SAMPLES, BLOCK_ROWS // math.gcd(BLOCK_ROWS, pixels))
    if fitting < unit or any(size % 8 for size in (channels, out, hidden)):
        return Chunks(fitting, fitting)
    equal = ceil_div(batch, ceil_div(batch, fitting))
    block = min(fitting // unit, ceil_div(equal, unit)) * unit
    bytes_of_token = itemsize * (channels + out + 2 * hidden) + 12 * ceil_div(hidden, 64)
    blocks = max(1, workspace // (block * pixels * bytes_of_token))
    return Chunks(block, min(batch, block * blocks))
