"""metrics.csv of a run: what is logged, read back exactly, whole after every kill."""

import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["COLUMNS", "Metrics", "Row", "columns_of", "replace"]

_BOXES = ("val_AP", "val_AP50", "val_AP75")
_MASKS = ("val_mask_AP", "val_mask_AP50", "val_mask_AP75")
_SHARED = (
    "step",  # optimiser steps done so far
    "epoch",  # step / steps per epoch
    "lr",
    "train_loss",  # mean since the row before
    "images_per_second",  # of all processes
    "memory_mb",  # peak of a process so far
    "skipped_steps",  # by the gradient scaler, so far
    "bad_images",  # unreadable: replaced in training so far, and left out of the last validation
)
_OF_TASK = {  # at a validation only; scores in per cent
    "classification": ("val_loss", "val_top1", "val_top5", "val_images_per_second", "ema_top1"),
    "detection": (*_BOXES, "val_images_per_second", "ema_AP"),
    "instance": (*_BOXES, *_MASKS, "val_images_per_second", "ema_mask_AP"),
    "segmentation": ("val_loss", "val_mIoU", "val_accuracy", "val_images_per_second", "ema_mIoU"),
}
COLUMNS = (*_SHARED, *_OF_TASK["classification"])
_COUNTS = {"step", "skipped_steps", "bad_images"}  # whole numbers; the others are floats

Row = Mapping[str, float | None]


def columns_of(task: str) -> tuple[str, ...]:
    """The columns of a task's metrics.csv."""
    return (*_SHARED, *_OF_TASK[task])


class Metrics:
    """A run's ``metrics.csv``: a row per logging interval and per validation, in the columns of its task.

    Opening it makes the file where there is none. A last line without its end, which a kill in the middle
    of writing can leave, is removed.

    Args:
        run: the run's folder; it exists.
        columns: from `columns_of`.

    Raises:
        ValueError: the file has other columns.

    Example::

        metrics = Metrics(run)
        metrics.truncate(checkpoint_step)  # on resume
        metrics.append({"step": 50, "epoch": 0.5, "lr": 1e-3, "train_loss": 2.3})
        rows = Metrics.read(run)
    """

    def __init__(self, run: Path, columns: tuple[str, ...] = COLUMNS):
        self.path, self.columns = Path(run) / "metrics.csv", columns
        lines, rest = _whole_lines(self.path, columns) if self.path.exists() else ([], "")
        if not lines or rest:
            replace(self.path, _text(columns, lines))

    def append(self, row: Row) -> None:
        """Write one row; it is in the file when this returns.

        Args:
            row: by column; what is missing or None stays empty. "step" and "epoch" are required.

        Raises:
            ValueError: an unknown column, or a required one is missing.
            TypeError: a value is no number, or a count is no whole number.
        """
        if unknown := [name for name in row if name not in self.columns]:
            raise ValueError(f"row: unknown column {unknown[0]!r}; the columns are {', '.join(self.columns)}")
        if missing := [name for name in ("step", "epoch") if row.get(name) is None]:
            raise ValueError(f"row: {missing[0]!r} is missing, every row needs step and epoch")
        line = ",".join(_cell(name, row.get(name)) for name in self.columns)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def truncate(self, step: int) -> None:
        """Drop the rows after ``step`` optimiser steps, which a run resumed from there writes again."""
        lines, rest = _whole_lines(self.path, self.columns)
        rows = [_parse(self.path, self.columns, n, line) for n, line in enumerate(lines)]
        kept = [line for line, row in zip(lines, rows, strict=True) if row["step"] <= step]
        if rest or len(kept) < len(lines):
            replace(self.path, _text(self.columns, kept))

    @staticmethod
    def read(run: Path) -> list[dict[str, float | None]]:
        """The rows of a run, numbers as they were written, None for an empty cell.

        A last line without its end is no row yet.

        Raises:
            FileNotFoundError: the run has no metrics.csv.
            ValueError: the file has other columns, or a line is not of numbers.
        """
        path = Path(run) / "metrics.csv"
        columns = _columns_in(path)
        return [_parse(path, columns, n, line) for n, line in enumerate(_whole_lines(path, columns)[0])]


def _columns_in(path: Path) -> tuple[str, ...]:
    """Those of the task whose header the file has; else those of classification, which will not fit."""
    with path.open(encoding="utf-8") as file:
        header = file.readline().removesuffix("\n")
    return next((columns_of(task) for task in _OF_TASK if header == ",".join(columns_of(task))), COLUMNS)


def _whole_lines(path: Path, columns: tuple[str, ...]) -> tuple[list[str], str]:
    """The lines after the header, and what is left after the last line's end."""
    header, *lines = path.read_text(encoding="utf-8").split("\n")
    expected = ",".join(columns)
    if header != expected if lines else not expected.startswith(header):
        raise ValueError(f"{path}: the columns are {header}, but this version writes {expected}")
    return (lines[:-1], lines[-1]) if lines else ([], header)


def _text(columns: tuple[str, ...], lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in (",".join(columns), *lines)).encode()


def _cell(name: str, value: object) -> str:
    """The value as text that reads back exactly."""
    if value is None:
        return ""
    kind, allowed = (numbers.Integral, "whole") if name in _COUNTS else (numbers.Real, "real")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"row: {name!r} must be a {allowed} number or None, got {value!r}")
    return repr(int(value)) if name in _COUNTS else repr(float(value))


def _parse(path: Path, columns: tuple[str, ...], n: int, line: str) -> dict[str, float | None]:
    """The row of the ``n``-th line after the header."""
    try:
        cells = zip(columns, line.split(","), strict=True)
        row = {name: (int if name in _COUNTS else float)(cell) if cell else None for name, cell in cells}
    except ValueError:
        raise ValueError(f"{path}, line {n + 2}: not a row of {len(columns)} numbers: {line!r}") from None
    if row["step"] is None or row["epoch"] is None:
        raise ValueError(f"{path}, line {n + 2}: no step or epoch: {line!r}")
    return row


def replace(path: Path, content: bytes) -> None:
    """Write a file anew, so that at every moment the old or the new one is there."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
