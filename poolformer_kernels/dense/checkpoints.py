"""The detector or segmenter that a checkpoint is of, made and loaded."""

from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from ..models import CheckpointReport, PoolFormer, list_models
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
from .mask_rcnn import MaskRCNN
from .official_names import our_names
from .registry import create_detector, create_segmenter, list_detectors, split_name
from .retinanet import RetinaNet
from .semantic_fpn import SemanticFPN

__all__ = ["model_of_checkpoint", "model_of_content"]

_HEADS = {"RetinaNet": "retinanet", "Mask R-CNN": "mask_rcnn", "Semantic FPN": "semantic_fpn"}
_CLASSES = {"retinanet": RetinaNet, "mask_rcnn": MaskRCNN, "semantic_fpn": SemanticFPN}
_BODY = "backbone.body."

Dense = RetinaNet | MaskRCNN | SemanticFPN


def model_of_checkpoint(
    path: str | PathLike[str], name: str | None = None, **detector: object
) -> tuple[Dense, CheckpointReport, tuple[str, ...] | None]:
    """The detector or segmenter that a file is of, in evaluation mode, with the file's weights.

    The kind of head is known by the keys, the backbone by its number of blocks and its channels, the number
    of classes by the last layer's shape. Example::

        model, report, classes = model_of_checkpoint("mask_rcnn_poolformer_s12_fpn_1x_coco.pth")
        for label in model([image])[0]["labels"].tolist():
            print(classes[label])

    Args:
        path: see `load_checkpoint`.
        name: a head, _ and a backbone, such as ``"retinanet_poolformer_s12"``; None is what the file notes,
            else a PoolFormer or PoolFormerV2 of its shapes. A MetaFormer must be named.
        detector: keywords for `create_detector`: ``min_size``, ``max_size``, ``score_threshold``,
            ``detections_per_image``. A segmenter takes none.

    Returns:
        the model, the report of `load_checkpoint`, and the names of the classes, or None where the file has
        none.

    Raises:
        TypeError, ValueError: a file of no detector or segmenter, an unknown name, or one that does not fit;
            keywords for a segmenter.
        FileNotFoundError, ImportError: see `load_checkpoint`.
    """
    path = Path(path)
    try:
        return model_of_content(read_checkpoint(path), name, **detector)
    except (TypeError, ValueError) as error:
        raise type(error)(f"checkpoint {path}: {error}") from error


def model_of_content(
    content: object, name: str | None = None, **detector: object
) -> tuple[Dense, CheckpointReport, tuple[str, ...] | None]:
    """`model_of_checkpoint` of what `poolformer_kernels.models.checkpoints.read_checkpoint` returned.

    Raises:
        TypeError, ValueError: see `model_of_checkpoint`.
    """
    state_dict = tensors_of(content)
    tensors = without_prefixes(state_dict)
    found = dense_kind(tensors)
    if found is None:
        first = f"its first key is {next(iter(tensors))!r}" if tensors else "it is empty"
        raise ValueError(f"it is of no detector or segmenter: {first}; allowed: {', '.join(_HEADS)}")
    kind, source = found
    ours = tensors if source == "poolformer_kernels" else our_names(tensors, kind)
    head, backbone = _names(kind, name or _noted_name(content))
    body = _body(ours, getattr(state_dict, "_metadata", None), backbone)
    classes = _CLASSES[head].classes_of(ours)
    names = noted_classes(content)
    if names is not None and len(names) != classes:
        raise ValueError(f"it names {len(names)} classes, its last layer has {classes}")
    if head in list_detectors():
        model = create_detector(head, body, classes, **detector)
    elif detector:
        raise TypeError(f"{next(iter(detector))} is given; allowed with a detector only, this is a {kind}")
    else:
        model = create_segmenter(head, body, classes)
    report = load_content(model, content)
    return model.eval(), report, names


def _noted_name(content: object) -> str | None:
    """The name that a training run noted; None where its backbone has a size of its own."""
    name = noted(content, "model", str)
    known = name is not None and any(name.endswith(f"_{backbone}") for backbone in list_models())
    return name if known else None


def _names(kind: str, name: str | None) -> tuple[str, str | None]:
    """(head, backbone); the backbone is None where no name says it."""
    if name is None:
        return _HEADS[kind], None
    head, backbone = split_name(name)
    if head != _HEADS[kind]:
        raise ValueError(f"name is {name!r}, but it is of a {kind}")
    return head, backbone


def _body(ours: Mapping[str, Tensor], metadata: object, backbone: str | None) -> PoolFormer:
    """The backbone of a state dict under our names, with random weights."""
    tensors = OrderedDict(
        (key.removeprefix(_BODY), value) for key, value in ours.items() if key.startswith(_BODY)
    )
    if isinstance(metadata, Mapping):
        tensors._metadata = metadata  # says how a MetaFormer differs from a PoolFormer
    if "patch_embed.proj.weight" not in tensors:
        raise ValueError(f"its backbone is no PoolFormer: there is no key {_BODY}patch_embed.proj.weight")
    return read_weights(tensors, backbone).make(features_only=True)
