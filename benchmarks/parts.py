"""What a PoolFormer is made of, timm's and ours side by side, and the least that each part costs.

Bytes count every weight once and, per sample, what has to move when statistics travel with the activations:
each sub-block, convolution and head reads its input and writes its output. FLOPs are twice the
multiply-accumulates of convolutions and linear layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from poolformer_kernels.models import PoolFormer
from poolformer_kernels.profiling import count_macs

__all__ = ["NAMES", "Part", "cost", "parts"]

Shape = tuple[int, int, int]
# In the order in which `parts` returns them
NAMES = ("stem", "stage 1", "down1", "stage 2", "down2", "stage 3", "down3", "stage 4", "head")
NAMES += tuple(f"a block of stage {i}" for i in range(1, 5))


@dataclass(frozen=True)
class Part:
    """One part of a model. ``stage`` as in `rows`; ``moved`` are elements per sample."""

    stage: str
    peer: nn.Module
    ours: Callable[[Tensor], Tensor]
    shape: Shape
    moved: int

    def cost(self, batch: int, itemsize: int) -> tuple[int, int]:
        """(bytes, FLOPs) of one call."""
        macs = count_macs(self.peer, (1, *self.shape))
        weights = sum(p.numel() for p in self.peer.parameters())
        flops = 2 * batch * (macs["convolution"] + macs["linear"])
        return (batch * self.moved + weights) * itemsize, flops


def parts(peer: nn.Module, ours: PoolFormer, size: int) -> list[Part]:
    """What makes up the model, for square images of ``size``; then the first block of each stage."""
    config = ours.config
    shape = (ours.in_chans, size, size)
    whole, blocks = [], []

    def convolution(stage: str, theirs: nn.Module, our: nn.Module) -> Shape:
        conv = our.proj
        pixels = (
            (n + 2 * p - k) // s + 1
            for n, p, k, s in zip(shape[1:], conv.padding, conv.kernel_size, conv.stride, strict=True)
        )
        out = (conv.out_channels, *pixels)
        whole.append(Part(stage, theirs, our, shape, _elements(shape) + _elements(out)))
        return out

    shape = convolution("stem", peer.stem, ours.patch_embed)
    for i, depth in enumerate(config.layers):
        if i > 0:
            shape = convolution(f"down{i}", peer.stages[i].downsample, ours.network[2 * i - 1])
        stage = ours.network[2 * i]
        moved = 4 * _elements(shape)  # a block has two sub-blocks, and each reads and writes a map
        whole.append(Part(str(i + 1), peer.stages[i].blocks, stage, shape, depth * moved))
        blocks.append(Part("", peer.stages[i].blocks[0], stage[0], shape, moved))
    head = _elements(shape) + ours.num_classes
    whole.append(Part("head", peer.head, ours.forward_head, shape, head))
    return whole + blocks


def cost(peer: nn.Module, ours: PoolFormer, size: int, batch: int, itemsize: int) -> tuple[int, int]:
    """(bytes, FLOPs) of the whole model: the sum of its parts."""
    costs = [part.cost(batch, itemsize) for part in parts(peer, ours, size)[:-4]]
    return sum(b for b, _ in costs), sum(f for _, f in costs)


def _elements(shape: Shape) -> int:
    return shape[0] * shape[1] * shape[2]
