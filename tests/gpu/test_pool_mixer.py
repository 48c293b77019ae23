"""The token mixer's CUDA backends. Truth: fp64 on the CPU; eager: NCHW on the device (pytorch#188344)."""

import pytest
import torch
from helpers import (
    GRAD_LAYOUTS,
    HALVES,
    LAYOUTS,
    as_layout,
    assert_close_to_fp64,
    assert_same,
    eager,
    make_grad,
    make_inputs,
    randn,
    run,
    truth,
)

import poolformer_kernels as pk
from poolformer_kernels import reference
from poolformer_kernels.ops import pool_mixer
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

DTYPES = (torch.float32, *HALVES)
FORMATS = ("nchw", "channels_last")
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


@pytest.fixture(autouse=True, params=["triton"])
def backend(request):
    with pk.use_backend(request.param):
        yield request.param


def on(device, tensors):
    """The tensors with their strides on the device: expanded and sliced ones stay so."""
    return {name: t if t is None else like_on(device, t) for name, t in tensors.items()}


def like_on(device, t):
    size = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    flat = t.as_strided((size + t.storage_offset(),), (1,), 0).to(device)
    return flat.as_strided(t.shape, t.stride(), t.storage_offset())


def check(inputs, grad=None, device="cuda", **options) -> None:
    """The error rule, on the device; nothing given is written to."""
    grad = make_grad(inputs) if grad is None else grad
    cuda, cuda_grad = on(device, inputs), like_on(device, grad)
    before = {name: t.clone() for name, t in cuda.items() if t is not None}
    ours = run(pool_mixer, cuda, cuda_grad, **options)
    assert_same({name: cuda[name] for name in before}, before)
    assert torch.equal(cuda_grad.cpu(), grad)
    plain = {name: t if t is None else t.contiguous() for name, t in on(device, inputs).items()}
    theirs = run(eager, plain, cuda_grad.contiguous(), **options)
    right = truth(inputs, grad, **options)
    for name, value in ours.items():
        assert value.dtype == inputs["x" if name == "y" else name[1:]].dtype
        assert value.device == cuda["x"].device
        assert_close_to_fp64(
            value.cpu(), theirs[name].cpu(), right.values[name], scale=right.scales[name], ulps=8, what=name
        )
    assert ours["y"].is_contiguous(memory_format=reference.memory_format_of(inputs["x"]))


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, dtype, layout, residual) -> None:
    inputs = make_inputs(shape, dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs, residual=residual)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool_size", [1, 5, 7, 9, 11, 99])
def test_pool_sizes(pool_size, dtype, layout) -> None:
    inputs = make_inputs((2, 32, 13, 10), dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs, pool_size=pool_size, residual=True)


@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, grad_layout) -> None:
    inputs = make_inputs((3, 24, 9, 6))
    inputs["x"] = as_layout(inputs["x"], layout)
    check(inputs, as_layout(make_grad(inputs), grad_layout), residual=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_parameters_with_half_x(dtype) -> None:
    check(make_inputs((2, 64, 14, 14), dtype, parameter_dtype=torch.float32), residual=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("mean", "sigma"), [(1e2, 1.0), (1e4, 1.0), (1e2, 1e-2)])
def test_mean_much_larger_than_sigma(mean, sigma, layout) -> None:
    inputs = make_inputs((2, 64, 28, 28), mean=mean, sigma=sigma)
    inputs["x"] = as_layout(inputs["x"], layout)
    for residual in (True, False):
        check(inputs, residual=residual)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 64, 56, 56), (2, 17, 13, 29)], ids=str)
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
def test_ten_runs_are_bitwise_equal(layout) -> None:
    inputs = on("cuda", make_inputs((64, 96, 28, 28), torch.bfloat16))
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


def test_batch_past_the_grid_limits() -> None:
    x = randn(70_000, 4, 3, 2).cuda().requires_grad_()
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
        check(make_inputs((2, 64, 14, 14)), device="cuda:1", residual=True)
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


def test_opcheck() -> None:
    inputs = on("cuda", make_inputs((2, 5, 8, 6)))
    for t in inputs.values():
        t.requires_grad_()
    op = torch.ops.poolformer_kernels.pool_mixer_triton.default
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
