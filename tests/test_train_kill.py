"""`kill -9` at any moment, then --resume: bitwise the run that was never killed."""

import os
import random
import signal
import subprocess
import time

import pytest
from support.train import (
    ALL_DRAWS,
    SMALL,
    command,
    differing,
    environment,
    in_processes,
    losses,
    require_train,
    state,
)

require_train()

from safetensors import safe_open

pytestmark = pytest.mark.long
SOME = [
    *SMALL,
    *ALL_DRAWS,
    "--epochs",
    "3",
    "--cooldown-epochs",
    "0",
    "--warmup-epochs",
    "1",
    "--save-every",
    "4",
]
SOME += ["--accumulate", "2", "--workers", "1"]  # 33 steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never killed, and its options."""
    run = tmp_path_factory.mktemp("whole") / "run"
    options = [*SOME, "--precision", "bfloat16"]
    in_processes(run, *options)
    return run, options


def best(run) -> tuple[dict, dict]:
    """(tensors as bytes, notes) of best.safetensors, whose header has them in any order."""
    with safe_open(run / "best.safetensors", "pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}, file.metadata()  # noqa: SIM118


def killed(run, options, when) -> bool:
    """Starts or resumes a run and kills it as soon as ``when(run)``; whether it was still running."""
    resume = ["--resume"] * (run / "config.yaml").exists()
    process = subprocess.Popen(
        command(run, *options, *resume), env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and not when(run):
        time.sleep(0.0005)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return running


def step_of(run) -> int:
    try:
        lines = (run / "metrics.csv").read_text().splitlines()
        return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0
    except (OSError, ValueError):
        return 0


def writes_checkpoint(run) -> bool:
    """Whether a checkpoint is half written."""
    return any(path.name.endswith(".part") for path in (run / "checkpoints").glob(".step_*"))


def test_killed_at_random_steps_and_while_a_checkpoint_is_written(whole, tmp_path) -> None:
    expected, options = whole
    run, draw = tmp_path / "run", random.Random(0)
    assert killed(run, options, lambda run: (run / "config.yaml").exists())  # before the first checkpoint
    assert killed(run, options, lambda run: step_of(run) >= draw.randrange(3, 6))
    for _ in range(4):  # a write may just have ended
        assert killed(run, options, lambda run: step_of(run) >= 9 and writes_checkpoint(run))
        if writes_checkpoint(run):
            break
    assert writes_checkpoint(run)  # half of it is there
    assert killed(run, options, lambda run: step_of(run) >= draw.randrange(20, 30))
    in_processes(run, *options, "--resume")
    assert differing(state(run)[0], state(expected)[0]) == []
    assert state(run)[1]["scaler"] == state(expected)[1]["scaler"]
    assert losses(run) == losses(expected)
    assert best(run) == best(expected)
