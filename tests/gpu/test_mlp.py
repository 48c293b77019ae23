"""The MLP's numbers on the CUDA backends. Truth: the device's fp64; eager: contiguous, in the same dtype."""

import pytest
import torch
from helpers import (
    GRAD_LAYOUTS,
    HALVES,
    LAYOUTS,
    as_layout,
    assert_close_to_fp64,
    run,
    tiled_stats,
)
from mlp_helpers import (
    PLAIN,
    VECTORS,
    WEIGHT_LAYOUTS,
    WEIGHTS,
    as_weight_layout,
    eager,
    make_grad,
    make_inputs,
    truth,
)

import poolformer_kernels as pk
from poolformer_kernels import reference
from poolformer_kernels.ops import mlp
from poolformer_kernels.ops.mlp import mlp_with_stats
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

from .cases import DTYPES, FORMATS, assert_same_truth, like_on, on, over, truth_on
from .mlp_cases import (
    DTYPE,
    EACH,
    FORMS,
    FUSED,
    KERNELS,
    NARROW,
    ODD,
    PAIR,
    ROUNDS,
    SMALL,
    STAGES,
    assert_rule,
    check,
    each,
)

F32, BF16, F16 = DTYPES
ACTIVATIONS = tuple(reference.ACTIVATIONS)

pytestmark = pytest.mark.usefixtures("backend")


# ---- the error rule ----------------------------------------------------------------------------------------


@over("shape, hidden", cuda=[SMALL[0]])
def test_truth_of_the_device_is_the_cpus(shape, hidden) -> None:
    inputs = make_inputs(shape, hidden, BF16)
    assert_same_truth(truth, inputs, make_grad(inputs), residual=True)


@over(
    "shape, hidden, dtype, form",
    triton=[
        *each(STAGES, [BF16], ["residual"]),
        *((*problem, DTYPES[i % 3], "residual") for i, problem in enumerate(ODD)),
        *each([PAIR], [F32, F16], ["residual"]),
        *each([FUSED], [BF16], ["plain", "norm"]),
        *each([PAIR], [BF16], ["residual", "plain"]),
    ],
    cuda=[*each(NARROW, HALVES, FORMS), *each(ROUNDS, HALVES, ["plain", "residual"])],
)
def test_error_rule(shape, hidden, dtype, form) -> None:
    parameters, residual = FORMS[form]
    check(make_inputs(shape, hidden, dtype, parameters=parameters), layouts=FORMATS, residual=residual)


@over(
    "shape, hidden, out, dtype, parameters",
    triton=[
        ((2, 17, 5, 8), 20, 9, F32, ()),
        ((2, 64, 7, 7), 64, 330, BF16, PLAIN),
        ((1, 320, 6, 8), 33, 64, F16, VECTORS),
    ],
)
def test_another_number_of_outputs(shape, hidden, out, dtype, parameters) -> None:
    check(make_inputs(shape, hidden, dtype, out=out, parameters=parameters, conv=False), layouts=FORMATS)


@over(
    "shape, hidden, dtype, activation",
    triton=[*each([FUSED], [BF16], ACTIVATIONS[1:]), *each([PAIR], [BF16], ["relu"])],
    cuda=each([*SMALL, NARROW[3]], HALVES, ACTIVATIONS[1:]),
)
def test_activations(shape, hidden, dtype, activation) -> None:
    check(make_inputs(shape, hidden, dtype), layouts=FORMATS, activation=activation, residual=True)


@over(
    "shape, hidden, dtype, activation",
    triton=[*each([FUSED], [BF16], ["gelu", "relu"]), *each([PAIR], [F32], ["gelu"])],
    cuda=[*each([*SMALL, NARROW[3]], HALVES, ACTIVATIONS), *each(NARROW[4:], [BF16], ["gelu"])],
)
def test_saved_hidden_activations(shape, hidden, dtype, activation) -> None:
    check(
        make_inputs(shape, hidden, dtype), layouts=FORMATS, activation=activation, residual=True,
        save_hidden=True,
    )  # fmt: skip


@over("shape, hidden, without", triton=each([FUSED], VECTORS[::2]), cuda=each(SMALL, VECTORS))
def test_without_one_parameter(shape, hidden, without) -> None:
    parameters = tuple(name for name in VECTORS if name != without)
    check(make_inputs(shape, hidden, torch.bfloat16, parameters=parameters), residual=True)


@over(
    "shape, hidden, dtype, weight_dtype, vector_dtype",
    triton=[(*FUSED, F32, BF16, F32), (*FUSED, F16, F32, F32), (*PAIR, F32, F16, F16)],
    cuda=[
        *each(SMALL, HALVES, [F32], [F32]),
        *each(SMALL, [F16], [F16], [F32]),
        *each([*SMALL, NARROW[3]], [F32], HALVES, [F32]),
        *each(SMALL, [F32], [F16], [F16]),
    ],
)
def test_mixed_dtypes(shape, hidden, dtype, weight_dtype, vector_dtype) -> None:
    inputs = make_inputs(shape, hidden, dtype, weight_dtype=weight_dtype, vector_dtype=vector_dtype)
    check(inputs, layouts=FORMATS, residual=True)


@over(
    "shape, hidden, grad_layout",
    triton=each([((3, 24, 9, 6), 50), ((3, 200, 3, 6), 50)], GRAD_LAYOUTS),
    cuda=each([SMALL[0]], GRAD_LAYOUTS),
)
def test_layouts(shape, hidden, grad_layout, backend) -> None:
    inputs = make_inputs(shape, hidden, DTYPE[backend])
    inputs["x"] = as_layout(inputs["x"], "expanded")  # which repeats, so the others can hold it too
    check(inputs, as_layout(make_grad(inputs), grad_layout), layouts=LAYOUTS, residual=True)


@over(
    "shape, hidden, name, layout, weight_dtype",
    triton=each([((3, 24, 9, 6), 50), ((3, 200, 3, 6), 50)], WEIGHTS, WEIGHT_LAYOUTS, [BF16]),
    cuda=each([SMALL[0]], WEIGHTS, WEIGHT_LAYOUTS, [BF16, F32]),
)
def test_layouts_of_weights(shape, hidden, name, layout, weight_dtype, backend) -> None:
    inputs = make_inputs(shape, hidden, BF16, weight_dtype=weight_dtype)
    inputs[name] = as_weight_layout(inputs[name], layout)
    for activation in KERNELS[backend]:
        check(inputs, layouts=FORMATS, activation=activation, residual=True)


@over("shape, hidden", triton=[FUSED, PAIR])
def test_tf32_as_in_eager(shape, hidden, monkeypatch) -> None:
    """The error rule against eager in TF32, from whose settings ours is taken.

    Eager may round the operands to nearest, ours are truncated. With an ulp of u, the error of a product then
    has a mean square of 2 (u^2 / 12) + (2 u / 2)^2 instead of 2 (u^2 / 12): 7 times as much.
    """
    inputs = make_inputs(shape, hidden)
    grad = make_grad(inputs)
    cuda, cuda_grad = on("cuda", inputs), like_on("cuda", grad)
    without = run(mlp, cuda, cuda_grad, residual=True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    ours = run(mlp, cuda, cuda_grad, residual=True)
    theirs = run(eager, cuda, cuda_grad, residual=True)
    right = truth_on("cuda", truth, inputs, grad, residual=True)
    for name, exact in right.values.items():
        exact = exact.to(theirs[name].device)
        theirs[name] = exact + 7**0.5 * (theirs[name].double() - exact)
    assert_rule(ours, theirs, right, inputs, F32, F32)
    for name in ("y", "dx", "dw1", "dw2"):
        assert not torch.equal(ours[name], without[name])


# ---- hard values -------------------------------------------------------------------------------------------


@over(
    "shape, hidden, dtype, mean, sigma",
    triton=[
        (*PAIR, F32, 1e2, 1.0),
        (*FUSED, F32, 1e4, 1.0),
        (*PAIR, F32, 1e2, 1e-2),
        (*FUSED, BF16, 1e2, 1.0),
    ],
    cuda=each([SMALL[0], SMALL[2]], HALVES, [1e2], [1.0]),
)
def test_mean_much_larger_than_sigma(shape, hidden, dtype, mean, sigma) -> None:
    inputs = make_inputs(shape, hidden, dtype, mean=mean, sigma=sigma)
    for residual in (True, False):
        check(inputs, layouts=FORMATS, residual=residual)


@over(
    "shape, hidden, dtype, value",
    triton=[*each(EACH, [BF16], [float("nan"), float("inf")]), (*PAIR, F32, float("inf"))],
    cuda=each(SMALL, HALVES, [float("nan"), float("inf")]),
)
def test_a_sample_that_is_not_finite_stays_alone(shape, hidden, dtype, value) -> None:
    for parameters in (PLAIN, VECTORS):
        inputs = on("cuda", make_inputs(shape, hidden, dtype, parameters=parameters))
        clean = mlp(**inputs)
        inputs["x"][2, 3, 2, 4] = value
        y = mlp(**inputs)
        hurt = torch.zeros(y.shape, dtype=torch.bool, device=y.device)
        hurt[2 if parameters is VECTORS else (2, slice(None), 2, 4)] = True
        assert not y[hurt].isfinite().any()
        assert torch.equal(y[~hurt], clean[~hurt])


@over(
    "shape, hidden, activation",
    triton=[*each([FUSED], ACTIVATIONS), *each([PAIR], ["gelu", "relu"])],
    cuda=each(SMALL[:1], ACTIVATIONS),
)
@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2", "norm_weight", "norm_bias", "layer_scale"])
def test_nan_in_a_parameter_is_not_lost(shape, hidden, activation, name) -> None:
    parameters = tuple(vector for vector in VECTORS if vector != "drop_scale")
    inputs = on("cuda", make_inputs(shape, hidden, torch.bfloat16, parameters=parameters))
    inputs[name].view(-1)[3] = float("nan")
    y = mlp(**inputs, activation=activation)
    assert torch.equal(y.isnan(), eager(**inputs, activation=activation).isnan())
    assert y.isnan().any()


@over("shape, hidden", triton=[((0, 5, 8, 6), 9)], cuda=[((0, 64, 8, 6), 128)])
def test_empty_batch(shape, hidden, backend) -> None:
    inputs = on("cuda", make_inputs(shape, hidden, DTYPE[backend]))
    result = run(mlp, inputs, torch.empty_like(inputs["x"]), residual=True)
    assert result["y"].shape == shape
    for name in ("w1", "b1", "w2", "norm_weight", "layer_scale"):
        assert torch.equal(result[f"d{name}"], torch.zeros_like(inputs[name]))


@over(
    "shape, hidden",
    triton=[((70_000, 4, 3, 2), 8), ((70_000, 200, 1, 2), 8), ((70_000, 4, 6, 6), 8)],
    cuda=[((70_000, 64, 3, 2), 64), ((70_000, 128, 1, 1), 64)],
)
def test_batch_past_the_grid_limits(shape, hidden, backend) -> None:
    parameters = ("b1", "b2", "norm_weight", "norm_bias")
    inputs = on("cuda", make_inputs(shape, hidden, DTYPE[backend], parameters=parameters))
    tail = {**inputs, "x": inputs["x"][-3:]}
    grad = torch.ones_like(inputs["x"])
    whole, part = (run(mlp, given, grad[-len(given["x"]) :], residual=True) for given in (inputs, tail))
    tolerance = max(1e-5, torch.finfo(DTYPE[backend]).eps)
    for name in ("y", "dx"):
        torch.testing.assert_close(whole[name][-3:], part[name], rtol=tolerance, atol=tolerance)
    tokens = float(shape[0] * shape[2] * shape[3])
    assert torch.equal(whole["db2"], torch.full_like(whole["db2"], tokens))


# ---- statistics --------------------------------------------------------------------------------------------


@over(
    "shape, hidden, dtype, tiles",
    triton=[*each(EACH, [BF16], [1, 5, 33]), (*PAIR, F32, 5)],
    cuda=each(SMALL, HALVES, [1, 5, 33]),
)
def test_statistics_given(shape, hidden, dtype, tiles) -> None:
    inputs = make_inputs(shape, hidden, dtype, mean=30.0)
    check(inputs, layouts=FORMATS, stats=tiled_stats(inputs["x"], tiles), residual=True)


@over(
    "shape, hidden, dtype, form, layout",
    triton=[
        *each(EACH, [BF16], ["plain", "residual"], FORMATS),
        *each([PAIR, *ODD], [F32], ["residual"], FORMATS),
    ],
    cuda=[
        *each([*NARROW, ROUNDS[0], ROUNDS[3]], HALVES, ["plain", "residual"], FORMATS),
        *each(SMALL, [BF16], ["norm"], FORMATS),
    ],
)
def test_statistics_returned(shape, hidden, dtype, layout, form, backend) -> None:
    parameters, residual = FORMS[form]
    inputs = on("cuda", make_inputs(shape, hidden, dtype, parameters=parameters, mean=30.0))
    inputs["x"] = as_layout(inputs["x"], layout)
    for activation in KERNELS[backend]:
        options = {"activation": activation, "residual": residual}
        y, stats = mlp_with_stats(**inputs, **options)
        assert torch.equal(y, mlp(**inputs, **options))
        assert torch.equal(stats[..., 0].sum(1), torch.full_like(stats[:, 0, 0], y[0].numel()))
        flat = y.double().flatten(1)
        mean, variance = reference.merge_stats(stats.double())
        unit = torch.finfo(torch.float32).eps
        size = flat.abs().amax(1)
        assert ((mean - flat.mean(1)).abs() <= 8 * unit * size).all()
        exact = flat.var(1, correction=0)
        assert ((variance - exact).abs() <= 1e-5 * exact + (8 * unit * size) ** 2).all()


@over(
    "shape, hidden, dtype, layout",
    triton=[*each(EACH, [BF16], ["channels_last"]), (*FUSED, F32, "nchw")],
    cuda=each(SMALL, HALVES, FORMATS),
)
def test_a_block_through_statistics(shape, hidden, dtype, layout) -> None:
    """mixer, MLP, mixer: each normalises by what the one before hands on, not by another look at its x."""

    def block(x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, chained=True):
        affine = {"layer_scale": layer_scale, "drop_scale": drop_scale, "residual": True}
        pool = lambda t, stats: pool_mixer_with_stats(t, norm_weight, norm_bias, stats=stats, **affine)  # noqa: E731
        kept = lambda stats: stats if chained else None  # noqa: E731
        x, stats = pool(x, None)
        x, stats = mlp_with_stats(
            x, w1, b1, w2, b2, norm_weight=norm_weight, norm_bias=norm_bias, stats=kept(stats), **affine
        )
        return pool(x, kept(stats))[0]

    inputs = make_inputs(shape, hidden, dtype)
    grad = make_grad(inputs)
    cuda = on("cuda", {**inputs, "x": as_layout(inputs["x"], layout)})
    ours = run(block, cuda, like_on("cuda", grad))
    with pk.use_backend("reference"):
        theirs = run(block, on("cuda", inputs), like_on("cuda", grad), chained=False)
        doubled = {name: t.double() for name, t in on("cuda", inputs).items()}
        right = run(block, doubled, grad.cuda().double(), chained=False)
    for name, value in ours.items():
        assert_close_to_fp64(value, theirs[name], right[name], ulps=64, what=name)


# ---- autocast ----------------------------------------------------------------------------------------------


@over(
    "shape, hidden, x_dtype, half, form",
    triton=[
        (*FUSED, F32, BF16, "residual"),
        (*PAIR, F16, F16, "norm"),
        (*PAIR, BF16, BF16, "plain"),
    ],
    cuda=each(SMALL[:2], DTYPES, HALVES, FORMS),
)
def test_autocast(shape, hidden, x_dtype, half, form) -> None:
    """Eager's dtypes: half, but for a residual stream, which is float32. Gradients have their tensors'."""
    parameters, residual = FORMS[form]
    inputs = make_inputs(shape, hidden, parameters=parameters)
    inputs["x"] = inputs["x"].to(x_dtype)
    if form == "plain":
        inputs["x"] = inputs["x"].to(half).to(x_dtype)  # fc1's cast of it is then exact
    wanted = torch.float32 if residual else half
    grad = make_grad(inputs).to(half)

    def under_autocast(**tensors):
        with torch.autocast("cuda", half):
            return mlp(**tensors, residual=residual)

    def by_eager(x, **tensors):
        with torch.autocast("cuda", half):
            return eager(x.float(), **tensors, residual=residual)

    cuda = on("cuda", inputs)
    ours = run(under_autocast, cuda, like_on("cuda", grad).to(wanted))
    theirs = run(by_eager, cuda, like_on("cuda", grad).float())
    right = truth_on("cuda", truth, inputs, grad.float(), residual=residual)
    assert_rule(ours, theirs, right, inputs, wanted, half)
