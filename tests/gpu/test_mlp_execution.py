"""How the MLP runs on the CUDA backends: repeats, devices, streams, graphs, compiler, very large tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.devices import like_on, on
from support.layouts import as_layout
from support.mlp import PLAIN, make_grad, make_inputs
from support.problems import randn
from support.rule import assert_same, run

from poolformer_kernels import reference
from poolformer_kernels.ops import mlp
from poolformer_kernels.ops.mlp import mlp_with_stats

from .cases import FORMATS, over
from .mlp_cases import DTYPE, EACH, FUSED, NARROW, ODD, ROUNDS, SMALL, STAGES, check, each

F32, BF16 = torch.float32, torch.bfloat16

pytestmark = pytest.mark.usefixtures("backend")


# ---- repeats, devices, streams, graphs ---------------------------------------------------------------------


@over(
    "shape, hidden, dtype, layout",
    triton=[*each([STAGES[0], STAGES[3], FUSED], [BF16], FORMATS), (*ODD[0], F32, "nchw")],
    cuda=[
        *each([*ROUNDS, SMALL[0], *NARROW[3:6]], [BF16], FORMATS),
        *each([ROUNDS[0], ROUNDS[3]], [torch.float16], ["channels_last"]),
    ],
)
@pytest.mark.parametrize("save_hidden", [False, True], ids=["", "save_hidden"])
def test_ten_runs_are_bitwise_equal(shape, hidden, layout, dtype, save_hidden) -> None:
    inputs = make_inputs((max(16, shape[0]), *shape[1:]), hidden, dtype)
    grad = like_on("cuda", make_grad(inputs))
    inputs = on("cuda", {**inputs, "x": as_layout(inputs["x"], layout)})

    def everything():
        _, stats = mlp_with_stats(**inputs, residual=True)
        return run(mlp, inputs, grad, residual=True, save_hidden=save_hidden) | {"stats": stats}

    first = everything()
    for _ in range(9):
        assert_same(everything(), first)


@over("shape, hidden, dtype", triton=each(EACH, [F32]), cuda=each(SMALL, [BF16]))
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_that_is_not_current(shape, hidden, dtype) -> None:
    with torch.cuda.device(0):
        check(make_inputs(shape, hidden, dtype), layouts=FORMATS, device="cuda:1", residual=True)
        assert torch.cuda.current_device() == 0


@over("shape, hidden", triton=EACH, cuda=SMALL)
def test_stream_that_is_not_the_default(shape, hidden) -> None:
    inputs = on("cuda", make_inputs(shape, hidden, torch.bfloat16))
    grad = torch.randn_like(inputs["x"])
    expected = run(mlp, inputs, grad, residual=True)
    late = {name: torch.zeros_like(t) for name, t in inputs.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # kernels on another stream would read zeros
        for name, t in inputs.items():
            late[name].copy_(t)
        got = run(mlp, late, grad, residual=True)
    stream.synchronize()
    assert_same(got, expected)


@over("shape, hidden", triton=EACH, cuda=SMALL)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("save_hidden", [False, True], ids=["", "save_hidden"])
def test_graph_replay_with_changed_input(shape, hidden, layout, save_hidden) -> None:
    options = {"residual": True, "save_hidden": save_hidden}
    inputs = on("cuda", make_inputs(shape, hidden, torch.bfloat16))
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = torch.randn_like(inputs["x"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(mlp, inputs, grad, **options)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(mlp, inputs, grad, **options)
    for seed in (1, 2):
        inputs["x"].copy_(randn(*inputs["x"].shape, mean=seed, seed=seed))
        for name in ("w1", "b2", "norm_weight", "drop_scale"):
            inputs[name].mul_(1.5)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, run(mlp, inputs, grad, **options))


@over(
    "names",
    triton=[("another_number or (layouts_of_weights and w2)",)],
    cuda=[("layouts_of_weights or (saved_hidden and bfloat16 and relu) or (test_layouts and offset)",)],
)
def test_without_the_caching_allocator(names, backend) -> None:
    """Every tensor is memory of its own then, and a kernel that writes or reads past one faults."""
    tests = Path(__file__).with_name("test_mlp.py")
    selected = ["-k", f"{backend} and ({names})"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests), *selected],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# ---- autograd and the compiler -----------------------------------------------------------------------------


@pytest.mark.host
@over("shape, hidden", triton=[((1, 4, 7, 7), 9)], cuda=[((1, 64, 7, 7), 64), ((1, 192, 7, 7), 64)])
def test_double_backward_raises(shape, hidden, backend) -> None:
    inputs = on("cuda", make_inputs(shape, hidden, DTYPE[backend]))
    x = inputs.pop("x").requires_grad_()
    (dx,) = torch.autograd.grad(mlp(x, **inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@over("shape, hidden", triton=[((2, 5, 8, 6), 9)], cuda=[((2, 64, 8, 6), 64), ((2, 64, 9, 13), 128)])
def test_opcheck(shape, hidden, backend) -> None:
    inputs = on("cuda", make_inputs(shape, hidden, DTYPE[backend]))
    for t in inputs.values():
        t.requires_grad_()
    op = getattr(torch.ops.poolformer_kernels, f"mlp_{backend}").default
    for save_hidden in (False, True):
        torch.library.opcheck(op, (*inputs.values(), None, "gelu", 1e-5, True, True, True, save_hidden))


@over(
    "channels, hidden, layout, save_hidden",
    triton=[(64, 256, "channels_last", True), (320, 640, "nchw", False)],
    cuda=[(64, 256, "channels_last", True), (128, 512, "nchw", False), (192, 192, "channels_last", False)],
)
def test_compiled_whole_over_dynamic_batches(channels, hidden, layout, save_hidden, backend) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True)
    options = {"residual": True, "save_hidden": save_hidden}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            inputs = make_inputs((batch, channels, 14, 14), hidden, DTYPE[backend])
            grad = make_grad(inputs).cuda()
            inputs = on("cuda", {**inputs, "x": as_layout(inputs["x"], layout)})
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            torch._dynamo.mark_dynamic(leaves["x"], 0)
            torch._dynamo.mark_dynamic(leaves["drop_scale"], 0)
            y = compiled(**leaves, **options)
            got = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))
            got = {"y": y.detach()} | {f"d{name}": t for name, t in got.items()}
            assert_same(got, run(mlp, inputs, grad, **options))


# ---- more than 2^31 elements -------------------------------------------------------------------------------


@pytest.mark.large
@over(
    "shape, hidden, save_hidden, layout",
    triton=each(
        [
            ((170, 64, 448, 448), 64, False),
            ((1, 64, 8192, 4112), 64, False),
            ((17, 320, 320, 320), 1280, False),  # so many hidden activations, which are written
            ((44, 64, 448, 448), 256, True),
        ],
        FORMATS,
    ),
    cuda=each(
        [
            ((170, 64, 448, 448), 64, False),
            ((1, 64, 8192, 4112), 64, False),
            ((1, 128, 4096, 4112), 64, False),
            ((44, 64, 448, 448), 256, True),
        ],
        FORMATS,
    ),
)
def test_more_than_two_to_the_31_elements(shape, hidden, save_hidden, layout) -> None:
    """A token depends on no other, given statistics: the first and the last against the fp64 reference."""
    if torch.cuda.get_device_properties(0).total_memory < 64 * 2**30:
        pytest.skip("needs 64 GiB of device memory")
    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=fmt)
    x.normal_(-2.3, 0.5, generator=generator)
    tokens = x.numel() // shape[1]
    assert tokens * max(shape[1], hidden) > 2**31
    parameters = on("cuda", make_inputs((1, *shape[1:2], 1, 1), hidden, torch.bfloat16, parameters=PLAIN))
    del parameters["x"]
    size = x[0].numel()
    stats = torch.tensor([[[size, -2.3, 0.25 * size]]], device="cuda").expand(shape[0], 1, 3)

    def exact(x):
        doubled = {name: t if t is None else t.double() for name, t in parameters.items()}
        return lambda **options: reference.mlp(x.double(), **doubled, residual=True, **options)

    corners = [
        (slice(None, 1), ..., slice(None, 3), slice(None, 5)),
        (slice(-1, None), ..., slice(-3, None), slice(-5, None)),
    ]
    y, partials = mlp_with_stats(x, **parameters, norm=True, residual=True, stats=stats)
    for at in corners:
        wanted = exact(x[at])(norm=True, stats=stats[:1].double())
        torch.testing.assert_close(y[at].double(), wanted, rtol=2e-2, atol=5e-2)
    mean = reference.merge_stats(partials.double())[0]
    assert abs(mean[-1].item() - y[-1].mean(dtype=torch.float64).item()) < 1e-3
    del y, partials

    x.requires_grad_()
    parameters["b2"].requires_grad_()
    y = mlp(x, **parameters, residual=True, save_hidden=save_hidden)
    dx, db2 = torch.autograd.grad(
        y, (x, parameters["b2"]), torch.ones((), device="cuda").bfloat16().expand(y.shape)
    )
    for at in corners:
        corner = x[at].detach().double().requires_grad_()
        with torch.enable_grad():
            (wanted,) = torch.autograd.grad(exact(corner)().sum(), corner)
        torch.testing.assert_close(dx[at].double(), wanted, rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(db2.double(), torch.full_like(db2, tokens).double(), rtol=2**-7, atol=0)
