"""Detectors and the segmenter against their definitions in float64 (`dense_truth`)."""

import pytest
import torch
import torch.nn.functional as F
from support import dense_truth as truth
from support import dense_truth_regions as regions
from support.dense import images, require_dense, sample, spread_scores, target, tiny
from support.dense_truth import assert_near
from torch import Tensor

require_dense()

from torchvision.ops import box_iou, sigmoid_focal_loss

from poolformer_kernels.dense import mask_rcnn, matching, segmentation_loss

F64 = torch.float64


def assert_gradients(model: torch.nn.Module, loss: Tensor, p: truth.Params, expected: Tensor) -> None:
    """Those of all the parameters."""
    model.zero_grad()
    loss.backward()
    wanted = torch.autograd.grad(expected, list(p.values()), allow_unused=True, materialize_grads=True)
    largest = max(g.abs().max() for g in wanted)
    moved = 0
    for (name, parameter), g in zip(model.named_parameters(), wanted, strict=True):
        found = torch.zeros_like(g) if parameter.grad is None else parameter.grad
        assert (found - g).abs().max() <= 1e-8 * g.abs().max() + 1e-13 * largest, name
        moved += bool(g.abs().max() > 1e-12 * largest)
    assert moved > 0.8 * len(wanted)


def assert_losses(
    model: torch.nn.Module, losses: truth.Params, p: truth.Params, expected: truth.Params
) -> None:
    """They and the gradients of their sum."""
    assert set(losses) == set(expected)
    for name, value in losses.items():
        assert_near(value, expected[name], 1e-10, name)
    assert_gradients(model, sum(losses.values()), p, sum(expected.values()))


def assert_derivatives(values, expected, leaves: list[Tensor]) -> None:
    """Scalars and their gradients; zero is that of a leaf that one does not depend on."""
    for pair in zip(values, expected, strict=True):
        assert_near(*pair)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        for found, wanted in zip(*(torch.autograd.grad(y, leaves, **options) for y in pair), strict=True):
            assert_near(found, wanted)


def assert_detections(found: list[truth.Params], expected: list[truth.Params]) -> None:
    for one, wanted in zip(found, expected, strict=True):
        assert len(wanted["scores"]) > 3
        assert torch.equal(one["labels"], wanted["labels"])
        assert_near(one["scores"], wanted["scores"])
        assert_near(one["boxes"], wanted["boxes"], 1e-8)


# ---- RetinaNet ---------------------------------------------------------------------------------------------


def test_retinanet_losses_and_gradients():
    model = tiny("retinanet", dtype=F64).train()
    x, targets = sample(F64)
    p = truth.parameters(model)
    losses = model(x, targets)
    assert min(losses.values()) > 0.1
    assert_losses(model, losses, p, truth.retina_training(p, x, targets, 3))


def test_retinanet_losses_of_given_outputs():
    torch.manual_seed(1)
    head = tiny("retinanet").head
    boxes = torch.cat(truth.anchors([(6, 4)], [16], [1.0, 2.0]))
    targets = [
        target([[5.0, 6, 30, 50], [40, 40, 60, 90]], [2, 0], (96, 64), F64),
        target([], [], (96, 64), F64),
    ]
    matched = torch.randint(-2, 2, (2, len(boxes)))
    matched[1].clamp_(max=-1)
    outputs = {
        "cls_logits": torch.randn(2, len(boxes), 3, dtype=F64).mul(3).requires_grad_(),
        "bbox_regression": torch.randn(2, len(boxes), 4, dtype=F64).requires_grad_(),
    }
    found = head.compute_loss(targets, outputs, [boxes] * 2, list(matched))
    expected = truth.retina_losses(*outputs.values(), matched, boxes, targets)
    assert_derivatives(found.values(), expected, list(outputs.values()))


def test_retinanet_without_any_object_divides_by_the_number_of_images():
    """Each image counts for one positive at least."""
    model = tiny("retinanet", dtype=F64)
    x = images((40, 64), (64, 50), dtype=F64)
    targets = [target([], [], tuple(image.shape[1:]), F64) for image in x]
    logits, _, shapes = truth.retina_outputs(truth.parameters(model), truth.batch(x)[0], 3)
    valid = [truth.in_image(shapes, truth.RETINA_STRIDES, image.shape[1:], 9) for image in x]
    y = torch.cat(logits, 1)[torch.stack(valid)]
    found = model(x, targets)
    assert_near(found["classification"], sigmoid_focal_loss(y, torch.zeros_like(y), reduction="sum") / 2)
    assert found["bbox_regression"] == 0


@pytest.mark.parametrize(("threshold", "most", "nms_pre"), [(0.05, 100, 1000), (0.4, 7, 20)])
def test_retinanet_detections(threshold, most, nms_pre):
    options = {"score_threshold": threshold, "detections_per_image": most}
    model = tiny("retinanet", classes=2, dtype=F64, **options).eval()
    model.topk_candidates = nms_pre
    spread_scores(model)
    x = images((97, 61), (40, 64), dtype=F64, seed=3)
    with torch.no_grad():
        found = model(x)
        expected = truth.retina_detections(truth.parameters(model), x, 2, (64, 100), threshold, most, nms_pre)
    assert_detections(found, expected)
    assert all(bool((one["boxes"][:, 2:] > one["boxes"][:, :2]).all()) for one in found)


# ---- Mask R-CNN --------------------------------------------------------------------------------------------


def everything_sampled(model: torch.nn.Module, after: int) -> torch.nn.Module:
    """No chance in the losses; so few proposals that loops can follow."""
    for part in (model.rpn, model.roi_heads):
        part.fg_bg_sampler = matching.KeyedSampler(10**6, 0.5)
    model.rpn._pre_nms_top_n = {"training": 60, "testing": 50}
    model.rpn._post_nms_top_n = {"training": after, "testing": after}
    return model


def uneven(masks: Tensor) -> Tensor:
    """Masks in which no cell is half full to the last digit: there rounding decides between 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    return masks * 0.7 + 0.3 * torch.rand(masks.shape, generator=generator, dtype=F64)


def test_mask_rcnn_losses_and_gradients():
    model = everything_sampled(tiny("mask_rcnn", dtype=F64), 25).train()
    x, targets = sample(F64)
    targets = [one | {"masks": uneven(one["masks"])} for one in targets]
    p, anchored = truth.parameters(model), []
    model.rpn.anchor_generator.register_forward_hook(lambda module, args, boxes: anchored.append(boxes[0]))
    losses = model(x, targets)
    assert min(losses.values()) > 1e-3, losses
    assert_losses(model, losses, p, regions.mask_rcnn_training(p, x, targets, 60, 25, anchored[0]))


def test_rpn_losses_of_given_outputs():
    """Also of an image without positives, which counts for one, and one that is ignored as a whole."""
    torch.manual_seed(2)
    rpn = everything_sampled(tiny("mask_rcnn"), 5).rpn
    boxes = torch.cat(truth.anchors([(6, 4)], [16], [2.0]))
    objects = [[5.0, 6, 30, 50], [40, 40, 60, 90]]
    targets = [target(o, list(range(len(o))), (96, 64), F64) for o in (objects, [], objects)]
    matched = torch.randint(-2, 2, (3, len(boxes)))
    matched[1].clamp_(max=-1)
    matched[2] = -2
    logits = torch.randn(3, len(boxes), dtype=F64, requires_grad=True)
    deltas = torch.randn(3, len(boxes), 4, dtype=F64, requires_grad=True)
    labels = [torch.where(row >= 0, 1.0, torch.where(row == -1, 0.0, -1.0)).double() for row in matched]
    wanted = [
        truth.encoded(t["boxes"][row.clamp(min=0)] if len(t["boxes"]) else boxes, boxes)
        for row, t in zip(matched, targets, strict=True)
    ]
    found = rpn.compute_loss(logits.reshape(-1, 1), deltas.reshape(-1, 4), labels, wanted)
    expected = regions.rpn_losses(logits, deltas, matched, boxes, targets)
    assert_derivatives(found, expected, [logits, deltas])


def test_regions_of_objects_that_want_the_same_proposal():
    """Proposals are matched without the objects, so an object takes its best proposal from another one."""
    heads = tiny("mask_rcnn").roi_heads
    objects = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 7], [50, 50, 60, 60]])
    found = torch.tensor([[0.0, 0, 10, 9], [30, 30, 40, 40]])
    assert box_iou(objects, found)[0, 0] > box_iou(objects, found)[1, 0] > 0.5

    def assigned(proposals: Tensor, objects: Tensor) -> tuple[list[int], list[int]]:
        """The object of each proposal and its label."""
        kinds = torch.tensor([3, 1, 2])[: len(objects)]
        chosen, labels = heads.assign_targets_to_proposals([proposals], [objects], [kinds])
        return chosen[0].tolist(), labels[0].tolist()

    assert assigned(torch.cat([found, objects]), objects) == ([1, 0, 0, 1, 2], [1, 0, 3, 1, 2])
    assert assigned(found, objects[:0])[1] == [0, 0]
    assert assigned(objects, objects)[1] == [3, 1, 2]


@pytest.mark.parametrize("size", [7, 14])
def test_pooled_regions(size):
    torch.manual_seed(0)
    maps = {str(i): torch.rand(2, 3, 128 // 2**i, 96 // 2**i, dtype=F64) for i in range(5)}
    lists = (
        [[0.0, 0, 512, 384], [3.3, 4.4, 20.5, 300.0], [100, 100, 212, 212], [10, 10, 10.5, 10.7]],
        [[0.0, 0, 111.9, 111.9], [0, 0, 224, 224], [0, 0, 384, 448], [380, 500, 384, 512], [0, 0, 448, 448]],
    )
    rows = [torch.tensor(boxes, dtype=F64) for boxes in lists]
    assert {regions.level_of(box) for boxes in rows for box in boxes} == {0, 1, 2, 3}
    pool = mask_rcnn._AlignedRoIPool(size)
    found = pool(maps, rows, [(512, 384)] * 2)
    assert_near(found, regions.regions(list(maps.values()), rows, size), 1e-12)
    assert pool(maps, [torch.zeros(0, 4, dtype=F64)] * 2, [(512, 384)] * 2).shape == (0, 3, size, size)


def test_wanted_masks():
    one = target([[3.0, 5, 40, 60], [20, 30, 61, 97]], [0, 1], (97, 61))
    rows = [[3.0, 5, 40, 60], [20, 30, 61, 97], [18.2, 20.1, 61, 97], [0, 0, 61, 97], [55, 90, 61, 97]]
    rows = torch.tensor(rows, dtype=F64)
    full = torch.ones(1, 97, 61)
    masks = torch.cat([uneven(one["masks"]), full.double()])
    for objects in ([0, 1, 1, 0, 1], [2] * 5):
        found = mask_rcnn.wanted_masks(masks, torch.tensor(objects), rows, 28)
        expected = [regions.wanted_mask(masks[j], box) for j, box in zip(objects, rows, strict=True)]
        assert torch.equal(found, torch.stack(expected))
    corner = mask_rcnn.wanted_masks(full, torch.tensor([0]), torch.tensor([[50.0, 90, 61, 97]]), 28)[0]
    assert corner.flatten().tolist() == [1.0] * (28 * 28 - 1) + [0.0]  # the padding has a share of the last


def test_mask_rcnn_detections():
    model = everything_sampled(tiny("mask_rcnn", dtype=F64, detections_per_image=12), 20).eval()
    spread_scores(model)
    x = images((97, 61), (40, 64), dtype=F64, seed=3)
    with torch.no_grad():
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(50)
        found = model(x)
        expected = regions.mask_rcnn_detections(truth.parameters(model), x, (64, 100), 50, 20, 12)
    assert_detections(found, expected)
    for one, wanted in zip(found, expected, strict=True):
        assert_near(one["masks"][:, 0], wanted["masks"], 1e-7)
    assert len(torch.cat([wanted["labels"] for wanted in expected]).unique()) > 1


# ---- Semantic FPN ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (97, 61)])
def test_semantic_fpn_in_training(size):
    model = tiny("semantic_fpn", classes=5, dtype=F64, dropout=0.0).train()
    p = truth.parameters(model)
    x = torch.stack(images(size, size, dtype=F64))
    logits, expected = model(x), truth.semantic_fpn(p, x)
    assert_near(logits, expected, 1e-10)
    labels = torch.randint(0, 5, (2, *size), generator=torch.Generator().manual_seed(0))
    labels[:, :20] = 255
    loss, wanted = segmentation_loss(logits, labels), truth.cross_entropy(expected, labels)
    assert_near(loss, wanted, 1e-10)
    assert_gradients(model, loss, p, wanted)


def test_semantic_fpn_in_evaluation():
    model = tiny("semantic_fpn", classes=5, dtype=F64).train()
    x = torch.stack(images((64, 96), (64, 96), dtype=F64))
    with torch.no_grad():
        model(x)  # sets the statistics
    statistics = dict(model.named_buffers())
    p = truth.parameters(model)
    y = truth.conv(truth.pyramid(p, truth.body(p, x))[0], p, "scale_heads.0.0", padding=1)
    assert_near(statistics["scale_heads.0.1.running_mean"], 0.1 * y.mean((0, 2, 3)))
    assert_near(statistics["scale_heads.0.1.running_var"], 0.9 + 0.1 * y.var((0, 2, 3)))
    model.eval()
    assert_near(model(x), truth.semantic_fpn(p, x, statistics), 1e-10)


def test_semantic_fpn_drops_whole_channels():
    model = tiny("semantic_fpn", dropout=0.5).train()
    seen = []
    model.classifier.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(torch.stack(images((64, 64), (64, 64))))
    dead = seen[0].flatten(2).eq(0).all(2)
    assert 0.4 < dead.float().mean() < 0.65
    assert not torch.equal(dead[0], dead[1])


def test_segmentation_loss_counts_the_ignored_pixels():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, dtype=F64, requires_grad=True)
    labels = torch.randint(0, 4, (2, 5, 6))
    labels[0] = 255
    loss = segmentation_loss(logits, labels.to(torch.uint8))
    assert_near(loss, truth.cross_entropy(logits, labels))
    assert_near(loss, F.cross_entropy(logits[1:], labels[1:]) / 2)
    (grad,) = torch.autograd.grad(loss, logits)
    assert not grad[0].any()
    assert segmentation_loss(logits, torch.full_like(labels, 255)) == 0
    half = segmentation_loss(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
