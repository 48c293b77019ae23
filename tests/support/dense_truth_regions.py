"""Mask R-CNN in float64, from its definition, as mmdetection 2.19 has it; see `dense_truth`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from support.dense_truth import (
    Params,
    anchors,
    assert_near,
    assigned,
    assigned_anchors,
    batch,
    best,
    body,
    conv,
    decoded,
    encoded,
    flat,
    in_image,
    overlaps,
    pyramid,
    unscaled,
)

RPN_STRIDES = [4, 8, 16, 32, 64]
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def region_weights(low: float, high: float, size: int, cells: int) -> Tensor:
    """RoIAlign of one axis as a matrix ``[size, cells]``: the mean over ceil(cell) samples, bilinear."""
    weights = torch.zeros(size, cells, dtype=torch.float64)
    step = (high - low) / size
    samples = math.ceil(step)
    for i in range(size):
        for k in range(samples):
            place = low + (i + (k + 0.5) / samples) * step
            if place < -1 or place > cells:
                continue
            place = min(max(place, 0.0), cells - 1.0)
            first = min(int(place), cells - 1)
            weights[i, first] += (1 - (place - first)) / samples
            weights[i, min(first + 1, cells - 1)] += (place - first) / samples
    return weights


def region(values: Tensor, box, size: int, stride: int = 1) -> Tensor:
    """RoIAlign of ``[C, H, W]``, half a pixel shifted: ``[C, size, size]``."""
    x1, y1, x2, y2 = (side / stride - 0.5 for side in box)
    rows = region_weights(y1, y2, size, values.shape[1])
    return rows @ values @ region_weights(x1, x2, size, values.shape[2]).T


def level_of(box) -> int:
    """Sides up to 112 pixels from the finest of four maps, then one more for each doubling."""
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    return min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 3)


def regions(levels: list[Tensor], boxes: list[list[list[float]]], size: int) -> Tensor:
    found = []
    for i, rows in enumerate(boxes):
        for box in rows:
            level = level_of(box)
            found.append(region(levels[level][i], box, size, 4 * 2**level))
    return torch.stack(found) if found else levels[0].new_zeros(0, levels[0].shape[1], size, size)


def rpn_outputs(p: Params, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    logits, deltas = [], []
    for level in levels:
        y = conv(level, p, "rpn.head.conv.0.0", padding=1).clamp(min=0)
        logits.append(flat(conv(y, p, "rpn.head.cls_logits"), 1)[..., 0])
        deltas.append(flat(conv(y, p, "rpn.head.bbox_pred"), 4))
    return logits, deltas


def proposals(logits, deltas, grid, sizes, before: int, after: int) -> list[list[list[float]]]:
    """Of every image, best first; suppression is within a level."""
    result = []
    for i, size in enumerate(sizes):
        found = []
        for level, (scores, codes, boxes) in enumerate(zip(logits, deltas, grid, strict=True)):
            values, rows, places = scores[i].tolist(), codes[i].tolist(), boxes.tolist()
            order = sorted(range(len(values)), key=lambda j: -values[j])[:before]
            for j in order:
                box = decoded(rows[j], places[j], (1.0,) * 4, size)
                if box[2] > box[0] and box[3] > box[1]:
                    found.append((values[j], box, level))
        result.append([one[1] for one in best(found, 0.7, after)])
    return result


def linear(x: Tensor, p: Params, name: str) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def box_outputs(p: Params, pooled: Tensor) -> tuple[Tensor, Tensor]:
    y = linear(pooled.flatten(1), p, "roi_heads.box_head.fc6").clamp(min=0)
    y = linear(y, p, "roi_heads.box_head.fc7").clamp(min=0)
    name = "roi_heads.box_predictor."
    return linear(y, p, f"{name}cls_score"), linear(y, p, f"{name}bbox_pred")


def mask_outputs(p: Params, pooled: Tensor) -> Tensor:
    y, name = pooled, "roi_heads.mask_"
    for i in range(4):
        y = conv(y, p, f"{name}head.{i}.0", padding=1).clamp(min=0)
    y = F.conv_transpose2d(
        y, p[f"{name}predictor.conv5_mask.weight"], p[f"{name}predictor.conv5_mask.bias"], stride=2
    ).clamp(min=0)
    return conv(y, p, f"{name}predictor.mask_fcn_logits")


def binary(logits: Tensor, wanted: Tensor) -> Tensor:
    """The terms of binary cross entropy."""
    return torch.log1p(torch.exp(-logits.abs())) + logits.clamp(min=0) - logits * wanted


def rpn_losses(logits: Tensor, deltas: Tensor, matched: Tensor, boxes: Tensor, targets: list[dict]):
    """Of all anchors that are positive or negative; ``logits`` and ``matched`` are ``[B, N]``."""
    objectness = regression = number = 0
    for i, target in enumerate(targets):
        positive, negative = matched[i] >= 0, matched[i] == -1
        number += max(int(positive.sum()), 1) + max(int(negative.sum()), 1)
        counted = positive | negative
        objectness = objectness + binary(logits[i][counted], positive[counted].double()).sum()
        objects = target["boxes"].double()[matched[i][positive]]
        wanted = encoded(objects, boxes[positive])
        regression = regression + (deltas[i][positive] - wanted).abs().sum()
    return objectness / number, regression / number


def wanted_mask(mask: Tensor, box, size: int = 28) -> Tensor:
    """An object's mask, padded as its image is, in a region: 0 or 1."""
    height, width = mask.shape
    padded = torch.zeros(math.ceil(height / 32) * 32, math.ceil(width / 32) * 32, dtype=torch.float64)
    padded[:height, :width] = mask
    return (region(padded[None], box, size)[0] >= 0.5).double()


def mask_rcnn_training(
    p: Params, images, targets, classes: int, before: int, after: int, anchored: Tensor
) -> dict[str, Tensor]:
    """The five losses when everything is sampled. Class 0 is the background, as in the model's parameters.

    ``anchored`` are the model's anchors. An object inside of several anchors overlaps them all alike, and the
    last digit of their coordinates decides which of them are its best.
    """
    x, sizes = batch(images)
    levels = pyramid(p, body(p, x))
    levels.append(levels[-1][:, :, ::2, ::2])
    shapes = [tuple(level.shape[2:]) for level in levels]
    logits, deltas = rpn_outputs(p, levels)
    grid = anchors(shapes, RPN_STRIDES, [8.0])
    assert_near(anchored, torch.cat(grid))
    boxes = anchored
    matched = torch.stack(
        [
            assigned_anchors(
                boxes, t["boxes"].double(), in_image(shapes, RPN_STRIDES, size, 3), 0.7, 0.3, 0.3
            )
            for t, size in zip(targets, sizes, strict=True)
        ]
    )
    losses = dict(
        zip(
            ("loss_objectness", "loss_rpn_box_reg"),
            rpn_losses(torch.cat(logits, 1), torch.cat(deltas, 1), matched, boxes, targets),
            strict=True,
        )
    )
    rows, objects = [], []
    for found, target in zip(proposals(logits, deltas, grid, sizes, before, after), targets, strict=True):
        own = target["boxes"].double()
        table = overlaps(own, torch.tensor(found, dtype=torch.float64).reshape(-1, 4))
        objects.append(assigned(table, len(found), 0.5, 0.5, 0.5) + list(range(len(own))))
        rows.append(found + own.tolist())
    return losses | region_losses(p, levels, rows, objects, targets)


def region_losses(p: Params, levels, rows, objects, targets) -> dict[str, Tensor]:
    """Of all regions ``rows`` of every image, with their objects (-1: background)."""
    logits, deltas = box_outputs(p, regions(levels, rows, 7))
    labels = [
        int(t["labels"][j]) + 1 if j >= 0 else 0
        for chosen, t in zip(objects, targets, strict=True)
        for j in chosen
    ]
    log_p = logits - torch.log(torch.exp(logits).sum(1, keepdim=True))
    classification = -sum(log_p[k, label] for k, label in enumerate(labels)) / len(labels)
    distance, k, positive = 0, 0, []
    for chosen, boxes, t in zip(objects, rows, targets, strict=True):
        positive.append([])
        for j, box in zip(chosen, boxes, strict=True):
            if j >= 0:
                wanted = encoded(
                    t["boxes"][j : j + 1].double(), torch.tensor([box], dtype=torch.float64), BOX_WEIGHTS
                )[0]
                distance = distance + (deltas[k, 4 * labels[k] : 4 * labels[k] + 4] - wanted).abs().sum()
                positive[-1].append((j, box))
            k += 1
    found = mask_outputs(p, regions(levels, [[box for _, box in rows] for rows in positive], 14))
    kinds = [label for label in labels if label > 0]
    wanted = [
        wanted_mask(t["masks"][j], box) for t, rows in zip(targets, positive, strict=True) for j, box in rows
    ]
    terms = [
        binary(found[k, kind], mask).mean() for k, (kind, mask) in enumerate(zip(kinds, wanted, strict=True))
    ]
    return {
        "loss_classifier": classification,
        "loss_box_reg": distance / len(labels),
        "loss_mask": sum(terms) / len(terms),
    }


def mask_rcnn_detections(
    p: Params, images, classes: int, limits, before: int, after: int, most: int
) -> list[dict]:
    x, sizes = batch(images, *limits)
    levels = pyramid(p, body(p, x))
    levels.append(levels[-1][:, :, ::2, ::2])
    grid = anchors([tuple(level.shape[2:]) for level in levels], RPN_STRIDES, [8.0])
    rows = proposals(*rpn_outputs(p, levels), grid, sizes, before, after)
    logits, deltas = box_outputs(p, regions(levels, rows, 7))
    results, k = [], 0
    for i, (boxes, size) in enumerate(zip(rows, sizes, strict=True)):
        found = []
        for box in boxes:
            scores = torch.softmax(logits[k], 0).tolist()
            for c in range(1, classes + 1):
                if scores[c] > 0.05:
                    codes = deltas[k, 4 * c : 4 * c + 4].tolist()
                    found.append((scores[c], decoded(codes, box, BOX_WEIGHTS, size), c))
            k += 1
        kept = best(found, 0.5, most)
        masks = mask_outputs(
            p, regions([level[i : i + 1] for level in levels], [[one[1] for one in kept]], 14)
        )
        shape = images[i].shape[1:]
        chosen = [unscaled(one[1], size, shape) for one in kept]
        results.append(
            {
                "scores": [one[0] for one in kept],
                "labels": [one[2] - 1 for one in kept],
                "boxes": chosen,
                "masks": [
                    pasted(torch.sigmoid(mask[one[2]]), box, shape)
                    for mask, one, box in zip(masks, kept, chosen, strict=True)
                ],
            }
        )
    return results


def paste_weights(low: float, high: float, cells: int, pixels: int) -> Tensor:
    """One axis of a mask in its image as a matrix ``[pixels, cells]``: bilinear, zeros around the mask."""
    weights = torch.zeros(pixels, cells, dtype=torch.float64)
    for i in range(pixels):
        place = (i + 0.5 - low) / (high - low) * cells - 0.5
        first = math.floor(place)
        for cell, share in ((first, 1 - (place - first)), (first + 1, place - first)):
            if 0 <= cell < cells:
                weights[i, cell] += share
    return weights


def pasted(mask: Tensor, box, shape) -> Tensor:
    rows = paste_weights(box[1], box[3], mask.shape[0], shape[0])
    return rows @ mask @ paste_weights(box[0], box[2], mask.shape[1], shape[1]).T
