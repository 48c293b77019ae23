"""The token mixer where no target is concerned: float64, autocast, second derivatives, torch.func.

What it promises on every target is in contract/pool_mixer.py.
"""

import pytest
import torch
from support.layouts import LAYOUTS, as_layout
from support.pool_mixer import assert_right, make_grad, make_inputs, mixer_with_stats
from support.problems import tiled_stats
from support.rule import assert_same, run
from torch._subclasses.fake_tensor import FakeTensorMode

import poolformer_kernels as pk
from poolformer_kernels.layout import memory_format_of
from poolformer_kernels.ops import pool_mixer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_runs_the_reference(layout):
    inputs = make_inputs((3, 5, 6, 9), torch.float64)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = as_layout(make_grad(inputs), layout)
    actual = run(pool_mixer, inputs, grad, residual=True)
    assert_right(actual, inputs, grad, residual=True)
    assert actual["y"].is_contiguous(memory_format=memory_format_of(inputs["x"]))


@pytest.mark.parametrize("tiles", [1, 7])
def test_given_statistics_in_float64(tiles):
    inputs = make_inputs((3, 18, 6, 9), torch.float64)
    grad = make_grad(inputs)
    actual = run(mixer_with_stats, inputs, grad, residual=True, stats=tiled_stats(inputs["x"], tiles))
    # as many ulps as the reference formula itself is off
    assert_right(actual, inputs, grad, residual=True, ulps=16)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_autocast_keeps_the_dtype(backend, dtype, enabled):
    inputs = make_inputs((2, 5, 6, 9), dtype, parameter_dtype=torch.float32)
    grad = make_grad(inputs)
    plain = run(pool_mixer, inputs, grad, residual=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        under_autocast = run(pool_mixer, inputs, grad, residual=True)
    assert_same(under_autocast, plain)
    assert under_autocast["y"].dtype == dtype
    assert under_autocast["dweight"].dtype == torch.float32


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_autocast_computes_in_float32(dtype, enabled):
    """GroupNorm's rule; on fake CUDA tensors, so that it is tested where there is no such device."""
    before = torch.is_autocast_enabled("cuda")
    with FakeTensorMode(), pk.use_backend("reference"):
        x = torch.empty(2, 3, 4, 5, device="cuda", dtype=dtype)
        weight = torch.empty(3, device="cuda", dtype=dtype)
        torch.set_autocast_enabled("cuda", enabled)
        try:
            y = pool_mixer(x, weight, None, residual=True)
        finally:
            torch.set_autocast_enabled("cuda", before)
    assert y.dtype == (torch.float32 if enabled else dtype)


def test_double_backward_on_the_reference():
    """A gradient penalty: the second derivative of the reference in float32 against float64."""

    def penalty(dtype: torch.dtype) -> torch.Tensor:
        inputs = make_inputs((2, 3, 4, 5), parameter_dtype=torch.float32)
        inputs = {name: t.to(dtype) for name, t in inputs.items()}
        x = inputs["x"].requires_grad_()
        with pk.use_backend("reference"):
            y = pool_mixer(**inputs, residual=True)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(penalty(torch.float32).double(), penalty(torch.float64), rtol=1e-4, atol=1e-4)


# ---- forward mode and torch.func ---------------------------------------------------------------------------


def jvp_by_func(x, tangent):
    return torch.func.jvp(lambda a: pool_mixer(a, None, None), (x,), (tangent,))[1]


def jvp_by_dual(x, tangent):
    with torch.autograd.forward_ad.dual_level():
        y = pool_mixer(torch.autograd.forward_ad.make_dual(x, tangent), None, None)
        return torch.autograd.forward_ad.unpack_dual(y).tangent


def grad_by_func(x, tangent):
    return torch.func.grad(lambda a: (pool_mixer(a, None, None) * tangent).sum())(x)


@pytest.mark.parametrize("transform", [jvp_by_func, jvp_by_dual, grad_by_func])
def test_transforms_run_on_the_reference_and_are_refused_by_kernels(kernels, transform):
    """A kernel has no tangents: a zero or a missing one would be a wrong number."""
    x, tangent = torch.randn(2, 3, 5, 6).double(), torch.randn(2, 3, 5, 6).double()
    with pk.use_backend("reference"):
        expected = transform(x, tangent)
        step = 1e-6
        if transform is not grad_by_func:
            ahead, behind = (pool_mixer(x + s * step * tangent, None, None) for s in (1, -1))
            torch.testing.assert_close(expected, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative and no torch\.func gradient; use"):
        transform(x.float(), tangent.float())
