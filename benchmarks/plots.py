"""What do the benchmarks say? Plots from their CSV files, as PNG and SVG.

    python -m benchmarks.plots [--results DIR] [--out DIR] [--relative] [--dtype bfloat16]

`throughput` compares providers on whole models, `stages` shows where a model's time goes, `roofline` places
every kernel below the limits measured beside it, `scaling` fits the cost of larger inputs and models.
``--relative`` draws ratios only: absolute times of one CPU say little of another. Of a measurement that the
results hold twice the last row counts, and channels_last before NCHW; of one in two states of the machine the
rows of one state. Only `throughput` shows several numbers of threads, the others the largest.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from poolformer_kernels.cli.errors import CommandError, report_errors
from poolformer_kernels.cli.files import check_writable, make_folder

from .charts import (
    COLOURS,
    INK,
    SEGMENTS,
    SOFT,
    STYLE,
    MissingRowsError,
    empty_figure,
    group_by,
    long_name,
    model_size,
    select,
    short_number,
    state_label,
)
from .facts import results_folder
from .plot_roofline import roofline
from .rows import RecordedRow, read_results

__all__ = [
    "MissingRowsError",
    "fit_power",
    "roofline",
    "scaling",
    "stages",
    "throughput",
]


def fit_power(n: Sequence[float], time: Sequence[float]) -> tuple[float, float]:
    """(a, k) of time = a * n^k, by least squares of the logarithms; ValueError for fewer than two n."""
    k, log_a = statistics.linear_regression([math.log(x) for x in n], [math.log(t) for t in time])
    return math.exp(log_a), k


def _reference(groups: Iterable[Iterable[RecordedRow]]) -> str:
    """What every group can be divided by: compile, else eager."""
    shared = set.intersection(*({r.provider for r in group} for group in groups))
    for provider in ("compile", "eager"):
        if provider in shared:
            return provider
    raise MissingRowsError("no rows with provider compile, nor eager, for every model, batch and dtype")


def _bold(provider: str) -> dict[str, str]:
    return {"weight": "bold", "color": COLOURS["ours graphed"]} if provider.startswith("ours") else {}


def _name_bars(ax: Axes, names: dict[float, str]) -> None:
    """Providers as names beside horizontal bars, the first on top."""
    ax.set_yticks(list(names), list(names.values()))
    for label in ax.get_yticklabels():
        label.set(**{"color": INK} | _bold(label.get_text()))
    ax.set_ylim(max(names) + 0.7, -0.7)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)


@matplotlib.rc_context(STYLE)
def throughput(rows: Sequence[RecordedRow], relative: bool = False) -> Figure:
    """Images per second of models and providers, or times as fast as the reference, by dtype and batch."""
    rows = select(rows, "model")
    groups = group_by(rows, lambda r: (r.dtype, r.batch, r.shape, r.threads, model_size(r.model)))
    reference = _reference(groups.values()) if relative else ""
    panels = list(group_by(groups, lambda key: key[:4]).items())
    several = len({r.threads for r in rows}) > 1
    columns = min(2, len(panels))
    lines = [sum(len(groups[key]) + 1.6 for key in keys) for _, keys in panels]
    lines = [max(lines[i : i + columns]) for i in range(0, len(lines), columns)]
    unit = f"times as fast as {long_name(reference)}" if relative else "images per second"
    subtitle = "longer is better; whiskers: 20th to 80th percentile of the time"
    figure = empty_figure(rows, f"Whole models, {unit}", subtitle, sum(0.135 * n + 0.55 for n in lines))
    axes = list(figure.subplots(len(lines), columns, squeeze=False, height_ratios=lines).flat)
    for ax, ((dtype, batch, shape, threads), keys) in zip(axes, panels, strict=False):
        names, y, right = {}, 0.0, 0.0
        for key in keys:
            state = state_label(groups[key])
            ax.text(0, y, f" {key[4][2]}" + (f" ({state})" if state else ""), va="center", weight="bold")
            scale = {r.provider: r.median_s for r in groups[key]}[reference] if relative else batch
            for r in groups[key]:
                y += 1
                names[y] = r.provider
                value, ends = scale / r.median_s, (scale / r.p80_s, scale / r.p20_s)
                ax.barh(y, value, 0.84, color=COLOURS.get(r.provider, SOFT))
                ax.plot(ends, (y, y), color=INK, lw=0.8, solid_capstyle="butt")
                text = f" {value:.2f}" if relative else f" {short_number(value)}"
                ax.text(max(value, ends[1]), y, text, va="center", size=7, **_bold(r.provider))
                right = max(right, value, ends[1])
            y += 1.6
        _name_bars(ax, names)
        ax.set(
            xlim=(0, 1.13 * right),
            xlabel=unit,
            title=f"{dtype}, batch {batch}, {shape[2:]}{f', threads: {threads}' * several}",
        )
        ax.locator_params(axis="x", nbins=6)
        ax.xaxis.set_major_formatter("{x:,g}")
        if relative:
            ax.axvline(1, color=COLOURS["eager NCHW"], lw=1, zorder=0.9)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return figure


@matplotlib.rc_context(STYLE)
def stages(rows: Sequence[RecordedRow], relative: bool = False) -> Figure:
    """Time from stem to head, stacked per provider, or as shares of the reference's total."""
    rows = [r for r in select(rows, "block") if r.stage in SEGMENTS]
    panels = group_by(rows, lambda r: (model_size(r.model), r.batch))
    for key, group in list(panels.items()):
        seen = {p: {r.stage for r in group if r.provider == p} for p in {r.provider for r in group}}
        panels[key] = [r for r in group if len(seen[r.provider]) == len(SEGMENTS)]
        for provider in sorted(p for p in seen if len(seen[p]) < len(SEGMENTS)):
            missing = ", ".join(s for s in SEGMENTS if s not in seen[provider])
            note = f"{provider} left out of {key[0][2]}, batch {key[1]}: no rows with stage {missing}"
            print(f"plots: stages: {note}", file=sys.stderr)
    panels = {key: group for key, group in panels.items() if group}
    if not panels:
        raise MissingRowsError(f"no provider with benchmark block and every stage of {', '.join(SEGMENTS)}")
    reference = _reference(panels.values()) if relative else ""
    bars = [len(group) / len(SEGMENTS) + 1.6 for group in panels.values()]
    unit = f"share of {long_name(reference)}'s total" if relative else "milliseconds"
    subtitle = "shorter is better; dark: stages, light: stem, downsamples and head"
    figure = empty_figure(rows, f"Time from stem to head, {unit}", subtitle, 0.36 * sum(bars) + 0.1)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=bars)[:, 0]
    labels = []
    for ax, ((model, batch), group) in zip(axes, panels.items(), strict=True):
        scale = 1 / sum(r.median_s for r in group if r.provider == reference) if relative else 1e3
        providers = list(dict.fromkeys(r.provider for r in group))
        for y, provider in enumerate(providers):
            left, colour = 0.0, to_rgb(COLOURS.get(provider, SOFT))
            times = {r.stage: scale * r.median_s for r in group if r.provider == provider}
            for segment in SEGMENTS:
                stage, width = segment.isdigit(), times[segment]
                tint = colour if stage else tuple(0.4 * c + 0.6 for c in colour)
                bar = ax.barh(y, width, 0.8, left, color=tint, edgecolor="white", lw=0.8)[0]
                value = f"{width:.2f}" if relative else short_number(width)
                texts = [f"stage {segment}\n{value}"] if stage else []
                texts += [f"{segment}\n{value}", segment, ""]
                labels.append((ax, bar, texts, INK if sum(tint) > 1.8 else "white"))
                left += width
            text = f" {left:.2f}" if relative else f" {short_number(left)} ms"
            ax.text(left, y, text, va="center", **_bold(provider))
        _name_bars(ax, dict(enumerate(providers)))
        right = max(bar.get_x() + bar.get_width() for bar in ax.patches)
        ax.set(xlim=(0, 1.09 * right), title=f"{model[2]}, batch {batch}")
    axes[-1].set_xlabel(unit)
    figure.draw_without_rendering()  # settles the layout: now it shows which names fit into their bars
    for ax, bar, texts, colour in labels:
        style = {"ha": "center", "va": "center", "size": 6.5, "color": colour, "linespacing": 1.1}
        label = ax.text(*bar.get_center(), "", **style)
        for text in texts:
            label.set_text(text)
            if label.get_window_extent().width < bar.get_window_extent().width - 2:
                break
    return figure


@matplotlib.rc_context(STYLE)
def scaling(rows: Sequence[RecordedRow], relative: bool = False) -> Figure:
    """Time against batch (at 224 x 224), pixels (at batch 1) and depth, with the fitted time = a * n^k.

    Relative times are divided by ours at the smallest n.
    """
    rows = [r for r in select(rows, "scaling") if r.provider in ("ours", "compile", "openvino")]
    base = min((r.model for r in rows), key=model_size, default="")
    at_224 = [r for r in rows if r.shape.endswith("x224x224")]
    batch = max((r.batch for r in at_224 if r.model != base), default=0)
    deeper = [r for r in at_224 if r.batch == batch and model_size(r.model)[0] == model_size(base)[0]]
    of_base = [r for r in at_224 if r.model == base]
    sizes = [r for r in rows if r.model == base and r.batch == 1]
    panels = {
        "batch": (f"{base}, 224²", {(r.provider, r.batch): r.median_s for r in of_base}),
        "image side (n: pixels)": (f"{base}, batch 1", {(r.provider, _pixels(r)): r.median_s for r in sizes}),
        "blocks": (
            f"224², batch {batch}",
            {(r.provider, model_size(r.model)[1]): r.median_s for r in deeper},
        ),
    }
    for name, (_, times) in panels.items():
        if len([p for p, _ in times if p == "ours"]) < 2:
            raise MissingRowsError(f"fewer than two rows with benchmark scaling, provider ours, by {name}")
    title = "Cost of larger batches, images and models"
    if relative:
        title += ", relative to ours at the smallest"
    figure = empty_figure(rows, title, "points: measured; lines: the fitted time = a · nᵏ", 3.0)
    for ax, (name, (title, times)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        scale = 1 / times["ours", min(n for p, n in times if p == "ours")] if relative else 1e3
        for provider in dict.fromkeys(p for p, _ in times):
            points = sorted((n, scale * t) for (p, n), t in times.items() if p == provider)
            n, time = zip(*points, strict=True)
            ax.plot(n, time, "o", color=COLOURS[provider], ms=4, gid=provider)
            if len(n) > 1:
                a, k = fit_power(n, time)
                label, ends = f"{long_name(provider)}: k = {k:.2f}", (n[0], n[-1])
                ax.plot(ends, [a * x**k for x in ends], color=COLOURS[provider], lw=1.2, label=label)
        ticks = sorted({n for _, n in times})
        ax.set(xscale="log", yscale="log", title=title, xlabel=name)
        ax.set_xticks(
            ticks, [str(math.isqrt(n)) if name == "image side (n: pixels)" else str(n) for n in ticks]
        )
        ax.set_xticks([], minor=True)
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}" if high / low < 10 else "")
        ax.legend(loc="upper left", labelcolor="linecolor", handlelength=1, borderaxespad=0.1)
    figure.axes[0].set_ylabel("time / ours at the smallest n" if relative else "milliseconds")
    return figure


def _pixels(r: RecordedRow) -> int:
    return math.prod(map(int, r.shape.split("x")[1:]))


def _only_results() -> Path:
    folders = sorted({path.parent for path in results_folder().glob("*/*.csv")})
    if len(folders) != 1:
        found = ", ".join(folder.name for folder in folders) or "nothing"
        raise CommandError(f"--results is needed: {results_folder()} holds {found}")
    return folders[0]


def _write(results: Path | None, out: Path | None, relative: bool, dtype: str | None) -> int:
    results = results or _only_results()
    out = out or results / "plots"
    rows = read_results(results)
    check_writable(None, out)
    dtypes = sorted({r.dtype for r in rows})
    if dtype and dtype not in dtypes:
        raise CommandError(f"--dtype is {dtype!r}; the results hold {', '.join(dtypes)}")
    most = [r for r in rows if int(r.threads) == max(int(r.threads) for r in rows)]
    by_dtype = {name: [r for r in most if r.dtype == name] for name in ([dtype] if dtype else dtypes)}
    jobs = {"throughput": partial(throughput, [r for r in rows if r.dtype == (dtype or r.dtype)], relative)}
    for plot in (stages, roofline, scaling):
        jobs |= {f"{plot.__name__}_{name}": partial(plot, r, relative) for name, r in by_dtype.items()}
    skipped = 0
    make_folder(out)
    try:
        for name, draw in jobs.items():
            try:
                figure = draw()
            except MissingRowsError as error:
                print(f"plots: {name} skipped: {error}", file=sys.stderr)
                skipped += 1
                continue
            path = out / (name + "_relative" * relative)
            with matplotlib.rc_context(STYLE):
                figure.savefig(f"{path}.png", dpi=200)
                figure.savefig(f"{path}.svg", metadata={"Date": None})
            print(f"{path}.png, .svg")
    except OSError as error:
        raise CommandError(f"cannot write to {out}: {error.strerror}") from None
    if skipped == len(jobs):
        raise CommandError(f"--results {results}: its rows suffice for no plot")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Write the plots; the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="plots", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--results", type=Path, metavar="DIR", help="default: the only folder in results")
    add("--out", type=Path, metavar="DIR", help="default: plots/ in the results")
    add("--relative", action="store_true", help="ratios only; file names end in _relative")
    add("--dtype", metavar="NAME", help="default: every dtype in the results")
    return report_errors("plots", lambda: _write(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
