"""Runs of `poolformer-kernels train` in this process and in others, on images made here."""

import csv
import itertools
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from poolformer_kernels.cli.main import main
from poolformer_kernels.models.checkpoints import FILE_NOTES
from support.commands import MODULE, printed
from support.peers import require
from support.processes import python, started

ALL_DRAWS = shlex.split(
    "--mixup 0.8 --cutmix 1 --auto-augment rand-m9-mstd0.5-inc1 --random-erasing 0.25"
    " --hflip 0.5 --drop-path 0.3 --ema 0.9"
)
SMALL = shlex.split("--batch-size 128 --log-every 1 --workers 0")  # 11 steps an epoch
ONE = [*SMALL, *shlex.split("--epochs 1 --cooldown-epochs 0 --warmup-epochs 0")]
TWO = [*SMALL, *shlex.split("--epochs 2 --cooldown-epochs 0 --warmup-epochs 1")]
TIMES = ("images_per_second", "memory_mb", "val_images_per_second")  # columns that differ from run to run


def require_train() -> None:
    """The extras of training, or a skip where they are not installed."""
    for package in ("PIL", "matplotlib", "rich", "safetensors", "sklearn", "torchvision", "timm", "yaml"):
        require(package)


# ---- commands in this process ------------------------------------------------------------------------------


def train_words(run: Path, *options: str, data: str | Path = "sample:digits") -> list[str]:
    """What `poolformer-kernels` is called with to train."""
    return ["train", str(data), "--out", str(run), "--device", "cpu", *options]


def validate_words(weights: Path, data: str | Path = "sample:digits") -> list[str]:
    """What it is called with to score weights."""
    return ["validate", str(data), "--checkpoint", str(weights), "--device", "cpu"]


def train(run: Path, *options: str, data: str | Path = "sample:digits") -> int:
    """A run; its exit code."""
    return main(train_words(run, *options, data=data))


def scores_of(capsys: pytest.CaptureFixture, *words: str) -> dict:
    """What `validate --json` prints."""
    return json.loads(printed(capsys, *words, "--json"))


def message_of(error: type[Exception], call: Callable, *arguments: object, **options: object) -> str:
    """The one line of the error that a call ends with."""
    with pytest.raises(error) as found:
        call(*arguments, **options)
    assert "\n" not in str(found.value)
    return str(found.value)


# ---- commands in processes of their own --------------------------------------------------------------------


def in_several(processes: int, *words: str) -> list[str]:
    """What `python` is called with to run this in several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*(launcher if processes > 1 else []), *words]


def command(run: Path, *options: str, data: str | Path = "sample:digits", processes: int = 1) -> list[str]:
    """What `python` is called with for a run."""
    return in_several(processes, *MODULE, *train_words(run, *options, data=data))


def in_processes(run: Path, *options: str, threads: int | None = None, **more) -> None:
    """A run to its end."""
    python(*command(run, *options, **more), threads=threads)


def runs_until(process: subprocess.Popen, happened: Callable[[], bool]) -> bool:
    """Waits for something, or for the process's end; whether the process still runs."""
    end = time.monotonic() + 240
    while process.poll() is None and not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)
    return process.poll() is None


def killed(
    run: Path, words: list[str], happened: Callable[[], bool], threads: int | None = None, later: float = 0.0
) -> bool:
    """Starts a run, or resumes it, and kills it (`kill -9`) some seconds after something has happened.

    Whether it still ran then.
    """
    process = started(*words, *["--resume"] * (run / "config.yaml").exists(), threads=threads)
    running = True
    try:
        runs_until(process, happened)
        time.sleep(later)
        running = process.poll() is None
    finally:
        if running:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return running


def interrupt(patch: pytest.MonkeyPatch, owner: object, function: str, call: int) -> None:
    """SIGTERM to this process at the given call of a function, the first being 1."""
    real, calls = getattr(owner, function), itertools.count(1)

    def interrupted(*args, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    patch.setattr(owner, function, interrupted)


# ---- what a run leaves -------------------------------------------------------------------------------------


def rows(run: Path) -> list[dict[str, str]]:
    """Those of metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def values(run: Path) -> list[dict[str, str]]:
    """The same without times."""
    return [{name: cell for name, cell in row.items() if name not in TIMES} for row in rows(run)]


def losses(run: Path) -> list[float]:
    from poolformer_kernels.train.report import Metrics

    return [row["train_loss"] for row in Metrics.read(run)]


def step_of(run: Path) -> int:
    """The last step in metrics.csv, which may be just being written."""
    try:
        return int(rows(run)[-1]["step"])
    except (IndexError, OSError, ValueError):
        return 0


def notes_of(run: Path) -> dict:
    """What best.safetensors says of itself."""
    from safetensors import safe_open

    with safe_open(run / "best.safetensors", "pt") as file:
        return json.loads(file.metadata()["poolformer_kernels"])


def save_with_notes(path: Path, model: nn.Module, /, **notes: object) -> None:
    """Weights in a file that says these things of itself, as best.safetensors does."""
    metadata = {"format": "pt", FILE_NOTES: json.dumps(notes)}
    require("safetensors.torch").save_file(model.state_dict(), path, metadata=metadata)


def state(run: Path) -> tuple[dict, dict]:
    """(tensors, facts) of a run's newest checkpoint."""
    from poolformer_kernels.train.state import Checkpoints

    tensors, facts, damaged = Checkpoints(run / "checkpoints", 1).newest()
    assert not damaged
    return tensors, facts


def differing(a: dict, b: dict) -> list[str]:
    """The names of tensors that are not bitwise the same, or only in one."""
    same = {name for name in a.keys() & b.keys() if a[name].dtype == b[name].dtype and a[name].equal(b[name])}
    return sorted((a.keys() | b.keys()) - same)


def distance(found: dict, expected: dict, kind: str = "model/") -> float:
    """Between the weights of two states, or their moving averages: ``ema/``."""
    names = [n for n in expected if n.startswith(kind) and expected[n].is_floating_point()]
    return sum((found[n] - expected[n]).double().square().sum().item() for n in names) ** 0.5


def assert_same_end(run: Path, whole: Path) -> None:
    """Bitwise the same weights, moments, averages, metrics and best weights."""
    from safetensors.torch import load_file

    (found, facts), (expected, wanted) = state(run), state(whole)
    assert differing(found, expected) == []
    assert facts["scaler"] == wanted["scaler"]
    assert values(run) == values(whole)
    assert differing(*(load_file(folder / "best.safetensors") for folder in (run, whole))) == []
    assert notes_of(run) == notes_of(whole)


def make_folder(
    root: Path, classes: tuple[str, ...] = ("cat", "dog"), images: int = 6, side: int = 40
) -> Path:
    """train/ and val/ with JPEGs of noise whose mean tells the class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = rng.integers(0, 100, (side, side + i, 3)) + 100 * c
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return root
