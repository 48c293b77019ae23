"""Every instruction set level that this machine has runs the core tests; it is read once, at import."""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from support.peers import require_backend
from support.processes import python

from poolformer_kernels.backends import cpp

VARIABLE = "POOLFORMER_KERNELS_ISA"
TESTS = Path(__file__).parent
CORE = ("mlp_rows", "chain", "chain_convolutions")
PYTEST = """
import sys
import pytest
from poolformer_kernels.backends.cpp import build_info
print(build_info()["isa_chosen"], flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""
# the whole suite runs at the level that this process has chosen
LEVELS = [
    level
    for level in ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
    if level != cpp.build_info().get("isa_chosen")
]


def in_a_process(level: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    """Python at this level, with pytest's own plugins alone."""
    variables = {VARIABLE: level, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return python(*arguments, code=code, threads=1, **variables)


def test_the_highest_level_is_chosen():
    require_backend("cpp")
    info = cpp.build_info()
    assert set(info["isa_supported"]) <= set(info["isa_compiled"])
    assert "baseline" in info["isa_supported"]
    assert set(info["isa_compiled"]) <= set(cpp._LEVELS)  # those that are allowed without the extension
    if VARIABLE not in os.environ:
        assert info["isa_chosen"] == info["isa_supported"][-1]


@pytest.mark.parametrize(
    "level", [pytest.param(level, marks=[] if level == "avx2" else pytest.mark.long) for level in LEVELS]
)
def test_core_at_this_level(level):
    require_backend("cpp")
    if level not in cpp.build_info()["isa_supported"]:
        pytest.skip(f"this machine or this build has no {level}")
    files = [str(TESTS / f"test_{name}.py") for name in CORE]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:logging", "-k", "core and cpp"]
    done = in_a_process(level, "-c", PYTEST, *options, *files)
    assert done.stdout.splitlines()[0] == level
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels are x86-64's")
@pytest.mark.parametrize(
    "level",
    ["avx2", *(pytest.param(name, marks=pytest.mark.long) for name in ("avx512", "avx512_bf16", "amx"))],
)
def test_levels_share_nothing_with_the_linker(level, tmp_path):
    """A function that two levels define under one name would be that of the higher one in both.

    Without optimisation every function that is used and not forced into its caller is in the object.
    """
    cxx = shlex.split(os.environ.get("CXX") or "g++")
    for tool in (cxx[0], "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    source, target = TESTS.parent / "csrc" / "cpu" / "isa" / f"{level}.cpp", tmp_path / "level.o"
    subprocess.run([*cxx, "-std=c++20", "-O0", "-w", "-c", str(source), "-o", str(target)], check=True)
    command = ["nm", "--demangle", "--defined-only", "--extern-only", str(target)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split(maxsplit=2)[2] for line in listed.splitlines()} - {"DW.ref.__gxx_personality_v0"}
    tables = {f"pk::{operator}_{level}" for operator in ("mlp", "patch_embed", "pool_mixer", "rate")}
    assert names == (tables - {"pk::pool_mixer_amx"})


IMPORT = "from poolformer_kernels.backends import cpp; print(cpp.ISA)"


@pytest.mark.parametrize("level", ["", "Baseline", "BASELINE"])
def test_an_empty_variable_is_unset_and_case_does_not_count(level):
    require_backend("cpp")
    wanted = level.lower() or cpp.build_info()["isa_supported"][-1]
    assert in_a_process(level, "-c", IMPORT).stdout == f"{wanted}\n"


def test_a_level_that_this_processor_does_not_run():
    """No other level, and not the reference, runs in its place."""
    require_backend("cpp")
    info = cpp.build_info()
    missing = [level for level in info["isa_compiled"] if level not in info["isa_supported"]]
    if not missing:
        pytest.skip("this processor runs every level")
    done = in_a_process(missing[-1], "-c", IMPORT, code=1)
    assert done.stderr.splitlines()[-1] == (
        f"ValueError: {VARIABLE} is {missing[-1]!r}, which this processor does not run; allowed here: "
        + ", ".join(info["isa_supported"])
    )
