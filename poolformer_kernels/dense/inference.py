"""A picture of any size through the segmenter, as the official code tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import at_least_float32
from .images import resized
from .semantic_fpn import SemanticFPN

__all__ = ["segment"]

_MULTIPLE = 32  # of pixels: the backbone's coarsest stride


def segment(model: SemanticFPN, image: Tensor, shorter: int = 512, longer: int = 2048) -> Tensor:
    """Logits of every pixel of a picture, ``[num_classes, H, W]``, float32.

    The picture is scaled with its ratio kept until a side reaches its limit, then both sides are stretched to
    multiples of 32; the logits are scaled back. Without the multiples the official weights lose a mIoU of 1.

    Example::

        labels = segment(model.eval(), image).argmax(0)

    Args:
        model: in evaluation mode.
        image: ``[in_chans, H, W]`` in [0, 1], on the model's device; it is normalised as the backbone's
            ``config`` says.
        shorter, longer: limits of the scaled picture's sides, pixels.

    Raises:
        TypeError, ValueError: an image of the wrong type, dtype or shape; limits out of range; a model that
            trains.

    Source: sail-sg/poolformer's segmentation configurations and ``AlignResize``.
    """
    if model.training:
        raise ValueError("model is in training mode; allowed: model.eval()")
    if not 1 <= shorter <= longer:
        raise ValueError(
            f"shorter and longer are {shorter} and {longer}; allowed: at least 1, the shorter first"
        )
    body = model.backbone.body
    if not isinstance(image, Tensor) or not image.is_floating_point():
        what = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image must be a tensor of a floating dtype, got {what}")
    if image.dim() != 3 or image.shape[0] != body.in_chans or min(image.shape[1:]) < 1:
        raise ValueError(f"image must have shape [{body.in_chans}, H, W], got {list(image.shape)}")
    mean, std = (image.new_tensor(v).view(-1, 1, 1) for v in (body.config.mean, body.config.std))
    x = ((image - mean) / std)[None]
    size = resized(*image.shape[1:], shorter, longer)
    x = _scaled(_scaled(x, size), tuple(-(-side // _MULTIPLE) * _MULTIPLE for side in size))
    x = x.contiguous(memory_format=torch.channels_last)
    return _scaled(at_least_float32(model(x)), tuple(image.shape[1:]))[0]


def _scaled(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
