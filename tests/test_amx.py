"""The kernels on AMX tiles: what they compute on emulated tiles, and the instructions of the build.

test_isa runs the level itself where the machine has it.
"""

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from support import variants
from support.peers import require_backend

from poolformer_kernels.backends import cpp

ROOT = Path(__file__).parents[1]
KERNELS = ("csrc/cpu/isa/amx.cpp", "csrc/cpu/isa/avx512_bf16.cpp")
SOURCES = ("tests/amx_tiles.cpp", "tests/amx_rows.cpp", *KERNELS)
# Both levels add float32 products of the same bfloat16 operands, in another order. So what is rounded to
# bfloat16 afterwards may be its neighbour, 2^-7 away at most, in few values of thousands, hence the L2 norm;
# what is summed from such values stays in float32. A lane, pair or stride that is wrong changes 1 % and more.
NEIGHBOUR = 1e-2
ROUNDED, SUMMED = 1e-3, 2e-4
EQUAL = ("t", "db2")  # no products
ARRAYS = ("y", "saved", "token_moments", "e", "g_p", "x_dh", "db1", "t", "drop_terms", "dw1", "dw2", "db2")
ARRAYS += ("dgamma", "dbeta", "dscale")
ARRAYS += tuple(f"{array}_of_{what}" for what in ("few", "rows") for array in ("y", "token_moments"))
CONVOLVED = {("bfloat16", "embedded"), ("bfloat16", "embedded_moments")}
# The backward with tokens as rows, against double precision: what rounding of operands leaves, in L2 norms.
# A gelu that is off by the 0.28 % which its results lose when they are cut is out of these bounds.
ROWS = {"dx": 4e-3, "dw1": 4.5e-3, "db1": 2.6e-3, "dw2": 3.3e-3, "db2": 1e-6}
ROWS |= {"dgamma": 5e-3, "dbeta": 2.7e-3, "dscale": 2e-3}


run = partial(variants.run, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A program of these sources with the kernels on emulated tiles, compiled once."""
    require_backend("cpp")
    if "avx512_bf16" not in cpp.build_info()["isa_supported"]:
        pytest.skip("this machine or this build has no avx512_bf16")
    folder = tmp_path_factory.mktemp("amx")
    command, flags = variants.compiler()
    if shutil.which(command[0]) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no C++ compiler: {command[0]}")
    cxx = [*command, *flags]

    def compiled(source: str) -> str:
        target = folder / f"{Path(source).stem}.o"
        run([*cxx, "-DPK_EMULATE_TILES", "-c", source, "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip(SOURCES, pool.map(compiled, SOURCES), strict=True))

    def linked(*sources: str) -> str:
        program = str(folder / Path(sources[0]).stem)
        run([*cxx, *(objects[source] for source in sources), "-o", program])
        return program

    return linked


@pytest.mark.long
def test_emulated_tiles_agree_with_vectors(link):
    program = link("tests/amx_tiles.cpp", *KERNELS)
    lines = [line.split() for line in run([program]).splitlines()]
    assert {(kind, array) for _, kind, array, *_ in lines} == CONVOLVED | {
        (kind, array) for kind in ("bfloat16", "float32") for array in ARRAYS
    }
    wrong = []
    for problem, kind, array, largest, l2 in lines:
        rounded = array in ("saved", "dw1", "dw2", "embedded") or (
            array in ("y", "y_of_few", "y_of_rows") and kind == "bfloat16"
        )
        most, bound = (0, 0) if array in EQUAL else (NEIGHBOUR, ROUNDED if rounded else SUMMED)
        if not (float(largest) <= most and float(l2) <= bound):  # a NaN is wrong
            wrong.append(
                f"{problem} {kind} {array}: max {largest} (allowed {most}), L2 {l2} (allowed {bound})"
            )
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
def test_emulated_rows_are_right(link):
    """And bitwise the same in whatever order the items of a call are computed."""
    lines = [line.split() for line in run([link("tests/amx_rows.cpp", *KERNELS)]).splitlines()]
    assert {gradient for _, gradient, *_ in lines} == set(ROWS)
    wrong = [
        f"{problem} {gradient}: L2 {l2} (allowed {ROWS[gradient]}), {same}"
        for problem, gradient, l2, same in lines
        if not (float(l2) <= ROWS[gradient] and same == "same")  # a NaN is wrong
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86-64's")
def test_the_build_has_the_tile_instructions():
    """Products, the configuration of the registers before them and their release on every way out."""
    require_backend("cpp")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    library = importlib.util.find_spec("poolformer_kernels._C").origin
    names = "tdpbf16ps|ldtilecfg|tilerelease|tileloadd|tileloaddt1|tilestored|tilezero"
    counts = dict.fromkeys(names.split("|"), 0)
    for name in re.findall(rf"\t({names})\b", run(["objdump", "-d", "--no-show-raw-insn", library])):
        counts[name] += 1
    assert all(counts.values()), counts
    assert counts["tilerelease"] >= counts["ldtilecfg"], counts
