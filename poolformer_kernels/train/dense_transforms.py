"""Augmentation for detection and semantic segmentation: a picture and its targets move together.

Every transform is a pure function of the picture, the target and a seed. Nothing is drawn from, or left in,
the global generators, so a sample does not depend on workers, processes or where a run was interrupted.
"""

import random
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Mask

from ..dense.images import resized
from .coco import Instances
from .label_maps import IGNORED
from .recipe import RecipeError

__all__ = [
    "DetectionTransform",
    "SegmentationTransform",
    "as_tensor",
    "photometric_distortion",
]

Colour = tuple[float, float, float]


def as_tensor(image: Image.Image) -> Tensor:
    """A picture as float32 ``[3, H, W]`` from 0 to 1."""
    return F.to_dtype(F.to_image(image), torch.float32, scale=True).as_subclass(Tensor)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear without antialiasing, as OpenCV does it for the official code."""
    return F.resize(x, list(size), InterpolationMode.BILINEAR, antialias=False)


def _check(name: str, value: object, allowed: str, fine: bool) -> None:
    if not fine:
        raise RecipeError(f"{name} is {value!r}; allowed: {allowed}")


# ---- detection and instance segmentation -------------------------------------------------------------------


@dataclass(frozen=True)
class DetectionTransform:
    """Resizes, crops where asked to, and flips a picture with its boxes and masks.

    ``transform(image, target, seed)`` returns float32 ``[3, H, W]`` from 0 to 1, which is not normalised, and
    `Instances` of the same size. Boxes are clipped to the picture; objects whose box has no width or height
    after that are dropped, perhaps all of them.

    Args:
        sizes: one of these is drawn for the shorter side, in pixels.
        max_size: what the longer side is at most.
        flip: the probability of a horizontal flip.
        crop: side of a square that is cut out at random; a shorter side is kept whole.

    Raises:
        RecipeError: a value out of range.
        ValueError: a target that is of another size than the picture.

    Example::

        transform = DetectionTransform((800,), 1333, 0.5)
        x, target = transform(*data.train[0], seed=7)

    Source: mmdetection 2.19, configs/_base_/datasets/coco_instance.py (Resize, RandomFlip).
    """

    sizes: tuple[int, ...]
    max_size: int
    flip: float
    crop: int | None = None

    def __post_init__(self) -> None:
        ok = len(self.sizes) > 0 and all(size >= 1 for size in self.sizes)
        _check("sizes", self.sizes, "at least one, each at least 1 pixel", ok)
        _check("max_size", self.max_size, "at least 1 pixel", self.max_size >= 1)
        _check("flip", self.flip, "a probability, 0 to 1", 0 <= self.flip <= 1)
        _check("crop", self.crop, "at least 1 pixel, or None", self.crop is None or self.crop >= 1)

    def __call__(self, image: Image.Image, target: Instances, seed: int) -> tuple[Tensor, Instances]:
        size = (image.height, image.width)
        if target.size != size:
            raise ValueError(f"target is of size {target.size}; allowed: the image's, {size}")
        draw = random.Random(seed)
        size = resized(*size, draw.choice(self.sizes), self.max_size)
        x = _resize(as_tensor(image), size)
        boxes = BoundingBoxes(target.boxes, format="XYXY", canvas_size=target.size)
        boxes = F.resize(boxes, list(size))
        masks = None if target.masks is None else F.resize(Mask(target.masks), list(size))
        if self.crop is not None:
            window = _window(draw, size, self.crop)
            size = window[2:]
            x, boxes = F.crop(x, *window), F.crop(boxes, *window)
            masks = None if masks is None else F.crop(masks, *window)
        if draw.random() < self.flip:
            x, boxes = F.horizontal_flip(x), F.horizontal_flip(boxes)
            masks = None if masks is None else F.horizontal_flip(masks)
        return x, _clipped(boxes, target.labels, masks, size)


def _window(draw: random.Random, size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a square inside a picture, cut where the picture is smaller."""
    height, width = min(size[0], side), min(size[1], side)
    top, left = draw.randint(0, size[0] - height), draw.randint(0, size[1] - width)
    return top, left, height, width


def _clipped(boxes: Tensor, labels: Tensor, masks: Tensor | None, size: tuple[int, int]) -> Instances:
    """The objects whose box overlaps the picture, the box cut at its sides."""
    boxes = boxes.as_subclass(Tensor)
    limit = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    boxes = boxes.clamp(min=0).minimum(limit)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    masks = None if masks is None else masks.as_subclass(Tensor)[kept]
    return Instances(boxes[kept], labels[kept], masks, size)


# ---- semantic segmentation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SegmentationTransform:
    """mmsegmentation's pipeline for ADE20K: scale, crop, flip, distort the colours, normalise, pad.

    ``transform(image, labels, seed)`` with uint8 labels ``[H, W]`` returns float32 ``[3, crop, crop]`` and
    uint8 ``[crop, crop]``, where padding is 0 after normalisation and 255.

    Args:
        mean, std: of the channels, for values from 0 to 1.
        scale: (long, short): the picture is fitted in these sides, times a factor drawn for it.
        ratio: between which two numbers that factor is drawn.
        crop: side of the square that is cut out, in pixels.
        cat_max_ratio: a crop is drawn again, ten times at most, where one class has this share of its pixels
            or more, 255 not counted, or none has any.
        flip: the probability of a horizontal flip.

    Raises:
        RecipeError: a value out of range.
        ValueError: labels that are of another size than the picture.

    Example::

        transform = SegmentationTransform((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        x, labels = transform(*data.train[0], seed=7)

    Source: mmsegmentation 0.19, configs/_base_/datasets/ade20k.py.
    """

    mean: Colour
    std: Colour
    scale: tuple[int, int] = (2048, 512)
    ratio: tuple[float, float] = (0.5, 2.0)
    crop: int = 512
    cat_max_ratio: float = 0.75
    flip: float = 0.5

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        _check("std", self.std, "three positive numbers", len(self.std) == 3 and min(self.std) > 0)
        low, high = self.ratio
        _check("ratio", self.ratio, "two positive numbers, the smaller first", 0 < low <= high)
        _check("crop", self.crop, "at least 1 pixel", self.crop >= 1)
        _check("cat_max_ratio", self.cat_max_ratio, "above 0 and at most 1", 0 < self.cat_max_ratio <= 1)
        _check("flip", self.flip, "a probability, 0 to 1", 0 <= self.flip <= 1)

    def __call__(self, image: Image.Image, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        size = (image.height, image.width)
        if labels.shape != size:
            raise ValueError(f"labels are of size {tuple(labels.shape)}; allowed: the image's, {size}")
        draw = random.Random(seed)
        factor = draw.uniform(*self.ratio)
        long, short = (int(side * factor) for side in self.scale)
        size = resized(*size, short, long)
        x, labels = _resize(as_tensor(image), size), F.resize(Mask(labels[None]), list(size))
        window = self._crop(draw, labels)
        x, labels = F.crop(x, *window), F.crop(labels, *window)
        if draw.random() < self.flip:
            x, labels = F.horizontal_flip(x), F.horizontal_flip(labels)
        x = photometric_distortion(x, draw)
        x = F.normalize(x, list(self.mean), list(self.std), inplace=True)
        margin = [0, 0, self.crop - window[3], self.crop - window[2]]
        labels = F.pad(labels.as_subclass(Tensor), margin, fill=IGNORED)
        return F.pad(x, margin, fill=0), labels[0]

    def _crop(self, draw: random.Random, labels: Tensor) -> tuple[int, int, int, int]:
        size = tuple(labels.shape[-2:])
        window = _window(draw, size, self.crop)
        if self.cat_max_ratio == 1:
            return window
        for _ in range(10):
            counts = torch.bincount(F.crop(labels, *window).as_subclass(Tensor).flatten(), minlength=256)
            counts[IGNORED] = 0
            if 0 < counts.max() < self.cat_max_ratio * counts.sum():
                break
            window = _window(draw, size, self.crop)
        return window


def photometric_distortion(x: Tensor, draw: random.Random) -> Tensor:
    """Changes brightness, contrast, saturation and hue, each with probability one half.

    Brightness adds up to 32/255; contrast and saturation multiply all values, and in HSV the saturation, by
    0.5 to 1.5; hue turns by -36 to 34 degrees, in steps of two. Contrast comes second or last, with equal
    probability. Values stay between 0 and 1; unlike mmsegmentation's they are not rounded to bytes between.

    Args:
        x: float32 ``[3, H, W]`` from 0 to 1, RGB.
        draw: the generator of all draws.

    Source: mmsegmentation 0.19, PhotoMetricDistortion.
    """
    if draw.random() < 0.5:
        x = (x + draw.uniform(-32, 32) / 255).clamp(0, 1)
    contrast_last = draw.random() < 0.5
    if not contrast_last:
        x = _contrast(x, draw)
    if draw.random() < 0.5:
        x = _saturation(x, draw.uniform(0.5, 1.5))
    if draw.random() < 0.5:
        x = F.adjust_hue(x, draw.randrange(-18, 18) / 180)
    return _contrast(x, draw) if contrast_last else x


def _contrast(x: Tensor, draw: random.Random) -> Tensor:
    return (x * draw.uniform(0.5, 1.5)).clamp(0, 1) if draw.random() < 0.5 else x


def _saturation(x: Tensor, factor: float) -> Tensor:
    """Multiplies the saturation of HSV, 1 - min / max, keeping it at most 1.

    A channel is ``max * (1 - saturation * share)``, with a share that the hue decides: its distance from the
    maximum grows with the saturation, until the smallest channel is 0.
    """
    largest, smallest = x.amax(0, keepdim=True), x.amin(0, keepdim=True)
    limit = largest / (largest - smallest).clamp(min=1e-12)
    return largest - (largest - x) * limit.clamp(max=factor)


def _check_scale(scale: tuple[int, int]) -> None:
    _check("scale", scale, "the longer side, then the shorter, in pixels", scale[0] >= scale[1] >= 1)
