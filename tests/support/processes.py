"""Processes of their own: Python, and tests."""

import fcntl
import hashlib
import os
import re
import shutil
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

    None fails; at least one of each file that is given passes. pytest has its own plugins alone, and NumPy no
    threads: its products are small, and threads would wait for each other.
    """
    variables |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OPENBLAS_NUM_THREADS": "1"}
    options = ("-q", "--tb=short", "-rp", "-p", "no:cacheprovider")
    done = python("-m", "pytest", *options, *arguments, cwd=cwd, timeout=None, threads=1, **variables)
    lines = done.stdout.strip().splitlines()
    summary = lines[-1].partition(" in ")[0]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (?!warning)([a-z]+)", summary)}
    assert counts.get("passed"), done.stdout[-2000:]
    passed = {Path(name).name for name in re.findall(r"^PASSED (\S+?)::", done.stdout, re.MULTILINE)}
    without = {name for name in map(str, arguments) if re.fullmatch(r"[^-].*\.py", name)}
    without = {name for name in without if Path(name).name not in passed}
    assert not without, f"no test passed of {sorted(without)}"
    return counts, lines


def tiers(folder: Path) -> list:
    """(files, the cases that ``-m`` selects) for what `make test` runs and for what `make test-long` adds."""
    files = sorted(folder.glob("test_*.py"))
    more = [path for path in files if re.search(r"pytest\.mark\.(sampled|long)", path.read_text())]
    return [
        pytest.param(files, "not long", id="not long"),
        *[pytest.param(more, "long", marks=pytest.mark.long, id="long")] * bool(more),
    ]


def folder_of_run(factory: pytest.TempPathFactory) -> Path:
    """The folder of this run's temporary files, the same for all workers."""
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def once_for_all(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, which the first of all processes that needs it fills with ``make``: whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            work = folder.with_suffix(".building")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            make(work)
            work.rename(folder)
    return folder


def executor_library() -> Path:
    """The CUDA C++ kernels and their executor: build/cuda_executor/<digest>/."""
    from cuda_executor.build import build

    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(f"{compiler} {torch.__version__}".encode())
    for folder in (ROOT / "csrc", ROOT / "tests" / "cuda_executor"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp") or path.name == "build.py":
                digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size} ".encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda_executor" / digest.hexdigest()[:16]
    return once_for_all(folder, lambda work: build(work / "cuda_executor.so")) / "cuda_executor.so"
