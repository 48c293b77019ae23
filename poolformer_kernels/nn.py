"""Drop-in layers under the official parameter names; the work is done by `poolformer_kernels.ops`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops

__all__ = ["DropPath", "GroupNorm", "Mlp", "PoolFormerBlock", "PoolMixer", "Pooling"]


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
        self.dim = _positive_int("dim", dim)
        self.pool_size = _odd("pool_size", pool_size)
        self.eps = _not_negative("eps", eps)
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
        self.pool_size = _odd("pool_size", pool_size)

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
        self.drop_prob = _probability("drop_prob", drop_prob)

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


class Mlp(nn.Module):
    """Two 1x1 convolutions with an activation between: ``drop(fc2(drop(act(fc1(x)))))``.

    Args:
        in_features: channels of x.
        hidden_features: channels between; ``in_features`` when None.
        out_features: channels of the result; ``in_features`` when None.
        act_layer: called without arguments.
        drop: dropout probability after the activation and after fc2.

    Source: MetaFormer (arXiv 2111.11418), equation 2.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        _positive_int("in_features", in_features)
        hidden = in_features if hidden_features is None else _positive_int("hidden_features", hidden_features)
        out = in_features if out_features is None else _positive_int("out_features", out_features)
        self.fc1 = nn.Conv2d(in_features, hidden, 1)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(hidden, out, 1)
        self.drop = nn.Dropout(_probability("drop", drop))
        for conv in (self.fc1, self.fc2):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class PoolFormerBlock(nn.Module):
    """One PoolFormer block, with the official constructor and parameter names.

    Equivalent PyTorch::

        x = x + drop_path(layer_scale_1[:, None, None] * token_mixer(norm1(x)))
        x = x + drop_path(layer_scale_2[:, None, None] * mlp(norm2(x)))

    The first line is one call of `poolformer_kernels.ops.pool_mixer` as long as ``norm1`` is a GroupNorm of
    one group, ``token_mixer`` a `Pooling` and ``drop_path`` a `DropPath` or Identity, none of them hooked or
    subclassed; otherwise the modules are called one by one.

    Args:
        dim: channels C of x, ``[B, C, H, W]``.
        pool_size: odd and positive.
        mlp_ratio: hidden channels of the MLP per channel.
        act_layer: the MLP's activation, called without arguments.
        norm_layer: called with ``dim``.
        drop: dropout probability in the MLP.
        drop_path: probability that training skips a branch for a sample.
        use_layer_scale: scale each branch by a learned vector ``[C]``.
        layer_scale_init_value: its initial value.

    Returns:
        y, of x's shape and memory format. Under autocast on the CPU a bfloat16 x stays bfloat16, while the
        plain PyTorch lines would widen it to float32 at the float32 LayerScale; on CUDA it becomes float32,
        as there.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Source: MetaFormer (arXiv 2111.11418), equations 1 to 3.
    """

    def __init__(
        self,
        dim: int,
        pool_size: int = 3,
        mlp_ratio: float = 4.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = GroupNorm,
        drop: float = 0.0,
        drop_path: float = 0.0,
        use_layer_scale: bool = True,
        layer_scale_init_value: float = 1e-5,
    ) -> None:
        super().__init__()
        _positive_int("dim", dim)
        if not _is_number(mlp_ratio) or int(dim * mlp_ratio) < 1:
            raise ValueError(
                f"mlp_ratio must be a number that leaves at least one channel, got {mlp_ratio!r}"
            )
        self.norm1 = norm_layer(dim)
        self.token_mixer = Pooling(pool_size)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)
        self.drop_path = DropPath(drop_path) if _probability("drop_path", drop_path) > 0 else nn.Identity()
        self.use_layer_scale = use_layer_scale
        for name in ("layer_scale_1", "layer_scale_2"):
            scale = (
                nn.Parameter(torch.full((dim,), float(layer_scale_init_value))) if use_layer_scale else None
            )
            self.register_parameter(name, scale)

    def forward(self, x: Tensor) -> Tensor:
        norm, mixer, drop_path = self.norm1, self.token_mixer, self.drop_path
        if self.unfused_reason() is None:
            x = ops.pool_mixer(
                x,
                norm.weight,
                norm.bias,
                pool_size=mixer.pool_size,
                eps=norm.eps,
                layer_scale=self.layer_scale_1,
                drop_scale=drop_path.sample(x) if type(drop_path) is DropPath else None,
                residual=True,
            )
        else:
            x = self._add(x, mixer(norm(x)), self.layer_scale_1)
        return self._add(x, self.mlp(self.norm2(x)), self.layer_scale_2)

    def unfused_reason(self) -> str | None:
        """Why the token mixer sub-block is not one operator call, or None where it is."""
        norm, mixer, drop_path = self.norm1, self.token_mixer, self.drop_path
        if type(mixer) is not Pooling:
            return f"token_mixer is {type(mixer).__name__}, not Pooling"
        if type(norm) not in _GROUP_NORMS or norm.num_groups != 1:
            return f"norm1 is {type(norm).__name__}, not a GroupNorm of one group"
        if type(drop_path) not in _DROP_PATHS:
            return f"drop_path is {type(drop_path).__name__}, not DropPath or Identity"
        if _hooked(mixer) or _hooked(norm) or _hooked(drop_path):
            return "norm1, token_mixer or drop_path has hooks"
        return None

    def _add(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        # float32 parameters do not widen a half residual stream
        dtype = torch.promote_types(x.dtype, branch.dtype)
        if scale is not None:
            branch = branch * scale.view(-1, 1, 1)
        return (x + self.drop_path(branch)).to(dtype)


_GROUP_NORMS = (GroupNorm, nn.GroupNorm)
_DROP_PATHS = (nn.Identity, DropPath)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive_int(name: str, value: int) -> int:
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def _odd(name: str, value: int) -> int:
    if _positive_int(name, value) % 2 == 0:
        raise ValueError(f"{name} must be odd and positive, got {value}")
    return value


def _not_negative(name: str, value: float) -> float:
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def _probability(name: str, value: float) -> float:
    if not 0 <= _not_negative(name, value) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return value
