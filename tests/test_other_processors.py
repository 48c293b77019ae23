"""The sources compile where the processor is no x86: nothing of its instructions is outside of a guard."""

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc").rglob("*.cpp"))
HEADERS_OF_X86 = {"immintrin.h", "cpuid.h"}
DEFINES = ["TORCH_TARGET_VERSION=0x020a000000000000", "TORCH_EXTENSION_NAME=_C"]
DEFINES += [f'PK_{name}=""' for name in ("TORCH_VERSION", "CUDA_VERSION", "CUDA_ARCHS")]


def foreign(source: str) -> str:
    """The source as another processor's compiler sees it, for this machine's.

    The system's and torch's headers come first, while the processor still has its name. Then the name is
    gone, and the header of its intrinsics is empty.
    """
    texts = (path.read_text() for path in (ROOT / "csrc").rglob("*.*") if "cuda" not in path.parts)
    found = {name for text in texts for name in re.findall(r"#include <([^>]+)>", text)}
    headers = sorted(found - HEADERS_OF_X86 - {"cuda_runtime.h"})
    assert "torch/csrc/stable/tensor.h" in headers
    lines = [f"#include <{header}>" for header in headers]
    lines += ["#undef __x86_64__", "#define _IMMINTRIN_H_INCLUDED", "#define __aarch64__ 1", source]
    return "\n".join(lines)


def errors(source: str) -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no C++ compiler")
    folders = [*include_paths(), sysconfig.get_paths()["include"], str(ROOT / "csrc")]
    command = [compiler, "-std=c++20", "-fsyntax-only", "-w", "-xc++", "-"]
    command += [f"-I{folder}" for folder in folders] + [f"-D{define}" for define in DEFINES]
    return subprocess.run(command, input=foreign(source), capture_output=True, text=True).stderr


@pytest.mark.long
def test_every_source_compiles():
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(SOURCES, pool.map(lambda path: errors(f'#include "{path}"'), SOURCES), strict=True))
    assert len(found) >= 17
    assert {str(path): text[:2000] for path, text in found.items() if text} == {}


@pytest.mark.long
@pytest.mark.parametrize(
    "line", ["#include <immintrin.h>\n__m256 row;", "#ifndef __aarch64__\nint row;\n#endif\nint* p = &row;"]
)
def test_what_is_not_guarded_is_seen(line):
    assert "error:" in errors(line)
    assert errors("int row;\nint* p = &row;") == ""
