"""Rows read back from the CSV files that `records` writes."""

import csv
from dataclasses import Field, dataclass, fields
from pathlib import Path

from poolformer_kernels.cli.errors import CommandError

from . import records
from .records import LIMITS

__all__ = ["Row", "read_results"]


@dataclass(frozen=True)
class Row(records.Row):
    """One measurement and where it was taken; a limit (copy, matmul) may have its rate alone."""

    device: str
    threads: str
    torch: str
    commit: str


def read_results(folder: Path) -> list[Row]:
    """Every row of the folder's CSV files, None for an absent number.

    Raises:
        CommandError: no rows, columns missing, a number that is none, or rows of several devices.
    """
    rows = []
    for path in sorted(folder.glob("*.csv")):
        if path.stat().st_size == 0:  # of a benchmark that was stopped before its first case
            continue
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = [column.name for column in fields(Row)]
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise CommandError(f"{path}: missing columns: {', '.join(missing)}")
            for line in reader:
                where = f"{path}, line {reader.line_num}"
                rows.append(Row(**{column.name: _value(line, column, where) for column in fields(Row)}))
    if not rows:
        raise CommandError(f"--results {folder}: no CSV file with rows in it; `make bench` writes them")
    if len(devices := {row.device for row in rows}) > 1:
        found = ", ".join(sorted(devices))
        raise CommandError(f"--results {folder}: rows of several devices, {found}; one is allowed")
    return rows


def _value(line: dict[str, str], column: Field, where: str) -> str | int | float | None:
    text = line[column.name]
    if column.type is str:
        return text
    if not text and (column.type == float | None or line["provider"] in LIMITS):
        return None
    try:
        return int(text) if column.type is int else float(text)
    except (TypeError, ValueError):
        raise CommandError(f"{where}: {column.name} is {text!r}, not a number") from None
