"""How good a model is on images: loss, top-1, top-5 and speed."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .data import BadImageError, Batch, ImageNorm, Images, validation_loader, validation_transform
from .processes import Processes

__all__ = ["Evaluation", "StoppedError", "autocast", "evaluate", "predict"]


class StoppedError(Exception):
    """A signal came before the evaluation was over."""


@dataclass(frozen=True)
class Evaluation:
    """``top1`` and ``top5`` in per cent; ``images`` were read, ``bad`` could not be."""

    loss: float
    top1: float
    top5: float
    images: int
    bad: int
    images_per_second: float


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to a precision; of float32, none."""
    half = precision != "float32"
    return torch.autocast(device.type, getattr(torch, precision) if half else torch.bfloat16, enabled=half)


def evaluate(
    model: nn.Module,
    images: Images,
    norm: ImageNorm,
    precision: str,
    processes: Processes,
    *,
    batch: int = 64,
    workers: int = 0,
    skip_bad: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Measures a model, which is in eval mode meanwhile, on images that the processes share.

    Every process calls the model equally often, as sharded parameters need it.

    Raises:
        BadImageError: an unreadable image, unless ``skip_bad``.
        StoppedError: ``stop()`` was true on all processes; it is asked before each batch.
    """
    device = processes.device
    loader = validation_loader(
        images, norm, batch, workers, skip_bad, processes.rank, processes.world, device.type == "cuda"
    )
    largest = -(-len(images) // processes.world)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    counted = bad = 0
    training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        with torch.no_grad(), autocast(device, precision):
            for found in _padded(loader, -(-largest // batch), norm.size):
                if stop():
                    raise StoppedError
                bad += len(found.bad)
                x = found.images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
                logits = model(x).float()
                if len(found.targets) == 0:
                    continue
                target = found.targets.to(device, non_blocking=True)
                best = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
                loss = F.cross_entropy(logits, target, reduction="sum").double()
                sums += torch.stack([loss, best[:, 0].sum().double(), best.sum().double()])
                counted += len(target)
    finally:
        model.train(training)
    loss, top1, top5, counted, bad = processes.sum(*sums.tolist(), counted, bad)
    seconds = time.perf_counter() - start
    counted = int(counted)
    if counted == 0:
        raise BadImageError(f"none of {int(bad)} validation images can be read")
    return Evaluation(
        loss / counted, 100 * top1 / counted, 100 * top5 / counted, counted, int(bad), counted / seconds
    )


def _padded(loader: Iterable[Batch], batches: int, size: int) -> Iterable[Batch]:
    """The loader's batches, those without an image replaced by one of a black image that does not count."""
    empty = Batch(torch.zeros(1, 3, size, size), torch.empty(0, dtype=torch.int64))
    done = 0
    for found in loader:
        if len(found.targets) == 0:
            found.images = empty.images
        yield found
        done += 1
    for _ in range(done, batches):
        yield empty


def predict(
    model: nn.Module,
    images: Images,
    indices: Iterable[int],
    norm: ImageNorm,
    precision: str,
    device: torch.device,
) -> list[tuple[int, int, float]]:
    """(index, class, probability) of the model's choice for single images; unreadable ones are left out."""

    transform, found = validation_transform(norm), []
    training = model.training
    model.eval()
    with torch.no_grad(), autocast(device, precision):
        for index in indices:
            try:
                image, _ = images[index]
            except BadImageError:
                continue
            x = transform(image)[None].to(device).contiguous(memory_format=torch.channels_last)
            probability, chosen = model(x).float().softmax(1).max(1)
            found.append((index, int(chosen), float(probability)))
    model.train(training)
    return found
