"""Runs tests/triton_interpreter in its own processes: the interpreter is chosen before kernels are imported.

Every test there passes, or the one here fails and shows the output.
"""

from pathlib import Path

import pytest
from support.peers import require
from support.processes import run_pytest, tiers

FOLDER = Path(__file__).parent / "triton_interpreter"


@pytest.mark.parametrize(("files", "cases"), tiers(FOLDER))
def test_in_the_interpreter(files, cases) -> None:
    require("triton")
    options = ("-W", "ignore::RuntimeWarning", "-m", cases)
    counts, _ = run_pytest(*options, *files, TRITON_INTERPRET="1")
    assert "skipped" not in counts
