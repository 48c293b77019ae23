"""A tiny backbone learns two images by heart: rectangles of one class and ellipses of another."""

from collections.abc import Callable

import pytest
import torch
from support.dense import require_dense, target, tiny_body
from torch import Tensor

require_dense()

from torchvision.ops import box_iou

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
    made = target(*map(list, zip(*objects, strict=True)), (SIZE, SIZE))
    for mask, (box, kind) in zip(made["masks"], objects, strict=True):
        if kind == 0:
            left, top, right, bottom = map(int, box)
            mask[top:bottom, left:right] = 1
        image[:, mask.bool()] = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.2, 0.9]][kind])[:, None]
    return image, made | {"masks": made["masks"].bool(), "seed": seed}


SCENES = [scene(objects, seed) for seed, objects in enumerate(OBJECTS)]


def box_overlap(result: dict, i: int, image: int, j: int) -> float:
    return float(box_iou(result["boxes"][i : i + 1], SCENES[image][1]["boxes"][j : j + 1]))


def mask_overlap(result: dict, i: int, image: int, j: int) -> float:
    return iou(result["masks"][i, 0] >= 0.5, SCENES[image][1]["masks"][j])


def iou(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


def average_precision(found: list[dict], overlap: Callable[[dict, int, int, int], float]) -> float:
    """AP at an overlap of one half, the mean over both classes; ``overlap(result, i, image, j)``."""
    scores = []
    for kind in range(2):
        ranked = sorted(
            (
                (float(score), image, i)
                for image, result in enumerate(found)
                for i, score in enumerate(result["scores"])
                if result["labels"][i] == kind
            ),
            reverse=True,
        )
        objects = {(image, j) for image in range(2) for j in range(2) if OBJECTS[image][j][1] == kind}
        missing, precisions = set(objects), []
        for rank, (_, image, i) in enumerate(ranked, 1):
            free = [one for one in missing if one[0] == image]
            best = max(free, key=lambda one: overlap(found[image], i, *one), default=None)
            if best is not None and overlap(found[image], i, *best) >= 0.5:
                missing.remove(best)
                precisions.append((len(objects) - len(missing)) / rank)
        precisions += [0.0] * len(missing)
        scores += [max(precisions[k:]) for k in range(len(objects))]
    return sum(scores) / len(scores)


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


@pytest.mark.long
@pytest.mark.parametrize(
    ("head", "steps", "rate", "overlaps"),
    [("retinanet", 80, 1e-3, [box_overlap]), ("mask_rcnn", 50, 5e-4, [box_overlap, mask_overlap])],
    ids=["retinanet", "mask_rcnn"],
)
def test_detectors_learn_two_images(head, steps, rate, overlaps):
    torch.manual_seed(0)
    model = dense.create_detector(head, tiny_body(), 2, min_size=SIZE, max_size=SIZE)
    if head == "mask_rcnn":
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 24
        model.rpn._post_nms_top_n = {"training": 60, "testing": 40}
    x, targets = (list(each) for each in zip(*SCENES, strict=True))
    learn(model, steps, lambda model: sum(model(x, targets).values()), rate)
    with torch.no_grad():
        found = model(x)
    for overlap in overlaps:
        assert average_precision(found, overlap) >= 0.9


@pytest.mark.long
def test_semantic_fpn_learns_two_images():
    torch.manual_seed(0)
    model = dense.create_segmenter("semantic_fpn", tiny_body(), 3)
    x = torch.stack([image for image, _ in SCENES]).sub(0.45).div(0.225)
    labels = torch.zeros(2, SIZE, SIZE, dtype=torch.int64)
    for wanted, (_, made) in zip(labels, SCENES, strict=True):
        for mask, kind in zip(made["masks"], made["labels"], strict=True):
            wanted[mask] = kind + 1
    learn(model, 120, lambda model: dense.segmentation_loss(model(x), labels), 2e-3)
    with torch.no_grad():
        found = model(x).argmax(1)
    scores = [iou(found == k, labels == k) for k in range(3)]
    assert sum(scores) / 3 >= 0.95, scores
