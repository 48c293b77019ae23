"""What the token mixer promises on every target: shapes, pools, layouts, dtypes, hard values, statistics.

Its other promises, which are the MLP's too, are in `both.py`. What is specific to a target stands in files of
its own; which cases a target runs, in `targets.py`.
"""

import itertools
import os
from functools import partial

import numpy as np
import pytest
import torch
from support.devices import on
from support.layouts import LAYOUTS, as_layout
from support.operators import POOL_MIXER
from support.pool_mixer import eager, make_grad, make_inputs, mixer_with_stats, truth
from support.problems import HALVES, randn
from support.rule import assert_same, assert_statistics_of, bits, run

from poolformer_kernels import reference
from poolformer_kernels.ops import pool_mixer
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

from .cases import over
from .check import check_of, laid, same_pattern, values
from .common import BF16, BOTH, DTYPES, F16, F32, FORMATS, INF, NAN, TWO

OPERATOR = "pool_mixer"
check = partial(check_of, POOL_MIXER)


# ---- shapes ------------------------------------------------------------------------------------------------

SHAPES = (
    *((2, 17, 5, 8), (3, 3, 13, 29), (2, 64, 14, 14), (3, 17, 9, 13)),  # H != W; several tiles, cut
    *((2, 3, 1, 9), (2, 3, 9, 1), (3, 17, 1, 1), (2, 1, 1, 31), (2, 5, 2, 2)),  # narrower than the pool
    *((1, 96, 7, 7), (2, 1, 14, 14), (1, 64, 14, 14), (1, 320, 3, 7), (1, 768, 3, 7)),  # stages of models
    *((1, 12, 8, 12), (2, 8, 15, 16), (1, 8, 29, 8), (2, 24, 30, 8)),  # whole vectors along rows; strips
    *((1, 1040, 2, 2), (2, 1100, 3, 5)),  # tiles along channels
    *((1, 17, 56, 56), (2, 64, 40, 40), (2, 20, 33, 12), (1, 7, 300, 6)),
    *((8, 64, 56, 56), (3, 320, 14, 14), (2, 64, 96, 96)),
)


@over(pairs=True, shape=SHAPES, dtype=DTYPES, layout=FORMATS, residual=BOTH)
def test_shapes(target, shape, dtype, layout, residual):
    check(target, make_inputs(shape, dtype), layout=layout, residual=residual)


FEW_PIXELS = ((1, 1), (2, 3), (7, 7), (13, 29))
STRIPS = ((1, 5, 100, 70), (1, 64, 40, 40), (1, 7, 300, 6))  # several


@over(
    pairs=True,
    also={
        "pool_size, shape": (
            *itertools.product((1, 3, 5, 7, 9, 31), [(2, 19, *size) for size in FEW_PIXELS]),
            *itertools.product((3, 5, 9), STRIPS),
            *((1, (2, 8, 6, 5)), (5, (2, 16, 9, 4)), (7, (1, 8, 10, 8)), (9, (1, 4, 9, 12))),
            *((11, (2, 32, 13, 10)), (99, (1, 4, 2, 4)), (2**31 - 1, (1, 3, 2, 5))),
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


@over(once=True)
def test_the_pool_size_may_be_numpys(target):
    inputs = on(target.device, make_inputs((2, 3, 4, 5)))
    five, numpys = (pool_mixer(**inputs, pool_size=size) for size in (5, np.int64(5)))
    assert torch.equal(five, numpys)


@over(shape=[(1, 3, 400, 1), (1, 3, 1, 400), (1, 3, 3, 50)], pool_size=(801,), layout=FORMATS)
def test_a_pool_far_wider_than_a_thin_image(target, shape, pool_size, layout):
    inputs = make_inputs(shape)
    grad = make_grad(inputs)
    expected = values(target, pool_mixer, inputs, grad, pool_size=2 * max(shape[2:]) - 1)
    assert_same(values(target, pool_mixer, inputs, grad, pool_size=2**31 - 1), expected)
    check(target, inputs, layout=layout, pool_size=pool_size, residual=True)


@over(kernels=True, dtype=HALVES, layout=FORMATS)
def test_every_half_survives(target, dtype, layout):
    """Of all 65536 the finite ones come out as they are, where the pool leaves the identity, the others as
    infinities or NaN."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 64, 32, 32)
    if dtype == BF16:  # hardware conversions may take a subnormal for zero
        x = torch.where((x.abs() < torch.finfo(dtype).tiny), torch.zeros_like(x), x)
    stats = torch.tensor([[[65536.0, 0.0, 65536.0]]], device=target.device)
    options = {"pool_size": 1, "residual": True, "stats": stats}
    finite = as_layout(torch.where(x.isfinite(), x, torch.ones_like(x)), layout).to(target.device)
    assert torch.equal(mixer_with_stats(finite, None, None, **options), finite)
    y = mixer_with_stats(as_layout(x, layout).to(target.device), None, None, **options)
    assert torch.equal(y.isfinite().cpu(), x.isfinite())


# ---- layouts and dtypes ------------------------------------------------------------------------------------


@over(pairs=True, layout=LAYOUTS, dtype=DTYPES, shape=[(3, 17, 6, 9), (3, 16, 8, 8)])
def test_layouts_of_x(target, layout, dtype, shape):
    inputs = make_inputs(shape, dtype)
    check(target, inputs, grad=make_grad(inputs), layout=layout, residual=True)


@over(dtype=HALVES, layout=FORMATS, residual=BOTH, shape=[(2, 17, 6, 9), (2, 16, 8, 8)])
def test_float32_parameters_with_half_activations(target, dtype, layout, residual, shape):
    check(target, make_inputs(shape, dtype, parameter_dtype=F32), layout=layout, residual=residual)


# ---- hard values -------------------------------------------------------------------------------------------


@over(
    value=(0.1, -2.3, -100.3, 1e4, 1e4 + 1 / 3, 1e30, -1e35),
    shape=[(2, 17, 6, 9), (1, 64, 14, 14), (2, 16, 9, 8)],
    dtype=DTYPES,
    layout=FORMATS,
    pool_size=(3, 5),
    where=lambda target, value, dtype, **_: (
        "float16 does not have it"
        if abs(value) > 6e4 and dtype == F16
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
        assert y.abs().max().item() <= 4 * torch.finfo(F32).eps * inputs["bias"].abs().max().item()


@over(shape=[(1, 32, 56, 56)], layout=FORMATS, pool_size=(3, 5, 7))
def test_no_bias_of_the_adjoint(target, shape, layout, pool_size):
    """The mean error of a smooth gradient's dx, in float32 ulps of its mean: it adds up over blocks.

    Gradients in deep models are smooth, and what P^T g and g are rounded to differently does not cancel.
    Borders, whose weights are rounded, are few in an image of this size.
    """
    x = as_layout(randn(*shape), layout).to(target.device)
    grad = as_layout(randn(*shape, mean=1.0, sigma=0.25, seed=1), layout).to(target.device)
    dx, right = (
        torch.autograd.grad(f(t.requires_grad_(), None, None, pool_size=pool_size), t, grad.to(t.dtype))[0]
        for f, t in ((pool_mixer, x), (reference.pool_mixer, x.double()))
    )
    bias = (dx.double() - right).mean().item() / grad.mean().item()
    assert abs(bias) < 0.05 * torch.finfo(F32).eps


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


@over(dtype=DTYPES, payload=(-1, 0x7FFFFFFF, 0x7F800001), layout=FORMATS)
def test_nan_of_any_payload(target, dtype, payload, layout):
    """Rounding to bfloat16 must not carry a NaN's bits over into a number."""
    inputs = make_inputs((3, 17, 6, 9), dtype)
    inputs["weight"] = inputs["weight"].float()
    inputs["weight"].view(torch.int32)[1] = payload
    y = pool_mixer(**on(target.device, laid(inputs, layout)))
    assert y[:, 1].isnan().all()
    assert y[:, 2:].isfinite().all()


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
    torch.testing.assert_close(found["dx"].cpu(), grad * residual, rtol=0, atol=1e-6)
    for name, value in found.items():
        assert value.cpu()[expected[name].isfinite()].isfinite().all(), name


@over(layout=FORMATS)
def test_float16_overflows_as_rounding_does(target, layout):
    inputs = make_inputs((2, 17, 6, 9), F16, mean=0.0, sigma=6e4 / 3)
    inputs["x"].clamp_(-65504, 65504)
    inputs["layer_scale"].fill_(6e4)
    assert eager(**inputs, residual=True).isinf().any()
    exact = truth(inputs, make_grad(inputs), residual=True).values["y"]
    y = pool_mixer(**on(target.device, laid(inputs, layout)), residual=True).cpu()
    assert torch.equal(y, exact.half()) or same_pattern(y, exact.float().half())


# ---- statistics given and returned -------------------------------------------------------------------------


@over(
    shape=[(3, 18, 6, 9), (2, 64, 14, 14), (3, 17, 9, 13), (2, 5, 1, 1), (2, 1, 1, 1), (1, 24, 20, 3),
           (1, 8, 8, 24), (4, 64, 56, 56), (2, 1100, 3, 5)],
    mean=(-2.3, 30.0, 1e3),
    residual=BOTH,
    dtype=DTYPES,
    layout=FORMATS,
    pool_size=(3, 5),
)  # fmt: skip
def test_returned_statistics_are_those_of_the_rounded_y(
    target, shape, mean, residual, dtype, layout, pool_size
):
    inputs = on(target.device, laid(make_inputs(shape, dtype, mean=mean), layout))
    options = {"residual": residual, "pool_size": pool_size}
    y, stats = pool_mixer_with_stats(**inputs, **options)
    assert torch.equal(bits(y), bits(pool_mixer(**inputs, **options)))
    assert stats.shape[::2] == (shape[0], 3)
    assert_statistics_of(stats.cpu(), y.cpu())


@over(dtype=TWO, layout=FORMATS)
def test_returned_statistics_of_a_y_that_is_not_finite(target, dtype, layout):
    """What is not finite in a sample is not finite in its statistics, and in those of no other.

    Of 1e30 the mean is, the variance is not.
    """
    inputs = laid(make_inputs((5, 17, 6, 9), dtype, parameters=("layer_scale",)), layout)
    inputs["x"][1, 3, 2, 4] = NAN
    inputs["x"][2, 3, 2, 4] = INF
    inputs["x"][3] *= 1e30
    y, stats = pool_mixer_with_stats(**on(target.device, inputs), residual=True)
    mean, variance = (t.flatten().isfinite().tolist() for t in reference.merge_stats(stats))
    assert mean == [True, False, False, True, True]
    assert variance == [True, False, False, False, True]
    assert variance == reference.merge_stats(reference.sample_stats(y))[1].flatten().isfinite().tolist()


@over(dtype=DTYPES, layout=FORMATS)
def test_chained_through_statistics(target, dtype, layout):
    """Two mixers in a row, the second on the first's statistics, equal two that compute their own."""
    inputs = laid(make_inputs((3, 18, 6, 9), dtype), layout)

    def chain(x, given: bool, **parameters):
        y, stats = pool_mixer_with_stats(x, residual=True, **parameters)
        return pool_mixer_with_stats(y, residual=True, stats=stats if given else None, **parameters)[0]

    given, computed = (values(target, chain, inputs, make_grad(inputs), given=g) for g in (True, False))
    unit = 2e-5 if dtype == F32 else 8 * torch.finfo(dtype).eps
    for name in given:
        torch.testing.assert_close(given[name], computed[name], rtol=unit, atol=unit, msg=name)


# ---- autograd ----------------------------------------------------------------------------------------------


@over(kernels=True, parameter_dtype=TWO)
def test_the_gradient_of_bias_is_exactly_zero(target, parameter_dtype):
    inputs = make_inputs((3, 5, 6, 7), BF16, parameter_dtype=parameter_dtype)
    dbias = values(target, pool_mixer, inputs, make_grad(inputs))["dbias"]
    assert torch.equal(dbias.cpu(), torch.zeros(5, dtype=parameter_dtype))


@over(
    repeats=True,
    kernels=True,
    once=True,
    dtype=DTYPES,
    layout=["nchw", "channels_last", "sliced_hw", "transposed"],
)
def test_opcheck(target, dtype, layout):
    """Schemas, fakes and registrations of the operators behind both directions."""
    forward, backward = POOL_MIXER.registered(target.backend)
    problem = POOL_MIXER.problem
    inputs = on(target.device, laid(make_inputs((2, 8, 8, 6), dtype), layout))
    grad = make_grad(inputs).to(target.device)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    for return_stats in BOTH:
        torch.library.opcheck(forward, problem.forward_arguments(leaves, return_stats=return_stats))
    _, mean_rstd, _ = forward(*problem.forward_arguments(inputs, return_stats=False))
    torch.library.opcheck(backward, problem.backward_arguments(grad, inputs, mean_rstd))


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
    parameters = {n: t for n, t in make_inputs((1, channels, 1, 1), BF16).items() if n != "x"}
    ends = [randn(1, channels, 8, width, dtype=BF16, seed=seed) for seed in (0, 9)]
    for layout in FORMATS:
        memory = torch.from_numpy(np.zeros(numel, np.int16)).view(BF16)
        x = memory.view(1, channels, height, width)
        if layout == "channels_last":
            x = memory.view(1, height, width, channels).permute(0, 3, 1, 2)
        x[:, :, :8], x[:, :, -8:] = ends
        y = mixer_with_stats(x, **parameters, residual=True, stats=stats)
        for inner, rows in ((slice(0, 7), slice(0, 8)), (slice(1, 8), slice(-8, None))):
            wanted = reference.pool_mixer(x[:, :, rows], **parameters, residual=True, stats=stats)
            torch.testing.assert_close(y[:, :, rows][:, :, inner], wanted[:, :, inner], rtol=2**-7, atol=1e-6)
        del y  # the next one takes its pages
