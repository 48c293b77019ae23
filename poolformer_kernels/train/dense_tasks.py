"""Detection, instance and semantic segmentation for the loop: models, batches, losses and scores."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..dense import create_detector, create_segmenter, model_of_checkpoint, segment, segmentation_loss
from ..drawing import draw_detections, draw_label_map
from ..models import ModelConfig, PoolFormer, load_checkpoint
from ..models.registry import model_class
from ..nn.token_mixers import PositionEmbedding, RandomMatrix, SpatialFC
from .coco import Instances, open_coco
from .data import BadImageError, Data, Draw, EpochOrder, key, loading, readable
from .dense_evaluation import CocoScores, SegmentationScores
from .dense_recipe import DetectionRecipe, InstanceRecipe, SegmentationRecipe
from .dense_transforms import DetectionTransform, SegmentationTransform, as_tensor
from .evaluation import StoppedError
from .label_maps import IGNORED, open_label_maps
from .networks import DIGITS, config_of
from .nuclei import coco_nuclei, label_map_nuclei
from .recipe import RecipeError, RecipeFields
from .report import Picture
from .tasks import Scores, Task

__all__ = ["Detection", "Instance", "Segmentation"]

_OF_ONE_SIZE = (PositionEmbedding, RandomMatrix, SpatialFC)
_DRAWN_FROM = 0.3  # the score from which a detection is drawn on the page
_LABELLED = 20  # objects; of more, boxes alone are drawn


@dataclass
class DenseBatch:
    """A micro-batch: images ``[3, H, W]``, float32, and what is to be found in each of them."""

    images: list[Tensor]
    targets: list
    step: int
    positions: list[int]
    bad: list[str] = field(default_factory=list)


class _TrainSet(Dataset):
    """Draws to (draw, augmented image, its target, messages of bad images)."""

    def __init__(self, images: Sequence, transform: Callable, recipe: RecipeFields) -> None:
        self.images, self.transform, self.recipe = images, transform, recipe

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> tuple[Draw, Tensor, object, list[str]]:
        image, target, bad = readable(self.images, draw.index, self.recipe.bad_images == "skip")
        seed = key(self.recipe.seed, "augmentation", draw.epoch, draw.index)
        return draw, *self.transform(image, target, seed), bad


def _collate(items: list) -> DenseBatch:
    draws, images, targets, bad = zip(*items, strict=True)
    return DenseBatch(
        list(images),
        list(targets),
        draws[0].step,
        [draw.position for draw in draws],
        [m for found in bad for m in found],
    )


class _Pictures(Dataset):
    """This process's share of the validation images: (index, what `read` makes of it), or a message."""

    def __init__(self, images: Sequence, read: Callable, skip: bool) -> None:
        self.images, self.read, self.skip = images, read, skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, object] | str:
        try:
            image, target = self.images[index]
        except BadImageError as error:
            if not self.skip:
                raise
            return str(error)
        return index, self.read(image, target)


def _alone(items: list) -> object:
    return items[0]


class DenseTask(Task):
    """What the dense tasks share: the backbone, the order of samples, and how a validation goes on."""

    recipe: DetectionRecipe | SegmentationRecipe
    sample = "sample:nuclei"
    samples_shown = 6
    whole = False  # whether a checkpoint must be of the whole model, not of the backbone alone

    @staticmethod
    def completed(recipe: RecipeFields) -> RecipeFields:
        return recipe  # its fields leave nothing to the model

    def build(self) -> nn.Module:
        torch.manual_seed(key(self.recipe.seed, "weights"))
        self.transform = self._transform()
        model = self._model(self._body())
        if self.recipe.checkpoint is not None:
            self._load(model, self.recipe.checkpoint)
        return model.to(memory_format=torch.channels_last)

    @property
    def _config(self) -> ModelConfig:
        """The backbone's."""
        return config_of(self.recipe.model.removeprefix(f"{self.recipe.head}_"))

    def _body(self) -> PoolFormer:
        config = self._config
        cls = PoolFormer if config is DIGITS else model_class(config)
        body = cls(config, drop_path_rate=self.recipe.drop_path or 0.0, features_only=True)
        for module in body.modules():
            if isinstance(module, _OF_ONE_SIZE):
                raise RecipeError(
                    f"model is {self.recipe.model}, whose {type(module).__name__} was made for images of"
                    f" {config.input_size} pixels; allowed: backbones for images of any size"
                )
        return body

    def _model(self, body: PoolFormer) -> nn.Module:
        raise NotImplementedError

    def _transform(self) -> Callable:
        raise NotImplementedError

    def _load(self, model: nn.Module, path: str) -> None:
        """Weights of a file as far as they fit.

        Of the same kind of model: all, but for the classes where they are others. Of another kind: those of
        the backbone. Of a classifier: those of the backbone, whose output norms stay as they are.
        """
        try:
            try:
                load_checkpoint(model, path)
            except ValueError as error:
                if self.whole or not (_load_body(model, path) or _load_other(model, path)):
                    raise error from None
        except (OSError, TypeError, ValueError, ImportError) as error:
            raise RecipeError(str(error)) from None

    def schedule(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Callable[[int], None]:
        def set_rate(step: int) -> None:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.rate(step, steps_per_epoch)

        return set_rate

    def loader(self, first_step: int) -> Iterable:
        recipe, p = self.recipe, self.processes
        return DataLoader(
            _TrainSet(self.data.train, self.transform, recipe),
            batch_sampler=EpochOrder(recipe, len(self.data.train), p.rank, p.world, first_step),
            collate_fn=_collate,
            **loading(recipe.workers, False),
        )

    def evaluate(self, model: nn.Module, stop: Callable[[], bool]) -> Scores:
        p, training, start = self.processes, model.training, time.perf_counter()
        scores, bad, shares = self._scores(), 0, -(-len(self.data.val) // p.world)
        model.eval()
        try:
            found = iter(self._shared_images())
            for _ in range(shares):  # every process asks equally often whether to stop
                if stop():
                    raise StoppedError
                item = next(found, None)
                if isinstance(item, str):
                    bad += 1
                elif item is not None:
                    with torch.no_grad(), self._autocast():
                        self._judge(model, *item, scores)
        finally:
            model.train(training)
        (bad,) = p.sum(bad)
        if int(bad) == len(self.data.val):
            raise BadImageError(f"none of {int(bad)} validation images can be read")
        values = p.same(self._gathered(scores))
        values["val_images_per_second"] = (len(self.data.val) - bad) / (time.perf_counter() - start)
        return Scores(values, int(bad))

    def _shared_images(self) -> Iterator:
        recipe, p = self.recipe, self.processes
        skip = recipe.bad_images == "skip"
        return iter(
            DataLoader(
                _Pictures(self.data.val, self._read, skip),
                batch_size=1,
                sampler=range(p.rank, len(self.data.val), p.world),
                collate_fn=_alone,
                **loading(recipe.workers, False),
            )
        )

    def _read(self, image: object, target: object) -> object:
        """What a validation image is made into by the process that loads it."""
        raise NotImplementedError

    def _scores(self) -> object:
        raise NotImplementedError

    def _judge(self, model: nn.Module, index: int, read: object, scores: object) -> None:
        """Adds the model's prediction of an image to the scores."""
        raise NotImplementedError

    def _gathered(self, scores: object) -> dict[str, float]:
        """The values of all processes' scores together; in the first process at least."""
        raise NotImplementedError

    def notes(self, model: nn.Module) -> dict[str, object]:
        return {"task": self.recipe.task}

    def samples(self, model: nn.Module) -> list[Picture]:
        """Drawn by the first process alone; the other models are the same."""
        if not self.processes.first:
            return []
        training, found = model.training, []
        model.eval()
        for index in self._sampled():
            try:
                image, target = self.data.val[index]
            except BadImageError:
                continue
            with torch.no_grad(), self._autocast():
                found.append(self._picture(model, image, target, Path(self.data.val.file(index)).name))
        model.train(training)
        return found

    def _picture(self, model: nn.Module, image: Image.Image, target: object, file: str) -> Picture:
        raise NotImplementedError


def _load_body(model: nn.Module, path: str) -> bool:
    """Loads a classifier's file into the backbone, if it is one that fits."""
    try:
        load_checkpoint(model.backbone.body, path)
    except ValueError:
        return False
    return True


def _load_other(model: nn.Module, path: str) -> bool:
    """Loads what fits of another detector's or segmenter's file: at least the whole backbone."""
    try:
        other, _, _ = model_of_checkpoint(path)
    except ValueError:
        return False
    own, given = model.state_dict(), other.state_dict()
    if type(other) is type(model):
        wanted = own.keys() - set(model.class_keys)
    else:
        wanted = {key for key in own if key.startswith("backbone.body.")}
    if any(key not in given or given[key].shape != own[key].shape for key in wanted):
        return False
    model.load_state_dict({key: given[key] for key in wanted}, strict=False)
    return True


class Detection(DenseTask):
    """Boxes of objects, in COCO's format."""

    recipe: DetectionRecipe
    kind = DetectionRecipe
    score, floor = "val_AP", "val_AP50"
    kinds: ClassVar[tuple[str, ...]] = ("bbox",)

    @classmethod
    def open(cls, name: str, recipe: RecipeFields) -> Data:
        if name == cls.sample:
            return coco_nuclei(masks="segm" in cls.kinds)
        return open_coco(name, masks="segm" in cls.kinds)

    def _model(self, body: PoolFormer) -> nn.Module:
        recipe = self.recipe
        return create_detector(
            recipe.head,
            body,
            len(self.data.classes),
            min_size=int(recipe.min_size[1]),
            max_size=recipe.max_size,
        )

    def _transform(self) -> DetectionTransform:
        recipe = self.recipe
        return DetectionTransform(recipe.sizes, recipe.max_size, recipe.hflip, recipe.crop)

    def loss(self, model: nn.Module, batch: DenseBatch) -> Tensor:
        device = self.processes.device
        images = [image.to(device, non_blocking=True) for image in batch.images]
        targets = [
            self._target(target, key(self.recipe.seed, "regions", batch.step, position), device)
            for target, position in zip(batch.targets, batch.positions, strict=True)
        ]
        with self._autocast():
            losses = model(images, targets)
        return torch.stack(list(losses.values())).sum()

    def _target(self, target: Instances, seed: int, device: torch.device) -> dict[str, object]:
        """As the detector wants it; the seed is that of the regions it samples for this image."""
        found = {"boxes": target.boxes.to(device), "labels": target.labels.to(device), "seed": seed}
        if target.masks is not None:
            found["masks"] = target.masks.to(device)
        return found

    def _read(self, image: object, target: Instances) -> Tensor:
        return as_tensor(image)

    def _scores(self) -> CocoScores:
        return CocoScores(self.data.val, self.kinds)

    def _judge(self, model: nn.Module, index: int, read: Tensor, scores: CocoScores) -> None:
        scores.add(index, model([read.to(self.processes.device)])[0])

    def _gathered(self, scores: CocoScores) -> dict[str, float]:
        parts = self.processes.gather(scores.results)
        if not self.processes.first:
            return {}
        scores.merge(parts)
        values = {}
        for kind, found in scores.scores().items():
            prefix = "val_" if kind == "bbox" else "val_mask_"
            values |= {f"{prefix}{name}": found[name] or 0.0 for name in ("AP", "AP50", "AP75")}
        return values

    def _picture(self, model: nn.Module, image: Image.Image, target: Instances, file: str) -> Picture:
        found = model([as_tensor(image).to(self.processes.device)])[0]
        sure = found["scores"] >= _DRAWN_FROM
        boxes, labels, scores = (found[name][sure].cpu() for name in ("boxes", "labels", "scores"))
        masks = (found["masks"][sure, 0] >= 0.5).cpu().numpy() if "segm" in self.kinds else None
        names = self.data.classes
        texts = [f"{names[n]} {s:.0%}" for n, s in zip(labels.tolist(), scores.tolist(), strict=True)]
        if len(texts) > _LABELLED:
            texts = [""] * len(texts)
        truth = draw_detections(
            image,
            target.boxes.tolist(),
            target.labels.tolist(),
            [names[n] if len(target.labels) <= _LABELLED else "" for n in target.labels.tolist()],
            None if target.masks is None else target.masks.bool().numpy(),
        )
        drawn = draw_detections(image, boxes.tolist(), labels.tolist(), texts, masks)
        caption = f"{file}: {len(target.boxes)} objects, {len(boxes)} found with a score of {_DRAWN_FROM:.0%}"
        return Picture(truth, drawn, f"{caption} or more")

    def notes(self, model: nn.Module) -> dict[str, object]:
        recipe = self.recipe
        return {**super().notes(model), "min_size": int(recipe.min_size[1]), "max_size": recipe.max_size}


class Instance(Detection):
    """Boxes and masks of objects, in COCO's format."""

    recipe: InstanceRecipe
    kind = InstanceRecipe
    score, floor = "val_mask_AP", "val_mask_AP50"
    kinds = ("bbox", "segm")


class Segmentation(DenseTask):
    """A class for every pixel, in folders of label maps."""

    recipe: SegmentationRecipe
    kind = SegmentationRecipe
    score = floor = "val_mIoU"

    @classmethod
    def open(cls, name: str, recipe: SegmentationRecipe) -> Data:
        if name == cls.sample:
            return label_map_nuclei()
        return open_label_maps(name, recipe.zero_label)

    def _model(self, body: PoolFormer) -> nn.Module:
        model = create_segmenter("semantic_fpn", body, len(self.data.classes), dropout=self.recipe.dropout)
        if self.processes.world > 1 and self.processes.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model

    def _transform(self) -> SegmentationTransform:
        recipe, config = self.recipe, self._config
        longer, shorter = recipe.scale
        return SegmentationTransform(
            config.mean,
            config.std,
            (int(longer), int(shorter)),
            recipe.ratio,
            recipe.crop,
            recipe.cat_max_ratio,
            recipe.hflip,
        )

    def loss(self, model: nn.Module, batch: DenseBatch) -> Tensor:
        device = self.processes.device
        x = torch.stack(batch.images).to(device, non_blocking=True)
        target = torch.stack(batch.targets).to(device, non_blocking=True)
        with self._autocast():
            return segmentation_loss(model(x), target)

    def _read(self, image: object, target: Tensor) -> tuple[Tensor, Tensor]:
        return as_tensor(image), target

    def _scores(self) -> SegmentationScores:
        self._losses = [0.0, 0]
        return SegmentationScores(len(self.data.classes))

    def _judge(
        self, model: nn.Module, index: int, read: tuple[Tensor, Tensor], scores: SegmentationScores
    ) -> None:
        image, target = read
        longer, shorter = map(int, self.recipe.scale)
        logits = segment(model, image.to(self.processes.device), shorter, longer).cpu()
        scores.add(logits.argmax(0), target)
        self._losses[0] += float(segmentation_loss(logits[None], target[None]))
        self._losses[1] += 1

    def _gathered(self, scores: SegmentationScores) -> dict[str, float]:
        loss, images = self.processes.sum(*self._losses)
        parts = self.processes.gather(scores.confusion)
        merged = SegmentationScores(scores.num_classes)
        merged.merge(parts)
        found = merged.scores()
        if not math.isfinite(loss):  # what is not a number is no answer, though argmax takes it for class 0
            found |= {"mIoU": 0.0, "pixel_accuracy": 0.0}
        return {
            "val_loss": loss / max(images, 1),
            "val_mIoU": found["mIoU"] or 0.0,
            "val_accuracy": found["pixel_accuracy"] or 0.0,
        }

    def _picture(self, model: nn.Module, image: Image.Image, target: Tensor, file: str) -> Picture:
        longer, shorter = map(int, self.recipe.scale)
        found = segment(model, as_tensor(image).to(self.processes.device), shorter, longer).argmax(0).cpu()
        counted = target != IGNORED
        right = (found == target)[counted].float().mean().item() if bool(counted.any()) else 0.0
        truth, drawn = (draw_label_map(image, m.numpy(), self.data.classes) for m in (target, found))
        return Picture(truth, drawn, f"{file}: {right:.1%} of the pixels are right")

    def notes(self, model: nn.Module) -> dict[str, object]:
        recipe = self.recipe
        return {**super().notes(model), "scale": list(recipe.scale), "zero_label": recipe.zero_label}
