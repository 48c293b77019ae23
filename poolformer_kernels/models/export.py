"""The way back: weights under the names of the official code, timm or transformers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoints import (
    HUGGINGFACE,
    TIMM,
    check_fit,
    noted_head_mode,
    noted_structure,
    recognise,
    rename,
    tensors_of,
    usual_head_mode,
)
from .metaformer import MetaFormer, MetaFormerConfig
from .poolformer import ModelConfig, PoolFormer
from .poolformerv2 import PoolFormerV2
from .registry import list_models, model_class, model_config

__all__ = ["TARGETS", "Weights", "export_state_dict", "read_weights"]

TARGETS = ("official", "timm", "transformers")
_FAMILIES = {"timm": ("PoolFormer", "PoolFormerV2"), "transformers": ("PoolFormer",)}  # that it has
_CLASSES = {"PoolFormer": PoolFormer, "PoolFormerV2": PoolFormerV2, "MetaFormer": MetaFormer}
_RULES = {
    "timm": tuple((ours, theirs) for theirs, ours in TIMM),
    "transformers": tuple(
        (ours, f"poolformer.{theirs}" if theirs.startswith("encoder.") else theirs)
        for theirs, ours in HUGGINGFACE
    ),
}


@dataclass(frozen=True)
class Weights:
    """A state dict under our names, and what is known of the model that it belongs to.

    ``source`` is one of the four that `convert_state_dict` knows. ``head_mode`` is how the head is evaluated:
    as noted by the model of ours that wrote the state dict (``head_noted``), else as the source's code does.
    ``family`` is ``"PoolFormer"``, ``"PoolFormerV2"`` or ``"MetaFormer"``; ``name`` the model's in
    `list_models`, None where none has these sizes, or where nobody said which MetaFormer it is. ``structure``
    is how it noted to differ from a PoolFormer, None if it noted nothing. ``config`` has the sizes, None for
    a MetaFormer without a name.
    """

    tensors: dict[str, Tensor]
    source: str
    head_mode: str
    head_noted: bool
    family: str
    name: str | None
    structure: str | None
    config: ModelConfig | None

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.tensors["patch_embed.proj.weight"].shape[1]

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier, 0 for none."""
        return len(self.tensors["head.weight"]) if "head.weight" in self.tensors else 0

    def make(self, features_only: bool = False) -> PoolFormer:
        """The model that the tensors are of, with random weights.

        Raises:
            ValueError: a MetaFormer that nobody named.
        """
        if self.config is None:
            raise ValueError(f"it is of a MetaFormer with {self.structure}; allowed: together with its name")
        config = self.config if self.name is None else model_config(self.name)
        classes = 1000 if features_only else self.num_classes
        return _CLASSES[self.family](config, classes, self.in_chans, features_only=features_only)

    def renamed(self, to: str) -> dict[str, Tensor]:
        """The tensors under the names of one of `TARGETS`; they are not copied.

        Raises:
            ValueError: another target, or a model that the target does not have.
        """
        _check_target(to)
        if to == "official":
            return dict(self.tensors)
        if self.family not in _FAMILIES[to]:
            name = self.name or self.family
            name += f" with {self.structure}" if self.structure and self.name is None else ""
            raise ValueError(f"{to} has no {name}; allowed: models of {' and '.join(_FAMILIES[to])}")
        dims = self.config.dims
        if to == "timm" and any(dims[stage] == dims[stage + 1] for stage in range(len(dims) - 1)):
            sizes = ", ".join(map(str, dims))
            raise ValueError(
                f"timm has no downsample between stages of equally many channels; these are {sizes}"
            )
        renamed = {rename(key, _RULES[to]): value for key, value in self.tensors.items()}
        if None in renamed:
            first = next(key for key in self.tensors if rename(key, _RULES[to]) is None)
            raise ValueError(f"{to} has no place for {first}, which belongs to a dense backbone")
        return renamed


def export_state_dict(
    state_dict: Mapping[str, Any], to: str, model_name: str | None = None
) -> dict[str, Tensor]:
    """A state dict of any of the four sources under another code base's names; the tensors are not copied.

    The inverse of `convert_state_dict`, which it applies first, so that wrappers and prefixes go. Example::

        weights = export_state_dict(model.state_dict(), "timm")
        timm.create_model("poolformer_s12").load_state_dict(weights)

    The names are those of a classifier: of ``timm.create_model(name)``, of transformers'
    ``PoolFormerForImageClassification``, and of sail-sg/poolformer's models. Under ``"official"``
    PoolFormerV2 has this package's names, which continue PoolFormer's; its own repository
    (sail-sg/metaformer) has others. The same weights give other logits where the head is evaluated in another
    way, see `PoolFormer`: transformers does as the official code, timm does not.

    Args:
        state_dict: see `convert_state_dict`. Its names and shapes do not tell a ``metaformer_s12`` from a
            ``poolformer_s12``, nor one pool size, norm or activation from another. Our models note what they
            are in their state dict's metadata; without it, and without ``model_name``, it is taken for a
            PoolFormer or PoolFormerV2, of any size.
        to: ``"official"``, ``"timm"`` (PoolFormer and PoolFormerV2) or ``"transformers"`` (PoolFormer).
        model_name: one of `list_models`, with any number of classes and input channels.

    Raises:
        TypeError: not a mapping of strings to tensors.
        ValueError: another target or name, keys of none of the sources, keys or shapes that are not the
            model's, or a model that the target does not have.
    """
    _check_target(to)
    return read_weights(state_dict, model_name).renamed(to)


def read_weights(state_dict: Mapping[str, Any], model_name: str | None = None) -> Weights:
    """A state dict of any of the four sources under our names, and what model it belongs to.

    Raises:
        TypeError, ValueError: see `export_state_dict`.
    """
    config = None if model_name is None else model_config(model_name)
    given = tensors_of(state_dict)
    tensors, source = recognise(given)
    structure = noted_structure(given)
    hint = ""
    if config is not None:
        family, name = model_class(config).__name__, model_name
        expected = config.differences if isinstance(config, MetaFormerConfig) else ""
        if structure is not None and structure != expected:
            noted = structure or "the structure of a PoolFormer"
            raise ValueError(f"it is not of a {model_name}: the model that wrote it has {noted}")
    elif structure:
        family, name = "MetaFormer", None
    else:
        family = "PoolFormerV2" if "patch_embed.norm.weight" in tensors else "PoolFormer"
        hint = "; a MetaFormer must be named" if source in ("official", "mmpretrain") else ""
        config = _config(tensors, family, hint)
        name = _released_name(config, family)
    if config is not None:
        try:
            check_fit(_without_values(config, family, tensors), tensors)
        except ValueError as error:
            raise ValueError(f"{error}{hint}") from error
    noted = noted_head_mode(given)
    head_mode = "timm" if family == "PoolFormerV2" else noted or usual_head_mode(source)
    return Weights(tensors, source, head_mode, noted is not None, family, name, structure, config)


def _check_target(to: str) -> None:
    if to not in TARGETS:
        raise ValueError(f"to is {to!r}; allowed: {', '.join(TARGETS)}")


def _config(tensors: dict[str, Tensor], family: str, hint: str) -> ModelConfig:
    """The sizes of a PoolFormer, from the shapes of its convolutions and the indices of its blocks."""
    layers, dims = [], []
    for stage in range(4):
        key = f"network.{2 * stage - 1}.proj.weight" if stage else "patch_embed.proj.weight"
        indices = (re.match(rf"network\.{2 * stage}\.(\d+)\.", key) for key in tensors)
        blocks = {match[1] for match in indices if match}
        if key not in tensors or not blocks:
            what = f"no blocks network.{2 * stage}" if key in tensors else f"no {key}"
            raise ValueError(f"it is not of a {family}: it has {what}{hint}")
        dims.append(_convolution(tensors, key)[0])
        layers.append(len(blocks))
    name = f"a {family} of {', '.join(map(str, layers))} blocks and {', '.join(map(str, dims))} channels"
    scale = 1e-5 if family == "PoolFormer" else None
    return ModelConfig(name, tuple(layers), tuple(dims), scale, 0.0, None, 1.0)


def _convolution(tensors: dict[str, Tensor], key: str) -> torch.Size:
    """The shape of a convolution's weight: channels out, channels in, height, width."""
    shape = tensors[key].shape
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"{key} must be the weight of a convolution, its shape is {list(shape)}")
    return shape


def _released_name(config: ModelConfig, family: str) -> str | None:
    sizes = config.layers, config.dims
    names = list_models("poolformer_*" if family == "PoolFormer" else "poolformerv2_*")
    return next((n for n in names if (model_config(n).layers, model_config(n).dims) == sizes), None)


def _without_values(config: ModelConfig, family: str, tensors: dict[str, Tensor]) -> PoolFormer:
    """The model that the weights claim to be: names and shapes only. A backbone has neither norm nor head."""
    head = [tensors[key] for key in ("head.weight", "head.bias") if key in tensors]
    classes = max([1, *head[0].shape[:1]]) if head else 0
    backbone = not any(key.startswith(("norm.", "head.")) for key in tensors)
    in_chans = _convolution(tensors, "patch_embed.proj.weight")[1]
    with torch.device("meta"):
        return _CLASSES[family](config, num_classes=classes, in_chans=in_chans, features_only=backbone)
