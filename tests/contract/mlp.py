"""What the MLP promises on every target: values and gradients, shapes, layouts, dtypes, statistics.

Its hard values are in `mlp_numerics.py`, what it keeps for its backward and tokens as rows in
`mlp_backward.py`, what it promises as the token mixer does in `both.py`. What is specific to a target stands
in files of its own; which cases a target runs, in `targets.py`.
"""

import itertools
from functools import partial

import pytest
import torch
from support.devices import on
from support.layouts import LAYOUTS, WEIGHT_LAYOUTS, as_layout, as_weight_layout
from support.mlp import FORMS, PLAIN, VECTORS, WEIGHTS, eager, make_grad, truth
from support.operators import MLP
from support.problems import BACKENDS, HALVES
from support.rule import assert_close_to_fp64, assert_same, assert_statistics_of, bits, run

from poolformer_kernels import reference
from poolformer_kernels.layout import memory_format_of
from poolformer_kernels.ops import mlp
from poolformer_kernels.ops.mlp import mlp_with_stats
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

from .both import check_every_run
from .cases import over
from .check import check_of, laid, problem_of, values
from .common import BF16, BOTH, DTYPES, EACH, F32, FORMATS, INF, SMALL, TWO

OPERATOR = "mlp"
check, problem = partial(check_of, MLP), partial(problem_of, MLP)


def unit_of(inputs, float32: float, halves: float) -> float:
    """``float32``, or ``halves`` times the epsilon of a half x."""
    dtype = inputs["x"].dtype
    return float32 if dtype == F32 else halves * torch.finfo(dtype).eps


# ---- shapes ------------------------------------------------------------------------------------------------

SHAPES = (
    *(((2, 17, 5, 8), 68), ((2, 3, 1, 9), 12), ((2, 3, 9, 1), 5), ((3, 17, 1, 1), 33), ((2, 1, 5, 6), 1)),
    *(((2, 16, 6, 6), 1), ((3, 3, 13, 29), 12), ((2, 64, 7, 7), 256), ((1, 96, 7, 7), 384)),
    *(((1, 64, 14, 14), 257), ((5, 32, 1, 13), 300), ((1, 320, 2, 5), 1280), ((1, 96, 3, 11), 1000)),
    # samples that share tiles, several tiles, channels in one part and in two, padded, chunks that are cut
    *(((3, 64, 7, 9), 128), ((1, 96, 8, 16), 70), ((2, 128, 6, 7), 65), ((1, 192, 5, 13), 40)),
    *(((5, 17, 4, 9), 30), ((2, 1, 9, 4), 3), ((1, 80, 1, 33), 16), ((3, 17, 5, 7), 40)),
    *(((2, 2, 1, 1), 5), ((4, 1, 13, 2), 33), ((2, 96, 7, 5), 128), ((2, 64, 7, 5), 64), ((5, 64, 3, 1), 64)),
    # wide, or so few pixels that a tile has many samples
    *(((3, 320, 7, 7), 96), ((2, 200, 6, 6), 50), ((1, 513, 2, 16), 31), ((67, 5, 1, 3), 9)),
    *(((3, 33, 1, 1), 7), ((1, 513, 2, 3), 31), ((3, 132, 2, 3), 20), ((3, 132, 2, 3), 70)),
    *(((1, 160, 6, 11), 257), ((2, 128, 6, 11), 192), ((1, 64, 1, 1), 64), ((5, 128, 1, 3), 192)),
    *(((3, 17, 13, 29), 70), ((2, 96, 8, 16), 448), ((3, 192, 9, 6), 128)),
)
# Hopper's kernel for gelu has blocks that stay, 132 on an H200, and take 3 (2 from 128 channels on) tiles of
# 64 tokens a round. In the second round one tile is missing. Weights stay in shared memory where they fit.
ROUNDS = (
    *(((9, 64, 56, 57), 256), ((9, 64, 56, 57), 320), ((9, 96, 56, 57), 384)),
    *(((21, 128, 29, 28), 512), ((21, 192, 29, 28), 768)),
)
LARGE = (
    *(((2, 64, 5, 13), 4096), ((1, 192, 5, 13), 4096), ((4, 96, 14, 14), 384), ((3, 128, 14, 13), 512)),
    *(((4, 320, 14, 14), 640), ((513, 64, 7, 7), 64)),
    *(((8, 64, 56, 56), 256), ((4, 128, 28, 28), 512), ((3, 320, 14, 14), 1280), ((3, 512, 7, 7), 2048)),
    *(((2, 96, 56, 56), 384), ((2, 192, 28, 28), 768), *ROUNDS),
)


@over(also={"shape, hidden": SHAPES}, dtype=DTYPES, layout=FORMATS)
def test_shapes(target, shape, hidden, dtype, layout):
    check(target, problem(target, shape, hidden, dtype), layout=layout, residual=True)


@over(
    also={"shape, hidden": SHAPES[::4]},
    dtype=DTYPES,
    layout=FORMATS,
    form=["plain", "norm"],
    where=lambda target, hidden, dtype, **_: (
        "the error is that of one operand's rounding"
        if hidden == 1 and dtype in HALVES and target.backend in ("triton", "cuda")
        else None
    ),
)
def test_forms(target, shape, hidden, dtype, layout, form):
    parameters, residual = FORMS[form]
    inputs = problem(target, shape, hidden, dtype, parameters=parameters)
    check(target, inputs, layout=layout, residual=residual)


@pytest.mark.long
@over(
    kernels=True,
    also={"shape, hidden": LARGE},
    dtype=DTYPES,
    form=["plain", "residual"],
    layout=FORMATS,
    where=lambda target, shape, hidden, dtype, form, **_: (
        "only a device computes all of them in a minute"
        if target.device == "cpu" and (form == "plain" or dtype == torch.float16 or (shape, hidden) in ROUNDS)
        else None
    ),
)
def test_large_shapes(target, shape, hidden, dtype, form, layout):
    parameters, residual = FORMS[form]
    inputs = problem(target, shape, hidden, dtype, parameters=parameters)
    check(target, inputs, layout=layout, residual=residual)


@pytest.mark.long
@over(
    kernels=True,
    also={
        "shape, hidden": [((16, 64, 56, 56), 256), ((16, 512, 7, 7), 2048), ((16, 17, 13, 29), 70), *ROUNDS]
    },
    dtype=DTYPES,
    layout=FORMATS,
    where=lambda target, **_: None if target.device == "cuda" else "the CPU divides smaller ones likewise",
)
def test_every_run_on_large_inputs_has_the_same_bits(target, shape, hidden, dtype, layout):
    check_every_run(MLP, target, problem(target, shape, hidden, dtype), layout)


@over(
    also={
        "shape, hidden, out": [
            *(((2, 17, 5, 8), 20, 9), ((2, 17, 5, 8), 5, 1), ((2, 1, 5, 8), 5, 40), ((2, 64, 7, 7), 64, 10)),
            *(((1, 3, 13, 29), 12, 3), ((1, 24, 4, 9), 260, 100), ((2, 9, 3, 11), 1061, 37)),
            *(((3, 33, 1, 1), 7, 65), ((2, 17, 5, 8), 20, 17), ((2, 64, 7, 7), 64, 330)),
            *(((1, 320, 6, 8), 33, 64), ((2, 132, 2, 5), 40, 21), ((4, 17, 5, 8), 36, 24)),
        ]
    },
    parameters=["biases", "all", "none"],
    dtype=DTYPES,
    layout=FORMATS,
    where=lambda target, hidden, **_: (
        None
        if target.kernels or hidden < 1000
        else "sums of 1061 products are in the order of PyTorch's library"
    ),
)
def test_another_width(target, shape, hidden, out, parameters, dtype, layout):
    """sigma(X W1) W2 with a norm, biases and scales or without: no residual, any number of channels out."""
    given = {"biases": PLAIN, "all": VECTORS, "none": ()}[parameters]
    inputs = problem(target, shape, hidden, dtype, out=out, parameters=given, conv=bool(given))
    check(target, inputs, layout=layout)


@over(
    also={
        "shape, hidden": [
            *(((2, 320, 5, 7), 1280), ((2, 768, 5, 7), 96), ((2, 24, 5, 7), 3072)),
            *(((1, 320, 3, 5), 1280), ((1, 24, 3, 5), 3072), ((1, 64, 5, 7), 1600)),
        ]
    },
    dtype=DTYPES,
)
def test_long_sums(target, shape, hidden, dtype):
    """No residual hides them: one running float32 sum over a long row is less exact than eager's."""
    inputs = problem(target, shape, hidden, dtype, parameters=PLAIN)
    grad = make_grad(inputs)
    found = values(target, mlp, inputs, grad)
    theirs = run(eager, on(target.device, inputs), grad.to(target.device))
    right = truth(inputs, grad)
    for name in {"y", "dx"} & found.keys():  # relative to the values themselves
        ulps = target.ulps[1]
        assert_close_to_fp64(found[name], theirs[name], right.values[name], ulps=ulps, what=name)


@over(
    also={"save_hidden, dtype": itertools.product(BOTH, DTYPES)},
    layout=FORMATS,
    out=[24, None],
    form=["norm", "all"],
)
def test_norm_to_another_width(target, save_hidden, dtype, layout, out, form):
    given = VECTORS if form == "all" else FORMS[form][0]
    inputs = problem(target, (4, 17, 5, 8), 36, dtype, out=out, parameters=given)
    check(target, inputs, layout=layout, save_hidden=save_hidden)


@over(tokens=(1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97), dtype=TWO, layout=FORMATS)
def test_numbers_of_tokens(target, tokens, dtype, layout):
    """Around the sizes of tiles, where samples share tiles and the last one is partly empty."""
    check(target, problem(target, (2, 20, 1, tokens), 40, dtype), layout=layout, residual=True)


@over(
    also={
        "channels, hidden": [
            (channels, hidden)
            for channels in (2, 7, 15, 16, 31, 32, 33, 48, 63, 65, 129)
            for hidden in (channels + 1, 2 * channels - 1)
        ]
    },
    dtype=TWO,
)
def test_numbers_of_channels(target, channels, hidden, dtype):
    """Around the sizes of vectors and matrix tiles: the channels and the hidden ones each on either side."""
    inputs = problem(target, (2, channels, 3, 7), hidden, dtype)
    check(target, inputs, layout="channels_last", residual=True)


@over(
    kernels=True,
    also={
        "shape, hidden": [
            *(((70_000, 4, 3, 2), 8), ((70_000, 200, 1, 2), 8), ((70_000, 4, 6, 6), 8)),
            *(((70_000, 64, 3, 2), 64), ((70_000, 128, 1, 1), 64), ((513, 64, 7, 7), 64)),
        ]
    },
)
def test_more_samples_than_a_grid_has_rows(target, shape, hidden):
    """The last ones are those of a call on them alone, and every token is counted once."""
    inputs = problem(target, shape, hidden, parameters=FORMS["norm"][0])
    grad = torch.ones_like(inputs["x"])
    whole = values(target, mlp, inputs, grad, residual=True)
    part = values(target, mlp, {**inputs, "x": inputs["x"][-3:]}, grad[-3:], residual=True)
    unit = unit_of(inputs, 1e-5, 1)
    for name in ("y", "dx"):
        torch.testing.assert_close(whole[name][-3:], part[name], rtol=unit, atol=unit)
    tokens = float(shape[0] * shape[2] * shape[3])
    assert torch.equal(whole["db2"], torch.full_like(whole["db2"], tokens))


@over(
    kernels=True,
    also={
        "shape, hidden": [((65, 8, 7, 7), 9), ((17, 8, 14, 14), 9), ((5, 8, 28, 28), 9), ((1, 4, 57, 59), 9)]
    },
    dtype=DTYPES,
    save_hidden=BOTH,
    layout=FORMATS,
    where=lambda target, **_: (
        None if target.elements == INF else "what divides its tokens has tests of its own, on fewer"
    ),
)
def test_groups_in_the_backward(target, shape, hidden, dtype, save_hidden, layout):
    """More tokens than it holds at once: groups of samples, a short last one, one large image."""
    inputs = problem(target, shape, hidden, dtype)
    check(target, inputs, layout=layout, save_hidden=save_hidden, residual=True)


@over(
    also={"hidden, shape": [(1376, (1, 64, 7, 7)), (1376, (1, 64, 14, 14)), (2656, (1, 64, 7, 7)),
                            (2656, (4, 64, 7, 7)), (1376, (1, 64, 6, 7))]},
    dtype=DTYPES,
)  # fmt: skip
def test_few_tokens_and_many_hidden_channels(target, hidden, shape, dtype):
    """The last part of the hidden channels, which threads share, is smaller than the others."""
    inputs = problem(target, shape, hidden, dtype)
    check(target, inputs, layout="channels_last")


# ---- layouts -----------------------------------------------------------------------------------------------


@over(layout=LAYOUTS, dtype=TWO, form=("residual", "plain"))
def test_layouts_of_x(target, layout, dtype, form):
    parameters, residual = FORMS[form]
    out = 9 if form == "plain" and target.backend != "cuda" else None
    inputs = problem(target, *SMALL, dtype, parameters=parameters, out=out)
    found = check(target, inputs, layout=layout, residual=residual)
    if target.exact:
        inputs, grad = laid(inputs, layout), as_layout(make_grad(inputs), layout)
        dense = inputs | {"x": inputs["x"].contiguous(memory_format=memory_format_of(inputs["x"]))}
        assert_same(found, values(target, mlp, dense, grad, residual=residual))


@over(
    pairs=True,
    also={
        "weight_layout, conv": [
            *((layout, True) for layout in WEIGHT_LAYOUTS),
            *((layout, False) for layout in WEIGHT_LAYOUTS if layout != "channels_last"),
        ],
        "dtype, weight_dtype": [(F32, F32), (BF16, BF16), (BF16, F32)],
    },
    activation=("gelu", "relu"),
    where=lambda target, activation, **_: (
        "gelu reaches its only forward" if activation != "gelu" and target.backend != "cuda" else None
    ),
)
def test_layouts_of_weights(target, weight_layout, conv, dtype, weight_dtype, activation):
    """The two have different ones."""
    inputs = problem(target, (2, 17, 3, 5), 20, dtype, weight_dtype=weight_dtype, conv=conv)
    i, layouts = WEIGHT_LAYOUTS.index(weight_layout), WEIGHT_LAYOUTS if conv else WEIGHT_LAYOUTS[1:]
    inputs["w1"] = as_weight_layout(inputs["w1"], weight_layout)
    inputs["w2"] = as_weight_layout(inputs["w2"], layouts[(i + 2) % len(layouts)])
    found = check(target, inputs, layout="channels_last", residual=True, activation=activation)
    if target.exact:
        plain = laid({name: t.contiguous() for name, t in inputs.items()}, "channels_last")
        grad = as_layout(make_grad(plain), "channels_last")
        assert_same(found, values(target, mlp, plain, grad, residual=True, activation=activation))


@over(dtype=TWO)
def test_linear_and_conv_weights_are_the_same(target, dtype):
    """One of each too: nn.Linear's weight is [out, in], nn.Conv2d's [out, in, 1, 1]."""
    results = []
    for first, second in ((True, True), (False, False), (True, False), (False, True)):
        inputs = problem(target, (2, 17, 3, 5), 20, dtype, conv=first)
        inputs["w2"] = problem(target, (2, 17, 3, 5), 20, dtype, conv=second)["w2"]
        found = values(target, mlp, inputs, make_grad(inputs), residual=True)
        for name in WEIGHTS:
            assert found[f"d{name}"].shape == inputs[name].shape
            found[f"d{name}"] = found[f"d{name}"].flatten(1)
        results.append(found)
    for other in results[1:]:
        assert_same(other, results[0])


# ---- dtypes and parameters ---------------------------------------------------------------------------------

MIXED = [
    *((half, F32, F32) for half in HALVES),
    *((F32, half, vector) for half in HALVES for vector in (F32, half)),
    *((half, half, F32) for half in HALVES),
]


@over(
    also={**EACH, "dtype, weight_dtype, vector_dtype": MIXED},
    form=("residual", "plain"),
    save_hidden=BOTH,
    layout=FORMATS,
)
def test_mixed_dtypes(target, shape, hidden, dtype, weight_dtype, vector_dtype, form, save_hidden, layout):
    parameters, residual = FORMS[form]
    out = 9 if form == "plain" and target.backend != "cuda" else None
    dtypes = {"weight_dtype": weight_dtype, "vector_dtype": vector_dtype}
    inputs = problem(target, shape, hidden, dtype, out=out, parameters=parameters, **dtypes)
    check(target, inputs, layout=layout, save_hidden=save_hidden, residual=residual)


@over(also=EACH, parameters=[(), PLAIN, ("b2", "drop_scale")], residual=BOTH, dtype=DTYPES)
def test_a_norm_without_parameters(target, shape, hidden, parameters, residual, dtype):
    inputs = problem(target, shape, hidden, dtype, parameters=parameters)
    grad = make_grad(inputs)
    normed = check(target, inputs, grad, residual=residual, norm=True)["y"]
    plain = check(target, inputs, grad, residual=residual, norm=False)["y"]
    assert not torch.equal(normed, plain)
    assert_same({"y": values(target, mlp, inputs, grad, residual=residual)["y"]}, {"y": plain})


# ---- statistics given and returned -------------------------------------------------------------------------


OF_STATISTICS = (
    *(((3, 18, 6, 9), 20), ((2, 5, 1, 1), 20), ((1, 65, 14, 14), 20), ((2, 200, 6, 6), 50)),
    *(((3, 64, 7, 9), 128), ((1, 96, 8, 16), 70), ((5, 17, 4, 9), 30), ((3, 320, 7, 7), 96)),
    *(((1, 513, 2, 16), 31), ((67, 5, 1, 3), 9), ((5, 16, 8, 8), 20), ((2, 8, 1, 130), 16)),
    *(((9, 8, 4, 8), 16), ((3, 64, 9, 13), 64), ((2, 64, 8, 8), 64), ((5, 64, 1, 65), 64)),
    *(((4, 96, 7, 7), 64), ((1, 192, 5, 26), 64)),
)


@over(
    also={
        "shape, hidden, mean, form": [
            (*case, mean, form)
            for i, case in enumerate(OF_STATISTICS)
            for mean, form in itertools.product((-2.3, 30.0, 1e3), FORMS)
            if i < 3 or (mean, form) in ((-2.3, "norm"), (30.0, "plain"), (1e3, "residual"))
        ],
        "dtype, weight_dtype": [*((dtype, dtype) for dtype in DTYPES), (F32, BF16)],
    },
    layout=FORMATS,
)
def test_returned_statistics_are_those_of_the_rounded_y(
    target, shape, hidden, mean, form, dtype, weight_dtype, layout
):
    parameters, residual = FORMS[form]
    out = None if form == "residual" or target.backend == "cuda" else 7
    inputs = problem(
        target, shape, hidden, dtype, weight_dtype=weight_dtype, mean=mean, out=out, parameters=parameters
    )
    inputs = on(target.device, laid(inputs, layout))
    for activation in ("gelu", "relu") if target.backend == "cuda" else ("gelu",):  # each forward there is
        options = {"residual": residual, "activation": activation}
        y, stats = mlp_with_stats(**inputs, **options)
        assert torch.equal(bits(y), bits(mlp(**inputs, **options)))
        assert stats.shape[::2] == (shape[0], 3)
        assert_statistics_of(stats.cpu(), y.cpu())
        if target.backend in BACKENDS and (shape, hidden) in OF_STATISTICS[:3]:
            assert_near(stats, y)


def assert_near(stats: torch.Tensor, y: torch.Tensor) -> None:
    """The means of the tiles that were merged are float32: each is off by up to an ulp of itself."""
    flat = y.double().flatten(1)
    mean, variance = reference.merge_stats(stats.double())
    assert_close_to_fp64(mean.float(), None, flat.mean(1), scale=flat.abs().amax(1), what="mean")
    shift, exact = torch.finfo(F32).eps * flat.mean(1).abs(), flat.var(1, correction=0)
    assert ((variance - exact).abs() <= 2e-6 * exact + 0.1 * shift * exact.sqrt() + shift**2).all()


@over(also=EACH, dtype=DTYPES, layout=FORMATS)
def test_a_block_through_statistics(target, shape, hidden, dtype, layout):
    """Mixer, MLP, mixer, each on the last one's statistics, equal those that compute their own."""
    inputs = laid(problem(target, shape, hidden, dtype), layout)

    def block(x, given: bool, **parameters):
        mixer = {"weight": parameters["norm_weight"], "bias": parameters["norm_bias"], "residual": True}
        y, stats = pool_mixer_with_stats(x, **mixer)
        y, stats = mlp_with_stats(y, residual=True, stats=stats if given else None, **parameters)
        return pool_mixer_with_stats(y, stats=stats if given else None, **mixer)[0]

    grad = as_layout(make_grad(inputs), layout)
    given, computed = (values(target, block, inputs, grad, given=g) for g in (True, False))
    for name, value in given.items():
        error = (value.double() - computed[name].double()).norm() / computed[name].double().norm()
        assert error <= unit_of(inputs, 2e-5, 4), (name, error)
