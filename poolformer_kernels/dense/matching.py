"""Anchors, and which object each belongs to, as mmdetection has them.

torchvision rounds the corners of its anchors, spaces them by the size of the image over that of the map
(61 instead of 64 pixels in an image of 800), takes those in the padding for background, and gives an anchor
that is an object's best to the object that this anchor overlaps most.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from .boxes import at_least_float32

__all__ = [
    "Anchors",
    "KeyedSampler",
    "MaxIoUMatcher",
    "mean_over_processes",
    "not_in_padding",
]

DIVISOR = 32  # images are padded to multiples of it
RATIOS = (0.5, 1.0, 2.0)  # height over width


class Anchors(AnchorGenerator):
    """Boxes around the corners of every cell, in pixels: for each ratio, each size.

    Args:
        sizes: a tuple of sizes (square roots of areas, pixels) for every level.
        strides: distance of a level's cells in pixels.

    Source: mmdetection's ``AnchorGenerator`` with ``center_offset=0``.
    """

    def __init__(self, sizes: Sequence[tuple[float, ...]], strides: Sequence[int]) -> None:
        self.strides = tuple(strides)
        super().__init__(tuple(sizes), (RATIOS,) * len(sizes))

    def generate_anchors(
        self, scales, aspect_ratios, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        sizes = torch.as_tensor(scales, dtype=torch.float64, device="cpu")
        root = torch.as_tensor(aspect_ratios, dtype=torch.float64, device="cpu").sqrt()
        half_w = (sizes / root[:, None]).flatten() / 2
        half_h = (sizes * root[:, None]).flatten() / 2
        return torch.stack([-half_w, -half_h, half_w, half_h], 1).to(device, dtype)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        dtype = at_least_float32(feature_maps[0]).dtype
        self.cell_anchors = [self.generate_anchors(s, RATIOS, dtype, device) for s in self.sizes]
        strides = [[torch.tensor(s, device=device)] * 2 for s in self.strides]
        sizes = [feature_map.shape[-2:] for feature_map in feature_maps]
        anchors = torch.cat(self.grid_anchors(sizes, strides))
        return [anchors] * len(image_list.image_sizes)


def not_in_padding(anchors: Tensor, image_size: Sequence[int]) -> Tensor:
    """Which of the anchors ``[N, 4]`` have their centre in an image of (H, W), padded to a multiple of 32.

    The rest lie where only a larger image of the batch has pixels. They belong to nothing, not even to the
    background.
    """
    height, width = (-(-int(side) // DIVISOR) * DIVISOR for side in image_size)
    x, y = (anchors[:, 0] + anchors[:, 2]) / 2, (anchors[:, 1] + anchors[:, 3]) / 2
    return (x < width - 1) & (y < height - 1)


class MaxIoUMatcher(Matcher):
    """An anchor's object by intersection over union.

    Args:
        positive: from this overlap on, an anchor belongs to the object that it overlaps most.
        negative: below this one, to the background (-1); between the two, to nothing (-2).
        low_quality: every object also takes the anchors that overlap it most, all that tie, if they do by at
            least so much; of several objects that want one, the last. None for none.

    Source: mmdetection's ``MaxIoUAssigner``.
    """

    def __init__(self, positive: float, negative: float, low_quality: float | None) -> None:
        super().__init__(positive, negative, allow_low_quality_matches=False)
        self.low_quality = low_quality

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        """From the overlaps ``[objects, anchors]``, both at least 1: an index of an object, -1 or -2."""
        matched = super().__call__(match_quality_matrix)
        if self.low_quality is not None:
            best = match_quality_matrix.amax(1, keepdim=True)
            wants = (match_quality_matrix == best) & (best >= self.low_quality)
            order = torch.arange(1, len(best) + 1, device=best.device)[:, None]
            last = (wants * order).amax(0)
            matched = torch.where(last > 0, last - 1, matched)
        return matched

    def match(self, boxes: Tensor, anchors: Tensor, image_size: Sequence[int]) -> Tensor:
        """Objects ``[M, 4]``, M may be 0, to anchors ``[N, 4]`` of an image of (H, W): ``[N]``, int64."""
        inside = not_in_padding(anchors, image_size)
        matched = torch.full((len(anchors),), self.BETWEEN_THRESHOLDS, device=anchors.device)
        if len(boxes) == 0:
            matched[inside] = self.BELOW_LOW_THRESHOLD
        elif bool(inside.any()):
            matched[inside] = self(box_iou(boxes, anchors[inside]))
        return matched


class KeyedSampler(BalancedPositiveNegativeSampler):
    """A random sample of positives and negatives of every image: as many positives as there are, at most
    ``positive_fraction`` of ``batch_size_per_image``, and negatives up to that number.

    ``seeds``, one for each image of the next call, makes the samples independent of the number of processes
    and of what was drawn before; None draws from torch's global generator.
    """

    seeds: Sequence[int] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Labels ``[N]`` of each image (1 and more: positive, 0: negative) to masks ``[N]`` of both."""
        positives, negatives = [], []
        for labels, seed in zip(matched_idxs, self.seeds or [None] * len(matched_idxs), strict=True):
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            most = int(self.batch_size_per_image * self.positive_fraction)
            positives.append(_chosen(labels >= 1, most, generator))
            left = self.batch_size_per_image - int(positives[-1].sum())
            negatives.append(_chosen(labels == 0, left, generator))
        return positives, negatives


def _chosen(candidates: Tensor, most: int, generator: torch.Generator | None) -> Tensor:
    """The mask of at most so many of the candidates."""
    indices = candidates.nonzero().flatten()
    order = torch.randperm(len(indices), generator=generator)[:most].to(indices.device)
    mask = torch.zeros_like(candidates)
    mask[indices[order]] = True
    return mask


def mean_over_processes(count: Tensor) -> Tensor:
    """The mean of a number over the processes of a distributed run, else the number itself.

    A loss that every process divides by it, and whose gradients DistributedDataParallel averages, is the
    sum over all processes divided by the sum of the numbers: the same however many there are.
    """
    count = count.to(torch.float32, copy=True)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count
