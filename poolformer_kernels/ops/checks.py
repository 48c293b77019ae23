"""Checks of operator arguments: each error names the argument, what was given and what is allowed."""

import sys
from numbers import Real

import torch
from torch import Tensor

from ..reference import ACTIVATIONS

__all__ = [
    "check_activation",
    "check_bool",
    "check_eps",
    "check_input",
    "check_stats",
    "check_tensor",
    "check_vectors",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_input(x: Tensor) -> None:
    """x is a dense float tensor ``[B, C, H, W]`` with channels and pixels."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.is_nested:
        raise TypeError(
            "x must be a dense tensor [B, C, H, W] of images of one size, got a nested tensor; call the"
            " operator with image[None] for each image of x.unbind()"
        )
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor (torch.strided), got {x.layout}")
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions [B, C, H, W], got shape {tuple(x.shape)}")
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x must have at least one channel and one pixel, got shape {tuple(x.shape)}")


def check_tensor(
    name: str, p: Tensor, x: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...], optional: bool
) -> None:
    """A parameter is a dense tensor of one of these dtypes on x's device."""
    if not isinstance(p, Tensor):
        raise TypeError(f"{name} must be a tensor{' or None' * optional}, got {type(p).__name__}")
    if p.dtype not in dtypes:
        rule = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise TypeError(f"{name} must be {rule} for x of {x.dtype}, got {p.dtype}")
    if p.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {p.layout}")
    if p.device != device:
        raise ValueError(f"{name} must be on x's device {device}, got {p.device}")


def check_vectors(
    x: Tensor,
    vectors: tuple[tuple[str, Tensor | None, str, int], ...],
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Optional parameters (name, tensor, name of its size, size) have one dimension of that size.

    Their dtype is x's or float32 unless other dtypes are given.
    """
    if dtypes is None:
        dtypes = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    device = x.device
    for name, p, what, size in vectors:
        if p is None:
            continue
        check_tensor(name, p, x, device, dtypes, True)
        shape = p.shape
        if len(shape) != 1 or shape[0] != size:
            raise ValueError(f"{name} must have shape [{what}] = [{size}], got {list(shape)}")


def check_stats(x: Tensor, stats: Tensor) -> None:
    """Statistics are partials ``[B, T, 3]``, float32 (float64 for float64 x)."""
    if not isinstance(stats, Tensor):
        raise TypeError(f"stats must be a tensor or None, got {type(stats).__name__}")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if stats.dtype != wanted:
        raise TypeError(f"stats must be {wanted} for x of {x.dtype}, got {stats.dtype}")
    if stats.dim() != 3 or stats.shape[0] != x.shape[0] or stats.shape[1] == 0 or stats.shape[2] != 3:
        raise ValueError(f"stats must have shape [B, T, 3] = [{x.shape[0]}, T, 3], got {list(stats.shape)}")
    if stats.device != x.device:
        raise ValueError(f"stats must be on x's device {x.device}, got {stats.device}")


def check_activation(activation: str) -> None:
    """activation is a name of the operator's; MetaFormer's StarReLU is one of them and weights."""
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return
    message = f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
    if activation == "star_relu":
        message += (
            "; StarReLU, s * relu(h)**2 + b, is 'relu_squared' with s * w2 for w2 and b2 + b * w2.sum(1)"
            " for b2: poolformer_kernels.nn.StarReLU.fold(w2, b2) returns both, and an nn.Mlp with StarReLU"
            " as its act_layer does it by itself"
        )
    raise ValueError(message)


def check_eps(eps: float) -> None:
    """eps is a finite number, not negative."""
    if not isinstance(eps, (int, float, Real)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 <= eps <= sys.float_info.max:  # not so where it is NaN
        raise ValueError(f"eps must be finite and not negative, got {eps}")


def check_bool(name: str, value: bool | None, optional: bool = False) -> None:
    """A flag is True or False, or None where it is optional."""
    if type(value) is not bool and not (optional and value is None):
        raise TypeError(f"{name} must be a bool{' or None' * optional}, got {type(value).__name__}")
