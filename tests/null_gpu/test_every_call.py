"""Both operators on both backends, in every layout and dtype: what each call launches, on this capability.

Long: `make test-long` runs it on every capability (tests/test_null_gpu.py), which compiles all kernels anew.
C++ is not judged where the build has no image for the device.
"""

import itertools
import threading
from collections import Counter

import pytest
import torch
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels.nn import PoolFormerBlock, PoolFormerStage

from .counts import EMPTY_CALL, MIXER_CALL, mlp_call
from .null_gpu import Launch, recorded

pytestmark = [pytest.mark.host, pytest.mark.long]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SIZES = {64: 56, 320: 14, 36: 9}  # channels of a narrow, a wide and an odd MLP, and the side of their images
CASES = list(itertools.product(DTYPES, LAYOUTS, SIZES))


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest):
    reason = pk.backend_reasons().get(request.param)
    if reason is not None and "the extension was built for" in reason:
        pytest.skip(f"not judged: {reason}")
    with pk.use_backend(request.param):
        yield request.param


def ours(launches: list[Launch]) -> dict[str, int]:
    """The package's kernels by name without template arguments; every one's binary was read and checked."""
    found = [launch for launch in launches if launch.ours]
    assert all(launch.known for launch in found)
    return dict(Counter(launch.name.split("<")[0] for launch in found))


def call(operator: str, x: Tensor) -> Tensor:
    """The residual form on parameters of its own, which need gradients."""
    channels = x.shape[1]

    def parameter(*shape: int) -> Tensor:
        return x.new_empty(shape).requires_grad_()

    weight, bias, scale = (parameter(channels) for _ in range(3))
    if operator == "pool_mixer":
        return pk.ops.pool_mixer(x, weight, bias, layer_scale=scale, residual=True)
    first = parameter(4 * channels, channels), parameter(4 * channels)
    second = parameter(channels, 4 * channels), parameter(channels)
    return pk.ops.mlp(
        *(x, *first, *second), norm_weight=weight, norm_bias=bias, layer_scale=scale, residual=True
    )


def launched(operator: str, x: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """By the call and by its backward, all in the current device's default stream."""
    with recorded() as forward:
        y = call(operator, x)
    with recorded() as backward:
        (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert (y.shape, y.dtype) == (dx.shape, dx.dtype) == (x.shape, x.dtype)
    assert len(x) == 0 or y.stride() == dx.stride() == x.stride()
    assert {(launch.device, launch.stream) for launch in forward + backward} <= {(0, 0)}
    return ours(forward), ours(backward)


def image(dtype: str, layout: str, channels: int, batch: int = 2) -> Tensor:
    shape = batch, channels, SIZES[channels], SIZES[channels]
    x = torch.empty(shape, dtype=DTYPES[dtype], device="cuda", memory_format=LAYOUTS[layout])
    return x.requires_grad_()


def expected(operator: str, backend: str, dtype: str, channels: int):
    if operator == "pool_mixer":
        return MIXER_CALL[backend]
    return mlp_call(backend, dtype, channels, torch.cuda.get_device_capability())


@pytest.mark.parametrize(("dtype", "layout", "channels"), CASES)
@pytest.mark.parametrize("operator", ["pool_mixer", "mlp"])
def test_a_call(backend, operator, dtype, layout, channels) -> None:
    found = launched(operator, image(dtype, layout, channels))
    assert found == expected(operator, backend, dtype, channels)


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", ["pool_mixer", "mlp"])
def test_a_view_that_begins_2_or_6_bytes_behind_a_multiple_of_16(backend, operator, layout, offset) -> None:
    elements = torch.empty(2 * 64 * 56 * 56 + offset, dtype=torch.bfloat16, device="cuda")[offset:]
    x = elements.view(2, 56, 56, 64).permute(0, 3, 1, 2)
    x = x if layout == "channels_last" else elements.view(2, 64, 56, 56)
    assert x.data_ptr() % 16 == 2 * offset
    assert x.is_contiguous(memory_format=LAYOUTS[layout])
    found = launched(operator, x.requires_grad_())
    assert found == expected(operator, backend, "bfloat16", 64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", ["pool_mixer", "mlp"])
def test_no_samples(backend, operator, layout) -> None:
    """Nothing is to be computed, and no grid is empty: a GPU refuses that."""
    forward, backward = launched(operator, image("bfloat16", layout, 64, batch=0))
    assert forward == {}
    assert backward == EMPTY_CALL.get((backend, operator), {})


# ---- a stage -----------------------------------------------------------------------------------------------


def stage(device: str = "cuda:0", channels: int = 64) -> PoolFormerStage:
    blocks = PoolFormerStage(*(PoolFormerBlock(channels) for _ in range(2)))
    return blocks.to(device, torch.bfloat16, memory_format=torch.channels_last)


def stage_images(device: str = "cuda:0") -> Tensor:
    x = torch.empty((2, 64, 56, 56), dtype=torch.bfloat16, device=device, memory_format=torch.channels_last)
    return x.requires_grad_()


def forward_and_backward(module: torch.nn.Module, x: Tensor) -> None:
    y = module(x)
    y.backward(torch.empty_like(y))


def test_a_compiled_stage_launches_what_eager_does(backend) -> None:
    blocks, x = stage(), stage_images()
    torch.compiler.reset()
    compiled = torch.compile(blocks, fullgraph=True)
    forward_and_backward(compiled, x)
    counts = []
    for module in (blocks, compiled):
        with recorded() as launches:
            forward_and_backward(module, x)
        counts.append(ours(launches))
    assert sum(counts[0].values()) > 20
    assert counts[0] == counts[1]


def test_inference_in_a_users_own_graph(backend) -> None:
    """Warm on a side stream, as torch's own documentation has it; no call in the capture is illegal."""
    blocks, x = stage().eval(), stage_images().detach()
    with torch.inference_mode():
        with recorded() as eager:
            blocks(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            blocks(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with recorded() as captured, torch.cuda.graph(graph):
            blocks(x)
        with recorded() as replayed:
            graph.replay()
    assert all(launch.captured for launch in captured)
    assert all(launch.replayed for launch in replayed)
    assert ours(eager) == ours(captured) == ours(replayed) != {}


def test_a_step_in_a_users_own_graph(backend) -> None:
    """Forward and backward together, into gradients that exist."""
    blocks, x = stage(), stage_images()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            forward_and_backward(blocks, x)
    torch.cuda.current_stream().wait_stream(side)
    with recorded() as eager:
        forward_and_backward(blocks, x)
    graph = torch.cuda.CUDAGraph()
    with recorded() as captured, torch.cuda.graph(graph):
        forward_and_backward(blocks, x)
    assert ours(eager) == ours(captured) != {}


def test_two_devices_from_two_threads(backend) -> None:
    """As DataParallel does: a replica and a stream for each device. No kernel is on another's."""
    modules = [stage(f"cuda:{i}") for i in range(2)]
    inputs = [stage_images(f"cuda:{i}") for i in range(2)]
    streams = [torch.cuda.Stream(f"cuda:{i}") for i in range(2)]
    failed: list[BaseException] = []

    def work(index: int, barrier: threading.Barrier) -> None:
        try:
            barrier.wait()
            with torch.cuda.device(index), torch.cuda.stream(streams[index]):
                for _ in range(3):
                    forward_and_backward(modules[index], inputs[index])
        except BaseException as error:
            failed.append(error)

    for stream in streams:
        stream.wait_stream(torch.cuda.default_stream(stream.device))
    with recorded() as launches:
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=work, args=(index, barrier)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    by_device = {i: [launch for launch in launches if launch.device == i] for i in range(2)}
    for index, found in by_device.items():
        assert {launch.stream for launch in found if launch.ours} == {streams[index].cuda_stream}
    assert ours(by_device[0]) == ours(by_device[1])
    assert sum(ours(by_device[0]).values()) > 60
