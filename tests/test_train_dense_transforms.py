"""Pictures move with their boxes, masks and label maps, by draws that depend on nothing but the seed."""

import colorsys
import random

import numpy as np
import pytest
import torch
from support.dense_data import box_of, paint
from support.train import message_of, require_train

require_train()

from PIL import Image

from poolformer_kernels.dense.images import resized
from poolformer_kernels.train import dense_transforms
from poolformer_kernels.train.coco import Instances
from poolformer_kernels.train.dense_transforms import DetectionTransform, SegmentationTransform
from poolformer_kernels.train.recipe import RecipeError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
RECTANGLES = [(5, 8, 40, 30), (60, 10, 95, 20), (30, 50, 70, 75)]  # red, green, blue: x1, y1, x2, y2
SIZE = (80, 100)


def objects(masks: bool = True) -> tuple[Image.Image, Instances]:
    """Three rectangles, each in a colour and with a label of its own."""
    found = np.zeros((3, *SIZE), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(found, RECTANGLES, strict=True):
        mask[y1:y2, x1:x2] = 1
    boxes = torch.tensor(RECTANGLES, dtype=torch.float32)
    target = Instances(boxes, torch.tensor([10, 11, 12]), torch.from_numpy(found) if masks else None, SIZE)
    return Image.fromarray(paint(found)), target


def same(a: object, b: object) -> bool:
    if isinstance(a, Instances):
        return same((a.boxes, a.labels, a.masks), (b.boxes, b.labels, b.masks)) and a.size == b.size
    if isinstance(a, tuple):
        return all(map(same, a, b))
    return a is b if a is None else a.shape == b.shape and a.equal(b)


# ---- detection ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [None, 64])
@pytest.mark.parametrize("masks", [True, False])
def test_boxes_and_masks_stay_on_their_objects(crop, masks) -> None:
    """Boxes within a pixel of where the colours are; masks within a pixel's rim."""
    image, target = objects(masks)
    transform = DetectionTransform((37, 80, 173), 190, 0.5, crop)
    dropped = cut = 0
    for seed in range(40):
        x, found = transform(image, target, seed)
        assert (x.dtype, type(x), x.shape[1:]) == (torch.float32, torch.Tensor, found.size)
        assert 0 <= x.min() <= x.max() <= 1
        assert type(found.boxes) is torch.Tensor
        assert crop is None or max(found.size) <= crop
        assert (found.masks is None) is not masks
        for colour, label in enumerate((10, 11, 12)):
            visible = x[colour] > 0.5
            (at,) = torch.nonzero(found.labels == label, as_tuple=True)
            if len(at) == 0:
                assert visible.sum() == 0
                dropped += 1
                continue
            box = found.boxes[at[0]]
            assert (box >= 0).all()
            assert box[2] <= found.size[1]
            assert box[3] <= found.size[0]
            if min(box[2] - box[0], box[3] - box[1]) < 1:
                continue
            assert abs(torch.tensor(box_of(visible)) - box).max() <= 1, (seed, label)
            cut += int(min(box[:2]) == 0)
            if masks:
                mask = found.masks[at[0]]
                assert mask.dtype == torch.uint8
                assert (mask.bool() ^ visible).sum() <= 2 * (box[2] - box[0] + box[3] - box[1])
    assert (dropped > 10 and cut > 10) is (crop is not None)


def test_sizes_and_flips_are_drawn() -> None:
    image, target = objects()
    shapes, flips = set(), 0
    for seed in range(100):
        x, found = DetectionTransform((40, 60), 70, 0.3)(image, target, seed)
        shapes.add(tuple(x.shape[1:]))
        flips += int(found.boxes[0, 0] > found.boxes[1, 0])
    assert shapes == {(40, 50), (56, 70)}
    assert 15 <= flips <= 45
    for flip in (0.0, 1.0):
        transform = DetectionTransform((80,), 100, flip)
        x, found = transform(image, target, 3)
        straight = torch.from_numpy(np.asarray(image) / np.float32(255)).permute(2, 0, 1)
        assert x.equal(straight.flip(2) if flip else straight)
        boxes = target.boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([100, 0, 100, 0])
        assert found.boxes.equal(boxes if flip else target.boxes)
        assert found.masks.equal(target.masks.flip(2) if flip else target.masks)


def test_crops_reach_every_corner() -> None:
    image, target = objects()
    transform = DetectionTransform((80,), 100, 0.0, 78)
    lefts = {transform(image, target, seed)[1].boxes[0, 0].item() for seed in range(300)}
    tops = {transform(image, target, seed)[1].boxes[0, 1].item() for seed in range(300)}
    assert lefts == {max(5.0 - left, 0) for left in range(23)}
    assert tops == {8.0, 7.0, 6.0}
    x, found = DetectionTransform((80,), 100, 0.0, 90)(image, target, 0)
    assert x.shape[1:] == found.size == (80, 90)  # the shorter side is kept whole


def test_boxes_outside_and_of_no_size_are_dropped_and_no_boxes_are_fine() -> None:
    image, target = objects()
    boxes = torch.tensor([[-9.0, -9, 30, 200], [100, 5, 120, 20], [7, 9, 7, 30]])
    for masks in (target.masks, None):
        found = DetectionTransform((80,), 100, 0.0)(image, Instances(boxes, target.labels, masks, SIZE), 0)[1]
        assert found.boxes.tolist() == [[0, 0, 30, 80]]
        assert found.labels.tolist() == [10]
        assert masks is None or found.masks.equal(masks[:1])
        none = Instances(boxes[:0], target.labels[:0], None if masks is None else masks[:0], SIZE)
        x, found = DetectionTransform((40,), 100, 1.0, 30)(image, none, 0)
        assert x.shape == (3, 30, 30)
        assert (found.boxes.shape, found.labels.shape) == ((0, 4), (0,))
        assert masks is None or found.masks.shape == (0, 30, 30)


def test_pictures_are_resized_as_opencv_does() -> None:
    """Bilinear between the two nearest pixels, also where a picture shrinks: stripes stay stripes."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (80, 100, 3)).astype(np.uint8)
    target = Instances(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None, (80, 100))
    for short, size in ((20, (20, 25)), (200, (200, 250))):
        x, _ = DetectionTransform((short,), 400, 0.0)(Image.fromarray(pixels), target, 0)
        expected = torch.from_numpy(pixels).double() / 255
        for axis, side in enumerate(size):
            at = ((torch.arange(side) + 0.5) * pixels.shape[axis] / side - 0.5).clamp(min=0)
            low = at.floor().long()
            high = (low + 1).clamp(max=pixels.shape[axis] - 1)
            weight = (at - low).reshape(-1, 1, 1) if axis == 0 else (at - low).reshape(1, -1, 1)
            low, high = expected.index_select(axis, low), expected.index_select(axis, high)
            expected = low + (high - low) * weight
        torch.testing.assert_close(x.permute(1, 2, 0).double(), expected, rtol=0, atol=1e-5)


# ---- draws -------------------------------------------------------------------------------------------------


def segmentation_input() -> tuple[Image.Image, torch.Tensor]:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)
    return Image.fromarray(pixels), torch.from_numpy(rng.integers(0, 5, (40, 60)).astype(np.uint8))


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_a_result_depends_on_the_seed_alone(kind) -> None:
    if kind == "detection":
        transform, sample = DetectionTransform((40, 50, 60, 70), 120, 0.5, 35), objects()
    else:
        transform = SegmentationTransform(MEAN, STD, scale=(128, 32), crop=32)
        sample = segmentation_input()
    before = np.array(sample[0])
    first = [transform(*sample, seed) for seed in range(6)]
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    again = [transform(*sample, seed) for seed in reversed(range(6))][::-1]
    assert all(map(same, first, again))
    assert not any(same(first[i], first[j]) for i in range(6) for j in range(i))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.get_rng_state().equal(states[2])
    assert np.array_equal(sample[0], before)  # nor is the sample changed
    assert same(sample[1], objects()[1] if kind == "detection" else segmentation_input()[1])


# ---- semantic segmentation ---------------------------------------------------------------------------------


def mosaic(height: int, width: int, side: int) -> torch.Tensor:
    """Squares of labels 0 to 4, in an order without symmetry."""
    rows, columns = np.mgrid[:height, :width] // side
    return torch.from_numpy(((rows * 7 + columns * columns * 3 + columns) % 5).astype(np.uint8))


def test_labels_stay_on_the_picture_and_padding_is_told(monkeypatch) -> None:
    monkeypatch.setattr(dense_transforms, "photometric_distortion", lambda x, draw: x)
    labels = mosaic(64, 96, 16)
    image = Image.fromarray(np.stack([labels.numpy() * 50] * 3, 2))
    transform = SegmentationTransform(MEAN, STD, scale=(256, 64), crop=72)
    padded = whole = 0
    for seed in range(40):
        x, found = transform(image, labels, seed)
        assert (x.dtype, x.shape, type(x)) == (torch.float32, (3, 72, 72), torch.Tensor)
        assert (found.dtype, found.shape, type(found)) == (torch.uint8, (72, 72), torch.Tensor)
        outside = found == 255
        assert (x[:, outside] == 0).all()
        inside = ~outside
        values = (x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255 / 50
        area = torch.nn.functional.pad(found[None].float(), (2, 2, 2, 2), value=255)
        uniform = torch.max_pool2d(area, 5, 1) == -torch.max_pool2d(-area, 5, 1)
        sure = uniform[0] & inside  # not at the rims of the squares
        assert abs(values - found)[:, sure].max() < 0.05
        assert sure.sum() > 0.2 * inside.sum()
        rows, columns = inside.any(1).sum(), inside.any(0).sum()
        assert inside[:rows, :columns].all()  # padding is at the right and at the bottom
        padded, whole = padded + int(rows < 72), whole + int(rows == 72)
    assert padded > 5
    assert whole > 5


def test_scales_are_drawn_from_the_whole_range() -> None:
    image, labels = segmentation_input()
    heights = []
    for seed in range(200):
        _, found = SegmentationTransform(MEAN, STD, scale=(128, 32), crop=200)(image, labels, seed)
        factor = random.Random(seed).uniform(0.5, 2.0)
        inside = found != 255
        size = (int(inside.any(1).sum()), int(inside.any(0).sum()))
        assert size == resized(40, 60, int(32 * factor), int(128 * factor))
        heights.append(size[0])
    assert min(heights) <= 17
    assert max(heights) >= 62
    assert 38 < np.mean(heights) < 42


def shares(labels: torch.Tensor, cat_max_ratio: float) -> list[float]:
    """The share of the most frequent class in 60 crops, nan where no pixel counts."""
    image = Image.new("RGB", (labels.shape[1], labels.shape[0]))
    transform = SegmentationTransform(
        MEAN, STD, scale=(200, 100), ratio=(1, 1), crop=20, cat_max_ratio=cat_max_ratio, flip=0.0
    )
    found = []
    for seed in range(60):
        counts = transform(image, labels, seed)[1].flatten().bincount(minlength=256)[:255]
        found.append(float(counts.max() / counts.sum()))
    return found


def test_no_class_fills_a_crop() -> None:
    labels = torch.zeros(100, 200, dtype=torch.uint8)
    labels[:, 60:] = torch.from_numpy(np.arange(140) // 9 % 4).to(torch.uint8)  # in three tenths only class 0
    assert sum(share >= 0.75 for share in shares(labels, 1.0)) > 10
    assert max(shares(labels, 0.75)) < 0.75
    assert max(shares(torch.zeros_like(labels), 0.75)) == 1  # ten draws, then it is taken


def test_ignored_pixels_fill_a_crop_only_where_no_other_is_found() -> None:
    """Of a crop with a few pixels of two classes the others do not count; one without any is drawn again."""
    labels = torch.full((100, 200), 255, dtype=torch.uint8)
    labels[:, 0:120:12], labels[:, 1:120:12] = 1, 2
    assert sum(share != share for share in shares(labels, 1.0)) > 10
    found = shares(labels, 0.75)
    assert max(found) < 0.75
    assert min(found) >= 0.5  # and none is nan


def reference_distortion(x: np.ndarray, draw: random.Random) -> np.ndarray:
    """PhotoMetricDistortion in HSV, pixel by pixel."""

    def contrast(x):
        return (x * draw.uniform(0.5, 1.5)).clip(0, 1) if draw.random() < 0.5 else x

    def hsv(x, change):
        pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in x.reshape(3, -1).T]
        return np.array(pixels).T.reshape(x.shape)

    if draw.random() < 0.5:
        x = (x + draw.uniform(-32, 32) / 255).clip(0, 1)
    first = draw.random() >= 0.5
    x = contrast(x) if first else x
    if draw.random() < 0.5:
        factor = draw.uniform(0.5, 1.5)
        x = hsv(x, lambda h, s, v: (h, min(s * factor, 1), v))
    if draw.random() < 0.5:
        turn = draw.randrange(-18, 18) / 180
        x = hsv(x, lambda h, s, v: ((h + turn) % 1, s, v))
    return x if first else contrast(x)


def test_colours_are_distorted_as_in_hsv() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 16)) / 255
    pixels[:, 0, :3], pixels[:, 0, 3:6] = np.eye(3), 1 - np.eye(3)
    pixels[:, 0, 6:9] = [0, 0.5, 1]  # black, grey, white
    x, results = torch.tensor(pixels, dtype=torch.float32), []
    for seed in range(60):
        expected = reference_distortion(pixels, random.Random(seed))
        found = dense_transforms.photometric_distortion(x, random.Random(seed))
        assert abs(found.double().numpy() - expected).max() < 2e-6, seed
        results.append(found)
    unchanged = sum(abs(found - torch.tensor(pixels)).max() < 1e-6 for found in results)
    assert 1 <= unchanged <= 10  # one sixteenth


# ---- errors ------------------------------------------------------------------------------------------------


GOOD = {
    DetectionTransform: {"sizes": (9,), "max_size": 9, "flip": 0.5},
    SegmentationTransform: {"mean": MEAN, "std": STD},
}


@pytest.mark.parametrize(
    ("transform", "name", "value", "allowed"),
    [
        (DetectionTransform, "sizes", (), "at least one, each at least 1 pixel"),
        (DetectionTransform, "sizes", (0,), "at least one, each at least 1 pixel"),
        (DetectionTransform, "max_size", 0, "at least 1 pixel"),
        (DetectionTransform, "flip", 1.5, "a probability, 0 to 1"),
        (DetectionTransform, "crop", 0, "at least 1 pixel, or None"),
        (SegmentationTransform, "scale", (32, 64), "the longer side, then the shorter, in pixels"),
        (SegmentationTransform, "std", (1, 0, 1), "three positive numbers"),
        (SegmentationTransform, "ratio", (2, 1), "two positive numbers, the smaller first"),
        (SegmentationTransform, "crop", 0, "at least 1 pixel"),
        (SegmentationTransform, "cat_max_ratio", 0, "above 0 and at most 1"),
        (SegmentationTransform, "flip", -1, "a probability, 0 to 1"),
    ],
)
def test_values_out_of_range(transform, name, value, allowed) -> None:
    message = message_of(RecipeError, transform, **GOOD[transform] | {name: value})
    assert message == f"{name} is {value}; allowed: {allowed}"


def test_targets_of_another_size() -> None:
    image, target = objects()
    image = image.crop((0, 0, 50, 80))
    with pytest.raises(ValueError, match=r"target is of size \(80, 100\); allowed: the image's, \(80, 50\)"):
        DetectionTransform((9,), 9, 0.5)(image, target, 0)
    with pytest.raises(ValueError, match=r"labels are of size \(4, 5\); allowed: the image's, \(80, 50\)"):
        SegmentationTransform(MEAN, STD)(image, torch.zeros(4, 5, dtype=torch.uint8), 0)
