"""The null GPU's own checks: binaries, the kernels in them, and the runtime's launches."""

import ctypes
import struct
import subprocess

import pytest
import torch
import triton
import triton.language as tl

from .helpers import CUDA, PROGRAMS, RUNTIME, complaint, cubin
from .null_gpu import recorded, take_complaints

pytestmark = pytest.mark.host
INVALID_VALUE, INVALID_CONFIGURATION, NO_BINARY, NOT_FOUND = 1, 9, 209, 500


@triton.jit
def product(x, y, z, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tl.store(z + i * SIZE + j, tl.dot(tl.load(x + i * SIZE + j), tl.load(y + i * SIZE + j)))


def test_registers_and_shared_memory_are_those_of_the_binary(tmp_path) -> None:
    """Against cuobjdump, which reads them in its own way."""
    x = torch.empty(128, 128, device="cuda", dtype=torch.float16)
    with recorded() as launches:
        compiled = product[(1,)](x, x, x, SIZE=128)
    (tmp_path / "product.cubin").write_bytes(compiled.asm["cubin"])
    command = [str(PROGRAMS / "cuobjdump"), "--dump-resource-usage", str(tmp_path / "product.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    facts = dict(fact.split(":")[:2] for fact in text.split("Function product:")[1].split())
    assert launches[0].dynamic_shared == compiled.metadata.shared > 48 << 10
    assert launches[0].registers == int(facts["REG"]) == compiled.n_regs
    assert launches[0].local == int(facts["STACK"])
    assert launches[0].static_shared == max(0, int(facts["SHARED"]) - 1024)


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


def launch_registered(images: dict[int, bytes], name: bytes, stream: int | None = None) -> int:
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
    config = LaunchConfig((2, 1, 1), (32, 1, 1), 0, stream, None, 0)
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


def test_a_kernel_that_is_not_there(tmp_path) -> None:
    torch.empty(1, device="cuda")
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    assert CUDA.cuModuleLoadData(ctypes.byref(module), cubin(tmp_path)) == 0
    with complaint("no kernel none"):
        assert CUDA.cuModuleGetFunction(ctypes.byref(kernel), module, b"none") == NOT_FOUND
