"""Several processes train a dense task as one does; killed runs go on to the same weights."""

import json
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from support.dense_data import require_dense_data
from support.train import command, differing, environment, in_processes, losses, state
from support.train_dense import OPTIONS, STEPS, TASKS, data_of, make_discs, rows, values

require_dense_data()

from safetensors.torch import load_file

from poolformer_kernels.train.processes import peak_memory

pytestmark = pytest.mark.long
BOTH = [
    *("--optimizer", "sgd", "--lr", "0.01", "--clip-grad", "5", "--min-size", "64", "64"),
    "--drop-path",
    "0",
]


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    return make_discs(tmp_path_factory.mktemp("discs"))


def start(run, discs, task: str, *more: str, processes: int = 1) -> None:
    """A run in processes of its own, to its end."""
    data = data_of(discs, task)
    in_processes(run, *OPTIONS[task], *more, data=data, processes=processes, threads=1)


def norms(found: dict, expected: dict, kind: str) -> tuple[float, float]:
    """(of the difference, of what is expected)."""
    names = [n for n in expected if n.startswith(kind) and expected[n].is_floating_point()]
    error = sum((found[n] - expected[n]).double().square().sum().item() for n in names) ** 0.5
    return error, sum(expected[n].double().square().sum().item() for n in names) ** 0.5


@pytest.mark.parametrize("task", ["detection", "instance"])
def test_two_processes_are_one(tmp_path, task) -> None:
    """With SGD, whose steps show a gradient's scale, on pictures of one size, so that paddings are the same.

    Two steps, of which the first is small: later, rounding decides which regions Mask R-CNN proposes.
    """
    discs, found = make_discs(tmp_path / "discs", images=2, validation=3), []
    for processes in (1, 2):
        run = tmp_path / f"of_{processes}"
        start(run, discs, task, *BOTH, "--save-every", "1", processes=processes)
        found.append(run)
    pairs = list(zip(losses(found[0]), losses(found[1]), strict=True))
    assert len(pairs) == 2
    assert max(abs(a - b) for a, b in pairs) < 1e-5
    (expected, _), (weights, _) = state(found[0]), state(found[1])
    assert weights.keys() == expected.keys()
    first = load_file(found[0] / "checkpoints" / "step_00000001" / "state.safetensors")
    error, _ = norms(weights, expected, "model/")
    moved, _ = norms(first, expected, "model/")
    assert error < 1e-3 * moved
    for a, b in zip(rows(found[1]), rows(found[0]), strict=True):
        for name in a:
            if "AP" in name:
                assert float(a[name]) == pytest.approx(float(b[name]), abs=0.5), name


def test_two_processes_validate_as_one(discs, tmp_path) -> None:
    """Each has BatchNorm's statistics of its own images in training, but the first's in validation."""
    run = tmp_path / "run"
    start(run, discs, "segmentation", processes=2)
    assert len(losses(run)) == STEPS["segmentation"]
    best = str(run / "best.safetensors")
    found = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        words = ["-m", "poolformer_kernels", "validate", data_of(discs, "segmentation"), "--checkpoint", best]
        python = command(run)[0]
        done = subprocess.run(
            [python, *launcher, *words, "--device", "cpu", "--json"],
            env=environment(1),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout))
    one, two = found
    for name in ("mIoU", "accuracy", "loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)
    row = next(row for row in rows(run) if float(row["ema_mIoU"] or -1) == max_of(run))
    assert one["mIoU"] == pytest.approx(float(row["ema_mIoU"]), abs=1e-6)


def max_of(run) -> float:
    return max(float(row["ema_mIoU"]) for row in rows(run) if row["ema_mIoU"])


def test_micro_batches_of_detection_are_near_the_whole_batch(discs, tmp_path) -> None:
    """Not equal: each divides its sums by its own number of positive anchors."""
    start(tmp_path / "whole", discs, "detection", *BOTH)
    start(tmp_path / "parts", discs, "detection", *BOTH, "--accumulate", "2")
    pairs = list(zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True))
    assert all(a == pytest.approx(b, rel=0.1) for a, b in pairs)
    assert pairs[0][0] != pairs[0][1]


def step_of(run) -> int:
    try:
        lines = (run / "metrics.csv").read_text().splitlines()
        return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0
    except (OSError, ValueError):
        return 0


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_goes_on_to_the_same_end(discs, tmp_path, task) -> None:
    """`kill -9` after random steps, and at random moments of a step, a validation or a write."""
    more = ("--save-every", "2", "--workers", "1", "--precision", "float32")
    start(tmp_path / "whole", discs, task, *more)
    run, draw = tmp_path / "run", random.Random(1)
    for least in (0, 2, 4):
        resume = ["--resume"] * (run / "config.yaml").exists()
        words = command(run, *OPTIONS[task], *more, *resume, data=data_of(discs, task))
        process = subprocess.Popen(
            words, env=environment(1), stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and not ((run / "config.yaml").exists() and step_of(run) >= least):
            time.sleep(0.002)
        time.sleep(draw.random() * 0.5)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    start(run, discs, task, *more, "--resume")
    assert differing(state(run)[0], state(tmp_path / "whole")[0]) == []
    assert values(run) == values(tmp_path / "whole")


def test_normalisers_are_means_over_the_processes(tmp_path) -> None:
    """A process's loss divided by the mean, and averaged, is the sum of all divided by the sum of counts."""
    script = tmp_path / "means.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from poolformer_kernels.dense.matching import mean_over_processes\n"
        "dist.init_process_group('gloo')\n"
        "count = torch.tensor([3, 8][dist.get_rank()])\n"
        "assert mean_over_processes(count).item() == 5.5, mean_over_processes(count)\n"
        "assert count.item() == [3, 8][dist.get_rank()]\n"
        "floating = torch.tensor([3.0, 8.0][dist.get_rank()])\n"
        "assert mean_over_processes(floating).item() == 5.5\n"
        "assert floating.item() == [3.0, 8.0][dist.get_rank()], 'the count itself was changed'\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    words = [command(tmp_path)[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*words, str(script)], env=environment(1), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_peak_memory_where_the_kernel_does_not_tell_it(monkeypatch) -> None:
    """The kernels of some sandboxes have no VmHWM in /proc/self/status."""
    own = peak_memory(torch.device("cpu"))
    status = "".join(f"{line}\n" for line in ("Name: python", "VmRSS: 1 kB"))
    monkeypatch.setattr(Path, "read_text", lambda *_: status)
    other = peak_memory(torch.device("cpu"))
    assert other == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert other >= 0.9 * own
