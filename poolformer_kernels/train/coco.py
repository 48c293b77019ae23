"""Pictures with boxes and masks of objects, in COCO's format."""

import json
import math
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data import Data
from .pictures import read_rgb
from .recipe import RecipeError

__all__ = ["CocoImages", "Instances", "mask_functions", "open_coco"]

MIN_SIDE = 32  # pixels; smaller training pictures are left out
_LAYOUTS = (("instances_{}2017.json", "{}2017"), ("instances_{}.json", "{}"), ("{}.json", "{}"))


@dataclass
class Instances:
    """The objects of one picture.

    ``boxes``: float32 ``[N, 4]``, x1, y1, x2, y2 in pixels. ``labels``: int64 ``[N]``, from 0, in the order
    of the category ids. ``masks``: uint8 ``[N, H, W]`` of 0 and 1, or None where none were asked for.
    ``size``: (H, W), the picture's.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None
    size: tuple[int, int]


def mask_functions() -> ModuleType:
    """faster-coco-eval's functions of run-length encoded masks.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        raise RecipeError(
            "COCO's masks and metrics need faster-coco-eval: pip install 'poolformer_kernels[dense]'"
        ) from None
    return mask


# ---- what is kept of the annotations -----------------------------------------------------------------------


@dataclass
class _Record:
    """A picture and its usable annotations."""

    image_id: int
    file: str
    size: tuple[int, int]
    boxes: list[tuple[float, float, float, float]]
    labels: list[int]
    segmentations: list | None


class _Packed(Sequence):
    """Records in one buffer: workers that are forked share it, as they would not share Python objects, whose
    counts of references are written whenever they are read."""

    def __init__(self, records: Iterable[_Record]) -> None:
        parts = [np.frombuffer(pickle.dumps(record), np.uint8) for record in records]
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._bytes = np.concatenate(parts) if parts else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> _Record:
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return pickle.loads(self._bytes[start : self._ends[index]])


class CocoImages:
    """A sequence of (RGB picture, `Instances`); an unreadable picture raises `BadImageError`.

    ``annotations`` is the JSON file, ``category_ids`` has the category id of each label, and ``masks`` says
    whether masks are read.
    """

    def __init__(
        self, annotations: Path, folder: Path, records: list[_Record], category_ids: list[int], masks: bool
    ) -> None:
        self.annotations, self.category_ids, self.masks = annotations, category_ids, masks
        self._folder, self._records = folder, _Packed(records)

    def __len__(self) -> int:
        return len(self._records)

    def file(self, index: int) -> str:
        """The path of a picture."""
        return str(self._folder / self._records[index].file)

    def image_id(self, index: int) -> int:
        """The id that the JSON file gives a picture."""
        return self._records[index].image_id

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a picture in pixels."""
        return self._records[index].size

    def __getitem__(self, index: int) -> tuple[Image.Image, Instances]:
        record = self._records[index]
        image = read_rgb(self._folder / record.file, record.size, str(self.annotations))
        boxes = torch.tensor(record.boxes, dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor(record.labels, dtype=torch.int64)
        masks = _bitmaps(record.segmentations, *record.size) if self.masks else None
        return image, Instances(boxes, labels, masks, record.size)


def _bitmaps(segmentations: list, height: int, width: int) -> Tensor:
    """Masks as uint8 ``[N, H, W]``."""
    found = np.zeros((len(segmentations), height, width), np.uint8)
    functions = mask_functions()
    for i, segmentation in enumerate(segmentations):
        found[i] = functions.decode(_run_lengths(segmentation, height, width))
    return torch.from_numpy(found)


def _run_lengths(segmentation: list | dict, height: int, width: int) -> dict:
    """A mask as compressed run lengths, from polygons or either kind of run lengths."""
    functions = mask_functions()
    if isinstance(segmentation, list):
        return functions.merge(functions.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return functions.frPyObjects(segmentation, height, width)
    return segmentation


# ---- opening -----------------------------------------------------------------------------------------------


def open_coco(name: str, masks: bool) -> Data:
    """The training and validation pictures of a folder in COCO's layout.

    Of training pictures those are left out that have no usable annotation or a side below 32 pixels, as
    mmdetection does. An annotation is no target where it is a crowd, to be ignored, of an unknown category,
    of no area, less than a pixel wide or high, or outside of the picture. Boxes are clipped to the picture.
    All validation pictures are kept; their evaluation takes the truth, crowds included, from the JSON file.

    Args:
        name: a folder with ``annotations/instances_train2017.json``, ``instances_val2017.json``,
            ``train2017/`` and ``val2017/``; or without the year; or with ``annotations/train.json``,
            ``annotations/val.json``, ``train/`` and ``val/``.
        masks: whether the annotations' masks are read: polygons or run lengths.

    Returns:
        `Data` of two `CocoImages`; ``classes`` are the categories' names in the order of their ids.

    Raises:
        RecipeError: files that are missing or malformed, or categories that differ; the message names the
            file and where there is one the image and the annotation.

    Example::

        data = open_coco("coco", masks=True)
        image, instances = data.train[0]
        instances.boxes, instances.masks  # float32 [N, 4], uint8 [N, H, W]

    Source: https://cocodataset.org/#format-data; mmdetection 2.19, CocoDataset.
    """
    root = Path(name)
    if not root.is_dir():
        raise RecipeError(f"DATA {name} is not a folder; allowed: one in COCO's layout, with annotations/")
    if masks:
        mask_functions()
    found, categories = {}, {}
    for split in ("train", "val"):
        file, folder = _place(root, split)
        found[split], categories[split] = _open_split(file, folder, masks, training=split == "train")
    _check_agreement(name, categories["train"], categories["val"])
    return Data(name, found["train"], found["val"], list(categories["train"].values()))


def _place(root: Path, split: str) -> tuple[Path, Path]:
    """The JSON file of a split and the folder of its pictures."""
    for json_name, folder_name in _LAYOUTS:
        file, folder = root / "annotations" / json_name.format(split), root / folder_name.format(split)
        if file.is_file():
            if not folder.is_dir():
                raise RecipeError(f"DATA {root} has {file.name} but no folder {folder.name}/ of its images")
            return file, folder
    names = ", ".join(json_name.format(split) for json_name, _ in _LAYOUTS)
    raise RecipeError(f"DATA {root} has no annotations of {split}; allowed in annotations/: {names}")


def _open_split(file: Path, folder: Path, masks: bool, training: bool) -> tuple[CocoImages, dict[int, str]]:
    content = _read(file)
    categories = _categories(file, content["categories"])
    records = _records(file, content["images"], masks)
    labels = {category_id: label for label, category_id in enumerate(categories)}
    seen: set[int] = set()
    for annotation in content["annotations"]:
        _check_annotation(file, annotation, records, seen)
        record = records[annotation["image_id"]]
        box = _usable_box(annotation, record.size, labels)
        if masks and (box is not None or not training):
            problem = _segmentation_problem(annotation.get("segmentation"), *record.size)
            if problem:
                raise _annotation_error(file, annotation, record, f"segmentation {problem}")
        if box is not None:
            record.boxes.append(box)
            record.labels.append(labels[annotation["category_id"]])
            if masks:
                record.segmentations.append(annotation["segmentation"])
    kept = list(records.values())
    if training:
        kept = [record for record in kept if record.boxes and min(record.size) >= MIN_SIDE]
    if not kept:
        usable = f" of at least {MIN_SIDE} pixels a side with a usable annotation" if training else ""
        raise RecipeError(f"DATA {file} has no image{usable}")
    return CocoImages(file, folder, kept, list(categories), masks), categories


def _check_agreement(name: str, train: dict[int, str], val: dict[int, str]) -> None:
    if train == val:
        return
    category_id = min(i for i in train.keys() | val.keys() if train.get(i) != val.get(i))
    words = [
        f"{found[category_id]!r} in {split}" if category_id in found else f"missing in {split}"
        for split, found in (("train", train), ("val", val))
    ]
    raise RecipeError(
        f"DATA {name}: categories of train and val differ: id {category_id} is {', '.join(words)}"
    )


# ---- checks ------------------------------------------------------------------------------------------------


def _read(file: Path) -> dict[str, list[dict]]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise RecipeError(f"DATA {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"DATA {file} is not JSON: {error}") from None
    for part in ("images", "annotations", "categories"):
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise RecipeError(f"DATA {file} has no list {part!r} of objects, as COCO's format demands")
    return content


def _categories(file: Path, entries: list[dict]) -> dict[int, str]:
    """Category ids in their order, to names."""
    found: dict[int, str] = {}
    for entry in entries:
        if type(entry.get("id")) is not int or not isinstance(entry.get("name"), str):
            raise RecipeError(f"DATA {file}: category {entry!r}; allowed: an integer id and a name")
        if entry["id"] in found:
            raise RecipeError(f"DATA {file}: category id {entry['id']} is there twice")
        found[entry["id"]] = entry["name"]
    if not found:
        raise RecipeError(f"DATA {file} has no categories; allowed: at least one")
    return dict(sorted(found.items()))


def _records(file: Path, entries: list[dict], masks: bool) -> dict[int, _Record]:
    """A record without annotations for each picture, by image id."""
    found: dict[int, _Record] = {}
    for entry in entries:
        image_id, name = entry.get("id"), entry.get("file_name")
        if type(image_id) is not int:
            raise RecipeError(f"DATA {file}: image {name}: id is {image_id!r}; allowed: an integer")
        if image_id in found:
            raise RecipeError(f"DATA {file}: image id {image_id} is there twice")
        if not isinstance(name, str) or not name:
            raise RecipeError(f"DATA {file}: image {image_id}: file_name is {name!r}; allowed: a file's name")
        size = (entry.get("height"), entry.get("width"))
        if not all(type(side) is int and side > 0 for side in size):
            raise RecipeError(
                f"DATA {file}: image {image_id} ({name}): height, width are {size[0]!r}, {size[1]!r};"
                " allowed: positive integers"
            )
        found[image_id] = _Record(image_id, name, size, [], [], [] if masks else None)
    return found


def _check_annotation(file: Path, annotation: dict, records: dict[int, _Record], seen: set[int]) -> None:
    """The fields that every annotation must have, whether or not it becomes a target."""
    own_id, image_id = annotation.get("id"), annotation.get("image_id")
    if type(own_id) is not int:
        raise RecipeError(
            f"DATA {file}: annotation of image {image_id!r}: id is {own_id!r}; allowed: an integer"
        )
    if type(image_id) is not int or image_id not in records:
        raise RecipeError(f"DATA {file}: annotation {own_id}: image_id {image_id!r} is of no image")
    record = records[image_id]
    if own_id in seen:
        raise _annotation_error(file, annotation, record, "its id is there twice")
    seen.add(own_id)
    bbox, area, category = (annotation.get(field) for field in ("bbox", "area", "category_id"))
    if not isinstance(bbox, list) or len(bbox) != 4 or not _finite(bbox):
        raise _annotation_error(file, annotation, record, f"bbox is {bbox!r}; allowed: four finite numbers")
    if not _finite([area]):
        raise _annotation_error(file, annotation, record, f"area is {area!r}; allowed: a finite number")
    if type(category) is not int:
        raise _annotation_error(file, annotation, record, f"category_id is {category!r}; allowed: an integer")
    for flag in ("iscrowd", "ignore"):
        if annotation.get(flag, 0) not in (0, 1):
            raise _annotation_error(
                file, annotation, record, f"{flag} is {annotation[flag]!r}; allowed: 0, 1"
            )


def _annotation_error(file: Path, annotation: dict, record: _Record, problem: str) -> RecipeError:
    return RecipeError(
        f"DATA {file}: annotation {annotation['id']} of image {record.image_id} ({record.file}): {problem}"
    )


def _finite(values: list) -> bool:
    """Whether all are numbers, and finite ones."""
    try:
        return set(map(type, values)) <= {int, float} and math.isfinite(sum(values))
    except OverflowError:  # an integer that no float holds
        return False


def _usable_box(annotation: dict, size: tuple[int, int], labels: dict[int, int]) -> tuple | None:
    """The clipped box x1, y1, x2, y2 of a training target, or None."""
    x, y, width, height = annotation["bbox"]
    if annotation.get("iscrowd") or annotation.get("ignore") or annotation["category_id"] not in labels:
        return None
    if annotation["area"] <= 0 or width < 1 or height < 1:
        return None
    x1, x2 = (float(np.float32(min(max(v, 0), size[1]))) for v in (x, x + width))
    y1, y2 = (float(np.float32(min(max(v, 0), size[0]))) for v in (y, y + height))
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def _segmentation_problem(segmentation: object, height: int, width: int) -> str | None:
    """What is wrong with a mask's description, or None."""
    if isinstance(segmentation, list) and segmentation:
        for polygon in segmentation:
            if not isinstance(polygon, list) or not _finite(polygon):
                return "has a polygon that is no list of finite numbers"
            if len(polygon) < 6 or len(polygon) % 2:
                return f"has a polygon of {len(polygon)} numbers; allowed: an even number from 6 on"
        return None
    if not isinstance(segmentation, dict):
        return f"is {segmentation!r}; allowed: polygons or run lengths"
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return (
            f"has run lengths of size {segmentation.get('size')}; allowed: the image's, [{height}, {width}]"
        )
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
            return f"has run lengths that are not integers with the sum {height * width}, the image's pixels"
        return None
    if not isinstance(counts, str):
        return f"has counts of type {type(counts).__name__}; allowed: a list, or a text that compresses it"
    try:
        mask_functions().decode(segmentation)
    except (ValueError, RuntimeError) as error:
        return f"has compressed run lengths that cannot be read: {' '.join(str(error).split())}"
    return None
