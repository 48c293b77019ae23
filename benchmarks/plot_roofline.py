"""The roofline: every kernel's arithmetic intensity and rate, below the limits measured beside it."""

import math
import statistics
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from .charts import (
    COLOURS,
    GRID,
    INK,
    SOFT,
    STYLE,
    MissingRowsError,
    empty_figure,
    long_name,
    model_size,
    select,
    short_number,
)
from .rows import RecordedRow

__all__ = ["roofline"]

KINDS = {  # marker and size
    "mixer": ("o", 6),
    "MLP": ("s", 6),
    "block": ("D", 6),
    "stem, downsample": ("^", 6.5),
    "head": ("v", 6.5),
    "model": ("*", 10),
}


def _kind(r: RecordedRow) -> str:
    if r.benchmark != "block":
        return {"pool_mixer": "mixer", "mlp": "MLP"}.get(r.benchmark, r.benchmark)
    return "head" if r.stage == "head" else "stem, downsample" if r.stage[:1] in ("s", "d") else "block"


def _kernels(
    rows: Sequence[RecordedRow],
) -> dict[bool, dict[tuple[str, str], dict[str, tuple[float, float]]]]:
    """By width (S, M), then (kind, name): FLOP / byte and TFLOP/s of ours, compile and eager.

    A single block goes before a whole stage.
    """
    stages = {r.shape: r.stage for r in rows if r.stage.isdigit()}
    kernels: dict[bool, dict[tuple[str, str], dict[str, tuple[float, float]]]] = {False: {}, True: {}}
    for r in sorted(rows, key=lambda r: not r.stage):
        if r.provider in ("ours", "compile", "eager"):
            medium, _, model = model_size(r.model)
            name = r.stage or stages.get(r.shape, r.shape)
            if r.benchmark == "model":
                name = model.rpartition("_")[2]
            point = 1e3 * r.tflop_per_s / r.gb_per_s, r.tflop_per_s
            kernels[medium].setdefault((_kind(r), name), {})[r.provider] = point
    return {medium: group for medium, group in kernels.items() if group}


@matplotlib.rc_context(STYLE)
def roofline(rows: Sequence[RecordedRow], relative: bool = False) -> Figure:
    """Every kernel's arithmetic intensity and rate, below the copy bandwidth and matrix rate of the same run.

    The matrix rate is that of the processor's products beside the calls, where rows have it (on the CPU),
    else that of PyTorch's. Relative rates are fractions of its median. Drawn is the batch that most rows
    have.
    """
    chosen = select(rows, "pool_mixer", "mlp", "block", "model")
    chosen = [r for r in chosen if r.gb_per_s and r.tflop_per_s]
    batches = [r.batch for r in chosen]
    batch = max(batches, key=lambda n: (batches.count(n), n), default=0)
    chosen = [r for r in chosen if r.batch == batch]
    kernels = _kernels(chosen)
    states = {r.state for r in chosen}
    limits = [r for r in rows if r.direction == "forward" and r.batch in (batch, None) and r.state in states]
    copy = sorted(r.gb_per_s / 1e3 for r in limits if r.provider == "copy" and r.gb_per_s)
    matrix = sorted(r.rate_tflops for r in chosen if r.rate_tflops)
    product = "matrix product" if not matrix else "multipliers"
    matrix = matrix or sorted(r.tflop_per_s for r in limits if r.provider == "matmul" and r.tflop_per_s)
    needed = {"ours, compile or eager with gb_per_s and tflop_per_s": kernels, "copy": copy, "matmul": matrix}
    if missing := [name for name, found in needed.items() if not found]:
        raise MissingRowsError(f"no rows with batch {batch} and provider {', nor '.join(missing)}")
    names = "copy bandwidth", "matrix rate"
    if not relative:
        rates = short_number(1e3 * statistics.median(copy)), short_number(statistics.median(matrix))
        names = f"copy, {rates[0]} GB/s", f"{product}, {rates[1]} TFLOP/s"
    unit = statistics.median(matrix) if relative else 1.0
    roofs = [(f(copy) / unit, f(matrix) / unit) for f in (min, statistics.median, max)]

    subtitle = f"filled: ours, on one line with compile and eager; batch {batch}; bands: spread of the limits"
    figure = empty_figure(chosen, "Kernels below the roofs", subtitle, 3.9 * len(kernels) + 0.3, top=0.85)
    axes = figure.subplots(len(kernels), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    ours: list[dict[tuple[str, str], tuple[float, float]]] = []
    for ax, (medium, group) in zip(axes, kernels.items(), strict=True):
        ax.set(xscale="log", yscale="log", title=f"PoolFormer-{'M' if medium else 'S'}")
        ax.set_ylabel("fraction of the matrix rate" if relative else "TFLOP/s")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_major_formatter("{x:g}")
        ours.append({})
        for (kind, name), providers in group.items():
            marker, size = KINDS[kind]
            points = {p: (x, y / unit) for p, (x, y) in providers.items()}
            if "ours" in points:
                ours[-1][kind, name] = points["ours"]
            ax.plot(*zip(*points.values(), strict=True), color=GRID, lw=0.8, zorder=1.5)
            for p, (x, y) in points.items():
                style = {"mfc": COLOURS[p], "mec": "white", "mew": 0.5, "ms": size, "zorder": 3}
                if p != "ours":
                    style |= {"mfc": "white", "mec": COLOURS[p], "mew": 1, "ms": 0.7 * size, "zorder": 2}
                ax.plot([x], [y], marker, gid=p, **style)
    (left, right), (bottom, top), (_, (slope, flat), _) = axes[0].get_xlim(), axes[0].get_ylim(), roofs
    left, right = min(left, flat / slope / 4), max(right, flat / slope * 4)
    axes[0].set(xlim=(left, right), ylim=(bottom, max(top, roofs[2][1]) * 1.5))
    xs = [left * (right / left) ** (i / 300) for i in range(301)]
    low, middle, high = ([min(c * x, m) for x in xs] for c, m in roofs)
    for ax in axes:
        ax.fill_between(xs, low, high, color=GRID, lw=0, alpha=0.7)
        ax.plot(xs, middle, color=INK, lw=1.2, gid="roof")
    shown = [kind for kind in KINDS if any(kind == k for group in kernels.values() for k, _ in group)]
    axes[-1].set_xlabel("arithmetic intensity, FLOP / byte")
    handles = [Line2D([], [], marker=KINDS[kind][0], ls="", color=SOFT, label=kind) for kind in shown]
    for p in ("ours", "compile", "eager"):
        handles.append(Line2D([], [], marker="s", ls="", color=COLOURS[p], label=long_name(p)))
    style = {"ncols": len(handles), "columnspacing": 1.2, "handletextpad": 0.1, "borderaxespad": 0}
    corner = (0, 1 - 0.53 / figure.get_figheight())
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=corner, **style)

    figure.draw_without_rendering()  # settles the layout that the labels are placed in
    for ax, points in zip(axes, ours, strict=True):
        ridge = flat / slope
        (x0, y0), (x1, y1) = ax.transData.transform([(ridge / 2, flat / 2), (ridge, flat)])
        tilt = math.atan2(y1 - y0, x1 - x0)
        offset = (-6 * math.cos(tilt) - 4 * math.sin(tilt), -6 * math.sin(tilt) + 4 * math.cos(tilt))
        style = {"textcoords": "offset points", "rotation_mode": "anchor", "size": 7, "ha": "right"}
        ax.annotate(names[0], (ridge, flat), offset, rotation=math.degrees(tilt), **style)
        ax.annotate(names[1], (right, flat), (-2, 4), **style)
        _label_points(ax, points, (xs, middle))
    return figure


def _label_points(ax: Axes, points: dict[tuple[str, str], tuple[float, float]], roof: tuple) -> None:
    """Name points at free places, on thin leaders where these are far; points in a heap have one name."""
    scale, to_pixels = ax.figure.dpi / 72, ax.transData.transform
    taken = [text.get_window_extent() for text in ax.texts]
    boxes = [(point, 1.0) for point in zip(*roof, strict=True)]
    boxes += [
        (line.get_xydata()[0], line.get_markersize() / 2) for line in ax.lines if line.get_gid() in COLOURS
    ]
    for point, half in boxes:
        taken.append(Bbox.from_bounds(*(to_pixels(point) - half * scale), 2 * half * scale, 2 * half * scale))
    heaps: list[tuple[str, tuple[float, float], list[str]]] = []
    for (kind, name), point in sorted(points.items()):
        reach = (14 if kind == "model" else 7) * scale
        near = [h for h in heaps if h[0] == kind and math.dist(to_pixels(h[1]), to_pixels(point)) < reach]
        if near:
            near[0][2].append(name)
        else:
            heaps.append((kind, point, [name]))
    turns = (90, 270, 0, 180, 45, 135, 225, 315, 60, 120, 240, 300)  # above, below, beside, then the corners
    places = [(r, turn) for r in range(9, 90, 3) for turn in turns]
    ceiling = to_pixels((1, max(roof[1])))[1]
    for kind, point, names in heaps:
        text = f"{kind} {', '.join(names)}" if names[0].isdigit() else ", ".join(names)
        style = {"ha": "center", "va": "center", "size": 6.5, "zorder": 4, "gid": "label"}
        label = ax.annotate(text, point, (0, 0), textcoords="offset points", **style)
        wide = label.get_window_extent().width / 2 / scale
        tried = []
        for r, turn in places:
            offset = ((r + wide - 3) * math.cos(math.radians(turn)), r * math.sin(math.radians(turn)))
            label.set_position(offset)
            box = label.get_window_extent().padded(1)
            outside = box.x0 < ax.bbox.x0 or box.x1 > ax.bbox.x1 or box.y0 < ax.bbox.y0 or box.y1 > ceiling
            tried.append(
                (sum(box.overlaps(other) for other in taken) + 9 * outside, len(tried), offset, box, r)
            )
            if not tried[-1][0]:
                break
        _, _, offset, box, r = min(tried)
        label.set_position(offset)
        label.set_bbox({"fc": "white", "lw": 0, "pad": 0.5, "alpha": 0.8})
        taken.append(box)
        if r > 12:
            arrow = {"arrowstyle": "-", "color": SOFT, "lw": 0.5, "shrinkA": 0, "shrinkB": 2, "zorder": 1.6}
            ax.annotate("", point, offset, textcoords="offset points", arrowprops=arrow)
