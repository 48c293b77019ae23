"""Checkpoints of the official code, timm, Hugging Face and mmpretrain, known by their keys and renamed."""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from .poolformer import HEADS, PoolFormer

__all__ = ["CheckpointReport", "convert_state_dict", "download_pretrained", "load_checkpoint"]

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = r"^(module\.|_orig_mod\.)+"


@dataclass(frozen=True)
class CheckpointReport:
    """What `load_checkpoint` did.

    ``source`` is ``"official"``, ``"timm"``, ``"huggingface"`` or ``"mmpretrain"``; ``head_mode`` the one set
    on the model. ``not_in_model`` are keys of the file that the model has no use for (a classifier, for a
    model without), ``not_in_file`` keys of the model that kept their values (the output norms of
    ``features_only``).
    """

    source: str
    head_mode: str
    not_in_model: tuple[str, ...]
    not_in_file: tuple[str, ...]


def convert_state_dict(state_dict: Mapping) -> dict[str, Tensor]:
    """A state dict of any of the four sources, under our (the official) keys; the tensors are not copied.

    Accepts the wrappers ``{"state_dict": ...}``, ``{"model": ...}`` and ``{"model_state_dict": ...}`` and the
    key prefixes that DistributedDataParallel (``module.``) and torch.compile (``_orig_mod.``) leave, and
    backbones without a head. A key that its source's PoolFormer does not have is kept as it is.

    Raises:
        TypeError: not a mapping of strings to tensors.
        ValueError: keys of none of the sources.
    """
    return _convert(_tensors_of(state_dict))[0]


def load_checkpoint(model: PoolFormer, path: str | PathLike) -> CheckpointReport:
    """Load a file of any of the four sources into a model, and set the head mode that belongs to it.

    timm's weights are evaluated with head mode ``"timm"``, the others with ``"official"``; a file that our
    own ``torch.save(model.state_dict(), path)`` wrote remembers its mode (.safetensors cannot). The file must
    have every parameter of the model in its shape and no other, with two exceptions that the report lists: a
    classifier is not used by a model with ``num_classes=0`` or ``features_only``, and the output norms of
    ``features_only`` may be missing, as they are from every classification checkpoint. On any error the model
    is unchanged.

    Args:
        model: from `create_model`.
        path: ``.safetensors``, or anything that ``torch.load(weights_only=True)`` reads (.pth, .pth.tar,
            .bin, ...).

    Raises:
        TypeError: model is not a PoolFormer, or the file does not hold tensors.
        FileNotFoundError: no such file.
        ValueError: an unreadable file, or one whose keys or shapes do not fit, naming the first that do not.
        ImportError: a .safetensors file without the package safetensors.
    """
    if not isinstance(model, PoolFormer):
        raise TypeError(f"model must be a poolformer_kernels.models.PoolFormer, got {type(model).__name__}")
    path = Path(path)
    try:
        state_dict = _tensors_of(_read(path))
        converted, source = _convert(state_dict)
        unused, kept = _check_fit(model, converted)
        head_mode = _noted_head_mode(state_dict) or ("timm" if source == "timm" else "official")
        head_mode = head_mode if head_mode in model.heads else model.heads[0]
    except (TypeError, ValueError) as error:
        raise type(error)(f"checkpoint {path}: {error}") from error
    model.load_state_dict({key: value for key, value in converted.items() if key not in unused}, strict=False)
    model.head_mode = head_mode
    return CheckpointReport(source, head_mode, tuple(unused), tuple(kept))


def download_pretrained(repo_id: str) -> str:
    """The local path of a repository's ``model.safetensors`` on the Hugging Face hub, downloaded if need be.

    Raises:
        ImportError: the package huggingface_hub is missing.
        ConnectionError: the hub cannot be reached, or does not have the file.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            "pretrained=True needs the package huggingface_hub: pip install huggingface_hub"
        ) from error
    _import_safetensors()
    try:
        return hf_hub_download(repo_id, "model.safetensors")
    except Exception as error:  # the client's errors have had no common base class over its versions
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConnectionError(
            f"pretrained=True: cannot get model.safetensors of {repo_id} from the Hugging Face hub:"
            f" {first_line}; offline, pass a local file as checkpoint"
        ) from error


# ---- reading -----------------------------------------------------------------------------------------------


def _import_safetensors() -> Callable:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            "a .safetensors file needs the package safetensors: pip install safetensors"
        ) from error
    return load_file


def _read(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist or is not a file")
    try:
        if path.suffix == ".safetensors":
            return _import_safetensors()(path, device="cpu")
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # the arguments that timm's train.py saves
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # zip, pickle, header and value errors alike: the file is at fault
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"cannot be read as tensors only ({first_line})") from error


def _tensors_of(state_dict: object) -> Mapping[str, Tensor]:
    """The mapping of names to tensors itself, out of the wrappers it came in."""
    if isinstance(state_dict, Mapping):
        wrapped = (state_dict[key] for key in _WRAPPERS if isinstance(state_dict.get(key), Mapping))
        state_dict = next(wrapped, state_dict)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"state_dict must map names to tensors, got {type(value).__name__} at {key!r}")
    return state_dict


def _noted_head_mode(state_dict: Mapping[str, Tensor]) -> str | None:
    """The head mode that our own models write into their state dict's metadata, if it is there."""
    metadata = getattr(state_dict, "_metadata", None)
    entries = metadata.values() if isinstance(metadata, Mapping) else ()
    modes = (entry.get("head_mode") for entry in entries if isinstance(entry, Mapping))
    return next((mode for mode in modes if mode in HEADS), None)


# ---- renaming ----------------------------------------------------------------------------------------------

# (the source's key, ours): S is the stage's index in `network`, D that of the downsample before it.
_TIMM = (
    (r"stem\.conv\.(\w+)", r"patch_embed.proj.\1"),
    (r"stem\.norm\.(\w+)", r"patch_embed.norm.\1"),
    (r"stages[._](?P<stage>\d)\.downsample\.conv\.(\w+)", r"network.{D}.proj.\2"),
    (r"stages[._](?P<stage>\d)\.downsample\.norm\.(\w+)", r"network.{D}.norm.\2"),
    (
        r"stages[._](?P<stage>\d)\.blocks\.(\d+)\.(layer|res)_scale([12])\.scale",
        r"network.{S}.\2.\3_scale_\4",
    ),
    (
        r"stages[._](?P<stage>\d)\.blocks\.(\d+)\.(norm[12]|mlp\.(?:fc[12]|act))\.(\w+)",
        r"network.{S}.\2.\3.\4",
    ),
    (r"head\.norm\.(\w+)", r"norm.\1"),
    (r"head\.fc\.(\w+)", r"head.\1"),
)
_HUGGINGFACE = (
    (r"encoder\.patch_embeddings\.0\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.patch_embeddings\.(?P<stage>\d)\.projection\.(\w+)", r"network.{D}.proj.\2"),
    (r"encoder\.block\.(?P<stage>\d)\.(\d+)\.(layer_scale_[12])", r"network.{S}.\2.\3"),
    (r"encoder\.block\.(?P<stage>\d)\.(\d+)\.before_norm\.(\w+)", r"network.{S}.\2.norm1.\3"),
    (r"encoder\.block\.(?P<stage>\d)\.(\d+)\.after_norm\.(\w+)", r"network.{S}.\2.norm2.\3"),
    (r"encoder\.block\.(?P<stage>\d)\.(\d+)\.output\.conv([12])\.(\w+)", r"network.{S}.\2.mlp.fc\3.\4"),
    (r"classifier\.(\w+)", r"head.\1"),
)


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in rules:
        match = re.fullmatch(pattern, key)
        if match:
            stage = int(match.groupdict().get("stage", 0))
            return match.expand(ours).replace("{S}", str(2 * stage)).replace("{D}", str(2 * stage - 1))
    return key


def _convert(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors under our keys, and the name of the source."""
    tensors = {re.sub(_PREFIXES, "", key): value for key, value in state_dict.items()}
    if "stem.conv.weight" in tensors:
        return {_rename(key, _TIMM): value for key, value in tensors.items()}, "timm"
    plain = {key.removeprefix("poolformer."): value for key, value in tensors.items()}
    if "encoder.patch_embeddings.0.projection.weight" in plain:
        return {_rename(key, _HUGGINGFACE): value for key, value in plain.items()}, "huggingface"
    if "backbone.patch_embed.proj.weight" in tensors:
        ours = {key.removeprefix("backbone."): value for key, value in tensors.items()}
        # norm6 belongs to the last stage: a classifier's final norm, unless norm0 marks a dense backbone
        final = "norm6." if "norm0.weight" in ours else "norm."
        rules = ((r"norm6\.(\w+)", final + r"\1"), (r"head\.fc\.(\w+)", r"head.\1"))
        return {_rename(key, rules): value for key, value in ours.items()}, "mmpretrain"
    if "patch_embed.proj.weight" in tensors:
        return tensors, "official"
    first = f"its first key is {next(iter(tensors))!r}" if tensors else "it is empty"
    raise ValueError(
        f"not a PoolFormer checkpoint: {first}; allowed: keys of the official code (patch_embed.proj.weight),"
        " timm (stem.conv.weight), Hugging Face (poolformer.encoder.patch_embeddings.0.projection.weight)"
        " or mmpretrain (backbone.patch_embed.proj.weight)"
    )


# ---- checking ----------------------------------------------------------------------------------------------


def _check_fit(model: PoolFormer, tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """The file's keys that are not used and the model's that keep their values; an error if more differs."""
    own = model.state_dict()
    headless = ("norm.", "head.") if model.features_only else ("head.",) if model.num_classes == 0 else ()
    optional = ("norm0.", "norm2.", "norm4.", "norm6.") if model.features_only else ()
    unexpected = [key for key in tensors if key not in own]
    missing = [key for key in own if key not in tensors]
    unused = [key for key in unexpected if key.startswith(headless)]
    kept = [key for key in missing if key.startswith(optional)]
    problems = []
    for what, keys, excused in (("missing", missing, kept), ("unexpected", unexpected, unused)):
        left = [key for key in keys if key not in excused]
        if left:
            problems.append(f"{len(left)} {what} keys, the first {left[0]}")
    wrong = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    if wrong:
        first = wrong[0]
        shapes = f"{list(tensors[first].shape)} in the file, {list(own[first].shape)} in the model"
        problems.append(f"{len(wrong)} keys of another shape, the first {first}: {shapes}")
    if problems:
        message = f"does not fit {model.config.name}: {'; '.join(problems)}"
        if not missing and not unexpected and wrong[0] == "head.weight":
            message += f" (load with num_classes={len(tensors['head.weight'])}, then call reset_classifier)"
        raise ValueError(message)
    return unused, kept
