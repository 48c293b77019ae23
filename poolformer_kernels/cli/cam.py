"""`poolformer-kernels cam`: Grad-CAM of pictures, models side by side, as in the MetaFormer paper's appendix.

Writes into DIR:

- ``index.html``, one self-contained page: a row a picture, a column a model;
- ``PICTURE_MODEL.png``, the map over the picture as the model sees it;
- with ``--json`` ``cam.json`` (or another file): ``schema`` 1; ``models``, each with ``label``, ``weights``,
  ``layer``, ``image_size``, ``classes`` (their number); ``images``, each with ``file`` and ``maps``, one a
  model, each with ``model`` (its label), ``file`` (the PNG), ``predicted`` and ``target`` (``index``,
  ``name``, ``probability``) and ``zero`` (nothing speaks for the class, so the map is zero).
"""

import argparse
import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from ..drawing import png
from ..gradcam import grad_cam
from .cam_models import Column, load, requests
from .cam_page import MARK, Answer, Figure, overlay, render
from .errors import CommandError
from .files import check_writable, make_folder, write_whole
from .photos import load_photo, normalise

__all__ = ["run"]

PAGE = "index.html"


def run(args: argparse.Namespace) -> int:
    """The command. Returns 0."""
    target = _target(args.target)
    names = None if args.classes is None else _lines(args.classes)
    wanted = requests(args)
    device = _device(args.device)
    out = Path(args.out)
    json_file = _json_file(args.json, out)
    _check_out(out, args.images)
    check_writable(json_file, out)
    photos = [load_photo(path, "IMAGE") for path in args.images]
    columns = [load(request, args.image_size) for request in wanted]
    for column in columns:
        _check_classes(column, names, args.classes, target)
    _tell_apart(columns)

    for column in columns:
        column.model.to(device)
    rows = [[_figure(column, photo, target, device) for column in columns] for photo in photos]
    titles = [Path(path).name for path in args.images]
    pictures = [columns[0].prepared(photo) for photo in photos]
    table, warnings = [_facts(column) for column in columns], _warnings(columns)
    page = render(list(zip(titles, pictures, rows, strict=True)), table, warnings)
    files = _names(args.images, columns)
    make_folder(out)
    try:
        for figures, row in zip(rows, files, strict=True):
            for figure, file in zip(figures, row, strict=True):
                write_whole(out / file, png(figure.image))
        write_whole(out / PAGE, page)
        if json_file is not None:
            result = _result(args.images, columns, rows, files)
            write_whole(json_file, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise CommandError(f"cannot write to {error.filename or out}: {error.strerror or error}") from None
    _print(titles, rows)
    for warning in warnings:
        print(f"{warning} --checkpoint FILE gives a trained model.")
    print(f"report: {out / PAGE}")
    return 0


# ---- what is asked for -------------------------------------------------------------------------------------


def _target(text: str) -> int | None:
    """A class index, or None for the one that each model predicts."""
    if text == "predicted":
        return None
    if not text.isdecimal():
        raise CommandError(f"--target is {text!r}; allowed: a class index from 0, or predicted")
    return int(text)


def _lines(path: str) -> list[str]:
    """The lines of a text file, without empty ones at its end."""
    try:
        return Path(path).read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--classes {path}: {getattr(error, 'strerror', None) or error}") from None


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no CUDA device; allowed here: cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _json_file(given: str | None, out: Path) -> Path | None:
    """Where --json writes; only to names of JSON files, so that a picture behind the option is not lost."""
    if given is None:
        return None
    if given and Path(given).suffix != ".json":
        raise CommandError(f"--json {given}: allowed: a FILE that ends in .json, or none for DIR/cam.json")
    return Path(given) if given else out / "cam.json"


def _check_out(out: Path, images: list[str]) -> None:
    """A folder with other content is left alone; one that this command made is written to again."""
    if not out.exists():
        return
    if not out.is_dir():
        raise CommandError(f"--out {out} is a file; allowed: a folder")
    page = out / PAGE
    made_here = page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")
    if not made_here and any(out.iterdir()):
        raise CommandError(
            f"--out {out} holds files of another origin; allowed: a new or empty folder, or one that cam made"
        )
    inside = [path for path in images if Path(path).resolve().parent == out.resolve()]
    if inside:
        raise CommandError(f"IMAGE {inside[0]} lies in --out {out}, where it could be overwritten; move one")


def _check_classes(column: Column, names: list[str] | None, file: str | None, target: int | None) -> None:
    """The names of --classes for a model, whose file may have its own; and --target within its classes."""
    if names is not None and column.classes is None:
        if len(names) != column.num_classes:
            raise CommandError(
                f"--classes {file} has {len(names)} lines; {column.label} has {column.num_classes} classes"
            )
        column.classes = names
    if target is not None and target >= column.num_classes:
        raise CommandError(
            f"--target is {target}; allowed: 0 to {column.num_classes - 1}, the classes of {column.label}"
        )


def _tell_apart(columns: list[Column]) -> None:
    """Models of one name are told apart by their files, and where these have one name too, by numbers."""
    labels = [column.label for column in columns]
    for column in columns:
        if labels.count(column.label) > 1:
            column.label = f"{column.label} ({Path(column.weights).stem})"
    for column, label in zip(columns, _distinct([c.label for c in columns]), strict=True):
        column.label = label


def _distinct(texts: list[str]) -> list[str]:
    """The texts, those that were there before with a number behind them."""
    found: list[str] = []
    for text in texts:
        numbered = (text if i == 1 else f"{text}-{i}" for i in itertools.count(1))
        found.append(next(candidate for candidate in numbered if candidate not in found))
    return found


def _names(images: list[str], columns: list[Column]) -> list[list[str]]:
    """The names of the PNGs: a list for each picture, one a model."""
    stems = _distinct([Path(path).stem for path in images])
    labels = _distinct([re.sub(r"[^\w.-]+", "-", column.label).strip("-") for column in columns])
    return [[f"{stem}_{label}.png" for label in labels] for stem in stems]


# ---- the maps ----------------------------------------------------------------------------------------------


def _figure(column: Column, photo: Image.Image, target: int | None, device: torch.device) -> Figure:
    image = column.prepared(photo)
    x = normalise(image, column.mean, column.std).unsqueeze(0).to(device)
    try:
        with torch.inference_mode():
            probabilities = column.model(x)[0].float().softmax(0)
        best = int(probabilities.argmax())
        explained = best if target is None else target
        cam = grad_cam(column.model, x, explained)[0, 0]
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:  # timm's models assert sizes
        raise CommandError(f"{column.label} at {column.size} pixels (--image-size): {error}") from None
    if not probabilities.isfinite().all() or not cam.isfinite().all():
        raise CommandError(f"{column.label}: its result is not finite; are these its weights?")

    def answer(index: int) -> Answer:
        return Answer(index, column.name_of(index), float(probabilities[index]))

    zero = not bool(cam.any())
    return Figure(column.label, overlay(image, cam), answer(best), answer(explained), zero)


# ---- what is written ---------------------------------------------------------------------------------------


def _facts(column: Column) -> dict[str, str]:
    return {
        "model": column.label,
        "weights": column.weights,
        "layer": column.layer,
        "pixels": str(column.size),
        "classes": str(column.num_classes),
    }


def _warnings(columns: list[Column]) -> list[str]:
    labels = [column.label for column in columns if column.random]
    return labels and [
        f"The weights of {', '.join(labels)} are random: these maps and classes say nothing about the"
        " pictures."
    ]


def _result(
    images: list[str], columns: list[Column], rows: list[list[Figure]], files: list[list[str]]
) -> dict:
    models = [
        {
            "label": column.label,
            "weights": column.weights,
            "layer": column.layer,
            "image_size": column.size,
            "classes": column.num_classes,
        }
        for column in columns
    ]
    found = [
        {
            "file": path,
            "maps": [
                {
                    "model": figure.model,
                    "file": file,
                    "predicted": asdict(figure.predicted),
                    "target": asdict(figure.target),
                    "zero": figure.zero,
                }
                for figure, file in zip(figures, row, strict=True)
            ],
        }
        for path, figures, row in zip(images, rows, files, strict=True)
    ]
    return {"schema": 1, "models": models, "images": found}


def _print(titles: list[str], rows: list[list[Figure]]) -> None:
    for title, figures in zip(titles, rows, strict=True):
        for figure in figures:
            answer = f"{figure.predicted.name} ({figure.predicted.probability:.1%})"
            zero = "; nothing speaks for it, the map is zero" if figure.zero else ""
            print(f"{title}  {figure.model}: {answer}{zero}")
