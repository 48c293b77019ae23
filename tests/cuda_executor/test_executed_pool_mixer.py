"""The token mixer's kernels in the executor: error rule, layouts, statistics, hard values, determinism."""

import pytest
import torch
from helpers import (
    GRAD_LAYOUTS,
    HALVES,
    LAYOUTS,
    PARAMETERS,
    VECTOR_LAYOUTS,
    adjoint_bias,
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
from torch._subclasses.fake_tensor import FakeTensorMode

from poolformer_kernels import reference
from poolformer_kernels.backends import cuda
from poolformer_kernels.layout import memory_format_of
from poolformer_kernels.ops import pool_mixer
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

pytestmark = pytest.mark.sampled(3)

FORWARD = torch.ops.poolformer_kernels.pool_mixer_cuda.default
BACKWARD = torch.ops.poolformer_kernels.pool_mixer_cuda_backward.default
DTYPES = (torch.float32, *HALVES)
FORMATS = ("nchw", "channels_last")
# H != W, one pixel, row or column, narrower than the pool; strips of 7 rows, more and fewer; rows and
# channels of whole vectors and not; several tiles along columns and channels
SHAPES = (
    *((2, 64, 14, 14), (3, 17, 9, 13), (1, 96, 7, 7), (2, 3, 13, 29), (1, 320, 3, 7), (1, 1040, 2, 2)),
    *(
        (2, 1, 6, 4),
        (2, 24, 1, 1),
        (1, 16, 1, 9),
        (2, 5, 8, 1),
        (1, 12, 8, 12),
        (2, 8, 15, 16),
        (1, 8, 29, 8),
    ),
)
POOLS = (
    *((1, (2, 8, 6, 5)), (5, (2, 16, 9, 4)), (7, (1, 8, 10, 8))),
    *((9, (1, 4, 9, 12)), (99, (1, 4, 2, 4)), (2**31 - 1, (1, 3, 2, 5))),
)


def check(inputs, grad=None, **options) -> None:
    grad = make_grad(inputs) if grad is None else grad
    before = {name: t.clone() for name, t in inputs.items() if t is not None}
    assert_right(run(pool_mixer, inputs, grad, **options), inputs, grad, **options)
    assert_same({name: inputs[name] for name in before}, before)  # nothing was written to


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, dtype, layout, residual) -> None:
    inputs = make_inputs(shape, dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs, residual=residual)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pool_size", "shape"), POOLS)
def test_pool_sizes(pool_size, shape, dtype, layout) -> None:
    inputs = make_inputs(shape, dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs, pool_size=pool_size, residual=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x(layout, dtype) -> None:
    inputs = make_inputs((3, 16, 8, 8), dtype)
    x = inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs, residual=True)
    y = pool_mixer(**inputs)
    assert y.is_contiguous(memory_format=memory_format_of(x))


@pytest.mark.parametrize("x_layout", FORMATS)
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_layouts_of_grad(layout, x_layout) -> None:
    inputs = make_inputs((3, 8, 8, 4))
    inputs["x"] = as_layout(inputs["x"], x_layout)
    grad = as_layout(make_grad(inputs), layout)
    before = bits(grad).clone()
    check(inputs, grad, residual=True)
    assert torch.equal(bits(grad), before)


@pytest.mark.parametrize("layout", VECTOR_LAYOUTS)
def test_layouts_of_parameters(layout) -> None:
    inputs = make_inputs((3, 17, 8, 6))
    inputs |= {name: as_vector_layout(inputs[name], layout) for name in PARAMETERS}
    check(inputs, residual=True)


@pytest.mark.parametrize(
    "given", [(), ("weight",), ("bias",), ("layer_scale",), ("drop_scale", "weight")], ids=str
)
def test_missing_parameters(given) -> None:
    check(make_inputs((3, 17, 8, 6), parameters=given), residual=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_parameters_with_half_x(dtype, layout) -> None:
    inputs = make_inputs((2, 16, 8, 8), dtype, parameter_dtype=torch.float32)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs, residual=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("mean", "sigma"), [(1e2, 1.0), (1e4, 1.0), (1e2, 1e-2), (-1e3, 30.0)])
def test_mean_much_larger_than_sigma(mean, sigma, layout) -> None:
    inputs = make_inputs((2, 16, 9, 12), mean=mean, sigma=sigma)
    inputs["x"] = as_layout(inputs["x"], layout)
    for residual in (True, False):
        check(inputs, residual=residual)


@pytest.mark.parametrize("pool_size", [3, 5])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.1, -2.3, 1e4 + 1 / 3])
def test_constant_image_gives_exactly_zero(value, dtype, layout, pool_size) -> None:
    for width in (8, 5):
        x = as_layout(torch.full((2, 16, 9, width), value).to(dtype), layout)
        assert torch.equal(pool_mixer(x, None, None, pool_size=pool_size), torch.zeros_like(x))
        assert torch.equal(pool_mixer(x, None, None, pool_size=pool_size, residual=True), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_variance_that_overflows(dtype) -> None:
    x = (1e30 * randn(2, 4, 7, 8)).to(dtype)
    assert torch.equal(pool_mixer(x, None, None), torch.zeros_like(x))  # rstd is 0, as in eager on CUDA
    assert torch.equal(pool_mixer(x, None, None, residual=True), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "layer_scale", "drop_scale"])
def test_nan_and_infinity_where_eager_has_them(name, value, dtype) -> None:
    inputs = make_inputs((3, 8, 8, 6), dtype)
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    inputs[name][(-1,) * inputs[name].dim()] = value
    y = pool_mixer(**inputs, residual=True)
    expected = eager(**(inputs | {"x": inputs["x"].contiguous()}), residual=True)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert torch.allclose(y[finite].float(), expected[finite].float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 64, 14, 14), (3, 17, 9, 13), (2, 1, 1, 1), (1, 24, 20, 3), (1, 8, 8, 24)], ids=str
)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
def test_statistics_of_the_rounded_y(residual, shape, dtype, layout) -> None:
    for mean in (-2.3, 1e3):
        inputs = make_inputs(shape, dtype, mean=mean)
        inputs["x"] = as_layout(inputs["x"], layout)
        y, stats = pool_mixer_with_stats(**inputs, residual=residual)
        assert_statistics_of(stats, y)


@pytest.mark.parametrize("pool_size", [3, 5])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 37, 70), (0, 5, 8, 6)], ids=str)
def test_the_fake_has_the_kernels_tiles(shape, layout, pool_size) -> None:
    with FakeTensorMode():
        x = as_layout(torch.empty(shape), layout)
        fake = [t.shape for t in FORWARD(x, None, None, None, None, None, pool_size, 1e-5, True, True)]
    x = as_layout(randn(*shape), layout)
    real = FORWARD(x, None, None, None, None, None, pool_size, 1e-5, True, True)
    assert fake == [t.shape for t in real]
    assert real[2].shape[1] == cuda.stats_tiles(x.shape, memory_format_of(x) == torch.channels_last, 3)


@pytest.mark.parametrize("tiles", [1, 5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_given_statistics(dtype, tiles) -> None:
    inputs = make_inputs((2, 17, 9, 13), dtype, mean=40.0)
    stats = tiled_stats(inputs["x"], tiles)
    assert stats.shape[1] > tiles // 2
    grad = make_grad(inputs)
    for given in (stats, torch.stack([stats] * 2)[1], stats.transpose(1, 2).contiguous().transpose(1, 2)):
        mixer = lambda given=given, **kw: pool_mixer_with_stats(**kw, stats=given, return_stats=False)[0]  # noqa: E731
        assert_right(run(mixer, inputs, grad, residual=True), inputs, grad, residual=True)


def test_given_statistics_are_used() -> None:
    x = randn(2, 4, 7, 8)
    quarter = reference.sample_stats(x) * torch.tensor([1.0, 1.0, 16.0])
    y, _ = pool_mixer_with_stats(x, None, None, stats=quarter, eps=0.0)
    assert torch.allclose(4 * y, pool_mixer(x, None, None, eps=0.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", FORMATS)
def test_loads_of_every_width_agree(layout) -> None:
    """An unaligned start makes single loads of what vectors load elsewhere: the same sums, the same order."""
    for dtype, width in ((torch.bfloat16, 8), (torch.bfloat16, 12), (torch.float32, 8)):
        inputs = make_inputs((2, 16, 9, width), dtype)
        grad = as_layout(make_grad(inputs), layout)
        options = {"residual": True, "stats": tiled_stats(inputs["x"], 3)}
        aligned = run(mixer_with_stats, inputs | {"x": as_layout(inputs["x"], layout)}, grad, **options)
        offset = as_layout(inputs["x"], "offset" if layout == "nchw" else "offset_last")
        assert offset.data_ptr() % 16 != 0
        unaligned = run(mixer_with_stats, inputs | {"x": offset}, grad, **options)
        assert_same({"y": unaligned["y"]}, {"y": aligned["y"]})


@pytest.mark.parametrize("layout", FORMATS)
def test_empty_batch(layout) -> None:
    inputs = make_inputs((0, 5, 8, 6))
    inputs["x"] = as_layout(inputs["x"], layout)
    result = run(pool_mixer, inputs, make_grad(inputs), residual=True)
    assert result["y"].shape == (0, 5, 8, 6)
    for name in ("dweight", "dbias", "dlayer_scale"):
        assert torch.equal(result[name], torch.zeros(5))
    _, stats = pool_mixer_with_stats(**inputs)
    assert stats.shape[0] == 0
    assert stats.shape[2] == 3


def test_small_shared_memory(executor_library) -> None:
    """Rows too wide for what a block may have of it stay in registers."""
    inputs = make_inputs((2, 512, 4, 3))
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    try:
        for kilobytes in (227, 99, 16):
            executor_library.executor_shared(kilobytes * 1024)
            check(inputs, residual=True)
    finally:
        executor_library.executor_shared(227 * 1024)


def test_batches_choose_their_strips() -> None:
    """Small batches get more and smaller tiles; the partials nobody has count nothing."""
    for batch in (1, 7):
        inputs = make_inputs((batch, 64, 20, 20), torch.bfloat16, parameters=("weight", "layer_scale"))
        inputs["x"] = as_layout(inputs["x"], "channels_last")
        y, stats = pool_mixer_with_stats(**inputs, residual=True)
        assert stats.shape == (batch, cuda.stats_tiles(y.shape, True, 3), 3)
        assert (stats[..., 0] > 0).sum(1).tolist() == [{1: 5, 7: 2}[batch]] * batch
        assert torch.equal(stats[..., 0].sum(1), torch.full((batch,), float(y[0].numel())))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    inputs = make_inputs((5, 16, 9, 6))
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    grad = make_grad(inputs)
    whole = run(pool_mixer, inputs, grad, residual=True)
    one = inputs | {"x": inputs["x"][3:4], "drop_scale": inputs["drop_scale"][3:4]}
    alone = run(pool_mixer, one, grad[3:4], residual=True)
    names = ("y", "dx", "ddrop_scale")
    assert_same({n: alone[n] for n in names}, {n: whole[n][3:4] for n in names})


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("shape", "pool_size"), [((3, 16, 9, 12), 3), ((2, 8, 9, 16), 3), ((3, 17, 9, 5), 3), ((2, 5, 6, 5), 5)]
)
def test_runs_and_orders_of_threads_are_bitwise_equal(shape, pool_size, layout, other_orders) -> None:
    inputs = make_inputs(shape, torch.bfloat16)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = make_grad(inputs)

    def results():
        y, stats = pool_mixer_with_stats(**inputs, residual=True, pool_size=pool_size)
        values = run(pool_mixer, inputs, grad, residual=True, pool_size=pool_size)
        assert_same({"y": y}, {"y": values["y"]})
        return values | {"stats": stats}

    first = results()
    for _ in range(9):
        assert_same(results(), first)
    for _ in other_orders():
        assert_same(results(), first)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced_hw", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, layout) -> None:
    inputs = make_inputs((2, 8, 8, 6), dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = make_grad(inputs)
    for t in inputs.values():
        t.requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for stats in (True, False):
        torch.library.opcheck(FORWARD, (*inputs.values(), None, 3, 1e-5, True, stats), test_utils=checks)
    x, weight, bias, scale, drop = (t.detach() for t in inputs.values())
    _, mean_rstd, _ = FORWARD(x, weight, bias, scale, drop, None, 3, 1e-5, True, False)
    arguments = (grad, x, mean_rstd, weight, bias, scale, drop, 3, True)
    torch.library.opcheck(BACKWARD, arguments, test_utils=checks)


@pytest.mark.parametrize(("pool_size", "eps"), [(4, 1e-5), (-1, 1e-5), (3, -1.0)])
def test_options_that_are_refused(pool_size, eps) -> None:
    with pytest.raises(RuntimeError, match="pool_mixer_cuda"):
        FORWARD(randn(1, 2, 3, 4), None, None, None, None, None, pool_size, eps, True, True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("pool_size", [3, 5])
def test_no_bias_of_the_adjoint(pool_size, layout) -> None:
    assert abs(adjoint_bias(pool_size, layout)) < 0.05
