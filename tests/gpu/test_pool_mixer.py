"""The token mixer on the CUDA backends. Truth: the device's fp64; eager: NCHW there (pytorch#188344)."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from helpers import (
    GRAD_LAYOUTS,
    HALVES,
    LAYOUTS,
    adjoint_bias,
    as_layout,
    assert_same,
    eager,
    make_grad,
    make_inputs,
    randn,
    run,
    truth,
)

from poolformer_kernels import reference
from poolformer_kernels.ops import pool_mixer
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

from .cases import DTYPES, FORMATS, assert_same_truth, like_on, on, over
from .mixer_cases import check

SHAPES = (
    *(
        (513, 64, 14, 14),
        (8, 64, 56, 56),
        (4, 128, 28, 28),
        (3, 320, 14, 14),
        (3, 512, 7, 7),
        (2, 96, 56, 56),
    ),
    *(
        (1, 768, 7, 7),
        (3, 17, 13, 29),
        (2, 3, 9, 1),
        (2, 1, 1, 31),
        (5, 24, 1, 1),
        (2, 64, 96, 96),
        (1, 5, 2, 2),
    ),
)
TAILS = (  # tiles of channels, cut; wide packs along rows of 8 and of 4; tall images
    (2, 1100, 3, 5),
    (2, 24, 30, 8),
    (2, 20, 33, 12),
    (1, 8, 100, 9),
)
POOLS = (1, 5, 7, 9, 11, 99)

pytestmark = pytest.mark.usefixtures("backend")


@over("shape", cuda=[((3, 17, 13, 29),)])
def test_truth_of_the_device_is_the_cpus(shape) -> None:
    inputs = make_inputs(shape, torch.bfloat16)
    assert_same_truth(truth, inputs, make_grad(inputs), residual=True)


@over(
    "shape, dtype, residual",
    triton=[
        *((shape, DTYPES[(i + 1) % 3], True) for i, shape in enumerate(SHAPES)),
        *((SHAPES[0], dtype, True) for dtype in (torch.float32, torch.float16)),
        (SHAPES[0], torch.bfloat16, False),
    ],
    cuda=product([*SHAPES, *TAILS], DTYPES, [True, False]),
)
def test_error_rule(shape, dtype, residual) -> None:
    check(make_inputs(shape, dtype), layouts=FORMATS, residual=residual)


@over(
    "pool_size, dtype",
    triton=[(pool_size, DTYPES[i % 3]) for i, pool_size in enumerate(POOLS)],
    cuda=product(POOLS, DTYPES),
)
def test_pool_sizes(pool_size, dtype) -> None:
    check(make_inputs((2, 32, 13, 10), dtype), layouts=FORMATS, pool_size=pool_size, residual=True)


@over(
    "shape, dtype, grad_layout",
    triton=product([(3, 24, 9, 6)], [torch.float32], GRAD_LAYOUTS),
    cuda=product([(3, 24, 9, 6), (3, 24, 6, 8)], [torch.float32, torch.bfloat16], GRAD_LAYOUTS),
)
def test_layouts(shape, dtype, grad_layout) -> None:
    inputs = make_inputs(shape, dtype)
    inputs["x"] = as_layout(inputs["x"], "expanded")  # which repeats, so the others can hold it too
    check(inputs, as_layout(make_grad(inputs), grad_layout), layouts=LAYOUTS, residual=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_parameters_with_half_x(dtype) -> None:
    inputs = make_inputs((2, 64, 14, 14), dtype, parameter_dtype=torch.float32)
    check(inputs, layouts=FORMATS, residual=True)


@pytest.mark.parametrize(("mean", "sigma"), [(1e2, 1.0), (1e4, 1.0), (1e2, 1e-2)])
def test_mean_much_larger_than_sigma(mean, sigma) -> None:
    inputs = make_inputs((2, 64, 28, 28), mean=mean, sigma=sigma)
    for residual in (True, False):
        check(inputs, layouts=FORMATS, residual=residual)


@pytest.mark.parametrize("layout", FORMATS)
@over("dtype", triton=[(torch.bfloat16,)], cuda=[(dtype,) for dtype in DTYPES])
@pytest.mark.parametrize("value", [0.1, 1e4 + 1 / 3])
def test_constant_image_gives_exactly_zero(value, dtype, layout) -> None:
    x = as_layout(torch.full((2, 64, 14, 14), value, device="cuda").to(dtype), layout)
    assert torch.equal(pool_mixer(x, None, None), torch.zeros_like(x))
    assert torch.equal(pool_mixer(x, None, None, residual=True), x)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "layer_scale", "drop_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
def test_nan_and_infinity_where_eager_has_them(value, name) -> None:
    inputs = make_inputs((3, 16, 8, 6))
    inputs[name].view(-1)[-1] = value
    inputs = on("cuda", inputs)
    y, expected = pool_mixer(**inputs, residual=True), eager(**inputs, residual=True)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@over(
    "shape, dtype, layout",
    triton=[
        *product([(4, 64, 56, 56)], [torch.bfloat16], FORMATS),
        *product([(2, 17, 13, 29)], [torch.float32], FORMATS),
    ],
    cuda=product([(4, 64, 56, 56), (2, 17, 13, 29), (2, 1100, 3, 5)], DTYPES, FORMATS),
)
def test_statistics_are_handed_on(shape, dtype, layout) -> None:
    inputs = on("cuda", make_inputs(shape, dtype, mean=30.0))
    inputs["x"] = as_layout(inputs["x"], layout)
    y, stats = pool_mixer_with_stats(**inputs, residual=True)
    mean, variance = reference.merge_stats(stats.double())
    exact_mean, exact_variance = reference.merge_stats(reference.sample_stats(y.double()))
    assert torch.allclose(mean, exact_mean, rtol=1e-6)
    assert torch.allclose(variance, exact_variance, rtol=1e-5)
    again = inputs | {"x": y}
    chained, _ = pool_mixer_with_stats(**again, residual=True, stats=stats)
    own = pool_mixer(**again, residual=True)
    ulp = torch.finfo(dtype).eps
    assert torch.allclose(chained.double(), own.double(), rtol=ulp, atol=8 * ulp)


@pytest.mark.parametrize("layout", FORMATS)
@over(
    "shape, dtype",
    triton=[((64, 96, 28, 28), torch.bfloat16)],
    cuda=[
        *product([(64, 96, 28, 28), (64, 64, 56, 56)], [torch.bfloat16]),
        *product([(64, 17, 13, 29), (16, 320, 14, 14)], [torch.float32, torch.float16]),
    ],
)
def test_ten_runs_are_bitwise_equal(shape, dtype, layout) -> None:
    inputs = on("cuda", make_inputs(shape, dtype))
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = like_on("cuda", make_grad(inputs | {"x": inputs["x"].cpu()}))
    first = run(pool_mixer, inputs, grad, residual=True)
    for _ in range(9):
        assert_same(run(pool_mixer, inputs, grad, residual=True), first)


def test_empty_batch() -> None:
    inputs = on("cuda", make_inputs((0, 5, 8, 6)))
    result = run(pool_mixer, inputs, torch.empty_like(inputs["x"]), residual=True)
    assert result["y"].shape == (0, 5, 8, 6)
    assert torch.equal(result["dweight"], torch.zeros(5, device="cuda"))


@pytest.mark.parametrize("layout", FORMATS)
def test_batch_past_the_grid_limits(layout) -> None:
    x = as_layout(randn(70_000, 4, 3, 2), layout).cuda().requires_grad_()
    y = pool_mixer(x, None, None, residual=True)
    tail = x.detach()[-3:].clone().requires_grad_()
    y.backward(torch.ones_like(y))
    expected = pool_mixer(tail, None, None, residual=True)
    expected.backward(torch.ones_like(expected))
    assert torch.equal(y[-3:], expected)
    assert torch.equal(x.grad[-3:], tail.grad)


@pytest.mark.large
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(170, 64, 448, 448), (1, 64, 8192, 4112)], ids=["batch", "sample"])
def test_more_than_two_to_the_31_elements(shape, layout) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of device memory")
    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=fmt)
    x.normal_(-2.3, 0.5, generator=generator)
    assert x.numel() > 2**31
    y = pool_mixer(x, None, None, residual=True)
    corner = (
        x[-1:, -2:, -40:, -30:].double().contiguous()
    )  # the last elements; all but its upper and left edge
    pooled = torch.nn.functional.avg_pool2d(
        corner, 3, 1, 1, count_include_pad=False
    )  # see only what is in it
    expected = corner + (pooled - corner) / (0.25 + 1e-5) ** 0.5
    assert torch.allclose(y[-1:, -2:, -39:, -29:].double(), expected[..., 1:, 1:], rtol=2e-2, atol=5e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_that_is_not_current() -> None:
    with torch.cuda.device(0):
        check(make_inputs((2, 64, 14, 14)), layouts=FORMATS, device="cuda:1", residual=True)
        assert torch.cuda.current_device() == 0


def test_stream_that_is_not_the_default() -> None:
    inputs = on("cuda", make_inputs((8, 64, 56, 56)))
    grad = torch.randn_like(inputs["x"])
    expected = run(pool_mixer, inputs, grad, residual=True)
    late = {name: torch.zeros_like(t) for name, t in inputs.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # kernels on another stream would read zeros
        for name, t in inputs.items():
            late[name].copy_(t)
        got = run(pool_mixer, late, grad, residual=True)
    stream.synchronize()
    assert_same(got, expected)


@pytest.mark.parametrize("layout", FORMATS)
def test_graph_replay_with_changed_input(layout) -> None:
    inputs = on("cuda", make_inputs((4, 64, 28, 28), torch.bfloat16))
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = torch.randn_like(inputs["x"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(pool_mixer, inputs, grad, residual=True)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(pool_mixer, inputs, grad, residual=True)
    for seed in (1, 2):
        inputs["x"].copy_(randn(*inputs["x"].shape, mean=seed, seed=seed))
        inputs["weight"].mul_(1.5)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, run(pool_mixer, inputs, grad, residual=True))


def test_without_the_caching_allocator(backend) -> None:
    """Every tensor is memory of its own then, and a kernel that writes or reads past one faults."""
    selected = f"{backend} and (test_pool_sizes or test_statistics or (test_layouts and offset))"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", selected],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.host
def test_double_backward_raises() -> None:
    x = randn(1, 4, 7, 7).cuda().requires_grad_()
    (dx,) = torch.autograd.grad(pool_mixer(x, None, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_autocast_keeps_the_residual_stream_in_float32() -> None:
    inputs = on("cuda", make_inputs((2, 16, 8, 6), torch.bfloat16, parameter_dtype=torch.float32))
    with torch.autocast("cuda", torch.bfloat16):
        y = pool_mixer(**inputs, residual=True)
    assert y.dtype == torch.float32
    assert torch.equal(y, pool_mixer(**(inputs | {"x": inputs["x"].float()}), residual=True))


def test_opcheck(backend) -> None:
    inputs = on("cuda", make_inputs((2, 5, 8, 6)))
    for t in inputs.values():
        t.requires_grad_()
    op = getattr(torch.ops.poolformer_kernels, f"pool_mixer_{backend}").default
    torch.library.opcheck(op, (*inputs.values(), None, 3, 1e-5, True, True))


@pytest.mark.parametrize("layout", FORMATS)
def test_compiled_whole_over_dynamic_batches(layout) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(pool_mixer, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            inputs = on("cuda", make_inputs((batch, 64, 14, 14)))
            inputs["x"] = as_layout(inputs["x"], layout)
            torch._dynamo.mark_dynamic(inputs["x"], 0)
            torch._dynamo.mark_dynamic(inputs["drop_scale"], 0)
            got = compiled(**inputs, residual=True)
            assert torch.equal(got, pool_mixer(**inputs, residual=True))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("pool_size", [3, 5, 7])
def test_no_bias_of_the_adjoint(pool_size, layout) -> None:
    assert abs(adjoint_bias(pool_size, layout, "cuda")) < 0.05
