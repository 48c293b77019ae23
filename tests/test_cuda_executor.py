"""Runs tests/cuda_executor in processes of their own: the CUDA C++ kernels' source, compiled for the host.

Every test there passes, or the one here fails and shows the output.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import executor_library, tiers

FOLDER = Path(__file__).parent / "cuda_executor"


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return executor_library(tmp_path_factory)


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
