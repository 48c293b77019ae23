"""RetinaNet as the paper trained it, on torchvision's."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import batched_nms, clip_boxes_to_image, sigmoid_focal_loss

from ..models import PoolFormer
from .backbone import P6P7, PyramidBackbone
from .boxes import BoxCoder, at_least_float32
from .images import DetectorImages, check_images, check_targets
from .matching import Anchors, MaxIoUMatcher, mean_over_processes
from .official_names import DenseCheckpoints

__all__ = ["RetinaNet"]

_CHANNELS = 256
_STRIDES = (8, 16, 32, 64, 128)
_ANCHORS = 9  # of a pixel: three ratios, three sizes
_SIZES = tuple(tuple(4 * stride * 2 ** (i / 3) for i in range(3)) for stride in _STRIDES)


class RetinaNet(detection.RetinaNet, DenseCheckpoints):
    """RetinaNet on a PoolFormer, equal to the official code's (mmdetection 2.19) up to rounding.

    Its differences from `torchvision.models.detection.RetinaNet`: no ReLU between P6 and P7; anchors whose
    sides are not rounded and whose distance is the level's stride; none in the padding; both losses are
    divided by the number of positive anchors in the batch (of all processes), at least 1 for an image; 100
    detections an image, none without area; images resized with mmdetection's rounding.

    Args:
        body: a PoolFormer with ``features_only=True``; its last three maps are used, and the norm of its
            first one is replaced by ``nn.Identity``.
        num_classes: kinds of objects, without background.
        min_size, max_size: of the resized image's sides in evaluation, pixels.
        score_threshold: detections below it are left out.
        detections_per_image: at most so many.

    A call takes a list of images ``[in_chans, H, W]`` in [0, 1], of any sizes and any floating dtype: they
    are converted to that of the weights. Boxes, scores and losses are never rounded to less than float32,
    whatever the weights are or autocast makes of them. In training a call also takes a list of
    dicts with ``boxes`` ``[N, 4]`` (x1, y1, x2, y2 in pixels), float32, and ``labels`` ``[N]``, int64,
    0 … num_classes - 1; N may be 0. Images in training keep their size. All are padded to a common multiple
    of 32, which GroupNorm of one group sees, as in the official code.

    Returns:
        In training a dict of two losses, ``classification`` and ``bbox_regression``; else a dict for each
        image with ``boxes`` ``[N, 4]`` in its pixels, ``scores`` and ``labels``, best first.

    Raises:
        TypeError, ValueError: images or targets of the wrong type, shape or range.

    Source: RetinaNet (arXiv 1708.02002); MetaFormer (arXiv 2111.11418), section 4.2 and Table 3.
    """

    kind = "RetinaNet"
    classes_key = "head.classification_head.cls_logits.weight"
    class_keys = (classes_key, "head.classification_head.cls_logits.bias")
    rows_per_class = _ANCHORS

    def __init__(
        self,
        body: PoolFormer,
        num_classes: int,
        min_size: int = 800,
        max_size: int = 1333,
        score_threshold: float = 0.05,
        detections_per_image: int = 100,
    ) -> None:
        extra = P6P7(body.config.dims[-1], _CHANNELS)
        super().__init__(
            PyramidBackbone(body, _CHANNELS, levels=3, extra=extra),
            num_classes,
            anchor_generator=Anchors(_SIZES, _STRIDES),
            head=_Head(_CHANNELS, _ANCHORS, num_classes),
            proposal_matcher=MaxIoUMatcher(0.5, 0.4, low_quality=0.0),
            score_thresh=score_threshold,
            detections_per_img=detections_per_image,
        )
        self.num_classes = num_classes
        self.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.transform = DetectorImages(body, min_size, max_size)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        check_images(images, self.backbone.body.in_chans)
        if self.training:
            check_targets(targets, images, self.num_classes, masks=False)
        return super().forward(images, targets if self.training else None)

    def compute_loss(
        self, targets: list[dict], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        matched = [
            self.proposal_matcher.match(target["boxes"], boxes, target["size"])
            for target, boxes in zip(targets, anchors, strict=True)
        ]
        return self.head.compute_loss(targets, head_outputs, anchors, matched)

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """torchvision's, in float32 under autocast, and without boxes that the image's edge leaves no area.

        Anchors in the padding give such ones: they would take the places of detections.
        """
        detections = []
        for i, shape in enumerate(image_shapes):
            levels = zip(head_outputs["cls_logits"], head_outputs["bbox_regression"], anchors[i], strict=True)
            found = [self._candidates(logits[i], deltas[i], boxes) for logits, deltas, boxes in levels]
            boxes, scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
            boxes = clip_boxes_to_image(boxes, shape)
            has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
            boxes, scores, labels = boxes[has_area], scores[has_area], labels[has_area]
            keep = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            detections.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
        return detections

    def _candidates(self, logits: Tensor, deltas: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A level's boxes, scores and labels above the threshold, at most ``topk_candidates``."""
        scores = at_least_float32(logits).sigmoid().flatten()
        above = (scores > self.score_thresh).nonzero().flatten()
        scores, order = scores[above].topk(min(self.topk_candidates, len(above)))
        chosen = above[order] // logits.shape[1]
        labels = above[order] % logits.shape[1]
        return self.box_coder.decode_single(deltas[chosen], anchors[chosen]), scores, labels


class _Head(RetinaNetHead):
    """torchvision's head with mmdetection's sums."""

    def compute_loss(
        self,
        targets: list[dict],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        logits, deltas = (at_least_float32(head_outputs[name]) for name in ("cls_logits", "bbox_regression"))
        matched = torch.stack(matched_idxs)
        positive, counts = matched >= 0, matched != -2
        number = mean_over_processes(positive.sum(1).clamp(min=1).sum())
        wanted = torch.zeros_like(logits)
        coder, wanted_deltas = self.regression_head.box_coder, []
        for i, (target, boxes) in enumerate(zip(targets, anchors, strict=True)):
            objects = matched[i][positive[i]]
            wanted[i][positive[i].nonzero().flatten(), target["labels"][objects]] = 1.0
            wanted_deltas.append(coder.encode_single(target["boxes"][objects].to(boxes), boxes[positive[i]]))
        focal = sigmoid_focal_loss(logits[counts], wanted[counts], alpha=0.25, gamma=2.0, reduction="sum")
        distance = F.l1_loss(deltas[positive], torch.cat(wanted_deltas), reduction="sum")
        return {"classification": focal / number, "bbox_regression": distance / number}
