"""What both operators promise on every target: batches, layouts, statistics, determinism.

Their shapes and what is hard for one of them are in `pool_mixer.py`, `mlp.py` and `mlp_numerics.py`.
"""

import itertools
from collections.abc import Iterable

import torch
from support.devices import like_on, on
from support.layouts import GRAD_LAYOUTS, LAYOUTS, VECTOR_LAYOUTS, as_layout, as_vector_layout
from support.mlp import VECTORS
from support.operators import MLP, POOL_MIXER, Operator
from support.pool_mixer import PARAMETERS
from support.problems import HALVES, Tensors, tiled_stats
from support.rule import assert_same, assert_statistics_of

from poolformer_kernels import reference

from .cases import over
from .check import check_of, given, laid, of_mean, problem_of, same_pattern, shift_some_channels, values
from .common import ACTIVATIONS, BF16, BOTH, DTYPES, EACH, F16, F32, FORMATS, INF, NAN, SMALL, TINY, TWO, WIDE
from .targets import Target

# ---- batches -----------------------------------------------------------------------------------------------


@over(
    pool_mixer={"shape": [(5, 17, 9, 6), (5, 16, 9, 6), (7, 64, 20, 20)], "dtype": TWO, "layout": FORMATS},
    mlp={
        "shape, hidden": [SMALL, WIDE, ((4, 64, 9, 9), 128)],
        "dtype": DTYPES,
        "layout": FORMATS,
        "activation": ACTIVATIONS,
    },
)
def test_a_sample_does_not_depend_on_its_batch(target, operator, shape, hidden, dtype, layout, activation):
    inputs = laid(problem_of(operator, target, shape, hidden, dtype), layout)
    grad, options = operator.grad(inputs), given(residual=True, activation=activation)
    whole = values(target, operator.call, inputs, grad, **options)
    one = inputs | {"x": inputs["x"][2:3], "drop_scale": inputs["drop_scale"][2:3]}
    alone = values(target, operator.call, one, grad[2:3], **options)
    for name in {"y", "dx", "ddrop_scale"} & whole.keys():
        if target.exact and (len(grad) < 7 or name != "ddrop_scale"):  # small batches have smaller tiles
            assert_same({name: alone[name]}, {name: whole[name][2:3]})
        else:
            unit = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(alone[name], whole[name][2:3], rtol=unit, atol=unit * 8)


@over(
    pool_mixer={"shape": [(0, 5, 3, 4)]},
    mlp={"shape, hidden": [((0, 5, 3, 4), 7), ((0, 200, 3, 4), 7)], "save_hidden": BOTH},
    layout=FORMATS,
    residual=BOTH,
)
def test_no_samples(target, operator, shape, hidden, save_hidden, layout, residual):
    inputs = laid(problem_of(operator, target, shape, hidden), layout)
    options = given(residual=residual, save_hidden=save_hidden)
    found = values(target, operator.call, inputs, operator.grad(inputs), **options)
    assert found["y"].shape == found["dx"].shape == inputs["x"].shape
    assert found["ddrop_scale"].shape == (0,)
    for name in inputs.keys() - {"x", "drop_scale"}:
        zeros = torch.zeros_like(inputs[name])
        torch.testing.assert_close(found[f"d{name}"].cpu(), zeros, rtol=0, atol=0, msg=name)
    y, stats = operator.with_stats(**on(target.device, inputs), residual=residual)
    assert y.shape == inputs["x"].shape
    assert stats.shape[::2] == (0, 3)


@over(
    pool_mixer={"shape": [(513, 5, 3, 4), (70_000, 4, 3, 2)]},  # more than a grid has rows
    mlp={"shape, hidden": [((513, 5, 1, 3), 9), ((513, 24, 1, 1), 33)], "save_hidden": BOTH},
    dtype=DTYPES,
    layout=FORMATS,
)
def test_many_samples(target, operator, shape, hidden, save_hidden, dtype, layout):
    inputs = problem_of(operator, target, shape, hidden, dtype)
    check_of(operator, target, inputs, layout=layout, save_hidden=save_hidden, residual=True)


# ---- layouts, dtypes and parameters ------------------------------------------------------------------------


@over(
    pool_mixer={
        "grad_layout": GRAD_LAYOUTS,
        "layout": FORMATS,
        "dtype": TWO,
        "shape": [(3, 17, 6, 9), (3, 8, 8, 4)],
    },
    mlp={**EACH, "grad_layout": GRAD_LAYOUTS, "layout": [*FORMATS, "expanded"], "dtype": TWO},
)
def test_layouts_of_the_gradient(target, operator, shape, hidden, grad_layout, layout, dtype):
    inputs = problem_of(operator, target, shape, hidden, dtype)
    grad = as_layout(operator.grad(inputs), grad_layout)
    found = check_of(operator, target, inputs, grad, layout=layout, residual=True)
    # a dense gradient off 16 bytes has a launch of its own on the GPU's Triton, with another order of sums
    if target.exact and not (target.name == "triton" and grad_layout.startswith("offset")):
        inputs = laid(inputs, layout)
        assert_same(found, values(target, operator.call, inputs, grad.contiguous(), residual=True))


# the strides of a sample and a row, or of a channel, say nothing
ROW, CHANNEL = (1, 64, 1, 12), (1, 1, 9, 9)


@over(
    pool_mixer={"shape, layout": itertools.product((ROW, CHANNEL), LAYOUTS)},
    mlp={
        "shape, hidden, out, layout": [
            *((ROW, 64, None, layout) for layout in LAYOUTS),
            *((CHANNEL, 20, 6, layout) for layout in LAYOUTS),
        ]
    },
)
def test_strides_of_sides_of_1(target, operator, shape, hidden, out, layout):
    """x may have another stride there than either memory format."""
    check_of(operator, target, problem_of(operator, target, shape, hidden, **given(out=out)), layout=layout)


@over(pool_mixer={"shape": [ROW]}, mlp={"shape, hidden": [(ROW, 64)]}, layout=["sliced_hw_last"])
def test_a_row_of_a_larger_image(target, operator, shape, hidden, layout):
    """The one of these that CUDA C++ refused: in `make test` on every target."""
    check_of(operator, target, problem_of(operator, target, shape, hidden), layout=layout)


@over(
    pairs=True,
    pool_mixer={
        "shape": [(5, 6, 4, 5)],
        "names": PARAMETERS,
        "vector_layout": VECTOR_LAYOUTS,
        "layout": FORMATS,
    },
    mlp={
        "shape, hidden": [((5, 6, 4, 5), 10), ((2, 200, 1, 7), 20)],
        "names": (*VECTORS, "all"),
        "vector_layout": VECTOR_LAYOUTS,
        "layout": ["nchw"],
    },
)
def test_layouts_of_vectors(target, operator, shape, hidden, names, vector_layout, layout):
    inputs = problem_of(operator, target, shape, hidden)
    for name in operator.vectors if names == "all" else (names,):
        inputs[name] = as_vector_layout(inputs[name], vector_layout)
    check_of(operator, target, inputs, layout=layout, residual=True)


@over(
    pool_mixer={"shape": [(2, 17, 6, 9)], "floats": [("bias", "drop_scale"), ("weight",), ("layer_scale",)]},
    mlp={
        "shape, hidden": [SMALL],
        "floats": [("b2", "norm_bias", "drop_scale"), ("b1",), ("norm_weight",), ("layer_scale",)],
    },
    dtype=HALVES,
)
def test_each_vector_has_its_own_dtype(target, operator, shape, hidden, floats, dtype):
    inputs = problem_of(operator, target, shape, hidden, dtype)
    inputs |= {name: inputs[name].float() for name in floats}
    check_of(operator, target, inputs, layout="nchw", residual=True)


def some_of(names: tuple[str, ...], sizes: Iterable[int]) -> list[tuple[str, ...]]:
    return [some for size in sizes for some in itertools.combinations(names, size)]


@over(
    kernels=True,
    pool_mixer={"shape": [(4, 17, 9, 10), (3, 16, 8, 8)]},
    mlp={"shape, hidden": [((4, 17, 9, 10), 40), WIDE, ((5, 64, 8, 8), 64)]},
    dtype=HALVES,
    layout=FORMATS,
    residual=BOTH,
)
def test_halves_are_rounded_to_nearest(target, operator, shape, hidden, dtype, layout, residual):
    """Cut off, values are half an ulp too near to zero on average, which no rule for single errors shows."""
    inputs = laid(problem_of(operator, target, shape, hidden, dtype), layout)
    grad = operator.grad(inputs)
    found = values(target, operator.call, inputs, grad, residual=residual)
    right = operator.problem.truth(inputs, grad, residual=residual).values
    for name, value in found.items():
        exact, value = right[name].flatten(), value.cpu().double().flatten()
        some = exact.abs() > 0.1 * exact.abs().max()
        if some.sum() >= 300 or name in ("y", "dx"):
            ulp = torch.finfo(dtype).eps * exact.abs().log2().floor().exp2()
            outwards = ((value - exact) * exact.sign() / ulp)[some].mean().item()
            assert abs(outwards) < 0.25, name


@over(
    pairs=True,
    pool_mixer={"parameters": some_of(PARAMETERS, (0, 1, 2, 3, 4))},
    mlp={"parameters": some_of(VECTORS, (0, 1, 2, 5, 6))},
    residual=BOTH,
    dtype=TWO,
)
def test_absent_parameters(target, operator, parameters, residual, dtype):
    """No biases, no norm or one half of it, no LayerScale, no drop path: none, one, two, or all of them."""
    inputs = problem_of(operator, target, *TINY, dtype, parameters=parameters)
    check_of(operator, target, inputs, residual=residual)


@over(pool_mixer={"shape": [(2, 9, 6, 7)]}, mlp=EACH, eps=(0.0, 1e-12, 1e-3, 10.0))
def test_eps(target, operator, shape, hidden, eps):
    inputs = problem_of(operator, target, shape, hidden, sigma=0.1)
    check_of(operator, target, inputs, residual=True, eps=eps)


# ---- few digits, infinity and NaN --------------------------------------------------------------------------


@over(
    pool_mixer={"shape": [(2, 24, 11, 14)], "dtype": (F32, F16)},
    mlp={"shape, hidden": [((6, 24, 11, 14), 56), ((3, 200, 3, 6), 50)], "dtype": DTYPES},
    offset=(10.0, 1e3),
    layout=FORMATS,
    residual=BOTH,
)
def test_channels_with_their_own_means(target, operator, shape, hidden, dtype, offset, layout, residual):
    inputs = problem_of(operator, target, shape, hidden, dtype)
    shift_some_channels(inputs["x"], offset)
    ulps = of_mean(target, 8) if operator is MLP else 0
    check_of(operator, target, inputs, layout=layout, residual=residual, ulps=ulps)


@over(
    pool_mixer={"shape": [(2, 24, 11, 14)]},
    mlp={"shape, hidden": [((2, 24, 11, 14), 56), ((2, 200, 3, 6), 50)]},
    also={
        "dtype, mean, sigma": [
            *((F32, mean, 1) for mean in (1e2, 1e3, 1e4, -1e4)),
            *((F32, m, s) for m, s in ((-1e3, 30), (100, 1e-2), (0, 1e-6), (0, 1e5))),
            *((BF16, m, s) for m, s in ((1e2, 1), (1e3, 10), (-1e4, 100), (0, 1e-6), (0, 1e5))),
            *((F16, m, s) for m, s in ((1e2, 1), (-1e4, 100), (0, 1e-3))),
        ],
    },
    residual=BOTH,
    layout=FORMATS,
)
def test_a_mean_far_from_zero(target, operator, shape, hidden, dtype, mean, sigma, residual, layout):
    """The mean is a float32 and its last digit a matter of luck, in eager too: the MLP's has an ulp of it.

    Its error is the same for all tokens of a sample: where terms are summed it adds up, as rounding does not.
    """
    inputs = problem_of(operator, target, shape, hidden, dtype, mean=mean, sigma=sigma)
    ulps = {}
    if operator is MLP:
        coherent = inputs["x"][0].numel() ** 0.5
        ulps = {name: of_mean(target, 8 + abs(mean) / sigma) for name in ("y", "dx", "dw1", "dw2")}
        of_x = [name for name in VECTORS if name != "b2"]
        ulps |= {f"d{name}": of_mean(target, 8 + coherent * abs(mean) / sigma) for name in of_x}
    check_of(operator, target, inputs, layout=layout, residual=residual, ulps=ulps)


@over(
    pool_mixer={"shape": [(3, 17, 6, 9)], "name": POOL_MIXER.names, "dtype": DTYPES},
    mlp={**EACH, "name": ["b2", "layer_scale", "drop_scale"], "dtype": TWO},
    bad=(NAN, INF, -INF),
    layout=FORMATS,
    residual=BOTH,
)
def test_not_finite_where_eager_is_not(target, operator, shape, hidden, name, bad, dtype, layout, residual):
    inputs = problem_of(operator, target, shape, hidden, dtype)
    inputs[name].view(-1)[5 if len(inputs[name]) > 5 or name == "x" else 1] = bad
    # in float32: in half precision some differences are rounded to 0, and 0 times infinity is NaN
    floats = {name: t.float() for name, t in inputs.items()}
    expected = operator.problem.eager(**floats, residual=residual)
    finite = expected.isfinite()
    assert finite.any()
    assert not finite.all()
    y = operator.call(**on(target.device, laid(inputs, layout)), residual=residual).cpu()
    if operator is MLP and name != "b2" and dtype != F32:  # the sign of a number near 0 decides on infinity's
        assert torch.equal(y.isfinite(), finite)
    else:
        assert same_pattern(y, expected)
    if operator is POOL_MIXER:
        torch.testing.assert_close(y[finite].float(), expected[finite], rtol=0.05, atol=0.05)


@over(pool_mixer={"shape": [(3, 17, 6, 9)]}, mlp=EACH, bad=(NAN, INF), layout=FORMATS)
def test_a_gradient_that_is_not_finite_stays_in_its_sample(target, operator, shape, hidden, bad, layout):
    parameters = operator.vectors[:-2]  # neither layer_scale nor drop_scale
    inputs = laid(problem_of(operator, target, shape, hidden, parameters=parameters), layout)
    grad = operator.grad(inputs)
    clean = values(target, operator.call, inputs, grad, residual=True)["dx"]
    grad[1, 3, 2, 2] = bad
    dx = values(target, operator.call, inputs, grad, residual=True)["dx"]
    assert not dx[1].isfinite().any()
    assert torch.equal(dx[[0, 2]], clean[[0, 2]])


# ---- statistics given and returned -------------------------------------------------------------------------

NORMED = {"pool_mixer": {"shape": [(3, 18, 6, 9)]}, "mlp": EACH}


@over(**NORMED, tiles=(1, 2, 5, 7, 33, 300), mean=(0.0, 40.0, 1e3), dtype=DTYPES, layout=FORMATS)
def test_given_statistics(target, operator, shape, hidden, tiles, mean, dtype, layout):
    """The partials' means are rounded to float32: against sigma that is an error of |mean| / sigma ulps."""
    inputs = laid(problem_of(operator, target, shape, hidden, dtype, mean=mean, sigma=2.0), layout)
    ulps = of_mean(target, 8 + mean / 2) if operator is MLP else mean / 2
    stats = tiled_stats(inputs["x"], tiles)
    check_of(operator, target, inputs, layout=layout, stats=stats, residual=True, ulps=ulps)


@over(repeats=True, **NORMED, dtype=TWO)
def test_given_statistics_in_other_layouts(target, operator, shape, hidden, dtype):
    inputs = problem_of(operator, target, shape, hidden, dtype)
    grad, stats = operator.grad(inputs), tiled_stats(inputs["x"], 5)

    def values_of(stats: torch.Tensor) -> dict:
        return values(target, operator.of_stats, inputs, grad, residual=True, stats=stats)

    expected = values_of(stats.to(target.device))
    transposed = stats.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    swapped = stats.transpose(1, 2).contiguous().transpose(1, 2)
    offset = torch.full((stats.numel() + 1,), NAN)[1:].view(stats.shape).copy_(stats)
    sliced = torch.full((3, 12, 4), NAN)[:, 1:11:2, 1:].copy_(stats)
    for other in (transposed, swapped, offset, sliced, torch.stack([stats] * 2)[1]):
        there = like_on(target.device, other)
        assert_same(values_of(there), expected)
        assert torch.equal(there.cpu(), stats)


@over(**NORMED)
def test_given_statistics_are_used_and_not_differentiable(target, operator, shape, hidden):
    """A quarter of the variance with eps = 0 is twice the norm's weight; the statistics get no gradient."""
    inputs = on(target.device, problem_of(operator, target, shape, hidden))
    scaled = torch.tensor([1.0, 1.0, 0.25], device=target.device)
    quarter = reference.sample_stats(inputs["x"]) * scaled
    doubled = operator.call(**inputs | {operator.norm_weight: 2 * inputs[operator.norm_weight]}, eps=0.0)
    y, returned = operator.with_stats(**inputs, eps=0.0, stats=quarter, return_stats=False)
    assert returned is None
    unit = {"triton": 1e-5, "cuda": 2e-2}.get(target.backend, 2e-5) if operator is MLP else 2e-5
    torch.testing.assert_close(y, doubled, rtol=unit, atol=unit)
    quarter.requires_grad_()
    inputs["x"].requires_grad_()
    y, returned = operator.with_stats(**inputs, residual=True, stats=quarter)
    assert y.requires_grad
    assert not returned.requires_grad
    assert torch.autograd.grad(y.sum(), [inputs["x"], quarter], allow_unused=True)[1] is None


@over(once=True)
def test_statistics_are_returned_only_when_asked_for(target, operator):
    inputs = on(target.device, problem_of(operator, target, *TINY))
    assert operator.with_stats(**inputs, return_stats=False)[1] is None


@over(
    pairs=True,
    pool_mixer={"shape": [(3, 17, 6, 9)]},
    mlp={"shape, hidden": [SMALL]},
    layout=LAYOUTS,
    dtype=TWO,
)
def test_returned_statistics_of_any_layout(target, operator, shape, hidden, layout, dtype):
    inputs = on(target.device, laid(problem_of(operator, target, shape, hidden, dtype), layout))
    y, stats = operator.with_stats(**inputs, residual=True)
    assert_same({"y": y}, {"y": operator.call(**inputs, residual=True)})
    assert_statistics_of(stats.cpu(), y.cpu())


# ---- determinism -------------------------------------------------------------------------------------------


def check_every_run(operator: Operator, target: Target, inputs: Tensors, layout: str, **options) -> None:
    """y, all gradients and statistics, from x and from given ones, have the same bits in every run."""
    inputs = laid(inputs, layout)
    grad = as_layout(operator.grad(inputs), layout)
    stats = tiled_stats(inputs["x"], 3).to(target.device)
    saved = {"save_hidden": True} if operator is MLP else {}

    def everything() -> Tensors:
        returned = operator.with_stats(**on(target.device, inputs), residual=True, **options)[1]
        of_stats = values(
            target, operator.of_stats, inputs, grad, stats=stats, residual=True, **options, **saved
        )
        own = values(target, operator.call, inputs, grad, residual=True, **options)
        return own | {"stats": returned} | {f"given {name}": value for name, value in of_stats.items()}

    expected = everything()
    for _ in target.again():
        assert_same(everything(), expected)


@over(
    repeats=True,
    pool_mixer={
        "shape, pool_size": [
            *(((5, 19, 14, 13), 3), ((1, 64, 30, 30), 3), ((3, 320, 7, 7), 3), ((3, 16, 9, 12), 3)),
            *(((3, 17, 9, 5), 3), ((2, 5, 6, 5), 5), ((64, 96, 28, 28), 3)),
        ],
        "dtype": TWO,
        "layout": FORMATS,
    },
    mlp={
        "shape, hidden": [
            *(((5, 19, 14, 13), 57), ((1, 352, 3, 7), 1056), ((3, 96, 7, 7), 288), ((2, 132, 2, 3), 20)),
            *(((2, 64, 7, 7), 64), ((2, 96, 8, 16), 64), ((2, 128, 7, 7), 64), ((1, 192, 5, 13), 64)),
        ],
        "dtype": DTYPES,
        "layout": FORMATS,
    },
)
def test_every_run_has_the_same_bits(target, operator, shape, hidden, pool_size, dtype, layout):
    """On any number of threads, in any order of a block's: sums keep one order whoever computes the parts."""
    inputs = problem_of(operator, target, shape, hidden, dtype)
    check_every_run(operator, target, inputs, layout, **given(pool_size=pool_size))
