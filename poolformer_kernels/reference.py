"""Every operator in plain PyTorch: the specification the kernels are tested against, and the fallback.

Half-precision inputs are computed in float32 and rounded once at the end; float64 stays float64. Everything
runs on contiguous (NCHW) data, because eager PyTorch is wrong elsewhere: the CPU's channels_last GroupNorm
computes the variance in one pass, and CUDA's channels_last ``avg_pool2d`` backward ignores the padding
(pytorch#188344).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout
from .deprecation import moved
from .layout import memory_format_of as _memory_format_of

__all__ = ["ACTIVATIONS", "merge_stats", "mlp", "pool_mixer", "sample_stats"]


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": _relu_squared,
    "silu": F.silu,
}


def sample_stats(x: Tensor) -> Tensor:
    """Statistics of each sample as one partial ``[B, 1, 3]``: (count, mean, M2), float32 or x's float64.

    M2 is the sum of squared deviations from the mean, so ``M2 / count`` is GroupNorm's biased variance.
    """
    flat = x.flatten(1).to(_compute_dtype(x))
    mean = flat.mean(1)
    m2 = (flat - mean[:, None]).square().sum(1)
    return torch.stack([torch.full_like(mean, flat.shape[1]), mean, m2], dim=1)[:, None]


def merge_stats(stats: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[B]`` from partials ``[B, T, 3]`` = (count, mean, M2), by Chan's formula."""
    count, mean, m2 = stats.unbind(-1)
    total = count.sum(1)
    merged = (count * mean).sum(1) / total
    return merged, (m2 + count * (mean - merged[:, None]).square()).sum(1) / total


def pool_mixer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    pool_size: int = 3,
    eps: float = 1e-5,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    residual: bool = False,
    stats: Tensor | None = None,
) -> Tensor:
    """The token mixer of `poolformer_kernels.ops.pool_mixer`, operation by operation.

    ``stats`` (partials ``[B, T, 3]`` of x, see `sample_stats`) replace the values of GroupNorm's mean and
    variance; the gradient still differentiates through the normalisation of x.
    """
    if pool_size > 64:  # a pool wider than the image covers nothing more, but avg_pool2d overflows
        pool_size = min(pool_size, 2 * max(x.shape[2], x.shape[3]) - 1)
    dtype = _compute_dtype(x)
    w, b, s, d = (p if p is None else p.to(dtype) for p in (weight, bias, layer_scale, drop_scale))
    xc = x.to(dtype).contiguous()  # one call of to() with a memory format leaves x of the same dtype as it is
    normed = _group_norm(xc, w, b, eps, stats)
    y = F.avg_pool2d(normed, pool_size, stride=1, padding=pool_size // 2, count_include_pad=False) - normed
    y = _scaled(y, s, d)
    if residual:
        y = xc + y
    return y.to(x.dtype).contiguous(memory_format=_memory_format_of(x))


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    norm: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    residual: bool = False,
    stats: Tensor | None = None,
) -> Tensor:
    """The MLP of `poolformer_kernels.ops.mlp`, operation by operation; ``stats`` as in `pool_mixer`."""
    dtype = _compute_dtype(x)
    xc = x.to(dtype).contiguous()
    v1, c1, v2, c2, w, b, s, d = (
        p if p is None else p.to(dtype)
        for p in (w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale)
    )
    tokens = (_group_norm(xc, w, b, eps, stats) if norm else xc).flatten(2).transpose(1, 2)  # [B, H W, C]
    hidden = ACTIVATIONS[activation](F.linear(tokens, v1.flatten(1), c1))
    y = F.linear(hidden, v2.flatten(1), c2).transpose(1, 2).unflatten(2, x.shape[2:])
    y = _scaled(y, s, d)
    if residual:
        y = xc + y
    return y.to(x.dtype).contiguous(memory_format=_memory_format_of(x))


def _scaled(y: Tensor, layer_scale: Tensor | None, drop_scale: Tensor | None) -> Tensor:
    if layer_scale is not None:
        y = y * layer_scale.view(-1, 1, 1)
    return y if drop_scale is None else y * drop_scale.view(-1, 1, 1, 1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, stats: Tensor | None
) -> Tensor:
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch 2.10's group_norm cannot differentiate a bias without a weight
    if stats is None:
        return torch.group_norm(x, 1, weight, bias, eps)
    return _group_norm_given(x, weight, bias, eps, stats.to(x.dtype))


def _group_norm_given(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, stats: Tensor
) -> Tensor:
    var, mean = torch.var_mean(x, dim=(1, 2, 3), correction=0)
    given_mean, given_var = merge_stats(stats)
    mean = mean + (given_mean - mean).detach()  # the given value, the gradient of x's own
    var = var + (given_var - var).detach()
    normed = (x - mean.view(-1, 1, 1, 1)) * torch.rsqrt(var + eps).view(-1, 1, 1, 1)
    if weight is not None:
        normed = normed * weight.view(-1, 1, 1)
    return normed if bias is None else normed + bias.view(-1, 1, 1)


__getattr__ = moved(__name__, {"memory_format_of": layout})
