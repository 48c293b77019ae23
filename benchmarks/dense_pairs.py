"""Backbones, detectors and segmenters twice on the same random weights: on timm's modules and on ours."""

import copy
import re
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

import poolformer_kernels as pk
from poolformer_kernels.models import PoolFormer, create_model

from .providers import make_pair

__all__ = ["WHOLE", "TimmBody", "make_bodies", "make_whole", "our_names"]

WHOLE = ("retinanet", "mask_rcnn", "semantic_fpn")
# Standard deviations of the logits of classes, large enough that detections come above their threshold, as
# trained heads have them and random ones have not.
_LOGITS = {"retinanet": 0.5, "mask_rcnn": 1.0}


class TimmBody(nn.Module):
    """timm's features and the four norms that they lack, in the place of a `PoolFormer` with features_only.

    Args:
        features: as ``timm.create_model(name, features_only=True)`` makes it.
        body: ours, whose norms are copied.
    """

    def __init__(self, features: nn.Module, body: PoolFormer) -> None:
        super().__init__()
        self.config, self.in_chans = body.config, body.in_chans
        self.features = features
        for stage in range(4):
            norm = copy.deepcopy(body.get_submodule(f"norm{2 * stage}"))
            if isinstance(norm, nn.GroupNorm):  # PyTorch's own
                plain = nn.GroupNorm(1, norm.num_channels, norm.eps)
                plain.load_state_dict(norm.state_dict())
                norm = plain
            self.add_module(f"norm{2 * stage}", norm)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.get_submodule(f"norm{2 * i}")(y) for i, y in enumerate(self.features(x))]


@lru_cache(maxsize=1)
def make_bodies(name: str) -> tuple[TimmBody, PoolFormer]:
    """(timm's backbone, ours) in eval mode, float32 and channels_last."""
    import timm

    model, classifier = make_pair(name, torch.float32, "cpu")
    ours = create_model(name, features_only=True)
    given = {key: value for key, value in classifier.state_dict().items() if key in ours.state_dict()}
    rng = torch.Generator().manual_seed(2)
    for key, value in ours.state_dict().items():
        if key not in given:  # the maps' norms
            given[key] = (1.0 if key.endswith("weight") else 0.0) + 0.1 * torch.randn(
                value.shape, generator=rng
            )
    ours.load_state_dict(given)
    features = timm.models.FeatureListNet(
        copy.deepcopy(model), out_indices=(0, 1, 2, 3), flatten_sequential=True
    )
    pair = TimmBody(features, ours), ours
    return tuple(body.to(memory_format=torch.channels_last).eval() for body in pair)


def our_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of a `TimmBody`'s parameters, by those of ours."""
    norms = {name: value for name, value in tensors.items() if name.startswith("norm")}
    rest = {
        re.sub(r"^features\.stages_(\d)", r"stages.\1", name).removeprefix("features."): value
        for name, value in tensors.items()
        if name not in norms
    }
    return {**pk.convert_state_dict(rest), **norms}


def make_whole(head: str, name: str, image: Tensor) -> tuple[nn.Module, nn.Module]:
    """(a detector or segmenter on timm's backbone, on ours) in eval mode and float32.

    Detectors resize nothing: the image ``[C, H, W]`` has the size that they want. It is also what the logits
    of classes are scaled on.
    """
    from poolformer_kernels.dense import create_detector, create_segmenter

    torch.manual_seed(0)
    body = copy.deepcopy(make_bodies(name)[1])
    if head == "semantic_fpn":
        ours = create_segmenter(head, body)
    else:
        sides = {"min_size": min(image.shape[1:]), "max_size": max(image.shape[1:])}
        ours = create_detector(head, body, **sides)
    ours = ours.eval().to(memory_format=torch.channels_last)
    if head in _LOGITS:
        _spread_logits(ours, _LOGITS[head], image)
    peer = copy.deepcopy(ours)
    features = copy.deepcopy(make_bodies(name)[0].features)
    peer.backbone.body = TimmBody(features, ours.backbone.body).to(memory_format=torch.channels_last).eval()
    return peer, ours


def _spread_logits(model: nn.Module, wanted: float, image: Tensor) -> None:
    """Scales the last layer of the classifier."""
    if hasattr(model, "roi_heads"):
        layer = model.roi_heads.box_predictor.cls_score
    else:
        layer = model.head.classification_head.cls_logits
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, given, y: seen.append(y.flatten()))
    with torch.no_grad():
        model([image])
        handle.remove()
        layer.weight *= wanted / torch.cat(seen).std()
