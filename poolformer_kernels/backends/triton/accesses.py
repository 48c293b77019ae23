"""How wide a compiled kernel's accesses to memory are, from its PTX and machine code."""

import re
from collections import Counter

__all__ = ["global_accesses", "shared_loads"]

_DEFINITION = re.compile(r"^\s*(?:@!?%p\d+ )?[a-z][\w.]*\s+(%rd\d+), (.*);", re.MULTILINE)
_ACCESS = re.compile(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\s[^\[]*\[ *(%rd\d+)")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]* \[[^\]]*\], \[ *(%rd\d+)[^\]]*\], (0x\w+|\d+)")
_WIDTHS = {"LDS.128": 16, "LDS.64": 8, "LDS": 4}


def global_accesses(ptx: str, pointers: dict[int, str]) -> dict[str, Counter[int]]:
    """How many accesses of a thread have how many bytes, by the argument that they reach memory through.

    Args:
        pointers: names of the arguments that are pointers, by their index among the kernel's parameters.

    An address belongs to the arguments that it is computed from; loops define some registers twice. What
    belongs to none is found as ``"?"``.
    """
    definitions = [(name, re.findall(r"%rd\d+|_param_\d+", rest)) for name, rest in _DEFINITION.findall(ptx)]
    origins: dict[str, set[str]] = {f"_param_{index}": {name} for index, name in pointers.items()}
    before = -1
    while before != (before := sum(map(len, origins.values()))):
        for name, sources in definitions:
            origins.setdefault(name, set()).update(*(origins.get(source, ()) for source in sources))
    found: dict[str, Counter[int]] = {}
    accesses = [(address, int(n or 1) * int(bits) // 8) for n, bits, address in _ACCESS.findall(ptx)]
    accesses += [(address, int(size, 0)) for address, size in _COPY.findall(ptx)]
    for address, size in accesses:
        for name in origins.get(address) or ("?",):
            found.setdefault(name, Counter())[size] += 1
    return found


def shared_loads(instructions: list[str]) -> Counter[int]:
    """How many loads of a thread from shared memory have how many bytes; ldmatrix: the bytes it returns."""
    found = Counter()
    for name in instructions:
        if name.startswith("LDSM"):
            found[4 * int(name.rpartition(".")[2]) if name[-1] in "24" else 4] += 1
        elif name.startswith("LDS"):
            found[next(size for kind, size in _WIDTHS.items() if name.startswith(kind))] += 1
    return found
