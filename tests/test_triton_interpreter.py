"""Runs tests/triton_interpreter in its own processes: the interpreter is chosen before kernels are imported.

Every test there passes, or the one here fails and shows the output.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import tiers

FOLDER = Path(__file__).parent / "triton_interpreter"


@pytest.mark.parametrize(("name", "cases"), tiers(FOLDER))
def test_in_the_interpreter(name, cases) -> None:
    if importlib.util.find_spec("triton") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("triton is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
    ]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's products are small; its threads would wait for each other
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
