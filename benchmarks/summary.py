"""What a benchmark prints: one line per case, times and how many times ours they are."""

import os
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from .rows import LIMITS, Row

__all__ = ["print_summary"]

_WIDTH = 160  # of the tables, where stdout is no terminal
_FIELDS = ("direction", "model", "stage", "shape", "dtype", "layout", "batch", "state")
# (used where the fastest call takes less than so many seconds, name, how many make a second)
_UNITS = ((1e-3, "us", 1e6), (float("inf"), "ms", 1e3))

Groups = list[list[Row]]


def print_summary(groups: Groups, title: str, machine: str, missing: dict[str, str]) -> None:
    """Print the cases, a list of rows each, and the providers that are missing.

    A field that is the same in every case stands above the table. A case in two states of the machine is two
    lines: ratios are of calls in one state. A narrow terminal gets ratios alone, without the limits.
    """
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH
    console = Console(width=width, highlight=False)
    if groups:
        varying, common = _fields(groups)
        fastest = min(row.median_s for group in groups for row in group if row.provider not in LIMITS)
        unit, factor = next((unit, factor) for most, unit, factor in _UNITS if fastest < most)
        table, what = _times(groups, varying, factor, ratios_only=False), "times ours in bold"
        if console.measure(table, options=console.options.update(width=10**6)).maximum > console.width:
            table, what = _times(groups, varying, factor, ratios_only=True), "others as times ours"
        console.print(f"\n[bold]{title}[/]: {', '.join(common)}")
        console.print(f"{machine}\nmedians of interleaved rounds in {unit}, {what}\n")
        console.print(table)
        if any(_noisy(row) for group in groups for row in group):
            console.print("~ : the machine was busy (20th and 80th percentile differ twofold), measure again")
        if any(_base(group).state == "mixed" for group in groups):
            console.print("mixed: too few calls of each provider in one state of the machine, measure again")
        if any(row.error_l2 is not None for group in groups for row in group):
            console.print("\n[bold]Relative L2 error of the logits against float64[/]\n")
            console.print(_errors(groups, varying))
    for provider, reason in missing.items():
        console.print(f"{provider}: {reason}", markup=False)


def _times(groups: Groups, varying: list[str], factor: float, *, ratios_only: bool) -> Table:
    providers = _providers(groups)
    table = _table(varying, providers)
    rated = any(row.rate_tflops for group in groups for row in group)
    headings = ["copy\nGB/s", "matmul\nTFLOP/s", *["rate\nTFLOP/s"] * rated, "ours of\nthe limit"]
    for heading in headings[2 * ratios_only :]:
        table.add_column(heading, justify="right", no_wrap=True)
    for group in groups:
        rows, base = {row.provider: row for row in group}, _base(group)
        cells = [_cell(rows.get(p), base, factor, ratios_only) for p in providers]
        copied, product = rows["copy"].gb_per_s, rows["matmul"].tflop_per_s
        unsure = "~" if any(map(_noisy, (rows["copy"], rows["matmul"], base))) else ""
        rate = [f"{base.rate_tflops:.3g}" if base.rate_tflops else "-"] * rated
        limits = [f"{copied:,.0f}", f"{product:.3g}", *rate, f"{unsure}{base.fraction:.0%}"]
        table.add_row(*_labels(base, varying), *cells, *limits[2 * ratios_only :])
    return table


def _errors(groups: Groups, varying: list[str]) -> Table:
    providers = _providers(groups)
    table = _table(varying, providers)
    for group in groups:
        errors = {row.provider: f"{row.error_l2:.1e}" for row in group if row.error_l2 is not None}
        table.add_row(*_labels(_base(group), varying), *(errors.get(p, "-") for p in providers))
    return table


def _table(fields: list[str], providers: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for field in fields:
        table.add_column(field, no_wrap=True, justify="right" if field == "batch" else "left")
    for provider in providers:
        table.add_column(provider, justify="right", overflow="fold")
    return table


def _fields(groups: Groups) -> tuple[list[str], list[str]]:
    """(the fields that differ between cases, what the others are)"""
    cases = [{field: getattr(_base(group), field) for field in _FIELDS} for group in groups]
    varying = [field for field in _FIELDS if len({case[field] for case in cases}) > 1]
    common = {k: v for k, v in cases[0].items() if k not in varying and v}
    named = {"batch": "batch {}", "state": "machine {}"}
    return varying, [named.get(k, "{}").format(v) for k, v in common.items()]


def _labels(row: Row, fields: list[str]) -> list[str]:
    empty = {"stage": "one block", "state": "-"}
    return [str(getattr(row, field)) or empty[field] for field in fields]


def _providers(groups: Groups) -> list[str]:
    """Ours first."""
    names = dict.fromkeys(row.provider for group in groups for row in group if row.provider not in LIMITS)
    return sorted(names, key=lambda name: not name.startswith("ours"))


def _base(group: list[Row]) -> Row:
    """What the others are compared with: ours, or the first where ours was not measured."""
    return next((row for row in group if row.provider == "ours"), group[0])


def _cell(row: Row | None, base: Row, factor: float, ratios_only: bool) -> str:
    if row is None:
        return "-"
    time = _digits(row.median_s * factor)
    if row is base:
        return time
    ratio = f"[bold]{'~' if _noisy(row) or _noisy(base) else ''}{row.median_s / base.median_s:.2f}×[/]"
    return ratio if ratios_only else f"{time} {ratio}"


def _noisy(row: Row) -> bool:
    return row.p80_s > 2 * row.p20_s


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else 2}f}"
