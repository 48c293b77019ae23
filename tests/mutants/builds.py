"""The variants of the package that mutants run in: one for all mutants of the C++ or CUDA C++ kernels."""

import runpy
import shutil
from collections.abc import Iterable
from pathlib import Path

from support import variants

from poolformer_kernels.backends import cpp

from .mutant import DECLARATION, DEFINITION, ROOT, Mutant, behind_a_number, replaced

Numbered = tuple[int, Mutant]
LEVEL = "avx2"  # of the target cpp: the one that compiles fastest
OPERATORS = ("pool_mixer/pool_mixer", "mlp/forward", "mlp/backward")
UNMUTATED = 0


def lacking(target: str) -> str | None:
    """Why the target cannot be tested on this machine, or None."""
    needed = {"cpp": LEVEL, "amx": "avx512_bf16"}.get(target)
    if needed is not None and needed not in cpp.build_info().get("isa_supported", ()):
        return f"needs a processor with {needed}"
    return None


def _edit(folder: Path, mutants: Iterable[Numbered]) -> tuple[Path, list[str], Path]:
    """A copy of csrc with the mutants: its parent, flags for its sources, and the source of the number."""
    variants.copy_sources(folder)
    of_file: dict[str, list[Numbered]] = {}
    for number, mutant in mutants:
        of_file.setdefault(mutant.file, []).append((number, mutant))
    for file, own in of_file.items():
        path = folder / file
        path.write_text(behind_a_number(path.read_text(), own))
    header, source = folder / "mutant.h", folder / "mutant.cpp"
    header.write_text(DECLARATION)
    source.write_text(DEFINITION)
    return folder, ["-include", str(header)], source


def build_cpp(folder: Path, mutants: list[Numbered], jobs: int) -> Path:
    """The folder of a package for the targets cpp and amx; the latter on emulated tiles."""
    sources, flags, number = _edit(folder, mutants)
    changed = {f"csrc/cpu/isa/{LEVEL}.cpp": ("-O1",)}
    changed |= {f"csrc/cpu/{name}.cpp": ("-O1",) for name in OPERATORS}
    if any(mutant.target == "amx" for _, mutant in mutants):
        changed = variants.TILES | changed  # what takes longest comes first
    variants.copy_package(folder)
    variants.build_extension(folder, changed, sources=sources, added=(number,), flags=flags, jobs=jobs)
    return folder


def build_cuda(folder: Path, mutants: list[Numbered], jobs: int) -> Path:
    """The folder of a package, and in it the library of the kernels for the host: `executor_of`."""
    sources, flags, number = _edit(folder, mutants)
    variants.copy_package(folder)
    executor = folder / "tests" / "cuda_executor"  # it includes headers of the kernels: those with mutants
    shutil.copytree(ROOT / "tests" / "cuda_executor", executor)
    kernels = [*sorted((sources / "csrc" / "cuda").rglob("*.cu")), number]
    build_copy = runpy.run_path(str(executor / "build.py"))["build"]
    build_copy(executor_of(folder), kernels, jobs, flags=flags)
    return folder


def executor_of(folder: Path) -> Path:
    return folder / "cuda_executor.so"


def build_triton(folder: Path, mutants: list[Numbered]) -> Path:
    """The parent of a package for each mutant: in `triton_of`."""
    for number, mutant in mutants:
        variants.copy_package(triton_of(folder, number))
        path = triton_of(folder, number) / mutant.file
        path.write_text(replaced(path.read_text(), mutant))
    variants.copy_package(triton_of(folder, UNMUTATED))
    return folder


def triton_of(folder: Path, number: int) -> Path:
    return folder / str(number)
