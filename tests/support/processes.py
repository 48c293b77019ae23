"""Tests that run in processes of their own."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


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
