"""What comments and documents cite is there: headings, files, and names of the package."""

import importlib
import re
import warnings
from pathlib import Path

from support.processes import ROOT

from poolformer_kernels.cli.main import load_benchmarks

SUFFIXES = {".py", ".md", ".toml", ".h", ".cpp", ".cu", ".cuh", ".in"}
FOLDERS = ("poolformer_kernels", "csrc", "benchmarks", "tests", "docs")
HEADING = re.compile(r'([\w/-]+\.md|README|[Aa]lgebra)(?:\'s)?,? "([^"]+)"')
PATH = re.compile(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w/-]+(?:\.\w+)+)")
NAME = re.compile(r"(?:(?<!`)`(?=[\w.]+`(?!`))|\((?=[\w.]+\)))(poolformer_kernels(?:\.\w+)+)")


def sources() -> list[Path]:
    here = [ROOT / "setup.py", ROOT / "Makefile", *ROOT.glob("*.md")]
    for folder in FOLDERS:
        here += (p for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES)
    return [path for path in here if path != Path(__file__) and "__pycache__" not in path.parts]


def cited(pattern: re.Pattern) -> list[tuple[str, re.Match]]:
    """(where, match); a citation may run on in the next line of a comment."""
    found = []
    for path in sources():
        text = re.sub(r"\n\s*(?://|#|\*)?\s*", " ", path.read_text(encoding="utf-8"))
        found += [(str(path.relative_to(ROOT)), match) for match in pattern.finditer(text)]
    return found


def headings(document: str) -> set[str]:
    path = ROOT / {"README": "README.md"}.get(document, document)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {line.lstrip("#").strip() for line in lines if line.startswith("#")}


def test_headings():
    found = cited(HEADING)
    assert len([where for where, _ in found if where.startswith(("csrc/", "poolformer_kernels/"))]) >= 8
    assert [(where, m[0]) for where, m in found if m[2] not in headings(m[1])] == []


def test_files():
    found = cited(PATH)
    assert len(found) > 20
    kept = [(where, m[1]) for where, m in found if not m[1].startswith("results/")]
    assert [(where, path) for where, path in kept if not (ROOT / path).exists()] == []


def exists(name: str) -> bool:
    """Whether it is a module, or something in one; a function may hide the module of its name."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", DeprecationWarning)  # an old name is none to cite
                value = importlib.import_module(".".join(parts[:n]))
                for attribute in parts[n:]:
                    value = getattr(value, attribute)
        except (ImportError, AttributeError, DeprecationWarning):
            continue
        return True
    return False


def test_names():
    load_benchmarks()
    found = cited(NAME)
    assert len(found) > 40
    assert exists("poolformer_kernels.ops.mlp.mlp_with_stats")
    assert not exists("poolformer_kernels.ops.mlp.nothing")
    assert not exists("poolformer_kernels.reference.memory_format_of")  # an old name
    found = [(where, match) for where, match in found if where != "CHANGELOG.md"]
    assert [(where, match[1]) for where, match in found if not exists(match[1])] == []
