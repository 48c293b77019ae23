"""What a benchmark has measured, and its files: rows and failures are in them as soon as they are known.

Rows of the CSV, in this order::

    benchmark     pool_mixer | mlp | block | model | scaling | training
    direction     forward | backward | step
    model         for example poolformer_s12
    shape         CxHxW of what is fed
    stage         1 to 4; stem, down1 to down3, head; empty for a single block and a whole model
    dtype, layout, batch, provider
    median_s, p20_s, p80_s     seconds per call
    img_per_s     samples per second
    gb_per_s, tflop_per_s      of the operation's least bytes and FLOPs, the same for every provider
    fraction      max(bytes / copy rate, FLOPs / matrix rate) / time
    error_l2      of the logits against float64, relative (whole models)
    device, threads, torch, commit

The limits are rows of their own, with provider "copy" (its gb_per_s) and "matmul" (its tflop_per_s); they end
a case. Providers that are not timed have no row: beside ``model.csv`` they are in ``model.missing.txt``, a
line each with the reason. That file exists only where a provider is missing.
"""

import csv
import io
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

import poolformer_kernels as pk
from poolformer_kernels.cli.errors import CommandError, check_writable
from poolformer_kernels.cli.info import _cpu_name

from .commit import commit_of

__all__ = [
    "LIMITS",
    "Results",
    "Row",
    "UnavailableError",
    "commit",
    "csv_path",
    "device_folder",
    "device_name",
    "facts_of",
    "is_ours",
    "missing_path",
    "results_folder",
]

LIMITS = ("copy", "matmul")
_HERE = Path(__file__).resolve().parent
_SOURCE_TREE = (_HERE.parent / "pyproject.toml").is_file()  # an installed copy is inside the package


class UnavailableError(Exception):
    """Why a provider cannot run here."""


@dataclass(frozen=True)
class Row:
    """One measurement: see the module. None is an empty field."""

    benchmark: str
    direction: str
    model: str
    shape: str
    stage: str
    dtype: str
    layout: str
    batch: int
    provider: str
    median_s: float
    p20_s: float
    p80_s: float
    img_per_s: float | None
    gb_per_s: float | None
    tflop_per_s: float | None
    fraction: float | None
    error_l2: float | None


@dataclass
class Results:
    """What a benchmark has measured: rows by case, and by provider why it is not timed.

    A provider is unavailable (it cannot run here, or another's compiler failed), wrong (its result is) or
    failed (one of ours raised). With a ``path`` each case's rows are appended to that CSV file when they are
    added, in one write: whoever reads it sees whole cases.
    """

    path: Path | None = None
    facts: dict[str, str | int] = field(default_factory=dict)
    groups: list[list[Row]] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None:
            check_writable(str(self.path))
            missing_path(self.path).unlink(missing_ok=True)

    @property
    def missing(self) -> dict[str, str]:
        """Every provider that is not timed in one case at the least, and why."""
        return self.unavailable | self.wrong | self.failed

    def add(self, rows: list[Row]) -> None:
        """The rows of one case."""
        self.groups.append(rows)
        if self.path is None:
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [*(column.name for column in fields(rows[0])), *self.facts])
        first = len(self.groups) == 1
        if first:
            writer.writeheader()
        for row in rows:
            values = asdict(row) | self.facts
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
        with self.path.open("wb" if first else "ab", buffering=0) as file:
            file.write(text.getvalue().encode())

    def miss(self, provider: str, error: Exception, case: object) -> None:
        """A provider that raised. One of ours has failed unless it said that it cannot run here."""
        if isinstance(error, UnavailableError) or not is_ours(provider):
            self._note(self.unavailable, provider, _reason(error))
        else:
            self._note(self.failed, provider, f"failed: {_reason(error)}, {case}")

    def reject(self, provider: str, reason: str, case: object) -> None:
        """A provider whose result is wrong."""
        self._note(self.wrong, provider, f"wrong: {reason}, {case}")

    def _note(self, notes: dict[str, str], provider: str, reason: str) -> None:
        if notes.get(provider) == reason:
            return
        notes[provider] = reason
        if self.path is not None:
            with missing_path(self.path).open("a", encoding="utf-8") as file:
                file.write(f"{provider}: {reason}\n")

    def require_device(self, device: str, after: str) -> None:
        """Raise `CommandError` where a CUDA device no longer answers: all that follows would fail, too."""
        if device == "cuda" and (reason := device_error()):
            raise CommandError(f"after {after!r} the CUDA device is lost to this process: {reason}")


def device_error() -> str | None:
    """Why CUDA no longer works in this process, as after an illegal access, or None."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return _reason(error)
    return None


def is_ours(provider: str) -> bool:
    """Whether a failure of this provider is one of this package."""
    return provider.startswith(("ours", "accelerate")) and "compile" not in provider


def _reason(error: Exception) -> str:
    """One line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text if isinstance(error, UnavailableError) else f"{type(error).__name__}: {text}"[:200]


# ---- files -------------------------------------------------------------------------------------------------


def csv_path(name: str, device: str, file: str | None = None) -> Path:
    """``file``, by default ``results/<device>/<name>.csv``."""
    return Path(file) if file else results_folder() / device_folder(device) / f"{name}.csv"


def missing_path(path: Path) -> Path:
    """Where the providers are that have no rows in this CSV file."""
    return path.with_suffix(".missing.txt")


def results_folder() -> Path:
    return _HERE / "results" if _SOURCE_TREE else Path("results")


def device_folder(device: str) -> str:
    """The processor's name as that of a folder: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def device_name(device: str) -> str:
    """The processor's own name."""
    return torch.cuda.get_device_name() if device == "cuda" else _cpu_name()


def facts_of(device: str) -> dict[str, str | int]:
    """The last columns of every row."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The source tree's; an installed copy has a version."""
    return commit_of(_HERE) if _SOURCE_TREE else pk.__version__
