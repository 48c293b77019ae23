"""Several processes train as one, go on as another number of them, or end together; killed runs go on."""

import os
import random
import signal
import socket
import subprocess
import time

import pytest
from support import train as training
from support.commands import MODULE
from support.processes import started
from support.train import ALL_DRAWS, ONE, TWO, assert_same_end, in_processes, killed, losses, state

training.require_train()

pytestmark = pytest.mark.long
SOME = [*TWO, *ALL_DRAWS]  # 22 steps


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    in_processes(run, *SOME, threads=1)
    return run


def assert_same_run(run, one) -> None:
    """Losses and weights within what rounding does to 22 steps of AdamW."""
    assert len(losses(run)) == 22
    assert losses(run) == pytest.approx(losses(one), rel=0, abs=2e-3)
    assert losses(run)[0] == pytest.approx(losses(one)[0], rel=0, abs=1e-6)
    found, expected = state(run)[0], state(one)[0]
    assert found.keys() == expected.keys()
    for kind in ("model/", "ema/"):
        size = sum(t.square().sum().item() for name, t in expected.items() if name.startswith(kind)) ** 0.5
        assert training.distance(found, expected, kind) < 1e-2 * size, kind


def test_gradients_of_two_processes_are_those_of_one(tmp_path) -> None:
    """With SGD, whose steps show a gradient's scale."""
    more = [*ONE, "--optimizer", "sgd", "--lr", "0.05", "--clip-grad", "5", "--precision", "float32"]
    in_processes(tmp_path / "one", *more, "--accumulate", "2", threads=1)
    for how in ([], ["--fsdp"]):
        run = tmp_path / f"two{len(how)}"
        in_processes(run, *more, *how, processes=2, threads=1)
        assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=0, abs=1e-4)
        assert losses(run)[0] - losses(run)[-1] > 0.1


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_on_half_batches_are_one_on_the_whole(one, run, how) -> None:
    in_processes(run, *SOME, *["--fsdp"] * (how == "fsdp"), processes=2, threads=1)
    assert_same_run(run, one)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_in_the_same_order(one, run, before, after) -> None:
    more = [*SOME, "--save-every", "7"]
    saved = (run / "checkpoints" / "step_00000014").exists
    assert killed(run, training.command(run, *more, processes=before), saved, threads=1)
    in_processes(run, *more, "--resume", processes=after, threads=1)
    assert_same_run(run, one)


def test_a_process_that_dies_ends_the_run(run) -> None:
    words = training.command(run, *SOME, "--epochs", "200", processes=2)
    process = started(*words, threads=1, stderr=subprocess.PIPE)
    assert training.runs_until(process, (run / "checkpoints" / "step_00000011").exists)
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    assert "SIGKILL" in err or "Signal 9" in err


def test_two_agents_that_meet_train_as_one(one, run) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=run"]
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    words = [*launcher, *MODULE, *training.train_words(run, *SOME)]
    agents = [started(*words, threads=1) for _ in range(2)]
    assert [agent.wait(240) for agent in agents] == [0, 0]
    assert_same_run(run, one)


# ---- kill -9 -----------------------------------------------------------------------------------------------


def writes_checkpoint(run) -> bool:
    """Whether a checkpoint is half written."""
    return any(path.name.endswith(".part") for path in (run / "checkpoints").glob(".step_*"))


def test_killed_at_random_steps_and_while_a_checkpoint_is_written(run, tmp_path) -> None:
    """In the end it is bitwise the run that was never killed."""
    whole, draw = tmp_path / "whole", random.Random(0)
    more = [*SOME, "--epochs", "3", "--save-every", "4", "--accumulate", "2"]  # 33 steps
    more += ["--workers", "1", "--precision", "bfloat16"]
    in_processes(whole, *more)
    words = training.command(run, *more)
    assert killed(run, words, (run / "config.yaml").exists)  # before the first checkpoint
    early, late = draw.randrange(3, 6), draw.randrange(20, 30)
    assert killed(run, words, lambda: training.step_of(run) >= early)
    for _ in range(4):  # a write may just have ended
        assert killed(run, words, lambda: training.step_of(run) >= 9 and writes_checkpoint(run))
        if writes_checkpoint(run):
            break
    assert writes_checkpoint(run)  # half of it is there
    assert killed(run, words, lambda: training.step_of(run) >= late)
    in_processes(run, *more, "--resume")
    assert_same_end(run, whole)
