"""Runs tests/triton_interpreter in its own processes: the interpreter is chosen before kernels are imported.

Every test there passes, or the one here fails and shows the output.
"""

from pathlib import Path

import pytest
from support.peers import require
from support.processes import run_pytest, tiers

FOLDER = Path(__file__).parent / "triton_interpreter"


@pytest.mark.parametrize(("name", "cases"), tiers(FOLDER))
def test_in_the_interpreter(name, cases) -> None:
    require("triton")
    counts = run_pytest(
        *("-W", "ignore::RuntimeWarning", "-m", cases, str(FOLDER / name)),
        TRITON_INTERPRET="1",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        OPENBLAS_NUM_THREADS="1",  # NumPy's products are small; its threads would wait for each other
    )
    assert "skipped" not in counts
