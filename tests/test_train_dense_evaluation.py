"""Scores of detections and label maps: pycocotools and scikit-learn as oracles, merging, and borders."""

import pickle
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from support import dense_data
from support.dense_data import box_of, coco_annotation, edit_coco, make_coco, write_coco
from support.peers import require
from support.train import message_of

dense_data.require_dense_data()

from sklearn.metrics import accuracy_score, jaccard_score, recall_score

from poolformer_kernels.train.coco import mask_functions, open_coco
from poolformer_kernels.train.dense_evaluation import CocoScores, SegmentationScores
from poolformer_kernels.train.recipe import RecipeError

HEIGHT, WIDTH = 150, 170  # large enough for each of COCO's sizes
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KINDS = ("bbox", "segm")


def random_masks(rng: np.random.Generator, count: int) -> np.ndarray:
    """Discs and half discs of all of COCO's sizes."""
    found = np.zeros((count, HEIGHT, WIDTH), np.uint8)
    for mask in found:
        radius = int(rng.choice([5, 9, 14, 25, 40, 80, 80]))
        x, y = rng.integers(0, WIDTH), rng.integers(0, HEIGHT)
        mask[:] = dense_data.disc(HEIGHT, WIDTH, x, y, radius)
        if rng.random() < 0.3:
            mask[y:] = 0
            mask[y, x] = 1
    return found


def random_set(root, rng: np.random.Generator) -> tuple[Sequence, list[dict]]:
    """Twelve images with crowds, and for each a prediction that is near the truth, or not at all."""
    entries, annotations, predictions = [], [], []
    for i in range(12):
        count = int(rng.integers(0, 8))
        masks, categories = random_masks(rng, count), rng.choice([4, 9], count)
        image_id = 100 - 7 * i
        entries.append({"id": image_id, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH})
        for mask, category in zip(masks, categories, strict=True):
            crowd = int(rng.random() < 0.2)
            annotation = coco_annotation(len(annotations) + 1, image_id, int(category), mask, iscrowd=crowd)
            if not crowd and rng.random() < 0.3:
                x, y, width, height = annotation["bbox"]
                corners = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])
                annotation["segmentation"] = [(corners + rng.normal(0, 1.5, (4, 2))).flatten().tolist()]
            annotations.append(annotation)
        shifted = [np.roll(mask, rng.integers(-3, 4, 2), (0, 1)) for mask in masks for _ in range(2)]
        guesses = np.stack([*shifted, *random_masks(rng, 3)])
        labels = np.concatenate([np.repeat((categories == 9).astype(int), 2), rng.integers(0, 2, 3)])
        wrong = rng.random(len(labels)) < 0.1
        boxes = np.array([box_of(guess) for guess in guesses]) + rng.normal(0, 1.5, (len(guesses), 4))
        predictions.append(
            {
                "boxes": torch.from_numpy(np.sort(boxes.reshape(-1, 2, 2), 1).reshape(-1, 4)).float(),
                "scores": torch.from_numpy(rng.random(len(labels)).round(2)).float(),  # some are equal
                "labels": torch.from_numpy(np.where(wrong, 1 - labels, labels)),
                "masks": torch.from_numpy(guesses)[:, None].bool(),
            }
        )
    make_coco(root)
    write_coco(root, "val", dense_data.content(entries, annotations), {})
    return open_coco(str(root), masks=True).val, predictions


def oracle(file, images, predictions: list[dict], kind: str) -> dict[str, float | None]:
    """pycocotools' scores."""
    from pycocotools import mask as functions
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results = COCO(str(file)), []
    for i, prediction in enumerate(predictions):
        for box, score, label, mask in zip(*prediction.values(), strict=True):
            x1, y1, x2, y2 = box.double().tolist()
            place = {"bbox": [x1, y1, x2 - x1, y2 - y1]}
            if kind == "segm":
                bits = np.asfortranarray(mask[0].numpy().astype(np.uint8))
                place = {"segmentation": functions.encode(bits)}
            found = {"image_id": images.image_id(i), "category_id": (4, 9)[int(label)]}
            results.append(found | place | {"score": float(score)})
    evaluation = COCOeval(truth, truth.loadRes(results), kind)
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    scores = zip(STATS, evaluation.stats, strict=False)
    return {name: None if value < 0 else 100 * value for name, value in scores}


def near(scores: dict, tolerance: float) -> dict:
    """What equals scores as near as that; None is only like None."""
    return {
        name: value if value is None else pytest.approx(value, rel=0, abs=tolerance)
        for name, value in scores.items()
    }


def scored(images, predictions, kinds=KINDS) -> CocoScores:
    scores = CocoScores(images, kinds)
    for index, prediction in enumerate(predictions):
        scores.add(index, prediction)
    return scores


# ---- objects -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_pycocotools(tmp_path, seed, capsys) -> None:
    """Crowds, polygons, all sizes, equal scores, wrong classes, image ids that fall."""
    require("pycocotools")
    images, predictions = random_set(tmp_path, np.random.default_rng(seed))
    found = scored(images, predictions).scores()
    assert capsys.readouterr() == ("", "")
    for kind in KINDS:
        assert found[kind] == near(oracle(images.annotations, images, predictions, kind), 1e-6)
        assert 5 < found[kind]["AP"] < 95
        assert all(0 < found[kind][size] < 100 for size in ("AP50", "APs", "APm", "APl"))
    alone = scored(images, predictions, ("bbox",)).scores()
    assert alone == {"bbox": found["bbox"]}


def test_results_of_processes_are_merged(tmp_path) -> None:
    images, predictions = random_set(tmp_path, np.random.default_rng(5))
    whole = scored(images, predictions)
    parts = [CocoScores(images, KINDS) for _ in range(3)]
    for index in [*range(12), 1]:  # a sampler may give two processes the same image
        parts[index * 5 % 3].add(index, predictions[index])
        parts[0].add(1, predictions[1])
    merged = CocoScores(images, KINDS)
    merged.merge([pickle.loads(pickle.dumps(part.results)) for part in parts])
    assert sorted(merged.results) == list(range(12))
    assert merged.scores() == whole.scores()


def truth_of(images) -> list[dict]:
    """The truth as predictions, from the pictures' own targets."""
    found = []
    for _, target in images:
        masks = None if target.masks is None else target.masks[:, None].float() * 0.9
        scores = torch.full((len(target.labels),), 0.5)
        found.append({"boxes": target.boxes, "scores": scores, "labels": target.labels, "masks": masks})
    return found


@pytest.mark.parametrize("first", [0, 1, 500])
def test_the_truth_scores_a_hundred(tmp_path, first) -> None:
    """Whatever its annotations' ids; pycocotools takes 0 for no match."""

    def count_from_first(content: dict) -> None:
        for number, annotation in enumerate(content["annotations"], start=first):
            annotation["id"] = number

    images = open_coco(str(edit_coco(make_coco(tmp_path), count_from_first, "val")), masks=True).val
    found = scored(images, truth_of(images)).scores()
    expected = {"AP": 100, "AP50": 100, "AP75": 100, "APs": 100, "APm": 100, "APl": None}
    for kind in KINDS:
        assert found[kind] == near(expected, 1e-9)
    swapped = truth_of(images)
    swapped[0]["labels"] = 1 - swapped[0]["labels"]
    assert scored(images, swapped).scores()["bbox"]["AP"] == 0


def test_boxes_need_no_segmentation_and_unknown_categories_do_not_count(tmp_path) -> None:
    def change(content: dict) -> None:
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        content["annotations"].append(content["annotations"][0] | {"id": 4, "category_id": 5})

    images = open_coco(str(edit_coco(make_coco(tmp_path), change, "val")), masks=False).val
    assert scored(images, truth_of(images), ("bbox",)).scores()["bbox"]["AP"] == pytest.approx(100)


def test_probabilities_from_one_half_on_are_the_mask(tmp_path) -> None:
    images = open_coco(str(make_coco(tmp_path)), masks=True).val
    (prediction,) = truth_of(images)
    bits = prediction["masks"] > 0
    for masks in (torch.where(bits, 0.5, 0.4999), bits):
        found = scored(images, [prediction | {"masks": masks}]).results[0]["masks"]
        decoded = [mask_functions().decode(mask) for mask in found]
        np.testing.assert_array_equal(decoded, bits[:, 0])


def test_no_predictions_no_truth_and_images_that_were_not_predicted(tmp_path) -> None:
    shapes = {"boxes": (0, 4), "scores": (0,), "labels": (0,), "masks": (0, 1, *dense_data.SIZE)}
    nothing = {name: torch.zeros(shape) for name, shape in shapes.items()}
    root = make_coco(tmp_path)
    images = open_coco(str(root), masks=True).val
    zeros = {"AP": 0, "AP50": 0, "AP75": 0, "APs": 0, "APm": 0, "APl": None}
    nones = dict.fromkeys(STATS)
    assert scored(images, [nothing]).scores() == {"bbox": zeros, "segm": zeros}
    assert CocoScores(images, KINDS).scores() == {"bbox": nones, "segm": nones}

    edit_coco(root, lambda found: found["images"].insert(0, found["images"][0] | {"id": 8}), "val")
    images = open_coco(str(root), masks=True).val
    empty, full = truth_of(images)
    assert scored(images, [empty]).scores() == {"bbox": nones, "segm": nones}  # image 7 does not count
    assert scored(images, [full]).scores() == {"bbox": nones, "segm": nones}  # nothing is there to find
    both = scored(images, [full | {"scores": full["scores"] + 0.1}, full]).scores()
    assert both["bbox"]["AP"] == pytest.approx(50)  # the first one's are wrong, and come first


def test_bad_predictions_are_named(tmp_path) -> None:
    images = open_coco(str(make_coco(tmp_path)), masks=True).val
    (good,) = truth_of(images)
    where = f"prediction of {tmp_path}/val/a.png"

    def refused(**fields) -> str:
        return message_of(ValueError, CocoScores(images, KINDS).add, 0, good | fields)

    shapes = "{}: boxes, scores, labels are of shapes {}; allowed: [N, 4], [N], [N]"
    assert refused(labels=torch.zeros(2)) == shapes.format(where, "(3, 4), (3,), (2,)")
    assert refused(boxes=torch.zeros(3, 5)) == shapes.format(where, "(3, 5), (3,), (3,)")
    assert refused(labels=torch.tensor([0, 1, 2])) == f"{where} has labels 0 to 2; allowed: 0 to 1"
    assert refused(labels=torch.tensor([0, -1, 1])) == f"{where} has labels -1 to 1; allowed: 0 to 1"
    for name in ("boxes", "scores"):
        bad = good[name].clone()
        bad[0] = float("nan")
        assert refused(**{name: bad}) == f"{where} has boxes or scores that are not finite"
    for masks in (None, torch.zeros(3, 80, 96), torch.zeros(3, 1, 28, 28)):
        shape = masks if masks is None else list(masks.shape)
        assert refused(masks=masks) == f"{where}: masks are of shape {shape}; allowed: [3, 1, 80, 96]"
    with pytest.raises(IndexError):
        CocoScores(images).add(1, good)


def test_what_cannot_be_scored(tmp_path, monkeypatch) -> None:
    images = open_coco(str(make_coco(tmp_path)), masks=False).val
    for kinds in ((), ("box",), ("bbox", "keypoints")):
        with pytest.raises(RecipeError, match=r"kinds is \(.*; allowed: bbox, segm"):
            CocoScores(images, kinds)
    with pytest.raises(RecipeError, match="kinds has segm; allowed with images that were opened with masks"):
        CocoScores(images, ("segm",))
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    with pytest.raises(RecipeError, match=r"pip install 'poolformer_kernels\[dense\]'"):
        CocoScores(images)


# ---- label maps --------------------------------------------------------------------------------------------


def sklearn_scores(pairs: list, classes: int) -> dict:
    """The same of all pixels that count, IoU by class; one that is nowhere has none."""
    truth = np.concatenate([target.flatten() for _, target in pairs])
    guess = np.concatenate([prediction.flatten() for prediction, _ in pairs])
    guess, truth = guess[truth != 255], truth[truth != 255]
    there = np.union1d(guess, truth)
    ious = 100 * jaccard_score(truth, guess, labels=there, average=None)
    return {
        "mIoU": ious.mean(),
        "pixel_accuracy": 100 * accuracy_score(truth, guess),
        "mean_accuracy": 100 * recall_score(truth, guess, labels=np.unique(truth), average="macro"),
        "IoU": dict.fromkeys(range(classes)) | dict(zip(there.tolist(), ious, strict=True)),
    }


def label_maps() -> list:
    """Five pairs: class 5 is never there, 4 only predicted, 3 only true, some pixels are ignored."""
    rng, pairs = np.random.default_rng(0), []
    for i in range(5):
        target = rng.integers(0, 4, (20 + i, 30)).astype(np.uint8)
        prediction = np.where(rng.random(target.shape) < 0.6, target, rng.integers(0, 5, target.shape))
        prediction[prediction == 3] = 2
        target[rng.random(target.shape) < 0.1] = 255
        pairs.append((prediction, target))
    return pairs


def test_label_maps_score_as_by_scikit_learn() -> None:
    pairs, classes = label_maps(), 6
    whole, parts = SegmentationScores(classes), [SegmentationScores(classes) for _ in range(2)]
    for i, (prediction, target) in enumerate(pairs):
        for scores in (whole, parts[i % 2]):
            scores.add(torch.from_numpy(prediction), torch.from_numpy(target))
    found, expected = whole.scores(), sklearn_scores(pairs, classes)
    ious = found.pop("IoU")
    assert dict(enumerate(ious)) == near(expected.pop("IoU"), 1e-10)
    assert found == near(expected, 1e-10)
    assert (ious[3], ious[4], ious[5]) == (0, 0, None)
    merged = SegmentationScores(classes)
    merged.merge(part.confusion for part in parts)
    assert merged.confusion.equal(whole.confusion)
    assert merged.confusion.dtype == torch.int64
    assert merged.confusion.sum() == sum((target != 255).sum() for _, target in pairs)
    assert merged.confusion[1, 4] == sum(((t == 1) & (p == 4)).sum() for p, t in pairs)  # truth by row


def test_pixels_that_do_not_count() -> None:
    scores = SegmentationScores(3)
    nones = {"mIoU": None, "pixel_accuracy": None, "mean_accuracy": None, "IoU": [None] * 3}
    assert scores.scores() == nones
    scores.add(torch.tensor([[0, 200]]), torch.tensor([[255, 255]]))  # not even a prediction that is no class
    assert scores.scores() == nones
    scores.add(torch.tensor([[1, 2]]), torch.tensor([[1, 255]], dtype=torch.uint8))
    hundreds = dict.fromkeys(("mIoU", "pixel_accuracy", "mean_accuracy"), 100)
    assert scores.scores() == hundreds | {"IoU": [None, 100, None]}


def test_bad_label_maps_are_named() -> None:
    def refused(prediction, target) -> str:
        scores = SegmentationScores(3)
        message = message_of(ValueError, scores.add, torch.tensor(prediction), torch.tensor(target))
        assert scores.confusion.sum() == 0
        return message

    shapes = "prediction and target are of shapes [1, 2] and [1, 1]; allowed: the same"
    assert refused([[1, 2]], [[1]]) == shapes
    assert refused([[1, 3]], [[1, 2]]) == "prediction has classes 1 to 3; allowed: 0 to 2"
    assert refused([[1, -1]], [[1, 2]]) == "prediction has classes -1 to 1; allowed: 0 to 2"
    assert refused([[1, 2]], [[7, 2]]) == "target has classes 2 to 7; allowed: 0 to 2"
    with pytest.raises(RecipeError, match="num_classes is 0; allowed: at least 1"):
        SegmentationScores(0)
