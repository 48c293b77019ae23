"""The layers without a product: the token mixer, the norms, the pool, StarReLU, stochastic depth."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .checks import boolean, epsilon, finite, odd, only_from_timm, positive_int, probability
from .factory import Device

__all__ = ["ChannelLayerNorm", "DropPath", "GroupNorm", "PoolMixer", "Pooling", "StarReLU"]


class PoolMixer(nn.Module):
    """The token mixer with its norm: GroupNorm(1, C), then average pool minus identity.

    Equivalent PyTorch::

        n = F.group_norm(x, 1, weight, bias, eps)
        y = F.avg_pool2d(n, pool_size, 1, pool_size // 2, count_include_pad=False) - n

    Args:
        dim: channels C. ``weight`` and ``bias`` are ``[C]``, ones and zeros at first.
        pool_size: odd and positive.
        eps: added to the variance.
        device, dtype: of the parameters, as in torch.nn.
        proj_drop, others: for timm, see `Pooling`.

    x is ``[B, C, H, W]``; shapes, dtypes, layouts and errors of a call are those of
    `poolformer_kernels.ops.pool_mixer`.

    Raises:
        TypeError, ValueError: a dim, pool size or eps of the wrong type or range.

    Source: MetaFormer (arXiv 2111.11418), equation 4 and Algorithm 1.
    """

    def __init__(
        self,
        dim: int,
        pool_size: int = 3,
        eps: float = 1e-5,
        *,
        proj_drop: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        only_from_timm(type(self), proj_drop, others, "dim, pool_size, eps, device, dtype")
        self.dim = positive_int("dim", dim)
        self.pool_size = odd("pool_size", pool_size)
        self.eps = epsilon("eps", eps)
        self.weight = nn.Parameter(torch.ones(self.dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ops.pool_mixer(x, self.weight, self.bias, pool_size=self.pool_size, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, pool_size={self.pool_size}, eps={self.eps}"


class GroupNorm(nn.GroupNorm):
    """GroupNorm with one group, the paper's modified layer norm.

    Equivalent PyTorch: ``nn.GroupNorm(1, num_channels, eps, affine, device=device, dtype=dtype)``.

    Args:
        num_channels: C of x, ``[B, C, ...]``; y has x's shape and, but for autocast, dtype. ``weight`` and
            ``bias`` are ``[C]``.
        eps: added to the variance.
        affine: have ``weight`` and ``bias``.
        device, dtype: of the parameters, as in torch.nn.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range; in a call, PyTorch's errors.

    Source: MetaFormer (arXiv 2111.11418), section 4.4; Group Normalization (arXiv 1803.08494).
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        channels = positive_int("num_channels", num_channels)
        super().__init__(
            1, channels, epsilon("eps", eps), boolean("affine", affine), device=device, dtype=dtype
        )


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of ``[B, C, H, W]``.

    Equivalent PyTorch: ``F.layer_norm(x.permute(0, 2, 3, 1), (C,), weight, bias, eps).permute(0, 3, 1, 2)``;
    the result is channels_last.

    Args:
        num_channels: C. ``weight`` and ``bias`` are ``[C]``.
        eps: added to the variance.
        bias: have a bias.
        device, dtype: of the parameters, as in torch.nn.

    Raises:
        TypeError, ValueError: channels or an eps of the wrong type or range; in a call, PyTorch's errors.

    Source: Layer Normalization (arXiv 1607.06450); MetaFormer (arXiv 2111.11418), Table 5.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        channels = positive_int("num_channels", num_channels)
        bias = boolean("bias", bias)
        super().__init__(channels, epsilon("eps", eps), bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StarReLU(nn.Module):
    """The square of ReLU with a learned scale and bias, for x of any shape and floating dtype.

    Equivalent PyTorch: ``scale * F.relu(x).square() + bias``.

    Args:
        scale, bias: initial values of the parameters ``scale`` and ``bias``, each ``[1]``.
        device, dtype: of the parameters, as in torch.nn.

    Raises:
        TypeError, ValueError: an initial value that is not a finite number.

    Source: MetaFormer Baselines for Vision (arXiv 2210.13452), section 2.2.
    """

    def __init__(
        self,
        scale: float = 1.0,
        bias: float = 0.0,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        scale, bias = finite("scale", scale), finite("bias", bias)
        self.scale = nn.Parameter(torch.full((1,), scale, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.full((1,), bias, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x).square() + self.bias

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight ``[out, in, ...]`` and bias of a layer behind ``relu(x)**2`` that computes it behind this.

        See `fold_star_relu`.
        """
        return fold_star_relu(self.scale, self.bias, weight, bias)


def fold_star_relu(s: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``W (s r + b) + c = (s W) r + (b W 1 + c)``: (weight, bias) of a layer behind ``relu(x)**2 = r``.

    The weight keeps its dtype; the sums over a half weight are float32.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    shift = b.to(dtype) * weight.flatten(1).sum(1, dtype=dtype)
    return (s * weight).to(weight.dtype), shift if bias is None else shift + bias


class Pooling(nn.Module):
    """Average pool minus identity, stride 1, borders averaging the pixels that exist; no parameters.

    Equivalent PyTorch: ``F.avg_pool2d(x, K, 1, K // 2, count_include_pad=False) - x``.

    Args:
        pool_size: K, odd and positive. x is ``[B, C, H, W]`` of a floating dtype; y has its shape and dtype.
        dim, device, dtype: what other mixers need; there are no parameters here.
        proj_drop, others: what timm's MetaFormer gives each of its mixers, so that this may be one of them:
            ``timm.models.metaformer.MetaFormer(token_mixers=poolformer_kernels.nn.Pooling)``. Neither has a
            use here, as in timm's own pooling. Other keywords without ``proj_drop`` are an error.

    Raises:
        TypeError, ValueError: a pool size of the wrong type or range; in a call, PyTorch's errors.

    Source: MetaFormer (arXiv 2111.11418), equation 4 and Algorithm 1.
    """

    def __init__(
        self,
        pool_size: int = 3,
        *,
        dim: int | None = None,
        proj_drop: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        only_from_timm(type(self), proj_drop, others, "pool_size, dim, device, dtype")
        if dim is not None:
            positive_int("dim", dim)
        self.pool_size = odd("pool_size", pool_size)

    def forward(self, x: Tensor) -> Tensor:
        # NCHW: CUDA's channels_last avg_pool2d backward ignores the padding (pytorch#188344)
        pooled = F.avg_pool2d(x.contiguous(), self.pool_size, 1, self.pool_size // 2, count_include_pad=False)
        return pooled - x

    def extra_repr(self) -> str:
        return f"pool_size={self.pool_size}"


class DropPath(nn.Module):
    """Stochastic depth: in training each sample is zeroed with probability ``drop_prob``, else scaled up.

    Equivalent PyTorch, ``keep`` being ``1 - drop_prob``::

        y = x * x.new_empty(B, 1, 1, 1).bernoulli_(keep).div_(keep)

    Args:
        drop_prob: in [0, 1). x is ``[B, C, H, W]`` of a floating dtype; y has its shape and dtype.
        device, dtype: taken as by every layer; there are no parameters here.

    Raises:
        TypeError, ValueError: a probability of the wrong type or range.
        IndexError: more calls than ``draws`` has rows.

    Source: Deep Networks with Stochastic Depth (arXiv 1603.09382).
    """

    # Numbers in [0, 1), ``[calls, B]``, that calls use row by row instead of the global generator's, so that
    # a training run decides what they are a function of; ``calls`` is how many rows are used, set to 0 before
    # each forward of the model.
    draws: Tensor | None = None
    calls = 0

    def __init__(
        self, drop_prob: float = 0.0, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.drop_prob = probability("drop_prob", drop_prob)

    def sample(self, x: Tensor) -> Tensor | None:
        """A draw of the drop scale ``[B]`` (0 or 1/keep), float32 or float64 as x; None if nothing drops."""
        if not self.training or self.drop_prob == 0.0:
            return None
        keep = 1.0 - self.drop_prob
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.draws is not None:
            self.calls += 1
            return (self.draws[self.calls - 1] < keep).to(dtype).div_(keep)
        return torch.empty(x.shape[0], dtype=dtype, device=x.device).bernoulli_(keep).div_(keep)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.sample(x)
        return x if scale is None else x * scale.to(x.dtype).view(-1, 1, 1, 1)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"
