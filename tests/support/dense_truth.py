"""RetinaNet and Semantic FPN in float64, from their definitions: loops and plain formulas.

As in mmdetection 2.19 and mmsegmentation 0.19. Nothing here uses torchvision or `poolformer_kernels.dense`;
parameters are a dict with the names of the model under test.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Params = dict[str, Tensor]


def parameters(model: torch.nn.Module) -> Params:
    """Leaves with the model's values in float64."""
    return {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}


def assert_near(actual: Tensor, expected: Tensor, relative: float = 1e-9, what: str = "") -> None:
    """Relative to the largest of the expected values."""
    error = (actual.detach() - expected.detach()).abs().max() if actual.numel() else torch.zeros(())
    size = expected.detach().abs().max() if expected.numel() else torch.ones(())
    assert actual.shape == expected.shape, what
    assert error <= relative * size + 1e-12, f"{what}: {error} of {size}"


# ---- images and the backbone -------------------------------------------------------------------------------


def resize_weights(given: int, wanted: int) -> Tensor:
    """Bilinear scaling of one axis as a matrix ``[wanted, given]``; pixels' centres are at halves."""
    weights = torch.zeros(wanted, given, dtype=torch.float64)
    for i in range(wanted):
        place = max((i + 0.5) * given / wanted - 0.5, 0.0)
        low = min(int(place), given - 1)
        weights[i, low] += 1 - (place - low)
        weights[i, min(low + 1, given - 1)] += place - low
    return weights


def resized(x: Tensor, height: int, width: int) -> Tensor:
    rows, columns = resize_weights(x.shape[-2], height), resize_weights(x.shape[-1], width)
    return rows @ x @ columns.T


def batch(images: list[Tensor], shorter: int | None = None, longer: int | None = None):
    """Normalised, resized images, padded with zeros to a common multiple of 32; and their sizes."""
    done = []
    for image in images:
        x = torch.stack([(c - m) / s for c, m, s in zip(image.double(), MEAN, STD, strict=True)])
        if shorter is not None:
            h, w = x.shape[1:]
            scale = min(longer / max(h, w), shorter / min(h, w))
            x = resized(x, int(h * scale + 0.5), int(w * scale + 0.5))
        done.append(x)
    height = math.ceil(max(x.shape[1] for x in done) / 32) * 32
    width = math.ceil(max(x.shape[2] for x in done) / 32) * 32
    padded = torch.zeros(len(done), 3, height, width, dtype=torch.float64)
    for canvas, x in zip(padded, done, strict=True):
        canvas[:, : x.shape[1], : x.shape[2]] = x
    return padded, [tuple(x.shape[1:]) for x in done]


def group_norm(x: Tensor, p: Params, name: str) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((1, 2, 3), keepdim=True)
    n = (x - mean) / (variance + 1e-5).sqrt()
    return n * p[f"{name}.weight"].view(-1, 1, 1) + p[f"{name}.bias"].view(-1, 1, 1)


def conv(x: Tensor, p: Params, name: str, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv2d(x, p[f"{name}.weight"], p.get(f"{name}.bias"), stride, padding)


def body(p: Params, x: Tensor, first: int = 0) -> list[Tensor]:
    """The maps of a PoolFormer of one block a stage, from stage ``first`` on."""
    maps, b = [], "backbone.body."
    x = conv(x, p, f"{b}patch_embed.proj", 4, 2)
    for stage in range(4):
        if stage:
            x = conv(x, p, f"{b}network.{2 * stage - 1}.proj", 2, 1)
        block = f"{b}network.{2 * stage}.0."
        n = group_norm(x, p, f"{block}norm1")
        n = F.avg_pool2d(n, 3, 1, 1, count_include_pad=False) - n
        x = x + p[f"{block}layer_scale_1"].view(-1, 1, 1) * n
        n = F.gelu(conv(group_norm(x, p, f"{block}norm2"), p, f"{block}mlp.fc1"))
        x = x + p[f"{block}layer_scale_2"].view(-1, 1, 1) * conv(n, p, f"{block}mlp.fc2")
        if stage >= first:
            maps.append(group_norm(x, p, f"{b}norm{2 * stage}"))
    return maps


def nearest(x: Tensor, height: int, width: int) -> Tensor:
    rows = [i * x.shape[2] // height for i in range(height)]
    return x[:, :, rows][..., [j * x.shape[3] // width for j in range(width)]]


def pyramid(p: Params, maps: list[Tensor]) -> list[Tensor]:
    lateral = [conv(x, p, f"backbone.fpn.inner_blocks.{i}.0") for i, x in enumerate(maps)]
    for i in reversed(range(len(maps) - 1)):
        lateral[i] = lateral[i] + nearest(lateral[i + 1], *lateral[i].shape[2:])
    return [conv(x, p, f"backbone.fpn.layer_blocks.{i}.0", padding=1) for i, x in enumerate(lateral)]


def flat(x: Tensor, numbers: int) -> Tensor:
    """``[B, A numbers, H, W]`` to ``[B, H W A, numbers]``."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, numbers)


# ---- anchors, matching, boxes ------------------------------------------------------------------------------


def anchors(sizes: list[tuple[int, int]], strides: list[int], scales: list[float]) -> list[Tensor]:
    """Of every level ``[H W A, 4]``: rows, columns, ratios of height to width, scales."""
    levels = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        boxes = []
        for row in range(height):
            for column in range(width):
                for ratio in (0.5, 1.0, 2.0):
                    for scale in scales:
                        w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
                        x, y = column * stride, row * stride
                        boxes.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        levels.append(torch.tensor(boxes, dtype=torch.float64))
    return levels


def in_image(sizes: list[tuple[int, int]], strides: list[int], image: tuple[int, int], each: int) -> Tensor:
    """The anchors whose cell begins in the image as it is padded by itself; by the numbers of the cells."""
    flags = []
    height, width = (math.ceil(side / 32) * 32 for side in image)
    for (rows, columns), stride in zip(sizes, strides, strict=True):
        for row in range(rows):
            for column in range(columns):
                fine = row < math.ceil(height / stride) and column < math.ceil(width / stride)
                flags += [fine] * each
    return torch.tensor(flags)


def iou(a, b) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    common = w * h
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def overlaps(objects: Tensor, boxes: Tensor) -> list[list[float]]:
    found = boxes.tolist()
    return [[iou(a, b) for b in found] for a in objects.tolist()]


def assigned(table: list[list[float]], count: int, positive: float, negative: float, low: float) -> list[int]:
    """Of every box the object, -1 for the background, -2 for neither (``MaxIoUAssigner``)."""
    if not table:
        return [-1] * count
    result = []
    for j in range(count):
        column = [row[j] for row in table]
        best = max(column)
        result.append(column.index(best) if best >= positive else -1 if best < negative else -2)
    for i, row in enumerate(table):
        if row and max(row) >= low:
            for j, value in enumerate(row):
                if value == max(row):
                    result[j] = i
    return result


def assigned_anchors(boxes: Tensor, objects: Tensor, valid: Tensor, *limits: float) -> Tensor:
    """The same for anchors; those outside of the image are neither."""
    result = torch.full((len(boxes),), -2)
    inside = valid.nonzero().flatten()
    result[inside] = torch.tensor(assigned(overlaps(objects, boxes[inside]), len(inside), *limits))
    return result


def encoded(objects: Tensor, boxes: Tensor, weights: tuple[float, ...] = (1.0,) * 4) -> Tensor:
    rows = []
    for (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(objects.tolist(), boxes.tolist(), strict=True):
        w, h = u2 - u1, v2 - v1
        row = [((x1 + x2) / 2 - (u1 + u2) / 2) / w, ((y1 + y2) / 2 - (v1 + v2) / 2) / h]
        row += [math.log((x2 - x1) / w), math.log((y2 - y1) / h)]
        rows.append([value * weight for value, weight in zip(row, weights, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def decoded(deltas, box, weights: tuple[float, ...], size: tuple[int, int]) -> list[float]:
    """One box, clipped to the image of (H, W)."""
    dx, dy, dw, dh = (value / weight for value, weight in zip(deltas, weights, strict=True))
    most = abs(math.log(16 / 1000))
    w, h = box[2] - box[0], box[3] - box[1]
    x, y = (box[0] + box[2]) / 2 + dx * w, (box[1] + box[3]) / 2 + dy * h
    w, h = w * math.exp(min(max(dw, -most), most)), h * math.exp(min(max(dh, -most), most))
    xs = [min(max(value, 0.0), size[1]) for value in (x - w / 2, x + w / 2)]
    ys = [min(max(value, 0.0), size[0]) for value in (y - h / 2, y + h / 2)]
    return [xs[0], ys[0], xs[1], ys[1]]


def best(found: list[tuple], threshold: float, most: int) -> list[tuple]:
    """Non-maximum suppression among those of one kind: (score, box, kind, …) each."""
    kept: list[tuple] = []
    for candidate in sorted(found, key=lambda one: -one[0]):
        same = (other for other in kept if other[2] == candidate[2])
        if all(iou(other[1], candidate[1]) <= threshold for other in same):
            kept.append(candidate)
    return kept[:most]


# ---- RetinaNet ---------------------------------------------------------------------------------------------

RETINA_STRIDES = [8, 16, 32, 64, 128]
RETINA_SCALES = [4 * 2 ** (i / 3) for i in range(3)]


def retina_outputs(
    p: Params, x: Tensor, classes: int
) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int]]]:
    """Of every level the logits, the deltas and the map's size."""
    maps = body(p, x, first=1)
    levels = pyramid(p, maps)
    levels.append(conv(maps[-1], p, "backbone.fpn.extra_blocks.p6", 2, 1))
    levels.append(conv(levels[-1], p, "backbone.fpn.extra_blocks.p7", 2, 1))
    logits, deltas = [], []
    for level in levels:
        for name, last, numbers, found in (
            ("classification_head", "cls_logits", classes, logits),
            ("regression_head", "bbox_reg", 4, deltas),
        ):
            y = level
            for i in range(4):
                y = conv(y, p, f"head.{name}.conv.{i}.0", padding=1).clamp(min=0)
            found.append(flat(conv(y, p, f"head.{name}.{last}", padding=1), numbers))
    return logits, deltas, [tuple(level.shape[2:]) for level in levels]


def focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """The sum of ``-alpha_t (1 - p_t)^2 log p_t``."""
    p = 1 / (1 + torch.exp(-logits))
    hit = -0.25 * (1 - p).square() * torch.log(p)
    miss = -0.75 * p.square() * torch.log(1 - p)
    return torch.where(wanted, hit, miss).sum()


def retina_losses(
    logits: Tensor, deltas: Tensor, matched: Tensor, boxes: Tensor, targets: list[dict]
) -> tuple[Tensor, Tensor]:
    """The two losses; ``matched`` is ``[B, N]``."""
    classification = regression = 0
    number = sum(max(int((row >= 0).sum()), 1) for row in matched)
    for i, target in enumerate(targets):
        wanted = torch.zeros(logits[i].shape, dtype=torch.bool)
        for j in (matched[i] >= 0).nonzero().flatten().tolist():
            wanted[j, int(target["labels"][matched[i, j]])] = True
        counted = matched[i] != -2
        classification = classification + focal(logits[i][counted], wanted[counted])
        positive = matched[i] >= 0
        objects = target["boxes"].double()[matched[i][positive]]
        distance = (deltas[i][positive] - encoded(objects, boxes[positive])).abs()
        regression = regression + distance.sum()
    return classification / number, regression / number


def retina_training(p: Params, images: list[Tensor], targets: list[dict], classes: int) -> dict[str, Tensor]:
    x, sizes = batch(images)
    logits, deltas, shapes = retina_outputs(p, x, classes)
    boxes = torch.cat(anchors(shapes, RETINA_STRIDES, RETINA_SCALES))
    matched = torch.stack(
        [
            assigned_anchors(
                boxes, t["boxes"].double(), in_image(shapes, RETINA_STRIDES, size, 9), 0.5, 0.4, 0.0
            )
            for t, size in zip(targets, sizes, strict=True)
        ]
    )
    found = retina_losses(torch.cat(logits, 1), torch.cat(deltas, 1), matched, boxes, targets)
    return dict(zip(("classification", "bbox_regression"), found, strict=True))


def retina_detections(
    p: Params,
    images: list[Tensor],
    classes: int,
    limits: tuple[int, int],
    threshold=0.05,
    most=100,
    nms_pre=1000,
) -> list[list[tuple]]:
    """(score, box, label) of every image, best first."""
    x, sizes = batch(images, *limits)
    logits, deltas, shapes = retina_outputs(p, x, classes)
    grid = anchors(shapes, RETINA_STRIDES, RETINA_SCALES)
    results = []
    for i, (size, image) in enumerate(zip(sizes, images, strict=True)):
        found = []
        for scores, codes, boxes in zip(logits, deltas, grid, strict=True):
            pairs = [
                (1 / (1 + math.exp(-value)), j, label)
                for j, row in enumerate(scores[i].tolist())
                for label, value in enumerate(row)
            ]
            chosen = sorted((pair for pair in pairs if pair[0] > threshold), reverse=True)[:nms_pre]
            rows, places = codes[i].tolist(), boxes.tolist()
            found += [(s, decoded(rows[j], places[j], (1.0,) * 4, size), label) for s, j, label in chosen]
        found = [one for one in found if one[1][2] > one[1][0] and one[1][3] > one[1][1]]
        found = [(s, unscaled(box, size, image.shape[1:]), label) for s, box, label in found]
        results.append(best(found, 0.5, most))
    return results


def unscaled(box: list[float], size: tuple[int, int], original) -> list[float]:
    """A box of the resized image in the original one."""
    ratios = (original[1] / size[1], original[0] / size[0])
    return [value * ratios[i % 2] for i, value in enumerate(box)]


# ---- Semantic FPN ------------------------------------------------------------------------------------------


def batch_norm(x: Tensor, p: Params, name: str, statistics: dict[str, Tensor] | None) -> Tensor:
    """With the batch's own mean and variance, or those given by name."""
    if statistics is None:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    else:
        mean, variance = statistics[f"{name}.running_mean"], statistics[f"{name}.running_var"]
    n = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 1e-5).sqrt()
    return n * p[f"{name}.weight"].view(-1, 1, 1) + p[f"{name}.bias"].view(-1, 1, 1)


def semantic_fpn(p: Params, x: Tensor, statistics: dict[str, Tensor] | None = None) -> Tensor:
    total = None
    for level, y in enumerate(pyramid(p, body(p, x))):
        step = 3 if level == 0 else 4
        for i in range(max(level, 1)):
            y = conv(y, p, f"scale_heads.{level}.{step * i}", padding=1)
            y = batch_norm(y, p, f"scale_heads.{level}.{step * i + 1}", statistics).clamp(min=0)
            if level:
                y = resized(y, 2 * y.shape[2], 2 * y.shape[3])
        total = y if total is None else total + resized(y, *total.shape[2:])
    return resized(conv(total, p, "classifier"), *x.shape[2:])


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over all pixels; those of 255 count as zero."""
    log_p = logits - torch.log(torch.exp(logits).sum(1, keepdim=True))
    total = 0
    for i in range(len(logits)):
        for kind in range(logits.shape[1]):
            total = total - log_p[i, kind][target[i] == kind].sum()
    return total / target.numel()
