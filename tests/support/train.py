"""Runs of `poolformer-kernels train` in this process and in others, on images made here."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from support.peers import require

ALL_DRAWS = [
    *(
        "--mixup",
        "0.8",
        "--cutmix",
        "1",
        "--auto-augment",
        "rand-m9-mstd0.5-inc1",
        "--random-erasing",
        "0.25",
    ),
    *("--hflip", "0.5", "--drop-path", "0.3", "--ema", "0.9"),
]
SMALL = ["--batch-size", "128", "--log-every", "1", "--workers", "0"]  # 11 steps an epoch


def require_train() -> None:
    """The extras of training, or a skip where they are not installed."""
    for package in ("PIL", "matplotlib", "rich", "safetensors", "sklearn", "torchvision", "timm", "yaml"):
        require(package)


def train(run: Path, *options: str, data: str = "sample:digits") -> int:
    """`poolformer-kernels train` in this process; its exit code."""
    from poolformer_kernels.cli.main import main

    return main(["train", data, "--out", str(run), "--device", "cpu", *options])


def command(run: Path, *options: str, data: str = "sample:digits", processes: int = 1) -> list[str]:
    """The command of a run in processes of its own."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*launcher, "poolformer_kernels", "train", data, "--out", str(run), "--device", "cpu", *options]


def environment(threads: int | None = None) -> dict[str, str]:
    """With as many threads as this process: PyTorch's convolutions round differently with others."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads or torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def in_processes(run: Path, *options: str, processes: int = 1, threads: int | None = None, **more) -> None:
    """The same, to its end, which must be a good one."""
    done = subprocess.run(
        command(run, *options, processes=processes, **more),
        env=environment(threads),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


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


def losses(run: Path) -> list[float]:
    from poolformer_kernels.train.report import Metrics

    return [row["train_loss"] for row in Metrics.read(run)]


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
