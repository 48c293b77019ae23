"""What `bench host` prints: launches and ratios of the host's times, beside what must hold and the goal."""

import os
import sys
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .rows import Results, Row

__all__ = ["HostRow", "print_tables"]

# (benchmark, model, direction): {figure: (what must hold at the most, what is wanted)}
TARGETS = {
    ("host", "poolformer_s12", "forward"): {"ratio": (0.25, 0.17), "launches": (62, None)},
    ("host", "poolformer_s12", "step"): {"ratio": (0.8, 0.6), "launches": (280, 250)},
    ("host_pool_mixer", "", "forward"): {"ratio": (6, None)},
}
_DIRECTIONS = {"forward": "inference", "step": "training step", "both": "forward + backward"}


@dataclass(frozen=True)
class HostRow(Row):
    """A row with what only the host's benchmark has; its times are CPU seconds of a call."""

    ratio: float | None = None
    launches: int | None = None
    kernels: int | None = None


def print_tables(results: Results, capability: str | None, rounds: int) -> None:
    """A table for each model, and one for the operators. ``capability``: of the null GPU, if it is that."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    console = Console(width=width, highlight=False)
    device = torch.cuda.get_device_name()
    if capability is None:
        where = f"with {device}; launches are kernels, those of libraries included"
    else:
        where = (
            f"on the null GPU ({device}, capability {capability}), which computes nothing: no value is "
            "compared, a library's call is one launch"
        )
    console.print(f"\n[bold]Host time and launches[/], {where}", soft_wrap=True)
    console.print(
        f"CPU time of this process, medians of {rounds} interleaved rounds: only ratios mean something",
        soft_wrap=True,
    )
    sections: dict[str, list[list[Row]]] = {}
    for group in results.groups:
        sections.setdefault(group[0].model, []).append(group)
    for model in sorted(sections, key=lambda name: not name):
        console.print(f"\n[bold]{model or 'Operators'}[/], bfloat16, channels_last")
        console.print(_table(sections[model]))
    console.print("! : more than must hold")
    for provider, reason in results.missing.items():
        console.print(f"{provider}: {reason}", markup=False)


def _table(groups: list[list[HostRow]]) -> Table:
    providers = list(dict.fromkeys(row.provider for group in groups for row in group))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("figure", no_wrap=True)
    for name in ("must", "goal", *providers):
        table.add_column(name, justify="right")
    for group in groups:
        rows = {row.provider: row for row in group}
        targets = TARGETS.get((group[0].benchmark, group[0].model, group[0].direction), {})
        for figure in ("ratio", "launches"):
            must, goal = targets.get(figure, (None, None))
            cells = [_cell(rows.get(name), figure, must) for name in providers]
            limits = ["" if value is None else f"{value:g}" for value in (must, goal)]
            table.add_row(_name(group[0], figure), *limits, *cells)
    return table


def _name(row: HostRow, figure: str) -> str:
    base = "timm eager" if row.model else "torch.add_"
    what = f"host time / {base}" if figure == "ratio" else "launches"
    operator = row.benchmark.removeprefix("host").removeprefix("_")
    parts = [f"{operator} {row.shape.split('x')[0]} channels" if operator else "", _DIRECTIONS[row.direction]]
    return f"{', '.join(part for part in parts if part)}, batch {row.batch}: {what}"


def _cell(row: HostRow | None, figure: str, must: float | None) -> str:
    value = row and getattr(row, figure)
    if value is None:
        return "-"
    noisy = figure == "ratio" and row.p80_s > 2 * row.p20_s
    above = row.provider.startswith("ours") and must is not None and value > must
    return f"{'~' if noisy else ''}{value:.{0 if figure == 'launches' else 2}f}{'!' if above else ''}"
