"""The model of a checkpoint and what it finds in a picture, for `poolformer-kernels predict`."""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from ..dense import MaskRCNN, RetinaNet, SemanticFPN, segment
from ..dense.checkpoints import model_of_content
from ..drawing import draw_detections, draw_label_map, pixel_counts
from ..models import ModelConfig, PoolFormer, list_models
from ..models.checkpoints import (
    dense_kind,
    load_content,
    noted,
    noted_classes,
    read_checkpoint,
    tensors_of,
    without_prefixes,
)
from ..models.export import read_weights
from .errors import CommandError
from .photos import FILTERS, preprocess

__all__ = ["Prediction", "Predictor", "open_predictor"]

_SCORE = 0.3
_TOP = 5


@dataclass(frozen=True)
class Prediction:
    """What was found in a picture.

    ``record`` are its entries of the JSON file, ``summary`` is it in a few words, ``picture`` has it drawn,
    and ``label_map`` has each pixel's class, of a segmenter only.
    """

    record: dict
    summary: str
    picture: Image.Image
    label_map: Image.Image | None = None


@dataclass(frozen=True)
class Predictor:
    """A model and how it is asked.

    ``facts`` describe it for the JSON file and the page; ``find`` takes an upright RGB picture.
    """

    facts: dict
    names: tuple[str, ...]
    find: Callable[[Image.Image], Prediction]


def open_predictor(args: argparse.Namespace, names: Sequence[str] | None, device: torch.device) -> Predictor:
    """The predictor of ``args.checkpoint``.

    Args:
        args: checkpoint, model, score, image_size and precision are used.
        names: of the classes; None is what the file says, ImageNet's for a classifier of 1000, else numbers.

    Raises:
        CommandError: a file that cannot be read or does not fit, or options that its kind of model has not.
    """
    path = Path(args.checkpoint)
    try:
        content = read_checkpoint(path)
        found = dense_kind(without_prefixes(tensors_of(content)))
        opened = _open_classifier if found is None else _open_dense
        return opened(args, content, names, device)
    except (FileNotFoundError, ImportError) as error:  # they name the file or the package themselves
        raise CommandError(str(error)) from None
    except (TypeError, ValueError) as error:
        raise CommandError(f"checkpoint {path}: {error}") from None


def _open_dense(
    args: argparse.Namespace, content: object, names: Sequence[str] | None, device: torch.device
) -> Predictor:
    kind = dense_kind(without_prefixes(tensors_of(content)))[0]
    options, limits = {}, args.image_size or _noted_limits(content)
    if kind != SemanticFPN.kind:
        options["score_threshold"] = _SCORE if args.score is None else args.score
        if limits is not None:
            options["min_size"], options["max_size"] = limits
    elif args.score is not None:
        raise CommandError(f"--score {args.score}: {args.checkpoint} is of a {kind}, which has no scores")
    model, report, own = model_of_content(content, args.model, **options)
    model = _ready(model, device)
    names = _named(args, names or own, model.num_classes)
    if isinstance(model, SemanticFPN):
        limits = tuple(limits or (512, 2048))
        task, find = "segmentation", _segmenter(model, names, limits, args.precision, device)
    else:
        limits = (model.transform.min_size[-1], model.transform.max_size)
        task = "instance segmentation" if isinstance(model, MaskRCNN) else "detection"
        find = _detector(model, names, args.precision, device)
    facts = {
        "task": task,
        "name": model.checkpoint_name(),
        "checkpoint": args.checkpoint,
        "names_of": report.source,
        "classes": len(names),
        "image_size": list(limits),
        "score": options.get("score_threshold"),
        "precision": args.precision,
        "device": device.type,
    }
    return Predictor(facts, names, find)


def _open_classifier(
    args: argparse.Namespace, content: object, names: Sequence[str] | None, device: torch.device
) -> Predictor:
    if args.score is not None:
        raise CommandError(f"--score {args.score}: {args.checkpoint} is of a classifier, which has no boxes")
    name = args.model or noted(content, "model", str)
    if args.model is None and name not in list_models():
        name = None  # one of the training's own sizes, or timm's name
    weights = read_weights(content, name)
    if weights.num_classes == 0:
        raise ValueError("it has no classifier: there is nothing to predict")
    model = _ready(weights.make(), device, content)
    own = noted_classes(content)
    if own is not None and len(own) != model.num_classes:
        raise ValueError(f"it names {len(own)} classes, its classifier has {model.num_classes}")
    if own is None and model.num_classes == 1000:
        own = torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]
    names = _named(args, names or own, model.num_classes)
    model.config = _noted_config(model, content)
    size = noted(content, "image_size", int) or model.config.input_size
    if args.image_size is not None:
        size, longer = args.image_size
        if size != longer:
            raise CommandError(
                f"--image-size {size} {longer}: {args.checkpoint} is of a classifier, whose pictures are"
                " square; allowed: the same number twice"
            )
    facts = {
        "task": "classification",
        "name": model.config.name,
        "checkpoint": args.checkpoint,
        "names_of": weights.source,
        "classes": len(names),
        "image_size": [size, size],
        "score": None,
        "precision": args.precision,
        "device": device.type,
    }
    return Predictor(facts, names, _classifier(model, names, size, args.precision, device))


def _ready(model: torch.nn.Module, device: torch.device, content: object = None) -> torch.nn.Module:
    """In evaluation mode, on the device, with the weights of ``content`` if it is given."""
    body = model if isinstance(model, PoolFormer) else model.backbone.body
    if body.in_chans != 3:
        raise ValueError(f"it takes pictures of {body.in_chans} channels; allowed: 3")
    if content is not None:
        load_content(model, content)
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"its {name} has numbers that are not finite: there is nothing to predict")
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def _named(args: argparse.Namespace, names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"class {i}" for i in range(count))
    if len(names) != count:
        raise CommandError(
            f"--classes {args.classes} has {len(names)} names, {args.checkpoint} {count} classes"
        )
    return tuple(names)


def _noted_limits(content: object) -> tuple[int, int] | None:
    """The limits of the shorter and the longer side that a training run noted, or None."""
    scale = noted(content, "scale", list)
    found = scale[::-1] if scale else [noted(content, name, int) for name in ("min_size", "max_size")]
    if found == [None, None]:
        return None
    fine = len(found) == 2 and all(isinstance(side, (int, float)) for side in found)
    if not fine or not 1 <= found[0] <= found[1] < math.inf:
        raise ValueError(f"its images had sides of {found}; allowed: a shorter and a longer one")
    return int(found[0]), int(found[1])


def _noted_config(model: PoolFormer, content: object) -> ModelConfig:
    """The model's configuration, with what a training run noted of its images."""
    changes = {
        "crop_pct": noted(content, "crop_pct", (int, float)),
        "interpolation": noted(content, "interpolation", str),
        "mean": noted(content, "mean", list),
        "std": noted(content, "std", list),
    }
    if changes["interpolation"] not in (None, *FILTERS):
        raise ValueError(
            f"its images were scaled by {changes['interpolation']!r}; allowed: {', '.join(FILTERS)}"
        )
    return replace(model.config, **{name: value for name, value in changes.items() if value is not None})


# ---- what each kind of model finds ------------------------------------------------------------------------


def _pixels(image: Image.Image, device: torch.device) -> Tensor:
    """An RGB picture as float32 ``[3, H, W]`` in [0, 1]."""
    pixels = torch.from_numpy(np.array(image)).to(device)
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def _detector(
    model: RetinaNet | MaskRCNN, names: tuple[str, ...], precision: str, device: torch.device
) -> Callable[[Image.Image], Prediction]:
    def find(image: Image.Image) -> Prediction:
        with torch.inference_mode(), _autocast(precision, device):
            result = model([_pixels(image, device)])[0]
        boxes, scores, labels = (result[name].tolist() for name in ("boxes", "scores", "labels"))
        masks = None
        if "masks" in result:
            masks = list((result["masks"][:, 0] >= 0.5).cpu().numpy())
        detections = [
            {"label": label, "name": names[label], "score": score, "box": box}
            for label, score, box in zip(labels, scores, boxes, strict=True)
        ]
        for i, mask in enumerate(masks or ()):
            detections[i]["mask"] = run_lengths(mask)
        texts = [f"{d['name']} {d['score']:.0%}" for d in detections]
        picture = draw_detections(image, boxes, labels, texts, masks)
        return Prediction({"detections": detections}, _counted([d["name"] for d in detections]), picture)

    return find


def _segmenter(
    model: SemanticFPN,
    names: tuple[str, ...],
    limits: tuple[int, int],
    precision: str,
    device: torch.device,
) -> Callable[[Image.Image], Prediction]:
    def find(image: Image.Image) -> Prediction:
        with torch.inference_mode(), _autocast(precision, device):
            labels = segment(model, _pixels(image, device), *limits).argmax(0).cpu().numpy()
        classes = [
            {"label": label, "name": names[label], "pixels": pixels, "share": pixels / labels.size}
            for label, pixels in pixel_counts(labels, len(names))
        ]
        summary = ", ".join(f"{c['name']} {c['share']:.0%}" for c in classes[:3])
        label_map = Image.fromarray(labels.astype(np.uint8 if len(names) <= 256 else np.uint16))
        return Prediction({"classes": classes}, summary, draw_label_map(image, labels, names), label_map)

    return find


def _classifier(
    model: PoolFormer, names: tuple[str, ...], size: int, precision: str, device: torch.device
) -> Callable[[Image.Image], Prediction]:
    def find(image: Image.Image) -> Prediction:
        x = preprocess(image, model.config, size)[None].to(device, memory_format=torch.channels_last)
        with torch.inference_mode(), _autocast(precision, device):
            logits = model(x)
        best = logits[0].float().softmax(0).topk(min(_TOP, len(names)))
        top = [
            {"label": label, "name": names[label], "probability": probability}
            for label, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        summary = f"{top[0]['name']} {top[0]['probability']:.0%}"
        return Prediction({"top": top}, summary, image)

    return find


def _counted(names: list[str]) -> str:
    if not names:
        return "nothing found"
    counts = ", ".join(f"{n} {name}" for name, n in Counter(names).most_common())
    return f"{len(names)} found: {counts}"


def run_lengths(mask: np.ndarray) -> dict:
    """A mask as COCO's uncompressed run-length code, which ``pycocotools.mask.frPyObjects`` reads.

    ``counts`` are the lengths of runs down the columns, of 0 and 1 in turn, first those of 0.
    """
    values = mask.ravel(order="F")
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [values.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if values[0] else counts}
