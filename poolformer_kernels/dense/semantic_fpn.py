"""Semantic FPN as the paper trained it on ADE20K."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import PoolFormer
from .backbone import PyramidBackbone
from .boxes import at_least_float32
from .official_names import DenseCheckpoints

__all__ = ["IGNORED", "SemanticFPN", "segmentation_loss"]

IGNORED = 255  # a pixel's label that no loss and no score counts
_PYRAMID, _CHANNELS = 256, 128


class SemanticFPN(DenseCheckpoints):
    """Semantic FPN on a PoolFormer, equal to the official code's (mmsegmentation 0.19) up to rounding.

    Every map of the pyramid goes through convolutions (3 × 3, BatchNorm, ReLU) and upsamplings by two until
    it has the finest one's size; their sum goes through dropout of whole channels and a 1 × 1 convolution.

    Args:
        body: a PoolFormer with ``features_only=True``.
        num_classes: kinds of pixels.
        dropout: probability of a channel.

    A call takes images ``[B, in_chans, H, W]``, normalised as the backbone's ``config`` says, of a floating
    dtype; multiples of 32 as H and W give the sizes of the official code.

    Returns:
        logits ``[B, num_classes, H, W]``: those at a quarter of the size, scaled up bilinearly.

    Raises:
        TypeError, ValueError: images of the wrong dtype or shape.

    BatchNorm's statistics are a process's own; training on several GPUs converts it, as the official code
    has it: ``nn.SyncBatchNorm.convert_sync_batchnorm(model)``.

    Source: Panoptic Feature Pyramid Networks (arXiv 1901.02446), section 3.1; MetaFormer (arXiv 2111.11418),
    section 4.3 and Table 4.
    """

    kind = "Semantic FPN"
    classes_key = "classifier.weight"
    class_keys = ("classifier.weight", "classifier.bias")

    def __init__(self, body: PoolFormer, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = PyramidBackbone(body, _PYRAMID)
        self.scale_heads = nn.ModuleList(_scale_head(level) for level in range(4))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(_CHANNELS, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        channels = self.backbone.body.in_chans
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a tensor of a floating dtype, got {got}")
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"x must have shape [B, {channels}, H, W], got {list(x.shape)}")
        return self.decode(list(self.backbone(x).values()), x.shape[2:])

    def decode(self, maps: list[Tensor], size: torch.Size) -> Tensor:
        """Logits of images of this size (H, W), from the pyramid's maps, the finest first."""
        total = self.scale_heads[0](maps[0])
        for head, values in zip(self.scale_heads[1:], maps[1:], strict=True):
            total = total + _scaled(head(values), total.shape[2:])
        return _scaled(self.classifier(self.dropout(total)), size)


def _scale_head(level: int) -> nn.Sequential:
    """From stride ``4 * 2**level`` to stride 4."""
    layers: list[nn.Module] = []
    for i in range(max(level, 1)):
        convolution = nn.Conv2d(_CHANNELS if i else _PYRAMID, _CHANNELS, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(_CHANNELS), nn.ReLU(inplace=True)]
        if level:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)


def _scaled(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of pixels, divided by the number of all pixels, the ignored ones included.

    Equivalent PyTorch::

        F.cross_entropy(logits, target, ignore_index=255, reduction="sum") / target.numel()

    Args:
        logits: ``[B, num_classes, H, W]``.
        target: ``[B, H, W]``, int64 or uint8, 0 … num_classes - 1; 255 is ignored.

    Raises:
        ValueError: a target of another shape or dtype.

    Source: mmsegmentation 0.19's ``CrossEntropyLoss``; later versions may leave the ignored pixels out.
    """
    size = [len(logits), *logits.shape[2:]]
    if list(target.shape) != size or target.dtype not in (torch.int64, torch.uint8):
        got = f"{list(target.shape)} of {target.dtype}"
        raise ValueError(f"target must be {size} of int64 or uint8, got {got}")
    total = F.cross_entropy(at_least_float32(logits), target.long(), ignore_index=IGNORED, reduction="sum")
    return total / target.numel()
