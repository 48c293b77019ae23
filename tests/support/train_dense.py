"""Runs of the dense tasks: small pictures of discs, options that take seconds, and few regions."""

import shlex
from pathlib import Path

import numpy as np
import pytest

from poolformer_kernels.cli.main import main
from support.dense_data import CATEGORIES, coco_annotation, disc, paint, write_coco
from support.train import train_words

TASKS = ("detection", "instance", "segmentation")
SIDE = 64
_SHARED = (
    "--ema 0.9 --drop-path 0.3 --lr 1e-3 --clip-grad 10 --seed 3 --batch-size 2 --workers 0 --log-every 1"
)
_BOXES = f"--min-size 48 64 --max-size 64 --epochs 2 --warmup-steps 2 {_SHARED}"
_MAPS = f"--scale 64 64 --crop 64 --zero-label class --iterations 7 --validate-every 4 {_SHARED}"
OPTIONS = {  # six training images: three steps an epoch
    "detection": shlex.split(f"--task detection --model retinanet_poolformer_digits {_BOXES}"),
    "instance": shlex.split(f"--task instance --model mask_rcnn_poolformer_digits {_BOXES}"),
    "segmentation": shlex.split(f"--task segmentation --model semantic_fpn_poolformer_digits {_MAPS}"),
}
STEPS = {"detection": 6, "instance": 6, "segmentation": 7}
VALIDATED = {"detection": [3, 6], "instance": [3, 6], "segmentation": [4, 7]}
SCORE = {"detection": "AP", "instance": "mask_AP", "segmentation": "mIoU"}


def _masks(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    masks = [disc(height, width, *rng.integers(14, min(height, width) - 14, 2), 12) for _ in range(count)]
    return np.array(masks, np.uint8).reshape(count, height, width)


def make_discs(
    root: Path, sizes: tuple[tuple[int, int], ...] = ((SIDE, SIDE),), images: int = 6, validation: int = 4
) -> Path:
    """``root/coco`` and ``root/maps``: the same discs as objects and as label maps.

    There are ``images`` of training and four of validation, in the sizes (H, W) in turn; the fourth one
    of validation has no object. Label maps have the classes black, ball and coin.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, folder, count in (("train", "training", images), ("val", "validation", validation)):
        entries, annotations, pixels = [], [], {}
        for kind in ("images", "annotations"):
            (root / "maps" / kind / folder).mkdir(parents=True)
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            masks = _masks(rng, (2, 1, 3, 0)[i % (3 if split == "train" else 4)], height, width)
            entries.append({"id": i + 1, "file_name": f"{i}.png", "height": height, "width": width})
            labels = np.zeros((height, width), np.uint8)
            for n, mask in enumerate(masks):
                category = n % 2
                number = len(annotations) + 1
                annotations.append(coco_annotation(number, i + 1, CATEGORIES[category]["id"], mask))
                labels[mask > 0] = 1 + category
            pixels[f"{i}.png"] = paint(masks)
            Image.fromarray(paint(masks)).save(root / "maps" / "images" / folder / f"{i}.png")
            Image.fromarray(labels).save(root / "maps" / "annotations" / folder / f"{i}.png")
        content = {"images": entries, "annotations": annotations, "categories": CATEGORIES}
        write_coco(root / "coco", split, content, pixels)
    (root / "maps" / "classes.txt").write_text("black\nball\ncoin\n")
    return root


def data_of(root: Path, task: str) -> str:
    return str(root / ("maps" if task == "segmentation" else "coco"))


def task_words(run: Path, root: Path, task: str, *more: str) -> list[str]:
    """Those of `poolformer-kernels` for a run on ``make_discs``."""
    return train_words(run, *OPTIONS[task], *more, data=data_of(root, task))


def run_task(run: Path, root: Path, task: str, *more: str) -> int:
    """A run in this process; its exit code."""
    return main(task_words(run, root, task, *more))


def few_regions(patch: pytest.MonkeyPatch) -> None:
    """Mask R-CNN on fewer regions: with 512 of each image, a step takes a second."""
    from poolformer_kernels.dense.matching import KeyedSampler
    from poolformer_kernels.train import dense_tasks

    made = dense_tasks.create_detector

    def create(*args: object, **options: object) -> object:
        model = made(*args, **options)
        if hasattr(model, "roi_heads"):
            model.roi_heads.fg_bg_sampler = KeyedSampler(24, 0.25)
            model.roi_heads.detections_per_img = 10
            model.rpn._pre_nms_top_n = model.rpn._post_nms_top_n = {"training": 60, "testing": 30}
        return model

    patch.setattr(dense_tasks, "create_detector", create)
