"""Tests that run in processes of their own."""

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_python(*words: str, cwd: Path | str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """A Python of its own, with these variables besides this one's."""
    env = os.environ | environment
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)


def run_pytest(*arguments: str, **environment: str) -> dict[str, int]:
    """How many tests were ``passed``, ``skipped``, ``deselected`` in a process of their own; none fails."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, env=inherited | environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped|deselected)", summary)}
    assert counts.get("passed"), done.stdout[-2000:]
    return counts


def tiers(folder: Path) -> list:
    """(file, the cases that ``-m`` selects) for what `make test` runs and for what `make test-long` adds."""
    files = sorted(path.name for path in folder.glob("test_*.py"))
    more = [name for name in files if "pytest.mark.sampled" in (folder / name).read_text()]
    return [
        *((name, "not long") for name in files),
        *(pytest.param(name, "long", marks=pytest.mark.long) for name in more),
    ]


def once_for_all(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name`` in which ``make`` was called, by the first of all workers that needs it."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / name / "made"
        if not done.exists():
            (folder / name).mkdir(exist_ok=True)
            make(folder / name)
            done.touch()
    return folder / name


def executor_library(factory: pytest.TempPathFactory) -> Path:
    """The CUDA C++ kernels and their executor."""
    from cuda_executor.build import build

    folder = once_for_all(factory, "cuda_executor", lambda folder: build(folder / "cuda_executor.so"))
    return folder / "cuda_executor.so"


def python(
    *arguments: str, cwd: Path | None = None, timeout: float | None = 600, **variables: str
) -> subprocess.CompletedProcess:
    """Python with these arguments, in a process that imports what this one can; pytest is no part of it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | path | variables,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
