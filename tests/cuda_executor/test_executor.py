"""The executor's own checks: what instructions compute, and that a mistake ends the process."""

import ctypes
from pathlib import Path

import pytest
import torch
from support.processes import python

from .build import FOLDER, build

MISTAKE = """
import ctypes, sys
memory = ctypes.create_string_buffer(1 << 16)
start = -(-ctypes.addressof(memory) // 128) * 128
library, name, mistake = sys.argv[1:]
parts = [ctypes.c_void_p(start + 8192 * i) for i in range(3)]
arguments = {"wgmma": [*parts, 0], "copy": parts[:2]}[name]
getattr(ctypes.CDLL(library), "probe_" + name)(*arguments, mistake.encode())
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The kernels of probes.cpp and the executor, without torch."""
    target = tmp_path_factory.mktemp("probes") / "probes.so"
    return build(target, [FOLDER / "probes" / "probes.cpp"], with_torch=False)


@pytest.fixture(scope="module")
def probes(file) -> ctypes.CDLL:
    return ctypes.CDLL(str(file))


def pointers(*tensors: torch.Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def small_integers(*size: int) -> torch.Tensor:
    """Their products have exact sums."""
    return torch.randint(-8, 9, size).bfloat16()


def test_product_of_a_warp(probes) -> None:
    a, b, d = small_integers(16, 16), small_integers(16, 8), torch.empty(16, 8)
    probes.probe_mma(*pointers(a, b, d))
    assert torch.equal(d, a.float() @ b.float())


def test_transposed_matrices(probes) -> None:
    """Lane l gets of each matrix column l / 4, rows 2 (l % 4) and the next."""
    matrices = torch.randint(-999, 999, (4, 8, 8), dtype=torch.int16)
    out = torch.empty(32, 4, 2, dtype=torch.int16)
    probes.probe_load(*pointers(matrices, out), 0)
    columns = matrices.transpose(1, 2).reshape(4, 32, 2)
    assert torch.equal(out, columns.transpose(0, 1))


@pytest.mark.parametrize("first", [0, 1, 4])
def test_product_of_a_warpgroup(probes, first) -> None:
    """32 of b's 64 columns, by the descriptor that the kernels' own code makes."""
    a, b, d = small_integers(64, 16), small_integers(16, 64), torch.empty(64, 32)
    probes.probe_wgmma(*pointers(a, b, d), first, b"")
    right = a.float() @ b.float()[:, 8 * first : 8 * first + 32]
    assert torch.equal(d, right)
    if first == 0:
        probes.probe_wgmma(*pointers(a, b, d), first, b"strides exchanged")
        assert not torch.equal(d, right)


def test_bulk_copy(probes) -> None:
    source, out = torch.randint(-99, 99, (64,), dtype=torch.int8), torch.empty(64, dtype=torch.int8)
    assert source.data_ptr() % 16 == 0
    probes.probe_copy(*pointers(source, out), b"")
    assert torch.equal(out, source)


@pytest.mark.parametrize(
    ("name", "mistake", "message"),
    [
        ("wgmma", "swizzling", "a descriptor with swizzling"),
        ("wgmma", "a base offset", "a descriptor with a base offset"),
        ("wgmma", "reserved bits", "a descriptor with reserved bits"),
        ("wgmma", "bytes, not units of 16", "an address beyond the block's shared memory"),
        ("wgmma", "a descriptor of its own", "the threads of a warpgroup executed different instructions"),
        ("wgmma", "a warp without the product", "the threads of a warpgroup executed different instructions"),
        ("wgmma", "a warp that is missing", "the threads of a block wait for each other forever"),
        ("wgmma", "no fence", "a product without a fence since the last wait"),
        ("wgmma", "no wait", "a thread returns while its warpgroup's products are under way"),
        ("copy", "a size of 24", "a bulk copy whose size is no multiple of 16 bytes"),
        ("copy", "a source that is not aligned", "a bulk copy that is not aligned to 16 bytes"),
        ("copy", "a target that is not aligned", "a bulk copy that is not aligned to 16 bytes"),
        ("copy", "a target beyond the block's memory", "an address beyond the block's shared memory"),
        ("copy", "no mbarrier", "an mbarrier that was not initialised"),
        ("copy", "no fence", "a bulk copy with an mbarrier before fence.mbarrier_init"),
        ("copy", "more than expected", "more bytes arrived at an mbarrier than its phase expects"),
        ("copy", "less than expected", "the threads of a block wait for each other forever"),
        ("copy", "two arrivals", "more arrivals at an mbarrier than its phase expects"),
        ("copy", "no wait", "the block has returned and a bulk copy is under way"),
    ],
)
def test_a_mistake_ends_the_process(file, name, mistake, message) -> None:
    assert message in python("-c", MISTAKE, file, name, mistake, code=-6).stderr


def test_no_mistake_ends_the_process(file) -> None:
    for name in ("wgmma", "copy"):
        python("-c", MISTAKE, file, name, "")


def test_static_shared_memory_does_not_outlive_its_block(probes) -> None:
    out = torch.zeros(3)
    for _ in range(2):
        probes.probe_static(*pointers(out), 3)
        assert out.isnan().all()


def test_activations_use_the_devices_functions(probes) -> None:
    """Which differ from the host's for a NaN and for huge divisors."""
    for function in (probes.probe_unit_interval, probes.probe_inverse):
        function.argtypes, function.restype = [ctypes.c_float], ctypes.c_float
    values = [float("nan"), -1.0, 0.25, 2.0, float("inf")]
    assert [probes.probe_unit_interval(x) for x in values] == [0, 0, 0.25, 1, 1]
    divisors = [2.0**126, 2.0**127, float("inf"), -4.0]
    assert [probes.probe_inverse(x) for x in divisors] == [2.0**-126, 0, 0, -0.25]
