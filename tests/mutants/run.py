"""Whether the operators' tests find mistakes in the kernels: `make mutants`.

    PYTHONPATH=tests python -m mutants.run [--jobs N] [--target NAME ...] [-k TEXT] [--limit S] [--keep DIR]

Each mutant is one mistake (cpp.py, cuda.py, triton.py). For each of them the contract's tests of its operator
run until the first one fails: those of `make test`, in the executor all. A mutant may take three times as
long as the tests take without one; then it is caught, too, as one that comes to no end. The exit code is 1 if
all pass for some mutant, or if one fails without any.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from support.variants import environment

from . import builds, cpp, cuda, triton
from .builds import UNMUTATED, Numbered
from .mutant import ROOT

MUTANTS = (*cpp.MUTANTS, *cuda.MUTANTS, *triton.MUTANTS)
LIMIT_S = 120.0  # of the tests for one mutant, at least


@dataclass(frozen=True)
class Selection:
    """The tests of an operator for a target."""

    files: tuple[str, ...]  # below tests
    expression: str = ""  # pytest's -k
    marks: str = "not long"  # and -m


_OF_BOTH = ("both", "both_autograd")
_FILES = {"pool_mixer": ("pool_mixer", *_OF_BOTH), "mlp": ("mlp", "mlp_numerics", "mlp_backward", *_OF_BOTH)}
_SLOW = "not (opcheck or each_value_and_slope)"
SELECTIONS = {
    (target, operator): Selection(
        tuple(f"contract/{name}.py" for name in files),
        f"{operator} and {_SLOW}",
        "not large" if target == "cuda" else "not long",  # the executor runs all in a minute
    )
    for target in ("cpp", "amx", "cuda", "triton")
    for operator, files in _FILES.items()
    if (target, operator) != ("amx", "pool_mixer")
}
CONTRACTS = {"cpp": f"cpp {builds.LEVEL}", "amx": "cpp emulated", "cuda": "executor", "triton": "interpreter"}


@dataclass(frozen=True)
class Variants:
    """Where the built packages are, and how the tests of each target are started with one of them."""

    folder: Path

    def build(self, mutants: list[Numbered], jobs: int) -> None:
        """All that these mutants need, one after another: the compilers run in parallel."""
        by_target = {
            target: [each for each in mutants if each[1].target == target] for target, _ in SELECTIONS
        }
        if by_target["cpp"] or by_target["amx"]:
            builds.build_cpp(self.folder / "cpp", by_target["cpp"] + by_target["amx"], jobs)
        if by_target["cuda"]:
            builds.build_cuda(self.folder / "cuda", by_target["cuda"], jobs)
        if by_target["triton"]:
            builds.build_triton(self.folder / "triton", by_target["triton"])

    def package(self, target: str, number: int) -> Path:
        """The folder with the package for a mutant."""
        if target == "triton":
            return builds.triton_of(self.folder / "triton", number)
        return self.folder / ("cuda" if target == "cuda" else "cpp")

    def environment(self, target: str, number: int) -> dict[str, str]:
        """The environment of its tests."""
        package = self.package(target, number)
        own = {
            "cpp": {"POOLFORMER_KERNELS_ISA": builds.LEVEL},
            "amx": {"POOLFORMER_KERNELS_ISA": "amx"},
            "cuda": {"POOLFORMER_KERNELS_TEST_EXECUTOR": str(builds.executor_of(package))},
            "triton": {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"},
        }[target]
        unbuffered = {"PYTHONUNBUFFERED": "1"}  # a process that crashes has then said in which test
        own["POOLFORMER_TEST_TARGETS"] = CONTRACTS[target]
        return environment(package, POOLFORMER_TEST_MUTANT=str(number), **own, **unbuffered)


@dataclass(frozen=True)
class Outcome:
    found: bool  # a test failed
    ran: bool  # pytest ran tests at all
    detail: str  # the first test that failed
    seconds: float


def run_tests(
    variants: Variants, target: str, operator: str, number: int, only: str, limit: float
) -> Outcome:
    """Runs a selection until the first failure."""
    selection = SELECTIONS[target, operator]
    expression = " and ".join(f"({each})" for each in (selection.expression, only) if each)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["-x", "-v", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore", "-m", selection.marks]
    command += ["-k", expression] if expression else []
    command += [str(ROOT / "tests" / file) for file in selection.files]
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=variants.package(target, number),
        env=variants.environment(target, number),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        code = None
    seconds = time.monotonic() - begin
    started = re.findall(
        r"^\S*tests/\S*?([^/\s]+::.+?)(?: (?:PASSED|FAILED|ERROR|SKIPPED).*)?$", output, re.MULTILINE
    )
    last = started[-1].strip() if started else ""
    if code == 0:
        summary = output.strip().splitlines()[-1].strip("= ")
        return Outcome(False, True, summary, seconds)
    if code is None:
        return Outcome(True, bool(last), f"{last} (no end after {limit:.0f} s)", seconds)
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?([^/\s]+::.+?)(?: - .*)?$", output, re.MULTILINE)
    if code == 1 and failed:
        return Outcome(True, True, failed[0], seconds)
    if last and not re.search(r"^=+ .* in [\d.]+s", output, re.MULTILINE):  # pytest came to no end
        return Outcome(True, True, f"{last} (the process ended with {code})", seconds)
    return Outcome(False, False, output[-3000:], seconds)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whether the operators' tests find mistakes in the kernels.")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    targets = sorted({target for target, _ in SELECTIONS})
    parser.add_argument("--target", nargs="+", choices=targets, default=targets, help="those alone")
    parser.add_argument("-k", dest="text", default="", help="mutants that have this in their name or file")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds for a mutant ({LIMIT_S:.0f})")
    parser.add_argument("--keep", type=Path, help="a new folder for the variants, which are kept there")
    return parser.parse_args(given)


def chosen(options: argparse.Namespace) -> list[Numbered]:
    """The mutants that are to run, with their numbers; says which targets this machine lacks."""
    mutants = [
        (number, mutant)
        for number, mutant in enumerate(MUTANTS, 1)
        if mutant.target in options.target and options.text in f"{mutant.name} {mutant.file}"
    ]
    for target in options.target:
        if (reason := builds.lacking(target)) is not None:
            print(f"not run: the mutants of {target}; {reason}", flush=True)
            mutants = [each for each in mutants if each[1].target != target]
    return mutants


def run(options: argparse.Namespace, folder: Path) -> int:
    begin = time.monotonic()
    mutants = chosen(options)
    variants = Variants(folder)
    variants.build(mutants, options.jobs)
    print(f"built in {time.monotonic() - begin:.0f} s", flush=True)

    limits = {}

    def unmutated(which: tuple[str, str]) -> bool:
        outcome = run_tests(variants, *which, UNMUTATED, "", 5 * options.limit)
        good = outcome.ran and not outcome.found
        limits[which] = max(options.limit, 3 * outcome.seconds)
        word = "passes" if good else "FAILS"
        print(
            f"{word:8} {outcome.seconds:6.1f} s  {which[0]}: {which[1]} unmutated: {outcome.detail}",
            flush=True,
        )
        return good

    def mutated(each: Numbered) -> bool:
        number, mutant = each
        which = mutant.target, mutant.operator
        outcome = run_tests(variants, *which, number, mutant.only, limits[which])
        word = "caught" if outcome.found else "SURVIVED"
        if not outcome.ran:
            word = "NO TEST RAN"
        what = f"{mutant.target}: {mutant.operator}: {mutant.name}"
        print(f"{word:8} {outcome.seconds:6.1f} s  {what}: {outcome.detail}", flush=True)
        return outcome.found and outcome.ran

    with ThreadPoolExecutor(options.jobs) as pool:
        selections = sorted({(mutant.target, mutant.operator) for _, mutant in mutants})
        if not all(list(pool.map(unmutated, selections))):
            print("the tests fail without a mutant")
            return 1
        caught = list(pool.map(mutated, mutants))
    seconds = time.monotonic() - begin
    print(f"{sum(caught)} of {len(caught)} mutants were caught, in {seconds:.0f} s with {options.jobs} jobs")
    return 0 if caught and all(caught) else 1


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    os.environ.pop("POOLFORMER_TEST_MUTANT", None)
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        return run(options, options.keep.resolve())
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        return run(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
