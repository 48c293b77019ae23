"""The null GPU's own checks: memory, launches and what a GPU refuses."""

import ctypes
import os
import signal
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from .helpers import CUDA, RUNTIME, complaint, cubin, launch
from .null_gpu import recorded, take, take_complaints

pytestmark = pytest.mark.host
INVALID_VALUE = 1
ILLEGAL_ADDRESS, OUT_OF_RESOURCES, COOPERATIVE_TOO_LARGE = 700, 701, 720
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@triton.jit
def add_one(x, y, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < count) + 1, i < count)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, ctypes.c_void_p]:
    torch.cuda.init()
    torch.empty(1, device="cuda")
    module = ctypes.c_void_p()
    assert CUDA.cuModuleLoadData(ctypes.byref(module), cubin(tmp_path_factory.mktemp("cubin"))) == 0
    found = {}
    for name in ("bare", "bounded", "clustered", "wide"):
        found[name] = ctypes.c_void_p()
        assert CUDA.cuModuleGetFunction(ctypes.byref(found[name]), module, name.encode()) == 0
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("pinned", [False, True])
def test_data_is_exact_after_a_round_trip(dtype, pinned) -> None:
    x = torch.randint(0, 255, (3, 1021, 517)).to(dtype)
    there = (x.pin_memory() if pinned else x).to("cuda", non_blocking=pinned)
    torch.cuda.synchronize()
    also_there = torch.empty_like(there).copy_(there)  # a copy in the device, not a kernel
    other = also_there.to("cuda:1")
    del there, also_there
    assert torch.equal(other.cpu(), x)


def test_memset() -> None:
    x = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    before = x.cpu()  # whatever its memory held
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    assert (
        RUNTIME.cudaMemsetAsync(ctypes.c_void_p(x.data_ptr() + 3), 7, ctypes.c_size_t(1 << 19), stream) == 0
    )
    host = x.cpu()
    assert (host[3 : 3 + (1 << 19)] == 7).all()
    assert torch.equal(host[:3], before[:3])
    assert torch.equal(host[3 + (1 << 19) :], before[3 + (1 << 19) :])


def test_a_launch_is_recorded() -> None:
    x = torch.empty(1000, device="cuda")
    with recorded() as launches:
        add_one[(4,)](x, x, 1000, BLOCK=256, num_warps=2)
        x.mul_(2)
    ours, torchs = launches
    assert (ours.name, ours.grid, ours.block, ours.cluster) == ("add_one", (4, 1, 1), (64, 1, 1), (1, 1, 1))
    assert (ours.device, ours.stream, ours.known, ours.library, ours.ours) == (0, 0, True, False, True)
    assert ours.arguments[:3] == (x.data_ptr(), x.data_ptr(), 1000)
    assert torchs.name.startswith("vectorized_elementwise_kernel<4, AUnaryFunctor<float")
    assert torchs.known
    assert not torchs.ours


def test_a_library_call_is_recorded() -> None:
    x = torch.empty(64, 64, device="cuda", dtype=torch.bfloat16)
    image = torch.empty(2, 64, 8, 8, device="cuda", dtype=torch.bfloat16)
    with recorded() as launches:
        x @ x
        torch.nn.functional.conv2d(image, torch.empty(8, 64, 3, 3, device="cuda", dtype=torch.bfloat16))
    calls = [launch.name for launch in launches if launch.library]
    assert [name[:5] for name in calls] == ["cubla", "cudnn"], calls
    assert not any(launch.ours for launch in launches)


def test_freed_memory_is_refused(kernels) -> None:
    gone = torch.empty(64 << 20, device="cuda")
    address = gone.data_ptr()
    assert launch(kernels["bare"], address) == 0
    del gone
    torch.cuda.empty_cache()
    with complaint("not allocated"):
        assert launch(kernels["bare"], address) == ILLEGAL_ADDRESS


def test_host_memory_is_refused_but_not_pinned_memory(kernels) -> None:
    with complaint("is the host's"):
        assert launch(kernels["bare"], torch.zeros(1 << 20).data_ptr()) == ILLEGAL_ADDRESS
    assert launch(kernels["bare"], torch.zeros(1 << 20).pin_memory().data_ptr()) == 0


def test_memory_of_another_device_is_refused(kernels) -> None:
    with complaint("another device's"):
        assert launch(kernels["bare"], torch.empty(4, device="cuda:1").data_ptr()) == ILLEGAL_ADDRESS


@pytest.mark.parametrize(
    ("grid", "block", "allowed"),
    [
        ((2**31 - 1, 1, 1), (1024, 1, 1), True),
        ((1, 65535, 65535), (16, 16, 4), True),
        ((1, 65536, 1), (32, 1, 1), False),
        ((1, 1, 65536), (32, 1, 1), False),
        ((0, 1, 1), (32, 1, 1), False),
        ((1, 1, 1), (1025, 1, 1), False),
        ((1, 1, 1), (1, 1, 65), False),
        ((1, 1, 1), (32, 33, 1), False),
    ],
)
def test_limits_of_grid_and_block(kernels, grid, block, allowed) -> None:
    pointer = torch.empty(4, device="cuda").data_ptr()
    assert launch(kernels["bare"], pointer, grid, block) == (0 if allowed else INVALID_VALUE)
    assert len(take_complaints()) == (not allowed)
    assert len(take()) == allowed


def test_limits_of_triton_are_the_same() -> None:
    x = torch.empty(4, device="cuda")
    with complaint("a grid of 1 x 70000 x 1"), pytest.raises(RuntimeError, match="invalid argument"):
        add_one[(1, 70000)](x, x, 4, BLOCK=256)


def test_launch_bounds(kernels) -> None:
    pointer = torch.empty(4, device="cuda").data_ptr()
    assert launch(kernels["bounded"], pointer, block=(64, 1, 1)) == 0
    with complaint("launch bounds of 64"):
        assert launch(kernels["bounded"], pointer, block=(96, 1, 1)) == INVALID_VALUE


def test_registers_limit_the_threads(kernels) -> None:
    """Over 200 each: a quarter of the multiprocessor's 65536 is enough for two warps."""
    pointer = torch.empty(4, device="cuda").data_ptr()
    with recorded() as launches:
        assert launch(kernels["wide"], pointer, block=(256, 1, 1)) == 0
    assert 200 < launches[0].registers < 256
    with complaint("at most 256 threads"):
        assert launch(kernels["wide"], pointer, block=(288, 1, 1)) == OUT_OF_RESOURCES


def test_a_grid_is_made_of_clusters(kernels) -> None:
    pointer = torch.empty(4, device="cuda").data_ptr()
    with recorded() as launches:
        assert launch(kernels["clustered"], pointer, grid=(4, 3, 1)) == 0
    assert launches[0].cluster == (2, 1, 1)
    with complaint("no multiple of its cluster"):
        assert launch(kernels["clustered"], pointer, grid=(3, 2, 1)) == INVALID_VALUE


def test_limits_of_shared_memory(kernels) -> None:
    pointer, kernel = torch.empty(4, device="cuda").data_ptr(), kernels["bare"]
    assert launch(kernel, pointer, shared=48 << 10) == 0
    with complaint("at most 49152"):
        assert launch(kernel, pointer, shared=(48 << 10) + 1) == INVALID_VALUE
    with complaint("at most 232448"):
        assert CUDA.cuFuncSetAttribute(kernel, MAX_DYNAMIC_SHARED, (227 << 10) + 1) == INVALID_VALUE
    assert CUDA.cuFuncSetAttribute(kernel, MAX_DYNAMIC_SHARED, 227 << 10) == 0
    assert launch(kernel, pointer, shared=227 << 10) == 0
    with complaint("at most 232448"):
        assert launch(kernel, pointer, shared=(227 << 10) + 1) == INVALID_VALUE


def test_a_cooperative_launch_has_to_fit(kernels) -> None:
    argument = ctypes.c_uint64(torch.empty(4, device="cuda").data_ptr())
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))

    def cooperative(blocks: int) -> int:
        return CUDA.cuLaunchCooperativeKernel(kernels["bare"], blocks, 1, 1, 1024, 1, 1, 0, None, arguments)

    assert cooperative(2 * 132) == 0
    with complaint("264 fit"):
        assert cooperative(2 * 132 + 1) == COOPERATIVE_TOO_LARGE


def test_out_of_memory() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(142 << 30, dtype=torch.uint8, device="cuda")
    x = torch.empty(100 << 30, dtype=torch.uint8, device="cuda")
    assert torch.cuda.mem_get_info() == (before[0] - (100 << 30), 141 << 30)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(50 << 30, dtype=torch.uint8, device="cuda")
    del x
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info() == before


def exit_of_child(action) -> int:
    """The exit status of a forked child that does this; a signal's number is negative."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = action() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_host_cannot_read_device_memory() -> None:
    address = torch.empty(1 << 20, device="cuda").data_ptr()
    assert exit_of_child(lambda: ctypes.string_at(address, 4) and None) == -signal.SIGSEGV


def test_the_host_cannot_read_device_memory_in_this_process() -> None:
    """Not only because a child has none of it."""
    address = torch.empty(1 << 20, device="cuda").data_ptr()
    line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if holds(line, address))
    assert line.split()[1].startswith("---")


def holds(line: str, address: int) -> bool:
    first, end = (int(value, 16) for value in line.split()[0].split("-"))
    return first <= address < end


def test_a_forked_child_has_no_device() -> None:
    """As with CUDA: its error is 3, and the parent's memory stays as it was."""
    x = torch.arange(1000, device="cpu").cuda()
    free, total, size = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_size_t(8000)

    def child() -> int:
        errors = {
            CUDA.cuInit(0),
            CUDA.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
            RUNTIME.cudaMemset(ctypes.c_void_p(x.data_ptr()), 0, size),
        }
        return 0 if errors == {3} else 1

    assert exit_of_child(child) == 0
    assert x.cpu().equal(torch.arange(1000))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
