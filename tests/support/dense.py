"""What the tests of `poolformer_kernels.dense` share: a tiny backbone, images and their objects."""

import torch
from torch import Tensor, nn

from poolformer_kernels.models import ModelConfig, PoolFormer
from support.peers import randomise, require

DIMS = (16, 24, 32, 40)


HEADS = ("retinanet", "mask_rcnn", "semantic_fpn")
DETECTORS = HEADS[:2]
# As the official configurations have them; torchvision has the background's boxes and masks as well
BACKGROUND = 4 * (1024 + 1) + (256 + 1)
PARAMETERS = {
    "retinanet_poolformer_s12": 21_653_044,
    "retinanet_poolformer_s24": 31_126_836,
    "retinanet_poolformer_s36": 40_600_628,
    "mask_rcnn_poolformer_s12": 31_570_608 + BACKGROUND,
    "mask_rcnn_poolformer_s24": 41_044_400 + BACKGROUND,
    "mask_rcnn_poolformer_s36": 50_518_192 + BACKGROUND,
    "semantic_fpn_poolformer_s12": 15_669_846,
    "semantic_fpn_poolformer_s24": 25_143_638,
    "semantic_fpn_poolformer_s36": 34_617_430,
    "semantic_fpn_poolformer_m36": 59_778_006,
    "semantic_fpn_poolformer_m48": 77_078_934,
}


def require_dense() -> None:
    """The extras of detection and segmentation, or a skip where they are not installed."""
    require("PIL")
    require("torchvision", "models.detection")


def made(head: str, *arguments, **options) -> nn.Module:
    """A detector or a segmenter, by `create_detector` or `create_segmenter`."""
    from poolformer_kernels import dense

    make = dense.create_segmenter if head == "semantic_fpn" else dense.create_detector
    return make(head, *arguments, **options)


def tiny_body(seed: int = 0, layer_scale: float | None = 1e-5, **options) -> PoolFormer:
    """A backbone of four blocks with random norms, biases and LayerScales, so that every branch matters."""
    torch.manual_seed(seed)
    config = ModelConfig("tiny", (1, 1, 1, 1), DIMS, layer_scale, 0.0, None, 1.0)
    return randomise(PoolFormer(config, features_only=True, **options), seed)


def tiny(
    head: str,
    classes: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    logit: float | None = None,
    **options,
) -> nn.Module:
    """A RetinaNet, Mask R-CNN or Semantic FPN on the tiny backbone, with random biases, for images of 64.

    ``logit`` is about a RetinaNet's for every anchor; a Mask R-CNN with random weights finds objects anyway.
    """
    if head in DETECTORS:
        options = {"min_size": 64, "max_size": 100} | options
    model = made(head, tiny_body(seed), classes, **options)
    if head == "mask_rcnn":  # a tenth of the paper's proposals and samples
        model.rpn._post_nms_top_n = {"training": 60, "testing": 20}
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 40
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "body" not in name and p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape))
        if head == "retinanet" and logit is not None:
            model.head.classification_head.cls_logits.bias.fill_(logit)
    return model.to(dtype)


@torch.no_grad()
def spread_scores(model: nn.Module) -> None:
    """So that a detector with random weights finds some objects, and orders them beyond rounding."""
    if hasattr(model, "roi_heads"):
        model.roi_heads.box_predictor.cls_score.weight.mul_(100)
    else:
        model.head.classification_head.cls_logits.weight.mul_(20)
        model.head.classification_head.cls_logits.bias.add_(3)


def images(*sizes: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def target(
    boxes: list[list[float]], labels: list[int], size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Objects with ellipses as masks."""
    y = torch.arange(size[0], dtype=torch.float64)[:, None] + 0.5
    x = torch.arange(size[1], dtype=torch.float64)[None] + 0.5
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        across = ((x - (x1 + x2) / 2) / (x2 - x1)).square() + ((y - (y1 + y2) / 2) / (y2 - y1)).square()
        mask[across <= 0.25] = 1
    values = torch.tensor(boxes, dtype=dtype).reshape(-1, 4)
    return {"boxes": values, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}


def sample(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Three images of different sizes, the last without objects; padded to 128 × 96.

    Wider than 64: where P6 is one pixel wide, PyTorch's gradient of P7's weight in bfloat16 on the CPU reads
    memory that nobody wrote.
    """
    sizes = [(97, 61), (40, 90), (64, 50)]
    objects = [
        ([[3.13, 5.21, 40.57, 60.39], [20.17, 30.23, 61.0, 97.0], [18.31, 28.09, 55.47, 90.63]], [1, 0, 2]),
        ([[10.13, 4.37, 33.29, 29.41]], [2]),
        ([], []),
    ]
    targets = [target(*one, size, dtype) for one, size in zip(objects, sizes, strict=True)]
    return images(*sizes, dtype=dtype, seed=3), targets
