"""The MLP's forward as an operator of a backend: what it returns beside y."""

from collections.abc import Callable

import torch
from torch import Tensor

from poolformer_kernels import reference
from support.layouts import as_layout
from support.mlp import PLAIN, make_inputs
from support.problems import Tensors
from support.rule import assert_close_to_fp64


def mean_rstd_of(stats: Tensor, eps: float = 1e-5) -> Tensor:
    """What partials make, in float64."""
    mean, variance = reference.merge_stats(stats.double())
    return torch.stack([mean, (variance + eps).rsqrt()], 1)


def statistics(x: Tensor) -> Tensor:
    """Mean and rstd of each sample, as a forward hands them to its backward."""
    return mean_rstd_of(reference.sample_stats(x.double())).float()


def assert_mean_rstd(mean_rstd: Tensor, exact: Tensor) -> None:
    for found, right, rtol in zip(mean_rstd.double().T, exact.T, (1e-6, 2e-6), strict=True):
        torch.testing.assert_close(found, right, rtol=rtol, atol=0)


def exact_hidden(inputs: Tensors) -> tuple[Tensor, Tensor]:
    """(fc1's output, its input) of every token, in float64."""
    d = {name: None if t is None else t.double() for name, t in inputs.items()}
    n = torch.group_norm(d["x"].contiguous(), 1, d["norm_weight"], d["norm_bias"], 1e-5)
    n = n.permute(0, 2, 3, 1).flatten(0, 2)
    return n @ d["w1"].flatten(1).T + d["b1"], n


def check_hidden_and_mean_rstd(
    forward: Callable[..., tuple], shape: tuple[int, ...], hidden: int, dtype: torch.dtype, layout: str
) -> None:
    """What is saved for the backward is as right as eager's."""
    inputs = make_inputs(shape, hidden, dtype)
    _, mean_rstd, _, saved = forward({**inputs, "x": as_layout(inputs["x"], layout)}, save_hidden=True)
    assert_mean_rstd(mean_rstd, mean_rstd_of(reference.sample_stats(inputs["x"].double())))
    assert saved.dtype == dtype
    exact, n = exact_hidden(inputs)
    theirs = n.to(dtype) @ inputs["w1"].flatten(1).T + inputs["b1"]
    assert_close_to_fp64(saved.view(exact.shape), theirs, exact, ulps=8)


def check_hidden_beyond_float16(forward: Callable[..., tuple], shape: tuple[int, ...], hidden: int) -> None:
    """What is saved stays finite, but for relu_squared, whose slope is 2 h."""
    inputs = make_inputs(shape, hidden, torch.float16, parameters=PLAIN)
    inputs["x"] = torch.full_like(inputs["x"], 6e4)
    inputs["w1"] = torch.full_like(inputs["w1"], 2.0)
    inputs["w1"][::2] *= -1
    for activation, most in (("gelu", 65504), ("relu_squared", float("inf"))):
        options = {"norm": False, "residual": False, "return_stats": False, "save_hidden": True}
        saved = forward(inputs, activation=activation, **options)[3]
        rows = saved.view(-1, hidden)
        assert (rows[:, 1::2] == most).all()
        assert (rows[:, ::2] == -65504).all()
