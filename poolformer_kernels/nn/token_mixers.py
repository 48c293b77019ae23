"""The token mixers of MetaFormer beside pooling, and the position embedding that attention needs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import boolean, positive_int

__all__ = ["Attention", "PositionEmbedding", "RandomMatrix", "SpatialFC"]


class Attention(nn.Module):
    """Multi-head self-attention over the pixels of ``[B, C, H, W]``; the result is channels_last.

    Equivalent PyTorch, with the official parameters ``qkv`` and ``proj``::

        q, k, v = qkv(x.flatten(2).transpose(1, 2)).unflatten(2, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(2, 3) * head_dim**-0.5).softmax(3) @ v
        y = proj(a.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (H, W))

    Args:
        dim: channels C, a multiple of ``head_dim``.
        head_dim: channels of a head.
        qkv_bias: whether ``qkv`` has a bias; ``proj`` has one.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Source: Attention Is All You Need (arXiv 1706.03762); MetaFormer (arXiv 2111.11418), Table 5.
    """

    def __init__(self, dim: int, head_dim: int = 32, qkv_bias: bool = False) -> None:
        super().__init__()
        if positive_int("dim", dim) % positive_int("head_dim", head_dim) != 0:
            raise ValueError(f"dim must be a multiple of head_dim {head_dim}, got {dim}")
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=boolean("qkv_bias", qkv_bias))
        self.proj = nn.Linear(dim, dim)
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # [B, N, C]
        q, k, v = self.qkv(tokens).unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(y).transpose(1, 2).unflatten(2, x.shape[2:])


class _Spatial(nn.Module):
    """What is made for images of one size ``(H, W)``."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        height, width = size
        self.size = positive_int("height", height), positive_int("width", width)

    def _check(self, x: Tensor) -> None:
        if x.shape[2:] != self.size:
            made, got = (" x ".join(map(str, size)) for size in (self.size, x.shape[2:]))
            raise ValueError(f"{type(self).__name__} was made for maps of {made} pixels, got {got}")

    def extra_repr(self) -> str:
        return f"size={self.size}"


class SpatialFC(_Spatial):
    """One matrix, learned, over the pixels of each channel: ``fc(x.flatten(2)).view_as(x)``.

    Args:
        size: (H, W) of x, ``[B, C, H, W]``; ``fc`` is a Linear of H W inputs and outputs, without bias.

    Raises:
        TypeError, ValueError: a size that is not two positive ints; in a call, an x of another size.

    Source: MetaFormer (arXiv 2111.11418), Table 5; ResMLP (arXiv 2105.03404).
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size)
        pixels = self.size[0] * self.size[1]
        self.fc = nn.Linear(pixels, pixels, bias=False)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return self.fc(x.flatten(2)).unflatten(2, x.shape[2:])


class RandomMatrix(_Spatial):
    """One matrix, random and frozen, over the pixels: ``F.linear(x.flatten(2), random_matrix).view_as(x)``.

    Its rows are ``softmax(torch.rand(N, N), dim=1)``, so that each pixel becomes an average of all. It is a
    buffer: saved with the model, never trained.

    Args:
        size: (H, W) of x, ``[B, C, H, W]``; the matrix is ``[H W, H W]``.

    Raises:
        TypeError, ValueError: a size that is not two positive ints; in a call, an x of another size.

    Source: MetaFormer (arXiv 2111.11418), Table 5 (global random matrix); the softmax is RandFormer's
    (arXiv 2210.13452).
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size)
        pixels = self.size[0] * self.size[1]
        self.register_buffer("random_matrix", torch.rand(pixels, pixels).softmax(1))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return F.linear(x.flatten(2), self.random_matrix).unflatten(2, x.shape[2:])


class PositionEmbedding(_Spatial):
    """Adds a learned map ``pos_embed`` ``[1, C, H, W]``, zeros at first: ``x + pos_embed``.

    Args:
        dim: channels C of x, ``[B, C, H, W]``.
        size: its (H, W).

    Raises:
        TypeError, ValueError: sizes that are not positive ints; in a call, an x of another size.

    Source: MetaFormer (arXiv 2111.11418), Table 5; An Image is Worth 16x16 Words (arXiv 2010.11929).
    """

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__(size)
        self.pos_embed = nn.Parameter(torch.zeros(1, positive_int("dim", dim), *self.size))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return x + self.pos_embed
