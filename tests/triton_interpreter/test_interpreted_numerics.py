"""The Triton kernels' numbers: the error rule over dtypes, layouts, shapes, pools and hard values."""

import pytest
import torch
from helpers import (
    GRAD_LAYOUTS,
    HALVES,
    LAYOUTS,
    PARAMETERS,
    as_layout,
    as_vector_layout,
    assert_right,
    assert_same,
    assert_statistics_of,
    bits,
    eager,
    make_grad,
    make_inputs,
    mixer_with_stats,
    randn,
    run,
    tiled_stats,
)

from poolformer_kernels import reference
from poolformer_kernels.backends.triton import pool_mixer as kernels
from poolformer_kernels.layout import memory_format_of
from poolformer_kernels.ops import pool_mixer
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

pytestmark = pytest.mark.sampled(4)

DTYPES = (torch.float32, *HALVES)
FORMATS = ("nchw", "channels_last")
# H != W, strips cut short, several tiles, padded channels, one pixel, row or column, narrower than the pool
SHAPES = (
    *((2, 64, 14, 14), (3, 17, 9, 13), (2, 3, 13, 29), (1, 96, 7, 7)),
    *((2, 1, 6, 4), (2, 24, 1, 1), (1, 16, 1, 9), (2, 5, 8, 1)),
)
# each shape with every dtype, both layouts and both forms; each dtype with all of these, over the shapes
CASES = tuple(
    (shape, dtype, FORMATS[(i + j) % 2], (i // 2 + j + i % 2) % 2 == 0)
    for i, shape in enumerate(SHAPES)
    for j, dtype in enumerate(DTYPES)
)
POOLS = (
    *((1, (2, 8, 6, 5)), (5, (2, 16, 9, 4)), (7, (1, 8, 10, 8))),
    *((9, (1, 4, 9, 12)), (99, (1, 4, 2, 4))),
)


def check(inputs, grad=None, **options) -> torch.Tensor:
    grad = make_grad(inputs) if grad is None else grad
    before = {name: t.clone() for name, t in inputs.items() if t is not None}
    result = run(pool_mixer, inputs, grad, **options)
    assert_right(result, inputs, grad, **options)
    assert_same({name: inputs[name] for name in before}, before)  # nothing was written to
    return result["y"]


@pytest.mark.parametrize(("shape", "dtype", "layout", "residual"), CASES, ids=str)
def test_error_rule(shape, dtype, layout, residual) -> None:
    inputs = make_inputs(shape, dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs, residual=residual)


@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "nchw"), (torch.bfloat16, "channels_last")])
@pytest.mark.parametrize(("pool_size", "shape"), POOLS)
def test_pool_sizes(pool_size, shape, dtype, layout) -> None:
    inputs = make_inputs(shape, dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs, pool_size=pool_size, residual=True)


def test_pool_too_large_to_unroll() -> None:
    check(make_inputs((1, 4, 9, 7)), pool_size=11, residual=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_are_rounded_to_nearest(dtype) -> None:
    inputs = make_inputs((1, 16, 9, 10), dtype, parameter_dtype=torch.float32)
    y = pool_mixer(**inputs, residual=True)
    nearest = pool_mixer(**(inputs | {"x": inputs["x"].float()}), residual=True).to(dtype)
    assert (
        y == nearest
    ).double().mean() > 0.99  # fp32 rounding breaks a tie now and then; truncation halves of all


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x(layout) -> None:
    inputs = make_inputs((3, 17, 8, 6))
    x = inputs["x"] = as_layout(inputs["x"], layout)
    y = check(inputs, residual=True)
    assert y.is_contiguous(memory_format=memory_format_of(x))


@pytest.mark.parametrize(
    ("layout", "x_layout"),
    [
        *((layout, FORMATS[i % 2]) for i, layout in enumerate(GRAD_LAYOUTS)),
        *((layout, "channels_last") for layout in ("nchw", "channels_last", "expanded_hw")),
    ],
)
def test_layouts_of_grad(layout, x_layout) -> None:
    inputs = make_inputs((3, 17, 8, 6))
    inputs["x"] = as_layout(inputs["x"], x_layout)
    grad = as_layout(make_grad(inputs), layout)
    before = bits(grad).clone()
    check(inputs, grad, residual=True)
    assert torch.equal(bits(grad), before)


@pytest.mark.parametrize("layout", ["strided", "expanded", "offset", "column"])
def test_layouts_of_parameters(layout) -> None:
    inputs = make_inputs((3, 17, 8, 6))
    inputs |= {name: as_vector_layout(inputs[name], layout) for name in PARAMETERS}
    check(inputs, residual=True)


@pytest.mark.parametrize(
    "given", [(), ("weight",), ("bias",), ("layer_scale",), ("drop_scale", "weight")], ids=str
)
def test_missing_parameters(given) -> None:
    check(make_inputs((3, 17, 8, 6), parameters=given), residual=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_parameters_with_half_x(dtype) -> None:
    check(make_inputs((2, 17, 8, 6), dtype, parameter_dtype=torch.float32), residual=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("mean", "sigma"), [(1e2, 1.0), (1e4, 1.0), (1e2, 1e-2), (-1e3, 30.0)])
def test_mean_much_larger_than_sigma(mean, sigma, layout) -> None:
    inputs = make_inputs((2, 16, 9, 10), mean=mean, sigma=sigma)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs, residual=(layout == "nchw") == (sigma == 1.0))


@pytest.mark.parametrize(
    ("value", "dtype", "layout"),
    [
        (value, dtype, FORMATS[(i + j) % 2])
        for i, value in enumerate((0.1, -2.3, 1e4 + 1 / 3))
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
def test_constant_image_gives_exactly_zero(value, dtype, layout) -> None:
    x = as_layout(torch.full((2, 17, 9, 8), value).to(dtype), layout)
    assert torch.equal(pool_mixer(x, None, None), torch.zeros_like(x))
    assert torch.equal(pool_mixer(x, None, None, residual=True), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_variance_that_overflows(dtype) -> None:
    x = (1e30 * randn(2, 4, 7, 8)).to(dtype)
    assert torch.equal(pool_mixer(x, None, None), torch.zeros_like(x))  # rstd is 0, as in eager on CUDA
    assert torch.equal(pool_mixer(x, None, None, residual=True), x)


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        (name, value, DTYPES[(i + j) % 3])
        for i, name in enumerate(("x", *PARAMETERS))
        for j, value in enumerate((float("nan"), float("inf"), -float("inf")))
    ],
    ids=str,
)
def test_nan_and_infinity_where_eager_has_them(name, value, dtype) -> None:
    inputs = make_inputs((3, 5, 8, 6), dtype)
    inputs[name].view(-1)[-1] = value
    y = pool_mixer(**inputs, residual=True)
    expected = eager(**inputs, residual=True)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert torch.allclose(y[finite].float(), expected[finite].float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 14, 14), (3, 17, 9, 13), (2, 1, 1, 1), (1, 24, 20, 3)], ids=str)
def test_statistics_of_the_rounded_y(shape, dtype, layout) -> None:
    for mean, residual in ((-2.3, False), (1e3, True)):
        inputs = make_inputs(shape, dtype, mean=mean)
        inputs["x"] = as_layout(inputs["x"], layout)
        y, stats = pool_mixer_with_stats(**inputs, residual=residual)
        assert_statistics_of(stats, y)


@pytest.mark.parametrize("tiles", [1, 5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_given_statistics(dtype, tiles) -> None:
    inputs = make_inputs((2, 17, 9, 13), dtype, mean=40.0)
    stats = tiled_stats(inputs["x"], tiles)
    assert stats.shape[1] > tiles // 2
    grad = make_grad(inputs)
    result = run(mixer_with_stats, inputs, grad, residual=True, stats=stats)
    assert_right(result, inputs, grad, residual=True)
    for other in (torch.stack([stats] * 2)[1], stats.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_same({"y": mixer_with_stats(**inputs, residual=True, stats=other)}, {"y": result["y"]})


def test_given_statistics_are_used() -> None:
    x = randn(2, 4, 7, 8)
    quarter = reference.sample_stats(x) * torch.tensor([1.0, 1.0, 16.0])
    y, _ = pool_mixer_with_stats(x, None, None, stats=quarter, eps=0.0)
    assert torch.allclose(4 * y, pool_mixer(x, None, None, eps=0.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", FORMATS)
def test_64_bit_offsets_change_nothing(layout, monkeypatch) -> None:
    inputs = make_inputs((2, 17, 9, 6))
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = make_grad(inputs)
    narrow = run(pool_mixer, inputs, grad)
    mixer_launch = kernels.mixer_launch
    monkeypatch.setattr(kernels, "mixer_launch", lambda *args: mixer_launch(*args)._replace(wide=True))
    assert_same(run(pool_mixer, inputs, grad), narrow)


def test_samples_of_two_to_the_31_elements_get_64_bit_offsets() -> None:
    assert not kernels.mixer_launch(64, 56, 56, True, 3, 2).wide
    assert kernels.mixer_launch(64, 2**13, 2**12, True, 3, 2).wide
