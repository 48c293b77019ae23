"""How good boxes, masks and label maps are: COCO's average precision, and mean intersection over union."""

import contextlib
import io
import json
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from .coco import CocoImages, mask_functions
from .label_maps import IGNORED
from .recipe import RecipeError

__all__ = ["CocoScores", "SegmentationScores"]

KINDS = ("bbox", "segm")
_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class CocoScores:
    """COCO's average precision of predictions, which are collected picture by picture.

    ``results`` is what was collected: a dictionary of plain values by the picture's index, to be pickled and
    merged with other processes' by `merge`. Pictures without a prediction do not count; of a picture with
    more than 100 objects the 100 with the highest scores of each category do.

    Args:
        images: the pictures that were predicted; their JSON file has the truth.
        kinds: ``bbox``, ``segm`` or both.

    Raises:
        RecipeError: another kind, ``segm`` for pictures opened without masks, or no faster-coco-eval.

    Example::

        scores = CocoScores(data.val, ("bbox", "segm"))
        scores.add(0, model(x)[0])
        scores.scores()["bbox"]["AP"]
    """

    def __init__(self, images: CocoImages, kinds: tuple[str, ...] = ("bbox",)) -> None:
        if not kinds or not set(kinds) <= set(KINDS):
            raise RecipeError(f"kinds is {kinds!r}; allowed: {', '.join(KINDS)}")
        if "segm" in kinds and not images.masks:
            raise RecipeError("kinds has segm; allowed with images that were opened with masks")
        self._masks = mask_functions()
        self.images, self.kinds = images, tuple(kinds)
        self.results: dict[int, dict] = {}

    def add(self, index: int, prediction: Mapping[str, Tensor | None]) -> None:
        """Collects the prediction of one picture, in its own size.

        Args:
            index: the picture's, in ``images``.
            prediction: ``boxes`` ``[N, 4]``, x1, y1, x2, y2 in pixels; ``scores`` ``[N]``; ``labels`` ``[N]``
                from 0; and for ``segm`` ``masks`` ``[N, 1, H, W]``, bool, or probabilities of which those of
                at least 0.5 count.

        Raises:
            ValueError: shapes that do not fit, numbers that are not finite, or labels of no category.
        """
        height, width = self.images.size(index)
        boxes, scores, labels = (_array(prediction[name]) for name in ("boxes", "scores", "labels"))
        where = f"prediction of {self.images.file(index)}"
        if boxes.shape != (len(scores), 4) or scores.ndim != 1 or labels.shape != scores.shape:
            shapes = f"{boxes.shape}, {scores.shape}, {labels.shape}"
            raise ValueError(
                f"{where}: boxes, scores, labels are of shapes {shapes}; allowed: [N, 4], [N], [N]"
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(f"{where} has boxes or scores that are not finite")
        categories = len(self.images.category_ids)
        if len(labels) and not 0 <= labels.min() <= labels.max() < categories:
            raise ValueError(
                f"{where} has labels {labels.min()} to {labels.max()}; allowed: 0 to {categories - 1}"
            )
        found = {"boxes": boxes, "scores": scores, "labels": labels}
        if "segm" in self.kinds:
            masks = prediction.get("masks")
            if masks is None or masks.shape != (len(scores), 1, height, width):
                shape = None if masks is None else list(masks.shape)
                allowed = [len(scores), 1, height, width]
                raise ValueError(f"{where}: masks are of shape {shape}; allowed: {allowed}")
            found["masks"] = self._run_lengths(masks)
        self.results[index] = found

    def _run_lengths(self, masks: Tensor) -> list[dict]:
        masks = masks.detach()[:, 0]
        masks = masks if masks.dtype == torch.bool else masks >= 0.5
        bits = masks.to(device="cpu", dtype=torch.uint8).numpy()
        return self._masks.encode(np.asfortranarray(bits.transpose(1, 2, 0))) if len(bits) else []

    def merge(self, parts: Iterable[dict[int, dict]]) -> None:
        """Adds other processes' ``results``; a picture that is there already is not counted twice."""
        for part in parts:
            for index, found in part.items():
                self.results.setdefault(index, found)

    def scores(self) -> dict[str, dict[str, float | None]]:
        """``AP`` (IoU 0.5 to 0.95), ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl`` of each kind, in per cent.

        A value is None where the truth has no object to find, of that size for the last three; without
        predictions it is 0.
        """
        from faster_coco_eval import COCO, COCOeval_faster

        found = {}
        indices = sorted(self.results)
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(self._truth())
            for kind in self.kinds:
                predicted = [entry for index in indices for entry in self._entries(index, kind)]
                evaluation = COCOeval_faster(truth, truth.loadRes(predicted), kind)
                evaluation.params.imgIds = [self.images.image_id(index) for index in indices]
                stats = _run(evaluation) if indices else [-1.0] * len(_STATS)
                found[kind] = {
                    name: None if stat < 0 else 100 * float(stat)
                    for name, stat in zip(_STATS, stats, strict=False)
                }
        return found

    def _truth(self) -> dict:
        """The JSON file, its annotations numbered from 1: an id of 0 would count as no match."""
        content = json.loads(self.images.annotations.read_bytes())
        for number, annotation in enumerate(content["annotations"], start=1):
            annotation["id"] = number
        return content

    def _entries(self, index: int, kind: str) -> list[dict]:
        """A picture's predictions as COCO's format has results; a mask's area counts, so it has no box."""
        found, image_id = self.results[index], self.images.image_id(index)
        entries = []
        for i, (x1, y1, x2, y2) in enumerate(found["boxes"].tolist()):
            place = (
                {"bbox": [x1, y1, x2 - x1, y2 - y1]}
                if kind == "bbox"
                else {"segmentation": found["masks"][i]}
            )
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": self.images.category_ids[int(found["labels"][i])],
                    "score": float(found["scores"][i]),
                    **place,
                }
            )
        return entries


def _array(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()


def _run(evaluation: object) -> np.ndarray:
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


class SegmentationScores:
    """Mean intersection over union and accuracies of label maps.

    ``confusion`` is int64 ``[classes, classes]`` on the CPU, truth by row and prediction by column; those of
    several processes are to be added up (`merge`).

    Args:
        num_classes: how many classes there are.

    Example::

        scores = SegmentationScores(150)
        scores.add(logits.argmax(0), labels)
        scores.scores()["mIoU"]

    Source: mmsegmentation 0.19, ``mean_iou``.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise RecipeError(f"num_classes is {num_classes}; allowed: at least 1")
        self.num_classes = num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, prediction: Tensor, target: Tensor) -> None:
        """Counts the pixels of a picture, or of several.

        Args:
            prediction: classes, integers ``[H, W]``, or of any shape that ``target`` has.
            target: classes, or 255 where a pixel does not count.

        Raises:
            ValueError: shapes that differ, or a number that is no class.
        """
        if prediction.shape != target.shape:
            shapes = f"{list(prediction.shape)} and {list(target.shape)}"
            raise ValueError(f"prediction and target are of shapes {shapes}; allowed: the same")
        target = target.to(prediction.device)
        counted = target != IGNORED
        truth, guess = target[counted].long(), prediction[counted].long()
        for name, values in (("prediction", guess), ("target", truth)):
            if values.numel() and not 0 <= values.min() <= values.max() < self.num_classes:
                allowed = f"0 to {self.num_classes - 1}"
                raise ValueError(f"{name} has classes {values.min()} to {values.max()}; allowed: {allowed}")
        pairs = torch.bincount(truth * self.num_classes + guess, minlength=self.num_classes**2)
        self.confusion += pairs.reshape(self.num_classes, self.num_classes).cpu()

    def merge(self, parts: Iterable[Tensor]) -> None:
        """Adds the confusion matrices of other processes."""
        for part in parts:
            self.confusion += part

    def scores(self) -> dict[str, float | list[float | None] | None]:
        """``mIoU``, ``pixel_accuracy``, ``mean_accuracy`` and ``IoU`` of each class, in per cent.

        The mean IoU is over the classes that occur in the truth or a prediction, the mean accuracy over those
        in the truth. A class that does not occur has an IoU of None; without any pixel all values are None.
        """
        confusion = self.confusion.double()
        right, truth, guess = confusion.diag(), confusion.sum(1), confusion.sum(0)
        union = truth + guess - right
        iou, accuracy = 100 * right / union, 100 * right / truth
        return {
            "mIoU": _number(iou[union > 0].mean()),
            "pixel_accuracy": _number(100 * right.sum() / truth.sum()),
            "mean_accuracy": _number(accuracy[truth > 0].mean()),
            "IoU": [_number(value) for value in iou],
        }


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
