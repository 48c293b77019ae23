"""The null GPU's own checks: memory, launches and what a GPU refuses."""

import ctypes
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends import nvidia

from .null_gpu import recorded, take, take_complaints

pytestmark = pytest.mark.host
CUDA = ctypes.CDLL("libcuda.so.1")
RUNTIME = ctypes.CDLL("libcudart.so.13")
INVALID_VALUE, NO_BINARY, NOT_FOUND = 1, 209, 500
ILLEGAL_ADDRESS, OUT_OF_RESOURCES, COOPERATIVE_TOO_LARGE = 700, 701, 720
INVALID_CONFIGURATION = 9  # the runtime's
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@triton.jit
def add_one(x, y, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < count) + 1, i < count)


def ptx(arch: str) -> str:
    """Kernels of one pointer: without anything, with launch bounds, in clusters, with many registers."""
    clusters = ".explicitcluster .reqnctapercluster 2, 1, 1" if arch == "sm_90" else ""
    loads = [f"ld.volatile.global.u32 %r{i}, [%p + {4 * i}];" for i in range(200)]
    stores = [f"st.volatile.global.u32 [%p + {4 * i}], %r{i};" for i in range(200)]
    return f"""
.version 8.0
.target {arch}
.address_size 64
.visible .entry bare(.param .u64 pointer) {{ ret; }}
.visible .entry bounded(.param .u64 pointer) .maxntid 64, 1, 1 {{ ret; }}
.visible .entry clustered(.param .u64 pointer) {clusters} {{ ret; }}
.visible .entry wide(.param .u64 pointer) {{
  .reg .b32 %r<200>;
  .reg .b64 %p;
  ld.param.u64 %p, [pointer];
  {" ".join(loads + stores)}
  ret;
}}
"""


def cubin(folder: Path, arch: str = "sm_90") -> bytes:
    """These kernels, by Triton's ptxas."""
    source, target = folder / "kernels.ptx", folder / "kernels.cubin"
    source.write_text(ptx(arch))
    ptxas = Path(nvidia.__file__).parent / "bin" / "ptxas"
    subprocess.run([str(ptxas), f"-arch={arch}", str(source), "-o", str(target)], check=True)
    return target.read_bytes()


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


def launch(kernel, pointer: int, grid=(1, 1, 1), block=(32, 1, 1), shared=0, stream=0) -> int:
    """cuLaunchKernel's error."""
    argument = ctypes.c_uint64(pointer)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    return CUDA.cuLaunchKernel(kernel, *grid, *block, shared, ctypes.c_void_p(stream), arguments, None)


@contextmanager
def complaint(text: str) -> Iterator[None]:
    """The block leaves one complaint, with this in it."""
    assert not take_complaints()
    yield
    found = take_complaints()
    assert len(found) == 1, found
    assert text in found[0]


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
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    assert (
        RUNTIME.cudaMemsetAsync(ctypes.c_void_p(x.data_ptr() + 3), 7, ctypes.c_size_t(1 << 19), stream) == 0
    )
    host = x.cpu()
    assert (host[3 : 3 + (1 << 19)] == 7).all()
    assert not host[:3].any()
    assert not host[3 + (1 << 19) :].any()


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


def test_registers_and_shared_memory_are_those_of_the_binary(tmp_path) -> None:
    """Against cuobjdump, which reads them in its own way."""

    @triton.jit
    def product(x, y, z, SIZE: tl.constexpr):
        i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
        tl.store(z + i * SIZE + j, tl.dot(tl.load(x + i * SIZE + j), tl.load(y + i * SIZE + j)))

    x = torch.empty(128, 128, device="cuda", dtype=torch.float16)
    with recorded() as launches:
        compiled = product[(1,)](x, x, x, SIZE=128)
    (tmp_path / "product.cubin").write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    command = [str(cuobjdump), "--dump-resource-usage", str(tmp_path / "product.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    facts = dict(fact.split(":")[:2] for fact in text.split("Function product:")[1].split())
    assert launches[0].dynamic_shared == compiled.metadata.shared > 48 << 10
    assert launches[0].registers == int(facts["REG"]) == compiled.n_regs
    assert launches[0].local == int(facts["STACK"])
    assert launches[0].static_shared == max(0, int(facts["SHARED"]) - 1024)


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


def test_a_kernel_of_another_architecture_is_refused(tmp_path) -> None:
    torch.empty(1, device="cuda")
    module = ctypes.c_void_p()
    with complaint("no image for sm_90 among sm_80"):
        assert CUDA.cuModuleLoadData(ctypes.byref(module), cubin(tmp_path, "sm_80")) == NO_BINARY


def fat_binary(images: dict[int, bytes]) -> ctypes.Array:
    """As nvcc makes it of cubins, by architecture."""
    entries = b""
    for arch, image in images.items():
        image += bytes(-len(image) % 8)
        entries += (
            struct.pack("<HHIQIIHHIIIQQQ", 2, 0x101, 64, len(image), 0, 0, 0, 0, arch, 0, 0, 0, 0, 0) + image
        )
    return ctypes.create_string_buffer(struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries)


def launch_registered(images: dict[int, bytes], name: bytes) -> int:
    """The runtime's error at the launch of a kernel as nvcc's host code registers and launches it."""
    binary = fat_binary(images)
    wrapper = ctypes.create_string_buffer(struct.pack("<IIQQ", 0x466243B1, 1, ctypes.addressof(binary), 0))
    function = ctypes.create_string_buffer(1)  # its address stands for the host's function
    register = getattr(RUNTIME, "__cudaRegisterFatBinary")
    register.restype = ctypes.c_void_p
    module = ctypes.c_void_p(register(wrapper))
    getattr(RUNTIME, "__cudaRegisterFunction")(module, function, name, name, -1, None, None, None, None, None)
    argument = ctypes.c_uint64(torch.empty(4, device="cuda").data_ptr())
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    config = LaunchConfig((2, 1, 1), (32, 1, 1), 0, None, None, 0)
    error = RUNTIME.cudaLaunchKernelExC(ctypes.byref(config), function, arguments)
    KEPT.append((binary, wrapper, function))
    return error


KEPT = []  # what stays registered until the process ends


class LaunchConfig(ctypes.Structure):
    """cudaLaunchConfig_t."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


def test_a_fat_binary_needs_an_image_for_the_device(tmp_path) -> None:
    images = {80: cubin(tmp_path, "sm_80"), 90: cubin(tmp_path, "sm_90"), 86: cubin(tmp_path, "sm_86")}
    with recorded() as launches:
        assert launch_registered(images, b"bare") == 0
    assert [(launch.name, launch.grid, launch.known) for launch in launches] == [("bare", (2, 1, 1), True)]
    del images[90]
    with complaint("no image for sm_90 among sm_80 sm_86"):
        assert launch_registered(images, b"bare") == NO_BINARY
    assert RUNTIME.cudaGetLastError() == NO_BINARY
    assert RUNTIME.cudaGetLastError() == 0


def test_the_runtimes_errors(tmp_path) -> None:
    """A grid that no device takes has an error of the runtime's own."""
    images = {90: cubin(tmp_path)}
    with complaint("no kernel none"):
        assert launch_registered(images, b"none") == NOT_FOUND
    assert RUNTIME.cudaGetLastError() == NOT_FOUND
    assert launch_registered(images, b"bare") == 0
    function = KEPT[-1][-1]
    for config, error in (
        (LaunchConfig((1, 70000, 1), (32, 1, 1), 0, None, None, 0), INVALID_CONFIGURATION),
        (LaunchConfig((1, 1, 1), (1025, 1, 1), 0, None, None, 0), INVALID_CONFIGURATION),
        (LaunchConfig((1, 1, 1), (32, 1, 1), 1 << 20, None, None, 0), INVALID_VALUE),
    ):
        assert RUNTIME.cudaLaunchKernelExC(ctypes.byref(config), function, (ctypes.c_void_p * 1)()) == error
        assert RUNTIME.cudaGetLastError() == error
    assert len(take_complaints()) == 3


def test_a_kernel_that_is_not_there() -> None:
    x = torch.empty(4, device="cuda")
    compiled = add_one[(1,)](x, x, 4, BLOCK=256)
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    assert CUDA.cuModuleLoadData(ctypes.byref(module), compiled.asm["cubin"]) == 0
    with complaint("no kernel add_two"):
        assert CUDA.cuModuleGetFunction(ctypes.byref(kernel), module, b"add_two") == NOT_FOUND


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
