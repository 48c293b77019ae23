"""Runs tests/cuda_executor in processes of their own: the CUDA C++ kernels' source, compiled for the host.

Every test there passes, or the one here fails and shows the output.
"""

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiers

FOLDER = Path(__file__).parent / "cuda_executor"


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """The kernels and the executor, built once for all workers."""
    from cuda_executor.build import build

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    target = folder / "cuda_executor.so"
    with open(folder / "cuda_executor.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return target if target.exists() else build(target)


@pytest.mark.parametrize(("name", "cases"), tiers(FOLDER))
def test_in_the_executor(name, cases, library) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
    env = os.environ | {"POOLFORMER_KERNELS_TEST_EXECUTOR": str(library)}
    env.pop("PYTEST_ADDOPTS", None)
    inner = subprocess.run(
        [*command, "-m", cases, str(FOLDER / name)],
        env=env,
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
    )
    summary = inner.stdout.strip().splitlines()[-1:] or [""]
    assert inner.returncode == 0, inner.stdout[-8000:] + inner.stderr[-2000:]
    assert re.fullmatch(r"\d+ passed(, \d+ deselected)?(, \d+ warnings?)? in .*", summary[0].strip("= ")), (
        inner.stdout[-2000:]
    )
