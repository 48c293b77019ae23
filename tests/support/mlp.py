"""The MLP's problems, its fp64 truth and eager PyTorch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from poolformer_kernels.ops.mlp import mlp_with_stats
from poolformer_kernels.reference import ACTIVATIONS
from support import rule
from support.problems import HALVES, Tensors, randn
from support.rule import Truth, assert_close_to_fp64

WEIGHTS = ("w1", "w2")
VECTORS = ("b1", "b2", "norm_weight", "norm_bias", "layer_scale", "drop_scale")
PARAMETERS = ("w1", "b1", "w2", "b2", "norm_weight", "norm_bias", "layer_scale", "drop_scale")
PLAIN = ("b1", "b2")
NAMES = ("x", *PARAMETERS)
FORMS = {  # parameters, residual
    "plain": (PLAIN, False),
    "norm": (("b1", "b2", "norm_weight", "norm_bias"), False),
    "residual": (VECTORS, True),
}


def make_inputs(
    shape: tuple[int, ...],
    hidden: int,
    dtype: torch.dtype = torch.float32,
    *,
    out: int | None = None,
    parameters: tuple[str, ...] = VECTORS,
    weight_dtype: torch.dtype | None = None,
    vector_dtype: torch.dtype | None = None,
    conv: bool = True,
    mean: float = -2.3,
    sigma: float = 0.5,
    seed: int = 0,
) -> Tensors:
    """x, both weights (``[..., 1, 1]`` for ``conv``) and the vectors named; the other vectors are None."""
    batch, channels = shape[:2]
    out = channels if out is None else out
    ones = (1, 1) if conv else ()
    w1 = randn(hidden, channels, *ones, mean=0.1 / channels, sigma=channels**-0.5, seed=seed + 1)
    w2 = randn(out, hidden, *ones, mean=0.1 / hidden, sigma=hidden**-0.5, seed=seed + 2)
    values = {
        "w1": w1.to(weight_dtype or dtype),
        "b1": randn(hidden, mean=0.2, sigma=0.5, seed=seed + 3),
        "w2": w2.to(weight_dtype or dtype),
        "b2": randn(out, mean=-0.1, sigma=0.5, seed=seed + 4),
        "norm_weight": randn(channels, mean=0.9, sigma=0.3, seed=seed + 5),
        "norm_bias": randn(channels, mean=0.2, sigma=0.5, seed=seed + 6),
        "layer_scale": randn(out, mean=0.1, sigma=0.4, seed=seed + 7),
        "drop_scale": torch.where(torch.arange(batch) % 3 == 1, 0.0, 1.25),  # stochastic depth: 0 or 1/keep
    }
    for name in VECTORS:
        values[name] = values[name].to(vector_dtype or dtype) if name in parameters else None
    return {"x": randn(*shape, dtype=dtype, mean=mean, sigma=sigma, seed=seed), **values}


def make_grad(inputs: Tensors, seed: int = 9) -> Tensor:
    batch, _, *size = inputs["x"].shape
    return randn(batch, len(inputs["w2"]), *size, dtype=inputs["x"].dtype, mean=0.3, seed=seed)


def eager(
    x, w1, b1, w2, b2, *, norm_weight=None, norm_bias=None, layer_scale=None, drop_scale=None,
    activation="gelu", norm=None, eps=1e-5, residual=False,
) -> Tensor:  # fmt: skip
    """What a model without this package computes, the matrix products in the half dtype if there is one."""
    half = x.dtype if x.dtype in HALVES else w1.dtype
    w1, w2 = (w.view(*w.shape[:2], 1, 1).to(half) for w in (w1, w2))
    b1, b2 = (b if b is None else b.to(half) for b in (b1, b2))
    n = x
    if norm or norm_weight is not None or norm_bias is not None:
        if norm_weight is None and norm_bias is not None:  # torch 2.10 cannot differentiate a bias alone
            norm_weight = torch.ones_like(norm_bias)
        if norm_weight is not None and norm_bias is not None and norm_weight.dtype != norm_bias.dtype:
            norm_weight, norm_bias = norm_weight.float(), norm_bias.float()
        if x.dtype == torch.float32:
            norm_weight, norm_bias = (p if p is None else p.float() for p in (norm_weight, norm_bias))
        n = F.group_norm(x, 1, norm_weight, norm_bias, eps)
    m = F.conv2d(ACTIVATIONS[activation](F.conv2d(n.to(half), w1, b1)), w2, b2)
    m = m if layer_scale is None else m * layer_scale[:, None, None]
    m = m if drop_scale is None else m * drop_scale[:, None, None, None]
    return (x + m if residual else m).to(x.dtype)


def truth(inputs: Tensors, grad: Tensor, *, activation="gelu", norm=None, eps=1e-5, residual=False) -> Truth:
    """The formulas of the forward and the backward in fp64 on the dtype-rounded inputs.

    The scale of a value is the size of what it was summed from: the root of the sum of squares of the terms,
    in which the operands count with their own scales. Rounding errors grow with it, and not with a sum that
    happens to be small.
    """
    given = {name: None if t is None else t.detach().double() for name, t in inputs.items()}
    batch, channels, height, width = given["x"].shape
    normed = norm or given["norm_weight"] is not None or given["norm_bias"] is not None
    w1, w2 = given["w1"].flatten(1), given["w2"].flatten(1)
    hidden, out = len(w1), len(w2)
    full = {"b1": (hidden, 0.0), "b2": (out, 0.0), "norm_weight": (channels, 1.0)}
    full |= {"norm_bias": (channels, 0.0), "layer_scale": (out, 1.0), "drop_scale": (batch, 1.0)}
    b1, b2, gamma, beta, s, d = (
        torch.full((size,), default, dtype=torch.float64) if given[name] is None else given[name]
        for name, (size, default) in full.items()
    )
    d = d[:, None, None]
    x, g = (t.double().flatten(2).transpose(1, 2) for t in (given["x"], grad))  # [B, H W, C]
    mean = x.mean((1, 2), keepdim=True)
    rstd = ((x - mean).square().mean((1, 2), keepdim=True) + eps).rsqrt()
    xhat = (x - mean) * rstd if normed else x
    n = gamma * xhat + beta if normed else x

    h = n @ w1.T + b1
    h_size = size_of(h, n.square() @ w1.square().T)
    with torch.enable_grad():
        leaf = h.clone().requires_grad_()
        p = ACTIVATIONS[activation](leaf)
        (slope,) = torch.autograd.grad(p.sum(), leaf, create_graph=True)
        curved = slope.requires_grad  # relu's is not
        curvature = torch.autograd.grad(slope.sum(), leaf)[0] if curved else torch.zeros_like(h)
    p, slope = p.detach(), slope.detach()
    p_size = torch.maximum(p.abs(), slope.abs() * h_size)
    o = p @ w2.T + b2
    o_size = size_of(o, p_size.square() @ w2.square().T)
    y = d * s * o + (x if residual else 0)

    do = d * s * g
    dp = do @ w2
    dp_size = size_of(dp, do.square() @ w2.square())
    dh = slope * dp
    dh_size = torch.maximum(slope.abs() * dp_size, (curvature * dp).abs() * h_size)
    dn = dh @ w1
    dn_size = size_of(dn, dh_size.square() @ w1.square())
    dx, dx_size = dn, dn_size
    if normed:
        dxhat = gamma * dn
        k0, k1 = dxhat.mean((1, 2), keepdim=True), (dxhat * xhat).mean((1, 2), keepdim=True)
        dx, dx_size = rstd * (dxhat - k0 - xhat * k1), rstd * gamma.abs() * dn_size
    dx = dx + (g if residual else 0)

    image = lambda t: t.transpose(1, 2).unflatten(2, (height, width))  # noqa: E731
    product = lambda a, b: torch.einsum("btj,bti->ji", a, b)  # noqa: E731
    summed = {
        "db1": (dh, dh_size, (0, 1)),
        "db2": (do, do.abs(), (0, 1)),
        "dnorm_weight": (dn * xhat, dn_size * xhat.abs(), (0, 1)),
        "dnorm_bias": (dn, dn_size, (0, 1)),
        "dlayer_scale": (d * g * o, (d * g).abs() * o_size, (0, 1)),
        "ddrop_scale": (s * g * o, (s * g).abs() * o_size, (1, 2)),
    }
    values = {"y": image(y), "dx": image(dx)}
    scales = {
        "y": image(torch.maximum(y.abs(), (d * s).abs() * o_size)),
        "dx": image(torch.maximum(dx.abs(), dx_size)),
    }
    for name, a, a_size, b, b_size in (("w1", dh, dh_size, n, n.abs()), ("w2", do, do.abs(), p, p_size)):
        values[f"d{name}"] = product(a, b).view(given[name].shape)
        scales[f"d{name}"] = size_of(product(a, b), product(a_size**2, b_size**2)).view(given[name].shape)
    for name, (terms, size, dims) in summed.items():
        values[name] = terms.sum(dims)
        scales[name] = size_of(values[name], size.square().sum(dims))
    return Truth(values, scales)


def size_of(value: Tensor, squares: Tensor) -> Tensor:
    return torch.maximum(value.abs(), squares.sqrt())


def ulps_of(dtype: torch.dtype, operands: torch.dtype, ulps: float = 4) -> float:
    """The floor of a value, in ulps of its accumulators.

    A float32 sum of products of half precision operands is as exact as they are: half an ulp of theirs.
    """
    if dtype == torch.float32 and operands in HALVES:
        ulps += torch.finfo(operands).eps / 2 / torch.finfo(torch.float32).eps
    return ulps


def assert_right(actual: Tensors, inputs: Tensors, grad: Tensor, *, ulps: float = 4, **options) -> None:
    """Every value in ``actual`` (from `run`) has its input's dtype and meets the error rule."""
    operands = inputs["x" if inputs["x"].dtype in HALVES else "w1"].dtype

    def allowed(name: str, dtype: torch.dtype) -> float:
        return ulps_of(dtype, operands, ulps)

    rule.assert_right(actual, inputs, grad, ulps=allowed, eager=eager, truth=truth, **options)


def assert_rule(ours: Tensors, theirs: Tensors, right: Truth, operands: torch.dtype, ulps: float = 4) -> None:
    """The error rule of values whose products have operands of another dtype than the inputs."""
    for name, value in ours.items():
        exact, scale, allowed = right.values[name], right.scales[name], ulps_of(value.dtype, operands, ulps)
        assert_close_to_fp64(value, theirs[name], exact, scale=scale, ulps=allowed, what=name)


def under_autocast(
    function: Callable[..., Tensor], device: str, half: torch.dtype, **options
) -> Callable[..., Tensor]:
    def call(**tensors: Tensor) -> Tensor:
        with torch.autocast(device, half):
            return function(**tensors, **options)

    return call


def y_of_mlp_with_stats(x, w1, b1, w2, b2, **options) -> Tensor:
    return mlp_with_stats(x, w1, b1, w2, b2, return_stats=False, **options)[0]


def forward_arguments(
    inputs: Tensors,
    stats: Tensor | None = None,
    *,
    activation: str = "gelu",
    norm: bool = True,
    residual: bool = True,
    return_stats: bool = True,
    save_hidden: bool = False,
) -> tuple:
    """Of the registered operators, but for what one backend's has besides."""
    return (*inputs.values(), stats, activation, 1e-5, norm, residual, return_stats, save_hidden)


def backward_arguments(
    grad: Tensor,
    inputs: Tensors,
    mean_rstd: Tensor,
    hidden: Tensor | None = None,
    *,
    activation: str = "gelu",
    norm: bool = True,
    residual: bool = True,
    wanted: tuple[bool, bool] = (True, True),  # the gradients of the parameters, of drop_scale
) -> tuple:
    x, *parameters = inputs.values()
    return (grad, x, mean_rstd, *parameters, hidden, activation, norm, residual, *wanted)
