"""A real image with 125 labelled cell nuclei: three quadrants to train on, the fourth to validate on.

Fluorescence microscopy, 512 x 512, of BBBC038 (Data Science Bowl 2018, CC0), as the package stardist carries
it. Its files are read; the package is not imported, so that it may be installed without its dependencies.
"""

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from .coco import mask_functions, open_coco
from .data import Data
from .label_maps import open_label_maps
from .recipe import RecipeError

__all__ = ["CLASSES", "coco_nuclei", "label_map_nuclei", "nuclei"]

CLASSES = ["nucleus"]
_FOLDERS: list[tempfile.TemporaryDirectory] = []  # they live as long as the process
_LEAST = 16  # pixels: what a quadrant's edge leaves of a nucleus below that is no object


def nuclei() -> tuple[np.ndarray, np.ndarray]:
    """(image, labels): uint8 ``[512, 512]``, its extreme pixels cut off; int32, 0 is background.

    Raises:
        RecipeError: the package is not installed, or has no such files.
    """
    found = find_spec("stardist")
    folder = Path(found.submodule_search_locations[0]) / "data" / "images" if found else Path("stardist")
    files = folder / "img2d.tif", folder / "mask2d.tif"
    if not all(file.is_file() for file in files):
        raise RecipeError(
            "DATA is sample:nuclei, which the package stardist carries: pip install --no-deps stardist"
        )
    image, labels = (np.asarray(Image.open(file)) for file in files)
    low, high = np.percentile(image, (1, 99.8))
    scaled = np.clip((image - low) / (high - low), 0, 1)
    return np.uint8(np.round(255 * scaled)), labels.astype(np.int32)


def quadrants(array: np.ndarray) -> list[np.ndarray]:
    """The four quarters of an image, row by row."""
    height, width = (side // 2 for side in array.shape)
    return [array[y : y + height, x : x + width] for y in (0, height) for x in (0, width)]


def coco_nuclei(masks: bool) -> Data:
    """The nuclei in COCO's format, in a temporary folder: for detection and, with masks, instances.

    Raises:
        RecipeError: see `nuclei`; no faster-coco-eval.
    """
    image, labels = nuclei()
    folder = _folder()
    parts = list(zip(quadrants(image), quadrants(labels), strict=True))
    for split, numbers in (("train", (0, 1, 2)), ("val", (3,))):
        (folder / split).mkdir()
        images, annotations = [], []
        for i in numbers:
            pixels, objects = parts[i]
            height, width = pixels.shape
            images.append({"id": i + 1, "file_name": f"{i}.png", "height": height, "width": width})
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
            for number in np.unique(objects)[1:]:
                found = _annotation(objects == number)
                if found["area"] >= _LEAST:
                    annotations.append({"id": len(annotations) + 1, "image_id": i + 1, **found})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": CLASSES[0]}],
        }
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    data = open_coco(str(folder), masks)
    data.name = "sample:nuclei"
    return data


def _annotation(mask: np.ndarray) -> dict[str, object]:
    ys, xs = mask.nonzero()
    left, top = int(xs.min()), int(ys.min())
    box = [left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top]
    lengths = mask_functions().encode(np.asfortranarray(mask.astype(np.uint8)))
    segmentation = {"size": lengths["size"], "counts": lengths["counts"].decode()}
    return {
        "category_id": 1,
        "bbox": box,
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def label_map_nuclei() -> Data:
    """The nuclei as label maps, in a temporary folder: background is a class.

    Raises:
        RecipeError: see `nuclei`.
    """
    image, labels = nuclei()
    folder = _folder()
    (folder / "classes.txt").write_text("background\nnucleus\n")
    parts = zip(quadrants(image), quadrants(labels), strict=True)
    for i, (pixels, objects) in enumerate(parts):
        split = "validation" if i == 3 else "training"
        for kind, values in (("images", pixels), ("annotations", np.uint8(objects > 0))):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / kind / split / f"{i}.png")
    data = open_label_maps(str(folder), "class")
    data.name = "sample:nuclei"
    return data


def _folder() -> Path:
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="nuclei-"))
    return Path(_FOLDERS[-1].name)
