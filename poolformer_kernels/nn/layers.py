"""The layers without a product: the token mixer, the norm, the pool, stochastic depth."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .checks import not_negative, odd, positive_int, probability

__all__ = ["DropPath", "GroupNorm", "PoolMixer", "Pooling"]


class PoolMixer(nn.Module):
    """The token mixer with its norm: GroupNorm(1, C), then average pool minus identity.

    Equivalent PyTorch::

        n = F.group_norm(x, 1, weight, bias, eps)
        y = F.avg_pool2d(n, pool_size, 1, pool_size // 2, count_include_pad=False) - n

    Args:
        dim: channels C. ``weight`` and ``bias`` are ``[C]``, ones and zeros at first.
        pool_size: odd and positive.
        eps: added to the variance.

    x is ``[B, C, H, W]``; shapes, dtypes, layouts and errors of a call are those of
    `poolformer_kernels.ops.pool_mixer`.

    Raises:
        TypeError, ValueError: a dim, pool size or eps of the wrong type or range.

    Source: MetaFormer (arXiv 2111.11418), equation 3 and Algorithm 1.
    """

    def __init__(self, dim: int, pool_size: int = 3, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim = positive_int("dim", dim)
        self.pool_size = odd("pool_size", pool_size)
        self.eps = not_negative("eps", eps)
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.pool_mixer(x, self.weight, self.bias, pool_size=self.pool_size, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, pool_size={self.pool_size}, eps={self.eps}"


class GroupNorm(nn.GroupNorm):
    """GroupNorm with one group, the paper's modified layer norm: ``nn.GroupNorm(1, num_channels, ...)``."""

    def __init__(self, num_channels: int, **kwargs) -> None:
        super().__init__(1, num_channels, **kwargs)


class Pooling(nn.Module):
    """Average pool minus identity, stride 1, borders averaging the pixels that exist; no parameters.

    Equivalent PyTorch: ``F.avg_pool2d(x, K, 1, K // 2, count_include_pad=False) - x``.
    """

    def __init__(self, pool_size: int = 3) -> None:
        super().__init__()
        self.pool_size = odd("pool_size", pool_size)

    def forward(self, x: Tensor) -> Tensor:
        # NCHW: CUDA's channels_last avg_pool2d backward ignores the padding (pytorch#188344)
        pooled = F.avg_pool2d(x.contiguous(), self.pool_size, 1, self.pool_size // 2, count_include_pad=False)
        return pooled - x

    def extra_repr(self) -> str:
        return f"pool_size={self.pool_size}"


class DropPath(nn.Module):
    """Stochastic depth: in training each sample is zeroed with probability ``drop_prob``, else scaled up.

    Equivalent PyTorch: ``x * (torch.bernoulli(keep) / keep)`` per sample, ``keep = 1 - drop_prob``.

    Source: Deep Networks with Stochastic Depth (arXiv 1603.09382).
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = probability("drop_prob", drop_prob)

    def sample(self, x: Tensor) -> Tensor | None:
        """A draw of the drop scale ``[B]`` (0 or 1/keep), float32 or float64 as x; None if nothing drops."""
        if not self.training or self.drop_prob == 0.0:
            return None
        keep = 1.0 - self.drop_prob
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.empty(x.shape[0], dtype=dtype, device=x.device).bernoulli_(keep).div_(keep)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.sample(x)
        return x if scale is None else x * scale.to(x.dtype).view(-1, 1, 1, 1)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"
