"""The token mixers of MetaFormer beside pooling, and the position embedding that attention needs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import boolean, only_from_timm, positive_int, probability, tracing
from .factory import Device

__all__ = ["Attention", "PositionEmbedding", "RandomMatrix", "SpatialFC"]


class Attention(nn.Module):
    """Multi-head self-attention over the pixels of ``[B, C, H, W]``; the result is channels_last.

    Equivalent PyTorch, with the official parameters ``qkv`` and ``proj``::

        q, k, v = qkv(x.flatten(2).transpose(1, 2)).unflatten(2, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(2, 3) * head_dim**-0.5).softmax(3) @ v
        y = proj(a.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (H, W))

    Args:
        dim: channels C; a multiple of ``head_dim`` unless ``num_heads`` is given.
        head_dim: channels of a head.
        qkv_bias: whether ``qkv`` has a bias.
        num_heads: of ``head_dim`` channels each; ``dim / head_dim`` when None.
        proj_bias: whether ``proj`` has a bias. timm's default is False.
        attn_drop: dropout probability of the attention ``a``.
        proj_drop: dropout probability of y; None is 0.
        device, dtype: of the parameters, as in torch.nn.
        others: for timm, see `Pooling`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Source: Attention Is All You Need (arXiv 1706.03762); MetaFormer (arXiv 2111.11418), Table 5.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 32,
        qkv_bias: bool = False,
        *,
        num_heads: int | None = None,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        allowed = "dim, head_dim, qkv_bias, num_heads, proj_bias, attn_drop, proj_drop, device, dtype"
        dropped = only_from_timm(type(self), proj_drop, others, allowed)
        dim, self.head_dim = positive_int("dim", dim), positive_int("head_dim", head_dim)
        if num_heads is None:
            if dim % self.head_dim != 0:
                raise ValueError(f"dim must be a multiple of head_dim {head_dim}, got {dim}")
            num_heads = dim // self.head_dim
        inner = positive_int("num_heads", num_heads) * self.head_dim
        qkv_bias, proj_bias = boolean("qkv_bias", qkv_bias), boolean("proj_bias", proj_bias)
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = probability("attn_drop", attn_drop)
        self.proj = nn.Linear(inner, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = dropped
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # [B, N, C]
        qkv = self.qkv(tokens).unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        dropped = self.attn_drop if self.training else 0.0
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped).transpose(1, 2).flatten(2)
        y = F.dropout(self.proj(y), self.proj_drop, self.training)
        return y.transpose(1, 2).unflatten(2, x.shape[2:])


class _Spatial(nn.Module):
    """What is made for images of one size ``(H, W)``."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise TypeError(f"size must be (height, width), got {size!r}")
        height, width = size
        self.size = positive_int("height", height), positive_int("width", width)

    def _check(self, x: Tensor) -> None:
        if not tracing() and x.shape[2:] != self.size:  # a trace is of one size anyway
            made, got = (" x ".join(map(str, size)) for size in (self.size, x.shape[2:]))
            wanted = ", ".join(map(str, x.shape[2:]))
            name = type(self).__name__
            raise ValueError(
                f"x has maps of {got} pixels; this {name} was made for {made}: allowed are these, or a {name}"
                f" of size=({wanted})"
            )

    def extra_repr(self) -> str:
        return f"size={self.size}"


class SpatialFC(_Spatial):
    """One matrix, learned, over the pixels of each channel: ``fc(x.flatten(2)).view_as(x)``.

    Args:
        size: (H, W) of x, ``[B, C, H, W]``; ``fc`` is a Linear of H W inputs and outputs, without bias.
        device, dtype: of the matrix, as in torch.nn.
        dim, proj_drop, others: for timm, see `Pooling`.

    Raises:
        TypeError, ValueError: a size that is not two positive ints; in a call, an x of another size.

    Source: MetaFormer (arXiv 2111.11418), Table 5; ResMLP (arXiv 2105.03404).
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        dim: int | None = None,
        proj_drop: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        only_from_timm(type(self), proj_drop, others, "size, dim, device, dtype")
        super().__init__(size)
        pixels = self.size[0] * self.size[1]
        self.fc = nn.Linear(pixels, pixels, bias=False, device=device, dtype=dtype)
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
        device, dtype: of the matrix, as in torch.nn.
        dim, proj_drop, others: for timm, see `Pooling`.

    Raises:
        TypeError, ValueError: a size that is not two positive ints; in a call, an x of another size.

    Source: MetaFormer (arXiv 2111.11418), Table 5 (global random matrix); the softmax is RandFormer's
    (arXiv 2210.13452).
    """

    random_matrix: Tensor

    def __init__(
        self,
        size: tuple[int, int],
        *,
        dim: int | None = None,
        proj_drop: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        only_from_timm(type(self), proj_drop, others, "size, dim, device, dtype")
        super().__init__(size)
        pixels = self.size[0] * self.size[1]
        matrix = torch.rand(pixels, pixels, device=device, dtype=dtype).softmax(1)
        self.register_buffer("random_matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return F.linear(x.flatten(2), self.random_matrix).unflatten(2, x.shape[2:])


class PositionEmbedding(_Spatial):
    """Adds a learned map ``pos_embed`` ``[1, C, H, W]``, zeros at first: ``x + pos_embed``.

    Args:
        dim: channels C of x, ``[B, C, H, W]``.
        size: its (H, W).
        device, dtype: of the map, as in torch.nn.

    Raises:
        TypeError, ValueError: sizes that are not positive ints; in a call, an x of another size.

    Source: MetaFormer (arXiv 2111.11418), Table 5; An Image is Worth 16x16 Words (arXiv 2010.11929).
    """

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(size)
        shape = 1, positive_int("dim", dim), *self.size
        self.pos_embed = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return x + self.pos_embed
