"""What the operator tests share: problems, layouts, the fp64 truth, eager PyTorch and the error rule."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels import reference
from poolformer_kernels.numerics import Errors, errors, tolerance
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

BACKENDS = ("reference", "cpp")
HALVES = (torch.bfloat16, torch.float16)
PARAMETERS = ("weight", "bias", "layer_scale", "drop_scale")
Tensors = dict[str, Tensor | None]


def require_backend(name: str) -> None:
    """Skip the test where the backend cannot run; in CI that is a failure."""
    reason = pk.backend_reasons().get(name)
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"backend {name}: {reason}")


# ---- problems ----------------------------------------------------------------------------------------------


def randn(
    *shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, sigma: float = 1.0, seed: int = 0
):
    generator = torch.Generator().manual_seed(seed)
    return (mean + sigma * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


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


# ---- layouts -----------------------------------------------------------------------------------------------

CHANNELS_LAST = ("channels_last", "sliced_c_last", "sliced_hw_last", "offset_last")
LAYOUTS = ("nchw", "sliced_c", "sliced_hw", "transposed", "expanded", "offset", *CHANNELS_LAST)
GRAD_LAYOUTS = (*LAYOUTS, "expanded_hw", "expanded_all")
VECTOR_LAYOUTS = ("strided", "expanded", "offset", "column")


def as_layout(t: Tensor, layout: str) -> Tensor:
    """t's values behind other strides, between NaN that a wrong stride would read; expanded ones repeat."""
    batch, channels, height, width = t.shape
    if layout.endswith("_last") and layout != "channels_last":
        inner = as_layout(
            t.permute(0, 2, 3, 1), {"sliced_c": "inner", "sliced_hw": "middle"}.get(layout[:-5], "offset")
        )
        return inner.permute(0, 3, 1, 2)
    if layout == "nchw":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return t[:1].clone().expand(t.shape)
    if layout == "expanded_hw":  # what global average pooling hands back
        return t[:, :, :1, :1].clone().expand(t.shape)
    if layout == "expanded_all":  # what y.sum() hands back
        return t[:1, :1, :1, :1].clone().expand(t.shape)
    if layout == "offset":
        return t.new_full((t.numel() + 1,), float("nan"))[1:].view(t.shape).copy_(t)
    sizes, region = {
        "sliced_c": ((batch, channels + 3, height, width), (..., slice(1, -2), slice(None), slice(None))),
        "sliced_hw": ((batch, channels, height + 2, width + 3), (..., slice(1, -1), slice(2, -1))),
        "inner": ((batch, channels, height, width + 3), (..., slice(1, -2))),
        "middle": ((batch, channels + 2, height + 3, width), (slice(None), slice(1, -1), slice(2, -1))),
    }[layout]
    return t.new_full(sizes, float("nan"))[region].copy_(t)


def as_vector_layout(t: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return t.new_full((2 * len(t),), float("nan"))[::2].copy_(t)
    if layout == "expanded":
        return t[:1].clone().expand(len(t))
    if layout == "offset":
        return t.new_full((len(t) + 1,), float("nan"))[1:].copy_(t)
    return t.new_full((len(t), 3), float("nan"))[:, 1].copy_(t)


# ---- the operator, eager PyTorch and the truth -------------------------------------------------------------


def run(function: Callable[..., Tensor], inputs: Tensors, grad: Tensor, **options) -> Tensors:
    """y and the gradient of every input given, through ``function``; the tensors keep their strides."""
    leaves = {name: t if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    given = {name: t for name, t in leaves.items() if t is not None}
    y = function(**leaves, **options)
    grads = torch.autograd.grad(y, list(given.values()), grad)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(given, grads, strict=True)}


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


@dataclass
class Truth:
    """fp64 values, and the size of the terms that each was summed from, which rounding errors scale with."""

    values: dict[str, Tensor]
    scales: dict[str, Tensor]


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


# ---- the error rule ----------------------------------------------------------------------------------------


def assert_close_to_fp64(
    actual: Tensor,
    eager: Tensor | None,
    exact: Tensor,
    *,
    scale: Tensor | None = None,
    ulps: float = 4,
    what: str = "value",
) -> None:
    """The rule of `poolformer_kernels.numerics`; ``scale`` is by default the exact value."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    exact, scale = exact.cpu(), (exact if scale is None else scale).cpu()
    error = errors(actual, exact)
    other = Errors(0.0, 0.0) if eager is None else errors(eager, exact)
    allowed = tolerance(other, scale, actual.dtype, ulps=ulps)
    assert error.within(allowed), f"{what}: {error}, allowed {allowed}; eager's {other}"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For eager's error, the yardstick: several threads split its sums otherwise and change it by chance.

    Where x is far from zero, GroupNorm's gradient in PyTorch loses digits. Of two such errors, one measured
    on one thread and one on two, the second was smaller by a factor of three.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def assert_right(
    actual: Tensors,
    inputs: Tensors,
    grad: Tensor,
    *,
    ulps: float = 4,
    eager: Callable[..., Tensor] = eager,
    truth: Callable[..., Truth] = truth,
    **options,
) -> None:
    """Every value in ``actual`` (from `run`) has its input's dtype and meets the error rule."""
    plain = {name: t if t is None else t.detach().contiguous().clone() for name, t in inputs.items()}
    with one_thread():
        theirs = run(eager, plain, grad.contiguous(), **options)
    right = truth(inputs, grad, **options)
    for name, value in actual.items():
        source = inputs["x" if name == "y" else name[1:]]
        assert value.dtype == source.dtype, f"{name}: {value.dtype}, not {source.dtype}"
        assert_close_to_fp64(
            value, theirs[name], right.values[name], scale=right.scales[name], ulps=ulps, what=name
        )


def assert_statistics_of(stats: Tensor, y: Tensor) -> None:
    """The partials that a kernel returned are those of y as it was rounded."""
    assert stats.dtype == torch.float32
    assert torch.equal(stats[:, :, 0].sum(1), torch.full((len(y),), float(y[0].numel())))
    exact = reference.merge_stats(reference.sample_stats(y.double()))
    ours = reference.merge_stats(stats.double())
    theirs = reference.merge_stats(reference.sample_stats(y))
    sigma = exact[1].sqrt()
    assert_close_to_fp64(ours[0].float(), theirs[0].float(), exact[0], scale=exact[0].abs() + sigma)
    scale = exact[1] + exact[0].abs() * sigma  # the partials' means are rounded to float32
    assert_close_to_fp64(ours[1].float(), theirs[1].float(), exact[1], scale=scale, ulps=2)


def assert_same(actual: Tensors, expected: Tensors) -> None:
    """Bitwise equality, NaN included."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(bits(value), bits(expected[name])), name


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def mixer_with_stats(x, weight, bias, **options) -> Tensor:
    return pool_mixer_with_stats(x, weight, bias, return_stats=False, **options)[0]


def tiled_stats(x: Tensor, tiles: int) -> Tensor:
    """Partials of x's samples over ``tiles`` uneven pieces, from fp64, as another kernel hands them on."""
    flat = x.detach().double().flatten(1)
    size = flat.shape[1]
    edges = [0, *sorted({max(1, size * i * i // tiles**2) for i in range(1, tiles)} - {size}), size]
    pieces = [flat[:, a:b] for a, b in itertools.pairwise(edges)]
    partials = [
        torch.stack([torch.full_like(p[:, 0], p.shape[1]), p.mean(1), p.var(1, correction=0) * p.shape[1]], 1)
        for p in pieces
    ]
    return torch.stack(partials, 1).to(torch.promote_types(x.dtype, torch.float32))


def adjoint_bias(pool_size: int, layout: str, device: str = "cpu") -> float:
    """The mean error of a smooth gradient's dx, in float32 ulps of its mean: it adds up over blocks.

    Gradients in deep models are smooth, and what P^T g and g are rounded to differently does not cancel.
    """
    shape = (1, 32, 56, 56)  # borders, whose weights are rounded, are few
    x = as_layout(randn(*shape), layout).to(device)
    grad = as_layout(randn(*shape, mean=1.0, sigma=0.25, seed=1), layout).to(device)
    dx, right = (
        torch.autograd.grad(f(t.requires_grad_(), None, None, pool_size=pool_size), t, grad.to(t.dtype))[0]
        for f, t in ((pk.ops.pool_mixer, x), (reference.pool_mixer, x.double()))
    )
    bias = (dx.double() - right).mean().item() / grad.mean().item()
    return bias / torch.finfo(torch.float32).eps


def tiers(folder: Path) -> list:
    """(file, the cases that ``-m`` selects) for what `make test` runs and for what `make test-long` adds."""
    files = sorted(path.name for path in folder.glob("test_*.py"))
    more = [name for name in files if "pytest.mark.sampled" in (folder / name).read_text()]
    return [
        *((name, "not long") for name in files),
        *(pytest.param(name, "long", marks=pytest.mark.long) for name in more),
    ]
