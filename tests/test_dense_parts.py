"""Anchors, matching, boxes and images of the detectors against their definitions (`dense_truth`)."""

import pytest
import torch
from support import dense_truth as truth
from support import dense_truth_regions as regions
from support.dense import require_dense, sample, tiny
from support.dense_truth import assert_near

require_dense()

from torchvision.models.detection.image_list import ImageList

from poolformer_kernels.dense import matching, retinanet
from poolformer_kernels.dense.backbone import P6P7
from poolformer_kernels.dense.boxes import BoxCoder, pasted
from poolformer_kernels.dense.images import resized

F64 = torch.float64


# ---- anchors and matching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(800, 1344), (544, 96), (32, 32)])
@pytest.mark.parametrize(
    ("strides", "scales", "own"),
    [
        (truth.RETINA_STRIDES, truth.RETINA_SCALES, retinanet._SIZES),
        (regions.RPN_STRIDES, [8.0], tuple((8 * s,) for s in regions.RPN_STRIDES)),
    ],
    ids=["retinanet", "mask_rcnn"],
)
def test_anchors(strides, scales, own, size):
    shapes = [(-(-size[0] // s), -(-size[1] // s)) for s in strides]
    made = matching.Anchors(own, strides)
    maps = [torch.zeros(1, 1, *shape, dtype=F64) for shape in shapes]
    found = made(ImageList(torch.zeros(1, 3, *size), [size]), maps)
    expected = torch.cat(truth.anchors(shapes, strides, scales))
    assert len(found) == 1
    assert_near(found[0], expected, 1e-14)
    single = made(ImageList(torch.zeros(2, 3, *size), [size] * 2), [m.bfloat16() for m in maps])
    assert len(single) == 2
    assert single[0].dtype == torch.float32
    assert_near(single[1].double(), expected, 1e-6)
    again = made(ImageList(torch.zeros(1, 3, *size), [size]), maps)
    assert_near(again[0], expected, 1e-14)  # not rounded by the call in float32


@pytest.mark.parametrize("size", [(800, 1333), (97, 61), (64, 64), (33, 200), (1, 1)])
def test_anchors_in_the_padding(size):
    shapes = [(-(-832 // s), -(-1344 // s)) for s in (32, 64, 128)]
    boxes = torch.cat(truth.anchors(shapes, [32, 64, 128], truth.RETINA_SCALES))
    expected = truth.in_image(shapes, [32, 64, 128], size, 9)
    assert torch.equal(matching.not_in_padding(boxes.float(), size), expected)
    assert not bool(expected.all())


TABLES = {
    "ties": [[0.6, 0.6, 0.1, 0.3], [0.6, 0.2, 0.1, 0.45]],
    "low quality takes another's": [[0.8, 0.7, 0.0], [0.6, 0.1, 0.05]],
    "low quality of several, the last": [[0.31, 0.31, 0.0], [0.31, 0.2, 0.31]],
    "below min_pos_iou": [[0.29, 0.1, 0.0], [0.0, 0.0, 0.0]],
    "at the thresholds": [[0.5, 0.4, 0.7, 0.3], [0.1, 0.1, 0.2, 0.0]],
    "no overlap": [[0.0, 0.0]],
}


@pytest.mark.parametrize("limits", [(0.5, 0.4, 0.0), (0.7, 0.3, 0.3), (0.5, 0.5, 0.5)])
@pytest.mark.parametrize("table", list(TABLES.values()), ids=list(TABLES))
def test_matching(table, limits):
    table = torch.tensor(table, dtype=F64)
    found = matching.MaxIoUMatcher(*limits[:2], low_quality=limits[2])(table)
    assert torch.equal(found, truth.assigned(table, *limits))


def test_matching_by_hand():
    """The rules that a wrong reference could share with the code."""
    matcher = matching.MaxIoUMatcher(0.7, 0.3, low_quality=0.3)
    assert matcher(torch.tensor([[0.5, 0.5, 0.4, 0.1]])).tolist() == [0, 0, -2, -1]  # all that tie
    assert matcher(torch.tensor([[0.8, 0.9], [0.8, 0.1]])).tolist() == [1, 0]  # the last that wants it
    assert matcher(torch.tensor([[0.29, 0.0]])).tolist() == [-1, -1]
    everything = matching.MaxIoUMatcher(0.5, 0.4, low_quality=0.0)
    assert everything(torch.tensor([[0.0, 0.0]])).tolist() == [0, 0]  # min_pos_iou 0, as in mmdetection
    assert matching.MaxIoUMatcher(0.5, 0.4, None)(torch.tensor([[0.45, 0.3]])).tolist() == [-2, -1]


@pytest.mark.parametrize("limits", [(0.5, 0.4, 0.0), (0.7, 0.3, 0.3)])
def test_matching_of_anchors(limits):
    shapes = [(16, 12), (8, 6), (4, 3)]
    boxes = torch.cat(truth.anchors(shapes, [8, 16, 32], truth.RETINA_SCALES))
    valid = truth.in_image(shapes, [8, 16, 32], (97, 61), 9)
    objects = torch.tensor([[3.0, 4, 50, 60], [0, 0, 24, 24], [8, 8, 34, 34], [30, 64, 61, 97]], dtype=F64)
    matcher = matching.MaxIoUMatcher(*limits[:2], low_quality=limits[2])
    found = matcher.match(objects, boxes, (97, 61))
    assert torch.equal(found, truth.assigned_anchors(boxes, objects, valid, *limits))
    assert {-2, -1, 0, 1, 2, 3} == set(found.tolist())
    empty = matcher.match(objects[:0], boxes, (97, 61))
    assert torch.equal(empty, torch.where(valid, -1, -2))


def test_sampler():
    labels = torch.tensor([1.0] * 30 + [0.0] * 50 + [-1.0] * 20)
    sampler = matching.KeyedSampler(40, 0.25)
    sampler.seeds = [7, 8, 7]
    positive, negative = sampler([labels, labels, labels])
    for p, n in zip(positive, negative, strict=True):
        assert int(p.sum()) == int(p[:30].sum()) == 10
        assert int(n.sum()) == int(n[30:80].sum()) == 30
    assert torch.equal(positive[0], positive[2])
    assert torch.equal(negative[0], negative[2])
    assert not torch.equal(positive[0], positive[1])
    few = torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0])
    sampler.seeds = None
    positive, negative = sampler([few])
    assert positive[0].tolist() == [True, True, False, False, False]
    assert negative[0].tolist() == [False, False, True, True, False]


def test_the_seed_of_an_image_holds_beside_images_without_one(monkeypatch):
    model = tiny("mask_rcnn")
    x, targets = sample()
    targets[0]["seed"] = 5
    seen, call = [], matching.KeyedSampler.__call__
    monkeypatch.setattr(
        matching.KeyedSampler, "__call__", lambda self, m: (seen.append(self.seeds), call(self, m))[1]
    )
    model(x, targets)
    assert seen == [[10, None, None], [11, None, None]]


# ---- boxes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0,) * 4, regions.BOX_WEIGHTS])
def test_box_coding(weights):
    torch.manual_seed(0)
    boxes = torch.rand(20, 4, dtype=F64) * 50
    boxes[:, 2:] += boxes[:, :2] + 1
    objects = boxes.flip(0) * 1.3
    coder = BoxCoder(weights)
    assert_near(coder.encode_single(objects, boxes), truth.encoded(objects, boxes, weights))
    assert_near(coder.decode_single(coder.encode_single(objects, boxes), boxes), objects)
    deltas = torch.randn(20, 8, dtype=F64) * torch.tensor(weights * 2) * 4  # beyond both limits
    found = coder.decode_single(deltas, boxes).unflatten(1, (2, 4))
    for k in range(2):
        inner = truth.decoded(deltas[:, 4 * k : 4 * k + 4], boxes, weights, (1e9, 1e9))
        assert_near(found[:, k].clamp(0, 1e9), inner)
    sides = (found[..., 2:] - found[..., :2]) / (boxes[:, None, 2:] - boxes[:, None, :2])
    assert_near(sides.max(), torch.tensor(62.5, dtype=F64))
    assert_near(sides.min(), torch.tensor(0.016, dtype=F64), 1e-6)
    half = coder.decode_single(torch.zeros(20, 4, dtype=torch.bfloat16), boxes.float())
    assert half.dtype == torch.float32
    assert_near(half.double(), boxes, 1e-6)


def test_masks_in_their_image():
    torch.manual_seed(0)
    masks = torch.rand(5, 1, 28, 28, dtype=F64)
    rows = [[3.2, 4.7, 40.1, 30.9], [0, 0, 50, 60], [48.0, 55.5, 50, 60], [10.2, 10.2, 10.6, 10.9]]
    rows = torch.tensor([*rows, [-20.0, 5.0, 90.0, 70.0]], dtype=F64)
    found = pasted(masks, rows, 60, 50)
    assert found.shape == (5, 1, 60, 50)
    for mask, box, pixels in zip(masks, rows, found, strict=True):
        assert_near(pixels[0], regions.pasted(mask[0], box, (60, 50)), 1e-9, str(box))
    assert pasted(masks[:0], torch.zeros(0, 4), 60, 50).shape == (0, 1, 60, 50)


def test_a_full_mask_covers_its_box_exactly():
    found = pasted(torch.ones(1, 1, 28, 28), torch.tensor([[5.0, 7.0, 25.0, 40.0]]), 50, 60)
    inside = torch.zeros(50, 60, dtype=torch.bool)
    inside[7:40, 5:25] = True
    assert torch.equal(found[0, 0] >= 0.5, inside)


# ---- images ------------------------------------------------------------------------------------------------


SIZES = {
    (480, 640): (800, 1067),
    (427, 640): (800, 1199),
    (640, 427): (1199, 800),
    (640, 426): (1202, 800),
    (612, 612): (800, 800),
    (1000, 1000): (800, 800),
    (375, 1242): (402, 1333),
    (200, 640): (417, 1333),
    (3, 4000): (1, 1333),
    (1, 5000): (1, 1333),
    (1, 10000): (1, 1333),
}


@pytest.mark.parametrize(("size", "expected"), SIZES.items())
def test_sizes_by_hand(size, expected):
    """mmcv's ``rescale_size``: the product and half a pixel, cut off."""
    assert resized(*size, 800, 1333) == expected


# ---- the coarsest levels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (4, 1), (1, 2)])
def test_gradients_of_the_coarsest_levels_of_narrow_images(size) -> None:
    """In bfloat16, where PyTorch's convolution of a map one pixel wide leaves memory unwritten."""
    torch.manual_seed(0)
    levels = P6P7(64, 64).to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, *size).contiguous(memory_format=torch.channels_last)
    gradients = []
    for half in (True, False):
        freed = [torch.full((1 << 18,), torch.nan) for _ in range(8)]
        del freed
        levels.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            (p6, p7), names = levels([], [x], [])
        assert names == ["p6", "p7"]
        (p6.float().square().sum() + p7.float().square().sum()).backward()
        gradients.append([p.grad.clone() for p in levels.parameters()])
    for found, exact in zip(*gradients, strict=True):
        assert (found - exact).abs().max() < 0.05 * exact.abs().max()
