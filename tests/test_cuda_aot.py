"""The CUDA kernels for every shipped architecture: spills, registers, shared memory, occupancy, instructions.

No GPU is needed. What is read is the installed extension: ptxas's report and the machine code. It must be of
these very sources, which costs no second compilation of them.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.peers import require
from support.processes import ROOT
from support.variants import setup_script

from poolformer_kernels.backends import cpp
from poolformer_kernels.cli.kernels import Kernel, built_kernels, short_name, table

ARCHS = ("sm_80", "sm_90a", "sm_100", "sm_120")


class Limit(NamedTuple):
    """Of all instantiations of a kernel: registers of a thread, and blocks resident on a multiprocessor."""

    registers: int
    blocks: int


TILED = ("pool_mixer_fwd", "pool_mixer_bwd_reduce", "pool_mixer_bwd_apply")
KERNELS = {
    "norm_stats": Limit(40, 6),
    "stats_merge": Limit(64, 2),
    **dict.fromkeys(TILED, Limit(168, 2)),
    **{f"{name}_any": Limit(128, 1) for name in TILED},
    **{f"pool_mixer_bwd_{part}": Limit(64, 2) for part in ("q", "finish")},
    "mlp_round": Limit(32, 4),
    "mlp_pack": Limit(64, 2),
    "mlp_fwd_sm90": Limit(168, 1),
    **dict.fromkeys(("mlp_fwd", "mlp_bwd_dgrad", "mlp_bwd_wgrad"), Limit(255, 1)),
    "mlp_bwd_tokens": Limit(96, 2),
    **{f"mlp_bwd_{part}": Limit(64, 2) for part in ("prepare", "sample", "weights", "columns", "finish")},
}
# float32 rows of channels_last take twice the shared memory
FEWER = {f"{name}<float, 4, false>": 1 for name in TILED}
# (instantiations, architectures, an instruction that they must have)
INSTRUCTIONS = (
    (r"mlp_(fwd|bwd_dgrad|bwd_wgrad)<.*", ".*", r"HMMA\..*"),
    (r"\w+_sm90<.*", "sm_90a", r"HGMMA\..*"),
)


class Wide(NamedTuple):
    """Of the bytes that a kernel's instructions move, this share at least by those of so many bytes."""

    kernels: str
    moves: str  # from global memory, to it, or from shared memory
    share: float
    bytes: int = 16


MOVES = {"load": "LDG|LDGSTS", "store": "STG", "shared load": "LDS|LDSM"}
WHOLE = "(float, 4|bf16, 8|f16, 8)"  # elements of 16 bytes
# Parameters, statistics and tables of other dtypes are what is narrower.
WIDE = (
    Wide(r"norm_stats<\w+, true>", "load", 1.0),
    Wide(rf"pool_mixer_(fwd|bwd_reduce|bwd_apply)<{WHOLE}, false>", "load", 0.9),
    Wide(rf"pool_mixer_(fwd|bwd_reduce|bwd_apply)<{WHOLE}, false>", "shared load", 0.3),
    Wide(rf"pool_mixer_(fwd|bwd_reduce|bwd_apply)<{WHOLE}, true>", "load", 0.5),
    Wide(r"pool_mixer_(fwd|bwd_reduce|bwd_apply)<b?f16, 4, true>", "load", 0.35, 8),
    Wide(rf"pool_mixer_fwd<{WHOLE}, \w+>", "store", 0.65),
    Wide(rf"pool_mixer_bwd_apply<{WHOLE}, \w+>", "store", 1.0),
    Wide(r"mlp_pack<.*", "store", 1.0),
    Wide(r"mlp_fwd<.*", "load", 0.75),
    Wide(r"mlp_fwd<.*", "store", 0.85),
    Wide(r"mlp_fwd<.*", "shared load", 0.85),
    Wide(r"mlp_fwd_sm90<.*", "load", 0.8),
    Wide(r"mlp_fwd_sm90<.*", "store", 0.85),
    Wide(r"mlp_bwd_tokens<.*", "load", 0.85),
    Wide(r"mlp_bwd_tokens<.*", "store", 1.0),
    Wide(r"mlp_bwd_wgrad<.*", "load", 0.9),
    Wide(r"mlp_bwd_wgrad<.*", "store", 0.9, 8),
    Wide(r"mlp_bwd_wgrad<.*", "shared load", 0.65),
    Wide(r"mlp_bwd_dgrad<.*", "load", 0.95),
    Wide(r"mlp_bwd_dgrad<.*", "store", 0.85),
    Wide(r"mlp_bwd_dgrad<.*", "shared load", 0.4),
    Wide(r"mlp_bwd_weights<.*", "load", 1.0),
)
HOPPERS = r"\w+_sm90<.*"  # empty on other architectures


@pytest.fixture(scope="module")
def built() -> list[Kernel]:
    """The kernels of the installed extension, which must be of these sources."""
    info = cpp.build_info()
    if not info.get("cuda_archs"):
        wanted = shutil.which("nvcc") and os.environ.get("CI")
        (pytest.fail if wanted else pytest.skip)(cpp.UNAVAILABLE or "the extension was built without CUDA")
    from poolformer_kernels import _C

    digest = setup_script().cuda_digest()
    assert _C.ptxas_report().partition("\n")[0] == digest, "the installed extension is of other sources"
    return built_kernels()


def of_arch(built: list[Kernel], arch: str) -> list[Kernel]:
    found = [kernel for kernel in built if kernel.arch == arch]
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"the extension was not built for {arch}")
    return found


def least_blocks(kernel: Kernel) -> int:
    """On a multiprocessor, for the largest launch of the kernel."""
    least = FEWER.get(kernel.name, KERNELS[family(kernel)].blocks)
    if kernel.arch != "sm_120":
        return least
    return 0 if kernel.name in FEWER else 1  # of 100 KB; for rows that have no room there is another kernel


def family(kernel: Kernel) -> str:
    return kernel.name.partition("<")[0]


def test_the_default_build_is_for_these_architectures() -> None:
    script = setup_script()
    flags = script.arch_flags(script.ARCHS)
    assert re.findall(r"code=(sm_\w+)", " ".join(flags)) == list(ARCHS)


def test_every_kernel_has_a_limit(built) -> None:
    assert {family(kernel) for kernel in built} == set(KERNELS)


def test_every_kernel_says_how_it_is_launched(built) -> None:
    """`list_kernels` where the file registers its operators."""
    unlisted = sorted({kernel.name for kernel in built if kernel.threads is None})
    assert not unlisted, "\n".join(unlisted)


@pytest.mark.parametrize("arch", ARCHS)
def test_resources(built, arch) -> None:
    wrong = []
    for kernel in of_arch(built, arch):
        limit = KERNELS[family(kernel)]
        right = kernel.spill_stores == kernel.spill_loads == 0 and kernel.registers <= limit.registers
        if kernel.threads is not None:
            right &= kernel.blocks >= least_blocks(kernel)  # 0 where shared memory is too large
        if not right:
            wrong.append(kernel)
    assert not wrong, "\n".join(table(wrong))


SOME_ARCHS = [arch if arch == "sm_90a" else pytest.param(arch, marks=pytest.mark.long) for arch in ARCHS]


@pytest.mark.parametrize("arch", SOME_ARCHS)
def test_instructions(built, arch) -> None:
    names = {kernel.name for kernel in of_arch(built, arch)}
    wanted = [
        (name, instruction)
        for kernels, archs, instruction in INSTRUCTIONS
        for name in sorted(names)
        if re.fullmatch(kernels, name) and re.fullmatch(archs, arch)
    ]
    assert len(wanted) >= 3
    code = machine_code(arch)
    assert names <= set(code)
    lacking = [f"{n}: {i}" for n, i in wanted if not any(re.fullmatch(i, op) for op in code[n])]
    assert not lacking, "\n".join(lacking)


@pytest.mark.parametrize("arch", SOME_ARCHS)
def test_memory_is_moved_in_wide_words(built, arch) -> None:
    code = machine_code(arch)
    names = sorted(kernel.name for kernel in of_arch(built, arch))
    found, narrow = set(), []
    for rule in WIDE:
        for name in names:
            if not re.fullmatch(rule.kernels, name) or (re.fullmatch(HOPPERS, name) and arch != "sm_90a"):
                continue
            found.add(rule)
            share = share_of_wide(code[name], rule)
            if share < rule.share:
                narrow.append(f"{name}: {share:.2f} of a {rule.moves}, wanted {rule.share}")
    assert len(found) >= len(WIDE) - 2
    assert not narrow, "\n".join(narrow)


def share_of_wide(code: list[str], rule: Wide) -> float:
    """0 where nothing is moved."""
    moved = [width(op) for op in code if re.match(rf"({MOVES[rule.moves]})\b", op)]
    return sum(w for w in moved if w >= rule.bytes) / max(1, sum(moved))


def width(op: str) -> int:
    """Bytes that a thread moves: 16 by LDG.E.128.CONSTANT, 2 by LDS.U16, 4 by each matrix of LDSM."""
    parts = op.split(".")
    if parts[0] == "LDSM":
        return 4 * int(parts[-1]) if parts[-1] in "24" else 4
    bits = [int(part.lstrip("US")) for part in parts if part.lstrip("US") in ("8", "16", "64", "128", "256")]
    return bits[0] // 8 if bits else 4


def test_gelu_runs_while_products_do(built) -> None:
    """In the loop of Hopper's kernel a chunk's GELU stands before the wait for the fc2 of the last chunk."""
    names = [kernel.name for kernel in of_arch(built, "sm_90a") if family(kernel) == "mlp_fwd_sm90"]
    assert len(names) == 8
    code = machine_code("sm_90a")
    for name in names:
        before, after = gelu_of_the_loop(code[name])
        assert before >= 10 * 32, (name, before, after)  # of 32 elements, ten instructions each
        assert after == 0, (name, before, after)


def gelu_of_the_loop(code: list[str]) -> tuple[int, int]:
    """Its instructions from the wait for fc1 to that for all products, and from there to the next product."""
    waits = [i for i, op in enumerate(code) if op.startswith("WARPGROUP.DEPBAR")]
    (fc1,) = (i for i in waits if code[i].endswith(" 0x1"))
    everything = next(i for i in waits if i > fc1)
    product = next(i for i, op in enumerate(code) if i > everything and op == "WARPGROUP.ARRIVE")
    parts = code[fc1:everything], code[everything:product]
    before, after = (sum(op.split(".")[0] in ("FADD", "FMUL", "FFMA") for op in part) for part in parts)
    return before, after


def test_warpgroups_can_have_the_registers_they_take(built) -> None:
    """``setmaxnreg`` waits for what the copying warpgroup gives, which starts from what ptxas chose."""
    taken = {512: (3 * 160 + 32, 128), 384: (2 * 240 + 24, 168)}  # of mlp/forward_sm90.cuh, by threads
    found = [kernel for kernel in of_arch(built, "sm_90a") if family(kernel) == "mlp_fwd_sm90"]
    assert len(found) == 8
    for kernel in found:
        wanted, registers = taken[kernel.threads]
        assert kernel.registers == registers, kernel
        assert 128 * wanted <= kernel.threads * registers, kernel


def test_tensor_core_instructions_are_not_serialised(built) -> None:
    from poolformer_kernels import _C

    assert re.findall(r".*Performance Loss.*", _C.ptxas_report()) == []


@functools.cache
def machine_code(arch: str) -> dict[str, list[str]]:
    """By kernel, the installed extension's instructions, without operands but those of waits for products."""
    from poolformer_kernels import _C

    command = [cuobjdump(), "--dump-sass", "-arch", arch, _C.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dump:
        found = instructions(dump.stdout)
    assert dump.returncode == 0
    return found


def instructions(lines: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    code: list[str] = []
    for line in lines:
        if match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?([A-Z][\w.]+)(?: +gsb0,( \w+))?", line):
            code.append(sys.intern(match[1] + (match[2] or "")))
        elif match := re.match(r"\s+Function : (\w+)", line):
            code = found[short_name(demangled(match[1]))]
    return found


@functools.cache
def demangled(name: str) -> str:
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()


def cuobjdump() -> str:
    """The toolkit's, or the one that Triton brings."""
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parent / "cuobjdump" if nvcc else None
    if beside is not None and beside.exists():
        return str(beside)
    return str(Path(require("triton").__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def test_fake_has_the_kernels_shape() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from poolformer_kernels.ops.norm_stats import CHUNK

    text = (ROOT / "csrc" / "cuda" / "core" / "norm_stats.cu").read_text()
    threads, each = (int(re.search(rf"{name} = (\d+);", text)[1]) for name in ("kThreads", "kPerThread"))
    assert threads * each == CHUNK
    with FakeTensorMode():
        stats = torch.ops.poolformer_kernels.norm_stats_cuda(torch.empty(3, 64, 57, 57, dtype=torch.half))
    assert stats.shape == (3, -(-64 * 57 * 57 // CHUNK), 3)
    assert stats.dtype == torch.float32
