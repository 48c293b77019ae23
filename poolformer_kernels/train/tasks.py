"""What the loop needs to know of a task, and the task that it was made for: classification."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from ..models import PoolFormer, convert_state_dict
from .data import Data, open_data, train_loader, train_transform
from .evaluation import autocast, evaluate, predict
from .networks import build, complete, image_norm
from .processes import Processes
from .recipe import Recipe, RecipeFields
from .report import Sample

__all__ = ["Classification", "Scores", "Task"]


@dataclass(frozen=True)
class Scores:
    """Of a validation: values by the columns of metrics.csv, and how many images could not be read."""

    values: dict[str, float]
    bad: int


class Task:
    """A model, its batches, loss and scores. The loop sees nothing else of what is trained.

    Args:
        recipe: complete (`completed`).
        data: what is trained on.
        processes: those of the run.
    """

    score: ClassVar[str]  # the column of metrics.csv that is highest for the best weights
    floor: ClassVar[str]  # the column that `validate --at-least` looks at
    samples_shown: ClassVar[int] = 24  # validation images on the page

    def __init__(self, recipe: RecipeFields, data: Data, processes: Processes) -> None:
        self.recipe, self.data, self.processes = recipe, data, processes

    kind: ClassVar[type[RecipeFields]]  # the class of its recipes
    sample: ClassVar[str]  # the data that needs no files, whose recipe is "small"

    @classmethod
    def open(cls, name: str, recipe: RecipeFields) -> Data:
        """The images of DATA.

        Raises:
            RecipeError: there are none, or not of this task.
        """
        raise NotImplementedError

    @staticmethod
    def completed(recipe: RecipeFields) -> RecipeFields:
        """The recipe with the model's own choices where it had None; RecipeError for a model there is not."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """The model with its initial weights, on the CPU: a function of the recipe and its seed."""
        raise NotImplementedError

    def schedule(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Callable[[int], None]:
        """What sets the learning rate for the step that is given to it."""
        raise NotImplementedError

    def loader(self, first_step: int) -> Iterable:
        """This process's micro-batches from a step on; each has ``positions`` and ``bad``."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: object) -> Tensor:
        """The loss of a micro-batch, a scalar."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, stop: Callable[[], bool]) -> Scores:
        """The scores on the validation images, which the processes share.

        Raises:
            BadImageError: an unreadable image, unless the recipe skips it.
            StoppedError: ``stop()`` was true on all processes.
        """
        raise NotImplementedError

    def weights(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict under the names that best.safetensors has."""
        return dict(state_dict)

    def notes(self, model: nn.Module) -> dict[str, object]:
        """What best.safetensors says of the model beside its name, classes and score."""
        return {}

    def samples(self, model: nn.Module) -> list:
        """Validation images for the page, with what the model says of them."""
        raise NotImplementedError

    def _autocast(self) -> torch.autocast:
        return autocast(self.processes.device, self.recipe.precision)

    def _sampled(self) -> range:
        """The indices of the validation images that the page shows."""
        every = max(1, len(self.data.val) // self.samples_shown)
        return range(0, len(self.data.val), every)[: self.samples_shown]


class Classification(Task):
    """Images to classes, with timm's augmentation; see `poolformer_kernels.train.recipe.Recipe`."""

    recipe: Recipe
    kind, sample = Recipe, "sample:digits"
    score = floor = "val_top1"

    @classmethod
    def open(cls, name: str, recipe: Recipe) -> Data:
        return open_data(name)

    @staticmethod
    def completed(recipe: Recipe) -> Recipe:
        return complete(recipe)

    def build(self) -> nn.Module:
        model = build(self.recipe, len(self.data.classes))
        self.norm = image_norm(model, self.recipe)
        train_transform(self.recipe, self.norm)  # what timm refuses is refused before the work
        self._loss = SoftTargetCrossEntropy()
        return model

    def schedule(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Callable[[int], None]:
        recipe = self.recipe
        by_step = recipe.schedule_on == "step"
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=recipe.schedule,
            num_epochs=recipe.epochs,
            cooldown_epochs=recipe.cooldown_epochs,
            warmup_epochs=recipe.warmup_epochs,
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            step_on_epochs=not by_step,
            updates_per_epoch=steps_per_epoch,
        )
        return schedule.step_update if by_step else lambda step: schedule.step(step // steps_per_epoch)

    def loader(self, first_step: int) -> Iterable:
        p = self.processes
        pin = p.device.type == "cuda"
        return train_loader(self.data, self.recipe, self.norm, p.rank, p.world, first_step, pin=pin)

    def loss(self, model: nn.Module, batch: object) -> Tensor:
        device = self.processes.device
        x = batch.images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        target = batch.targets.to(device, non_blocking=True)
        with self._autocast():
            return self._loss(model(x).float(), target)

    def evaluate(self, model: nn.Module, stop: Callable[[], bool]) -> Scores:
        recipe = self.recipe
        found = evaluate(
            model,
            self.data.val,
            self.norm,
            recipe.precision,
            self.processes,
            workers=recipe.workers,
            skip_bad=recipe.bad_images == "skip",
            stop=stop,
        )
        values = {
            "val_loss": found.loss,
            "val_top1": found.top1,
            "val_top5": found.top5,
            "val_images_per_second": found.images_per_second,
        }
        return Scores(values, found.bad)

    def weights(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return convert_state_dict(state_dict)
        except ValueError:  # a model of timm's that is no PoolFormer keeps its names
            return dict(state_dict)

    def notes(self, model: nn.Module) -> dict[str, object]:
        norm = self.norm
        return {
            **(model._notes() if isinstance(model, PoolFormer) else {"head_mode": "timm"}),
            "image_size": norm.size,
            "crop_pct": norm.crop_pct,
            "interpolation": norm.interpolation,
            "mean": list(norm.mean),
            "std": list(norm.std),
        }

    def samples(self, model: nn.Module) -> list[Sample]:
        classes, val, recipe = self.data.classes, self.data.val, self.recipe
        found = predict(model, val, self._sampled(), self.norm, recipe.precision, self.processes.device)
        return [
            Sample(image, classes[label], classes[guess], probability)
            for index, guess, probability in found
            for image, label in [val[index]]
        ]
