"""Runs tests/cuda_executor in processes of their own: the CUDA C++ kernels' source, compiled for the host.

Every test there passes, or the one here fails and shows the output.
"""

from pathlib import Path

import pytest
from contract.executor import VARIABLE
from support.processes import executor_library, run_pytest, tiers

FOLDER = Path(__file__).parent / "cuda_executor"


@pytest.mark.parametrize(("files", "cases"), tiers(FOLDER))
def test_in_the_executor(files, cases) -> None:
    counts, _ = run_pytest("-m", cases, *files, **{VARIABLE: str(executor_library())})
    assert "skipped" not in counts
