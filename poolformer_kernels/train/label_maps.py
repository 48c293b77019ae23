"""Pictures with a class for every pixel, in folders as ADE20K has them."""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data import BadImageError, Data
from .pictures import read_rgb, reading
from .recipe import RecipeError

__all__ = ["IGNORED", "LabelMapImages", "open_label_maps"]

IGNORED = 255  # the label of pixels that count neither for training nor for scores
ZERO_LABELS = ("ignore", "class")
_FOLDERS = {"train": ("training", "train"), "val": ("validation", "val")}
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # "I" is what older versions of Pillow make of 16 bits


class LabelMapImages:
    """A sequence of (RGB picture, label map); the map is uint8 ``[H, W]``, 255 where a pixel is ignored.

    ``classes`` is how many classes there are. A bad picture, or a map that does not fit it or has a label
    that is no class, raises `BadImageError`.
    """

    def __init__(self, files: list[tuple[Path, Path]], zero_label: str, classes: int) -> None:
        self._files, self._zero_label, self.classes = files, zero_label, classes

    def __len__(self) -> int:
        return len(self._files)

    def file(self, index: int) -> str:
        """The path of a picture."""
        return str(self._files[index][0])

    def __getitem__(self, index: int) -> tuple[Image.Image, Tensor]:
        picture, file = self._files[index]
        labels = _read_map(file)
        image = read_rgb(picture, labels.shape, f"its map {file}")
        return image, torch.from_numpy(self._classes_of(file, labels))

    def _classes_of(self, file: Path, labels: np.ndarray) -> np.ndarray:
        """Labels of a file to classes."""
        first = int(self._zero_label == "ignore")
        largest = _largest(labels)
        if largest >= self.classes + first:
            ignored = "0 and 255, which are ignored" if first else "255, which is ignored"
            raise BadImageError(
                f"label map {file} has the label {largest}; allowed: {first} to {self.classes - 1 + first}"
                f" for {self.classes} classes, and {ignored}"
            )
        found = np.where(labels == IGNORED, IGNORED, labels.astype(np.int64) - first)
        return np.where(found < 0, IGNORED, found).astype(np.uint8)


def _read_map(file: Path) -> np.ndarray:
    """The numbers in a map as they are stored, ``[H, W]``: of a palette image its indices."""
    with reading(file, "label map"), Image.open(file) as image:
        if image.mode not in _MODES:
            raise BadImageError(
                f"label map {file} has mode {image.mode}; allowed: one channel of class numbers (L, P, I;16)"
            )
        numbers = np.array(image)
        if image.mode == "L":
            numbers //= _stretch(file)
    return numbers


def _stretch(file: Path) -> int:
    """What Pillow has multiplied grey values of 2 or 4 bits by, to fill the range up to 255."""
    with open(file, "rb") as opened:
        bits, colour_type = opened.read(26)[24:26]  # of the IHDR chunk, which is the first
    return 1 if colour_type else {2: 85, 4: 17}.get(bits, 1)


def _largest(labels: np.ndarray) -> int:
    """The largest label that is not ignored, or -1."""
    used = labels[labels != IGNORED]
    return int(used.max()) if used.size else -1


# ---- opening -----------------------------------------------------------------------------------------------


def open_label_maps(name: str, zero_label: str) -> Data:
    """The training and validation pictures of a folder as ADE20K's scene parsing challenge has it.

    Args:
        name: a folder with ``images/training``, ``images/validation`` (or ``train``, ``val``) and the same
            under ``annotations`` or ``labels``: a PNG of one channel for each picture, named like it.
            ``objectInfo150.txt`` (ADE20K's table) or ``classes.txt`` (a name a line) names the classes;
            without either all maps are read, and classes are numbered up to the largest label.
        zero_label: ``ignore``: label 0 is no class and classes are counted from label 1, as in ADE20K; or
            ``class``: labels are classes. 255 is ignored in both.

    Returns:
        `Data` of two `LabelMapImages`.

    Raises:
        RecipeError: folders, pictures or maps that are missing, or fewer than two classes.
        BadImageError: a map that cannot be read where all must be, because nothing names the classes.

    Example::

        data = open_label_maps("ADEChallengeData2016", "ignore")
        image, labels = data.val[0]  # labels: uint8 [H, W], 0 to 149, or 255

    Source: mmsegmentation 0.19, ADE20KDataset with ``reduce_zero_label``.
    """
    root = Path(name)
    if zero_label not in ZERO_LABELS:
        raise RecipeError(f"zero_label is {zero_label!r}; allowed: {', '.join(ZERO_LABELS)}")
    if not root.is_dir():
        raise RecipeError(f"DATA {name} is not a folder; allowed: one with images/ and annotations/")
    files = {split: _pairs(root, split) for split in _FOLDERS}
    classes = _names(root, zero_label)
    if classes is None:
        maps = (file for pairs in files.values() for _, file in pairs)
        classes = _numbered(maps, first=int(zero_label == "ignore"))
    largest = IGNORED - int(zero_label == "ignore")
    if not 2 <= len(classes) <= largest:
        uncounted = len(classes) == 1 and zero_label == "ignore"
        hint = "; zero_label class would count label 0 too" if uncounted else ""
        raise RecipeError(f"DATA {name} has {len(classes)} classes; allowed: 2 to {largest}{hint}")
    splits = [LabelMapImages(files[split], zero_label, len(classes)) for split in _FOLDERS]
    return Data(name, *splits, classes)


def _pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """The pictures of a split in the order of their names, each with its map."""
    pictures = _by_stem(_folder(root, ("images",), split), _PICTURES)
    maps = _by_stem(_folder(root, ("annotations", "labels"), split), (".png",))
    for stem, picture in pictures.items():
        if stem not in maps:
            raise RecipeError(f"DATA {root}: image {picture} has no label map {stem}.png")
    for stem, file in maps.items():
        if stem not in pictures:
            raise RecipeError(f"DATA {root}: label map {file} has no image {stem}{'|'.join(_PICTURES[:3])}")
    if not pictures:
        raise RecipeError(f"DATA {root} has no images of {split}; allowed: {' '.join(_PICTURES)}")
    return [(picture, maps[stem]) for stem, picture in pictures.items()]


def _folder(root: Path, parents: tuple[str, ...], split: str) -> Path:
    names = [f"{parent}/{child}" for parent in parents for child in _FOLDERS[split]]
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise RecipeError(f"DATA {root} has no folder for {split}; allowed: {', '.join(names)}")


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files by their path in a folder, without the suffix."""
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in suffixes and file.is_file() and not file.name.startswith("."):
            stem = file.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise RecipeError(f"DATA: {found[stem]} and {file} have the same name but for the suffix")
            found[stem] = file
    return found


# ---- classes -----------------------------------------------------------------------------------------------


def _names(root: Path, zero_label: str) -> list[str] | None:
    """The classes' names that a file gives, if there is one."""
    table, plain = root / "objectInfo150.txt", root / "classes.txt"
    if table.is_file():
        return _table(table, zero_label)
    if not plain.is_file():
        return None
    names = [line.strip() for line in _text(plain).rstrip().splitlines()]
    return _distinct(plain, names)


def _table(file: Path, zero_label: str) -> list[str]:
    """The names of ADE20K's table, which counts from 1: where label 0 is a class it is ``other``."""
    rows = [row for row in csv.reader(_text(file).splitlines(), delimiter="\t") if row]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if not {"idx", "name"} <= set(header):
        raise RecipeError(f"DATA {file} has the columns {header}; allowed: tab separated, with Idx and Name")
    index, name = header.index("idx"), header.index("name")
    names = []
    for number, row in enumerate(rows[1:], start=1):
        if len(row) <= max(index, name) or row[index].strip() != str(number):
            raise RecipeError(f"DATA {file}: row {number} is {row}; allowed: Idx {number} and a Name")
        names.append(row[name].strip())
    return _distinct(file, names if zero_label == "ignore" else ["other", *names])


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"DATA {file}: {getattr(error, 'strerror', None) or 'not a text'}") from None


def _distinct(file: Path, names: list[str]) -> list[str]:
    for line, name in enumerate(names, start=1):
        if not name or name in names[: line - 1]:
            what = f"{name!r} is there twice" if name else "has no name"
            raise RecipeError(f"DATA {file}: class {line} {what}; allowed: a name of its own for each")
    return names


def _numbered(maps: Iterable[Path], first: int) -> list[str]:
    """Numbers for names, up to the largest label of all maps."""
    largest = -1
    for file in maps:
        found = _largest(_read_map(file))
        if found > IGNORED:
            raise BadImageError(f"label map {file} has the label {found}; allowed: 0 to 255")
        largest = max(largest, found)
    return [str(i) for i in range(largest + 1 - first)]
