"""Cases, rows and results of the benchmarks, and their CSV files, written row by row and read back.

Rows of the CSV, in this order::

    benchmark     pool_mixer | mlp | block | model | scaling | training | dense | host | host_pool_mixer |
                  host_mlp
    direction     forward | backward | step | both (forward and backward)
    model         for example poolformer_s12
    shape         CxHxW of what is fed
    stage         1 to 4; stem, down1 to down3, head; empty for a single block and a whole model
    dtype, layout, batch, provider
    median_s, p20_s, p80_s     seconds per call
    img_per_s     samples per second
    gb_per_s, tflop_per_s      of the operation's least bytes and FLOPs, the same for every provider
    fraction      max(bytes / copy rate, FLOPs / rate) / time; the rate is that of the next column, on CUDA
                  and without the extension that of the limit "matmul"
    error_l2      of the logits against float64, relative (whole models; of dense the worst of the maps)
    rate_tflops   at which the CPU multiplied beside these calls (`poolformer_kernels.profiling.states`)
    state         of the machine during all of these calls: fast, throttled, mixed; empty on CUDA and without
                  a probe. The rows of a case that compare have the same state
    device, threads, torch, commit

The limits are rows of their own, with provider "copy" (its gb_per_s) and "matmul" (its tflop_per_s); they end
a case in one state. Files from before they had the columns rate_tflops and state are read as if those were
empty. Providers that are not timed have no row: beside ``model.csv`` they are in ``model.missing.txt``, a
line each with the reason. That file exists only where a provider is missing.
"""

import csv
import io
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path

import torch

from poolformer_kernels.cli.errors import INTERRUPTED, CommandError
from poolformer_kernels.cli.files import check_writable, make_folder, write_whole

__all__ = [
    "LIMITS",
    "STATES",
    "Case",
    "Point",
    "RecordedRow",
    "Results",
    "Row",
    "UnavailableError",
    "is_ours",
    "read_results",
]

LIMITS = ("copy", "matmul")
STATES = ("", "fast", "throttled", "mixed")


class UnavailableError(Exception):
    """Why a provider cannot run here."""


@dataclass(frozen=True)
class Point:
    """A model and its input: what a case is made of."""

    model: str
    dtype: str
    batch: int
    size: int

    def __str__(self) -> str:
        return f"{self.model}, {self.dtype}, batch {self.batch}, {self.size} x {self.size}"


@dataclass(frozen=True)
class Case:
    """One operation on one input. ``least``: the bytes and the FLOPs that it takes at the least."""

    benchmark: str
    shape: tuple[int, ...]
    dtype: str
    batch: int
    least: tuple[int, int]
    direction: str = "forward"
    model: str = ""
    stage: str = ""
    layout: str = "channels_last"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        parts = (
            self.direction,
            self.model,
            self.stage,
            self.dtype,
            self.layout,
            f"batch {self.batch}",
            shape,
        )
        return f"{self.benchmark.replace('_', ' ')}: {', '.join(part for part in parts if part)}"


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
    rate_tflops: float | None = None
    state: str = ""


@dataclass
class Results:
    """What a benchmark has measured: rows by case, and by provider why it is not timed.

    A provider is unavailable (it cannot run here, or another's compiler failed), wrong (its result is) or
    failed (one of ours raised). With a ``path`` each case's rows are appended to that CSV file when they are
    added, in one write: whoever reads it sees whole cases. Used in a ``with`` statement, it says after Ctrl-C
    what is in the file.
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
            _missing_path(self.path).unlink(missing_ok=True)

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is KeyboardInterrupt and self.path is not None and self.groups:
            message = f"interrupted; what was measured before is in {self.path}"
            raise CommandError(message, INTERRUPTED) from None

    @property
    def missing(self) -> dict[str, str]:
        """The providers that were not timed in at least one case, and why."""
        return self.unavailable | self.wrong | self.failed

    def extend(self, groups: list[list[Row]]) -> None:
        """Add the rows of one case, a group for each state."""
        for rows in groups:
            self.add(rows)

    def add(self, rows: list[Row]) -> None:
        """Add the rows of one case in one state, and append them to the file."""
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
        if first:
            write_whole(self.path, text.getvalue())
        else:
            _append(self.path, text.getvalue().encode())

    def miss(self, provider: str, error: Exception, case: object) -> None:
        """Record a provider that raised. One of ours has failed, unless it said that it cannot run here."""
        if isinstance(error, UnavailableError) or not is_ours(provider):
            self._note(self.unavailable, provider, _reason(error))
        else:
            self._note(self.failed, provider, f"failed: {_reason(error)}, {case}")

    def reject(self, provider: str, reason: str, case: object) -> None:
        """Record a provider whose result is wrong."""
        self._note(self.wrong, provider, f"wrong: {reason}, {case}")

    def _note(self, notes: dict[str, str], provider: str, reason: str) -> None:
        if notes.get(provider) == reason:
            return
        notes[provider] = reason
        if self.path is not None:
            make_folder(self.path.parent)
            with _missing_path(self.path).open("a", encoding="utf-8") as file:
                file.write(f"{provider}: {reason}\n")

    def require_device(self, device: str, after: str) -> None:
        """Raise `CommandError` where a CUDA device no longer answers: all that follows would fail, too."""
        if device == "cuda" and (reason := device_error()):
            raise CommandError(f"after {after!r} the CUDA device is lost to this process: {reason}")


def _append(path: Path, data: bytes) -> None:
    """Appends all of the data or none of it."""
    try:
        with path.open("ab", buffering=0) as file:
            left = memoryview(data)
            end = file.tell() if file.seekable() else None  # a pipe keeps what it got
            try:
                while left:
                    left = left[file.write(left) :]
            except BaseException:  # a full disk, Ctrl-C
                if end is not None:
                    file.truncate(end)
                raise
    except OSError as error:
        raise CommandError(f"cannot write to {path}: {error.strerror or error}") from None


def _missing_path(path: Path) -> Path:
    """The file that names the providers without rows in this CSV file."""
    return path.with_suffix(".missing.txt")


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
    """What the error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text if isinstance(error, UnavailableError) else f"{type(error).__name__}: {text}"[:200]


# ---- read back ---------------------------------------------------------------------------------------------


_LATER_COLUMNS = {"rate_tflops", "state"}  # that files of earlier versions lack


@dataclass(frozen=True, kw_only=True)
class RecordedRow(Row):
    """A row of a CSV file: a measurement and where it was taken. A limit may have its rate alone."""

    device: str
    threads: str
    torch: str
    commit: str


def read_results(folder: Path) -> list[RecordedRow]:
    """Every row of the folder's CSV files, None for an absent number.

    Raises:
        CommandError: no rows, columns missing, a number that is none, or rows of several devices.
    """
    rows = []
    for path in sorted(folder.glob("*.csv")):
        if path.stat().st_size == 0:  # the benchmark was stopped before its first case
            continue
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            needed = {column.name for column in fields(RecordedRow)} - _LATER_COLUMNS
            if missing := sorted(needed - set(reader.fieldnames or ())):
                raise CommandError(f"{path}: missing columns: {', '.join(missing)}")
            for line in reader:
                where = f"{path}, line {reader.line_num}"
                rows.append(
                    RecordedRow(
                        **{column.name: _value(line, column, where) for column in fields(RecordedRow)}
                    )
                )
    if not rows:
        raise CommandError(f"--results {folder}: no CSV file with rows in it; `make bench` writes them")
    if len(devices := {row.device for row in rows}) > 1:
        found = ", ".join(sorted(devices))
        raise CommandError(f"--results {folder}: rows of several devices, {found}; one is allowed")
    return rows


def _value(line: dict[str, str], column: Field, where: str) -> str | int | float | None:
    text = line.get(column.name, "")
    if column.name == "state" and text not in STATES:
        allowed = ", ".join(state or "nothing" for state in STATES)
        raise CommandError(f"{where}: state is {text!r}; allowed: {allowed}")
    if column.type is str:
        return text
    if not text and (column.type == float | None or line["provider"] in LIMITS):
        return None
    try:
        return int(text) if column.type is int else float(text)
    except (TypeError, ValueError):
        raise CommandError(f"{where}: {column.name} is {text!r}, not a number") from None
