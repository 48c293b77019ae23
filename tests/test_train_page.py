"""index.html of a training run: what a browser makes of it, piece by piece."""

import base64
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.train import require_train
from support.train_report import epoch_row, has, pixels, train_row, write

require_train()

from PIL import Image

from poolformer_kernels.train import report


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


def page_of(run: Path, rows: list[dict], settings=SETTINGS, samples=(), facts=None) -> Page:
    write(run, rows)
    assert report.write_page(run, settings, facts or {}, samples) == run / "index.html"
    return Page(run / "index.html")


@pytest.fixture
def page(tmp_path) -> Page:
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    images.append(Image.linear_gradient("L").resize((640, 640)))
    names = [("cat", "cat", 0.9), ("dog", "cat", 0.4), ("dog", NASTY, 0.7), (NASTY, NASTY, 0.95)]
    samples = [report.Sample(image, *name) for image, name in zip(images, names, strict=True)]
    settings = SETTINGS | {"model": NASTY, "data": "/data/<i>", "resume": {}}
    settings["augment"] = {"mixup": 0.8, NASTY: [1, "é"]}
    return page_of(tmp_path, ROWS, settings, samples, {"device": f"Some CPU {NASTY}", "time": "1:02:03"})


def test_title_and_tiles(page) -> None:
    assert page.texts("h1") == [f"{NASTY} on <i>"]
    assert page.texts("title") == [f"{NASTY} on <i> · poolformer-kernels"]
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
        "model": NASTY,
        "data": "/data/<i>",
        "lr": "0.001",
        "ema": "null",
        "augment.mixup": "0.8",
        f"augment.{NASTY}": '[1, "é"]',
        "resume": "{}",
        "device": f"Some CPU {NASTY}",
        "time": "1:02:03",
    }


def test_names_are_text_and_nothing_is_requested(page, tmp_path) -> None:
    tags = "html head meta title style body main h1 h2 p section div span b picture source img figure"
    assert {tag for tag, _ in page.elements} <= {*tags.split(), "figcaption", "table", "tr", "td"}
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


def test_pictures_are_those_of_the_run(page, tmp_path) -> None:
    (dark,), (light, *images) = page.attributes("source", "srcset"), page.attributes("img", "src")
    assert page.attributes("source", "media") == ["(prefers-color-scheme: dark)"]
    assert (decoded(light) == pixels(report.draw_curves(tmp_path))).all()
    assert has(decoded(dark), report._DARK["val"])
    sizes = [decoded(image).shape for image in images]
    assert sizes == [(64, 64, 3), (64, 64, 3), (320, 320, 3), (64, 64, 3)]  # the gradient was 640 wide
    for image, colour in ((0, [0, 0, 255]), (1, [0, 128, 0]), (3, [255, 0, 0])):
        assert images[image].startswith("data:image/png")
        assert (decoded(images[image]) == colour).all()
    assert page.attributes("img", "class") == ["curves", "small", "small", None, "small"]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "LA"])
@pytest.mark.parametrize("size", [(28, 28), (200, 100)])
def test_images_of_every_mode(tmp_path, mode: str, size: tuple) -> None:
    image = Image.new("RGB", size, "white").convert(mode)
    page = page_of(tmp_path, [], samples=[report.Sample(image, "a", "a", math.nan)])
    assert (decoded(page.attributes("img", "src")[-1]) >= 250).all()
    assert "nan%" in page.texts("span")


def test_a_page_before_the_first_row_and_before_the_first_epoch(tmp_path) -> None:
    page = page_of(tmp_path, [])
    assert page.texts("p") == ["Nothing is logged yet."]
    assert page.texts("h2") == ["Settings"]
    assert ("span", "top-1: no validation yet") in page.text
    assert page.attributes("img", "src") == []
    page = page_of(tmp_path, [train_row(5)])
    assert page.texts("p") == ["5 steps, 0.5 epochs."]
    assert page.texts("h2") == ["Curves", "Settings"]
    assert page.texts("b") == ["–", "100", "512 MB"]


def test_what_went_wrong_is_said(tmp_path) -> None:
    rows = [train_row(1, 2.0, skipped_steps=1), train_row(20, math.nan, skipped_steps=1200, bad_images=1)]
    page = page_of(tmp_path, [*rows, epoch_row(20, math.inf, 10.0)])
    assert page.texts("p") == [
        "20 steps, 2 epochs. The gradient scaler skipped 1,200 steps. Unreadable and replaced: 1 image."
    ]
    assert ("span", "The loss is not finite in 2 of 3 rows") in page.text


def test_names_that_are_not_utf8(tmp_path) -> None:
    name = os.fsdecode(b"caf\xe9")  # a folder's name in Latin-1
    sample = report.Sample(Image.new("L", (8, 8)), name, name, 0.5)
    page = page_of(tmp_path, [], SETTINGS | {"data": name}, [sample])
    assert page.texts("h1") == ["poolformer_s12 on caf?"]
    assert page.attributes("img", "alt") == ["caf?"]


@pytest.mark.parametrize("missing", ["model", "data"])
def test_a_page_needs_model_and_data(tmp_path, missing: str) -> None:
    with pytest.raises(ValueError, match=f"settings: '{missing}' is missing"):
        page_of(tmp_path, [], SETTINGS | {missing: None})
    assert not (tmp_path / "index.html").exists()
