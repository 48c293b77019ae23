"""What a run reads, and in which order: data sets, augmentation, Mixup, and the loaders.

Every random draw has a key of its own, so that nothing depends on the number of workers or processes, or on
where a run was interrupted: the order of an epoch by (seed, epoch), an image's augmentation by (seed, epoch,
index), and Mixup by (seed, step, pair). A pair is two neighbours in the order, which are always in one
micro-batch of one process; timm mixes the first image of a batch with the last, which are as random.
"""

import hashlib
import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import Mixup, auto_augment, create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .recipe import Recipe, RecipeError, RecipeFields

__all__ = [
    "BadImageError",
    "Batch",
    "Data",
    "Draw",
    "EpochOrder",
    "ImageNorm",
    "epoch_order",
    "key",
    "loading",
    "open_data",
    "readable",
    "train_loader",
    "train_transform",
    "validation_loader",
]

_EXACT = ("torch", "hfds")  # timm's schemes whose images have an index
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "test")}


def key(*parts: object) -> int:
    """A seed of 63 bits that is a function of the parts."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class BadImageError(Exception):
    """An image that cannot be read; the message names its file."""


@dataclass(frozen=True)
class ImageNorm:
    """How a model wants its images: see `poolformer_kernels.models.ModelConfig`."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float


@dataclass
class Data:
    """Images with classes: two sequences of (PIL image, class), and the names of the classes.

    ``name`` is what the user gave.
    """

    name: str
    train: "Images"
    val: "Images"
    classes: list[str]


class Images:
    """A sequence of (RGB image, class); an unreadable image raises `BadImageError`."""

    def __init__(self, items: Sequence) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self._read(index)
        except Exception as error:  # whatever a decoder raises: the file is at fault
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            reason = "no known format" if isinstance(error, UnidentifiedImageError) else reason
            raise BadImageError(f"cannot read image {self.file(index)}: {reason}") from None
        return image, int(label)

    def file(self, index: int) -> str:
        """A name for an image: its file, where it has one."""
        return f"number {index}"

    def _read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self._items[index]
        return image.convert("RGB"), label


class _TimmImages(Images):
    """The images of a reader of timm. Its ImageDataset would put another image in a bad one's place."""

    def file(self, index: int) -> str:
        try:
            return self._items.filename(index, absolute=True)
        except (NotImplementedError, AttributeError, TypeError):
            return super().file(index)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        file, label = self._items[index]
        if isinstance(file, Image.Image):
            return file.convert("RGB"), label
        with file, Image.open(file) as image:
            return image.convert("RGB"), label


def open_data(name: str) -> Data:
    """The training and validation images of DATA.

    Args:
        name: a folder with train/ and val/, or with train.tar and val.tar, classes being folders in them;
            ``torch/NAME[:ROOT]`` or ``hfds/NAME[:ROOT]`` as timm reads them; or ``sample:digits``,
            scikit-learn's 1797 handwritten digits, 80 % of each for training.

    Raises:
        RecipeError: no such data, no classes, classes that differ, or a scheme that has no order.
    """
    scheme, _, rest = name.partition("/")
    if name.startswith("sample:"):
        if name != "sample:digits":
            raise RecipeError(f"DATA is {name!r}; allowed of samples: sample:digits")
        return _digits(name)
    if not os.path.exists(name) and rest and scheme.lower() in _EXACT:
        return _timm_data(name)
    if not os.path.exists(name) and rest and scheme.lower() in ("wds", "tfds", "hfids"):
        raise RecipeError(
            f"DATA is {name!r}; {scheme}/ is read as a stream, which a resumed run could not continue"
            " exactly; allowed: a folder, torch/NAME, hfds/NAME, sample:digits"
        )
    return _folders(name)


def _folders(name: str) -> Data:
    root = Path(name)
    if not root.is_dir():
        raise RecipeError(
            f"DATA {name} is not a folder; allowed: one with train/ and val/, torch/, hfds/, sample:"
        )
    readers = {}
    for split, names in _SPLITS.items():
        found = [path for stem in names for path in (root / stem, root / f"{stem}.tar") if path.exists()]
        if not found:
            raise RecipeError(f"DATA {name} has neither {split}/ nor {split}.tar")
        try:
            readers[split] = create_dataset("", str(found[0]), search_split=False).reader
        except (RuntimeError, AssertionError, OSError, ValueError) as error:
            reason = " ".join(str(error).split()) or "no images"
            raise RecipeError(f"DATA {found[0]} has no images in folders of classes: {reason}") from None
    classes = {split: _classes(reader) for split, reader in readers.items()}
    _check_classes(name, classes["train"], classes["val"])
    return Data(name, _TimmImages(readers["train"]), _TimmImages(readers["val"]), classes["train"])


def _check_classes(name: str, train: list[str], val: list[str]) -> None:
    if len(train) < 2:
        found = f"only {train[0]!r}" if train and train[0] else "none"
        raise RecipeError(
            f"DATA {name} has no two classes in train: found {found}; allowed: a folder for each"
        )
    if train != val:
        differ = sorted(set(train) ^ set(val))
        first = (
            f"{differ[0]!r} is only in {'train' if differ[0] in train else 'val'}"
            if differ
            else "their order"
        )
        raise RecipeError(f"DATA {name}: classes of train and val differ: {first}")


def _classes(reader: object) -> list[str]:
    index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    return sorted(index, key=index.get)


def _timm_data(name: str) -> Data:
    scheme, _, rest = name.partition("/")
    dataset, _, root = rest.partition(":")
    sets = {}
    for split in _SPLITS:
        wanted = split if scheme.lower() == "torch" or split == "train" else "validation"
        try:
            sets[split] = create_dataset(
                f"{scheme}/{dataset}", root=root or None, split=wanted, download=scheme.lower() == "torch"
            )
        except Exception as error:  # of timm, torchvision, datasets or the network: the request is at fault
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise RecipeError(f"DATA {name}: cannot open split {wanted}: {reason}") from None
    readers = {split: getattr(found, "reader", found) for split, found in sets.items()}
    images = {
        split: _TimmImages(found) if hasattr(sets[split], "reader") else Images(found)
        for split, found in readers.items()
    }
    names = {split: _class_names(found) for split, found in readers.items()}
    _check_classes(name, names["train"], names["val"])
    return Data(name, images["train"], images["val"], names["train"])


def _class_names(found: object) -> list[str]:
    names = getattr(found, "classes", None) or _classes(found)
    if not names:  # Hugging Face: a feature knows its names, otherwise the labels are counted
        features = getattr(getattr(found, "dataset", None), "features", {}) or {}
        label = features.get(getattr(found, "label_key", "label"))
        names = getattr(label, "names", None)
    if not names or len(names) < 2:
        raise RecipeError("DATA has no names of classes; allowed: a data set that knows its classes")
    return [str(name) for name in names]


def _digits(name: str) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = [Image.fromarray(np.uint8(np.round(image * (255 / 16)))) for image in digits.images]
    labels = digits.target.tolist()
    parts = train_test_split(range(len(images)), test_size=0.2, stratify=labels, random_state=0)
    train, val = (Images([(images[i], labels[i]) for i in part]) for part in parts)
    return Data(name, train, val, [str(i) for i in range(10)])


# ---- order -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """One image of a step: which, and the keys of its draws."""

    epoch: int
    step: int
    position: int  # in the step's batch over all processes
    index: int  # in the data set


def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order of an epoch: all indices, shuffled."""
    return np.random.Generator(np.random.PCG64(key(seed, "order", epoch))).permutation(images)


class EpochOrder(Sampler):
    """The micro-batches of one process from a step on until the end of training, as lists of `Draw`.

    A step takes ``batch_size`` images in the order of the epoch, whose last images that fill no batch are
    left out. Process r of n has the r-th n-th of them, in ``accumulate`` equal parts.
    """

    def __init__(self, recipe: RecipeFields, images: int, rank: int, world: int, first_step: int) -> None:
        self.recipe, self.images, self.rank, self.world, self.first_step = (
            recipe,
            images,
            rank,
            world,
            first_step,
        )
        self.steps_per_epoch = images // recipe.batch_size
        self.steps = recipe.steps(self.steps_per_epoch)

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.recipe.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        size = self.recipe.batch_size
        own = size // self.world
        micro = own // self.recipe.accumulate
        order, of = None, -1
        for step in range(self.first_step, self.steps):
            epoch, i = divmod(step, self.steps_per_epoch)
            if epoch != of:
                order, of = epoch_order(self.recipe.seed, epoch, self.images), epoch
            for first in range(self.rank * own, (self.rank + 1) * own, micro):
                yield [
                    Draw(epoch, step, position, int(order[i * size + position]))
                    for position in range(first, first + micro)
                ]


# ---- batches -----------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """A micro-batch.

    ``images`` is ``[B, 3, H, W]``, float32; ``targets`` ``[B, classes]``, float32, or of validation ``[B]``,
    int64. ``positions`` are the images' in the step's batch.
    """

    images: Tensor
    targets: Tensor
    step: int = 0
    positions: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def pin_memory(self) -> "Batch":
        self.images, self.targets = self.images.pin_memory(), self.targets.pin_memory()
        return self


def readable(images: Sequence, index: int, skip: bool) -> tuple[Image.Image, object, list[str]]:
    """(image, its target, messages): the image, or with ``skip`` the next one that can be read.

    Raises:
        BadImageError: it cannot be read; with ``skip``, none can.
    """
    bad: list[str] = []
    for offset in range(len(images)):
        try:
            return *images[(index + offset) % len(images)], bad
        except BadImageError as error:
            if not skip:
                raise
            bad.append(str(error))
    raise BadImageError(f"none of {len(images)} images can be read; the first: {bad[0]}")


class _TrainSet(Dataset):
    """Draws to (draw, augmented image, class, messages of bad images)."""

    def __init__(self, images: Images, transform: object, recipe: Recipe) -> None:
        self.images, self.transform, self.recipe = images, transform, recipe

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> tuple[Draw, Tensor, int, list[str]]:
        image, label, bad = readable(self.images, draw.index, self.recipe.bad_images == "skip")
        seed = key(self.recipe.seed, "augmentation", draw.epoch, draw.index)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        return draw, self.transform(image), label, bad


class _Collate:
    """Items to a `Batch`, mixed in pairs, with smoothed targets."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        self.seed = recipe.seed
        self.mixup = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mixup_prob,
            switch_prob=recipe.mixup_switch_prob,
            label_smoothing=recipe.label_smoothing,
            num_classes=classes,
        )
        self.mixup.mixup_enabled = self.mixes = recipe.mixes

    def __call__(self, items: list) -> Batch:
        draws = [item[0] for item in items]
        images = torch.stack([item[1] for item in items])
        labels = torch.tensor([item[2] for item in items])
        step = draws[0].step
        if self.mixes:
            parts = []
            for i in range(0, len(draws), 2):
                np.random.seed(key(self.seed, "mixup", step, draws[i].position // 2) % 2**32)
                parts.append(self.mixup(images[i : i + 2], labels[i : i + 2])[1])
            targets = torch.cat(parts)
        else:
            off = self.mixup.label_smoothing / self.mixup.num_classes
            targets = torch.full((len(labels), self.mixup.num_classes), off)
            targets.scatter_(1, labels[:, None], 1.0 - self.mixup.label_smoothing + off)
        bad = [message for item in items for message in item[3]]
        return Batch(images, targets, step, [draw.position for draw in draws], bad)


def train_transform(recipe: Recipe, norm: ImageNorm) -> object:
    """timm's augmentation of one image.

    Raises:
        RecipeError: an augmentation policy that timm does not know.
    """
    try:
        transform = create_transform(
            norm.size,
            is_training=True,
            scale=recipe.scale,
            ratio=recipe.ratio,
            hflip=recipe.hflip,
            color_jitter=recipe.color_jitter or None,
            auto_augment=recipe.auto_augment,
            interpolation=recipe.train_interpolation,
            mean=norm.mean,
            std=norm.std,
            re_prob=recipe.random_erasing,
            re_mode=recipe.random_erasing_mode,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise RecipeError(f"auto_augment is {recipe.auto_augment!r}, which timm refuses: {error!r}") from None
    _allow_no_bits(transform)
    return transform


def train_loader(
    data: Data, recipe: Recipe, norm: ImageNorm, rank: int, world: int, first_step: int, pin: bool
) -> DataLoader:
    """The micro-batches of one process from a step on, each with its draws' keys."""
    return DataLoader(
        _TrainSet(data.train, train_transform(recipe, norm), recipe),
        batch_sampler=EpochOrder(recipe, len(data.train), rank, world, first_step),
        collate_fn=_Collate(recipe, len(data.classes)),
        **loading(recipe.workers, pin),
    )


def _allow_no_bits(transform: object) -> None:
    """At its highest magnitude timm's RandAugment keeps 0 bits of a colour, which Pillow refuses since 12.

    Black is what came of it before.
    """

    def posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
        if bits < 1:
            return Image.new(image.mode, image.size)
        return of_timm(image, bits, **options)

    of_timm = auto_augment.posterize
    for step in transform.transforms:
        for operation in getattr(step, "ops", ()):
            if operation.aug_fn is of_timm:
                operation.aug_fn = posterize


class _ValidationSet(Dataset):
    def __init__(self, images: Images, transform: object, skip: bool) -> None:
        self.images, self.transform, self.skip = images, transform, skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            image, label = self.images[index]
        except BadImageError as error:
            if not self.skip:
                raise
            return str(error)
        return self.transform(image), label


def _collate_validation(items: list) -> Batch | None:
    """A batch of those that could be read; None where there are none."""
    good = [item for item in items if not isinstance(item, str)]
    bad = [item for item in items if isinstance(item, str)]
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), bad=bad)
    images, labels = zip(*good, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), bad=bad)


def validation_transform(norm: ImageNorm) -> object:
    """Resize, centre crop, normalise, as timm evaluates."""
    return create_transform(
        norm.size,
        interpolation=norm.interpolation,
        mean=norm.mean,
        std=norm.std,
        crop_pct=norm.crop_pct,
    )


def validation_loader(
    images: Images,
    norm: ImageNorm,
    batch: int,
    workers: int,
    skip: bool,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> DataLoader:
    """One process's share of the validation images, in batches of at most ``batch``."""
    return DataLoader(
        _ValidationSet(images, validation_transform(norm), skip),
        batch_size=batch,
        sampler=range(rank, len(images), world),
        collate_fn=_collate_validation,
        **loading(workers, pin),
    )


def loading(workers: int, pin: bool) -> dict:
    """What every loader is told about its processes."""
    loading = {"num_workers": workers, "pin_memory": pin}
    if workers:
        loading["worker_init_fn"] = _start_worker
    return loading


def _start_worker(_: int) -> None:
    """Ctrl-C, and SIGTERM from `timeout` or systemd, reach every process: a worker leaves it to the run."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
