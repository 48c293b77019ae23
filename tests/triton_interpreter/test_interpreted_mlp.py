"""The Triton MLP's forward: the error rule over dtypes, layouts, shapes, activations and hard values."""

import pytest
import torch
import triton
import triton.language as tl
from helpers import (
    HALVES,
    as_layout,
    as_vector_layout,
    assert_close_to_fp64,
    assert_same,
    assert_statistics_of,
    bits,
    randn,
    tiled_stats,
)
from mlp_helpers import (
    PLAIN,
    VECTORS,
    WEIGHTS,
    as_weight_layout,
    assert_right,
    eager,
    make_grad,
    make_inputs,
)

from poolformer_kernels import reference
from poolformer_kernels.backends.triton.activation import activate, activate_with_derivative
from poolformer_kernels.backends.triton.mlp import forward as kernels
from poolformer_kernels.layout import memory_format_of
from poolformer_kernels.ops import mlp
from poolformer_kernels.ops.mlp import mlp_with_stats

pytestmark = pytest.mark.sampled(4)

DTYPES = (torch.float32, *HALVES)
FORMATS = ("nchw", "channels_last")
KINDS = ((torch.float32, "nchw"), *((dtype, "channels_last") for dtype in HALVES))
ACTIVATIONS = tuple(reference.ACTIVATIONS)
FORWARD = torch.ops.poolformer_kernels.mlp_triton.default
BACKWARD = torch.ops.poolformer_kernels.mlp_triton_backward.default
ORDER = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias", "layer_scale", "drop_scale")

# x, hidden: samples that share tiles, several tiles, C in one and in two parts, padded; cut chunks. Above 96
# channels fp32 is a pair.
FUSED = (
    ((3, 64, 7, 9), 128),
    ((1, 96, 8, 16), 70),
    ((2, 128, 6, 7), 65),
    ((1, 192, 5, 13), 40),
    ((5, 17, 4, 9), 30),
    ((2, 1, 9, 4), 3),
    ((1, 80, 1, 33), 16),
)
PAIR = (  # wide, or so few pixels that a tile has many samples
    ((3, 320, 7, 7), 96),
    ((2, 200, 6, 6), 50),
    ((1, 513, 2, 16), 31),
    ((67, 5, 1, 3), 9),
    ((3, 33, 1, 1), 7),
)
ONE_OF_EACH = (FUSED[0], PAIR[1])


@pytest.fixture(autouse=True)
def no_graph():
    with torch.no_grad():
        yield


def check(inputs, layout="channels_last", ulps=8, **options) -> torch.Tensor:
    inputs = {**inputs, "x": as_layout(inputs["x"], layout)}
    before = {name: t.clone() for name, t in inputs.items() if t is not None}
    y = mlp(**inputs, **options)
    with torch.enable_grad():
        assert_right({"y": y}, inputs, make_grad(inputs), ulps=ulps, **options)
    assert y.is_contiguous(memory_format=memory_format_of(inputs["x"]))
    assert_same({name: inputs[name] for name in before}, before)  # nothing was written to
    return y


# ---- the error rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), FUSED + PAIR, ids=str)
def test_residual_form(shape, hidden, dtype, layout) -> None:
    check(make_inputs(shape, hidden, dtype), layout, residual=True)


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize(
    ("shape", "hidden", "out"),
    [((2, 17, 5, 8), 20, 17), ((2, 17, 5, 8), 20, 9), ((2, 64, 7, 7), 64, 330), ((1, 320, 2, 5), 33, 320)],
    ids=str,
)
def test_plain_form(shape, hidden, out, dtype, layout) -> None:
    for parameters in (PLAIN, VECTORS):
        check(make_inputs(shape, hidden, dtype, out=out, parameters=parameters), layout)


@pytest.mark.parametrize(
    "given", [(), ("b1",), ("b2", "drop_scale"), ("norm_weight",), ("norm_bias", "layer_scale")], ids=str
)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_missing_vectors(dtype, shape, hidden, given) -> None:
    for norm in (False, True) if not any(name.startswith("norm") for name in given) else (True,):
        check(make_inputs(shape, hidden, dtype, parameters=given), residual=True, norm=norm)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_activations(shape, hidden, dtype, activation) -> None:
    check(make_inputs(shape, hidden, dtype), residual=True, activation=activation)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "vector_dtype"),
    [
        *((half, torch.float32, torch.float32) for half in HALVES),
        *((torch.float32, half, vector) for half in HALVES for vector in (torch.float32, half)),
        *((half, half, torch.float32) for half in HALVES),
    ],
    ids=str,
)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_mixed_dtypes(shape, hidden, dtype, weight_dtype, vector_dtype) -> None:
    dtypes = {"weight_dtype": weight_dtype, "vector_dtype": vector_dtype}
    check(make_inputs(shape, hidden, dtype, **dtypes), residual=True)
    check(make_inputs(shape, hidden, dtype, parameters=PLAIN, **dtypes))


@pytest.mark.parametrize("layout", ["sliced_c", "transposed", "expanded", "offset", "sliced_hw_last"])
def test_layouts_of_x(layout) -> None:
    check(make_inputs((3, 17, 6, 9), 20, torch.bfloat16), layout, residual=True)


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("layout", ["transposed", "strided", "padded", "offset", "expanded"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_layouts_of_weights(name, layout, conv) -> None:
    inputs = make_inputs((2, 17, 6, 7), 20, conv=conv)
    inputs[name] = as_weight_layout(inputs[name], layout)
    check(inputs, residual=True)


@pytest.mark.parametrize("layout", ["strided", "expanded", "offset", "column"])
@pytest.mark.parametrize(("shape", "hidden"), [((2, 17, 6, 7), 20), ((2, 200, 1, 7), 20)], ids=str)
def test_layouts_of_vectors(shape, hidden, layout) -> None:
    inputs = make_inputs(shape, hidden)
    check(inputs | {name: as_vector_layout(inputs[name], layout) for name in VECTORS}, residual=True)


@pytest.mark.parametrize(
    ("dtype", "mean", "sigma"),
    [
        *((torch.float32, m, s) for m, s in ((1e2, 1.0), (-1e4, 1.0), (1e2, 1e-2))),
        *((torch.bfloat16, m, s) for m, s in ((1e2, 1.0), (1e3, 10.0), (-1e4, 1e2))),
        *((torch.float16, m, s) for m, s in ((1e2, 1.0), (-1e4, 1e2))),
    ],
    ids=str,
)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_mean_much_larger_than_sigma(shape, hidden, dtype, mean, sigma) -> None:
    """The mean is a float32, in eager PyTorch too: an ulp of it is allowed."""
    inputs = make_inputs(shape, hidden, dtype, mean=mean, sigma=sigma)
    for residual in (True, False):
        check(inputs, residual=residual, ulps=8 + abs(mean) / sigma)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_channels_with_their_own_means(shape, hidden, dtype) -> None:
    inputs = make_inputs(shape, hidden, dtype)
    inputs["x"][:, ::5] += 1e3 * randn(len(range(0, shape[1], 5)), 1, 1, dtype=dtype, seed=3)
    check(inputs, residual=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_a_sample_that_is_not_finite_stays_alone(shape, hidden, value, dtype) -> None:
    for parameters in (PLAIN, VECTORS):
        inputs = make_inputs(shape, hidden, dtype, parameters=parameters)
        clean = mlp(**inputs)
        inputs["x"][1, 3, 2, 4] = value
        y = mlp(**inputs)
        hurt = torch.zeros(y.shape, dtype=torch.bool)
        hurt[1 if parameters is VECTORS else (1, slice(None), 2, 4)] = True
        assert not y[hurt].isfinite().any()
        assert torch.equal(y[~hurt], clean[~hurt])


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2", "norm_weight", "norm_bias"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_nan_in_a_parameter_is_not_lost(shape, hidden, activation, name) -> None:
    inputs = make_inputs(shape, hidden, torch.bfloat16)
    inputs["drop_scale"] = None
    inputs[name].view(-1)[3] = float("nan")
    y = mlp(**inputs, activation=activation)
    assert torch.equal(y.isnan(), eager(**inputs, activation=activation).isnan())
    assert y.isnan().any()


# ---- the activations alone ---------------------------------------------------------------------------------


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


# ---- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_given_statistics(shape, hidden, dtype, tiles) -> None:
    inputs = make_inputs(shape, hidden, dtype, mean=40.0)
    stats = tiled_stats(inputs["x"], tiles)
    y = mlp_with_stats(**inputs, residual=True, stats=stats)[0]
    with torch.enable_grad():
        assert_right({"y": y}, inputs, make_grad(inputs), residual=True, ulps=88)
    other = mlp_with_stats(
        **inputs, residual=True, stats=stats.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    )
    assert torch.equal(bits(y), bits(other[0]))


@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_given_statistics_are_used(shape, hidden) -> None:
    inputs = make_inputs(shape, hidden)
    quarter = reference.sample_stats(inputs["x"]) * torch.tensor([1.0, 1.0, 0.25])
    doubled = mlp(**{**inputs, "norm_weight": 2 * inputs["norm_weight"]}, eps=0.0)
    y, stats = mlp_with_stats(**inputs, eps=0.0, stats=quarter, return_stats=False)
    assert stats is None
    torch.testing.assert_close(y, doubled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "hidden", "dtype", "layout"),
    [
        (*problem, *kind)
        for i, problem in enumerate(
            (*FUSED[:2], FUSED[4], *PAIR[:4], ((5, 16, 8, 8), 20), ((2, 8, 1, 130), 16), ((9, 8, 4, 8), 16))
        )
        for kind in (KINDS[0], KINDS[1 + i % 2])
    ],
    ids=str,
)
def test_statistics_of_the_rounded_y(shape, hidden, dtype, layout) -> None:
    for mean, residual in ((-2.3, False), (1e3, True)):
        inputs = make_inputs(shape, hidden, dtype, mean=mean)
        inputs["drop_scale"] = None
        inputs["x"] = as_layout(inputs["x"], layout)
        y, stats = mlp_with_stats(**inputs, residual=residual)
        assert_statistics_of(stats, y)


# ---- the op ------------------------------------------------------------------------------------------------


def arguments(
    inputs, *, activation="gelu", norm=True, residual=True, return_stats=True, save_hidden=True, operand=None,
    allow_tf32=False,
) -> tuple:  # fmt: skip
    given = [inputs[name] for name in ORDER]
    if operand is None:
        operand = given[1].dtype if given[0].dtype == torch.float32 else given[0].dtype
    return (*given, None, activation, 1e-5, norm, residual, return_stats, save_hidden, operand, allow_tf32)


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), [*FUSED[:2], PAIR[0], PAIR[3]], ids=str)
def test_hidden_and_mean_rstd(shape, hidden, dtype, layout) -> None:
    inputs = make_inputs(shape, hidden, dtype)
    x = as_layout(inputs["x"], layout)
    _, mean_rstd, _, saved = FORWARD(*arguments({**inputs, "x": x}))
    d = {name: None if t is None else t.double() for name, t in inputs.items()}
    mean, var = reference.merge_stats(reference.sample_stats(d["x"]))
    torch.testing.assert_close(mean_rstd[:, 0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean_rstd[:, 1].double(), (var + 1e-5).rsqrt(), rtol=2e-6, atol=0)

    assert saved.dtype == dtype
    n = (
        torch.group_norm(d["x"], 1, d["norm_weight"], d["norm_bias"])
        .permute(0, 2, 3, 1)
        .reshape(-1, shape[1])
    )
    exact = n @ d["w1"].flatten(1).T + d["b1"]
    theirs = n.to(dtype) @ inputs["w1"].flatten(1).T + inputs["b1"]
    assert_close_to_fp64(saved.view(exact.shape), theirs, exact, ulps=8)


@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_hidden_beyond_float16(shape, hidden) -> None:
    inputs = make_inputs(shape, hidden, torch.float16, parameters=PLAIN)
    inputs["x"] = torch.full_like(inputs["x"], 6e4)
    inputs["w1"] = torch.full_like(inputs["w1"], 2.0)
    inputs["w1"][::2] *= -1
    for activation, most in (("gelu", 65504), ("relu_squared", float("inf"))):  # the latter's slope is 2 h
        options = {"norm": False, "residual": False, "return_stats": False, "activation": activation}
        rows = FORWARD(*arguments(inputs, **options))[3].view(-1, hidden)
        assert (rows[:, 1::2] == most).all()
        assert (rows[:, ::2] == -65504).all()


def test_tf32_changes_nothing_on_the_cpu() -> None:
    """TF32's own tiles compute the same; the interpreter multiplies in float32."""
    for shape, hidden in ONE_OF_EACH:
        inputs = make_inputs(shape, hidden)
        exact, tf32 = (FORWARD(*arguments(inputs, allow_tf32=allow)) for allow in (False, True))
        for name, a, b in zip(("y", "mean_rstd", "stats", "hidden"), exact, tf32, strict=True):
            if name != "stats":  # partials of other tiles
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        given = (inputs[name] for name in ORDER)
        x, *parameters = given
        saved = exact[3]
        gradients = [
            BACKWARD(x, x, exact[1], *parameters, saved, "gelu", True, True, True, True, torch.float32, allow)
            for allow in (False, True)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * a.abs().max().item())


def test_outputs_not_asked_for_are_empty() -> None:
    for shape, hidden in ONE_OF_EACH:
        inputs = make_inputs(shape, hidden, parameters=PLAIN)
        options = {"norm": False, "residual": False, "return_stats": False, "save_hidden": False}
        _, *others = FORWARD(*arguments(inputs, **options))
        assert [t.shape for t in others] == [(0,)] * 3


@pytest.mark.parametrize("shape", [(0, 8, 3, 4), (2, 8, 0, 4)], ids=str)
def test_nothing_to_compute(shape) -> None:
    y, mean_rstd, stats, saved = FORWARD(*arguments(make_inputs(shape, 12)))
    assert y.shape == shape
    assert mean_rstd.shape == (shape[0], 2)
    assert stats.shape[::2] == (shape[0], 3)
    assert saved.shape == (0,)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden"), ONE_OF_EACH, ids=str)
def test_weights_are_cast_by_the_kernels(shape, hidden, dtype, norm) -> None:
    """float32 weights as bfloat16 operands: the values of weights that were cast before, bit for bit."""
    inputs = make_inputs(
        shape, hidden, dtype, weight_dtype=torch.float32, parameters=VECTORS if norm else PLAIN
    )
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    cast = {**inputs, **{name: inputs[name].bfloat16() for name in ("w1", "w2")}}
    options = {"norm": norm, "operand": torch.bfloat16}
    ours, theirs = (FORWARD(*arguments(each, **options)) for each in (inputs, cast))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("shape", "hidden"), [*ONE_OF_EACH, PAIR[3]], ids=str)
def test_fakes_have_the_shapes_and_strides(shape, hidden, layout) -> None:
    inputs = make_inputs(shape, hidden, torch.bfloat16)
    inputs["x"] = as_layout(inputs["x"], layout)
    torch.library.opcheck(FORWARD, arguments(inputs), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden"), [((2, 17, 3, 4), 20), PAIR[1]], ids=str)
def test_fakes_of_the_backward(shape, hidden, vectors) -> None:
    """Each gradient has the dtype of what it belongs to."""
    inputs = make_inputs(shape, hidden, vector_dtype=vectors)
    x, *parameters = (inputs[name] for name in ORDER)
    _, mean_rstd, _, saved = FORWARD(*arguments(inputs, operand=torch.bfloat16))
    given = (x, x, mean_rstd, *parameters, saved, "gelu", True, True)
    for wanted in (True, False):
        options = (wanted, wanted, torch.bfloat16, False)
        torch.library.opcheck(BACKWARD, (*given, *options), test_utils=("test_schema", "test_faketensor"))


def test_autocast_leaves_the_weights_to_the_kernels() -> None:
    """The same values as of weights that were cast; their gradients are not rounded to bfloat16."""
    inputs = make_inputs((2, 17, 3, 4), 20)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        y = mlp(**leaves, residual=True)
        y.sum().backward()
    cast = {name: t.detach() for name, t in inputs.items()}
    cast |= {name: cast[name].bfloat16() for name in ("w1", "w2")}
    torch.testing.assert_close(y.detach(), mlp(**cast, residual=True), rtol=0, atol=0)
    for name in ("w1", "w2"):
        grad = leaves[name].grad
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.bfloat16().float())


def test_nothing_outside_the_outputs_is_written(monkeypatch) -> None:
    guard, blocks = 4096, []
    empty = torch.empty

    def guarded(size, *, dtype=None, device=None, memory_format=torch.contiguous_format):
        numel = torch.Size(size).numel()
        block = empty(numel + 2 * guard, dtype=dtype, device=device).fill_(123.0)
        blocks.append((block, numel))
        inner = block[guard : guard + numel]
        if memory_format is torch.channels_last:
            b, c, h, w = size
            return inner.view(b, h, w, c).permute(0, 3, 1, 2)
        return inner.view(size)

    for dtype in (torch.float32, torch.bfloat16):
        for shape, hidden in (*FUSED[:2], FUSED[4], *PAIR[1:]):
            inputs = make_inputs(shape, hidden, dtype)
            inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
            monkeypatch.setattr(torch, "empty", guarded)
            kernels.forward(*arguments(inputs))
            monkeypatch.undo()
    for block, numel in blocks:
        assert (block[:guard] == 123).all()
        assert (block[guard + numel :] == 123).all()
        assert not (block[guard : guard + numel] == 123).any()  # and every output is written
