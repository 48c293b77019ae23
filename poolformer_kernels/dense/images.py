"""What a detector does to its images before the backbone and to its boxes after the heads."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..models import PoolFormer
from .boxes import pasted

__all__ = ["DetectorImages", "check_images", "check_targets", "resized"]


def resized(height: int, width: int, shorter: int, longer: int) -> tuple[int, int]:
    """(H, W) with the ratio kept, at most ``shorter`` and ``longer`` pixels; mmdetection's rounding."""
    scale = min(shorter / min(height, width), longer / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


class DetectorImages(GeneralizedRCNNTransform):
    """Normalises, resizes in evaluation, and pads to a common multiple of 32 with zeros.

    In training images keep their size: how large they are belongs to the augmentation. The padding is part
    of what GroupNorm of one group sees, in the official code as here.

    Args:
        body: the backbone, whose ``config`` has a mean and a standard deviation for every channel.
        min_size, max_size: of the resized image's sides, pixels.

    Raises:
        ValueError: a backbone for images of other channels.
    """

    def __init__(self, body: PoolFormer, min_size: int, max_size: int) -> None:
        mean, std = body.config.mean, body.config.std
        if body.in_chans != len(mean):
            raise ValueError(
                f"in_chans is {body.in_chans}; allowed in a detector: {len(mean)}, as many as the"
                " backbone's config.mean has"
            )
        super().__init__(min_size, max_size, mean, std)

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        if self.training:
            return image, target
        size = resized(*image.shape[-2:], self.min_size[-1], self.max_size)
        if size == tuple(image.shape[-2:]):
            return image, target
        return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0], target

    def forward(self, images: list[Tensor], targets: list[dict] | None = None):
        images, targets = super().forward(images, targets)
        if targets is not None:
            for target, size in zip(targets, images.image_sizes, strict=True):
                target["size"] = size
        return images, targets

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Boxes and masks of the resized images in the pixels of the original ones; nothing in training."""
        if self.training:
            return result
        for found, (height, width), original in zip(result, image_shapes, original_image_sizes, strict=True):
            boxes = found["boxes"]
            ratios = boxes.new_tensor([original[1] / width, original[0] / height] * 2)
            found["boxes"] = boxes * ratios
            if "masks" in found:
                found["masks"] = pasted(found["masks"], found["boxes"], *original)
        return result


def check_images(images: object, in_chans: int) -> None:
    """Raises TypeError or ValueError unless it is a list of floating images ``[in_chans, H, W]``."""
    if not isinstance(images, (list, tuple)) or not images:
        raise TypeError(f"images must be a list of tensors [{in_chans}, H, W], got {_described(images)}")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or not image.is_floating_point():
            raise TypeError(f"images[{i}] must be a tensor of a floating dtype, got {_described(image)}")
        if image.dim() != 3 or image.shape[0] != in_chans or min(image.shape[1:]) < 1:
            raise ValueError(f"images[{i}] must have shape [{in_chans}, H, W], got {list(image.shape)}")


def check_targets(targets: object, images: list[Tensor], num_classes: int, masks: bool) -> None:
    """Raises TypeError or ValueError unless there is a target that fits for every image."""
    if not isinstance(targets, (list, tuple)) or len(targets) != len(images):
        raise ValueError(
            f"targets must be a list of {len(images)} dicts, one for each image, in training, got "
            f"{len(targets) if isinstance(targets, (list, tuple)) else _described(targets)}"
        )
    for i, (target, image) in enumerate(zip(targets, images, strict=True)):
        if not isinstance(target, dict):
            raise TypeError(f"targets[{i}] must be a dict, got {_described(target)}")
        for name in ("boxes", "labels", *["masks"] * masks):
            if name not in target:
                raise ValueError(f"targets[{i}] has no {name!r}; it has {', '.join(map(str, target))}")
            if not isinstance(target[name], Tensor):
                raise TypeError(f"targets[{i}][{name!r}] must be a tensor, got {_described(target[name])}")
            if target[name].device != image.device:
                raise ValueError(
                    f"targets[{i}][{name!r}] is on {target[name].device}; allowed: {image.device}, where"
                    f" images[{i}] is"
                )
        boxes, labels = target["boxes"], target["labels"]
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise ValueError(
                f"targets[{i}]['boxes'] must be [N, 4] of a floating dtype, got {_described(boxes)}"
            )
        if labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"targets[{i}]['labels'] must be [{len(boxes)}] of int64, got {_described(labels)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
            raise ValueError(f"targets[{i}]['labels'] has {wrong}; allowed: 0 to {num_classes - 1}")
        fine = boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        if not bool(fine.all()):
            wrong = int((~fine).nonzero()[0])
            raise ValueError(
                f"targets[{i}]['boxes'][{wrong}] is {boxes[wrong].tolist()};"
                " allowed: finite, x1 < x2, y1 < y2"
            )
        if masks and tuple(target["masks"].shape) != (len(boxes), *image.shape[1:]):
            expected = [len(boxes), *image.shape[1:]]
            raise ValueError(f"targets[{i}]['masks'] must be {expected}, got {_described(target['masks'])}")


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return "an empty list" if isinstance(value, (list, tuple)) and not value else type(value).__name__
