"""Mask R-CNN as the paper trained it, on torchvision's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ..models import PoolFormer
from .backbone import PyramidBackbone
from .boxes import BoxCoder, at_least_float32
from .images import DetectorImages, check_images, check_targets
from .matching import (
    DIVISOR,
    RATIOS,
    Anchors,
    KeyedSampler,
    MaxIoUMatcher,
    mean_over_processes,
)
from .official_names import DenseCheckpoints

__all__ = ["MaskRCNN"]

_CHANNELS = 256
_STRIDES = (4, 8, 16, 32, 64)
_LEVELS = ("0", "1", "2", "3")  # maps that regions are cut from; the coarsest is the RPN's alone
_FINEST_SCALE = 56  # regions of a side below twice this many pixels come from the finest map


class MaskRCNN(GeneralizedRCNN, DenseCheckpoints):
    """Mask R-CNN on a PoolFormer, equal to the official code's (mmdetection 2.19) up to rounding.

    Its differences from `torchvision.models.detection.MaskRCNN`: labels 0 … num_classes - 1; anchors whose
    distance is the level's stride, none in the padding; objects matched as in mmdetection; 1000 proposals in
    training; L1 losses; RoIAlign with ``aligned=True`` and as many samples as a cell has pixels; the wanted
    masks are cut out by it and rounded to 0 and 1; images resized with mmdetection's rounding; masks looked
    up at the centres of the image's pixels. As in torchvision, detections with a side below 0.01 pixels are
    left out.

    Args:
        body: a PoolFormer with ``features_only=True``.
        num_classes: kinds of objects, without background.
        min_size, max_size: of the resized image's sides in evaluation, pixels.
        score_threshold: detections below it are left out.
        detections_per_image: at most so many.

    A call takes a list of images ``[in_chans, H, W]`` in [0, 1], of any sizes and any floating dtype: they
    are converted to that of the weights. Boxes, scores and losses are never rounded to less than float32,
    whatever the weights are or autocast makes of them. In training a call also takes a list of
    dicts with ``boxes`` ``[N, 4]`` (x1, y1, x2, y2 in pixels), float32, ``labels`` ``[N]``, int64,
    0 … num_classes - 1, and ``masks`` ``[N, H, W]`` of 0 and 1; N may be 0. A ``seed`` (int) in a dict is
    that of the image's random samples; without it they come from torch's generator. Images in training keep
    their size. All are padded to a common multiple of 32, which GroupNorm of one group sees, as in the
    official code.

    Returns:
        In training a dict of five losses: ``loss_objectness``, ``loss_rpn_box_reg``, ``loss_classifier``,
        ``loss_box_reg``, ``loss_mask``; else a dict for each image with ``boxes`` ``[N, 4]`` in its pixels,
        ``scores``, ``labels``, and ``masks`` ``[N, 1, H, W]``, probabilities; best first.

    Raises:
        TypeError, ValueError: images or targets of the wrong type, shape or range.

    Source: Mask R-CNN (arXiv 1703.06870); MetaFormer (arXiv 2111.11418), section 4.2 and Table 3.
    """

    kind = "Mask R-CNN"
    classes_key = "roi_heads.box_predictor.cls_score.weight"
    class_keys = tuple(
        f"roi_heads.{layer}.{name}"
        for layer in (
            "box_predictor.cls_score",
            "box_predictor.bbox_pred",
            "mask_predictor.mask_fcn_logits",
        )
        for name in ("weight", "bias")
    )
    rows_besides = 1  # the background

    def __init__(
        self,
        body: PoolFormer,
        num_classes: int,
        min_size: int = 800,
        max_size: int = 1333,
        score_threshold: float = 0.05,
        detections_per_image: int = 100,
    ) -> None:
        rpn = _ProposalNetwork(
            Anchors(tuple((8 * stride,) for stride in _STRIDES), _STRIDES),
            RPNHead(_CHANNELS, len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        rpn.proposal_matcher = MaxIoUMatcher(0.7, 0.3, low_quality=0.3)
        rpn.fg_bg_sampler = KeyedSampler(256, 0.5)
        rpn.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        rpn.min_size = torch.finfo(torch.float32).tiny  # every proposal with an area
        heads = _RegionHeads(
            _AlignedRoIPool(7),
            TwoMLPHead(_CHANNELS * 7 * 7, 1024),
            FastRCNNPredictor(1024, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=score_threshold,
            nms_thresh=0.5,
            detections_per_img=detections_per_image,
            mask_roi_pool=_AlignedRoIPool(14),
            mask_head=MaskRCNNHeads(_CHANNELS, (_CHANNELS,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(_CHANNELS, _CHANNELS, num_classes + 1),
        )
        heads.proposal_matcher = MaxIoUMatcher(0.5, 0.5, low_quality=0.5)
        heads.fg_bg_sampler = KeyedSampler(512, 0.25)
        heads.box_coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        _initialise(heads)
        super().__init__(
            PyramidBackbone(body, _CHANNELS, extra=LastLevelMaxPool()),
            rpn,
            heads,
            DetectorImages(body, min_size, max_size),
        )
        self.num_classes = num_classes

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        check_images(images, self.backbone.body.in_chans)
        if not self.training:
            found = super().forward(images)
            return [result | {"labels": result["labels"] - 1} for result in found]
        check_targets(targets, images, self.num_classes, masks=True)
        seeds = [target.get("seed") for target in targets]
        for i, part in enumerate((self.rpn, self.roi_heads)):
            part.fg_bg_sampler.seeds = [None if seed is None else 2 * int(seed) + i for seed in seeds]
        return super().forward(images, [t | {"labels": t["labels"] + 1} for t in targets])


def _initialise(heads: RoIHeads) -> None:
    """mmdetection's initial weights of the box head, where torchvision has others."""
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        nn.init.xavier_uniform_(layer.weight)
    nn.init.normal_(heads.box_predictor.cls_score.weight, std=0.01)
    nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.001)
    predictor = heads.mask_predictor
    linear = (heads.box_head.fc6, heads.box_head.fc7, *heads.box_predictor.children())
    for layer in (*linear, predictor.conv5_mask, predictor.mask_fcn_logits):
        nn.init.zeros_(layer.bias)


class _ProposalNetwork(RegionProposalNetwork):
    """torchvision's RPN with mmdetection's matching, an L1 loss, and float32 proposals under autocast."""

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        logits = at_least_float32(objectness)
        return super().filter_proposals(proposals, logits, image_shapes, num_anchors_per_level)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, boxes = [], []
        for anchors_of_image, target in zip(anchors, targets, strict=True):
            objects = target["boxes"].to(anchors_of_image)
            matched = self.proposal_matcher.match(objects, anchors_of_image, target["size"])
            label = (matched >= 0).to(anchors_of_image.dtype)
            label[matched == self.proposal_matcher.BETWEEN_THRESHOLDS] = -1.0
            labels.append(label)
            boxes.append(objects[matched.clamp(min=0)] if len(objects) else anchors_of_image)
        return labels, boxes

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Both divided by the number of samples; positives and negatives of an image count for at least 1."""
        samples = self.fg_bg_sampler(labels)
        number = mean_over_processes(sum(mask.sum().clamp(min=1) for masks in samples for mask in masks))
        positive, negative = (torch.cat(masks) for masks in samples)
        sampled = positive | negative
        wanted = torch.cat(labels)[sampled]
        logits = at_least_float32(objectness.flatten()[sampled])
        found = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        deltas = at_least_float32(pred_bbox_deltas[positive])
        distance = F.l1_loss(deltas, torch.cat(regression_targets)[positive], reduction="sum")
        return found / number, distance / number


class _RegionHeads(RoIHeads):
    """torchvision's heads with mmdetection's matching and losses; class 0 is the background."""

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Objects' indices and classes of an image's proposals, of which the last are the objects themselves.

        These are their own. The others are matched without them: else every object's best proposal would
        be itself, and the rule for low overlaps without effect.
        """
        indices, labels = [], []
        for boxes, objects, classes in zip(proposals, gt_boxes, gt_labels, strict=True):
            others = boxes[: len(boxes) - len(objects)]
            matched = torch.full(
                (len(others),), self.proposal_matcher.BELOW_LOW_THRESHOLD, device=boxes.device
            )
            if len(objects) and len(others):
                matched = self.proposal_matcher(self.box_similarity(objects, others))
            matched = torch.cat([matched, torch.arange(len(objects), device=boxes.device)])
            indices.append(matched.clamp(min=0))
            labels.append(torch.zeros_like(matched))
            labels[-1][matched >= 0] = classes[matched[matched >= 0]]
        return indices, labels

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        boxes, objects, labels, deltas = self.select_training_samples(proposals, targets)
        logits, found = self._boxes(features, boxes, image_shapes)
        losses = _box_losses(logits, found, torch.cat(labels), torch.cat(deltas))
        positive = [label > 0 for label in labels]
        boxes = [b[mask] for b, mask in zip(boxes, positive, strict=True)]
        objects = [index[mask] for index, mask in zip(objects, positive, strict=True)]
        kinds = torch.cat([label[mask] for label, mask in zip(labels, positive, strict=True)])
        masks = self._masks(features, boxes, image_shapes)
        wanted = [
            wanted_masks(target["masks"], index, b, masks.shape[-1])
            for target, index, b in zip(targets, objects, boxes, strict=True)
        ]
        losses["loss_mask"] = _mask_loss(masks, kinds, torch.cat(wanted))
        return [], losses

    def _boxes(
        self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Logits ``[R, classes]`` and box deltas ``[R, 4 classes]`` of all regions."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, shapes)))
        return at_least_float32(logits), at_least_float32(deltas)

    def _masks(
        self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Logits ``[R, classes, 28, 28]`` of all regions."""
        pooled = self.mask_roi_pool(features, boxes, shapes)
        return at_least_float32(self.mask_predictor(self.mask_head(pooled)))

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        logits, deltas = self._boxes(features, proposals, shapes)
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, shapes)
        masks = maskrcnn_inference(self._masks(features, boxes, shapes), labels)
        return [
            {"boxes": b, "labels": label, "scores": s, "masks": m}
            for b, label, s, m in zip(boxes, labels, scores, masks, strict=True)
        ]


def _box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Cross entropy and L1, both divided by the number of sampled regions."""
    number = mean_over_processes(torch.tensor(len(labels), device=labels.device)).clamp(min=1)
    positive = labels > 0
    own = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
    return {
        "loss_classifier": F.cross_entropy(logits, labels, reduction="sum") / number,
        "loss_box_reg": F.l1_loss(own, wanted[positive], reduction="sum") / number,
    }


def _mask_loss(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross entropy of each region's own class, the mean over pixels and regions."""
    number = mean_over_processes(torch.tensor(wanted.numel(), device=labels.device)).clamp(min=1)
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, wanted, reduction="sum") / number


def wanted_masks(masks: Tensor, objects: Tensor, boxes: Tensor, size: int) -> Tensor:
    """What the mask head should find: objects' masks in regions, ``[R, size, size]`` of 0 and 1.

    Args:
        masks: of an image's objects, ``[N, H, W]``.
        objects: the object of each region, ``[R]``.
        boxes: the regions, ``[R, 4]``.
    """
    regions = torch.cat([objects[:, None].to(boxes), boxes], 1)
    height, width = masks.shape[1:]
    padded = F.pad(masks[:, None].to(boxes), (0, -width % DIVISOR, 0, -height % DIVISOR))  # as the image is
    cut = roi_align(padded, regions, size, sampling_ratio=0, aligned=True)
    return (cut[:, 0] >= 0.5).to(boxes)


class _AlignedRoIPool(MultiScaleRoIAlign):
    """RoIAlign of every region from the map of its size, with half-pixel centres and adaptive sampling.

    torchvision's has no switch for ``aligned``. A region of side s comes from level
    ``floor(log2(s / 56))``, within those there are.
    """

    def __init__(self, size: int) -> None:
        super().__init__(list(_LEVELS), size, sampling_ratio=0)

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        maps = [at_least_float32(x[name]) for name in _LEVELS]
        regions = torch.cat([torch.cat([b.new_full((len(b), 1), i), b], 1) for i, b in enumerate(boxes)])
        sides = ((regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2])).sqrt()
        levels = (sides / _FINEST_SCALE + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (values, stride) in enumerate(zip(maps, _STRIDES, strict=False)):
            here = (levels == level).nonzero().flatten()
            found = roi_align(values, regions[here].to(values), self.output_size, 1 / stride, 0, aligned=True)
            pooled = pooled.index_copy(0, here, found)
        return pooled.to(x[_LEVELS[0]].dtype)  # the dtype of the head's weights
