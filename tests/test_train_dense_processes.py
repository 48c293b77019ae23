"""Several processes train a dense task as one does; killed runs go on to the same weights."""

import json
import random
import resource
import shlex
from pathlib import Path

import pytest
import torch
from support import train as training
from support.commands import MODULE
from support.dense_data import require_dense_data
from support.processes import python
from support.train import assert_same_end, losses, rows, state
from support.train_dense import OPTIONS, STEPS, TASKS, data_of, make_discs

require_dense_data()

from safetensors.torch import load_file

from poolformer_kernels.train.processes import peak_memory

pytestmark = pytest.mark.long
BOTH = shlex.split("--optimizer sgd --lr 0.01 --clip-grad 5 --min-size 64 64 --drop-path 0")


def start(run, discs, task: str, *more: str, processes: int = 1) -> None:
    """A run in processes of its own, to its end."""
    data = data_of(discs, task)
    training.in_processes(run, *OPTIONS[task], *more, data=data, processes=processes, threads=1)


@pytest.mark.parametrize("task", ["detection", "instance"])
def test_two_processes_are_one(tmp_path, task) -> None:
    """With SGD, whose steps show a gradient's scale, on pictures of one size, so that paddings are the same.

    Two steps, of which the first is small: later, rounding decides which regions Mask R-CNN proposes.
    """
    discs, one, two = make_discs(tmp_path / "discs", images=2, validation=3), tmp_path / "1", tmp_path / "2"
    for run in (one, two):
        start(run, discs, task, *BOTH, "--save-every", "1", processes=int(run.name))
    assert len(losses(two)) == 2
    assert losses(two) == pytest.approx(losses(one), rel=0, abs=1e-5)
    expected, weights = state(one)[0], state(two)[0]
    assert weights.keys() == expected.keys()
    first = load_file(one / "checkpoints" / "step_00000001" / "state.safetensors")
    assert training.distance(weights, expected) < 1e-3 * training.distance(first, expected)
    for a, b in zip(rows(two), rows(one), strict=True):
        for name in a:
            if "AP" in name:
                assert float(a[name]) == pytest.approx(float(b[name]), abs=0.5), name


def test_two_processes_validate_as_one(discs, run) -> None:
    """Each has BatchNorm's statistics of its own images in training, but the first's in validation."""
    start(run, discs, "segmentation", processes=2)
    assert len(losses(run)) == STEPS["segmentation"]
    words = training.validate_words(run / "best.safetensors", data_of(discs, "segmentation"))
    one, two = (
        json.loads(python(*training.in_several(n, *MODULE, *words, "--json"), threads=1).stdout)
        for n in (1, 2)
    )
    for name in ("mIoU", "accuracy", "loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)
    best = max(float(row["ema_mIoU"]) for row in rows(run) if row["ema_mIoU"])
    assert one["mIoU"] == pytest.approx(best, abs=1e-6)


def test_micro_batches_of_detection_are_near_the_whole_batch(discs, tmp_path) -> None:
    """Not equal: each divides its sums by its own number of positive anchors."""
    start(tmp_path / "whole", discs, "detection", *BOTH)
    start(tmp_path / "parts", discs, "detection", *BOTH, "--accumulate", "2")
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert whole == pytest.approx(parts, rel=0.1)
    assert whole[0] != parts[0]


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_goes_on_to_the_same_end(discs, run, tmp_path, task) -> None:
    """`kill -9` after random steps, and at random moments of a step, a validation or a write."""
    more = ("--save-every", "2", "--workers", "1", "--precision", "float32")
    start(tmp_path / "whole", discs, task, *more)
    draw = random.Random(1)
    words = training.command(run, *OPTIONS[task], *more, data=data_of(discs, task))
    for least in (0, 2, 4):

        def happened(least: int = least) -> bool:
            return (run / "config.yaml").exists() and training.step_of(run) >= least

        training.killed(run, words, happened, threads=1, later=draw.random() * 0.5)
    start(run, discs, task, *more, "--resume")
    assert_same_end(run, tmp_path / "whole")


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
    python(*training.in_several(2, str(script)), threads=1)


def test_peak_memory_where_the_kernel_does_not_tell_it(monkeypatch) -> None:
    """The kernels of some sandboxes have no VmHWM in /proc/self/status."""
    own = peak_memory(torch.device("cpu"))
    monkeypatch.setattr(Path, "read_text", lambda *_: "Name: python\nVmRSS: 1 kB\n")
    other = peak_memory(torch.device("cpu"))
    assert other == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert other >= 0.9 * own
