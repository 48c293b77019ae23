"""Rows of a run's metrics, and what is seen in pictures of them."""

import io
from pathlib import Path

import numpy as np

from poolformer_kernels.train.metrics import COLUMNS, Metrics


def train_row(step: int, loss: float = 2.0, **more: float) -> dict:
    row = {"step": step, "epoch": step / 10, "lr": 1e-3, "train_loss": loss, "images_per_second": 100.0}
    return row | {"memory_mb": 512.5, "skipped_steps": 0, "bad_images": 0} | more


def epoch_row(step: int, loss: float, top1: float, **more: float) -> dict:
    row = {"step": step, "epoch": step / 10, "val_loss": loss, "val_top1": top1, "val_top5": top1 + 9}
    return row | {"val_images_per_second": 300.0} | more


def full(rows: list[dict]) -> list[dict]:
    """The rows as they are read: with every column."""
    return [dict.fromkeys(COLUMNS) | row for row in rows]


def write(run: Path, rows: list[dict]) -> None:
    metrics = Metrics(run)
    for row in rows:
        metrics.append(row)


def pixels(png: bytes | Path) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(png) if isinstance(png, bytes) else png) as image:
        return np.asarray(image.convert("RGB"))


def has(image: np.ndarray, colour: str) -> bool:
    return bool((image == list(bytes.fromhex(colour.removeprefix("#")))).all(-1).any())
