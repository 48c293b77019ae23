"""Runs the operators' contract on the targets that need a process of their own.

Every case there passes, or the test here fails and shows the output; what a target does not run is printed at
the end of this run, too.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from contract.targets import TARGETS
from support.peers import require, require_backend
from support.processes import ROOT, executor_library, folder_of_run, once_for_all, run_pytest
from support.variants import build_emulated_tiles

from poolformer_kernels.backends import cpp

HERE = ROOT / "tests" / "contract"
OF_ANY_LEVEL = ("both_autograd", "both_checks")  # the same on every instruction-set level
GROUPS = {  # the files that one process runs
    "pool_mixer and both": ("pool_mixer", "both", *OF_ANY_LEVEL),
    "mlp": ("mlp", "mlp_numerics", "mlp_backward"),
    "random": ("properties",),  # on the interpreter and the executor; on cpp it runs in an ordinary process
}
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def run(target: str, group: str, tier: str, record_property, cwd: Path = ROOT, **variables: str) -> None:
    """The cases of ``tier`` of a group of the contract's files on one target."""
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:logging"]
    options += ["-W", "ignore::RuntimeWarning", "-m", tier]
    variables = {"POOLFORMER_TEST_TARGETS": target} | variables
    left_out = set(OF_ANY_LEVEL) if TARGETS[target].level else {"both_checks"} if "sm_80" in target else set()
    left_out |= {"pool_mixer"} - set(TARGETS[target].operators)
    files = [HERE / f"{name}.py" for name in GROUPS[group] if name not in left_out]
    counts, lines = run_pytest(*options, *files, cwd=cwd, **variables)
    assert counts.keys() <= {"passed", "deselected"}
    for line in lines:
        if line.startswith(("not run on ", "random problems on ")):
            record_property("shown", line)


def parts(names: Iterable[str], short: Callable[[str], bool]) -> list:
    """(target, group, tier) of what `make test` runs of a target, if ``short``, and `make test-long` adds."""
    found = []
    for name in names:
        for group in ("pool_mixer and both", "mlp"):
            if short(name):
                found.append(pytest.param(name, group, "not long"))
            tier = "long and not large" if short(name) else "not large"
            found.append(pytest.param(name, group, tier, marks=[pytest.mark.long]))
        if name in ("interpreter", "executor"):
            found.append(pytest.param(name, "random", "long", marks=[pytest.mark.long]))
    return found


CHOSEN = cpp.build_info().get("isa_chosen")  # an ordinary process has this level


@pytest.mark.parametrize(
    ("target", "group", "tier"),
    parts([f"cpp {level}" for level in LEVELS if level != CHOSEN], lambda name: name == "cpp avx2"),
)
def test_on_another_level(target, group, tier, record_property) -> None:
    """The instruction-set level is read once, at import."""
    require_backend("cpp")
    level = target.removeprefix("cpp ")
    if level not in cpp.build_info()["isa_supported"]:
        pytest.skip(f"this machine or this build has no {level}")
    run(target, group, tier, record_property, POOLFORMER_KERNELS_ISA=level)


@pytest.mark.long
@pytest.mark.parametrize("group", ["pool_mixer and both", "mlp"])
def test_on_emulated_tiles(group, record_property, tmp_path_factory) -> None:
    """The matrix unit's code on any processor that has bfloat16 products."""
    require_backend("cpp")
    if "avx512_bf16" not in cpp.build_info()["isa_supported"]:
        pytest.skip("this machine or this build has no avx512_bf16")
    folder = once_for_all(folder_of_run(tmp_path_factory) / "emulated_tiles", build_emulated_tiles)
    ours = {"POOLFORMER_KERNELS_ISA": "amx", "PYTHONPATH": str(folder)}
    run("cpp emulated", group, "not large", record_property, cwd=folder, **ours)


@pytest.mark.parametrize(("target", "group", "tier"), parts(["interpreter"], lambda name: True))
def test_in_tritons_interpreter(target, group, tier, record_property) -> None:
    """The interpreter is chosen before kernels are imported."""
    require("triton")
    run(target, group, tier, record_property, TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    ("target", "group", "tier"), parts(["executor", "executor sm_80"], lambda name: name == "executor")
)
def test_in_the_executor(target, group, tier, record_property) -> None:
    """The CUDA C++ kernels' source, compiled for the host."""
    library = executor_library()
    run(target, group, tier, record_property, POOLFORMER_KERNELS_TEST_EXECUTOR=str(library))
