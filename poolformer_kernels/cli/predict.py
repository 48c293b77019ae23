"""What a checkpoint finds in pictures: `poolformer-kernels predict IMAGE… --checkpoint FILE`.

``DIR/predictions.json`` (and ``--json``)::

    schema   1
    command  "poolformer-kernels predict"
    files    [name]: all that the command wrote into DIR
    model    {task: "detection" | "instance segmentation" | "segmentation" | "classification", name,
               checkpoint, names_of: the source of the file's keys, classes: their number,
               image_size: [shorter, longer], score: the lowest one or null, precision, device}
    images   [{image: the path that was given, size: [width, height] (upright), picture: the file in DIR,
               detections: [{label, name, score, box: [x1, y1, x2, y2] in pixels of the picture,
                             mask: {size: [height, width], counts: [...]}}], best first, or
               classes: [{label, name, pixels, share}], the largest first, and label_map: the PNG in DIR
                        whose pixels are labels, or
               top: [{label, name, probability}], the five best}]

A label is the class's number from 0, as the model has it. A mask is in COCO's uncompressed run-length code.
"""

import argparse
import json
from pathlib import Path

import torch

from ..drawing import png
from .errors import CommandError
from .files import check_readable, check_writable, write_whole
from .photos import load_photo
from .predict_page import render, section
from .predictors import Prediction, Predictor, open_predictor

__all__ = ["run"]

_COMMAND = "poolformer-kernels predict"
_JSON, _PAGE = "predictions.json", "index.html"


def run(args: argparse.Namespace) -> int:
    """The command. Returns 0."""
    device = _device(args.device)
    if args.image_size is not None and args.image_size[0] > args.image_size[1]:
        smaller, larger = args.image_size
        raise CommandError(f"--image-size {smaller} {larger}: allowed: MIN at most MAX")
    check_readable("--checkpoint", args.checkpoint)
    names = _read_names(args.classes)
    paths = [Path(image) for image in args.images]
    out = Path(args.out)
    before = _own_files(out)
    outputs = _outputs(paths)
    written = {name for pair in outputs for name in pair} | {_JSON, _PAGE}
    inputs = [*args.images, args.checkpoint, *([args.classes] if args.classes else [])]
    _check_inputs(out, args.json, inputs)
    check_writable(args.json, args.out)
    for path in paths:
        load_photo(path, "IMAGE")
    predictor = open_predictor(args, names, device)
    kept = before | written | _inside(out, args.json)
    _write_json(out / _JSON, _document(predictor, kept, []))  # so that a later run knows what is ours
    images, sections = [], []
    for path, (picture, label_map) in zip(paths, outputs, strict=True):
        photo = load_photo(path, "IMAGE")
        prediction = predictor.find(photo)
        images.append(_save(prediction, path, photo.size, out, picture, label_map))
        sections.append(section(path.name, prediction.picture, images[-1]))
        print(f"{path}: {prediction.summary} -> {out / picture}")
    files = {
        _JSON,
        _PAGE,
        *(image[key] for image in images for key in ("picture", "label_map") if key in image),
    }
    document = _document(predictor, files | _inside(out, args.json), images)
    write_whole(out / _PAGE, render(predictor.facts, sections))
    for name in before - files - _inside(out, args.json):
        (out / name).unlink(missing_ok=True)  # pictures of an earlier run
    _write_json(out / _JSON, document)
    if args.json:
        _write_json(Path(args.json), document)
    print(f"written {out / _PAGE}")
    return 0


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no CUDA device; allowed here: cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _read_names(file: str | None) -> list[str] | None:
    if file is None:
        return None
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--classes {file}: {getattr(error, 'strerror', None) or error}") from None
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if "" in names or not names:
        where = f"line {names.index('') + 1} is empty" if names else "it is empty"
        raise CommandError(f"--classes {file}: {where}; allowed: one name a line")
    return names


# ---- the folder --------------------------------------------------------------------------------------------


def _own_files(out: Path) -> set[str]:
    """The names of what an earlier run left in the folder.

    Raises:
        CommandError: something else is there, too.
    """
    if not out.exists():
        return set()
    if not out.is_dir():
        raise CommandError(f"--out {out} is not a folder")
    try:
        present = {path.name for path in out.iterdir()}
        noted = json.loads((out / _JSON).read_text(encoding="utf-8")) if _JSON in present else {}
    except OSError as error:
        raise CommandError(f"--out {out}: {error.strerror or error}") from None
    except ValueError:
        noted = {}
    ours = (
        isinstance(noted, dict) and noted.get("command") == _COMMAND and isinstance(noted.get("files"), list)
    )
    own = present & {name for name in noted["files"] if isinstance(name, str)} if ours else set()
    foreign = sorted(present - own)
    if foreign:
        raise CommandError(f"--out {out} holds {foreign[0]!r}; allowed: a new folder, or one of this command")
    return own


def _outputs(paths: list[Path]) -> list[tuple[str, str]]:
    """(picture, label map) of each image, no name twice, also where upper and lower case are the same."""
    used: set[str] = set()
    names = []
    for path in paths:
        stem, number = path.stem, 1
        while True:
            base = stem if number == 1 else f"{stem}-{number}"
            pair = f"{base}.png", f"{base}.labels.png"
            if not used & {name.casefold() for name in pair}:
                break
            number += 1
        used |= {name.casefold() for name in pair}
        names.append(pair)
    return names


def _check_inputs(out: Path, json_file: str | None, inputs: list[str]) -> None:
    """Nothing that is read may be overwritten, or removed as an earlier run's."""
    for path in inputs:
        if json_file and Path(json_file).resolve() == Path(path).resolve():
            raise CommandError(f"--json {json_file} is the input {path}; allowed: another file")
        if Path(path).resolve().parent == out.resolve():
            raise CommandError(f"--out {out} holds the input {path}; allowed: another folder")


def _inside(out: Path, file: str | None) -> set[str]:
    """The name of a file that lies in the folder."""
    return {Path(file).name} if file and Path(file).resolve().parent == out.resolve() else set()


def _save(
    prediction: Prediction, path: Path, size: tuple[int, int], out: Path, picture: str, label_map: str
) -> dict:
    """Writes the files of an image; returns its entry in the JSON."""
    entry = {"image": str(path), "size": list(size), "picture": picture, **prediction.record}
    write_whole(out / picture, png(prediction.picture))
    if prediction.label_map is not None:
        write_whole(out / label_map, png(prediction.label_map))
        entry["label_map"] = label_map
    return entry


def _document(predictor: Predictor, files: set[str], images: list[dict]) -> dict:
    head = {"schema": 1, "command": _COMMAND, "files": sorted(files)}
    return {**head, "model": predictor.facts, "images": images}


def _write_json(path: Path, document: dict) -> None:
    write_whole(path, json.dumps(document, ensure_ascii=False, indent=1))
