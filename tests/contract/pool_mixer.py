"""What the token mixer promises, on every target: values and gradients, hard values, statistics, determinism.

What is specific to a target stands in files of its own; which cases a target runs, in `targets.py`.
"""

import itertools
import os

import numpy as np
import pytest
import torch
from support import pool_mixer as problem
from support.devices import like_on, on
from support.layouts import GRAD_LAYOUTS, LAYOUTS, VECTOR_LAYOUTS, as_layout, as_vector_layout
from support.pool_mixer import (
    PARAMETERS,
    adjoint_bias,
    eager,
    make_grad,
    make_inputs,
    mixer_with_stats,
    truth,
)
from support.problems import HALVES, randn, tiled_stats
from support.rule import assert_same, assert_statistics_of, bits, run

import poolformer_kernels as pk
from poolformer_kernels import reference
from poolformer_kernels.ops import pool_mixer
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

from . import check as checks
from .cases import over
from .check import same_pattern, values

OPERATOR = "pool_mixer"
DTYPES = (torch.float32, *HALVES)
TWO = (torch.float32, torch.bfloat16)
FORMATS = ("nchw", "channels_last")
BOTH = (False, True)
NAMES = ("x", *PARAMETERS)
INF, NAN = float("inf"), float("nan")


def check(target, inputs, grad=None, *, stats=None, **options):
    function, given = (
        (pool_mixer, {}) if stats is None else (mixer_with_stats, {"stats": stats.to(target.device)})
    )
    return checks.check(target, problem, function, inputs, grad, given=given, **options)


def laid(inputs, layout):
    return {**inputs, "x": as_layout(inputs["x"], layout)}


# ---- shapes ------------------------------------------------------------------------------------------------

SHAPES = (
    *((2, 17, 5, 8), (3, 3, 13, 29), (2, 64, 14, 14), (3, 17, 9, 13)),  # H != W; several tiles, cut
    *((2, 3, 1, 9), (2, 3, 9, 1), (3, 17, 1, 1), (2, 1, 1, 31), (2, 5, 2, 2)),  # narrower than the pool
    *(
        (1, 96, 7, 7),
        (2, 1, 14, 14),
        (1, 64, 14, 14),
        (1, 320, 3, 7),
        (1, 768, 3, 7),
    ),  # stages of models
    *((1, 12, 8, 12), (2, 8, 15, 16), (1, 8, 29, 8), (2, 24, 30, 8)),  # whole vectors along rows; strips
    *((1, 1040, 2, 2), (2, 1100, 3, 5)),  # tiles along channels
    *((1, 17, 56, 56), (2, 64, 40, 40), (2, 20, 33, 12), (1, 7, 300, 6)),
    *((8, 64, 56, 56), (3, 320, 14, 14), (2, 64, 96, 96)),
)


@over(shape=SHAPES, dtype=DTYPES, layout=FORMATS, residual=BOTH)
def test_shapes(target, shape, dtype, layout, residual):
    check(target, make_inputs(shape, dtype), layout=layout, residual=residual)


@over(
    also={
        "pool_size, shape": (
            *itertools.product(
                (1, 3, 5, 7, 9, 31), ((2, 19, 1, 1), (2, 19, 2, 3), (2, 19, 7, 7), (2, 19, 13, 29))
            ),
            *itertools.product(
                (3, 5, 9), ((1, 5, 100, 70), (1, 64, 40, 40), (1, 7, 300, 6))
            ),  # several strips
            *(
                (1, (2, 8, 6, 5)),
                (5, (2, 16, 9, 4)),
                (7, (1, 8, 10, 8)),
                (9, (1, 4, 9, 12)),
                (11, (2, 32, 13, 10)),
            ),
            *((99, (1, 4, 2, 4)), (2**31 - 1, (1, 3, 2, 5))),
        )
    },
    dtype=DTYPES,
    layout=FORMATS,
    residual=BOTH,
)
def test_pool_sizes(target, pool_size, shape, dtype, layout, residual):
    """The pool may be larger than the image; pool size 1 leaves the identity, or zero, exactly."""
    inputs = make_inputs(shape, dtype)
    found = check(target, inputs, layout=layout, pool_size=pool_size, residual=residual)
    if pool_size == 1 and target.kernels:
        wanted = {"y": inputs["x"], "dx": make_grad(inputs)}
        for name, t in wanted.items():
            assert torch.equal(found[name].cpu(), t if residual else torch.zeros_like(t)), name


@over(shape=[(1, 3, 400, 1), (1, 3, 1, 400), (1, 3, 3, 50)], pool_size=(801,), layout=FORMATS)
def test_a_pool_far_wider_than_a_thin_image(target, shape, pool_size, layout):
    inputs = make_inputs(shape)
    grad = make_grad(inputs)
    expected = values(target, pool_mixer, inputs, grad, pool_size=2 * max(shape[2:]) - 1)
    assert_same(values(target, pool_mixer, inputs, grad, pool_size=2**31 - 1), expected)
    check(target, inputs, layout=layout, pool_size=pool_size, residual=True)


@over(kernels=True, dtype=HALVES, layout=FORMATS)
def test_every_half_survives(target, dtype, layout):
    """All 65536 values in and out unchanged, where the pool leaves the identity: infinities and NaN too."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 64, 32, 32)
    if dtype == torch.bfloat16:  # hardware conversions may take a subnormal for zero
        x = torch.where((x.abs() < torch.finfo(dtype).tiny), torch.zeros_like(x), x)
    stats = torch.tensor([[[65536.0, 0.0, 65536.0]]], device=target.device)
    options = {"pool_size": 1, "residual": True, "stats": stats}
    finite = as_layout(torch.where(x.isfinite(), x, torch.ones_like(x)), layout).to(target.device)
    assert torch.equal(mixer_with_stats(finite, None, None, **options), finite)
    y = mixer_with_stats(as_layout(x, layout).to(target.device), None, None, **options)
    assert torch.equal(y.isfinite().cpu(), x.isfinite())


@over(shape=[(513, 5, 3, 4), (70_000, 4, 3, 2)], dtype=DTYPES, layout=FORMATS)
def test_many_samples(target, shape, dtype, layout):
    """More than a grid has rows."""
    check(target, make_inputs(shape, dtype), layout=layout, residual=True)


@over(shape=[(5, 17, 9, 6), (5, 16, 9, 6), (7, 64, 20, 20)], dtype=TWO, layout=FORMATS)
def test_a_sample_does_not_depend_on_its_batch(target, shape, dtype, layout):
    inputs = laid(make_inputs(shape, dtype), layout)
    grad = make_grad(inputs)
    whole = values(target, pool_mixer, inputs, grad, residual=True)
    one = inputs | {"x": inputs["x"][3:4], "drop_scale": inputs["drop_scale"][3:4]}
    alone = values(target, pool_mixer, one, grad[3:4], residual=True)
    for name in ("y", "dx", "ddrop_scale"):
        if target.exact and (len(grad) < 7 or name != "ddrop_scale"):  # small batches have smaller tiles
            assert_same({name: alone[name]}, {name: whole[name][3:4]})
        else:
            unit = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(alone[name], whole[name][3:4], rtol=unit, atol=unit * 8)


@over(layout=FORMATS, residual=BOTH)
def test_no_samples(target, layout, residual):
    inputs = laid(make_inputs((0, 5, 3, 4)), layout)
    found = values(target, pool_mixer, inputs, make_grad(inputs), residual=residual)
    assert found["y"].shape == found["dx"].shape == (0, 5, 3, 4)
    assert found["ddrop_scale"].shape == (0,)
    for name in ("weight", "bias", "layer_scale"):
        assert torch.equal(found[f"d{name}"].cpu(), torch.zeros(5)), name
    y, stats = pool_mixer_with_stats(**on(target.device, inputs), residual=residual)
    assert y.shape == (0, 5, 3, 4)
    assert stats.shape[::2] == (0, 3)


# ---- layouts and dtypes ------------------------------------------------------------------------------------


@over(layout=LAYOUTS, dtype=DTYPES, shape=[(3, 17, 6, 9), (3, 16, 8, 8)])
def test_layouts_of_x(target, layout, dtype, shape):
    check(
        target, make_inputs(shape, dtype), make_grad(make_inputs(shape, dtype)), layout=layout, residual=True
    )


@over(grad_layout=GRAD_LAYOUTS, layout=FORMATS, dtype=TWO, shape=[(3, 17, 6, 9), (3, 8, 8, 4)])
def test_layouts_of_the_gradient(target, grad_layout, layout, dtype, shape):
    inputs = make_inputs(shape, dtype)
    check(target, inputs, as_layout(make_grad(inputs), grad_layout), layout=layout, residual=True)


@over(name=PARAMETERS, vector_layout=VECTOR_LAYOUTS, layout=FORMATS)
def test_layouts_of_parameters(target, name, vector_layout, layout):
    inputs = make_inputs((5, 6, 4, 5))
    inputs[name] = as_vector_layout(inputs[name], vector_layout)
    check(target, inputs, layout=layout, residual=True)


@over(dtype=HALVES, layout=FORMATS, residual=BOTH, shape=[(2, 17, 6, 9), (2, 16, 8, 8)])
def test_float32_parameters_with_half_activations(target, dtype, layout, residual, shape):
    check(target, make_inputs(shape, dtype, parameter_dtype=torch.float32), layout=layout, residual=residual)


@over(floats=[("bias", "drop_scale"), ("weight",), ("layer_scale",)], dtype=HALVES)
def test_each_parameter_has_its_own_dtype(target, floats, dtype):
    inputs = make_inputs((2, 17, 6, 9), dtype)
    inputs |= {name: inputs[name].float() for name in floats}
    check(target, inputs, layout="nchw", residual=True)


@over(kernels=True, dtype=HALVES, layout=FORMATS)
def test_halves_are_rounded_to_nearest(target, dtype, layout):
    inputs = on(
        target.device, laid(make_inputs((1, 16, 9, 10), dtype, parameter_dtype=torch.float32), layout)
    )
    nearest = pool_mixer(**(inputs | {"x": inputs["x"].float()}), residual=True).to(dtype)
    same = pool_mixer(**inputs, residual=True) == nearest
    assert same.double().mean() > 0.99  # float32's rounding breaks a tie now and then; truncation half of all


SUBSETS = [s for size in range(len(PARAMETERS) + 1) for s in itertools.combinations(PARAMETERS, size)]


@over(parameters=SUBSETS, residual=BOTH, dtype=TWO)
def test_absent_parameters(target, parameters, residual, dtype):
    check(target, make_inputs((3, 5, 6, 7), dtype, parameters=parameters), residual=residual)


# ---- few digits --------------------------------------------------------------------------------------------


@over(
    also={
        "dtype, mean, sigma": (
            *(
                (torch.float32, m, s)
                for m, s in ((1e2, 1), (1e3, 1), (1e4, 1), (-1e4, 1), (-1e3, 30), (100, 1e-2))
            ),
            *((torch.float32, 0, 1e-6), (torch.float32, 0, 1e5)),
            *((torch.bfloat16, m, s) for m, s in ((1e2, 1), (1e3, 10), (-1e4, 100), (0, 1e-6), (0, 1e5))),
        )
    },
    residual=BOTH,
    layout=FORMATS,
)
def test_a_mean_far_from_zero(target, dtype, mean, sigma, residual, layout):
    check(
        target, make_inputs((2, 24, 11, 14), dtype, mean=mean, sigma=sigma), layout=layout, residual=residual
    )


@over(dtype=(torch.float32, torch.float16), offset=(10.0, 1e3), layout=FORMATS, residual=BOTH)
def test_channels_with_their_own_means(target, dtype, offset, layout, residual):
    """What trained models have: a few channels far away, so that sigma hides what happens inside one."""
    inputs = make_inputs((2, 24, 11, 14), dtype)
    inputs["x"][:, ::5] += offset * randn(5, 1, 1, dtype=dtype, seed=3)
    check(target, inputs, layout=layout, residual=residual)


@over(
    value=(0.1, -2.3, -100.3, 1e4, 1e4 + 1 / 3, 1e30, -1e35),
    shape=[(2, 17, 6, 9), (1, 64, 14, 14), (2, 16, 9, 8)],
    dtype=DTYPES,
    layout=FORMATS,
    pool_size=(3, 5),
    where=lambda target, value, dtype, **_: (
        "float16 does not have it"
        if abs(value) > 6e4 and dtype == torch.float16
        else "eager leaves what rounding leaves of the mean"
        if abs(value) > 1e5 and not target.kernels
        else None
    ),
)
def test_a_constant_image(target, value, shape, dtype, layout, pool_size):
    """Differences of pixels are exactly 0."""
    inputs = laid(make_inputs(shape, dtype), layout)
    inputs["x"].fill_(value)
    inputs = on(target.device, inputs)
    y = pool_mixer(**inputs, pool_size=pool_size)
    if target.kernels:
        assert torch.equal(y, torch.zeros_like(y))
        assert torch.equal(pool_mixer(**inputs, pool_size=pool_size, residual=True), inputs["x"])
    else:  # pools the bias of each channel, which need not return it to the last bit
        assert y.abs().max().item() <= 4 * torch.finfo(torch.float32).eps * inputs["bias"].abs().max().item()


@over(eps=(0.0, 1e-12, 1e-3, 10.0))
def test_eps(target, eps):
    check(target, make_inputs((2, 9, 6, 7), sigma=0.1), residual=True, eps=eps)


@over(shape=[(1, 32, 56, 56)], layout=FORMATS, pool_size=(3, 5, 7))
def test_no_bias_of_the_adjoint(target, shape, layout, pool_size):
    assert abs(adjoint_bias(pool_size, layout, target.device)) < 0.05


@over(shape=[(1, 16, 40, 40), (1, 3, 12, 20)], pool_size=(31,), layout=FORMATS)
def test_large_gradients_under_a_large_pool(target, shape, pool_size, layout):
    """Sums over a window stay in range as long as its mean does."""
    x, grad = (as_layout(randn(*shape, seed=seed), layout).to(target.device) for seed in (0, 1))
    dx = {}
    for size in (1.0, 1e36):
        leaf = x.detach().requires_grad_()
        y = pool_mixer(leaf, None, None, pool_size=pool_size)
        dx[size] = torch.autograd.grad(y, leaf, grad * size)[0]
    torch.testing.assert_close(dx[1e36] / 1e36, dx[1.0], rtol=1e-4, atol=1e-6)


# ---- infinity and NaN --------------------------------------------------------------------------------------


@over(name=NAMES, bad=(NAN, INF, -INF), dtype=DTYPES, layout=FORMATS, residual=BOTH)
def test_not_finite_where_eager_is_not(target, name, bad, dtype, layout, residual):
    inputs = make_inputs((3, 17, 6, 9), dtype)
    inputs[name].view(-1)[5 if len(inputs[name]) > 5 or name == "x" else 1] = bad
    # in float32: in half precision some differences are rounded to 0, and 0 times infinity is NaN
    expected = eager(**{name: t.float() for name, t in inputs.items()}, residual=residual)
    assert not expected.isfinite().all()
    assert expected.isfinite().any()
    y = pool_mixer(**on(target.device, laid(inputs, layout)), residual=residual)
    assert same_pattern(y, expected)
    finite = expected.isfinite()
    torch.testing.assert_close(y.cpu()[finite].float(), expected[finite], rtol=0.05, atol=0.05)


@over(dtype=DTYPES, payload=(-1, 0x7FFFFFFF, 0x7F800001), layout=FORMATS)
def test_nan_of_any_payload(target, dtype, payload, layout):
    """Rounding to bfloat16 must not carry a NaN's bits over into a number."""
    inputs = make_inputs((3, 17, 6, 9), dtype)
    inputs["weight"] = inputs["weight"].float()
    inputs["weight"].view(torch.int32)[1] = payload
    y = pool_mixer(**on(target.device, laid(inputs, layout)))
    assert y[:, 1].isnan().all()
    assert y[:, 2:].isfinite().all()


@over(bad=(NAN, INF), layout=FORMATS)
def test_a_gradient_that_is_not_finite_stays_in_its_sample(target, bad, layout):
    inputs = laid(make_inputs((3, 17, 6, 9), parameters=("weight", "bias")), layout)
    grad = make_grad(inputs)
    clean = values(target, pool_mixer, inputs, grad, residual=True)["dx"]
    grad[1, 3, 2, 2] = bad
    dx = values(target, pool_mixer, inputs, grad, residual=True)["dx"]
    assert not dx[1].isfinite().any()
    assert torch.equal(dx[[0, 2]], clean[[0, 2]])


@over(dtype=TWO, layout=FORMATS, residual=BOTH)
def test_a_variance_that_overflows(target, dtype, layout, residual):
    """rstd is 0 and the branch vanishes, in eager too."""
    inputs = laid(make_inputs((2, 17, 6, 9), dtype), layout)
    inputs["x"] = as_layout(randn(2, 17, 6, 9, dtype=dtype, sigma=1e30), layout)
    grad = make_grad(inputs)
    expected = run(eager, {**inputs, "x": inputs["x"].contiguous()}, grad, residual=residual)
    found = values(target, pool_mixer, inputs, grad, residual=residual)
    assert same_pattern(found["y"], expected["y"])
    assert expected["y"].isfinite().all()
    torch.testing.assert_close(found["y"].cpu(), inputs["x"] * residual, rtol=0, atol=1e-6)
    for name, value in found.items():
        assert value.cpu()[expected[name].isfinite()].isfinite().all(), name


@over(layout=FORMATS)
def test_float16_overflows_as_rounding_does(target, layout):
    inputs = make_inputs((2, 17, 6, 9), torch.float16, mean=0.0, sigma=6e4 / 3)
    inputs["x"].clamp_(-65504, 65504)
    inputs["layer_scale"].fill_(6e4)
    assert eager(**inputs, residual=True).isinf().any()
    exact = truth(inputs, make_grad(inputs), residual=True).values["y"]
    y = pool_mixer(**on(target.device, laid(inputs, layout)), residual=True).cpu()
    assert torch.equal(y, exact.half()) or same_pattern(y, exact.float().half())


# ---- statistics given and returned -------------------------------------------------------------------------


@over(tiles=(1, 2, 5, 7, 33, 300), mean=(0.0, 40.0, 1e3), dtype=DTYPES, layout=FORMATS)
def test_given_statistics(target, tiles, mean, dtype, layout):
    """The partials' means are rounded to float32: against sigma that is an error of |mean| / sigma ulps."""
    inputs = laid(make_inputs((3, 18, 6, 9), dtype, mean=mean, sigma=2.0), layout)
    stats = tiled_stats(inputs["x"], tiles)
    check(target, inputs, layout=layout, stats=stats, residual=True, ulps=mean / 2)


@over(dtype=TWO)
def test_given_statistics_in_other_layouts(target, dtype):
    inputs = make_inputs((3, 18, 6, 9), dtype)
    grad, stats = make_grad(inputs), tiled_stats(inputs["x"], 5)
    kept = stats.clone()
    expected = values(target, mixer_with_stats, inputs, grad, residual=True, stats=stats.to(target.device))
    transposed = stats.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    swapped = stats.transpose(1, 2).contiguous().transpose(1, 2)
    offset = torch.full((stats.numel() + 1,), NAN)[1:].view(stats.shape).copy_(stats)
    sliced = torch.full((3, 12, 4), NAN)[:, 1:11:2, 1:].copy_(stats)
    for other in (transposed, swapped, offset, sliced, torch.stack([stats] * 2)[1]):
        given = like_on(target.device, other)
        assert_same(values(target, mixer_with_stats, inputs, grad, residual=True, stats=given), expected)
    assert torch.equal(stats, kept)


@over()
def test_given_statistics_are_used_and_not_differentiable(target):
    """With a quarter of the variance and eps = 0 the branch doubles; the statistics get no gradient."""
    inputs = on(target.device, make_inputs((3, 18, 6, 9)))
    stats = tiled_stats(inputs["x"].cpu(), 3).to(target.device)
    y = mixer_with_stats(**inputs, eps=0.0, stats=stats)
    scaled = torch.tensor([1.0, 1.0, 0.25], device=target.device)
    quarter = reference.sample_stats(inputs["x"]) * scaled
    doubled = mixer_with_stats(**inputs, eps=0.0, stats=quarter)
    torch.testing.assert_close(doubled, 2 * y, rtol=2e-5, atol=2e-5)
    stats.requires_grad_()
    inputs["x"].requires_grad_()
    y, returned = pool_mixer_with_stats(**inputs, residual=True, stats=stats)
    assert y.requires_grad
    assert not returned.requires_grad
    assert torch.autograd.grad(y.sum(), [inputs["x"], stats], allow_unused=True)[1] is None


@over(
    shape=[(3, 18, 6, 9), (2, 64, 14, 14), (3, 17, 9, 13), (2, 5, 1, 1), (2, 1, 1, 1), (1, 24, 20, 3),
           (1, 8, 8, 24), (4, 64, 56, 56), (2, 1100, 3, 5)],
    mean=(-2.3, 30.0, 1e3),
    residual=BOTH,
    dtype=DTYPES,
    layout=FORMATS,
)  # fmt: skip
def test_returned_statistics_are_those_of_the_rounded_y(target, shape, mean, residual, dtype, layout):
    inputs = on(target.device, laid(make_inputs(shape, dtype, mean=mean), layout))
    y, stats = pool_mixer_with_stats(**inputs, residual=residual)
    assert torch.equal(bits(y), bits(pool_mixer(**inputs, residual=residual)))
    assert stats.shape[::2] == (shape[0], 3)
    assert_statistics_of(stats.cpu(), y.cpu())


@over(bad=(NAN, INF, 1e30), dtype=TWO, layout=FORMATS)
def test_returned_statistics_of_a_y_that_is_not_finite(target, bad, dtype, layout):
    """What is not finite in a sample is not finite in its statistics, and in those of no other."""
    inputs = laid(make_inputs((3, 17, 6, 9), dtype, parameters=("layer_scale",)), layout)
    if bad == 1e30:
        inputs["x"][1] *= 1e30
    else:
        inputs["x"][1, 3, 2, 4] = bad
    y, stats = pool_mixer_with_stats(**on(target.device, inputs), residual=True)
    expected = reference.merge_stats(reference.sample_stats(y))
    for found, wanted in zip(reference.merge_stats(stats), expected, strict=True):
        assert found.isfinite().tolist() == wanted.isfinite().tolist()
    assert expected[1].isfinite().tolist() == [True, False, True]


@over(dtype=DTYPES, layout=FORMATS)
def test_chained_through_statistics(target, dtype, layout):
    """Two mixers in a row, the second on the first's statistics, equal two that compute their own."""
    inputs = laid(make_inputs((3, 18, 6, 9), dtype), layout)

    def chain(x, given: bool, **parameters):
        y, stats = pool_mixer_with_stats(x, residual=True, **parameters)
        return pool_mixer_with_stats(y, residual=True, stats=stats if given else None, **parameters)[0]

    given, computed = (values(target, chain, inputs, make_grad(inputs), given=g) for g in (True, False))
    unit = 2e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for name in given:
        torch.testing.assert_close(given[name], computed[name], rtol=unit, atol=unit, msg=name)


@over(once=True)
def test_statistics_are_returned_only_when_asked_for(target):
    inputs = on(target.device, make_inputs((2, 5, 3, 4)))
    assert pool_mixer_with_stats(**inputs, return_stats=False)[1] is None


# ---- determinism -------------------------------------------------------------------------------------------


@over(
    also={
        "shape, pool_size": [
            *(((5, 19, 14, 13), 3), ((1, 64, 30, 30), 3), ((3, 320, 7, 7), 3), ((3, 16, 9, 12), 3)),
            *(((3, 17, 9, 5), 3), ((2, 5, 6, 5), 5), ((64, 96, 28, 28), 3)),
        ]
    },
    dtype=TWO,
    layout=FORMATS,
)
def test_every_run_has_the_same_bits(target, shape, pool_size, dtype, layout):
    """On any number of threads, in any order of a block's: sums keep one order whoever computes the parts."""
    inputs = laid(make_inputs(shape, dtype), layout)
    grad = as_layout(make_grad(inputs), layout)
    stats = tiled_stats(inputs["x"], 3).to(target.device)
    options = {"residual": True, "pool_size": pool_size}

    def everything() -> dict:
        returned = pool_mixer_with_stats(**on(target.device, inputs), **options)[1]
        given = values(target, mixer_with_stats, inputs, grad, stats=stats, **options)
        own = values(target, pool_mixer, inputs, grad, **options)
        return own | {"stats": returned} | {f"given {name}": value for name, value in given.items()}

    expected = everything()
    for _ in target.again():
        assert_same(everything(), expected)


# ---- autograd ----------------------------------------------------------------------------------------------


@over(
    subset=[s for size in range(len(NAMES) + 1) for s in itertools.combinations(NAMES, size)],
    residual=BOTH,
    once=True,
)
def test_every_subset_of_requires_grad(target, subset, residual):
    inputs = on(target.device, make_inputs((3, 5, 6, 7)))
    grad = make_grad(inputs)
    full = run(pool_mixer, inputs, grad, residual=residual)
    leaves = {name: t.clone().requires_grad_(name in subset) for name, t in inputs.items()}
    y = pool_mixer(**leaves, residual=residual)
    assert torch.equal(bits(y.detach()), bits(full["y"]))
    assert y.requires_grad == bool(subset)
    if subset:
        y.backward(grad)
    for name, leaf in leaves.items():
        if name not in subset:
            assert leaf.grad is None, name
        elif target.exact:
            assert torch.equal(bits(leaf.grad), bits(full[f"d{name}"])), name
        else:  # eager sums in another order where it has less to compute
            torch.testing.assert_close(leaf.grad, full[f"d{name}"], rtol=1e-5, atol=1e-5)


@over(kernels=True, parameter_dtype=TWO)
def test_the_gradient_of_bias_is_exactly_zero(target, parameter_dtype):
    inputs = make_inputs((3, 5, 6, 7), torch.bfloat16, parameter_dtype=parameter_dtype)
    dbias = values(target, pool_mixer, inputs, make_grad(inputs))["dbias"]
    assert torch.equal(dbias.cpu(), torch.zeros(5, dtype=parameter_dtype))


@over(once=True, residual=BOTH, layout=FORMATS, grad_layout=[*FORMATS, "expanded_all"])
def test_a_second_backward_through_the_same_graph(target, residual, layout, grad_layout):
    """What is saved is not written to, by any kernel of the first one."""
    inputs = on(target.device, laid(make_inputs((3, 5, 6, 7)), layout))
    grad = like_on(target.device, as_layout(make_grad(inputs), grad_layout))
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = pool_mixer(**leaves, residual=residual)
    kept = y.detach().clone()
    first = torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), grad)
    assert torch.equal(y.detach(), kept)
    assert_same(dict(zip(leaves, first, strict=True)), dict(zip(leaves, second, strict=True)))


@over(once=True)
def test_outputs_share_no_memory_with_inputs(target):
    inputs = on(target.device, make_inputs((3, 5, 6, 7)))
    x, grad = inputs["x"].requires_grad_(), make_grad(inputs).to(target.device)
    y = pool_mixer(**inputs, pool_size=1, residual=True)  # y = x
    (dx,) = torch.autograd.grad(y, x, grad)
    storages = [t.untyped_storage().data_ptr() for t in (x, y, grad, dx)]
    if not target.kernels:  # eager's backward may hand the gradient on as it came
        storages.pop()
    assert len(set(storages)) == len(storages)


@over(once=True)
def test_writing_a_saved_input_before_backward_raises(target):
    inputs = on(target.device, make_inputs((3, 5, 6, 7)))
    weight = inputs["weight"].requires_grad_()
    y = pool_mixer(**inputs, residual=True)
    inputs["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), weight)


@over(once=True, kernels=True)
def test_the_backward_keeps_the_backend_of_its_forward(target):
    inputs = on(target.device, make_inputs((3, 5, 6, 7)))
    grad = make_grad(inputs).to(target.device)
    expected = run(pool_mixer, inputs, grad, residual=True)
    x = inputs["x"].requires_grad_()
    y = pool_mixer(**inputs, residual=True)
    with pk.use_backend("reference"):
        (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(bits(dx), bits(expected["dx"]))


@over(once=True, mode=(torch.no_grad, torch.inference_mode))
def test_the_value_is_the_same_without_autograd(target, mode):
    inputs = on(target.device, make_inputs((3, 5, 6, 7)))
    recorded = pool_mixer(**{**inputs, "x": inputs["x"].clone().requires_grad_()}, residual=True)
    with mode():
        y = pool_mixer(**inputs, residual=True)
    assert not y.requires_grad
    assert torch.equal(bits(y), bits(recorded.detach()))


@over(once=True, kernels=True)
def test_a_second_derivative_says_what_to_do(target):
    inputs = on(target.device, make_inputs((2, 3, 4, 5)))
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(pool_mixer(**inputs, residual=True).square().sum(), x, create_graph=True)
    message = rf"pool_mixer on the '{target.backend}' backend has no second derivative.*use_backend"
    with pytest.raises(RuntimeError, match=message):
        dx.square().sum().backward()


@over(once=True)
def test_gradients_accumulate_over_calls(target):
    """The same weight in two calls, and a backward through several outputs."""
    inputs = on(target.device, make_inputs((3, 5, 6, 7)))
    grad = make_grad(inputs).to(target.device)
    once = run(pool_mixer, inputs, grad, residual=True)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    torch.autograd.backward([pool_mixer(**leaves, residual=True) for _ in range(2)], [grad, grad])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 2 * once[f"d{name}"], rtol=1e-6, atol=1e-6)


@over(
    kernels=True,
    once=True,
    dtype=DTYPES,
    layout=["nchw", "channels_last", "sliced_hw", "transposed"],
)
def test_opcheck(target, dtype, layout):
    """Schemas, fakes and registrations of the operators behind both directions."""
    operators = torch.ops.poolformer_kernels
    forward = getattr(operators, f"pool_mixer_{target.op}").default
    backward = getattr(operators, f"pool_mixer_{target.op}_backward").default
    inputs = on(target.device, laid(make_inputs((2, 8, 8, 6), dtype), layout))
    grad = make_grad(inputs).to(target.device)
    for t in inputs.values():
        t.requires_grad_()
    for stats in BOTH:
        torch.library.opcheck(forward, (*inputs.values(), None, 3, 1e-5, True, stats))
    x, *parameters = (t.detach() for t in inputs.values())
    _, mean_rstd, _ = forward(x, *parameters, None, 3, 1e-5, True, False)
    torch.library.opcheck(backward, (grad, x, mean_rstd, *parameters, 3, True))


# ---- more than 2^31 elements -------------------------------------------------------------------------------


@pytest.mark.large
@pytest.mark.long
@over(
    kernels=True, where=lambda target: None if target.backend == "cpp" else "only the CPU has it for nothing"
)
def test_more_than_2_to_31_elements_in_a_sample(target):
    """Statistics given, the mixer is local: both ends of the sample are compared with the reference there.

    In between x is 0, in pages that were never written, which take no memory.
    """
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 6 * 2**30:
        pytest.skip("needs 6 GiB of free memory")
    channels, height, width = 64, 5800, 5800
    numel = channels * height * width
    assert numel > 2**31
    stats = torch.tensor([[[float(numel), 0.5, 4.0 * numel]]])
    parameters = {n: t for n, t in make_inputs((1, channels, 1, 1), torch.bfloat16).items() if n != "x"}
    ends = [randn(1, channels, 8, width, dtype=torch.bfloat16, seed=seed) for seed in (0, 9)]
    for layout in FORMATS:
        memory = torch.from_numpy(np.zeros(numel, np.int16)).view(torch.bfloat16)
        x = memory.view(1, channels, height, width)
        if layout == "channels_last":
            x = memory.view(1, height, width, channels).permute(0, 3, 1, 2)
        x[:, :, :8], x[:, :, -8:] = ends
        y = mixer_with_stats(x, **parameters, residual=True, stats=stats)
        for inner, rows in ((slice(0, 7), slice(0, 8)), (slice(1, 8), slice(-8, None))):
            wanted = reference.pool_mixer(x[:, :, rows], **parameters, residual=True, stats=stats)
            torch.testing.assert_close(y[:, :, rows][:, :, inner], wanted[:, :, inner], rtol=2**-7, atol=1e-6)
        del y  # the next one takes its pages
