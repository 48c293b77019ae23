"""From the numbers of a detector's heads to boxes, and from masks of boxes to masks of images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import _utils

__all__ = ["BoxCoder", "at_least_float32", "pasted"]


class BoxCoder(_utils.BoxCoder):
    """Boxes as deltas of other boxes: dx, dy in their sides, dw, dh as logarithms of ratios of sides.

    torchvision's, but a side shrinks to at least 16/1000 of its box's as it grows to at most 1000/16 of it,
    and under autocast boxes are decoded in float32: bfloat16 would round 800 pixels to 4.

    Source: mmdetection's ``DeltaXYWHBBoxCoder``.
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Deltas ``[N, 4 K]`` of boxes ``[N, 4]``: boxes ``[N, 4 K]``."""
        _, _, w, h = self.weights
        limits = [-math.inf, -math.inf, -self.bbox_xform_clip * w, -self.bbox_xform_clip * h]
        codes = at_least_float32(rel_codes)
        lowest = torch.tensor(limits, dtype=codes.dtype, device=codes.device)
        return super().decode_single(codes.maximum(lowest.repeat(codes.shape[1] // 4)), boxes)


def pasted(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks of boxes in their image: ``[N, 1, M, M]`` and ``[N, 4]`` to ``[N, 1, height, width]``.

    Every pixel's centre is looked up in the mask, bilinearly; outside the mask there are zeros, as in
    mmdetection. torchvision rounds boxes to whole pixels before it scales the masks to them.
    """
    margins = (boxes[:, 2:] - boxes[:, :2]) / (2 * masks.shape[-1])  # half a cell beyond the box is not 0 yet
    corners = torch.cat([(boxes[:, :2] - margins).floor(), (boxes[:, 2:] + margins).ceil()], 1)
    limits = torch.tensor([width, height] * 2, device=boxes.device)
    result = masks.new_zeros(len(masks), 1, height, width)
    regions = corners.clamp(min=0).minimum(limits).long().tolist()
    for i, (left, top, right, bottom) in enumerate(regions):
        box = boxes[i]
        x = _place(left, right, box[0], box[2]).expand(bottom - top, -1)
        y = _place(top, bottom, box[1], box[3])[:, None].expand(-1, right - left)
        grid = torch.stack([x, y], 2)[None].to(masks)
        found = F.grid_sample(masks[i, None], grid, align_corners=False)[0]
        result[i, :, top:bottom, left:right] = found
    return result


def _place(first: int, end: int, low: Tensor, high: Tensor) -> Tensor:
    """Where the centres of pixels lie in a box: -1 at its low edge, 1 at its high one."""
    centres = torch.arange(first, end, dtype=low.dtype, device=low.device) + 0.5
    return (centres - low) / (high - low) * 2 - 1


def at_least_float32(x: Tensor) -> Tensor:
    """What autocast left in half precision as float32: boxes and losses are never rounded to less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
