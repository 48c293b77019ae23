"""What a run trains and how: the fields of a recipe, its presets, and the YAML file that repeats a run."""

import difflib
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import yaml

__all__ = [
    "PRESETS",
    "Recipe",
    "RecipeError",
    "RecipeFields",
    "field_type",
    "read_yaml",
    "recipe_field",
    "resolve",
    "within",
    "write_yaml",
]

PRECISIONS = ("float32", "bfloat16", "float16")


class RecipeError(ValueError):
    """A field is unknown, of the wrong type or out of range; the message names it and what is allowed."""


def recipe_field(default: object, text: str, allowed: tuple[str, ...] = ()) -> object:
    """A field of a recipe: its default, what `--help` says of it, and of a text its values."""
    return field(default=default, metadata={"help": text, "allowed": allowed})


@dataclass(frozen=True)
class RecipeFields:
    """What every task's recipe shares: `Recipe`, `DetectionRecipe`, `SegmentationRecipe`.

    ``lr`` None stands for ``lr_per_1024`` for each 1024 images of a step.
    """

    task: ClassVar[str]
    mixes: ClassVar[bool] = False  # whether images are mixed in pairs
    eager: ClassVar[bool] = False
    compile: ClassVar[bool] = False
    fsdp: ClassVar[bool] = False
    decays_all: ClassVar[bool] = False  # whether one-dimensional parameters decay, too

    model: str = recipe_field("poolformer_s12", "a name of list_models()")
    checkpoint: str | None = recipe_field(None, "weights to start from (default: random)")
    batch_size: int = recipe_field(1024, "images of a step, over all processes and micro-batches")
    accumulate: int = recipe_field(1, "micro-batches of a process in a step")
    optimizer: str = recipe_field("adamw", "a name of timm.optim")
    lr: float | None = recipe_field(
        None, "learning rate (default: lr_per_1024 for each 1024 images of a step)"
    )
    lr_per_1024: float = recipe_field(1e-3, "what the learning rate follows from")
    weight_decay: float = recipe_field(0.05, "of all parameters but the one-dimensional ones")
    clip_grad: float | None = recipe_field(None, "largest norm of the gradients (default: no limit)")
    ema: float | None = recipe_field(
        None, "decay of an exponential moving average of the weights, 0.9998 say (default: none is kept)"
    )
    drop_path: float | None = recipe_field(
        None, "probability that the last block is left out, stochastic depth (default: the model's recipe)"
    )
    hflip: float = recipe_field(0.5, "probability of a horizontal flip")
    precision: str = recipe_field("bfloat16", "of products, by autocast; parameters are float32", PRECISIONS)
    seed: int = recipe_field(0, "of the weights, the order of the images and every random draw")
    workers: int = recipe_field(4, "processes of each process that load images; 0 for none")
    bad_images: str = recipe_field(
        "fail", "at an unreadable image: end the run, or let its neighbour stand in", ("fail", "skip")
    )
    save_every: int | None = recipe_field(None, "steps between checkpoints (default: an epoch's)")
    keep: int = recipe_field(3, "checkpoints that are kept")
    log_every: int = recipe_field(50, "steps between rows of metrics.csv")

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name), type(self)))
        for name in ("batch_size", "accumulate", "keep", "log_every"):
            within(name, getattr(self, name), 1, math.inf)
        for name in ("workers", "seed", "lr", "lr_per_1024", "weight_decay"):
            within(name, getattr(self, name), 0, math.inf)
        within("hflip", self.hflip, 0, 1)
        for name in ("drop_path", "ema"):
            within(name, getattr(self, name), 0, 1, open_end=True)
        within("save_every", self.save_every, 1, math.inf)
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise RecipeError(f"clip_grad is {self.clip_grad}; allowed: above 0")

    def steps(self, per_epoch: int) -> int:
        """Steps of the whole run, of which an epoch has ``per_epoch``."""
        raise NotImplementedError

    def validates_every(self, per_epoch: int) -> int:
        """Steps between validations."""
        return per_epoch

    @classmethod
    def presets(cls) -> dict[str, dict[str, object]]:
        """The recipes by name, as what differs from the defaults."""
        raise NotImplementedError

    @classmethod
    def shrink(cls, preset: dict[str, object], given: Mapping[str, object]) -> None:
        """Changes what a preset has where a shorter run is asked for."""

    def as_dict(self) -> dict[str, object]:
        """The fields as YAML has them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Recipe(RecipeFields):
    """Every choice of a training run. The defaults are the paper's for ImageNet-1K; see `PRESETS`.

    None stands for what depends on another field; `resolve` fills it in, and RUN/config.yaml holds no such
    None any more. Epochs are counted as timm counts them: ``epochs`` include the warm-up, ``cooldown_epochs``
    follow them.

    Source: MetaFormer (arXiv 2111.11418), section 4.1; the official code's train.py.
    """

    task: ClassVar[str] = "classification"

    model: str = recipe_field("poolformer_s12", "one of list_models(), poolformer_digits, or timm:NAME")
    checkpoint: str | None = recipe_field(
        None,
        "weights to start from: of the official code, timm, transformers or mmpretrain (default: random)",
    )
    head: str | None = recipe_field(
        None,
        "norm, then mean (official) or mean, then norm (timm; default: the checkpoint's, else the model's)",
        ("official", "timm"),
    )
    epochs: int = recipe_field(300, "epochs of the schedule, warm-up included")
    warmup_epochs: int = recipe_field(5, "epochs in which the learning rate grows linearly")
    cooldown_epochs: int = recipe_field(10, "epochs at the lowest learning rate, after the others")
    warmup_lr: float = recipe_field(1e-6, "learning rate at the start of the warm-up")
    min_lr: float = recipe_field(1e-5, "lowest learning rate")
    schedule: str = recipe_field("cosine", "how the learning rate falls", ("cosine", "tanh", "poly", "step"))
    schedule_on: str = recipe_field("epoch", "when the learning rate changes", ("epoch", "step"))
    label_smoothing: float = recipe_field(0.1, "share of the target that is spread over all classes")
    mixup: float = recipe_field(0.8, "alpha of Mixup, 0 for none; images are mixed in pairs")
    cutmix: float = recipe_field(1.0, "alpha of CutMix, 0 for none")
    mixup_prob: float = recipe_field(1.0, "probability that a pair is mixed")
    mixup_switch_prob: float = recipe_field(0.5, "probability of CutMix where both are on")
    auto_augment: str | None = recipe_field(
        "rand-m9-mstd0.5-inc1", "timm's name of an augmentation policy, or none"
    )
    color_jitter: float = recipe_field(
        0.4, "strength of changes of colour; unused where auto_augment is given, as in timm"
    )
    random_erasing: float = recipe_field(0.25, "probability that a part of an image is erased")
    random_erasing_mode: str = recipe_field(
        "pixel",
        "what fills an erased part: zeros, one random colour, random pixels",
        ("const", "rand", "pixel"),
    )
    scale: tuple[float, float] = recipe_field(
        (0.08, 1.0), "share of an image's area that a random crop takes"
    )
    ratio: tuple[float, float] = recipe_field((3 / 4, 4 / 3), "aspect ratios of random crops")
    train_interpolation: str = recipe_field(
        "random",
        "how a training crop is resized; random draws bilinear or bicubic",
        ("random", "bilinear", "bicubic", "lanczos", "nearest"),
    )
    image_size: int | None = recipe_field(None, "side of an image, pixels (default: the model's own)")
    crop_pct: float | None = recipe_field(
        None, "share of a validation image's shorter side that is kept (default: the model's own)"
    )
    interpolation: str | None = recipe_field(
        None,
        "how a validation image is resized (default: the model's own)",
        ("bilinear", "bicubic", "lanczos", "nearest"),
    )
    eager: bool = recipe_field(False, "the same run on timm's plain modules, with timm's head")
    compile: bool = recipe_field(False, "torch.compile around the model")
    fsdp: bool = recipe_field(
        False, "parameters, gradients and moments shared by the processes, block by block"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        within("epochs", self.epochs, 1, math.inf)
        for name in ("warmup_epochs", "cooldown_epochs", "warmup_lr", "min_lr", "mixup", "cutmix"):
            within(name, getattr(self, name), 0, math.inf)
        for name in ("mixup_prob", "mixup_switch_prob", "random_erasing", "color_jitter"):
            within(name, getattr(self, name), 0, 1)
        within("label_smoothing", self.label_smoothing, 0, 1, open_end=True)
        within("image_size", self.image_size, 32, math.inf)
        within("crop_pct", self.crop_pct, 1e-3, 1)
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise RecipeError(
                    f"{name} is {low}, {high}; allowed: two positive numbers, the smaller first"
                )
        if self.warmup_epochs >= self.epochs:
            raise RecipeError(
                f"warmup_epochs is {self.warmup_epochs}; allowed: less than epochs, {self.epochs}"
            )
        if self.eager and self.head == "official":
            raise RecipeError(
                "head is official; allowed with eager: timm, the only one that timm's modules have"
            )

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.cooldown_epochs

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0

    def steps(self, per_epoch: int) -> int:
        return per_epoch * self.total_epochs

    @classmethod
    def presets(cls) -> dict[str, dict[str, object]]:
        return PRESETS

    @classmethod
    def shrink(cls, preset: dict[str, object], given: Mapping[str, object]) -> None:
        """``warmup_epochs`` and ``cooldown_epochs`` shrink with ``epochs``."""
        defaults = {f.name: f.default for f in fields(cls)} | preset
        epochs, full = given.get("epochs"), defaults["epochs"]
        if type(epochs) is int and 0 < epochs < full:
            for name in ("warmup_epochs", "cooldown_epochs"):
                length = defaults[name]
                preset[name] = max(length * epochs // full, int(length > 0 and epochs > 1))


# what differs from the paper's
PRESETS: dict[str, dict[str, object]] = {
    "paper": {},
    "finetune": {
        "epochs": 30,
        "warmup_epochs": 3,
        "cooldown_epochs": 0,
        "batch_size": 256,
        "lr_per_1024": 2e-4,
        "min_lr": 1e-6,
        "schedule_on": "step",
        "weight_decay": 1e-8,
        "mixup": 0.0,
        "cutmix": 0.0,
        "random_erasing": 0.25,
        "log_every": 20,
    },
    "small": {
        "model": "poolformer_digits",
        "epochs": 25,
        "warmup_epochs": 2,
        "cooldown_epochs": 1,
        "batch_size": 64,
        "lr_per_1024": 3.2e-2,
        "warmup_lr": 1e-5,
        "min_lr": 1e-5,
        "schedule_on": "step",
        "drop_path": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "auto_augment": None,
        "color_jitter": 0.0,
        "hflip": 0.0,
        "random_erasing": 0.0,
        "scale": (0.85, 1.0),
        "ratio": (0.9, 1.11),
        "train_interpolation": "bicubic",
        "crop_pct": 1.0,
        "precision": "float32",
        "workers": 0,
        "log_every": 11,
    },
}


AnyRecipe = TypeVar("AnyRecipe", bound=RecipeFields)


def resolve(preset: str, *changes: Mapping[str, object], kind: type[AnyRecipe] = Recipe) -> AnyRecipe:
    """The recipe of a preset with fields changed, the last change counting; ``kind`` is a task's class.

    What belongs to a longer run shrinks with it unless it is given (``warmup_epochs`` with ``epochs``).

    Raises:
        RecipeError: no such preset or field, or a value of the wrong type or range.
    """
    if preset not in kind.presets():
        raise RecipeError(f"recipe is {preset!r}; allowed: {', '.join(kind.presets())}")
    given: dict[str, object] = {}
    for change in changes:
        if {"batch_size", "lr_per_1024"} & change.keys():
            given.pop("lr", None)  # an earlier one was of another batch
        given.update(change)
    names = {f.name: f for f in fields(kind)}
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise RecipeError(f"{name!r} is not a field of a recipe{hint}; allowed: {', '.join(names)}")
    base = {**kind.presets()[preset]}
    kind.shrink(base, given)
    recipe = kind(**{**base, **given})
    if recipe.lr is None:
        recipe = replace(recipe, lr=recipe.lr_per_1024 * recipe.batch_size / 1024)
    return recipe


def read_yaml(path: str | os.PathLike) -> dict[str, object]:
    """The fields that a YAML file gives.

    Raises:
        RecipeError: an unreadable file, or one that does not map names to values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"config {path}: {getattr(error, 'strerror', None) or 'not a text'}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"config {path}: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"config {path}: must map names of fields to values, got {type(values).__name__}")
    return values


def write_yaml(path: Path, values: Mapping[str, object]) -> None:
    """The same fields in their order, complete or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    os.replace(part, path)


# ---- checks ------------------------------------------------------------------------------------------------


def _checked(f: Field, value: object, recipe: type) -> object:
    """The value, in the field's type: a list becomes a tuple, an integer a float."""
    kind, optional = field_type(f, recipe), _optional(f, recipe)
    if optional and value in (None, "none"):
        return None
    if kind is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(map(_is_number, value)):
            raise RecipeError(f"{f.name} is {value!r}; allowed: two numbers")
        if not all(map(math.isfinite, value)):
            raise RecipeError(f"{f.name} is {value!r}; allowed: two finite numbers")
        return tuple(float(v) for v in value)
    if kind is float and _is_number(value) and math.isfinite(value):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML reads 1e-3 as a text
        try:
            if math.isfinite(float(value)):
                return float(value)
        except ValueError:
            pass
    if kind is not float and type(value) is kind:
        if f.metadata["allowed"] and value not in f.metadata["allowed"]:
            raise RecipeError(f"{f.name} is {value!r}; allowed: {', '.join(f.metadata['allowed'])}")
        return value
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}[kind]
    raise RecipeError(f"{f.name} is {value!r}; allowed: {words}{' or none' * optional}")


def field_type(f: Field, recipe: type) -> type:
    """int, float, bool, str or tuple."""
    kind = typing.get_type_hints(recipe)[f.name]
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    return typing.get_origin(kind) or kind


def _optional(f: Field, recipe: type) -> bool:
    return isinstance(typing.get_type_hints(recipe)[f.name], types.UnionType)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def within(name: str, value: float | None, low: float, high: float, open_end: bool = False) -> None:
    if value is None or (low <= value <= high and not (open_end and value == high)):
        return
    upper = "" if high == math.inf else f" and {'below' if open_end else 'at most'} {high:g}"
    raise RecipeError(f"{name} is {value:g}; allowed: at least {low:g}{upper}")
