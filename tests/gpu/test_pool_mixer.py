"""The token mixer where there is a device: streams, graphs, sizes past its limits; numbers: the contract."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.devices import assert_same_truth, on
from support.layouts import as_layout
from support.pool_mixer import make_grad, make_inputs, truth
from support.problems import randn
from support.rule import assert_same, run

from poolformer_kernels.ops import pool_mixer

from .cases import FORMATS, over
from .mixer_cases import check

pytestmark = pytest.mark.usefixtures("backend")


@over("shape", cuda=[((3, 17, 13, 29),)])
def test_truth_of_the_device_is_the_cpus(shape) -> None:
    inputs = make_inputs(shape, torch.bfloat16)
    assert_same_truth(truth, inputs, make_grad(inputs), residual=True)


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
    selected = "test_pool_sizes or test_returned_statistics or (test_layouts and offset)"
    contract = str(Path(__file__).parents[1] / "contract" / "pool_mixer.py")
    ours = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "POOLFORMER_TEST_TARGETS": backend}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", contract, "-k", selected],
        env=os.environ | ours,
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
