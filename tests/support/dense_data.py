"""Data sets in COCO's and ADE20K's layouts, made here: discs of one colour each on black."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from support.peers import require
from support.train import require_train

Disc = tuple[int, int, int]  # x and y of the centre, radius


def require_dense_data() -> None:
    """What reading and scoring COCO's format needs, or a skip where it is not installed."""
    require_train()
    require("faster_coco_eval")


def disc(height: int, width: int, x: int, y: int, radius: int) -> np.ndarray:
    """A mask, uint8 ``[H, W]``."""
    rows, columns = np.mgrid[:height, :width]
    return ((columns - x) ** 2 + (rows - y) ** 2 <= radius**2).astype(np.uint8)


def paint(masks: np.ndarray) -> np.ndarray:
    """A picture, uint8 ``[H, W, 3]``, of at most three masks ``[N, H, W]``: red, green and blue on black."""
    assert len(masks) <= 3
    pixels = np.zeros((*masks.shape[1:], 3), np.uint8)
    for i, mask in enumerate(masks):
        pixels[..., i] = 255 * mask
    return pixels


def box_of(mask: np.ndarray | torch.Tensor) -> list[int]:
    """The box x1, y1, x2, y2 around a mask's pixels."""
    rows, columns = np.nonzero(np.asarray(mask))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths, column by column, beginning with zeros."""
    bits = np.concatenate([[0], mask.flatten(order="F"), [0]])
    changes = np.flatnonzero(np.diff(bits))
    ends = np.concatenate([[0], changes, [mask.size]])
    return {"size": list(mask.shape), "counts": np.diff(ends).tolist()}


def coco_annotation(number: int, image_id: int, category: int, mask: np.ndarray, **fields: object) -> dict:
    """An annotation of a mask, in run lengths."""
    x1, y1, x2, y2 = map(int, box_of(mask))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": run_lengths(mask),
        **fields,
    }


def write_coco(root: Path, split: str, content: dict, pixels: dict[str, np.ndarray], year: str = "") -> Path:
    """A split's JSON file and pictures; the JSON file's path."""
    from PIL import Image

    for folder in (root / "annotations", root / f"{split}{year}"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, values in pixels.items():
        Image.fromarray(values).save(root / f"{split}{year}" / name)
    file = root / "annotations" / f"instances_{split}{year}.json"
    file.write_text(json.dumps(content))
    return file


CATEGORIES = [{"id": 9, "name": "ball"}, {"id": 4, "name": "coin"}]
DISCS = [(20, 22, 12), (60, 30, 20), (45, 62, 9)]
SIZE = (80, 96)  # height, width


def scene(image_id: int = 7, name: str = "a.png", first: int = 1) -> tuple[dict, list[dict], np.ndarray]:
    """(image entry, annotations, pixels) of three discs of two categories."""
    masks = np.stack([disc(*SIZE, *place) for place in DISCS])
    annotations = [coco_annotation(first + i, image_id, (9, 4, 9)[i], mask) for i, mask in enumerate(masks)]
    image = {"id": image_id, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
    return image, annotations, paint(masks)


def content(images: list[dict], annotations: list[dict]) -> dict:
    """A JSON file's, as a copy that may be changed."""
    return json.loads(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))


def make_coco(root: Path, year: str = "") -> Path:
    """train and val with one scene each."""
    for split in ("train", "val"):
        image, annotations, pixels = scene()
        write_coco(root, split, content([image], annotations), {"a.png": pixels}, year)
    return root


def edit_coco(root: Path, change: Callable[[dict], object], split: str = "train") -> Path:
    """Changes a split's JSON file in place, or puts what ``change`` returns there; the root."""
    file = root / "annotations" / f"instances_{split}.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(change(found) or found))
    return root
