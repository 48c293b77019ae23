"""What a training run leaves: metrics that read back exactly, curves of them, a page, progress."""

import base64
import io
import math
import os
import re
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from support.peers import require


@pytest.fixture(scope="module")
def report() -> ModuleType:
    for package in ("matplotlib", "PIL", "rich"):
        require(package)
    return import_module("poolformer_kernels.train.report")


def train_row(step: int, loss: float = 2.0, **more: float) -> dict:
    row = {"step": step, "epoch": step / 10, "lr": 1e-3, "train_loss": loss, "images_per_second": 100.0}
    return row | {"memory_mb": 512.5, "skipped_steps": 0, "bad_images": 0} | more


def epoch_row(step: int, loss: float, top1: float, **more: float) -> dict:
    row = {"step": step, "epoch": step / 10, "val_loss": loss, "val_top1": top1, "val_top5": top1 + 9}
    return row | {"val_images_per_second": 300.0} | more


def full(report: ModuleType, rows: list[dict]) -> list[dict]:
    """The rows as they are read: with every column."""
    return [dict.fromkeys(report.COLUMNS) | row for row in rows]


def write(report: ModuleType, run: Path, rows: list[dict]) -> None:
    metrics = report.Metrics(run)
    for row in rows:
        metrics.append(row)


# ---- metrics.csv


def test_the_columns(report, tmp_path) -> None:
    report.Metrics(tmp_path)
    header = "step,epoch,lr,train_loss,images_per_second,memory_mb,skipped_steps,bad_images,"
    header += "val_loss,val_top1,val_top5,val_images_per_second,ema_top1\n"
    assert (tmp_path / "metrics.csv").read_text() == header
    assert report.Metrics.read(tmp_path) == []


HARD = [0.1 + 0.2, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, 2**53 + 1.0, math.inf, -math.inf, 1e22]


@pytest.mark.parametrize("value", HARD)
def test_floats_read_back_exactly(report, tmp_path, value: float) -> None:
    report.Metrics(tmp_path).append({"step": 3, "epoch": value, "lr": value, "ema_top1": value})
    (row,) = report.Metrics.read(tmp_path)
    for name in ("epoch", "lr", "ema_top1"):
        assert (row[name], math.copysign(1, row[name])) == (value, math.copysign(1, value))
    assert row["train_loss"] is None


def test_kinds_of_numbers(report, tmp_path) -> None:
    row = {"step": np.int64(2**60 + 1), "epoch": 1, "train_loss": np.float32(0.1), "val_loss": math.nan}
    write(report, tmp_path, [row | {"skipped_steps": 7}])
    (read,) = report.Metrics.read(tmp_path)
    assert (read["step"], read["skipped_steps"]) == (2**60 + 1, 7)
    assert all(type(read[name]) is int for name in ("step", "skipped_steps"))
    assert all(type(read[name]) is float for name in ("epoch", "train_loss"))
    assert read["epoch"] == 1.0
    assert read["train_loss"] == float(np.float32(0.1))
    assert math.isnan(read["val_loss"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss": 1.0}, ValueError, "unknown column 'loss'; the columns are step, epoch, lr"),
        ({"step": None}, ValueError, "'step' is missing"),
        ({"epoch": None}, ValueError, "'epoch' is missing"),
        ({"step": 1.0}, TypeError, "'step' must be a whole number or None, got 1.0"),
        ({"step": True}, TypeError, "'step' must be a whole number or None, got True"),
        ({"lr": "0.1"}, TypeError, "'lr' must be a real number or None, got '0.1'"),
        ({"lr": torch.tensor(0.1)}, TypeError, r"'lr' must be a real number or None, got tensor\(0.1000\)"),
    ],
)
def test_a_bad_row_is_an_error_and_writes_nothing(report, tmp_path, change, error, message) -> None:
    metrics = report.Metrics(tmp_path)
    metrics.append(train_row(10))
    before = metrics.path.read_bytes()
    with pytest.raises(error, match=message):
        metrics.append(train_row(20) | change)
    assert metrics.path.read_bytes() == before


@pytest.mark.parametrize(
    ("step", "kept"), [(0, 0), (9, 0), (10, 1), (19, 1), (20, 3), (25, 3), (30, 4), (99, 4)]
)
def test_truncate_drops_later_rows(report, tmp_path, step: int, kept: int) -> None:
    rows = [train_row(10, 1 / 3), train_row(20, 0.1), epoch_row(20, 0.7, 55.5), train_row(30, 1e-5)]
    write(report, tmp_path, rows)
    before = (tmp_path / "metrics.csv").read_text().splitlines(keepends=True)
    report.Metrics(tmp_path).truncate(step)
    assert (tmp_path / "metrics.csv").read_text() == "".join(before[: kept + 1])
    assert report.Metrics.read(tmp_path) == full(report, rows[:kept])


def test_resume_goes_on_after_the_checkpoint(report, tmp_path) -> None:
    rows = [train_row(10, 2.0), train_row(20, 1.5), train_row(30, 9.0)]
    write(report, tmp_path, rows)
    metrics = report.Metrics(tmp_path)
    metrics.truncate(20)
    metrics.append(train_row(30, 1.25))
    metrics.append(epoch_row(30, 1.0, 60.0))
    expected = [*rows[:2], train_row(30, 1.25), epoch_row(30, 1.0, 60.0)]
    assert report.Metrics.read(tmp_path) == full(report, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("truncate", [False, True])
def test_a_line_cut_anywhere_is_removed(report, tmp_path, truncate: bool) -> None:
    rows = [train_row(10), epoch_row(20, 0.5, 71.25, ema_top1=70.125)]
    write(report, tmp_path, rows)
    path = tmp_path / "metrics.csv"
    content = path.read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        path.write_bytes(content)
        metrics = report.Metrics(tmp_path)
        path.write_bytes(content[:-cut])
        assert report.Metrics.read(tmp_path) == full(report, rows[:1])
        if truncate:
            metrics.truncate(10)
        else:
            metrics = report.Metrics(tmp_path)
        metrics.append(rows[1])
        assert path.read_bytes() == content


def test_a_header_cut_anywhere_is_written_again(report, tmp_path) -> None:
    path = report.Metrics(tmp_path).path
    header = path.read_bytes()
    for end in range(len(header)):
        path.write_bytes(header[:end])
        assert report.Metrics.read(tmp_path) == []
        write(report, tmp_path, [train_row(10)])
        assert report.Metrics.read(tmp_path) == full(report, [train_row(10)])


@pytest.mark.parametrize("content", ["step,loss\n1,2\n", "notes", "step,epoch,lr\n"])
def test_other_columns_are_an_error(report, tmp_path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    for use in (report.Metrics, report.Metrics.read, report.draw_curves):
        with pytest.raises(
            ValueError, match=r"metrics\.csv: the columns are .*, but this version writes step,"
        ):
            use(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == content


@pytest.mark.parametrize("line", ["1,2", "one" + ",1.0" * 12, ",1.0" + "," * 11, ""])
def test_a_broken_line_is_named(report, tmp_path, line: str) -> None:
    write(report, tmp_path, [train_row(10)])
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(f"{line}\n")
    for use in (report.Metrics.read, lambda run: report.Metrics(run).truncate(5)):
        with pytest.raises(ValueError, match=r"metrics\.csv, line 3: "):
            use(tmp_path)


def test_the_old_file_stays_where_the_new_one_cannot_be_put(report, tmp_path, monkeypatch) -> None:
    rows = [train_row(10), train_row(20)]
    write(report, tmp_path, rows)

    def fail(*_):
        raise OSError("killed before the rename")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="killed before"):
            report.Metrics(tmp_path).truncate(10)
    assert report.Metrics.read(tmp_path) == full(report, rows)


# ---- curves.png


def curves(figure) -> dict[str, tuple[list, list]]:
    """By column, or what is drawn besides: the points of the line."""
    lines = [line for ax in figure.axes for line in ax.lines]
    return {line.get_gid(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def texts(figure) -> set[str]:
    legends = [text for ax in figure.axes if ax.get_legend() for text in ax.get_legend().get_texts()]
    return {text.get_text() for text in [*legends, *(text for ax in figure.axes for text in ax.texts)]}


def test_curves_are_the_columns(report) -> None:
    rows = [train_row(5, 2.0), train_row(10, 1.5), epoch_row(10, 1.6, 40.0, ema_top1=12.0)]
    rows += [train_row(20, 1.0, lr=5e-4), epoch_row(20, 1.2, 62.5, ema_top1=61.0)]
    figure = report.curves_figure(full(report, rows))
    assert curves(figure) == {
        "train_loss": ([0.5, 1.0, 2.0], [2.0, 1.5, 1.0]),
        "val_loss": ([1.0, 2.0], [1.6, 1.2]),
        "val_top1": ([1.0, 2.0], [40.0, 62.5]),
        "ema_top1": ([1.0, 2.0], [12.0, 61.0]),
        "best": ([2.0], [62.5]),
        "lr": ([0.5, 1.0, 2.0], [1e-3, 1e-3, 5e-4]),
    }
    assert texts(figure) == {"training", "validation", "model", "moving average (EMA)", "best, 62.50"}
    for ax in figure.axes:
        assert ax.get_xlim()[0] == 0
        assert ax.get_xlim()[1] > 2


def test_no_moving_average_no_validation_no_rows(report) -> None:
    def drawn(rows: list[dict]) -> tuple[set, set]:
        figure = report.curves_figure(full(report, rows))
        figure.draw_without_rendering()
        return set(curves(figure)), texts(figure)

    assert drawn([train_row(10), epoch_row(10, 1.0, 50.0)])[0] == {
        "train_loss", "val_loss", "val_top1", "best", "lr"
    }  # fmt: skip
    assert drawn([train_row(10)]) == ({"train_loss", "lr"}, {"training", "no validation yet"})
    assert drawn([epoch_row(10, 1.0, 50.0)])[0] == {"val_loss", "val_top1", "best"}
    assert drawn([]) == (set(), {"no validation yet"})


def test_one_point_is_a_dot(report) -> None:
    figure = report.curves_figure(full(report, [train_row(10)]))
    (line,) = figure.axes[0].lines
    assert (line.get_marker(), line.get_markevery()) == ("o", [0])


def test_of_many_points_the_lonely_are_dots(report) -> None:
    losses = [1.0] * 20 + [math.nan, 1.0, math.nan] + [1.0] * 40 + [math.inf, 1.0]
    rows = [train_row(i, loss) for i, loss in enumerate(losses, 1)]
    line = report.curves_figure(full(report, rows)).axes[0].lines[0]
    assert (line.get_marker(), line.get_markevery()) == ("o", [21, 64])
    assert report.curves_figure(full(report, rows[:20] * 3)).axes[0].lines[0].get_marker() == "None"


@pytest.mark.filterwarnings("error")
def test_losses_that_are_not_finite_leave_a_gap_and_a_mark(report, tmp_path) -> None:
    losses = [2.0, math.nan, 1.0, math.inf, -math.inf]
    rows = [train_row(10 * i, loss) for i, loss in enumerate(losses, 1)]
    rows.append(epoch_row(60, math.nan, math.nan))
    figure = report.curves_figure(full(report, rows))
    drawn = curves(figure)
    assert drawn["outside"][0] == [2.0, 4.0, 5.0, 6.0]
    assert [y if math.isfinite(y) else None for y in drawn["train_loss"][1]] == [2.0, None, 1.0, None, None]
    assert {"not finite", "no validation yet"} < texts(figure)
    write(report, tmp_path, rows)
    report.draw_curves(tmp_path)


@pytest.mark.filterwarnings("error")
def test_no_finite_loss_at_all(report, tmp_path) -> None:
    write(report, tmp_path, [train_row(10, math.inf, lr=0.0), train_row(20, math.nan, lr=0.0)])
    figure = report.curves_figure(report.Metrics.read(tmp_path))
    assert "no finite loss" in texts(figure)
    assert curves(figure)["outside"][0] == [1.0, 2.0]
    assert all(map(math.isnan, curves(figure)["train_loss"][1]))
    report.draw_curves(tmp_path)


def test_a_run_that_diverges_keeps_its_scale(report) -> None:
    rows = [train_row(10 * i, loss) for i, loss in enumerate((2.0, 1.0, 19.0, 1e30, 1.0), 1)]
    figure = report.curves_figure(full(report, rows))
    drawn = curves(figure)
    assert drawn["outside"][0] == [4.0]
    assert drawn["train_loss"][1][:3] == [2.0, 1.0, 19.0]
    assert math.isnan(drawn["train_loss"][1][3])
    assert figure.axes[0].get_ylim()[1] < 30
    assert "not finite, or over 10 × the first" in texts(figure)


def pixels(png: bytes | Path) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(png) if isinstance(png, bytes) else png) as image:
        return np.asarray(image.convert("RGB"))


def has(image: np.ndarray, colour: str) -> bool:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((image == rgb).all(-1).any())


def test_the_picture(report, tmp_path) -> None:
    write(report, tmp_path, [train_row(10, 2.0), train_row(20, 1.5)])
    path = report.draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    before = pixels(path)
    write(report, tmp_path, [epoch_row(20, 1.7, 40.0)])
    after = pixels(report.draw_curves(tmp_path))
    assert before.shape[1] == after.shape[1] > 1800
    for colour, drawn in (("train", (True, True)), ("val", (False, True)), ("ema", (False, False))):
        assert (has(before, report._LIGHT[colour]), has(after, report._LIGHT[colour])) == drawn
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]


def test_drawing_leaves_matplotlibs_settings_alone(report, tmp_path) -> None:
    from matplotlib import rc_context, rcParams
    from matplotlib._pylab_helpers import Gcf

    write(report, tmp_path, [train_row(10, 2.0), train_row(20, 1.5)])
    usual = pixels(report.draw_curves(tmp_path))
    with rc_context({"axes.facecolor": "pink", "font.size": 20, "savefig.dpi": 50}):
        settings = dict(rcParams)
        assert (pixels(report.draw_curves(tmp_path)) == usual).all()
        assert dict(rcParams) == settings
    assert not Gcf.figs  # pyplot's figures


def test_dark_curves_are_on_the_pages_dark_card(report) -> None:
    from poolformer_kernels import html_page

    rows = full(report, [train_row(10), epoch_row(10, 1.0, 50.0)])
    light, dark = (pixels(report._png(report.curves_figure(rows, dark))) for dark in (False, True))
    assert (light[0, 0].tolist(), dark[0, 0].tolist()) == ([255, 255, 255], [0x1A, 0x20, 0x29])
    assert f"--card:{report._DARK['card']};" in html_page._STYLE
    assert has(dark, report._DARK["val"])
    assert not has(dark, report._LIGHT["val"])


# ---- index.html


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes and the text in each."""

    EMPTY = ("meta", "img", "source", "br")

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text: list[tuple[str, str]] = []  # (the innermost element, its text)
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.open[-1], data.strip()))

    def texts(self, tag: str) -> list[str]:
        return [text for element, text in self.text if element == tag]

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attrs.get(name) for element, attrs in self.elements if element == tag]

    def table(self) -> dict[str, str]:
        cells = self.texts("td")
        return dict(zip(cells[::2], cells[1::2], strict=True))


NASTY = "<script>alert(1)</script> & \"x\" 'y' <b"
SETTINGS = {"model": "poolformer_s12", "data": "/data/photos", "lr": 0.001, "ema": None}
ROWS = [
    train_row(10, 2.0, images_per_second=900.0, memory_mb=800.0),
    epoch_row(10, 1.8, 60.0, ema_top1=40.0),
    train_row(20, 1.0, images_per_second=1250.0, memory_mb=1234.4),
    epoch_row(20, 1.1, 81.25, ema_top1=79.0),
    train_row(30, 0.9, images_per_second=1300.0, memory_mb=1200.0),
    epoch_row(30, 1.2, 80.0, ema_top1=80.5),
]


def make_samples(report: ModuleType) -> list:
    from PIL import Image

    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    images.append(Image.linear_gradient("L").resize((640, 640)))
    names = [("cat", "cat", 0.9), ("dog", "cat", 0.4), ("dog", NASTY, 0.7), (NASTY, NASTY, 0.95)]
    return [report.Sample(image, *name) for image, name in zip(images, names, strict=True)]


@pytest.fixture
def page(report, tmp_path) -> Page:
    write(report, tmp_path, ROWS)
    settings = SETTINGS | {"augment": {"mixup": 0.8, NASTY: [1, "é"]}, "resume": {}, "name": NASTY}
    facts = {"device": f"Some CPU {NASTY}", "time": "1:02:03"}
    assert report.write_page(tmp_path, settings, facts, make_samples(report)) == tmp_path / "index.html"
    return Page(tmp_path / "index.html")


def test_title_and_tiles(page) -> None:
    assert page.texts("h1") == ["poolformer_s12 on photos"]
    assert page.texts("title") == ["poolformer_s12 on photos · poolformer-kernels"]
    start = page.text.index(("b", "81.25 %"))
    tiles = [text for _, text in page.text[start : start + 12]]
    assert list(zip(tiles[::2], tiles[1::2], strict=True)) == [
        ("81.25 %", "best validation top-1, at epoch 2"),
        ("90.25 %", "validation top-5, at the same epoch"),
        ("80.50 %", "best top-1 of the moving average (EMA), at epoch 3"),
        ("1,250", "training images per second, median; validation 300"),
        ("1,234 MB", "peak memory of a process"),
        ("1:02:03", "time"),
    ]
    assert page.texts("p")[0] == "30 steps, 3 epochs."


def test_tables(page) -> None:
    assert page.table() == {
        "model": "poolformer_s12",
        "data": "/data/photos",
        "lr": "0.001",
        "ema": "null",
        "augment.mixup": "0.8",
        f"augment.{NASTY}": '[1, "é"]',
        "resume": "{}",
        "name": NASTY,
        "device": f"Some CPU {NASTY}",
        "time": "1:02:03",
    }


def test_names_are_text_and_nothing_is_requested(page, tmp_path) -> None:
    assert {tag for tag, _ in page.elements} <= {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "main",
            "h1",
            "h2",
            "p",
            "section",
            "div",
            "span",
        ),
        *("b", "picture", "source", "img", "figure", "figcaption", "table", "tr", "td"),
    }
    sources = [*page.attributes("img", "src"), *page.attributes("source", "srcset")]
    assert len(sources) == 6
    assert all(re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*", source) for source in sources)
    names = {name for _, attrs in page.elements for name in attrs}
    assert names <= {"lang", "charset", "name", "content", "class", "media", "srcset", "src", "alt"}
    assert not re.search(r"https?://|@import|url\(", (tmp_path / "index.html").read_text())


def test_wrong_images_come_first(page) -> None:
    figures = [attrs["class"] for tag, attrs in page.elements if tag == "figure"]
    assert figures == ["wrong", "wrong", "right", "right"]
    assert page.attributes("img", "alt")[1:] == ["dog", "dog", NASTY, "cat"]
    start = page.text.index(("span", "✗"))
    assert [text for _, text in page.text[start : start + 12]] == [
        *("✗", NASTY, "70%", "truth: dog"),
        *("✗", "cat", "40%", "truth: dog"),
        *(NASTY, "95%"),
        *("cat", "90%"),
    ]
    assert any(text.startswith("2 of these 4 are right.") for text in page.texts("p"))


def decoded(uri: str) -> np.ndarray:
    return pixels(base64.b64decode(uri.partition(",")[2]))


def test_pictures_are_those_of_the_run(report, page, tmp_path) -> None:
    (dark,), (light, *images) = page.attributes("source", "srcset"), page.attributes("img", "src")
    assert page.attributes("source", "media") == ["(prefers-color-scheme: dark)"]
    assert (decoded(light) == pixels(report.draw_curves(tmp_path))).all()
    assert has(decoded(dark), report._DARK["val"])
    sizes = [decoded(image).shape for image in images]
    assert sizes == [(64, 64, 3), (64, 64, 3), (320, 320, 3), (64, 64, 3)]  # the gradient was 640 wide
    for image, colour in zip((images[0], images[1], images[3]), ("blue", "green", "red"), strict=True):
        assert image.startswith("data:image/png")
        assert (
            decoded(image) == {"blue": [0, 0, 255], "green": [0, 128, 0], "red": [255, 0, 0]}[colour]
        ).all()
    assert page.attributes("img", "class") == ["curves", "small", "small", None, "small"]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "LA"])
@pytest.mark.parametrize("size", [(28, 28), (200, 100)])
def test_images_of_every_mode(report, tmp_path, mode: str, size: tuple) -> None:
    from PIL import Image

    report.Metrics(tmp_path)
    image = Image.new("RGB", size, "white").convert(mode)
    report.write_page(tmp_path, SETTINGS, {}, [report.Sample(image, "a", "a", math.nan)])
    page = Page(tmp_path / "index.html")
    assert (decoded(page.attributes("img", "src")[-1]) >= 250).all()
    assert "nan%" in page.texts("span")


def test_a_page_before_the_first_row_and_before_the_first_epoch(report, tmp_path) -> None:
    report.Metrics(tmp_path)
    page = Page(report.write_page(tmp_path, SETTINGS, {}, []))
    assert page.texts("p") == ["Nothing is logged yet."]
    assert page.texts("h2") == ["Settings"]
    assert ("span", "top-1: no validation yet") in page.text
    assert page.attributes("img", "src") == []
    write(report, tmp_path, [train_row(5)])
    page = Page(report.write_page(tmp_path, SETTINGS, {}, []))
    assert page.texts("p") == ["5 steps, 0.5 epochs."]
    assert page.texts("h2") == ["Curves", "Settings"]
    assert page.texts("b") == ["–", "100", "512 MB"]


def test_what_went_wrong_is_said(report, tmp_path) -> None:
    rows = [train_row(1, 2.0, skipped_steps=1), train_row(20, math.nan, skipped_steps=1200, bad_images=1)]
    write(report, tmp_path, [*rows, epoch_row(20, math.inf, 10.0)])
    page = Page(report.write_page(tmp_path, SETTINGS, {}, []))
    assert page.texts("p") == [
        "20 steps, 2 epochs. The gradient scaler skipped 1,200 steps. Unreadable and replaced: 1 image."
    ]
    assert ("span", "The loss is not finite in 2 of 3 rows") in page.text


def test_the_title_is_text(report, tmp_path) -> None:
    report.Metrics(tmp_path)
    page = Page(report.write_page(tmp_path, {"model": NASTY, "data": "a/<i>"}, {}, []))
    assert page.texts("h1") == [f"{NASTY} on <i>"]
    assert page.texts("title") == [f"{NASTY} on <i> · poolformer-kernels"]


def test_names_that_are_not_utf8(report, tmp_path) -> None:
    from PIL import Image

    report.Metrics(tmp_path)
    name = os.fsdecode(b"caf\xe9")  # a folder's name in Latin-1
    sample = report.Sample(Image.new("L", (8, 8)), name, name, 0.5)
    page = Page(report.write_page(tmp_path, SETTINGS | {"data": name}, {}, [sample]))
    assert page.texts("h1") == ["poolformer_s12 on caf?"]
    assert page.attributes("img", "alt") == ["caf?"]


@pytest.mark.parametrize("missing", ["model", "data"])
def test_a_page_needs_model_and_data(report, tmp_path, missing: str) -> None:
    report.Metrics(tmp_path)
    with pytest.raises(ValueError, match=f"settings: '{missing}' is missing"):
        report.write_page(tmp_path, SETTINGS | {missing: None}, {}, [])
    assert not (tmp_path / "index.html").exists()


# ---- progress


def test_lines_off_a_terminal(report, capsys, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    with report.Progress(1000, done=100) as progress:
        progress.line("[bold]resumed[/] at step 100")
        for step in range(101, 1001):
            now[0] += 2.0
            progress.update(step, f"loss {step / 1000}" if step % 300 == 0 else None)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "[bold]resumed[/] at step 100",
        "step 300/1000: loss 0.3, 0:23:20 left",
        "step 600/1000: loss 0.6, 0:13:20 left",
        "step 900/1000: loss 0.9, 0:03:20 left",
    ]


def test_time_left_of_days_and_none_at_the_ends(report, capsys, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    progress = report.Progress(101)
    progress.update(0, "first")
    now[0] = 3661.0
    progress.update(1, "one")
    progress.update(101, "last")
    assert capsys.readouterr().err.splitlines() == [
        "step 0/101: first",
        "step 1/101: one, 4 d 5:41:40 left",
        "step 101/101: last",
    ]


def test_other_ranks_show_nothing(report, capsys) -> None:
    with report.Progress(10, enabled=False) as progress:
        progress.update(5, "loss 1")
        progress.line("validation")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("done", [-1, 11])
def test_progress_checks_what_is_done(report, done: int) -> None:
    with pytest.raises(ValueError, match=f"done: must be between 0 and total_steps = 10, got {done}"):
        report.Progress(10, done=done)


def read_to_end(terminal: io.TextIOBase, screen: io.RawIOBase) -> str:
    """All that was written to the pseudoterminal; the kernel hands it over in pieces."""
    terminal.write("END")
    terminal.flush()
    shown = b""
    while not shown.endswith(b"END"):
        shown += screen.read(1 << 16)
    return shown.decode().removesuffix("END")


def test_a_bar_on_a_terminal(report, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        with report.Progress(200, done=50) as progress:
            progress.update(51)
            progress.update(100, "epoch 1 [loss 1.25]")
            progress.update(101)
            progress.line("epoch 1: [top-1] 50.0 %")
        shown = read_to_end(terminal, screen)
        with report.Progress(200, enabled=False) as progress:
            progress.update(100, "hidden")
            progress.line("hidden")
        assert read_to_end(terminal, screen) == ""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "epoch 1: [top-1] 50.0 %\r\n" in plain
    assert re.search(r"━+.* 101/200 epoch 1 \[loss 1\.25\] \d:\d\d:\d\d left", plain)
    assert plain.count("epoch 1: [top-1]") == 1


# ---- TensorBoard


def test_rows_go_to_tensorboard(report, tmp_path, monkeypatch) -> None:
    """With a stand-in for torch's writer, which needs a package that the tests do not."""
    made, scalars, done = [], [], []

    class Writer:
        def __init__(self, *args, **options):
            made.append((args, options))

        def add_scalar(self, *args):
            scalars.append(args)

        def flush(self):
            done.append("flush")

        def close(self):
            done.append("close")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    board = report.TensorBoard(tmp_path, step=20)
    assert board.unavailable == ""
    board.add(dict.fromkeys(report.COLUMNS) | {"step": 30, "epoch": 1.5, "lr": 0.5, "train_loss": 2.0})
    board.add({"step": 40, "val_top1": 60.0, "val_images_per_second": 7.0, "ema_top1": 61.0})
    board.close()
    assert made == [((str(tmp_path / "tensorboard"),), {"purge_step": 21})]
    assert scalars == [
        *(("train/epoch", 1.5, 30), ("train/lr", 0.5, 30), ("train/loss", 2.0, 30)),
        *(("val/top1", 60.0, 40), ("val/images_per_second", 7.0, 40), ("ema/top1", 61.0, 40)),
    ]
    assert done == ["flush", "flush", "close"]
    report.TensorBoard(tmp_path)
    assert made[-1][1] == {"purge_step": None}


def test_without_tensorboard_nothing_is_written(report, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    board = report.TensorBoard(tmp_path)
    board.add(train_row(10))
    board.close()
    assert re.fullmatch("no TensorBoard events are written: .*tensorboard.*", board.unavailable)
    assert list(tmp_path.iterdir()) == []
