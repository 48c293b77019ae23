"""Recipes of detection, instance and semantic segmentation; the defaults are the paper's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from ..models import list_models
from .networks import DIGITS
from .recipe import PRECISIONS, RecipeError, RecipeFields, recipe_field, within

__all__ = ["DetectionRecipe", "InstanceRecipe", "SegmentationRecipe"]

# of sample:nuclei, three images of 256 x 256; the detector from the segmenter's backbone (make dense-demo)
_SMALL_DETECTION: dict[str, object] = {
    "epochs": 72,
    "batch_size": 1,
    "lr_per_1024": 0.6144,
    "clip_grad": 1.0,
    "decay_epochs": (48, 66),
    "warmup_steps": 20,
    "min_size": (320, 384),
    "max_size": 384,
    "validate_every": 72,
    "save_every": 72,
    "log_every": 10,
    "workers": 0,
}
_SMALL_SEGMENTATION: dict[str, object] = {
    "model": "semantic_fpn_poolformer_digits",
    "iterations": 80,
    "batch_size": 3,
    "lr_per_1024": 0.68,
    "zero_label": "class",
    "scale": (256, 256),
    "ratio": (0.75, 1.5),
    "crop": 256,
    "cat_max_ratio": 1.0,
    "validate_every": 40,
    "save_every": 40,
    "log_every": 5,
    "workers": 0,
}


@dataclass(frozen=True)
class DenseRecipe(RecipeFields):
    """What the recipes of detection and segmentation share."""

    head: ClassVar[str]
    decays_all: ClassVar[bool] = True

    checkpoint: str | None = recipe_field(
        None, "weights to start from: of the whole, or of another model for its backbone (default: random)"
    )
    weight_decay: float = recipe_field(1e-4, "of all parameters")
    drop_path: float | None = recipe_field(
        0.0, "probability that the last block is left out, stochastic depth"
    )
    precision: str = recipe_field(
        "float32",
        "of products, by autocast; parameters are float32",
        PRECISIONS,
    )
    validate_every: int | None = recipe_field(None, "steps between validations (default: an epoch's)")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_model(self.model, self.head)
        within("validate_every", self.validate_every, 1, math.inf)

    def validates_every(self, per_epoch: int) -> int:
        return self.validate_every or per_epoch


@dataclass(frozen=True)
class DetectionRecipe(DenseRecipe):
    """RetinaNet on COCO: the official configuration (mmdetection's 1x schedule) with AdamW.

    Source: MetaFormer (arXiv 2111.11418), section 4.2; the official code's detection/configs.
    """

    task: ClassVar[str] = "detection"
    head: ClassVar[str] = "retinanet"

    model: str = recipe_field("retinanet_poolformer_s12", "retinanet_ and a name of list_models()")
    epochs: int = recipe_field(12, "epochs of the schedule")
    batch_size: int = recipe_field(16, "images of a step, over all processes and micro-batches")
    lr_per_1024: float = recipe_field(6.4e-3, "what the learning rate follows from: 1e-4 for 16 images")
    decay_epochs: tuple[float, float] = recipe_field((8, 11), "epochs after which the learning rate falls")
    decay: float = recipe_field(0.1, "share of itself to which the learning rate falls")
    warmup_steps: int = recipe_field(500, "steps at the start in which the learning rate grows linearly")
    warmup_start: float = recipe_field(1e-3, "share of the learning rate that it starts from")
    min_size: tuple[float, float] = recipe_field(
        (800, 800), "between these the shorter side is drawn, in steps of 32 pixels"
    )
    max_size: int = recipe_field(1333, "largest longer side, pixels")
    crop: int | None = recipe_field(None, "side of a random crop, pixels (default: none)")

    def __post_init__(self) -> None:
        super().__post_init__()
        within("epochs", self.epochs, 1, math.inf)
        for name in ("warmup_steps", "decay", "warmup_start"):
            within(name, getattr(self, name), 0, math.inf)
        within("crop", self.crop, 1, math.inf)
        _ordered(self, "decay_epochs", 0)
        _ordered(self, "min_size", 32)
        within("max_size", self.max_size, self.min_size[1], math.inf)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shorter sides that are drawn from."""
        low, high = map(int, self.min_size)
        return (*range(low, high, 32), high)

    def steps(self, per_epoch: int) -> int:
        return per_epoch * self.epochs

    def rate(self, step: int, per_epoch: int) -> float:
        """The learning rate of a step."""
        fallen = sum(step >= epoch * per_epoch for epoch in self.decay_epochs)
        rate = self.lr * self.decay**fallen
        if step < self.warmup_steps:
            rate *= 1 - (1 - step / self.warmup_steps) * (1 - self.warmup_start)
        return rate

    @classmethod
    def presets(cls) -> dict[str, dict[str, object]]:
        return {"paper": {}, "small": {"model": f"{cls.head}_poolformer_digits", **_SMALL_DETECTION}}

    @classmethod
    def shrink(cls, preset: dict[str, object], given: Mapping[str, object]) -> None:
        """``decay_epochs`` stay where they are in the schedule, two thirds and eleven twelfths."""
        defaults = {f.name: f.default for f in fields(cls)} | preset
        epochs, full = given.get("epochs"), defaults["epochs"]
        if type(epochs) is int and epochs > 0:
            preset["decay_epochs"] = tuple(e * epochs / full for e in defaults["decay_epochs"])


@dataclass(frozen=True)
class InstanceRecipe(DetectionRecipe):
    """Mask R-CNN on COCO: as `DetectionRecipe`, with twice the learning rate."""

    task: ClassVar[str] = "instance"
    head: ClassVar[str] = "mask_rcnn"

    model: str = recipe_field("mask_rcnn_poolformer_s12", "mask_rcnn_ and a name of list_models()")
    lr_per_1024: float = recipe_field(1.28e-2, "what the learning rate follows from: 2e-4 for 16 images")


@dataclass(frozen=True)
class SegmentationRecipe(DenseRecipe):
    """Semantic FPN on ADE20K: the official configuration (mmsegmentation's, 40,000 steps).

    Source: MetaFormer (arXiv 2111.11418), section 4.3; the official code's segmentation/configs.
    """

    task: ClassVar[str] = "segmentation"
    head: ClassVar[str] = "semantic_fpn"

    model: str = recipe_field("semantic_fpn_poolformer_s12", "semantic_fpn_ and a name of list_models()")
    iterations: int = recipe_field(40_000, "steps of the run")
    batch_size: int = recipe_field(32, "images of a step, over all processes and micro-batches")
    lr_per_1024: float = recipe_field(6.4e-3, "what the learning rate follows from: 2e-4 for 32 images")
    power: float = recipe_field(0.9, "power of the polynomial by which the learning rate falls to min_lr")
    min_lr: float = recipe_field(0.0, "learning rate at the end")
    dropout: float = recipe_field(0.1, "share of the head's channels that are dropped in training")
    zero_label: str = recipe_field(
        "ignore", "what label 0 is: of no class (as in ADE20K), or a class", ("ignore", "class")
    )
    scale: tuple[float, float] = recipe_field(
        (2048, 512), "sides that an image is fitted in: the longer, the shorter, pixels"
    )
    ratio: tuple[float, float] = recipe_field((0.5, 2.0), "factors of the scale that are drawn in training")
    crop: int = recipe_field(512, "side of a training image, pixels")
    cat_max_ratio: float = recipe_field(0.75, "largest share of a class in a crop, which is drawn ten times")
    validate_every: int | None = recipe_field(4000, "steps between validations")

    def __post_init__(self) -> None:
        super().__post_init__()
        within("iterations", self.iterations, 1, math.inf)
        for name in ("power", "min_lr"):
            within(name, getattr(self, name), 0, math.inf)
        within("dropout", self.dropout, 0, 1, open_end=True)
        within("crop", self.crop, 64, math.inf)  # BatchNorm sees two pixels of one image at least
        within("cat_max_ratio", self.cat_max_ratio, 1e-3, 1)
        _ordered(self, "ratio", 1e-3)
        longer, shorter = self.scale
        if not 32 <= shorter <= longer:
            raise RecipeError(
                f"scale is {longer:g}, {shorter:g}; allowed: the longer first, both at least 32"
            )

    def steps(self, per_epoch: int) -> int:
        return self.iterations

    def rate(self, step: int, per_epoch: int) -> float:
        """The learning rate of a step."""
        left = (1 - step / self.iterations) ** self.power
        return (self.lr - self.min_lr) * left + self.min_lr

    @classmethod
    def presets(cls) -> dict[str, dict[str, object]]:
        return {"paper": {}, "small": _SMALL_SEGMENTATION}


def _check_model(model: str, head: str) -> None:
    if not model.startswith(f"{head}_"):
        raise RecipeError(f"model is {model!r}; allowed for this task: {head}_ and a name of list_models()")
    backbone = model.removeprefix(f"{head}_")
    if backbone not in (*list_models(), DIGITS.name):
        names = ", ".join((*list_models(), DIGITS.name))
        raise RecipeError(f"model is {model!r}; allowed: {head}_ and one of {names}")


def _ordered(recipe: RecipeFields, name: str, least: float) -> None:
    low, high = getattr(recipe, name)
    if not least <= low <= high:
        raise RecipeError(f"{name} is {low:g}, {high:g}; allowed: at least {least:g}, the smaller first")
