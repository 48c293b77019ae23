"""Several processes: the same run as one, resumed by another number of them, or ended together."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.train import ALL_DRAWS, SMALL, command, environment, in_processes, losses, require_train, state

require_train()

pytestmark = pytest.mark.long
SOME = [*SMALL, *ALL_DRAWS, "--epochs", "2", "--cooldown-epochs", "0", "--warmup-epochs", "1"]  # 22 steps


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    in_processes(run, *SOME, threads=1)
    return run


def assert_same_run(run, one) -> None:
    """Losses and weights within what rounding does to 22 steps of AdamW."""
    pairs = list(zip(losses(run), losses(one), strict=True))
    assert len(pairs) == 22
    assert max(abs(a - b) for a, b in pairs) < 2e-3
    assert abs(pairs[0][0] - pairs[0][1]) < 1e-6
    found, expected = state(run)[0], state(one)[0]
    assert found.keys() == expected.keys()
    for kind in ("model/", "ema/"):
        names = [name for name in expected if name.startswith(kind)]
        error = sum((found[n] - expected[n]).square().sum().item() for n in names) ** 0.5
        size = sum(expected[n].square().sum().item() for n in names) ** 0.5
        assert error < 1e-2 * size, kind


def test_gradients_of_two_processes_are_those_of_one(tmp_path) -> None:
    """With SGD, whose steps show a gradient's scale."""
    more = [*SMALL, "--epochs", "1", "--warmup-epochs", "0", "--optimizer", "sgd", "--lr", "0.05"]
    more += ["--clip-grad", "5", "--precision", "float32"]
    in_processes(tmp_path / "one", *more, "--accumulate", "2", threads=1)
    for how in ([], ["--fsdp"]):
        run = tmp_path / f"two{len(how)}"
        in_processes(run, *more, *how, processes=2, threads=1)
        pairs = list(zip(losses(run), losses(tmp_path / "one"), strict=True))
        assert max(abs(a - b) for a, b in pairs) < 1e-4
        assert pairs[0][0] - pairs[-1][0] > 0.1


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_on_half_batches_are_one_on_the_whole(one, tmp_path, how) -> None:
    in_processes(tmp_path / "run", *SOME, *["--fsdp"] * (how == "fsdp"), processes=2, threads=1)
    assert_same_run(tmp_path / "run", one)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_in_the_same_order(one, tmp_path, before, after) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(run, *SOME, "--save-every", "7", processes=before),
        env=environment(1),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(run / "checkpoints" / "step_00000014")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    in_processes(run, *SOME, "--save-every", "7", "--resume", processes=after, threads=1)
    assert_same_run(run, one)


def test_a_process_that_dies_ends_the_run(tmp_path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(run, *SOME, "--epochs", "200", processes=2),
        env=environment(1),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(run / "checkpoints" / "step_00000011")
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    assert "SIGKILL" in err or "Signal 9" in err


def test_two_agents_that_meet_train_as_one(one, tmp_path) -> None:
    run, port = tmp_path / "run", free_port()
    arguments = command(run, *SOME)[3:]  # without python -m poolformer_kernels
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=run"]
    launcher += ["-m", "poolformer_kernels", *arguments]
    agents = [subprocess.Popen(launcher, env=environment(1), stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [agent.wait(240) for agent in agents] == [0, 0]
    assert_same_run(run, one)


def wait_for(path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.02)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
