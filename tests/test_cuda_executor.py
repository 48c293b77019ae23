"""Runs tests/cuda_executor in processes of their own: the CUDA C++ kernels' source, compiled for the host.

Every test there passes, or the one here fails and shows the output.
"""

from pathlib import Path

import pytest
from contract.executor import VARIABLE
from support.processes import executor_library, run_pytest, tiers

FOLDER = Path(__file__).parent / "cuda_executor"


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return executor_library(tmp_path_factory)


@pytest.mark.parametrize(("name", "cases"), tiers(FOLDER))
def test_in_the_executor(name, cases, library) -> None:
    counts, _ = run_pytest("-m", cases, FOLDER / name, **{VARIABLE: str(library)})
    assert "skipped" not in counts
