"""Kernels whose first use is in a capture: in processes of their own, where nothing was used before."""

import ctypes
import subprocess
import sys

import pytest
import torch

from .helpers import CUDA, RUNTIME, cubin, launch
from .null_gpu import take_complaints

pytestmark = pytest.mark.host
UNSUPPORTED, INVALIDATED = 900, 901
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2

CAPTURE = """
import ctypes
import torch
import poolformer_kernels as pk
from null_gpu.null_gpu import recorded

def run(device):
    x = torch.empty({size}, dtype=torch.bfloat16, device=device).to(memory_format=torch.channels_last)
    w1, w2 = (torch.empty(size, dtype=torch.bfloat16, device=device) for size in ((256, 64), (64, 256)))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.device(device), recorded() as launches, torch.cuda.graph(graph, stream=stream):
        {call}
        mode = ctypes.c_int(2)
        ctypes.CDLL("libcudart.so.13").cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        assert mode.value == 0  # global
        ctypes.CDLL("libcudart.so.13").cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    assert all(launch.captured and launch.device == int(device[-1]) for launch in launches)
    print(*(launch.name.partition("<")[0] for launch in launches))

with pk.use_backend("cuda"), torch.inference_mode():
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        run(device)
"""
MIXER = "pk.ops.pool_mixer(x, None, None)"
MLP = "pk.ops.mlp(x, w1, None, w2, None, norm=True, activation='gelu')"


@pytest.mark.parametrize(
    ("call", "size", "kernels"),
    [
        (MIXER, (2, 64, 56, 56), "norm_stats pool_mixer_fwd"),
        (MIXER, (1, 64, 112, 112), "norm_stats stats_merge pool_mixer_fwd"),
        (MLP, (2, 64, 56, 56), "norm_stats mlp_pack mlp_fwd_sm90"),
        (MLP.replace("gelu", "relu"), (2, 64, 56, 56), "norm_stats mlp_fwd"),
        (MLP, (1, 64, 112, 112), "norm_stats stats_merge mlp_pack mlp_fwd_sm90"),
    ],
    ids=["mixer", "mixer of many partials", "mlp", "mlp of sm_80", "mlp of many partials"],
)
def test_the_first_inference_may_be_a_captures(call, size, kernels) -> None:
    """Kernels are loaded on each device, without a word, and the thread's mode is what it was."""
    code = CAPTURE.replace("{call}", call).replace("{size}", str(size))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [kernels] * 3


@pytest.fixture
def kernel_of(tmp_path):
    """A kernel of a module that was just loaded, and the error of both calls."""
    torch.empty(1, device="cuda")
    binary = cubin(tmp_path)

    def load() -> tuple[ctypes.c_void_p, int]:
        module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        error = CUDA.cuModuleLoadData(ctypes.byref(module), binary)
        return kernel, error or CUDA.cuModuleGetFunction(ctypes.byref(kernel), module, b"bare")

    return load


def test_loading_in_a_capture_is_refused_by_its_mode(kernel_of) -> None:
    stream, graph = torch.cuda.Stream().cuda_stream, ctypes.c_void_p()
    handle, pointer = ctypes.c_void_p(stream), torch.empty(1, device="cuda").data_ptr()
    for capture, thread, error in (
        *((GLOBAL, GLOBAL, UNSUPPORTED), (THREAD_LOCAL, GLOBAL, UNSUPPORTED), (RELAXED, GLOBAL, 0)),
        *((GLOBAL, RELAXED, 0), (GLOBAL, THREAD_LOCAL, UNSUPPORTED)),
    ):
        mode = ctypes.c_int(thread)
        assert RUNTIME.cudaStreamBeginCapture(handle, capture) == 0
        assert RUNTIME.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
        kernel, found = kernel_of()
        assert RUNTIME.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
        assert found == error
        if not error:
            assert launch(kernel, pointer, stream=stream) == 0
        assert RUNTIME.cudaStreamEndCapture(handle, ctypes.byref(graph)) == (INVALIDATED if error else 0)
        assert [text.split()[0] for text in take_complaints()] == ["cuModuleLoadData"] * bool(error)
    RUNTIME.cudaGetLastError()


def test_a_registered_kernel_is_loaded_at_its_first_use(tmp_path) -> None:
    """What nvcc's host code launches; on each device, and in a capture only where its mode allows it."""
    from .test_modules import launch_registered

    graph = ctypes.c_void_p()
    images = {90: cubin(tmp_path)}
    stream = torch.cuda.Stream().cuda_stream
    for capture, error in ((GLOBAL, UNSUPPORTED), (RELAXED, 0)):
        assert RUNTIME.cudaStreamBeginCapture(ctypes.c_void_p(stream), capture) == 0
        assert launch_registered(images, b"bare", stream) == error
        expected = INVALIDATED if error else 0
        assert RUNTIME.cudaStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph)) == expected
    (text,) = take_complaints()
    assert text == "the first use of bare while a stream is captured"
    RUNTIME.cudaGetLastError()
