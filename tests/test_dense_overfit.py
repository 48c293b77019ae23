"""A tiny backbone learns two images by heart: rectangles of one class and ellipses of another."""

import pytest
import torch
from support.dense import require_dense, tiny_body
from support.dense_truth import iou
from torch import Tensor

require_dense()

from poolformer_kernels import dense

SIZE = 96
OBJECTS = [
    [([8.0, 10.0, 48.0, 52.0], 0), ([44.0, 58.0, 90.0, 88.0], 1)],
    [([12.0, 48.0, 52.0, 90.0], 1), ([52.0, 6.0, 90.0, 40.0], 0)],
]


def scene(objects: list[tuple[list[float], int]], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Red rectangles and blue ellipses on grey noise."""
    generator = torch.Generator().manual_seed(seed)
    image = 0.4 + 0.1 * torch.rand(3, SIZE, SIZE, generator=generator)
    y, x = torch.arange(SIZE)[:, None] + 0.5, torch.arange(SIZE)[None] + 0.5
    masks = []
    for (x1, y1, x2, y2), kind in objects:
        mask = (x > x1) & (x < x2) & (y > y1) & (y < y2)
        if kind:
            mask = ((2 * x - x1 - x2) / (x2 - x1)).square() + ((2 * y - y1 - y2) / (y2 - y1)).square() < 1
        image[:, mask] = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.2, 0.9]][kind])[:, None]
        masks.append(mask)
    boxes = torch.tensor([box for box, _ in objects])
    labels = torch.tensor([kind for _, kind in objects])
    return image, {"boxes": boxes, "labels": labels, "masks": torch.stack(masks), "seed": seed}


SCENES = [scene(objects, seed) for seed, objects in enumerate(OBJECTS)]


def average_precision(found: list[dict], overlap) -> float:
    """AP at an overlap of one half, the mean over both classes; ``overlap(result, i, image, j)``."""
    scores = []
    for kind in range(2):
        ranked = sorted(
            (
                (float(result["scores"][i]), image, i)
                for image, result in enumerate(found)
                for i in (result["labels"] == kind).nonzero().flatten().tolist()
            ),
            reverse=True,
        )
        wanted = [
            (image, j) for image, objects in enumerate(OBJECTS) for j, o in enumerate(objects) if o[1] == kind
        ]
        taken, hits, precision, recall = set(), 0, [], []
        for rank, (_, image, i) in enumerate(ranked, 1):
            free = [one for one in wanted if one[0] == image and one not in taken]
            best = max(free, key=lambda one: overlap(found[image], i, *one), default=None)
            if best is not None and overlap(found[image], i, *best) >= 0.5:
                taken.add(best)
                hits += 1
            precision.append(hits / rank)
            recall.append(hits / len(wanted))
        levels = [k / 100 for k in range(101)]
        at = [
            max((p for p, r in zip(precision, recall, strict=True) if r >= level), default=0.0)
            for level in levels
        ]
        scores.append(sum(at) / len(at))
    return sum(scores) / len(scores)


def box_overlap(result: dict, i: int, image: int, j: int) -> float:
    return iou(result["boxes"][i].tolist(), OBJECTS[image][j][0])


def mask_overlap(result: dict, i: int, image: int, j: int) -> float:
    one, other = result["masks"][i, 0] >= 0.5, SCENES[image][1]["masks"][j]
    return float((one & other).sum() / (one | other).sum())


def learn(model: torch.nn.Module, steps: int, loss_of, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def detector_loss(model: torch.nn.Module) -> Tensor:
    return sum(model([image for image, _ in SCENES], [target for _, target in SCENES]).values())


def detections(model: torch.nn.Module) -> list[dict]:
    with torch.no_grad():
        return model([image for image, _ in SCENES])


@pytest.mark.long
def test_retinanet_learns_two_images():
    torch.manual_seed(0)
    model = dense.create_detector("retinanet", tiny_body(), 2, min_size=SIZE, max_size=SIZE)
    learn(model, 80, detector_loss, 1e-3)
    assert average_precision(detections(model), box_overlap) >= 0.9


@pytest.mark.long
def test_mask_rcnn_learns_two_images():
    torch.manual_seed(0)
    model = dense.create_detector("mask_rcnn", tiny_body(), 2, min_size=SIZE, max_size=SIZE)
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 24
    model.rpn._post_nms_top_n = {"training": 60, "testing": 40}
    learn(model, 50, detector_loss, 5e-4)
    found = detections(model)
    assert average_precision(found, box_overlap) >= 0.9
    assert average_precision(found, mask_overlap) >= 0.9


@pytest.mark.long
def test_semantic_fpn_learns_two_images():
    torch.manual_seed(0)
    model = dense.create_segmenter("semantic_fpn", tiny_body(), 3)
    x = torch.stack([image for image, _ in SCENES]).sub(0.45).div(0.225)
    labels = torch.zeros(2, SIZE, SIZE, dtype=torch.int64)
    for wanted, (_, target) in zip(labels, SCENES, strict=True):
        for mask, kind in zip(target["masks"], target["labels"], strict=True):
            wanted[mask] = int(kind) + 1
    learn(model, 120, lambda model: dense.segmentation_loss(model(x), labels), 2e-3)
    with torch.no_grad():
        found = model(x).argmax(1)
    scores = [
        float(((found == k) & (labels == k)).sum() / ((found == k) | (labels == k)).sum()) for k in range(3)
    ]
    assert sum(scores) / 3 >= 0.95, scores
