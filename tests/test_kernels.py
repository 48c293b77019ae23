"""What is said of the CUDA kernels: a ptxas report, names, occupancy counted by hand, a device's figures."""

import pytest

from poolformer_kernels.backends import cpp
from poolformer_kernels.cli import kernels
from poolformer_kernels.cli.kernels import (
    Kernel,
    built_kernels,
    resident_blocks,
    rows,
    short_name,
    table,
    with_uses,
)

REPORT = """0123456789abcdef
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function 'void pk::(anonymous namespace)::f<__half, 64>(pk::P)' for 'sm_90a'
ptxas info    : Function properties for _Zf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 59 registers, used 1 barriers, 32 bytes smem, 384 bytes cmem[0]
ptxas info    : Compiling entry function 'pk::(anonymous namespace)::g(pk::P)' for 'sm_90a'
ptxas info    : Function properties for _Zg
    40 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 40 bytes cumulative stack size
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void pk::(anonymous namespace)::f<__half, 64>(pk::P)' for 'sm_80'
ptxas info    : Function properties for _Zf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 32 bytes smem, 384 bytes cmem[0]
"""
USE = {"name": "pk::Kernel<&(pk::f(pk::P))>*", "threads": 128, "shared": 0, "arch": 90, "registers": 44}
USE |= {"local": 8, "static_shared": 48, "blocks": 10}  # what a device says of a kernel
LISTED = "pk::Kernel<&(void pk::(anonymous namespace)::f<__half, 64>(pk::P))>*"


def test_rows_of_a_report() -> None:
    launches = [{"name": LISTED, "threads": threads, "shared": 1024} for threads in (128, 256)]
    assert rows(REPORT, launches) == [
        Kernel("f<f16, 64>", "sm_80", 40, 0, 0, 32, 1024, 128, 12),
        Kernel("f<f16, 64>", "sm_80", 40, 0, 0, 32, 1024, 256, 6),
        Kernel("f<f16, 64>", "sm_90a", 59, 0, 0, 32, 1024, 128, 8),
        Kernel("f<f16, 64>", "sm_90a", 59, 0, 0, 32, 1024, 256, 4),
        Kernel("g", "sm_90a", 255, 16, 24, 0),
    ]
    assert rows("", launches) == []


def test_kernels_of_one_architecture_have_no_row_for_another() -> None:
    assert [row.arch for row in rows(REPORT.replace("::f<", "::f_sm90<"))] == ["sm_90a", "sm_90a"]
    assert with_uses([], [USE | {"name": "pk::Kernel<&(pk::f_sm90(pk::P))>*", "arch": 80}]) == []


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        (
            "void pk::(anonymous namespace)::f<__nv_bfloat16, true>(pk::(anonymous namespace)::P)",
            "f<bf16, true>",
        ),
        ("pk::(anonymous namespace)::g(pk::(anonymous namespace)::P)", "g"),
        ("pk::Kernel<&(pk::(anonymous namespace)::g(pk::P))>*", "g"),
        ("void pk::f<(pk::Layout)1, pk::Tile<__half, 8> >(pk::Params<__half>)", "f<(Layout)1, Tile<f16, 8>>"),
        (
            "pk::Kernel<&(void pk::f<(pk::Layout)1, pk::Tile<__half, 8> >(pk::P))>*",
            "f<(Layout)1, Tile<f16, 8>>",
        ),
    ],
)
def test_names_as_people_write_them(demangled, name) -> None:
    assert short_name(demangled) == name


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "static", "dynamic", "blocks"),
    [
        ("sm_90a", 59, 256, 32, 0, 4),  # 59 x 32 becomes 2048 of a quarter's 16384: 8 warps there
        ("sm_90a", 168, 128, 0, 0, 3),  # 5376: 3 warps of each quarter, 12 in all
        ("sm_80", 255, 96, 0, 0, 2),  # 8192: 8 warps, blocks of 3
        ("sm_80", 64, 1024, 0, 0, 1),
        ("sm_80", 65, 1024, 0, 0, 0),  # 28 warps of 32: the launch fails
        ("sm_100", 16, 32, 0, 0, 32),  # as many blocks as a multiprocessor takes
        ("sm_100", 16, 80, 0, 0, 21),  # 64 warps, blocks of 2.5
        ("sm_90a", 32, 128, 0, 72 * 1024, 3),  # 228 KB in parts of 73
        ("sm_80", 32, 128, 0, 72 * 1024, 2),  # 164
        ("sm_90", 32, 128, 0, 113 * 1024, 2),
        ("sm_90", 32, 128, 1, 113 * 1024, 1),  # which makes 128 bytes more
        ("sm_90", 32, 128, 0, 227 * 1024, 1),
        ("sm_80", 32, 128, 0, 163 * 1024 + 1, 0),
        ("sm_75", 32, 128, 0, 0, None),  # an architecture whose limits are not known here
    ],
)
def test_occupancy(arch, registers, threads, static, dynamic, blocks) -> None:
    kernel = Kernel("f", arch, registers, 0, 0, static, dynamic, threads)
    assert resident_blocks(kernel) == blocks


def test_a_device_has_the_last_word() -> None:
    built = [Kernel("f", arch, 40, 0, 8, 32, 0, 128, 12) for arch in ("sm_80", "sm_90a")]
    assert with_uses(built, [USE]) == [built[0], Kernel("f", "sm_90a", 44, 0, 8, 48, 0, 128, 10)]
    # and where it compiled the PTX itself, a row of its own
    compiled = Kernel("f", "sm_120", 44, 8, 8, 48, 0, 128, 10)
    assert with_uses(built, [USE | {"arch": 120}]) == [*built, compiled]


def test_table_is_aligned() -> None:
    found = [Kernel("f<bf16>", "sm_90a", 59, 0, 0, 32, 0, 256, 4), Kernel("g", "sm_120", 255, 8, 16, 1024)]
    assert table(found) == [
        "kernel   arch    registers  spills  static  dynamic  threads  blocks  warps",
        "f<bf16>  sm_90a         59     0/0      32        0      256       4  32/64",
        "g        sm_120        255    8/16    1024        ?        ?       ?      ?",
    ]


def test_the_extension_lists_them() -> None:
    """Every instantiation for every architecture of the build; without nvcc none."""
    info = cpp.build_info()
    if not info:
        pytest.skip(cpp.UNAVAILABLE)
    found = {(row.name, row.arch): row for row in built_kernels()}
    archs = {"sm_" + arch.replace(".", "").removesuffix("+PTX") for arch in info["cuda_archs"]}
    assert {arch for _, arch in found} == archs
    wanted = {f"norm_stats<{t}, {v}>" for t in ("float", "bf16", "f16") for v in ("true", "false")}
    for arch in archs:
        assert wanted <= {name for name, of in found if of == arch}
    for name in wanted:
        for arch in archs:
            row = found[name, arch]
            assert (row.threads, row.dynamic_shared, row.static_shared) == (256, 0, 32)
            assert 16 < row.registers <= 40
            assert row.spill_stores == row.spill_loads == 0
    assert [kernel.name for kernel in kernels.kernels()] == [kernel.name for kernel in built_kernels()]
