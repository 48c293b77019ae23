"""Detectors and segmenters on PoolFormer: the paper's RetinaNet, Mask R-CNN and Semantic FPN.

Needs torchvision; pip install 'poolformer_kernels[dense]' brings it and what training needs.
"""

try:
    import torchvision.models.detection  # noqa: F401
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision beside a torch it was not built for
    raise ImportError(
        f"poolformer_kernels.dense needs torchvision ({error}): pip install 'poolformer_kernels[dense]'"
    ) from error

from .checkpoints import model_of_checkpoint
from .inference import segment
from .mask_rcnn import MaskRCNN
from .registry import create_detector, create_segmenter, list_detectors, list_segmenters
from .retinanet import RetinaNet
from .semantic_fpn import SemanticFPN, segmentation_loss

__all__ = [
    "MaskRCNN",
    "RetinaNet",
    "SemanticFPN",
    "create_detector",
    "create_segmenter",
    "list_detectors",
    "list_segmenters",
    "model_of_checkpoint",
    "segment",
    "segmentation_loss",
]
