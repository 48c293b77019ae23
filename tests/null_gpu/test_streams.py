"""The null GPU's own checks: devices, streams, captures and graphs."""

import ctypes

import pytest
import torch
import triton
import triton.language as tl

from .null_gpu import graph_launches, recorded, take_complaints

pytestmark = pytest.mark.host
RUNTIME = ctypes.CDLL("libcudart.so.13")
UNSUPPORTED, INVALIDATED, INVALID_HANDLE = 900, 901, 400


@triton.jit
def add_one(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i) + 1)


@pytest.fixture
def x() -> torch.Tensor:
    out = torch.empty(256, device="cuda")
    add_one[(1,)](out, BLOCK=256)  # compiled
    return out


def captured(action, stream=None) -> torch.cuda.CUDAGraph:
    """The graph of what the action does."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        action()
    return graph


def test_two_devices_and_their_streams() -> None:
    tensors = [torch.empty(256, device=f"cuda:{i}") for i in (0, 1)]
    with recorded() as launches:
        expected = []
        for current in (0, 1):
            for x in tensors:
                side = torch.cuda.Stream(x.device)
                with torch.cuda.device(current):
                    x.add_(1)
                    with torch.cuda.stream(side):
                        x.add_(1)
                    with torch.cuda.device(x.device), torch.cuda.stream(side):
                        add_one[(1,)](x, BLOCK=256)
                expected += [(x.device.index, 0), *[(x.device.index, side.cuda_stream)] * 2]
    assert [(launch.device, launch.stream) for launch in launches] == expected


def test_a_kernel_on_another_devices_stream_is_refused() -> None:
    x = torch.empty(256, device="cuda:0")
    add_one[(1,)](x, BLOCK=256)
    other = torch.cuda.Stream("cuda:1")
    argument = ctypes.c_uint64(x.data_ptr())
    driver, module, kernel = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
    binary = next(iter(add_one.device_caches[0][0].values())).asm["cubin"]
    assert driver.cuModuleLoadData(ctypes.byref(module), binary) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(kernel), module, b"add_one") == 0
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    stream = ctypes.c_void_p(other.cuda_stream)
    assert driver.cuLaunchKernel(kernel, 1, 1, 1, 128, 1, 1, 0, stream, arguments, None) == INVALID_HANDLE
    (text,) = take_complaints()
    assert "a stream of device 1 in a context of device 0" in text


def test_a_graph_replays_what_was_captured(x) -> None:
    with recorded() as launches:
        graph = captured(lambda: (add_one[(1,)](x, BLOCK=256), x.mul_(2)))
    stream = launches[0].stream
    assert [(launch.captured, launch.replayed) for launch in launches] == [(True, False)] * 2
    assert stream
    before = graph_launches()
    with recorded() as launches:
        graph.replay()
        graph.replay()
    assert graph_launches() == before + 2
    assert [launch.name[:7] for launch in launches] == ["add_one", "vectori"] * 2
    assert all(launch.replayed and not launch.captured and launch.stream == 0 for launch in launches)


def test_copies_are_replayed(x) -> None:
    host = torch.zeros(256).pin_memory()
    graph = captured(lambda: x.copy_(host, non_blocking=True))
    host.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert (x.cpu() == 3).all()


def test_a_stream_joins_a_capture_and_is_joined(x) -> None:
    side = torch.cuda.Stream()

    def fork_and_join() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        torch.cuda.current_stream().wait_stream(side)

    with recorded() as launches:
        captured(fork_and_join)
    assert [(launch.captured, launch.stream) for launch in launches] == [(True, side.cuda_stream)]


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (lambda x: torch.cuda.current_stream().synchronize(), "cuStreamSynchronize while"),
        (lambda x: torch.cuda.synchronize(), "cuCtxSynchronize while"),
        (lambda x: x[:1].item(), "cuStreamSynchronize while"),
        (lambda x: torch.cuda.current_stream().query(), "cuStreamQuery while"),
    ],
)
def test_waiting_in_a_capture_is_refused(x, action, text) -> None:
    """The call has error 900 and the capture's end 901, which is the one that torch shows."""
    with pytest.raises(torch.AcceleratorError, match="previous error during capture") as raised:
        captured(lambda: action(x))
    assert "not permitted when stream is capturing" in str(raised.value.__context__)
    assert text in take_complaints()[0]
    x.add_(1)  # the capture has ended


def test_allocating_in_a_capture_is_refused_by_its_mode() -> None:
    stream = torch.cuda.Stream()
    handle, pointer, graph = ctypes.c_void_p(stream.cuda_stream), ctypes.c_void_p(), ctypes.c_void_p()
    size = ctypes.c_size_t(4096)
    for mode, error in ((0, UNSUPPORTED), (1, UNSUPPORTED), (2, 0)):  # global, of the thread, relaxed
        assert RUNTIME.cudaStreamBeginCapture(handle, mode) == 0
        assert RUNTIME.cudaMalloc(ctypes.byref(pointer), size) == error
        assert RUNTIME.cudaStreamEndCapture(handle, ctypes.byref(graph)) == (INVALIDATED if error else 0)
    assert RUNTIME.cudaFree(pointer) == 0
    assert [text.split()[0] for text in take_complaints()] == ["cuMemAlloc"] * 2
    RUNTIME.cudaGetLastError()


def in_default_stream(x: torch.Tensor) -> None:
    with torch.cuda.stream(torch.cuda.default_stream()):
        add_one[(1,)](x, BLOCK=256)


def test_the_legacy_stream_may_not_wait_for_a_captured_one(x) -> None:
    """It waits for streams that were made without cudaStreamNonBlocking; torch makes none of those."""
    blocking = ctypes.c_void_p()
    assert RUNTIME.cudaStreamCreate(ctypes.byref(blocking)) == 0
    stream = torch.cuda.ExternalStream(blocking.value)
    with pytest.raises(torch.AcceleratorError, match="previous error during capture") as raised:
        captured(lambda: in_default_stream(x), stream)
    assert "legacy stream depend on a capturing blocking stream" in str(raised.value.__context__)
    assert "work in the legacy stream" in take_complaints()[0]


def test_work_in_the_legacy_stream_is_not_the_graphs(x) -> None:
    """A GPU does it at once and says nothing; here it is a complaint."""
    graph = captured(lambda: (x.add_(1), in_default_stream(x)))
    assert ["the graph will not have it" in text for text in take_complaints()] == [True]
    with recorded() as launches:
        graph.replay()
    assert len(launches) == 1


def test_a_stream_that_is_not_joined(x) -> None:
    side = torch.cuda.Stream()

    def fork() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)

    with pytest.raises(torch.AcceleratorError, match="unjoined work"):
        captured(fork)
    assert ["not joined" in text for text in take_complaints()] == [True]


def test_a_captured_stream_cannot_wait_for_work_from_outside(x) -> None:
    event = torch.cuda.Event()
    event.record()
    with pytest.raises(torch.AcceleratorError) as raised:
        captured(lambda: torch.cuda.current_stream().wait_event(event))
    assert "uncaptured work in another stream" in str(raised.value.__context__)
    assert ["an event from outside" in text for text in take_complaints()] == [True]


def test_a_stream_that_does_not_exist(x) -> None:
    with torch.cuda.stream(torch.cuda.ExternalStream(0x1234560)), pytest.raises(RuntimeError, match="handle"):
        add_one[(1,)](x, BLOCK=256)
    assert ["does not exist" in text for text in take_complaints()] == [True]
