"""Compiles the launches ahead of time, without a GPU, and reads what they use from the machine code.

``python -m poolformer_kernels.backends.triton.aot [--arch 90]`` prints the table.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import pool_mixer
from .accesses import global_accesses, shared_loads
from .config import stats_tiles
from .device import DEVICES, Device, assumed
from .mlp import backward, forward
from .mlp.config import mlp_stats_tiles

__all__ = [
    "ARCHS",
    "SHAPES",
    "Case",
    "Launch",
    "MlpCase",
    "Resources",
    "compile_launch",
    "distinct",
    "launches",
    "meta",
    "resource_table",
]

ARCHS = (80, 86, 89, 90, 100, 120)
#: (channels, height = width) of the four stages of the S and of the M family at 224x224
SHAPES = ((64, 56), (128, 28), (320, 14), (512, 7), (96, 56), (192, 28), (384, 14), (768, 7))
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MATRIX = ("HMMA", "HGMMA", "UTCHMMA")  # mma.sync, wgmma, tcgen05
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Case(NamedTuple):
    """One call of the token mixer, forward and backward."""

    dtype: torch.dtype
    channels_last: bool
    channels: int
    size: int
    pool_size: int = 3
    residual: bool = True
    given_stats: bool = True
    return_stats: bool = True
    offset: int = 0  # elements before each of the caller's tensors in its memory

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "nchw"
        name = f"{_TYPES[self.dtype]} {layout} {self.channels}x{self.size}"
        name += f" pool {self.pool_size}" if self.pool_size != 3 else ""
        flags = zip(("plain", "own stats", "no y stats"), self[-4:-1], strict=True)
        name = ", ".join([name, *(text for text, usual in flags if not usual)])
        return name + (f", offset {self.offset}" if self.offset else "")

    def call(self) -> None:
        shape = (2, self.channels, self.size, self.size)
        fmt = torch.channels_last if self.channels_last else torch.contiguous_format
        x, grad = (meta(self.dtype, *shape, offset=self.offset, fmt=fmt) for _ in range(2))
        weight, bias, scale = (meta(self.dtype, self.channels, offset=self.offset) for _ in range(3))
        drop = meta(self.dtype, 2, offset=self.offset)
        tiles = stats_tiles(shape, self.channels_last, self.pool_size)
        stats = meta(torch.float32, 2, tiles, 3) if self.given_stats else None
        options = (self.pool_size, 1e-5, self.residual, self.return_stats)
        _, mean_rstd, _ = pool_mixer.forward(x, weight, bias, scale, drop, stats, *options)
        pool_mixer.backward(grad, x, mean_rstd, weight, bias, scale, drop, self.pool_size, self.residual)


class MlpCase(NamedTuple):
    """One call of the MLP sub-block on channels_last data, forward and backward."""

    dtype: torch.dtype
    channels: int
    size: int
    weight_dtype: torch.dtype | None = None  # x's
    activation: str = "gelu"
    save_hidden: bool = False
    backward: bool = True
    offset: int = 0  # elements before each of the caller's tensors in its memory
    autocast: bool = False  # the products' operands are bfloat16, whatever x and the weights are
    allow_tf32: bool = False

    def __str__(self) -> str:
        name = f"{'tf32' if self.allow_tf32 else _TYPES[self.dtype]} {self.channels}x{self.size}"
        name += f" {self.activation}" if self.activation != "gelu" else ""
        name += f" {_TYPES[self.weight_dtype]} weights" if self.weight_dtype else ""
        name += ", saved" if self.save_hidden else ""
        name += ", autocast" if self.autocast else ""
        return name + (f", offset {self.offset}" if self.offset else "")

    def call(self) -> None:
        shape = (2, self.channels, self.size, self.size)
        x, grad = (meta(self.dtype, *shape, offset=self.offset, fmt=torch.channels_last) for _ in range(2))
        width = 4 * self.channels
        w1, w2, b1, b2, gamma, beta, scale = (
            meta(self.weight_dtype or self.dtype, *sizes, offset=self.offset)
            for sizes in ((width, self.channels), (self.channels, width), (width,), *[(self.channels,)] * 4)
        )
        parameters = (w1, b1, w2, b2, gamma, beta, scale, meta(self.dtype, 2, offset=self.offset))
        stats = meta(torch.float32, 2, mlp_stats_tiles(shape, True, width), 3)
        operand = w1.dtype if x.dtype == torch.float32 else x.dtype
        operand = torch.bfloat16 if self.autocast else operand
        _, mean_rstd, _, hidden = forward.forward(
            x, *parameters, stats, self.activation, 1e-5, True, True, True, self.save_hidden, operand,
            self.allow_tf32,
        )  # fmt: skip
        if self.backward:
            saved = hidden if self.save_hidden else None
            flags = (True, True, True, True, operand, self.allow_tf32)
            backward.backward(grad, x, mean_rstd, *parameters, saved, self.activation, *flags)


@dataclass(frozen=True)
class Launch:
    """What a launcher asked Triton for: a kernel and everything that its machine code depends on."""

    kernel: str
    signature: tuple[tuple[str, str], ...]  # (argument, its type)
    constants: tuple[tuple[str, object], ...]  # (argument, its value), known at compile time
    divisible: tuple[int, ...]  # indices of the arguments that are known to be divisible by 16
    options: tuple[tuple[str, object], ...]  # num_warps and the like
    case: str  # the call that asked for it

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.case}"


@dataclass(frozen=True)
class Resources:
    """A row of the table: what one launch uses."""

    kernel: str
    config: str  # the call that asked for the launch
    arch: int  # ten times the compute capability
    registers: int  # of a thread
    warps: int  # on an SM at the same time, as far as its registers allow
    spills: int  # bytes of a thread that lie on its stack
    shared: int  # bytes of shared memory of a block
    ldg128: int  # global loads of 128 bits; one of 256 counts as two
    ldg: int  # global loads of any width
    instructions: int
    matrix: dict[str, int]  # matrix instructions, by kind; with TF32 operands "HMMA.TF32" and the like
    ffma: int  # multiply-adds in fp32; one of a pair counts as two
    accesses: dict[str, dict[int, int]]  # to global memory, of a thread: by argument, then by bytes
    shared_loads: dict[int, int]  # of a thread, by bytes
    # Elements of a tile that each thread applies the activation to (any but relu). More than a thread's share
    # of the tile: some are computed twice.
    activations: int


def meta(
    dtype: torch.dtype, *shape: int, offset: int = 0, fmt: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """A tensor without data that starts ``offset`` elements into its memory."""
    dense = torch.empty(shape, dtype=dtype, device="meta", memory_format=fmt)
    if offset == 0:
        return dense
    memory = torch.empty(offset + dense.numel(), dtype=dtype, device="meta")
    return memory.as_strided(shape, dense.stride(), offset)


def launches(case: Case | MlpCase, device: Device = DEVICES[90]) -> list[Launch]:
    """The launches of one call on a device, recorded from the launchers on tensors without data."""
    with assumed(device), _recorded(str(case)) as log:
        case.call()
    return log


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Machine code of one launch for ``sm_<arch>``, and what it uses."""
    source = ASTSource(
        _kernels()[launch.kernel][1],
        dict(launch.signature),
        dict(launch.constants),
        {(index,): [["tt.divisibility", 16]] for index in launch.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", cubin)
        code = _cuobjdump("--dump-sass", cubin)
    arguments = [(name, kind) for name, kind in launch.signature if kind != "constexpr"]
    pointers = {index: name for index, (name, kind) in enumerate(arguments) if kind[0] == "*"}
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", code, re.MULTILINE)
    kinds = Counter(name.split(".")[0] for name in instructions)
    loads = [name for name in instructions if name.startswith("LDG.")]
    return Resources(
        kernel=launch.kernel,
        config=launch.case,
        arch=arch,
        registers=used["REG"],
        warps=_resident_warps(used["REG"], dict(launch.options).get("num_warps", 4)),
        spills=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        ldg128=sum(".128" in name for name in loads) + 2 * sum(".256" in name for name in loads),
        ldg=len(loads),
        instructions=len(instructions),
        matrix=_matrix_instructions(instructions, compiled.asm["ptx"]),
        accesses=global_accesses(compiled.asm["ptx"], pointers),
        shared_loads=shared_loads(instructions),
        ffma=kinds["FFMA"] + 2 * kinds["FFMA2"],
        activations=_activations(compiled.asm["ttgir"], compiled.asm["ptx"]),
    )


def _resident_warps(registers: int, warps: int) -> int:
    """How many warps of whole blocks the 65536 registers of an SM hold; a thread is given multiples of 8."""
    return 65536 // (-(-registers // 8) * 8 * 32 * warps) * warps


def _matrix_instructions(instructions: list[str], ptx: str) -> dict[str, int]:
    """Counts by kind; tcgen05 says in a descriptor, not in its name, what its operands are."""
    found = Counter()
    for name in instructions:
        kind = name.split(".")[0]
        if kind in _MATRIX:
            tf32 = "tcgen05.mma.cta_group::1.kind::tf32" in ptx if kind == "UTCHMMA" else ".TF32" in name
            found[kind + ".TF32" * tf32] += 1
    return dict(found)


def _activations(ttgir: str, ptx: str) -> int:
    """How many instructions a thread has for one operation on a tile: gelu's clamp, or an exponential."""
    for operation, instruction in (("tt.clampf ", r"\bmin\S*\.f32 "), ("math.exp2 ", r"\bex2\.approx")):
        if operation in ttgir:  # more than once if the pipeliner has peeled the loop
            return round(len(re.findall(instruction, ptx)) / ttgir.count(operation))
    return 0


def resource_table(
    cases: list[Case | MlpCase], archs: tuple[int, ...] = ARCHS, processes: int | None = None
) -> list[dict]:
    """One row per distinct launch of the cases and architecture, compiled in parallel."""
    jobs = [(launch, arch) for arch in archs for launch in distinct(cases, DEVICES[arch])]
    workers = processes or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [asdict(row) for row in pool.map(compile_launch, *zip(*jobs, strict=True), chunksize=4)]


def distinct(cases: list[Case | MlpCase], device: Device = DEVICES[90]) -> list[Launch]:
    """The launches of the cases on a device; of launches with the same machine code only the first."""
    found = {}
    for case in cases:
        for launch in launches(case, device):
            key = (launch.kernel, launch.signature, launch.constants, launch.divisible, launch.options)
            found.setdefault(key, launch)
    return list(found.values())


def _cuobjdump(action: str, cubin: Path) -> str:
    env = os.environ | {"PATH": f"{_TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}  # it calls nvdisasm
    command = [_TOOLS / "cuobjdump", action, cubin]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


class _Recorder:
    """Stands in for a kernel and records its launches, specialised as Triton's launcher would do it."""

    def __init__(self, kernel: triton.JITFunction, case: str, log: list[Launch]) -> None:
        self.kernel, self.case, self.log = kernel, case, log

    def __getitem__(self, grid: tuple[int, ...]) -> "_Recorder":
        return self

    def __call__(self, *args, **options) -> None:
        signature, constants, divisible = {}, {}, []
        for index, (param, value) in enumerate(zip(self.kernel.params, args, strict=True)):
            if isinstance(value, torch.Tensor):
                signature[param.name] = f"*{_TYPES[value.dtype]}"
                if value.storage_offset() * value.element_size() % 16 == 0:  # memory itself is aligned
                    divisible.append(index)
            elif param.is_constexpr or value is None or (value == 1 and not param.do_not_specialize):
                signature[param.name] = "constexpr"
                constants[param.name] = value
            elif isinstance(value, float):
                signature[param.name] = "fp32"
            else:
                signature[param.name] = "i32"
                if value % 16 == 0 and not param.do_not_specialize:
                    divisible.append(index)
        fields = (tuple(d.items()) for d in (signature, constants))
        self.log.append(
            Launch(self.kernel.__name__, *fields, tuple(divisible), tuple(options.items()), self.case)
        )


def _kernels() -> dict[str, tuple[ModuleType, triton.JITFunction]]:
    """Every Triton function of this package's modules, device functions too: those are never launched."""
    modules = [m for name, m in sys.modules.items() if name.startswith(f"{__package__}.") and m is not None]
    return {
        name: (module, function)
        for module in modules
        for name, function in vars(module).items()
        if isinstance(function, triton.JITFunction) and function.__module__ == module.__name__
    }


@contextlib.contextmanager
def _recorded(case: str) -> Iterator[list[Launch]]:
    kernels = _kernels()
    if not kernels:
        raise RuntimeError("the kernels are interpreted: unset TRITON_INTERPRET to compile them")
    log: list[Launch] = []
    try:
        for name, (module, kernel) in kernels.items():
            setattr(module, name, _Recorder(kernel, case, log))
        yield log
    finally:
        for name, (module, kernel) in kernels.items():
            setattr(module, name, kernel)


def main() -> None:
    parser = argparse.ArgumentParser(description="Resources of the Triton kernels, compiled ahead of time")
    parser.add_argument(
        "--arch",
        type=int,
        nargs="*",
        default=ARCHS,
        choices=DEVICES,
        metavar="ARCH",
        help=f"ten times the compute capability: any of {', '.join(map(str, DEVICES))}; "
        f"default {' '.join(map(str, ARCHS))}",
    )
    archs = tuple(parser.parse_args().arch)
    cases: list[Case | MlpCase] = [
        case._replace(given_stats=given)
        for dtype in _TYPES
        for last in (True, False)
        for shape in SHAPES
        for case in (Case(dtype, last, *shape),)
        for given in (True, False)
    ]
    cases += [MlpCase(dtype, *shape) for dtype in _TYPES for shape in SHAPES]
    print(
        f"{'kernel':22}{'arch':>5}{'registers':>10}{'spills':>7}{'shared':>7}{'ldg128':>7}{'ldg':>5}"
        f"{'matrix':>16}{'activations':>12}  config"
    )
    for r in resource_table(cases, archs):
        matrix = " ".join(f"{n} {name}" for name, n in r["matrix"].items())
        numbers = f"{r['arch']:5}{r['registers']:10}{r['spills']:7}{r['shared']:7}{r['ldg128']:7}{r['ldg']:5}"
        print(f"{r['kernel']:22}{numbers}{matrix:>16}{r['activations']:12}  {r['config']}")


if __name__ == "__main__":
    main()
