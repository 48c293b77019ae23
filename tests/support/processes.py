"""Processes of their own: Python, and tests."""

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch

ROOT = Path(__file__).parents[2]


def python(
    *arguments: object,
    code: int | None = 0,
    cwd: Path | str | None = None,
    timeout: float | None = 600,
    threads: int | None = None,
    stdout: int | IO = subprocess.PIPE,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Python with these arguments and variables; it ends with this exit code, or with any if that is None."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(threads) | variables,
        cwd=cwd,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=timeout,
    )
    output = (done.stdout or "")[-8000:] + done.stderr[-4000:]
    assert code in (None, done.returncode), f"exit code {done.returncode}\n{output}"
    return done


def started(
    *arguments: object,
    cwd: Path | str | None = None,
    threads: int | None = None,
    stdout: int | None = None,
    stderr: int = subprocess.DEVNULL,
    **variables: str,
) -> subprocess.Popen[str]:
    """The same without waiting, in a session of its own, so that a signal reaches all its processes."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment(threads) | variables,
        cwd=cwd,
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def environment(threads: int | None = None) -> dict[str, str]:
    """Of a process that imports what this one can; pytest is no part of it.

    It has as many threads as this process, if not another number: others round differently.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return inherited | {
        "OMP_NUM_THREADS": str(threads or torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def run_pytest(*arguments: object, cwd: Path = ROOT, **variables: str) -> tuple[dict[str, int], list[str]]:
    """How many tests were ``passed``, ``skipped``, ... in a process of their own, and the lines it prints.

    None fails and at least one passes. pytest has its own plugins alone, and NumPy no threads: its products
    are small, and threads would wait for each other.
    """
    variables |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OPENBLAS_NUM_THREADS": "1"}
    options = ("-q", "--tb=short", "-p", "no:cacheprovider")
    done = python("-m", "pytest", *options, *arguments, cwd=cwd, timeout=None, threads=1, **variables)
    lines = done.stdout.strip().splitlines()
    summary = lines[-1].partition(" in ")[0]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (?!warning)([a-z]+)", summary)}
    assert counts.get("passed"), done.stdout[-2000:]
    return counts, lines


def tiers(folder: Path) -> list:
    """(file, the cases that ``-m`` selects) for what `make test` runs and for what `make test-long` adds."""
    files = sorted(path.name for path in folder.glob("test_*.py"))
    more = [name for name in files if re.search(r"pytest\.mark\.(sampled|long)", (folder / name).read_text())]
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
