"""Triton's activations alone: values and slopes, pointwise, and at what is hard for them."""

import pytest
import torch
import triton
import triton.language as tl

from poolformer_kernels import reference
from poolformer_kernels.backends.triton.activation import activate, activate_with_derivative

ACTIVATIONS = tuple(reference.ACTIVATIONS)


@triton.jit
def pointwise(
    x_ptr, y_ptr, again_ptr, slope_ptr, N: tl.constexpr, ACTIVATION: tl.constexpr, EXACT: tl.constexpr
):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, activate(x, ACTIVATION, EXACT))
    again, slope = activate_with_derivative(x, ACTIVATION, EXACT)
    tl.store(again_ptr + i, again)
    tl.store(slope_ptr + i, slope)


def applied(x: torch.Tensor, activation: str, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    y, again, slope = (torch.empty_like(x) for _ in range(3))
    pointwise[(1,)](x, y, again, slope, len(x), activation, exact)
    torch.testing.assert_close(again, y, rtol=1e-6, atol=1e-6, equal_nan=True)
    return y, slope


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_derivative_pointwise(activation, exact) -> None:
    x = torch.linspace(-12, 12, 2**14)
    with torch.enable_grad():
        right = x.double().requires_grad_()
        wanted = reference.ACTIVATIONS[activation](right)
        (wanted_slope,) = torch.autograd.grad(wanted.sum(), right)
    y, slope = applied(x, activation, exact)
    halves = activation == "gelu" and not exact
    unit = torch.finfo(torch.float32).eps * torch.maximum(x.double().abs(), wanted.abs())
    absolute = (4e-4, 2e-4) if halves else (1e-6, 1e-6)
    assert ((y - wanted).abs() <= absolute[0] + unit).all()
    assert ((slope - wanted_slope).abs() <= absolute[1] + unit).all()
    if activation == "gelu" and exact:
        assert (y - wanted).abs().max() < 5e-7
        assert (slope - wanted_slope).abs().max() < 5e-7


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_far_from_zero(activation, exact) -> None:
    """Exactly h or 0 and slope 1 or 0: an approximation of gelu that only nearly saturates is not."""
    x = torch.tensor([30.0, 200.0, 1e4, 3e38])
    for sign in (1, -1):
        y, slope = applied(sign * x, activation, exact)
        wanted, wanted_slope = x, torch.ones(4)
        if activation == "relu_squared":
            wanted, wanted_slope = x * x, 2 * x
        torch.testing.assert_close(y, wanted if sign > 0 else torch.zeros(4), rtol=1e-6, atol=1e-11)
        if activation != "gelu_tanh":
            wanted_slope = wanted_slope if sign > 0 else torch.zeros(4)
            torch.testing.assert_close(slope[:3], wanted_slope[:3], rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("activation", ["relu", "relu_squared"])
def test_activation_and_derivative_at_zero_and_nan(activation) -> None:
    y, slope = applied(torch.tensor([0.0, -0.0, float("nan"), float("-inf")]), activation, True)
    assert y[:2].tolist() == slope[:2].tolist() == [0.0, 0.0]
    assert y[2].isnan()
    assert (y[3].item(), slope[3].item()) == (0.0, 0.0)
    assert slope[2].isnan() == (activation == "relu_squared")
