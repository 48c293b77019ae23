"""The MLP where float32 lacks digits or range, activations far out, what is not finite."""

import pytest
import torch
from support.devices import on
from support.layouts import as_layout
from support.mlp import PLAIN, VECTORS, eager, make_grad, truth
from support.problems import HALVES, randn
from torch import Tensor

from poolformer_kernels import reference
from poolformer_kernels.ops import mlp

from .cases import over
from .check import laid, of_mean, same_pattern, values
from .common import ACTIVATIONS, BF16, BOTH, DTYPES, EACH, F16, F32, FORMATS, INF, NAN, TWO
from .mlp import check, problem, unit_of
from .targets import Target

OPERATOR = "mlp"
NO_INFINITY = "its weights of 64 channels multiply infinity by 0"


def one_channel(target: Target, **_) -> str | None:
    return NO_INFINITY if target.backend == "cuda" else None


# ---- few digits --------------------------------------------------------------------------------------------


@over(also=EACH, dtype=TWO)
def test_a_mean_of_100_deviations(target, shape, hidden, dtype):
    """Half an ulp of the mean is 50 of a deviation's."""
    inputs = problem(target, shape, hidden, dtype, mean=50.0, sigma=0.5)
    check(target, inputs, residual=True, ulps=of_mean(target, 54))


@over(
    value=(0.0, 0.1, -100.3, 1e4),
    shape=[(2, 17, 6, 9), (1, 64, 14, 14), (4, 1, 1, 1), (2, 200, 3, 6)],
    dtype=DTYPES,
    layout=FORMATS,
)
def test_constant_input(target, value, shape, dtype, layout):
    """The norm leaves its bias of each channel: every token is the same, and nothing is divided by zero.

    What rounding leaves of x - mean is multiplied by ``eps ** -0.5``, in eager PyTorch too.
    """
    inputs = problem(target, shape, 40, dtype)
    inputs["x"] = as_layout(torch.full_like(inputs["x"], value), layout)
    grad = make_grad(inputs)
    found, right = values(target, mlp, inputs, grad), truth(inputs, grad)
    rest = abs(value) * 1e-5**-0.5 * torch.finfo(F32).eps
    unit = 4 * torch.finfo(dtype).eps
    for name in {"y", "dw1", "db1", "dw2", "db2", "dnorm_bias", "dlayer_scale", "ddrop_scale"} & found.keys():
        atol = (unit + 8 * rest) * right.scales[name].max().item()
        exact = right.values[name]
        torch.testing.assert_close(found[name].cpu().double(), exact, rtol=0, atol=atol, msg=name)
    assert all(found[name].isfinite().all() for name in {"dx"} & found.keys())


@over(also=EACH, scale=(1e-5, 1e-6), layout=FORMATS)
def test_a_small_layer_scale_in_float16(target, shape, hidden, scale, layout):
    """Times a weight it is below float16's smallest number."""
    inputs = problem(target, shape, hidden, F16, vector_dtype=F32)
    inputs["layer_scale"] *= scale
    check(target, inputs, 1e4 * make_grad(inputs), layout=layout)  # as a loss scaler hands it over


# ---- activations -------------------------------------------------------------------------------------------


@over(also=EACH, dtype=DTYPES, activation=ACTIVATIONS, save_hidden=BOTH, layout=FORMATS)
def test_activations(target, shape, hidden, dtype, activation, save_hidden, layout):
    """relu in half precision: away from 0, where the rounding of h decides on which side it is."""
    inputs = problem(target, shape, hidden, dtype)
    if activation == "relu" and dtype in HALVES:
        off_zero(inputs)
    options = {"residual": True, "activation": activation}
    check(target, inputs, layout=layout, save_hidden=save_hidden, **options)


def off_zero(inputs) -> None:
    inputs["w1"] = 0.2 * inputs["w1"]
    inputs["b1"] = both_signs(inputs["b1"], 2.0)


def both_signs(b1: Tensor, size: float) -> Tensor:
    return torch.where(torch.arange(len(b1)) % 2 == 0, size, -size).to(b1.dtype)


def alone(target: Target, h: Tensor) -> dict[str, Tensor | None]:
    """An MLP whose value is act(h), in every channel, if a target needs several: weights of the identity."""
    channels, _, _ = target.fit(1, 1, None)
    one = torch.eye(channels, dtype=h.dtype)
    x = h.view(1, 1, 1, -1).expand(1, channels, 1, -1).contiguous()
    return {"x": x, "w1": one, "b1": None, "w2": one.clone(), "b2": None}


@over(
    kernels=True,
    dtype=DTYPES,
    where=lambda target, dtype: (
        None if target.backend == "cpp" or dtype == F32 else "each value and slope has its bound in halves"
    ),
)
def test_gelu_value_by_value(target, dtype):
    """In float32 to an ulp or two; where results are rounded to half precision, to 2.3e-4 besides."""
    x = torch.linspace(-9, 9, 20011).to(dtype)
    y = mlp(**on(target.device, alone(target, x)), norm=False, residual=False).cpu()
    exact = torch.nn.functional.gelu(x.double())
    rounding = {F32: 1.5e-7, F16: 2.0**-11, BF16: 2.0**-7}[dtype]
    allowed = {F32: 3e-7, F16: 1e-6, BF16: 2.3e-4}[dtype] + rounding * exact.abs()
    assert ((y.double() - exact).abs() <= allowed).all()


@over(kernels=True, dtype=DTYPES, where=one_channel)
def test_gelu_of_what_is_not_finite(target, dtype):
    """x Phi(x): infinity stays, minus infinity times 0 is not a number."""
    x = torch.tensor([1.0, -INF, INF, NAN, -30.0, 30.0, 0.0, -2.0])
    y = mlp(**on(target.device, alone(target, x.to(dtype)))).cpu().flatten()
    assert y.isnan().tolist() == [False, True, False, True, False, False, False, False]
    assert y[2] == INF
    finite = x.isfinite()
    exact = torch.nn.functional.gelu(x[finite].double())
    assert torch.allclose(y[finite].double(), exact, rtol=2.0**-7, atol=2.3e-4)


@over(dtype=DTYPES, activation=ACTIVATIONS, save_hidden=BOTH)
def test_each_value_and_slope(target, dtype, activation, save_hidden):
    """Over [-12, 12] alone, where no sum hides an error."""
    h = torch.linspace(-12, 12, 4001, dtype=torch.float64).to(dtype)
    h = h[h != 0] if activation == "relu" else h
    inputs = alone(target, h)
    options = {"activation": activation, "save_hidden": save_hidden}
    found = values(target, mlp, inputs, torch.ones_like(inputs["x"]), **options)
    exact = h.double().requires_grad_()
    wanted = reference.ACTIVATIONS[activation](exact)
    (slope,) = torch.autograd.grad(wanted.sum(), exact)
    # 1.5 ulps of the value, and the absolute error that an approximation may have
    approximation = 2e-6 if dtype == F32 else 4e-4
    for name, right in (("y", wanted.detach()), ("dx", slope)):
        value = found[name].cpu().double().flatten(0, 2)
        allowed = 1.5 * torch.finfo(dtype).eps * right.abs() + approximation
        worst = ((value - right).abs() - allowed).amax(0).argmax()
        error = (value - right).abs()[:, worst].max()
        assert error <= allowed[worst], f"{name} at {h[worst]}: off by {error} from {right[worst]}"


@over(
    dtype=DTYPES,
    activation=ACTIVATIONS,
    size=(50.0, 1e4),
    save_hidden=BOTH,
    where=lambda target, dtype, activation, size, **_: (
        one_channel(target) if dtype == F16 and activation == "relu_squared" and size > 256 else None
    ),
)
def test_large_hidden_activations(target, dtype, activation, size, save_hidden):
    """Far from 0 the activation is exactly h or exactly 0, its derivative 1 or 0, in eager PyTorch too.

    An approximation of gelu by x times a clamped polynomial would leave x times the error at the clamp here.
    relu_squared is exactly the square, infinite beyond float16's range, and its derivative 2 h.
    """
    for sign in (1, -1):
        inputs = alone(target, torch.full((37,), sign * size, dtype=dtype))
        options = {"activation": activation, "save_hidden": save_hidden}
        found = values(target, mlp, inputs, torch.ones_like(inputs["x"]), **options)
        relu = inputs["x"] if sign > 0 else torch.zeros_like(inputs["x"])
        squared = activation == "relu_squared"
        wanted, slope = (relu * relu, 2 * relu) if squared else (relu, relu / size)
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(found["y"].cpu(), wanted, rtol=unit, atol=1e-15)
        torch.testing.assert_close(found["dx"].cpu(), slope, rtol=2 * unit, atol=1e-12)


@over(
    also={"shape, hidden": [((2, 24, 5, 7), 56), ((3, 200, 3, 6), 50)]},
    dtype=DTYPES,
    activation=ACTIVATIONS,
    size=(50.0, 200.0, 1e4),
    layout=FORMATS,
    where=lambda target, dtype, activation, size, **_: (
        "1e4^2 is beyond float16" if size > 256 and activation == "relu_squared" and dtype == F16 else None
    ),
)
def test_large_hidden_activations_of_both_signs(target, shape, hidden, dtype, activation, size, layout):
    """Half of the hidden channels are off, for every token."""
    inputs = problem(target, shape, hidden, dtype)
    inputs["b1"] = both_signs(inputs["b1"], size)
    inputs["w2"] = inputs["w2"] / size
    check(target, inputs, layout=layout, residual=True, activation=activation)


@over(
    kernels=True,
    save_hidden=BOTH,
    where=lambda target, save_hidden: (
        one_channel(target)
        or (
            "dw2 is a product of float16 operands, as in eager PyTorch"
            if target.backend == "triton" and not save_hidden
            else None
        )
    ),
)
def test_hidden_activations_beyond_float16(target, save_hidden):
    """fc1's output may overflow float16 where it is saved: gradients stay as finite as without saving it."""
    inputs = alone(target, torch.tensor([6e4, -6e4, 1.0], dtype=F16))
    inputs["w1"] = 4 * inputs["w1"]
    found = values(target, mlp, inputs, torch.full_like(inputs["x"], 1e-3), save_hidden=save_hidden)
    for name in found.keys() - {"y"}:
        assert torch.isfinite(found[name]).all(), name


@over(save_hidden=BOTH, where=one_channel)
def test_relu_squared_beyond_float16(target, save_hidden):
    """The slope is 2 h: infinite, as in eager float16, where h is saved and beyond what float16 holds."""
    inputs = alone(target, torch.tensor([1e3, 6e4, -6e4, 0.0, NAN], dtype=F16))
    inputs["w1"] = 4 * inputs["w1"]
    grad = torch.full_like(inputs["x"], 2.0**-10)
    found = values(target, mlp, inputs, grad, activation="relu_squared", save_hidden=save_hidden)
    assert found["y"].flatten().tolist() == pytest.approx([INF, INF, 0.0, 0.0, NAN], nan_ok=True)
    saved = save_hidden and target.kernels
    dx = [31.25, INF if saved else 1875.0, 0.0, 0.0, NAN]  # 2 (4 x) 4 / 2^10
    assert found["dx"].flatten().tolist() == pytest.approx(dx, rel=1e-3, nan_ok=True)


# ---- infinity and NaN --------------------------------------------------------------------------------------


@over(also=EACH, bad=(NAN, INF, -INF), dtype=DTYPES, normed=BOTH, layout=FORMATS)
def test_x_not_finite(target, shape, hidden, bad, dtype, normed, layout):
    """One bad number makes its sample NaN through the norm, its token not finite without; nothing else."""
    inputs = laid(problem(target, shape, hidden, dtype, parameters=VECTORS if normed else PLAIN), layout)
    grad = make_grad(inputs)
    clean = values(target, mlp, inputs, grad)
    inputs["x"][1, 3, 2, 4] = bad
    found = {name: t.cpu() for name, t in values(target, mlp, inputs, grad).items()}
    hurt = torch.zeros_like(found["y"], dtype=torch.bool)
    hurt[1 if normed else (1, slice(None), 2, 4)] = True
    assert not found["y"][hurt].isfinite().any()
    if normed or bad != bad:
        assert found["y"][hurt].isnan().all()
    if target.kernels or not normed:
        for name in {"y", "dx"} & found.keys():
            assert torch.equal(found[name][~hurt], clean[name].cpu()[~hurt]), name


@over(
    also=EACH,
    name=("w1", "b1", "w2", "b2", "norm_weight", "norm_bias", "layer_scale"),
    activation=ACTIVATIONS,
    dtype=TWO,
)
def test_nan_in_a_parameter_is_not_lost(target, shape, hidden, name, activation, dtype):
    """A clamp or a maximum may take NaN for a number. An infinite sum may be NaN in eager PyTorch or not."""
    given = tuple(vector for vector in VECTORS if vector != "drop_scale")
    inputs = problem(target, shape, hidden, dtype, parameters=given)
    inputs[name].view(-1)[3] = NAN
    y = mlp(**on(target.device, inputs), activation=activation).cpu()
    assert torch.equal(y.isnan(), eager(**inputs, activation=activation).isnan())
    assert y.isnan().any()


@over(
    also={"shape, hidden": [((2, 17, 6, 9), 20), ((4, 64, 8, 8), 64)]},
    dtype=TWO,
    layout=FORMATS,
    residual=BOTH,
    where=lambda target, shape, **_: (
        "eager's norm may be inf - inf" if shape[1] == 64 and not target.kernels else None
    ),
)
def test_a_variance_that_overflows(target, shape, hidden, dtype, layout, residual):
    """rstd is 0 and the norm leaves its bias, as of an image of zeros."""
    inputs = problem(target, shape, hidden, dtype)
    x = inputs["x"]
    zeros = {name: t.float().contiguous() for name, t in (inputs | {"x": torch.zeros_like(x)}).items()}
    inputs["x"] = as_layout(randn(*x.shape, dtype=x.dtype, sigma=1e30), layout)
    grad = as_layout(make_grad(inputs), layout)
    found = values(target, mlp, inputs, grad, residual=residual)
    expected = eager(**zeros) + (inputs["x"].float() if residual else 0)
    unit = unit_of(inputs, 1e-5, 2)
    torch.testing.assert_close(found["y"].float().cpu(), expected, rtol=unit, atol=unit)
    if target.kernels:
        assert all(value.isfinite().all() for value in found.values())
        if "dx" in found:
            torch.testing.assert_close(found["dx"].cpu(), grad * residual, rtol=0, atol=1e-6)


@over(also=EACH, layout=FORMATS)
def test_float16_overflows_as_rounding_does(target, shape, hidden, layout):
    """y past 65504 is infinite, not a wrong number; the sums themselves are float32."""
    inputs = problem(target, shape, hidden, F16)
    inputs["layer_scale"].fill_(6e4)
    exact = truth(inputs, make_grad(inputs), residual=True).values["y"]
    assert exact.half().isinf().any()
    assert exact.half().isfinite().any()
    y = mlp(**on(target.device, laid(inputs, layout)), residual=True).cpu()
    clear = (exact.abs() - 65520).abs() > 2e-2 * 65520  # where the operands' rounding does not decide
    assert same_pattern(y[clear], exact.half()[clear])


@over(pairs=True, kernels=True, layout=FORMATS, dtype=(F32, F16), save_hidden=BOTH, where=one_channel)
def test_infinite_x_without_a_norm(target, layout, dtype, save_hidden):
    """Without a norm a gradient knows of x only through its own hidden activations, as they were saved."""
    x = as_layout(torch.tensor([-1.0, INF, 2.0, 0.5], dtype=dtype).view(1, 1, 2, 2), layout).to(target.device)
    w1, w2 = (torch.full((1, 1), value, dtype=dtype, device=target.device) for value in (2.0, 3.5))
    x.requires_grad_()
    w2.requires_grad_()
    y = mlp(x, w1, None, w2, None, activation="relu", save_hidden=save_hidden)
    dx, dw2 = torch.autograd.grad(y, (x, w2), torch.ones_like(y))
    assert dx.flatten().tolist() == [0.0, 7.0, 7.0, 7.0]
    assert dw2.item() == INF
