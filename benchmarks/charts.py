"""What the plots share: a selection of rows, colours, and a titled figure."""

import textwrap
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial

from matplotlib.figure import Figure

from .rows import LIMITS, STATES, RecordedRow

__all__ = [
    "MissingRowsError",
    "empty_figure",
    "group_by",
    "long_name",
    "model_size",
    "select",
    "short_number",
    "state_label",
]

SEGMENTS = ("stem", "1", "down1", "2", "down2", "3", "down3", "4", "head")
COLOURS = {  # in the order of the bars
    "ours": "#e07b28",
    "ours graphed": "#b5560f",
    "ours cpp": "#e9985a",
    "ours triton": "#f2b98c",
    "ours triton graphed": "#d98c4a",
    "ours cuda": "#a33b20",
    "ours cuda graphed": "#7a2513",
    "accelerate": "#d3a52c",
    "compile": "#4a7fc1",
    "max-autotune": "#24446f",
    "reduce-overhead": "#86b3e0",
    "openvino": "#3a9464",
    "onnxruntime": "#8d5fa8",
    "eager": "#9aa5b5",
    "eager NCHW": "#c6ccd6",
}
INK, SOFT, GRID = "#1a1f29", "#5b6474", "#e1e5eb"
STYLE = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), SOFT)
STYLE |= {
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 7.5,
}
STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "text.color": INK, "font.size": 7.5}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
STYLE |= {"font.family": "DejaVu Sans", "svg.hashsalt": "poolformer_kernels"}  # the same on every machine


class MissingRowsError(LookupError):
    """The results hold too little for a plot; the message says which rows it needs."""


def select(rows: Iterable[RecordedRow], *benchmarks: str) -> list[RecordedRow]:
    """The forward rows of these benchmarks without the limits, one for each measurement, ours first.

    A case that was measured in several states of the machine is shown in one of them, so that its rows
    compare: where most of its providers were measured, then that of most cases, then the faster.
    """
    chosen, order = {}, list(COLOURS)
    wanted = [
        r for r in rows if r.benchmark in benchmarks and r.direction == "forward" and r.provider not in LIMITS
    ]
    favoured = {(_case(r), r.provider) for r in wanted if r.layout == "channels_last"}
    wanted = [r for r in wanted if r.layout == "channels_last" or (_case(r), r.provider) not in favoured]
    states = _shown_states(wanted)
    for r in wanted:
        if r.state == states[_case(r)]:
            chosen[_case(r), r.provider] = r
    if not chosen:
        raise MissingRowsError(f"no rows with benchmark {' or '.join(benchmarks)}, direction forward")
    order += sorted({r.provider for r in chosen.values()} - set(order))
    return sorted(chosen.values(), key=lambda r: order.index(r.provider))


def _case(r: RecordedRow) -> tuple:
    return r.benchmark, r.model, r.shape, r.stage, r.dtype, r.batch, r.threads


def _shown_states(rows: Iterable[RecordedRow]) -> dict[tuple, str]:
    """By case the state in which it is shown."""
    providers: dict[tuple, dict[str, set[str]]] = {}
    for r in rows:
        providers.setdefault(_case(r), {}).setdefault(r.state, set()).add(r.provider)
    cases = Counter(state for found in providers.values() for state in found)

    def rank(case: tuple, state: str) -> tuple:
        return len(providers[case][state]), cases[state], -STATES.index(state)

    return {case: max(found, key=partial(rank, case)) for case, found in providers.items()}


def group_by(
    rows: Iterable[RecordedRow], key: Callable[[RecordedRow], Hashable]
) -> dict[Hashable, list[RecordedRow]]:
    groups: dict[Hashable, list[RecordedRow]] = {}
    for r in sorted(rows, key=key):
        groups.setdefault(key(r), []).append(r)
    return groups


def model_size(model: str) -> tuple[bool, int, str]:
    """Sorts models; the second part is the number of blocks, which ends the name."""
    end = model.rpartition("_")[2]
    return end.startswith("m"), int("".join(c for c in end if c.isdigit()) or 0), model


def long_name(provider: str) -> str:
    return "torch.compile" if provider == "compile" else provider


def short_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def state_label(rows: Iterable[RecordedRow]) -> str:
    """The state of the machine and the rate at which it multiplied; empty where rows have no rate."""
    rows = list(rows)
    rates = sorted(r.rate_tflops for r in rows if r.rate_tflops)
    if not rates:
        return ""
    states = [state for state in STATES if state and any(r.state == state for r in rows)]
    low, high = short_number(rates[0]), short_number(rates[-1])
    rate = f"{low if low == high else f'{low} to {high}'} TFLOP/s"
    return ", ".join([*states, rate])


def empty_figure(
    rows: Sequence[RecordedRow], title: str, subtitle: str, height: float, top: float = 0.58
) -> Figure:
    """A figure 8 inches wide: ``top`` inches of titles, ``height`` for axes, the facts of the rows below."""
    names = ("device", "threads", "torch", "commit", "dtype")
    device, threads, torch, commit, dtype = (
        ", ".join(sorted({getattr(r, name) for r in rows})) for name in names
    )
    caption = f"{device} · threads: {threads} · torch {torch} · commit {commit} · {dtype}"
    state = state_label(rows)
    caption += f" · machine {state}" if state else ""
    caption = textwrap.fill(f"{caption} · forward pass, medians", 135)
    bottom = 0.34 + 0.14 * caption.count("\n")
    height += top + bottom
    figure = Figure((8, height), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(rect=(0.012, bottom / height, 0.976, 1 - (top + bottom) / height))
    figure.text(0.015, 1 - 0.1 / height, title, va="top", size=12, weight="bold")
    figure.text(0.015, 1 - 0.35 / height, subtitle, va="top", size=8, color=SOFT)
    figure.text(0.015, 0.09 / height, caption, va="bottom", size=6.5, color=SOFT, linespacing=1.4)
    return figure
