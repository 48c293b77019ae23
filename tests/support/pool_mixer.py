"""The token mixer's problems, its fp64 truth and what eager PyTorch computes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats
from support import rule
from support.problems import Tensors, randn
from support.rule import Truth

PARAMETERS = ("weight", "bias", "layer_scale", "drop_scale")


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    parameters: tuple[str, ...] = PARAMETERS,
    parameter_dtype: torch.dtype | None = None,
    mean: float = -2.3,
    sigma: float = 0.5,
    seed: int = 0,
) -> Tensors:
    """x, shifted as real activations are, and the parameters named; the others are None."""
    batch, channels = shape[:2]
    dropped = torch.where(torch.arange(batch) % 3 == 1, 0.0, 1.25)  # stochastic depth: 0 or 1/keep
    values = {
        "weight": randn(channels, mean=0.9, sigma=0.3, seed=seed + 1),
        "bias": randn(channels, mean=0.2, sigma=0.5, seed=seed + 2),
        "layer_scale": randn(channels, mean=0.1, sigma=0.4, seed=seed + 3),
        "drop_scale": dropped,
    }
    inputs: Tensors = {"x": randn(*shape, dtype=dtype, mean=mean, sigma=sigma, seed=seed)}
    for name in PARAMETERS:
        inputs[name] = values[name].to(parameter_dtype or dtype) if name in parameters else None
    return inputs


def make_grad(inputs: Tensors, seed: int = 9) -> Tensor:
    x = inputs["x"]
    return randn(*x.shape, dtype=x.dtype, mean=0.3, seed=seed)


def eager(
    x, weight, bias, *, layer_scale=None, drop_scale=None, pool_size=3, eps=1e-5, residual=False
) -> Tensor:
    """What a model without this package computes, in x's dtype; called on contiguous x, where it is right."""
    if weight is not None and bias is not None and weight.dtype != bias.dtype:  # which eager does not take
        weight, bias = weight.float(), bias.float()
    if weight is None and bias is not None:  # torch 2.10 cannot differentiate a bias without a weight
        weight = torch.ones_like(bias)
    n = F.group_norm(x, 1, weight, bias, eps)
    m = F.avg_pool2d(n, pool_size, 1, pool_size // 2, count_include_pad=False) - n
    m = m if layer_scale is None else m * layer_scale[:, None, None]
    m = m if drop_scale is None else m * drop_scale[:, None, None, None]
    return (x + m if residual else m).to(x.dtype)


def truth(inputs: Tensors, grad: Tensor, *, pool_size=3, eps=1e-5, residual=False) -> Truth:
    """The formula in fp64 on the dtype-rounded inputs.

    Each parameter is one leaf per element of x, so its gradient is the list of the terms that a kernel sums:
    the sum is the value and the root of the sum of squares, which grows with sqrt(tokens), is the scale.
    """
    x = inputs["x"].detach().double().contiguous().requires_grad_()
    batch, channels = x.shape[:2]
    full = {}
    for name, default in (("weight", 1.0), ("bias", 0.0), ("layer_scale", 1.0), ("drop_scale", 1.0)):
        size = batch if name == "drop_scale" else channels
        p = torch.full((size,), default) if inputs[name] is None else inputs[name].detach()
        p = p.double().view((-1, 1, 1, 1) if name == "drop_scale" else (-1, 1, 1))
        full[name] = p.expand(x.shape).clone().requires_grad_()
    mean = x.mean((1, 2, 3), keepdim=True)
    var = (x - mean).square().mean((1, 2, 3), keepdim=True)
    rstd = (var + eps).rsqrt()
    n = full["weight"] * ((x - mean) * rstd) + full["bias"]
    m = F.avg_pool2d(n, pool_size, 1, pool_size // 2, count_include_pad=False) - n
    y = full["drop_scale"] * full["layer_scale"] * m + (x if residual else 0)
    y.backward(grad.double().contiguous())
    values, scales = {"y": y.detach(), "dx": x.grad}, {"y": y.detach().abs()}
    scales["dx"] = torch.maximum(x.grad.abs(), (full["weight"] * rstd * full["bias"].grad).detach().abs())
    for name, p in full.items():
        dims = (1, 2, 3) if name == "drop_scale" else (0, 2, 3)
        values[f"d{name}"] = p.grad.sum(dims)
        scales[f"d{name}"] = torch.maximum(values[f"d{name}"].abs(), p.grad.square().sum(dims).sqrt())
    values["dbias"] = torch.zeros(channels, dtype=torch.float64)  # (P - I) cancels constants
    return Truth(values, scales)


def assert_right(actual: Tensors, inputs: Tensors, grad: Tensor, *, ulps: float = 4, **options) -> None:
    """Every value in ``actual`` (from `run`) has its input's dtype and meets the error rule."""
    rule.assert_right(actual, inputs, grad, eager=eager, truth=truth, ulps=lambda *_: ulps, **options)


def mixer_with_stats(x, weight, bias, **options) -> Tensor:
    return pool_mixer_with_stats(x, weight, bias, return_stats=False, **options)[0]


def forward_arguments(
    inputs: Tensors,
    stats: Tensor | None = None,
    *,
    pool_size: int = 3,
    residual: bool = True,
    return_stats: bool = True,
) -> tuple:
    """Of the registered operators."""
    return (*inputs.values(), stats, pool_size, 1e-5, residual, return_stats)


def backward_arguments(
    grad: Tensor, inputs: Tensors, mean_rstd: Tensor, *, pool_size: int = 3, residual: bool = True
) -> tuple:
    x, *parameters = inputs.values()
    return (grad, x, mean_rstd, *parameters, pool_size, residual)
