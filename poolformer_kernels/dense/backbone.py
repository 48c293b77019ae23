"""PoolFormer's maps for a detector or segmenter: its outputs and a feature pyramid on them."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from ..models import PoolFormer, create_model

__all__ = ["P6P7", "PyramidBackbone", "feature_backbone"]


def feature_backbone(backbone: str | PoolFormer, structure: Mapping[str, object]) -> PoolFormer:
    """The model whose maps are used: made by name, or the given one.

    Raises:
        TypeError, ValueError: an unknown name, a model that is no PoolFormer, has a head or is given together
            with keywords of its structure.
    """
    if isinstance(backbone, str):
        return create_model(backbone, features_only=True, **structure)
    if not isinstance(backbone, PoolFormer):
        raise TypeError(f"backbone must be a name or a PoolFormer, got {type(backbone).__name__}")
    if not backbone.features_only:
        raise ValueError(
            f"backbone {backbone.config.name} has a head; allowed: one made with features_only=True"
        )
    if len(backbone.feature_info.out_indices) < len(backbone.config.dims):
        raise ValueError(
            f"backbone has the maps of stages {backbone.feature_info.out_indices}; allowed: one made without"
            " out_indices"
        )
    if structure:
        raise TypeError(f"{next(iter(structure))} is given; allowed with the name of a backbone only")
    return backbone


class PyramidBackbone(nn.Module):
    """A PoolFormer and a feature pyramid (FPN) on its last maps.

    Args:
        body: a PoolFormer made with ``features_only=True``.
        out_channels: channels of every map of the pyramid.
        levels: how many of the four maps are used, the last ones. The norms of the others become
            ``nn.Identity``, as in the official code (``FORK_LAST3``).
        extra: makes the coarser levels, see `torchvision.ops.FeaturePyramidNetwork`.

    A call takes images ``[B, in_chans, H, W]``, normalised, and returns an ordered dict of maps
    ``[B, out_channels, H_l, W_l]``, the finest first, as torchvision's detectors want it. Images of another
    floating dtype than the weights' are converted to it.
    """

    def __init__(
        self, body: PoolFormer, out_channels: int, levels: int = 4, extra: ExtraFPNBlock | None = None
    ) -> None:
        super().__init__()
        self.body, self.levels, self.out_channels = body, levels, out_channels
        stages = len(body.config.dims)
        for stage in range(stages - levels):
            setattr(body, f"norm{2 * stage}", nn.Identity())
        self.fpn = FeaturePyramidNetwork(list(body.config.dims[stages - levels :]), out_channels, extra)
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)  # mmdetection's, where torchvision has another

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        x = x.to(self.fpn.inner_blocks[0][0].weight.dtype, memory_format=torch.channels_last)
        maps = self.body(x)[-self.levels :]
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(maps)))


class P6P7(ExtraFPNBlock):
    """RetinaNet's coarsest levels: a convolution on the backbone's last map, and one on that.

    torchvision's ``LastLevelP6P7`` has a ReLU between the two; mmdetection, whose configuration the paper
    used, has none.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)
        for module in (self.p6, self.p7):
            nn.init.zeros_(module.bias)

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = _padded_first(self.p6, c[-1])
        return [*p, p6, _padded_first(self.p7, p6)], [*names, "p6", "p7"]


def _padded_first(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution's result; of a map one pixel wide, as that of an explicitly padded map.

    PyTorch's own padding there leaves the weight's gradient partly unwritten, on the CPU in bfloat16 with a
    stride of 2 (torch 2.14).
    """
    if x.shape[3] > 1:
        return convolution(x)
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), convolution.weight, convolution.bias, convolution.stride)
