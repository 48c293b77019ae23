"""The detectors and segmenters by name."""

from collections.abc import Callable

from torch import nn

from ..models import PoolFormer, list_models
from ..nn.checks import positive_int, probability
from .backbone import feature_backbone
from .mask_rcnn import MaskRCNN
from .retinanet import RetinaNet
from .semantic_fpn import IGNORED, SemanticFPN

__all__ = ["create_detector", "create_segmenter", "list_detectors", "list_segmenters", "split_name"]

_DETECTORS: dict[str, Callable[..., nn.Module]] = {"retinanet": RetinaNet, "mask_rcnn": MaskRCNN}
_SEGMENTERS: dict[str, Callable[..., nn.Module]] = {"semantic_fpn": SemanticFPN}


def list_detectors() -> list[str]:
    """The names that `create_detector` knows."""
    return list(_DETECTORS)


def list_segmenters() -> list[str]:
    """The names that `create_segmenter` knows."""
    return list(_SEGMENTERS)


def create_detector(
    name: str,
    backbone: str | PoolFormer = "poolformer_s12",
    num_classes: int = 80,
    *,
    min_size: int = 800,
    max_size: int = 1333,
    score_threshold: float = 0.05,
    detections_per_image: int = 100,
    **structure: object,
) -> RetinaNet | MaskRCNN:
    """A detector on a PoolFormer or MetaFormer, with random weights.

    `poolformer_kernels.models.load_checkpoint` loads the official weights of the whole, or those of an
    ImageNet checkpoint into ``model.backbone.body`` (whose output norms keep weight 1 and bias 0)::

        model = create_detector("retinanet", "poolformer_s12")
        load_checkpoint(model.backbone.body, "poolformer_s12.pth.tar")
        detections = model.eval()([image])  # image: [3, H, W] in [0, 1]

    Args:
        name: one of `list_detectors`.
        backbone: a name of `list_models`, or a PoolFormer made with ``features_only=True``. RetinaNet does
            not use its first map, and replaces its ``norm0`` by ``nn.Identity``. A part that is
            made for one size of images (attention's position embedding, ``spatial_fc``) raises on others.
        num_classes: kinds of objects, without background; labels are 0 … num_classes - 1.
        min_size, max_size, score_threshold, detections_per_image: see `RetinaNet` and `MaskRCNN`.
        structure: keywords for `create_model`, with a backbone's name.

    Raises:
        TypeError, ValueError: an unknown name, or an argument of the wrong type or range.

    Source: MetaFormer (arXiv 2111.11418), section 4.2 and Table 3.
    """
    cls = _known("name", name, _DETECTORS)
    positive_int("num_classes", num_classes)
    if positive_int("max_size", max_size) < positive_int("min_size", min_size):
        raise ValueError(f"max_size is {max_size}; allowed: at least min_size, {min_size}")
    probability("score_threshold", score_threshold)
    positive_int("detections_per_image", detections_per_image)
    return cls(
        feature_backbone(backbone, structure),
        num_classes,
        min_size=min_size,
        max_size=max_size,
        score_threshold=float(score_threshold),
        detections_per_image=detections_per_image,
    )


def create_segmenter(
    name: str,
    backbone: str | PoolFormer = "poolformer_s12",
    num_classes: int = 150,
    *,
    dropout: float = 0.1,
    **structure: object,
) -> SemanticFPN:
    """A semantic segmenter on a PoolFormer or MetaFormer, with random weights.

    Example::

        model = create_segmenter("semantic_fpn", "poolformer_s12")
        load_checkpoint(model, "fpn_poolformer_s12_ade20k_40k.pth")
        labels = model.eval()(images).argmax(1)  # images: [B, 3, H, W], normalised

    Args:
        name: one of `list_segmenters`.
        backbone, structure: see `create_detector`.
        num_classes: kinds of pixels, at most 255, since label 255 is ignored.
        dropout: see `SemanticFPN`.

    Raises:
        TypeError, ValueError: an unknown name, or an argument of the wrong type or range.

    Source: MetaFormer (arXiv 2111.11418), section 4.3 and Table 4.
    """
    cls = _known("name", name, _SEGMENTERS)
    if positive_int("num_classes", num_classes) > IGNORED:
        raise ValueError(
            f"num_classes is {num_classes}; allowed: at most {IGNORED}, the label that is ignored"
        )
    probability("dropout", dropout)
    return cls(feature_backbone(backbone, structure), num_classes, dropout=float(dropout))


def split_name(name: str) -> tuple[str, str]:
    """(head, backbone) of a name as the commands write it: ``"retinanet_poolformer_s12"``.

    Raises:
        ValueError: no such head, or no such backbone.
    """
    for head in (*_DETECTORS, *_SEGMENTERS):
        if name.startswith(f"{head}_"):
            backbone = name.removeprefix(f"{head}_")
            if backbone in list_models():
                return head, backbone
    heads = ", ".join((*_DETECTORS, *_SEGMENTERS))
    raise ValueError(f"name is {name!r}; allowed: a head ({heads}), _ and a backbone of list_models()")


def _known(argument: str, name: object, table: dict[str, Callable]) -> Callable:
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{argument} is {name!r}; allowed: {', '.join(table)}")
    return table[name]
