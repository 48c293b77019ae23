"""The names of mmdetection's and mmsegmentation's tensors, and what a detector does to load their files."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..models.checkpoints import CheckpointTarget, dense_kind, recognise, rename

__all__ = ["DenseCheckpoints"]

# (the official name, ours). Of mmdetection 2.19 and mmsegmentation 0.19, from the class definitions.
_BACKBONE = (
    ("backbone.{rest}", "backbone.body.{rest}"),
    ("neck.lateral_convs.{i}.conv.{name}", "backbone.fpn.inner_blocks.{i}.0.{name}"),
    ("neck.fpn_convs.{i}.conv.{name}", "backbone.fpn.layer_blocks.{i}.0.{name}"),
)
_RETINANET = (
    ("neck.fpn_convs.3.conv.{name}", "backbone.fpn.extra_blocks.p6.{name}"),
    ("neck.fpn_convs.4.conv.{name}", "backbone.fpn.extra_blocks.p7.{name}"),
    *_BACKBONE,
    ("bbox_head.cls_convs.{i}.conv.{name}", "head.classification_head.conv.{i}.0.{name}"),
    ("bbox_head.reg_convs.{i}.conv.{name}", "head.regression_head.conv.{i}.0.{name}"),
    ("bbox_head.retina_cls.{name}", "head.classification_head.cls_logits.{name}"),
    ("bbox_head.retina_reg.{name}", "head.regression_head.bbox_reg.{name}"),
)
_MASK_RCNN = (
    *_BACKBONE,
    ("rpn_head.rpn_conv.{name}", "rpn.head.conv.0.0.{name}"),
    ("rpn_head.rpn_cls.{name}", "rpn.head.cls_logits.{name}"),
    ("rpn_head.rpn_reg.{name}", "rpn.head.bbox_pred.{name}"),
    ("roi_head.bbox_head.shared_fcs.0.{name}", "roi_heads.box_head.fc6.{name}"),
    ("roi_head.bbox_head.shared_fcs.1.{name}", "roi_heads.box_head.fc7.{name}"),
    ("roi_head.bbox_head.fc_cls.{name}", "roi_heads.box_predictor.cls_score.{name}"),
    ("roi_head.bbox_head.fc_reg.{name}", "roi_heads.box_predictor.bbox_pred.{name}"),
    ("roi_head.mask_head.convs.{i}.conv.{name}", "roi_heads.mask_head.{i}.0.{name}"),
    ("roi_head.mask_head.upsample.{name}", "roi_heads.mask_predictor.conv5_mask.{name}"),
    ("roi_head.mask_head.conv_logits.{name}", "roi_heads.mask_predictor.mask_fcn_logits.{name}"),
)
# A scale head has a convolution with its norm at every even index, an upsampling at every odd one; ours has
# convolution, norm, ReLU and upsampling as four entries of one nn.Sequential.
_SEMANTIC_FPN = (
    *_BACKBONE,
    *(
        (f"decode_head.scale_heads.{{i}}.{j}.{part}.{{name}}", f"scale_heads.{{i}}.{2 * j + entry}.{{name}}")
        for j in (0, 2, 4)
        for entry, part in enumerate(("conv", "bn"))
    ),
    ("decode_head.conv_seg.{name}", "classifier.{name}"),
)


def _background_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mask R-CNN's classes in torchvision's order.

    mmdetection has the background last, and neither boxes nor masks for it. torchvision has it first, and
    rows of zeros stand for its boxes and masks: nothing reads what they give.
    """
    tensors = dict(tensors)
    for name in ("weight", "bias"):
        for key in (
            "roi_heads.box_predictor.cls_score",
            "roi_heads.box_predictor.bbox_pred",
            "roi_heads.mask_predictor.mask_fcn_logits",
        ):
            rows = tensors.get(f"{key}.{name}")
            if rows is None or rows.dim() == 0:
                continue  # the check of keys and shapes names it
            if key.endswith("cls_score"):
                tensors[f"{key}.{name}"] = rows.roll(1, 0)
            else:
                background = rows.new_zeros(4 if key.endswith("bbox_pred") else 1, *rows.shape[1:])
                tensors[f"{key}.{name}"] = torch.cat([background, rows])
    return tensors


def _unchanged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


_Conversion = Callable[[dict[str, Tensor]], dict[str, Tensor]]
_OFFICIAL: Mapping[str, tuple[tuple[tuple[str, str], ...], _Conversion]] = {
    "RetinaNet": (_RETINANET, _unchanged),
    "Mask R-CNN": (_MASK_RCNN, _background_first),
    "Semantic FPN": (_SEMANTIC_FPN, _unchanged),
}


def our_names(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of an official file under our names, Mask R-CNN's classes in our order.

    A key that no rule knows is kept; it is then one that the model does not have.

    Args:
        kind: ``"RetinaNet"``, ``"Mask R-CNN"`` or ``"Semantic FPN"``.
    """
    rules, convert = _OFFICIAL[kind]
    return convert({rename(key, rules) or key: value for key, value in tensors.items()})


class DenseCheckpoints(CheckpointTarget):
    """What RetinaNet, Mask R-CNN and Semantic FPN give `load_checkpoint`."""

    kind: str  # as `dense_kind` has it
    classes_key: str  # of the tensor that tells the number of classes
    rows_per_class, rows_besides = 1, 0  # its first size is num_classes * rows_per_class + rows_besides

    def checkpoint_name(self) -> str:
        return f"{self.kind} on {self.backbone.body.config.name}"

    def from_checkpoint(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
        found = dense_kind(tensors)
        if found is None:
            self._refuse(tensors)
        kind, source = found
        if kind != self.kind:
            raise ValueError(
                f"it is of a {kind}, under the names of {source}; the model is {self.checkpoint_name()}"
            )
        return (tensors if source == "poolformer_kernels" else our_names(tensors, kind)), source

    def count_classes(self, tensors: Mapping[str, Tensor]) -> int:
        return self.classes_of(tensors)

    @classmethod
    def classes_of(cls, tensors: Mapping[str, Tensor]) -> int:
        """The number of classes of a state dict under our names, at least 1."""
        rows = tensors[cls.classes_key].shape[:1]
        return max(((rows[0] if rows else 0) - cls.rows_besides) // cls.rows_per_class, 1)

    def _refuse(self, tensors: dict[str, Tensor]) -> None:
        """The error for a file that is of no detector or segmenter."""
        try:
            source = recognise(tensors)[1]
        except ValueError:
            first = f"its first key is {next(iter(tensors))!r}" if tensors else "it is empty"
            raise ValueError(
                f"not a checkpoint of {self.kind}: {first}; allowed: keys of mmdetection 2.19, of"
                f" mmsegmentation 0.19, or this package's own"
            ) from None
        raise ValueError(
            f"it is of a classifier or its backbone, under the names of {source}; load it into"
            " model.backbone.body"
        )
