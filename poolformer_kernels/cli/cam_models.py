"""The models that `poolformer-kernels cam` puts side by side: ours and timm's, with their weights."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ..gradcam import target_layer
from ..models import ModelConfig, PoolFormer, create_model, list_models, load_checkpoint, model_config
from ..models.checkpoints import read_checkpoint, tensors_of
from ..models.export import Weights, export_state_dict, read_weights
from ..models.registry import model_class
from .errors import CommandError

__all__ = ["Column", "Request", "load", "requests"]

_TIMM = "timm:"


@dataclass(frozen=True)
class Request:
    """A model that was asked for: its name, None where the file says it, and where its weights come from.

    ``option`` is what an error calls it. Without a file the weights are timm's pretrained ones, or random.
    """

    option: str
    name: str | None
    file: str | None
    pretrained: bool = False

    @property
    def weights(self) -> str:
        """Where the weights come from, in words."""
        return self.file or ("pretrained" if self.pretrained else "random")

    @property
    def timm_name(self) -> str | None:
        """timm's name of the model; None where it is ours."""
        return self.name.removeprefix(_TIMM) if self.name and self.name.startswith(_TIMM) else None


@dataclass
class Column:
    """A model in eval mode, and how its pictures are prepared. ``classes`` are names, None where unknown."""

    label: str
    model: nn.Module
    weights: str
    random: bool
    num_classes: int
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    layer: str = ""
    classes: list[str] | None = None

    def prepared(self, photo: Image.Image) -> Image.Image:
        """The photo resized without a crop: what the model sees."""
        return photo.resize((self.size, self.size), Image.Resampling[self.interpolation.upper()])

    def name_of(self, index: int) -> str:
        """The class in words."""
        return f"class {index}" if self.classes is None else self.classes[index]


def requests(args: argparse.Namespace) -> list[Request]:
    """What the options ask for, checked as far as no file must be read.

    Raises:
        CommandError: models without weights, weights of no model, unknown names, files that do not exist.
    """
    found = [*_own(args), *map(_compared, args.compare or [])]
    for request in found:
        if request.file is not None and not Path(request.file).is_file():
            raise CommandError(f"{request.option}: {request.file} does not exist or is not a file")
        if request.timm_name is not None:
            _check_timm_name(request)
    return found


def _own(args: argparse.Namespace) -> list[Request]:
    """Of --model, --checkpoint and --random-weights."""
    names, files = args.model or [], args.checkpoint or []
    if args.random_weights and files:
        raise CommandError("--random-weights and --checkpoint are both given; allowed: one of them")
    if files and names and len(files) != len(names):
        raise CommandError(
            f"--model is given {len(names)} times and --checkpoint {len(files)} times; allowed: as many of"
            " both, which pair up in order, or --checkpoint alone"
        )
    if args.random_weights:
        names = names or ["poolformer_s12"]
        return [Request(f"--model {name}", name, None) for name in names]
    if names and not files:
        raise CommandError(
            f"--model {names[0]} has no weights; allowed: a --checkpoint FILE for each --model, or"
            " --random-weights for maps that mean nothing"
        )
    if not files and not args.compare:
        raise CommandError(
            "no weights are given; allowed: --checkpoint FILE, --compare timm:NAME, or --random-weights for"
            " maps that mean nothing"
        )
    names = names or [None] * len(files)
    return [Request(f"--checkpoint {f}", name, f) for name, f in zip(names, files, strict=True)]


def _compared(text: str) -> Request:
    """Of a value of --compare."""
    name, _, file = text.partition("=")
    if not name.startswith(_TIMM) or name == _TIMM or (not file and "=" in text):
        raise CommandError(f"--compare {text}: allowed: timm:NAME or timm:NAME=FILE; pictures come before it")
    return Request(f"--compare {text}", name, file or None, pretrained=not file)


def _check_timm_name(request: Request) -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision beside a torch without CUDA
        raise CommandError(f"{request.option} needs the package timm: pip install timm ({error})") from None
    if not timm.is_model(request.timm_name):
        raise CommandError(f"{request.option}: allowed after timm: a name of timm.list_models()")


def load(request: Request, size: int | None) -> Column:
    """The model of a request; ``size`` in pixels, None for its own.

    Raises:
        CommandError: a file that cannot be read or does not fit, no network for pretrained weights, a model
            without a classifier or one that Grad-CAM knows no layer of.
    """
    try:
        tensors = None if request.file is None else read_checkpoint(Path(request.file))
        notes = _notes(tensors)
        name = request.name or notes.get("model")
        request = replace(request, name=name)
        if request.timm_name is not None:
            _check_timm_name(request)
            column = _timm_column(request, tensors)
        else:
            column = _our_column(request, tensors, notes)
        column.layer = target_layer(column.model)
    except (OSError, TypeError, ValueError, ImportError) as error:
        raise CommandError(f"{request.option}: {error}") from None
    column.classes = _class_names(request, notes, column.num_classes)
    for key in ("mean", "std", "interpolation"):
        setattr(column, key, notes.get(key, getattr(column, key)))
    column.size = size or notes.get("image_size", column.size)
    if column.interpolation.upper() not in Image.Resampling.__members__:
        allowed = ", ".join(Image.Resampling.__members__).lower()
        raise CommandError(
            f"{request.option}: its interpolation is {column.interpolation}; allowed: {allowed}"
        )
    column.model.eval()
    return column


def _notes(state_dict: object) -> Mapping[str, object]:
    """What `poolformer-kernels train` or one of our models noted beside the tensors."""
    metadata = getattr(state_dict, "_metadata", None)
    notes = metadata.get("") if isinstance(metadata, Mapping) else None
    return notes if isinstance(notes, Mapping) else {}


def _class_names(request: Request, notes: Mapping[str, object], count: int) -> list[str] | None:
    names = notes.get("classes")
    if names is not None and (not isinstance(names, list) or len(names) != count):
        raise CommandError(
            f"{request.option}: the file notes other classes than the {count} it has weights of"
        )
    return names


# ---- ours --------------------------------------------------------------------------------------------------


def _our_column(request: Request, tensors: object, notes: Mapping[str, object]) -> Column:
    if tensors is None:
        config = model_config(request.name)
        torch.manual_seed(0)
        return _column(config.name, create_model(config.name), request, config)
    weights = _our_weights(request, tensors, notes)
    if weights.config is None:
        raise ValueError("it does not say which MetaFormer it is of; allowed: --model NAME for it")
    if weights.num_classes == 0 or weights.in_chans != 3:
        has = f"{weights.in_chans} input channels" if weights.num_classes else "no classifier"
        raise ValueError(f"its model has {has}; allowed: a classifier of RGB pictures")
    model = model_class(weights.config)(weights.config, num_classes=weights.num_classes)
    load_checkpoint(model, request.file)
    label = request.name or weights.name or Path(request.file).stem
    return _column(label, model, request, weights.config)


def _our_weights(request: Request, tensors: object, notes: Mapping[str, object]) -> Weights:
    """Of the named model; where a run noted a name that is no released model's, of the file's shapes."""
    if request.name is None or (request.name == notes.get("model") and request.name not in list_models()):
        return read_weights(tensors)
    return read_weights(tensors, request.name)


def _column(label: str, model: PoolFormer, request: Request, config: ModelConfig) -> Column:
    return Column(
        label=label,
        model=model,
        weights=request.weights,
        random=request.file is None,
        num_classes=model.num_classes,
        size=config.input_size,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
    )


# ---- timm's ------------------------------------------------------------------------------------------------


def _timm_column(request: Request, tensors: object) -> Column:
    import timm
    from timm.data import resolve_data_config

    torch.manual_seed(0)
    model = _pretrained(request) if request.pretrained else timm.create_model(request.timm_name)
    if tensors is not None:
        model = _with_weights(model, request, tensors)
    found = resolve_data_config(model=model)
    return Column(
        label=request.name,
        model=model,
        weights=request.weights,
        random=request.file is None and not request.pretrained,
        num_classes=model.num_classes,
        size=found["input_size"][-1],
        mean=found["mean"],
        std=found["std"],
        interpolation=found["interpolation"],
    )


def _pretrained(request: Request) -> nn.Module:
    import timm

    try:
        return timm.create_model(request.timm_name, pretrained=True)
    except Exception as error:  # the clients of timm's hubs have no common class of errors
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise CommandError(
            f"{request.option}: cannot get timm's pretrained weights: {reason}; offline: --compare"
            f" {request.name}=FILE"
        ) from None


def _with_weights(model: nn.Module, request: Request, tensors: object) -> nn.Module:
    """The model with a file's weights, made anew where the file has another number of classes."""
    import timm
    from timm.models import load_state_dict

    try:
        weights = export_state_dict(tensors, "timm")
    except (TypeError, ValueError):  # not of a PoolFormer
        weights = load_state_dict(request.file, device="cpu", weights_only=True)
    tensors_of(weights)
    classifier = model.pretrained_cfg.get("classifier") or "none"
    names = (classifier,) if isinstance(classifier, str) else classifier
    rows = weights.get(f"{names[0]}.weight")
    if rows is not None and len(rows) != model.num_classes:
        model = timm.create_model(request.timm_name, num_classes=len(rows))
    own = model.state_dict()
    wrong = [key for key in own if key not in weights or weights[key].shape != own[key].shape]
    wrong += [key for key in weights if key not in own]
    if wrong:
        raise ValueError(
            f"it does not fit timm's {request.timm_name}: the first key of {len(wrong)} is {wrong[0]}"
        )
    model.load_state_dict(weights)
    return model
