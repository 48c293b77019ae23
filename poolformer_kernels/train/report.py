"""What a training run shows and leaves: progress, metrics.csv, curves.png, index.html, TensorBoard's events.

Files that are written anew are written beside and renamed: whenever a run is killed, the old file or the new
one is there, whole.
"""

import io
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from .. import html_page
from .metrics import COLUMNS, Metrics, Row, columns_of, replace

__all__ = [
    "COLUMNS",
    "Metrics",
    "Picture",
    "Progress",
    "Sample",
    "TensorBoard",
    "columns_of",
    "curves_figure",
    "draw_curves",
    "write_page",
]

_LIGHT = {"card": "#ffffff", "ink": "#1a1f29", "soft": "#5b6474", "grid": "#e1e5eb"}
_LIGHT |= {"train": "#4a7fc1", "val": "#e07b28", "ema": "#3a9464", "bad": "#b3261e"}
_DARK = {"card": "#1a2029", "ink": "#e6eaf1", "soft": "#9aa5b5", "grid": "#2b333f"}  # as html_page's colours
_DARK |= {"train": "#6fa3e0", "val": "#f0944a", "ema": "#6fd6a0", "bad": "#ff9a91"}
_DOTS = 40  # up to so many points each has a dot
_DIVERGED = 10  # losses above so many times the first and the median are not drawn to scale


_TEXT = {"font.size": 9.5, "font.family": "DejaVu Sans"} | dict.fromkeys(
    ("axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9.5
)


def draw_curves(run: Path) -> Path:
    """Draw ``curves.png`` from the run's metrics (`curves_figure`); return its path."""
    path = Path(run) / "curves.png"
    replace(path, _png(curves_figure(Metrics.read(run))))
    return path


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_TEXT):  # some texts are made only now
        figure.savefig(buffer, format="png", dpi=192)  # twice the pixels of the page, for dense screens
    return buffer.getvalue()


def curves_figure(rows: Sequence[Row], dark: bool = False) -> Figure:
    """Losses, the score and learning rate over epochs.

    A curve has a gap where its value is not finite. At these epochs, and where a loss is over ten times both
    the first one and the median, a red mark stands at the upper edge of the losses: a run that diverged shows
    it, and its scale stays legible.

    Args:
        rows: as `Metrics.read` returns them; there may be none.
        dark: in the colours of the page's dark mode.
    """
    colours = _DARK if dark else _LIGHT
    style = dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), colours["soft"]
    )
    style |= dict.fromkeys(("axes.facecolor", "figure.facecolor"), colours["card"])
    style |= {"axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    style |= {"axes.grid": True, "axes.axisbelow": True, "grid.color": colours["grid"]}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    style |= {"text.color": colours["ink"], **_TEXT}
    with matplotlib.rc_context(style):
        figure = Figure((9.5, 5.8), layout="constrained")
        axes = figure.subplot_mosaic([["loss", "top1"], ["lr", "lr"]], height_ratios=(3, 1.15))
        _draw_losses(axes["loss"], rows, colours)
        _draw_scores(axes["top1"], rows, colours)
        axes["lr"].set_title("Learning rate")
        _draw(axes["lr"], rows, "lr", color=colours["soft"])
        last = max((row["epoch"] for row in rows), default=0) or 1
        for ax in axes.values():
            ax.set(xlabel="epoch", xlim=(0, 1.02 * last))
            ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
            ax.margins(y=0.08)
            ax.yaxis.set_major_formatter("{x:g}")
        for name in ("loss", "lr"):
            axes[name].set_ylim(bottom=0)
    return figure


def _draw_losses(ax: Axes, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    ax.set_title("Loss")
    points = [point for name in ("train_loss", "val_loss") for point in _values(rows, name)]
    finite = [y for _, y in points if math.isfinite(y)]
    limit = _DIVERGED * max(finite[0], statistics.median(finite)) if finite else math.inf
    _draw(ax, rows, "train_loss", limit, color=colours["train"], label="training")
    _draw(ax, rows, "val_loss", limit, color=colours["val"], label="validation")
    outside = sorted({x for x, y in points if y > limit or not math.isfinite(y)})
    if outside:
        label = "not finite"
        if any(y > limit for y in finite):
            label += f", or over {_DIVERGED} × the first"
        style = {"color": colours["bad"], "ls": "", "marker": "v", "ms": 5, "clip_on": False}
        top = ax.get_xaxis_transform()
        ax.plot(outside, [1.0] * len(outside), transform=top, label=label, gid="outside", **style)
    if rows and not finite:
        _say(ax, "no finite loss")
    if ax.lines:
        ax.legend(loc="best")


# By the column of the score that the best weights have highest: its name, and the curves beside it.
_SCORES = {
    "val_top1": ("top-1", (("val_top1", "model"),)),
    "val_mask_AP": (
        "average precision of masks",
        (("val_mask_AP", "masks"), ("val_mask_AP50", "masks, AP50"), ("val_AP", "boxes")),
    ),
    "val_AP": ("average precision", (("val_AP", "AP"), ("val_AP50", "AP50"))),
    "val_mIoU": ("mIoU", (("val_mIoU", "mIoU"), ("val_accuracy", "pixel accuracy"))),
}


def _score_of(rows: Sequence[Row]) -> str:
    """The column of the task's score."""
    return next((name for name in _SCORES if rows and name in rows[0]), "val_top1")


def _draw_scores(ax: Axes, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    score = _score_of(rows)
    name, curves = _SCORES[score]
    ax.set_title(f"Validation {name}, per cent")
    for (column, label), style in zip(curves, ("-", "--", ":"), strict=False):
        _draw(ax, rows, column, color=colours["val"], ls=style, label=label)
    ema = score.replace("val_", "ema_")
    _draw(ax, rows, ema, color=colours["ema"], label="moving average (EMA)")
    best = _best(rows, score)
    if best is None:
        _say(ax, "no validation yet")
    else:
        point = best["epoch"], best[score]
        ax.plot(*point, "o", ms=9, mfc="none", mec=colours["val"], label=f"best, {point[1]:.2f}", gid="best")
    if ax.lines:
        ax.legend(loc="best")


def _say(ax: Axes, text: str) -> None:
    """The text in the middle of axes on which nothing is drawn to scale."""
    ax.set_yticks([])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center")


def _values(rows: Iterable[Row], column: str) -> list[tuple[float, float]]:
    """Epoch and value of the rows that have one."""
    return [(row["epoch"], row[column]) for row in rows if row.get(column) is not None]


def _draw(ax: Axes, rows: Sequence[Row], column: str, limit: float = math.inf, **style: object) -> None:
    """A column over epochs, if a row has it: dots on few points, else on those without a neighbour."""
    points = _values(rows, column)
    if not points:
        return
    xs, ys = zip(*points, strict=True)
    ys = [y if math.isfinite(y) and y <= limit else math.nan for y in ys]
    drawn = [False, *map(math.isfinite, ys), False]
    few = len(ys) <= _DOTS
    dots = [i for i in range(len(ys)) if drawn[i + 1] and (few or not (drawn[i] or drawn[i + 2]))]
    style |= {"marker": "o", "ms": 3.5, "markevery": dots} if dots else {}
    ax.plot(xs, ys, lw=1.6 if few else 1.1, gid=column, **style)


def _best(rows: Iterable[Row], column: str) -> Row | None:
    """The first row with the highest finite value of a column; None where there is no such row."""
    found = [row for row in rows if row.get(column) is not None and math.isfinite(row[column])]
    return max(found, key=lambda row: row[column], default=None)


@dataclass(frozen=True)
class Sample:
    """An image of the validation data, with what the model said.

    Args:
        image: what the model saw.
        truth: the name of its class.
        prediction: the name of the class that the model gives the highest probability.
        probability: that one, 0 to 1.
    """

    image: Image.Image
    truth: str
    prediction: str
    probability: float

    @property
    def right(self) -> bool:
        return self.prediction == self.truth


@dataclass(frozen=True)
class Picture:
    """A validation image with what is drawn on it: the truth on one, the model's answer on the other.

    Args:
        truth, prediction: pictures of the same size.
        caption: plain text.
    """

    truth: Image.Image
    prediction: Image.Image
    caption: str


_STYLE = """
.pairs { display:grid; grid-template-columns:1fr 1fr; gap:6px 14px; margin-top:14px }
.pairs img { width:100%; border-radius:8px } .pairs p { grid-column:1 / -1; margin:0 0 12px }
.curves { display:block; width:100%; min-width:640px; height:auto; margin-top:10px }
.samples { display:grid; grid-template-columns:repeat(auto-fill,minmax(150px,1fr)); gap:18px 14px;
  margin-top:14px }
figure { margin:0; min-width:0 } figcaption { font-size:13px; line-height:1.4; margin-top:6px }
figure img { display:block; width:100%; aspect-ratio:1; object-fit:contain; border-radius:8px;
  background:var(--bg); border:3px solid transparent }
figure.wrong img { border-color:var(--bad) } img.small { image-rendering:pixelated }
figcaption div { display:flex; justify-content:space-between; gap:8px; overflow-wrap:anywhere }
figcaption div span + span { flex:none }
.wrong b { color:var(--bad) }
td:first-child { color:var(--soft); width:1%; padding-right:28px }
"""
_SMALL, _LARGE, _PAIR = (
    96,
    320,
    900,
)  # px: smaller images are shown with their pixels, larger ones are reduced


def write_page(
    run: Path, settings: Mapping[str, object], facts: Mapping[str, str], samples: Sequence[Sample | Picture]
) -> Path:
    """Write ``index.html``, a page of one file about the run; return its path.

    It has the run's verdict, its curves (of metrics.csv), what the model says about images of the
    validation data, wrong ones first, the settings and the environment.

    Args:
        run: the run's folder, with its metrics.csv.
        settings: of the run, by name; "model" and "data" are required and make the title. What is nested
            is shown by dotted names.
        facts: about machine and run, as text. "time", if it is there, also is one of the tiles.
        samples: images of the validation data; there may be none.

    Raises:
        ValueError: settings lack "model" or "data"; metrics.csv cannot be read.
    """
    if missing := [name for name in ("model", "data") if not settings.get(name)]:
        raise ValueError(f"settings: {missing[0]!r} is missing, the page's title needs model and data")
    rows = Metrics.read(run)
    title = f"{settings['model']} on {Path(str(settings['data'])).name or settings['data']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _summary(rows),
        html_page.tiles(_tiles(rows, facts)),
        _curves(rows),
        _samples(samples),
        f"<section><h2>Settings</h2>{html_page.table_of(_flat(settings))}</section>",
    ]
    if facts:
        parts.append(f"<section><h2>Where this ran</h2>{html_page.table_of(facts)}</section>")
    path = Path(run) / "index.html"
    text = html_page.page(title, "\n".join(filter(None, parts)), _STYLE)
    replace(path, text.encode(errors="replace"))  # a class may be a folder whose name is not UTF-8
    return path


def _summary(rows: Sequence[Row]) -> str:
    """How far the run is, and what went wrong in it."""
    if not rows:
        return '<p class="soft">Nothing is logged yet.</p>'
    skipped, bad = (_last(rows, name) or 0 for name in ("skipped_steps", "bad_images"))
    text = f"{_count(rows[-1]['step'], 'step')}, {_epoch(rows[-1])} epochs."
    if skipped:
        text += f" The gradient scaler skipped {_count(skipped, 'step')}."
    if bad:
        text += f" Unreadable and replaced: {_count(bad, 'image')}."
    losses = [[y for _, y in _values([row], "train_loss") + _values([row], "val_loss")] for row in rows]
    broken = sum(not all(map(math.isfinite, values)) for values in losses)
    verdict = f"The loss is not finite in {broken:,} of {_count(len(rows), 'row')}"
    return f'<p class="soft">{text}</p>' + (f'<span class="verdict bad">{verdict}</span>' if broken else "")


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _epoch(row: Row) -> str:
    return f"{round(row['epoch'], 2):g}"


def _last(rows: Sequence[Row], column: str) -> float | None:
    return next((row[column] for row in reversed(rows) if row[column] is not None), None)


def _tiles(rows: Sequence[Row], facts: Mapping[str, str]) -> list[tuple[str, str]]:
    score = _score_of(rows)
    name, curves = _SCORES[score]
    ema_score = score.replace("val_", "ema_")
    best, ema = _best(rows, score), _best(rows, ema_score)
    if best is None:
        tiles = [("–", f"{name}: no validation yet")]
    else:
        tiles = [(f"{best[score]:.2f} %", f"best validation {name}, at epoch {_epoch(best)}")]
        others = (("val_top5", "top-5"),) if score == "val_top1" else curves[1:]
        tiles += [
            (f"{best[column]:.2f} %", f"validation {label}, at the same epoch")
            for column, label in others
            if best.get(column) is not None
        ]
    if ema is not None:
        what = f"best {name} of the moving average (EMA), at epoch {_epoch(ema)}"
        tiles.append((f"{ema[ema_score]:.2f} %", what))
    rates = [[rate for _, rate in _values(rows, n)] for n in ("images_per_second", "val_images_per_second")]
    if rates[0]:
        what = "training images per second, median"
        if rates[1]:
            what += f"; validation {_number(statistics.median(rates[1]))}"
        tiles.append((_number(statistics.median(rates[0])), what))
    memory = [mb for _, mb in _values(rows, "memory_mb")]
    if memory:
        tiles.append((f"{max(memory):,.0f} MB", "peak memory of a process"))
    if "time" in facts:
        tiles.append((facts["time"], "time"))
    return tiles


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _curves(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    light, dark = (html_page.data_uri(_png(curves_figure(rows, dark)), "image/png") for dark in (False, True))
    score, _ = _SCORES[_score_of(rows)]
    return (
        '<section><h2>Curves</h2><div class="scroll"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img class="curves" src="{light}" alt="Losses, {score} and learning rate over epochs">'
        "</picture></div></section>"
    )


def _pictures(pictures: Sequence[Picture]) -> str:
    """Truth and prediction side by side."""
    cells = []
    for picture in pictures:
        for what, image in (("truth", picture.truth), ("prediction", picture.prediction)):
            image = image.convert("RGB")
            image.thumbnail((_PAIR, _PAIR))
            cells.append(f'<img src="{html_page.image_uri(image)}" alt="{what}">')
        cells.append(f'<p class="soft small">{escape(picture.caption)}</p>')
    return (
        '<section><h2>Validation images</h2><p class="soft">Left: the truth. Right: the model.</p>'
        f'<div class="pairs">{"".join(cells)}</div></section>'
    )


def _samples(samples: Sequence[Sample | Picture]) -> str:
    """The images, wrong ones first, and of both kinds those first of which the model is surer."""
    if not samples:
        return ""
    if isinstance(samples[0], Picture):
        return _pictures(samples)
    figures = []
    for sample in sorted(samples, key=lambda sample: (sample.right, -sample.probability)):
        truth, prediction = escape(sample.truth), escape(sample.prediction)
        caption = (
            f"<div><span>{'' if sample.right else '✗ '}<b>{prediction}</b></span>"
            f"<span>{sample.probability:.0%}</span></div>"
        )
        if not sample.right:
            caption += f'<div class="soft"><span>truth: {truth}</span></div>'
        image = sample.image if sample.image.mode in ("L", "RGB") else sample.image.convert("RGB")
        small = max(image.size) <= _SMALL
        if max(image.size) > _LARGE:
            image = image.copy()
            image.thumbnail((_LARGE, _LARGE))
        figures.append(
            f'<figure class="{"right" if sample.right else "wrong"}">'
            f'<img{" class=small" if small else ""} src="{html_page.image_uri(image, lossless=small)}" '
            f'alt="{truth}"><figcaption>{caption}</figcaption></figure>'
        )
    right = sum(sample.right for sample in samples)
    return (
        f'<section><h2>Validation images</h2><p class="soft">{right} of these {len(samples)} are right. The '
        "percentage is the probability that the model gives its answer; wrong answers come first, the surest "
        f'of them at the front.</p><div class="samples">{"".join(figures)}</div></section>'
    )


def _flat(settings: Mapping[str, object], above: str = "") -> dict[str, str]:
    """Names and values as text, as in the run's config.yaml; nested names are joined by dots."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[f"{above}{name}"] = (
                value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            )
    return flat


class Progress:
    """How far the run is: a bar on a terminal, elsewhere lines on stderr. A context manager.

    Args:
        total_steps: of the whole run.
        done: of these, before this process (a resumed run).
        enabled: False shows nothing: in the processes that are not rank 0.

    Example::

        with Progress(total, done=start) as progress:
            for step in range(start, total):
                ...
                progress.update(step + 1, text if (step + 1) % 50 == 0 else None)
    """

    def __init__(self, total_steps: int, done: int = 0, enabled: bool = True):
        if not 0 <= done <= total_steps:
            raise ValueError(f"done: must be between 0 and total_steps = {total_steps}, got {done}")
        self._total, self._done, self._enabled = total_steps, done, enabled
        self._started = time.monotonic()
        self._bar: RichProgress | None = None
        console = Console(stderr=True, highlight=False)
        if enabled and sys.stderr.isatty() and console.is_interactive:
            columns = (
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total}", markup=False),
                TextColumn("{task.description}", markup=False),
                TextColumn("{task.fields[left]}", markup=False),
            )
            self._bar = RichProgress(*columns, console=console, refresh_per_second=4)
            self._task = self._bar.add_task("", total=total_steps, completed=done, left="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, text: str | None = None) -> None:
        """Show that ``step`` steps are done.

        Args:
            step: of all, those before a resume included.
            text: epoch, loss and the like, new at each logging interval. None leaves on the bar what is
                there; off a terminal each text is a line, and None shows nothing.
        """
        if not self._enabled:
            return
        left = self._left(step)
        if self._bar:
            self._bar.update(
                self._task, completed=step, left=left, **({} if text is None else {"description": text})
            )
        elif text is not None:
            ending = f", {left}" if left else ""
            print(f"step {step}/{self._total}: {text}{ending}", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """A line that stays: above the bar, or like the others."""
        if self._bar:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def _left(self, step: int) -> str:
        """The time for the other steps at the pace of this process so far; "" where there is none yet."""
        if step <= self._done or step >= self._total:
            return ""
        seconds = (time.monotonic() - self._started) / (step - self._done) * (self._total - step)
        hours, minutes = divmod(round(seconds) // 60, 60)
        days, hours = divmod(hours, 24)
        clock = f"{hours}:{minutes:02}:{round(seconds) % 60:02}"
        return f"{days} d {clock} left" if days else f"{clock} left"


class TensorBoard:
    """The rows for TensorBoard, in ``RUN/tensorboard``, where torch.utils.tensorboard can be imported.

    Elsewhere it writes nothing; ``unavailable`` then says why in one line, else it is "".

    Args:
        run: the run's folder.
        step: on resume, the steps of the checkpoint: TensorBoard hides what was written after it.
    """

    def __init__(self, run: Path, step: int | None = None):
        self._writer = None
        self.unavailable = ""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self.unavailable = f"no TensorBoard events are written: {' '.join(str(error).split())}"
            return
        purge = None if step is None else step + 1
        self._writer = SummaryWriter(str(Path(run) / "tensorboard"), purge_step=purge)

    def add(self, row: Row) -> None:
        """The row's values at its step, as "train/loss", "val/top1", "ema/top1" and so on."""
        if self._writer is None:
            return
        for name, value in row.items():
            if name != "step" and value is not None:
                group, _, rest = name.partition("_")
                tag = f"{group}/{rest}" if group in ("train", "val", "ema") else f"train/{name}"
                self._writer.add_scalar(tag, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
