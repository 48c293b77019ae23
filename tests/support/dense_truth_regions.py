"""Mask R-CNN in float64, from its definition, as mmdetection 2.19 has it; see `dense_truth`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from support import dense_truth as truth
from support.dense_truth import Params, Shape, conv, flat, ops

RPN_STRIDES = [4, 8, 16, 32, 64]
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def level_of(box: Tensor) -> int:
    """Sides up to 112 pixels from the finest of four maps, then one more for each doubling."""
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    return min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 3)


def regions(levels: list[Tensor], boxes: list[Tensor], size: int) -> Tensor:
    """RoIAlign of every box from the level of its size, half a pixel shifted: ``[N, C, size, size]``."""
    found = [levels[0].new_zeros(0, levels[0].shape[1], size, size)]
    for i, rows in enumerate(boxes):
        for box in rows:
            level = level_of(box)
            values, scale = levels[level][i : i + 1], 1 / (4 * 2**level)
            found.append(ops.roi_align(values, [box[None]], size, scale, aligned=True))
    return torch.cat(found)


def five_maps(p: Params, x: Tensor) -> tuple[list[Tensor], list[Shape]]:
    """The pyramid with a fifth level for the proposals, and the sizes."""
    levels = truth.pyramid(p, truth.body(p, x))
    levels.append(levels[-1][:, :, ::2, ::2])
    return levels, [tuple(level.shape[2:]) for level in levels]


def rpn_outputs(p: Params, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    deep = [conv(level, p, "rpn.head.conv.0.0", padding=1).relu() for level in levels]
    logits = [flat(conv(y, p, "rpn.head.cls_logits"), 1)[..., 0] for y in deep]
    return logits, [flat(conv(y, p, "rpn.head.bbox_pred"), 4) for y in deep]


@torch.no_grad()
def proposals(logits, deltas, grid, sizes: list[Shape], before: int, after: int) -> list[Tensor]:
    """Of every image, best first; suppression is within a level."""
    result = []
    for i, size in enumerate(sizes):
        found = []
        for level, (scores, codes, boxes) in enumerate(zip(logits, deltas, grid, strict=True)):
            values, order = scores[i].sort(descending=True)
            order = order[:before]
            places = truth.decoded(codes[i][order], boxes[order], truth.ONES, size)
            found.append((values[:before], places, torch.full_like(order, level)))
        result.append(truth.best(*map(torch.cat, zip(*found, strict=True)), 0.7, after)[1])
    return result


def linear(x: Tensor, p: Params, name: str) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def box_outputs(p: Params, pooled: Tensor) -> tuple[Tensor, Tensor]:
    y = linear(pooled.flatten(1), p, "roi_heads.box_head.fc6").relu()
    y = linear(y, p, "roi_heads.box_head.fc7").relu()
    name = "roi_heads.box_predictor."
    return linear(y, p, f"{name}cls_score"), linear(y, p, f"{name}bbox_pred")


def doubled(x: Tensor, p: Params, name: str) -> Tensor:
    """A transposed convolution to twice the size."""
    return F.conv_transpose2d(x, p[f"{name}.weight"], p[f"{name}.bias"], stride=2)


def mask_outputs(p: Params, pooled: Tensor) -> Tensor:
    y, name = truth.four_convolutions(pooled, p, "roi_heads.mask_head.{}.0"), "roi_heads.mask_predictor."
    return conv(doubled(y, p, f"{name}conv5_mask").relu(), p, f"{name}mask_fcn_logits")


def rpn_losses(logits: Tensor, deltas: Tensor, matched: Tensor, boxes: Tensor, targets: list[dict]):
    """Of all anchors that are positive or negative; ``logits`` and ``matched`` are ``[B, N]``."""
    regression = 0
    positive, negative = matched >= 0, matched == -1
    number = sum(flags.sum(1).clamp(min=1).sum() for flags in (positive, negative))
    counted = positive | negative
    wanted = positive[counted].double()
    objectness = F.binary_cross_entropy_with_logits(logits[counted], wanted, reduction="sum")
    for i, target in enumerate(targets):
        wanted = truth.encoded(target["boxes"][matched[i][positive[i]]], boxes[positive[i]])
        regression = regression + (deltas[i][positive[i]] - wanted).abs().sum()
    return objectness / number, regression / number


def wanted_mask(mask: Tensor, box: Tensor, size: int = 28) -> Tensor:
    """An object's mask, padded as its image is, in a region: 0 or 1."""
    height, width = (math.ceil(side / 32) * 32 - side for side in mask.shape)
    padded = F.pad(mask.double(), (0, width, 0, height))
    return (ops.roi_align(padded[None, None], [box[None]], size, aligned=True)[0, 0] >= 0.5).double()


def mask_rcnn_training(p: Params, images, targets, before: int, after: int, anchored: Tensor) -> Params:
    """The five losses when everything is sampled. Class 0 is the background, as in the model's parameters.

    ``anchored`` are the model's anchors. An object inside of several anchors overlaps them all alike, and the
    last digit of their coordinates decides which of them are its best.
    """
    x, sizes = truth.batch(images)
    levels, shapes = five_maps(p, x)
    logits, deltas = rpn_outputs(p, levels)
    grid = truth.anchors(shapes, RPN_STRIDES, [8.0])
    truth.assert_near(anchored, torch.cat(grid))
    matched = truth.assigned_in_batch(anchored, targets, shapes, RPN_STRIDES, sizes, 0.7, 0.3, 0.3)
    losses = rpn_losses(torch.cat(logits, 1), torch.cat(deltas, 1), matched, anchored, targets)
    rows, objects = [], []
    for found, target in zip(proposals(logits, deltas, grid, sizes, before, after), targets, strict=True):
        own = target["boxes"].double()
        chosen = truth.assigned(ops.box_iou(own, found), 0.5, 0.5, 0.5)
        objects.append(torch.cat([chosen, torch.arange(len(own))]))
        rows.append(torch.cat([found, own]))
    found = dict(zip(("loss_objectness", "loss_rpn_box_reg"), losses, strict=True))
    return found | region_losses(p, levels, rows, objects, targets)


def region_losses(
    p: Params, levels: list[Tensor], rows: list[Tensor], objects: list[Tensor], targets: list[dict]
) -> dict[str, Tensor]:
    """Of all regions ``rows`` of every image, with their objects (-1: background)."""
    logits, deltas = box_outputs(p, regions(levels, rows, 7))
    positive = [(boxes[own >= 0], own[own >= 0]) for boxes, own in zip(rows, objects, strict=True)]
    foreground = torch.cat(objects) >= 0
    kinds = torch.cat([t["labels"][own] + 1 for (_, own), t in zip(positive, targets, strict=True)])
    wanted = torch.cat([t["boxes"][own] for (_, own), t in zip(positive, targets, strict=True)])
    wanted = truth.encoded(wanted, torch.cat(rows)[foreground], BOX_WEIGHTS)
    distance = own_class(deltas[foreground].unflatten(1, (-1, 4)), kinds) - wanted
    masks = own_class(mask_outputs(p, regions(levels, [boxes for boxes, _ in positive], 14)), kinds)
    wanted_masks = [
        wanted_mask(t["masks"][j], box)
        for (boxes, own), t in zip(positive, targets, strict=True)
        for j, box in zip(own, boxes, strict=True)
    ]
    labels = torch.zeros(len(logits), dtype=torch.int64).masked_scatter(foreground, kinds)
    return {
        "loss_classifier": F.cross_entropy(logits, labels),
        "loss_box_reg": distance.abs().sum() / len(labels),
        "loss_mask": F.binary_cross_entropy_with_logits(masks, torch.stack(wanted_masks)),
    }


def own_class(values: Tensor, kinds: Tensor) -> Tensor:
    """Of ``[N, classes, ...]`` each one's own class."""
    return values[torch.arange(len(kinds)), kinds]


def mask_rcnn_detections(
    p: Params, images: list[Tensor], limits: Shape, before: int, after: int, most: int
) -> list[dict[str, Tensor]]:
    x, sizes = truth.batch(images, *limits)
    levels, shapes = five_maps(p, x)
    rows = proposals(*rpn_outputs(p, levels), truth.anchors(shapes, RPN_STRIDES, [8.0]), sizes, before, after)
    results = []
    for i, (boxes, size) in enumerate(zip(rows, sizes, strict=True)):
        own = [level[i : i + 1] for level in levels]
        logits, deltas = box_outputs(p, regions(own, [boxes], 7))
        scores, codes = logits.softmax(1)[:, 1:], deltas.unflatten(1, (-1, 4))[:, 1:]
        at, labels = (scores > 0.05).nonzero().T
        places = truth.decoded(codes[at, labels], boxes[at], BOX_WEIGHTS, size)
        kept, places, labels = truth.best(scores[at, labels], places, labels, 0.5, most)
        masks = own_class(mask_outputs(p, regions(own, [places], 14)), labels + 1).sigmoid()
        shape = images[i].shape[1:]
        places = truth.unscaled(places, size, shape)
        found = [pasted(mask, box, shape) for mask, box in zip(masks, places, strict=True)]
        results.append({"scores": kept, "boxes": places, "labels": labels, "masks": torch.stack(found)})
    return results


def pasted(mask: Tensor, box: Tensor, shape: Shape) -> Tensor:
    """A mask in its image: bilinear at the pixels' centres, zeros around the mask."""
    low, high = box.view(2, 2)
    y, x = torch.meshgrid(*(torch.arange(side, dtype=truth.F64) + 0.5 for side in shape), indexing="ij")
    grid = 2 * (torch.stack([x, y], 2) - low) / (high - low) - 1
    return F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
