"""The extension's CUDA kernels and what each takes of a multiprocessor: `poolformer-kernels info --kernels`.

Registers, spills and static shared memory are what ptxas said at build time, threads and dynamic shared
memory what the launchers ask for, and occupancy follows from the architecture's limits. On a machine with a
GPU the driver's own figures take their place for the code which that GPU runs.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

__all__ = ["LEGEND", "LIMITS", "Kernel", "Limits", "built_kernels", "kernels", "rows", "table"]

LEGEND = (
    "Registers and spills (bytes stored/loaded) of a thread; static and dynamic shared memory (bytes) and\n"
    "threads of a block; blocks and warps resident on a multiprocessor. A question mark: not known here."
)


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has (CUDA C++ Programming Guide, "Compute Capabilities")."""

    warps: int
    blocks: int
    shared: int  # bytes of shared memory for all resident blocks
    shared_of_block: int  # bytes that one block may have at most
    registers: int = 65536


LIMITS = {
    80: Limits(warps=64, blocks=32, shared=164 * 1024, shared_of_block=163 * 1024),
    86: Limits(warps=48, blocks=16, shared=100 * 1024, shared_of_block=99 * 1024),
    87: Limits(warps=48, blocks=16, shared=164 * 1024, shared_of_block=163 * 1024),
    89: Limits(warps=48, blocks=24, shared=100 * 1024, shared_of_block=99 * 1024),
    90: Limits(warps=64, blocks=32, shared=228 * 1024, shared_of_block=227 * 1024),
    100: Limits(warps=64, blocks=32, shared=228 * 1024, shared_of_block=227 * 1024),
    103: Limits(warps=64, blocks=32, shared=228 * 1024, shared_of_block=227 * 1024),
    120: Limits(warps=48, blocks=24, shared=100 * 1024, shared_of_block=99 * 1024),
    121: Limits(warps=48, blocks=24, shared=100 * 1024, shared_of_block=99 * 1024),
}
_QUARTERS = 4  # of a multiprocessor: each holds its own warps and registers
_REGISTERS = 256  # allocated at a time, to a warp
_SHARED = 128  # bytes allocated at a time, to a block
_RESERVED = 1024  # bytes of shared memory of each block that are the system's


@dataclass(frozen=True)
class Kernel:
    """An instantiation for an architecture, and a launch of it; None is unknown."""

    name: str  # norm_stats<bf16, true>
    arch: str  # sm_90a
    registers: int  # of a thread
    spill_stores: int  # bytes
    spill_loads: int
    static_shared: int  # bytes
    dynamic_shared: int | None = None
    threads: int | None = None
    blocks: int | None = None  # resident on a multiprocessor

    @property
    def limits(self) -> Limits | None:
        """Of its architecture, where they are known here."""
        return LIMITS.get(_number(self.arch))

    @property
    def warps(self) -> int | None:
        """Resident on a multiprocessor."""
        return None if self.blocks is None else self.blocks * _up(self.threads, 32) // 32


def rows(report: str, launches: Iterable[Mapping[str, object]] = ()) -> list[Kernel]:
    """The kernels of a ``ptxas -v`` report with demangled names, by name and architecture.

    Args:
        launches: ``name`` (demangled), ``threads`` and ``shared`` of each; a kernel has a row for each.
    """
    launched: dict[str, list[tuple[int, int]]] = {}
    for launch in launches:
        launched.setdefault(short_name(launch["name"]), []).append((launch["threads"], launch["shared"]))
    found = {}
    for text in report.split("Compiling entry function ")[1:]:
        entry, arch = re.match(r"'(.+)' for '(\w+)'", text).groups()
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        used = re.search(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?", text)
        kernel = Kernel(
            name=short_name(entry),
            arch=arch,
            registers=int(used[1]),
            spill_stores=int(spills[1]),
            spill_loads=int(spills[2]),
            static_shared=int(used[2] or 0),
        )
        if _has_code(kernel.name, _number(arch)):
            found[kernel.name, _number(arch), arch] = kernel
    return [
        row for _, kernel in sorted(found.items()) for row in _launched(kernel, launched.get(kernel.name, []))
    ]


def _has_code(name: str, arch: int) -> bool:
    """Kernels of one architecture are empty for the others."""
    own = re.match(r"\w+_sm(\d+)\b", name)
    return own is None or int(own[1]) == arch


def _launched(kernel: Kernel, launches: list[tuple[int, int]]) -> list[Kernel]:
    if not launches:
        return [kernel]
    made = [replace(kernel, threads=threads, dynamic_shared=shared) for threads, shared in launches]
    return [replace(row, blocks=resident_blocks(row)) for row in made]


def resident_blocks(kernel: Kernel) -> int | None:
    """Blocks on a multiprocessor, as the runtime's occupancy calculator counts them."""
    limits = kernel.limits
    if limits is None:
        return None
    warps = _up(kernel.threads, 32) // 32
    shared = kernel.static_shared + kernel.dynamic_shared
    of_quarter = limits.registers // _QUARTERS // _up(32 * kernel.registers, _REGISTERS)
    if shared > limits.shared_of_block or _up(warps, _QUARTERS) > _QUARTERS * of_quarter:
        return 0  # the launch fails
    return min(
        limits.blocks,
        limits.warps // warps,
        _QUARTERS * of_quarter // warps,
        limits.shared // _up(shared + _RESERVED, _SHARED),
    )


def built_kernels() -> list[Kernel]:
    """Every kernel of the extension as ptxas built it. Empty without CUDA."""
    from ..backends import cpp

    if not cpp.build_info().get("cuda_archs"):
        return []
    from .._C import kernel_launches, ptxas_report

    return rows(ptxas_report(), kernel_launches())


def kernels() -> list[Kernel]:
    """Every kernel of the extension; with a GPU, its own figures for the code it runs. Empty without CUDA.

    Raises:
        RuntimeError: the device cannot run what was built.
    """
    import torch

    built = built_kernels()
    if not built or not torch.cuda.is_available():
        return built
    from .._C import kernel_uses

    return with_uses(built, kernel_uses())


def with_uses(built: list[Kernel], uses: Iterable[Mapping[str, object]]) -> list[Kernel]:
    """The rows with a device's figures in place of those of its architecture.

    Args:
        uses: of each launch ``name``, ``threads``, ``shared``, ``arch`` (90), ``registers``, ``local`` and
            ``static_shared`` bytes, ``blocks``.
    """
    measured = {}
    for use in uses:
        name = short_name(use["name"])
        measured[name, use["arch"], use["threads"], use["shared"]] = use
    out = []
    for row in built:
        use = measured.pop((row.name, _number(row.arch), row.threads, row.dynamic_shared), None)
        if use is not None:
            names = ("registers", "static_shared", "blocks")
            row = replace(row, **{name: use[name] for name in names})
        out.append(row)
    for (name, arch, threads, shared), use in measured.items():  # compiled from PTX by the driver
        if not _has_code(name, arch):
            continue
        out.append(
            Kernel(
                name=name,
                arch=f"sm_{arch}",
                registers=use["registers"],
                spill_stores=use["local"],  # all that the driver tells of them
                spill_loads=use["local"],
                static_shared=use["static_shared"],
                dynamic_shared=shared,
                threads=threads,
                blocks=use["blocks"],
            )
        )
    return sorted(out, key=lambda row: (row.name, _number(row.arch), row.arch))


_TYPES = {"__nv_bfloat16": "bf16", "__half": "f16"}


def short_name(demangled: str) -> str:
    """``norm_stats<bf16>`` of ``void pk::(anonymous namespace)::norm_stats<__nv_bfloat16>(Params)``.

    The extension's own list has the function as a template argument, ``pk::Kernel<&(void …(Params))>*``.
    """
    text = re.sub(r"(\w+|\(anonymous namespace\))::", "", demangled)
    text = re.sub(r"^Kernel<&?\(?(.*?)\)?>\*$", r"\1", text).removeprefix("void ")
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:  # the parameters
            text = text[:i]
            break
    for long, short in _TYPES.items():
        text = re.sub(rf"\b{long}\b", short, text)
    return text.replace("> >", ">>")


def table(found: list[Kernel]) -> list[str]:
    """Aligned lines: a heading, then one for each kernel."""
    heading = ("kernel", "arch", "registers", "spills", "static", "dynamic", "threads", "blocks", "warps")
    lines = [heading]
    for k in found:
        warps = None if k.warps is None else f"{k.warps}/{k.limits.warps if k.limits else '?'}"
        spills = f"{k.spill_stores}/{k.spill_loads}"
        numbers = (k.registers, spills, k.static_shared, k.dynamic_shared, k.threads, k.blocks, warps)
        lines.append((k.name, k.arch, *("?" if n is None else str(n) for n in numbers)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def _number(arch: str) -> int:
    """90 of sm_90a."""
    return int(re.sub(r"\D", "", arch))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
