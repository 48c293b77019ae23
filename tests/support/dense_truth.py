"""RetinaNet and Semantic FPN in float64, from their definitions in mmdetection 2.19 and mmsegmentation 0.19.

Nothing here uses `poolformer_kernels`, and of torchvision only operators. Parameters are a dict with the
names of the model under test.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from support.peers import require

ops = require("torchvision", "ops").ops
F64 = torch.float64
MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=F64).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=F64).view(3, 1, 1)
ONES = (1.0,) * 4
Params = dict[str, Tensor]
Shape = tuple[int, int]


def parameters(model: torch.nn.Module) -> Params:
    """Leaves with the model's values in float64."""
    return {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}


def assert_near(actual: Tensor, expected: Tensor, relative: float = 1e-9, what: str = "") -> None:
    """Relative to the largest of the expected values."""
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=relative * largest + 1e-12, msg=lambda text: f"{what}: {text}"
    )


# ---- images and the backbone -------------------------------------------------------------------------------


def resized(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def batch(images: list[Tensor], shorter: int | None = None, longer: int | None = None):
    """Normalised, resized images, padded with zeros to a common multiple of 32; and their sizes."""
    done = []
    for image in images:
        x = (image.double() - MEAN) / STD
        if shorter is not None:
            h, w = x.shape[1:]
            scale = min(longer / max(h, w), shorter / min(h, w))
            x = resized(x[None], int(h * scale + 0.5), int(w * scale + 0.5))[0]
        done.append(x)
    height, width = (math.ceil(max(x.shape[axis] for x in done) / 32) * 32 for axis in (1, 2))
    padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in done]
    return torch.stack(padded), [tuple(x.shape[1:]) for x in done]


def group_norm(x: Tensor, p: Params, name: str) -> Tensor:
    return F.group_norm(x, 1, p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)


def conv(x: Tensor, p: Params, name: str, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv2d(x, p[f"{name}.weight"], p.get(f"{name}.bias"), stride, padding)


def body(p: Params, x: Tensor, first: int = 0) -> list[Tensor]:
    """The maps of a PoolFormer, from stage ``first`` on."""
    maps, b = [], "backbone.body."
    x = conv(x, p, f"{b}patch_embed.proj", 4, 2)
    for stage in range(4):
        if stage:
            x = conv(x, p, f"{b}network.{2 * stage - 1}.proj", 2, 1)
        blocks = {key.split(".")[4] for key in p if key.startswith(f"{b}network.{2 * stage}.")}
        for block in (f"{b}network.{2 * stage}.{i}." for i in range(len(blocks))):
            n = group_norm(x, p, f"{block}norm1")
            n = F.avg_pool2d(n, 3, 1, 1, count_include_pad=False) - n
            x = x + p[f"{block}layer_scale_1"].view(-1, 1, 1) * n
            n = F.gelu(conv(group_norm(x, p, f"{block}norm2"), p, f"{block}mlp.fc1"))
            x = x + p[f"{block}layer_scale_2"].view(-1, 1, 1) * conv(n, p, f"{block}mlp.fc2")
        if stage >= first:
            maps.append(group_norm(x, p, f"{b}norm{2 * stage}"))
    return maps


def pyramid(
    p: Params,
    maps: list[Tensor],
    inner: str = "backbone.fpn.inner_blocks.{}.0",
    outer: str = "backbone.fpn.layer_blocks.{}.0",
) -> list[Tensor]:
    """A 1 x 1 convolution of each map, added up from the coarsest down, and a convolution each."""
    lateral = [conv(x, p, inner.format(i)) for i, x in enumerate(maps)]
    for i in reversed(range(len(maps) - 1)):
        lateral[i] = lateral[i] + F.interpolate(lateral[i + 1], size=lateral[i].shape[2:], mode="nearest")
    return [conv(x, p, outer.format(i), padding=1) for i, x in enumerate(lateral)]


def four_convolutions(x: Tensor, p: Params, name: str) -> Tensor:
    for i in range(4):
        x = conv(x, p, name.format(i), padding=1).relu()
    return x


def flat(x: Tensor, numbers: int) -> Tensor:
    """``[B, A numbers, H, W]`` to ``[B, H W A, numbers]``."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, numbers)


# ---- anchors, matching, boxes ------------------------------------------------------------------------------


def anchors(sizes: list[Shape], strides: list[int], scales: list[float]) -> list[Tensor]:
    """Of every level ``[H W A, 4]``: rows, columns, ratios of height to width, scales."""
    levels, shapes = [], (torch.tensor([0.5, 1.0, 2.0], dtype=F64), torch.tensor(scales, dtype=F64))
    for size, stride in zip(sizes, strides, strict=True):
        places = (stride * torch.arange(side, dtype=F64) for side in size)
        y, x, ratio, scale = torch.cartesian_prod(*places, *shapes).T
        w, h = stride * scale / ratio.sqrt(), stride * scale * ratio.sqrt()
        levels.append(torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1))
    return levels


def in_image(sizes: list[Shape], strides: list[int], image: Shape, each: int) -> Tensor:
    """The anchors whose cell begins in the image as it is padded by itself; by the numbers of the cells."""
    flags = []
    for (rows, columns), stride in zip(sizes, strides, strict=True):
        height, width = (math.ceil(math.ceil(side / 32) * 32 / stride) for side in image)
        cells = (torch.arange(rows)[:, None] < height) & (torch.arange(columns) < width)
        flags.append(cells.flatten().repeat_interleave(each))
    return torch.cat(flags)


def assigned(table: Tensor, positive: float, negative: float, low: float) -> Tensor:
    """Of every box the object, -1 for the background, -2 for neither (``MaxIoUAssigner``).

    ``table`` are the overlaps ``[objects, boxes]``.
    """
    if not len(table):
        return torch.full(table.shape[1:], -1)
    best = table.amax(0)
    result = torch.where(best >= positive, table.argmax(0), torch.where(best < negative, -1, -2))
    for i, row in enumerate(table):
        if len(row) and row.max() >= low:
            result[row == row.max()] = i
    return result


def assigned_anchors(boxes: Tensor, objects: Tensor, valid: Tensor, *limits: float) -> Tensor:
    """The same for anchors; those outside of the image are neither."""
    result = torch.full((len(boxes),), -2)
    result[valid] = assigned(ops.box_iou(objects.double(), boxes[valid]), *limits)
    return result


def assigned_in_batch(
    boxes: Tensor,
    targets: list[dict],
    shapes: list[Shape],
    strides: list[int],
    sizes: list[Shape],
    *limits: float,
) -> Tensor:
    """The same for a batch of images of these sizes: ``[B, N]``."""
    each = len(boxes) // sum(height * width for height, width in shapes)
    valid = [in_image(shapes, strides, size, each) for size in sizes]
    rows = zip(targets, valid, strict=True)
    return torch.stack([assigned_anchors(boxes, t["boxes"], inside, *limits) for t, inside in rows])


def encoded(objects: Tensor, boxes: Tensor, weights: tuple[float, ...] = ONES) -> Tensor:
    a, b = (ops.box_convert(t.double(), "xyxy", "cxcywh") for t in (objects, boxes))
    deltas = torch.cat([(a[:, :2] - b[:, :2]) / b[:, 2:], (a[:, 2:] / b[:, 2:]).log()], 1)
    return deltas * torch.tensor(weights, dtype=F64)


def decoded(deltas: Tensor, boxes: Tensor, weights: tuple[float, ...], size: Shape) -> Tensor:
    """Boxes, clipped to the image of (H, W)."""
    deltas, b = deltas / torch.tensor(weights, dtype=F64), ops.box_convert(boxes, "xyxy", "cxcywh")
    most = math.log(1000 / 16)
    sides = b[:, 2:] * deltas[:, 2:].clamp(-most, most).exp()
    found = torch.cat([b[:, :2] + deltas[:, :2] * b[:, 2:], sides], 1)
    return ops.clip_boxes_to_image(ops.box_convert(found, "cxcywh", "xyxy"), size)


def best(
    scores: Tensor, boxes: Tensor, kinds: Tensor, threshold: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes with an area that non-maximum suppression among those of one kind leaves, best first."""
    area = (boxes[:, 2:] > boxes[:, :2]).all(1)
    scores, boxes, kinds = scores[area], boxes[area], kinds[area]
    kept = ops.batched_nms(boxes, scores, kinds, threshold)[:most]
    return scores[kept], boxes[kept], kinds[kept]


def unscaled(boxes: Tensor, size: Shape, original: Shape) -> Tensor:
    """Boxes of the resized image in the original one."""
    return boxes * torch.tensor([original[1] / size[1], original[0] / size[0]], dtype=F64).repeat(2)


# ---- RetinaNet ---------------------------------------------------------------------------------------------

RETINA_STRIDES = [8, 16, 32, 64, 128]
RETINA_SCALES = [4 * 2 ** (i / 3) for i in range(3)]


def retina_outputs(p: Params, x: Tensor, classes: int) -> tuple[list[Tensor], list[Tensor], list[Shape]]:
    """Of every level the logits, the deltas and the map's size."""
    maps = body(p, x, first=1)
    levels = pyramid(p, maps)
    levels.append(conv(maps[-1], p, "backbone.fpn.extra_blocks.p6", 2, 1))
    levels.append(conv(levels[-1], p, "backbone.fpn.extra_blocks.p7", 2, 1))

    def outputs(name: str, last: str, numbers: int) -> list[Tensor]:
        deep = [four_convolutions(level, p, f"{name}.conv.{{}}.0") for level in levels]
        return [flat(conv(y, p, f"{name}.{last}", padding=1), numbers) for y in deep]

    logits = outputs("head.classification_head", "cls_logits", classes)
    deltas = outputs("head.regression_head", "bbox_reg", 4)
    return logits, deltas, [tuple(level.shape[2:]) for level in levels]


def retina_losses(
    logits: Tensor, deltas: Tensor, matched: Tensor, boxes: Tensor, targets: list[dict]
) -> tuple[Tensor, Tensor]:
    """The two losses; ``matched`` is ``[B, N]``."""
    classification = regression = 0
    number = (matched >= 0).sum(1).clamp(min=1).sum()
    for i, target in enumerate(targets):
        positive, counted = matched[i] >= 0, matched[i] != -2
        objects = matched[i][positive]
        wanted = torch.zeros_like(logits[i])
        wanted[positive, target["labels"][objects]] = 1
        classification = classification + ops.sigmoid_focal_loss(
            logits[i][counted], wanted[counted], alpha=0.25, gamma=2, reduction="sum"
        )
        distance = deltas[i][positive] - encoded(target["boxes"][objects], boxes[positive])
        regression = regression + distance.abs().sum()
    return classification / number, regression / number


def retina_training(p: Params, images: list[Tensor], targets: list[dict], classes: int) -> dict[str, Tensor]:
    x, sizes = batch(images)
    logits, deltas, shapes = retina_outputs(p, x, classes)
    boxes = torch.cat(anchors(shapes, RETINA_STRIDES, RETINA_SCALES))
    matched = assigned_in_batch(boxes, targets, shapes, RETINA_STRIDES, sizes, 0.5, 0.4, 0.0)
    found = retina_losses(torch.cat(logits, 1), torch.cat(deltas, 1), matched, boxes, targets)
    return dict(zip(("classification", "bbox_regression"), found, strict=True))


def retina_detections(
    p: Params, images: list[Tensor], classes: int, limits: Shape, threshold: float, most: int, nms_pre: int
) -> list[Params]:
    """Scores, boxes and labels of every image, best first."""
    x, sizes = batch(images, *limits)
    logits, deltas, shapes = retina_outputs(p, x, classes)
    grid = anchors(shapes, RETINA_STRIDES, RETINA_SCALES)
    results = []
    for i, (size, image) in enumerate(zip(sizes, images, strict=True)):
        found = []
        for level, codes, boxes in zip(logits, deltas, grid, strict=True):
            scores, order = level[i].sigmoid().flatten().sort(descending=True)
            chosen = order[scores > threshold][:nms_pre]
            at = chosen // classes
            places = decoded(codes[i][at], boxes[at], ONES, size)
            found.append((scores[: len(chosen)], unscaled(places, size, image.shape[1:]), chosen % classes))
        kept = best(*map(torch.cat, zip(*found, strict=True)), 0.5, most)
        results.append(dict(zip(("scores", "boxes", "labels"), kept, strict=True)))
    return results


# ---- Semantic FPN ------------------------------------------------------------------------------------------


def own_names(level: int, i: int) -> tuple[str, str]:
    """Of the model under test: convolution, norm, ReLU and, but in the finest level, upsampling in a row."""
    first = (4 if level else 3) * i
    return f"scale_heads.{level}.{first}", f"scale_heads.{level}.{first + 1}"


def semantic_head(
    p: Params,
    levels: list[Tensor],
    statistics: Params | None = None,
    names: Callable[[int, int], tuple[str, str]] = own_names,
    last: str = "classifier",
) -> Tensor:
    """Logits of a quarter of the size, with the batch's own means and variances, or those given by name.

    ``names`` are those of a level's i-th convolution and its norm.
    """
    total = 0
    for level, y in enumerate(levels):
        for i in range(max(level, 1)):
            convolution, norm = names(level, i)
            own = [(statistics or {}).get(f"{norm}.{name}") for name in ("running_mean", "running_var")]
            affine = p[f"{norm}.weight"], p[f"{norm}.bias"]
            y = conv(y, p, convolution, padding=1)
            y = F.batch_norm(y, *own, *affine, training=statistics is None).relu()
            if level:
                y = resized(y, 2 * y.shape[2], 2 * y.shape[3])
        total = y if level == 0 else total + resized(y, *total.shape[2:])
    return conv(total, p, last)


def semantic_fpn(p: Params, x: Tensor, statistics: Params | None = None) -> Tensor:
    return resized(semantic_head(p, pyramid(p, body(p, x)), statistics), *x.shape[2:])


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over all pixels; those of 255 count as zero."""
    return F.cross_entropy(logits, target, ignore_index=255, reduction="none").mean()
