"""The MLP where float32 lacks digits or range, its activations far out, its statistics given and returned.

The tests named ``core`` are also run by test_isa.py, once for each instruction set level of this machine.
"""

import pytest
import torch
from helpers import HALVES, as_layout, assert_close_to_fp64, assert_same, bits, randn, run, tiled_stats
from mlp_helpers import (
    PLAIN,
    VECTORS,
    assert_right,
    eager,
    make_grad,
    make_inputs,
    truth,
    y_of_mlp_with_stats,
)

from poolformer_kernels import reference
from poolformer_kernels.ops import mlp
from poolformer_kernels.ops.mlp import mlp_with_stats
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

DTYPES = (torch.float32, *HALVES)
FORMATS = ("nchw", "channels_last")
ACTIVATIONS = tuple(reference.ACTIVATIONS)
INF, NAN = float("inf"), float("nan")


# ---- gelu, value by value ----------------------------------------------------------------------------------


def through_gelu(x, dtype):
    """gelu(x) by an MLP of one channel: its weights are 1, there is no norm and no residual."""
    one = torch.ones(1, 1, dtype=dtype)
    y = mlp(x.to(dtype).view(1, 1, -1, 1), one, None, one, None, norm=False, residual=False)
    return y.flatten()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_cpp_gelu_value_by_value(kernels, dtype):
    """In float32 to an ulp or two; where results are rounded to half precision, to 2.3e-4 besides."""
    x = torch.linspace(-9, 9, 20011).to(dtype)
    exact = torch.nn.functional.gelu(x.double())
    rounding = {torch.float32: 1.5e-7, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[dtype]
    allowed = {torch.float32: 3e-7, torch.float16: 1e-6, torch.bfloat16: 2.3e-4}[
        dtype
    ] + rounding * exact.abs()
    assert ((through_gelu(x, dtype).double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_cpp_gelu_of_what_is_not_finite(kernels, dtype):
    """x Phi(x): infinity stays, minus infinity times 0 is not a number."""
    x = torch.tensor([1.0, -INF, INF, NAN, -30.0, 30.0, 0.0, -2.0])
    actual = through_gelu(x, dtype)
    assert actual.isnan().tolist() == [False, True, False, True, False, False, False, False]
    assert actual[2] == INF
    finite = x.isfinite()
    exact = torch.nn.functional.gelu(x[finite].double())
    assert torch.allclose(actual[finite].double(), exact, rtol=2.0**-7, atol=2.3e-4)


# ---- few digits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("dtype", "mean", "sigma"),
    [
        *(
            (torch.float32, m, s)
            for m, s in ((1e2, 1), (1e3, 1), (-1e4, 1), (100, 1e-2), (0, 1e-6), (0, 1e5))
        ),
        *((torch.bfloat16, m, s) for m, s in ((1e2, 1), (1e3, 10), (-1e4, 100), (0, 1e-6), (0, 1e5))),
        *((torch.float16, m, s) for m, s in ((1e2, 1), (-1e4, 100), (0, 1e-3))),
    ],
    ids=str,
)
def test_core_mean_far_from_zero(backend, dtype, mean, sigma, residual, layout):
    """The mean is a float32 and its last digit a matter of luck, in eager too: an ulp of it is allowed.

    Its error is the same for all tokens of a sample: where terms are summed it adds up, as rounding does not.
    """
    inputs = make_inputs((2, 24, 11, 14), 56, dtype, mean=mean, sigma=sigma)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = as_layout(make_grad(inputs), layout)
    actual = run(mlp, inputs, grad, residual=residual)
    summed = {name: value for name, value in actual.items() if name[1:] in VECTORS}
    others = {name: value for name, value in actual.items() if name not in summed}
    assert_right(others, inputs, grad, residual=residual, ulps=8 + abs(mean) / sigma)
    coherent = inputs["x"][0].numel() ** 0.5
    assert_right(summed, inputs, grad, residual=residual, ulps=8 + coherent * abs(mean) / sigma)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("offset", [10.0, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_channels_with_their_own_means(backend, dtype, offset, layout):
    """What trained models have: a few channels far away, whose x has few digits left for the others."""
    inputs = make_inputs((2, 24, 11, 14), 56, dtype)
    inputs["x"][:, ::5] += offset * randn(5, 1, 1, dtype=dtype, seed=3)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = as_layout(make_grad(inputs), layout)
    for residual in (False, True):
        assert_right(run(mlp, inputs, grad, residual=residual), inputs, grad, residual=residual, ulps=8)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("value", [0.0, 0.1, -100.3, 1e4])
@pytest.mark.parametrize("shape", [(2, 17, 6, 9), (1, 64, 14, 14), (4, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_constant_input(backend, dtype, shape, value, layout):
    """The norm leaves its bias of each channel: every token is the same, and nothing is divided by zero.

    What rounding leaves of x - mean is multiplied by ``eps ** -0.5``, in eager PyTorch too.
    """
    inputs = make_inputs(shape, 40, dtype)
    inputs["x"] = as_layout(torch.full(shape, value, dtype=dtype), layout)
    grad = make_grad(inputs)
    actual = run(mlp, inputs, grad)
    exact = truth(inputs, grad).values
    rest = abs(value) * 1e-5**-0.5 * torch.finfo(torch.float32).eps
    unit = 4 * torch.finfo(dtype).eps
    for name in ("y", "dw1", "db1", "dw2", "db2", "dnorm_bias", "dlayer_scale", "ddrop_scale"):
        size = truth(inputs, grad).scales[name].max().item()
        torch.testing.assert_close(
            actual[name].double(), exact[name], rtol=0, atol=(unit + 8 * rest) * size, msg=name
        )
    assert actual["dx"].isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 10.0])
def test_core_eps(backend, eps):
    inputs = make_inputs((2, 9, 6, 7), 20, sigma=0.1)
    grad = make_grad(inputs)
    assert_right(run(mlp, inputs, grad, residual=True, eps=eps), inputs, grad, residual=True, eps=eps)


# ---- activations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("save_hidden", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_activations(backend, dtype, activation, save_hidden, layout):
    """relu in half precision: away from 0, where the rounding of h decides on which side it is."""
    inputs = make_inputs((2, 24, 7, 9), 56, dtype)
    if activation == "relu" and dtype in HALVES:
        inputs["w1"] = 0.2 * inputs["w1"]
        inputs["b1"] = torch.where(torch.arange(56) % 2 == 0, 2.0, -2.0).to(dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = as_layout(make_grad(inputs), layout)
    actual = run(mlp, inputs, grad, residual=True, activation=activation, save_hidden=save_hidden)
    assert_right(actual, inputs, grad, residual=True, activation=activation)


def activation_alone(h: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """An MLP whose value is act(h): one channel in, out and between, the weights 1."""
    one = torch.ones(1, 1, dtype=h.dtype)
    return {"x": h.view(1, 1, 1, -1), "w1": one, "b1": None, "w2": one.clone(), "b2": None}


@pytest.mark.parametrize("save_hidden", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_activation_pointwise(backend, dtype, activation, save_hidden):
    """Each value and derivative over [-12, 12] alone, where no sum hides an error."""
    h = torch.linspace(-12, 12, 4001, dtype=torch.float64).to(dtype)
    h = h[h != 0] if activation == "relu" else h
    inputs = activation_alone(h)
    actual = run(mlp, inputs, torch.ones_like(inputs["x"]), activation=activation, save_hidden=save_hidden)
    exact = h.double().requires_grad_()
    wanted = reference.ACTIVATIONS[activation](exact)
    (slope,) = torch.autograd.grad(wanted.sum(), exact)
    # 1.5 ulps of the value, and the absolute error that an approximation may have
    unit = torch.finfo(dtype).eps
    approximation = 2e-6 if dtype == torch.float32 else 4e-4
    for name, value, right in (("y", actual["y"], wanted.detach()), ("slope", actual["dx"], slope)):
        error = (value.double().flatten() - right).abs()
        worst = (error - 1.5 * unit * right.abs()).argmax()
        assert error[worst] <= 1.5 * unit * right[worst].abs() + approximation, (
            f"{name} at {h[worst].item()}: {value.flatten()[worst].item()}, not {right[worst].item()}"
        )


@pytest.mark.parametrize("save_hidden", [False, True])
@pytest.mark.parametrize("size", [50.0, 1e4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_large_hidden_activations(backend, dtype, activation, size, save_hidden):
    """Far from 0 the activation is exactly h or exactly 0, its derivative 1 or 0, in eager PyTorch too.

    An approximation of gelu by x times a clamped polynomial would leave x times the error at the clamp here.
    relu_squared is exactly the square, infinite beyond float16's range, and its derivative 2 h.
    """
    for sign in (1, -1):
        inputs = activation_alone(torch.full((37,), sign * size, dtype=dtype))
        grad = torch.ones_like(inputs["x"])
        actual = run(mlp, inputs, grad, activation=activation, save_hidden=save_hidden)
        relu = inputs["x"] if sign > 0 else torch.zeros_like(inputs["x"])
        squared = activation == "relu_squared"
        wanted, slope = (relu * relu, 2 * relu) if squared else (relu, relu / size)
        torch.testing.assert_close(actual["y"], wanted, rtol=torch.finfo(dtype).eps, atol=1e-15)
        torch.testing.assert_close(actual["dx"], slope, rtol=2 * torch.finfo(dtype).eps, atol=1e-12)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_large_hidden_activations_of_both_signs(backend, dtype, activation, layout):
    """b1 of +-50, +-1e4: half of the hidden channels are off, for every token. 1e4^2 is beyond float16."""
    for size in (50.0, 200.0 if activation == "relu_squared" and dtype == torch.float16 else 1e4):
        inputs = make_inputs((2, 24, 5, 7), 56, dtype, parameters=VECTORS)
        inputs["b1"] = torch.where(torch.arange(56) % 2 == 0, size, -size).to(dtype)
        inputs["w2"] = inputs["w2"] / size
        inputs["x"] = as_layout(inputs["x"], layout)
        grad = make_grad(inputs)
        actual = run(mlp, inputs, grad, residual=True, activation=activation)
        assert_right(actual, inputs, grad, residual=True, activation=activation)


# ---- infinity and NaN --------------------------------------------------------------------------------------


def same_pattern(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """NaN, +inf and -inf are where they are in ``expected``, and nowhere else."""
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(
        torch.where(actual.isinf(), actual, 0.0), torch.where(expected.isinf(), expected, 0.0)
    )


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["b2", "layer_scale", "drop_scale"])
def test_core_not_finite_where_eager_is_not(backend, name, dtype, bad, residual, layout):
    inputs = make_inputs((3, 17, 6, 9), 20, dtype)
    inputs[name][1] = bad
    expected = eager(**{name: t.float() for name, t in inputs.items()}, residual=residual)
    assert not expected.isfinite().all()
    assert expected.isfinite().any()
    inputs["x"] = as_layout(inputs["x"], layout)
    y = mlp(**inputs, residual=residual)
    if name == "b2" or dtype == torch.float32:
        assert same_pattern(y, expected)
    else:  # infinity times a number near 0, whose sign is a matter of rounding
        assert torch.equal(y.isfinite(), expected.isfinite())


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_core_x_not_finite(backend, dtype, bad, normed, layout):
    """One bad number makes its sample NaN through the norm, its token not finite without; nothing else."""
    inputs = make_inputs((3, 17, 6, 9), 20, dtype, parameters=VECTORS if normed else PLAIN)
    clean = mlp(**{**inputs, "x": as_layout(inputs["x"], layout)})
    inputs["x"][1, 3, 2, 4] = bad
    y = mlp(**{**inputs, "x": as_layout(inputs["x"], layout)})
    hurt = torch.zeros(3, 6, 9, dtype=torch.bool)
    hurt[1 if normed else (1, 2, 4)] = True
    hurt = hurt[:, None].expand(y.shape)
    assert not y[hurt].isfinite().any()
    if backend != "reference" or not normed:
        assert torch.equal(y[~hurt], clean[~hurt])
    if normed or bad != bad:
        assert y[hurt].isnan().all()


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "norm_weight", "norm_bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_core_nan_in_a_parameter_is_not_lost(backend, dtype, activation, name):
    """A clamp or a maximum may take NaN for a number. An infinite sum may be NaN in eager PyTorch or not."""
    inputs = make_inputs((2, 17, 3, 5), 20, dtype)
    inputs["drop_scale"] = None
    inputs[name].view(-1)[3] = NAN
    y = mlp(**inputs, activation=activation)
    assert torch.equal(y.isnan(), eager(**inputs, activation=activation).isnan())
    assert y.isnan().any()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_core_gradient_not_finite_stays_in_its_sample(backend, bad, layout):
    inputs = make_inputs((3, 17, 6, 9), 20, parameters=("b1", "b2", "norm_weight", "norm_bias"))
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = make_grad(inputs)
    clean = run(mlp, inputs, grad, residual=True)
    grad[1, 3, 2, 2] = bad
    dx = run(mlp, inputs, grad, residual=True)["dx"]
    assert not dx[1].isfinite().any()
    assert torch.equal(dx[[0, 2]], clean["dx"][[0, 2]])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("residual", [False, True])
def test_core_1e30(backend, residual, layout):
    """The variance overflows: rstd is 0 and the norm leaves its bias, in eager PyTorch too."""
    inputs = make_inputs((2, 17, 6, 9), 20)
    inputs["x"] = as_layout(randn(2, 17, 6, 9, sigma=1e30), layout)
    grad = make_grad(inputs)
    expected = run(eager, {**inputs, "x": inputs["x"].contiguous()}, grad, residual=residual)
    actual = run(mlp, inputs, grad, residual=residual)
    assert expected["y"].isfinite().all()
    torch.testing.assert_close(actual["y"], expected["y"], rtol=1e-5, atol=1e-5)
    for name, value in actual.items():
        assert value[expected[name].isfinite()].isfinite().all(), name


@pytest.mark.parametrize("layout", FORMATS)
def test_core_fp16_overflows_as_rounding_does(backend, layout):
    """y past 65504 is infinite, not a wrong number; the sums themselves are float32."""
    inputs = make_inputs((2, 17, 6, 9), 20, torch.float16)
    inputs["layer_scale"].fill_(6e4)
    exact = truth(inputs, make_grad(inputs), residual=True).values["y"]
    assert exact.half().isinf().any()
    assert exact.half().isfinite().any()
    y = mlp(**{**inputs, "x": as_layout(inputs["x"], layout)}, residual=True)
    clear = (exact.abs() - 65520).abs() > 2e-2 * 65520  # where the operands' rounding does not decide
    assert same_pattern(y[clear], exact.half()[clear])


# ---- statistics given and returned -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("tiles", [1, 2, 7, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_given_statistics(backend, dtype, tiles, mean, layout):
    """The partials' means are rounded to float32: against sigma that is an error of |mean| / sigma ulps."""
    inputs = make_inputs((3, 18, 6, 9), 40, dtype, mean=mean, sigma=2.0)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = make_grad(inputs)
    stats = tiled_stats(inputs["x"], tiles)
    actual = run(y_of_mlp_with_stats, inputs, grad, residual=True, stats=stats)
    assert_right(actual, inputs, grad, residual=True, ulps=8 + mean / 2)


def test_given_statistics_in_other_layouts(backend):
    inputs = make_inputs((3, 18, 6, 9), 20)
    grad = make_grad(inputs)
    stats = tiled_stats(inputs["x"], 5)
    expected = run(y_of_mlp_with_stats, inputs, grad, residual=True, stats=stats)
    transposed = stats.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    offset = torch.full((stats.numel() + 1,), NAN)[1:].view(stats.shape).copy_(stats)
    sliced = torch.full((3, 12, 4), NAN)[:, 1:11:2, 1:].copy_(stats)
    for other in (transposed, offset, sliced):
        assert_same(run(y_of_mlp_with_stats, inputs, grad, residual=True, stats=other), expected)


def test_statistics_given_are_used_and_not_differentiable(backend):
    """A quarter of the variance with eps = 0 is twice the norm's weight; the statistics get no gradient."""
    inputs = make_inputs((3, 18, 6, 9), 20)
    quarter = reference.sample_stats(inputs["x"]) * torch.tensor([1.0, 1.0, 0.25])
    doubled = mlp(**{**inputs, "norm_weight": 2 * inputs["norm_weight"]}, eps=0.0)
    y = y_of_mlp_with_stats(**inputs, eps=0.0, stats=quarter)
    torch.testing.assert_close(y, doubled, rtol=2e-5, atol=2e-5)
    quarter.requires_grad_()
    inputs["x"].requires_grad_()
    y, returned = mlp_with_stats(**inputs, residual=True, stats=quarter)
    assert y.requires_grad
    assert not returned.requires_grad
    assert torch.autograd.grad(y.sum(), [inputs["x"], quarter], allow_unused=True)[1] is None


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("form", ["plain", "norm", "residual"])
@pytest.mark.parametrize("mean", [-2.3, 1e3])
@pytest.mark.parametrize("shape", [(3, 18, 6, 9), (2, 5, 1, 1), (1, 65, 14, 14)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_returned_statistics_describe_the_rounded_output(backend, dtype, shape, mean, form, layout):
    out = None if form == "residual" else 7
    inputs = make_inputs(
        shape, 20, dtype, mean=mean, out=out, parameters=PLAIN if form == "plain" else VECTORS
    )
    inputs["x"] = as_layout(inputs["x"], layout)
    y, stats = mlp_with_stats(**inputs, residual=form == "residual")
    assert torch.equal(bits(y), bits(mlp(**inputs, residual=form == "residual")))
    assert stats.dtype == torch.float32
    assert stats.shape[::2] == (shape[0], 3)
    assert torch.equal(stats[..., 0].sum(1), torch.full((shape[0],), float(y[0].numel())))
    flat = y.double().flatten(1)
    got_mean, got_var = reference.merge_stats(stats.double())
    assert_close_to_fp64(got_mean.float(), None, flat.mean(1), scale=flat.abs().amax(1), what="mean")
    # the means of the tiles that were merged are float32: each is off by up to an ulp of itself
    shift = torch.finfo(torch.float32).eps * flat.mean(1).abs()
    var = flat.var(1, correction=0)
    assert ((got_var - var).abs() <= 2e-6 * var + 0.1 * shift * var.sqrt() + shift**2).all(), (got_var, var)


def test_statistics_of_no_samples(backend):
    y, stats = mlp_with_stats(**make_inputs((0, 5, 3, 4), 7), residual=True)
    assert y.shape == (0, 5, 3, 4)
    assert stats.shape[0] == 0
    assert stats.shape[2] == 3


def test_statistics_are_returned_only_when_asked_for(backend):
    assert mlp_with_stats(**make_inputs((2, 5, 3, 4), 7), return_stats=False)[1] is None


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_a_block_through_statistics(backend, dtype, layout):
    """Mixer, MLP, mixer, each on the last one's statistics, equal those that compute their own."""
    inputs = make_inputs((3, 18, 6, 9), 40, dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = make_grad(inputs)

    def chain(given: bool, x, **parameters):
        mixer = {"weight": parameters["norm_weight"], "bias": parameters["norm_bias"], "residual": True}
        y, stats = pool_mixer_with_stats(x, **mixer)
        y, stats = mlp_with_stats(y, residual=True, stats=stats if given else None, **parameters)
        return pool_mixer_with_stats(y, stats=stats if given else None, **mixer)[0]

    given = run(lambda **t: chain(True, **t), inputs, grad)
    computed = run(lambda **t: chain(False, **t), inputs, grad)
    unit = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, value in given.items():
        error = (value.double() - computed[name].double()).norm() / computed[name].double().norm()
        assert error <= unit, (name, error)


@pytest.mark.parametrize("save_hidden", [False, True])
def test_core_cpp_hidden_beyond_float16(kernels, save_hidden):
    """fc1's output may overflow float16 where it is saved: gradients stay as finite as without saving it."""
    inputs = activation_alone(torch.tensor([6e4, -6e4, 1.0], dtype=torch.float16))
    inputs["w1"] = 4 * inputs["w1"]
    leaves = {name: t if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    y = mlp(**leaves, activation="gelu", save_hidden=save_hidden)
    given = [t for t in leaves.values() if t is not None]
    for gradient in torch.autograd.grad(y, given, torch.full_like(y, 1e-3)):
        assert torch.isfinite(gradient).all()


def test_core_relu_squared_beyond_float16(backend):
    """The slope is 2 h: infinite, as in eager float16, where h is saved and beyond what float16 holds."""
    inputs = activation_alone(torch.tensor([1e3, 6e4, -6e4, 0.0, NAN], dtype=torch.float16))
    inputs["w1"] = 4 * inputs["w1"]
    grad = torch.full_like(inputs["x"], 2.0**-10)
    for save_hidden in (False, True):
        actual = run(mlp, inputs, grad, activation="relu_squared", save_hidden=save_hidden)
        assert actual["y"].flatten().tolist() == pytest.approx([INF, INF, 0.0, 0.0, NAN], nan_ok=True)
        saved = save_hidden and backend != "reference"
        dx = [31.25, INF if saved else 1875.0, 0.0, 0.0, NAN]  # 2 (4 x) 4 / 2^10
        assert actual["dx"].flatten().tolist() == pytest.approx(dx, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("layout", FORMATS)
def test_core_cpp_infinite_x_without_a_norm(kernels, layout):
    """Without a norm a gradient knows of x only through its own hidden activations."""
    x = torch.tensor([-1.0, float("inf"), 2.0, 0.5]).view(1, 1, 2, 2)
    x = x.contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    x.requires_grad_()
    w1, w2 = torch.full((1, 1), 2.0), torch.full((1, 1), 3.5)
    (dx,) = torch.autograd.grad(mlp(x, w1, None, w2, None, activation="relu"), x, torch.ones(1, 1, 2, 2))
    assert dx.flatten().tolist() == [0.0, 7.0, 7.0, 7.0]
