"""Files as mmdetection 2.19 and mmsegmentation 0.19 write them, of a tiny backbone with random values."""

import torch

from poolformer_kernels.models import ModelConfig, PoolFormer
from support.dense import DIMS, made

LAYERS, CLASSES = (1, 1, 2, 1), 5
NAMES = ("ant", "bee", "cat", "dog", "eel")


def tiny_body(features_only: bool = True) -> PoolFormer:
    config = ModelConfig("tiny", LAYERS, DIMS, 1e-5, 0.0, None, 1.0)
    return PoolFormer(config, CLASSES, features_only=features_only)


def make(head: str, classes: int = CLASSES, **options):
    """A model on the tiny backbone."""
    return made(head, tiny_body(), classes, **options)


def official_shapes(head: str, classes: int = CLASSES) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an official file, from the class definitions of the two packages."""
    weights: dict[str, tuple[int, ...]] = {}  # of layers with a bias
    outputs = (1, 2, 3) if head == "retinanet" else (0, 1, 2, 3)
    for i, stage in enumerate(outputs):
        weights[f"neck.lateral_convs.{i}.conv"] = (256, DIMS[stage], 1, 1)
        weights[f"neck.fpn_convs.{i}.conv"] = (256, 256, 3, 3)
    norms: list[str] = []
    if head == "retinanet":
        weights["neck.fpn_convs.3.conv"] = (256, DIMS[-1], 3, 3)
        weights["neck.fpn_convs.4.conv"] = (256, 256, 3, 3)
        for i in range(4):
            weights[f"bbox_head.cls_convs.{i}.conv"] = (256, 256, 3, 3)
            weights[f"bbox_head.reg_convs.{i}.conv"] = (256, 256, 3, 3)
        weights["bbox_head.retina_cls"] = (9 * classes, 256, 3, 3)
        weights["bbox_head.retina_reg"] = (36, 256, 3, 3)
    elif head == "mask_rcnn":
        weights["rpn_head.rpn_conv"] = (256, 256, 3, 3)
        weights["rpn_head.rpn_cls"], weights["rpn_head.rpn_reg"] = (3, 256, 1, 1), (12, 256, 1, 1)
        weights["roi_head.bbox_head.fc_cls"] = (classes + 1, 1024)
        weights["roi_head.bbox_head.fc_reg"] = (4 * classes, 1024)
        weights["roi_head.bbox_head.shared_fcs.0"] = (1024, 256 * 7 * 7)
        weights["roi_head.bbox_head.shared_fcs.1"] = (1024, 1024)
        for i in range(4):
            weights[f"roi_head.mask_head.convs.{i}.conv"] = (256, 256, 3, 3)
        weights["roi_head.mask_head.upsample"] = (256, 256, 2, 2)
        weights["roi_head.mask_head.conv_logits"] = (classes, 256, 1, 1)
    else:
        weights["decode_head.conv_seg"] = (classes, 128, 1, 1)
        norms = ["0.0", "1.0", "2.0", "2.2", "3.0", "3.2", "3.4"]
    with torch.device("meta"):
        own = tiny_body().state_dict()  # under the official names, too
    shapes = {f"backbone.{key}": tuple(value.shape) for key, value in own.items()}
    if head == "retinanet":
        del shapes["backbone.norm0.weight"], shapes["backbone.norm0.bias"]
    for name, shape in weights.items():
        bias = shape[1] if name.endswith("upsample") else shape[0]  # a transposed convolution
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (bias,)
    for index in norms:
        key = f"decode_head.scale_heads.{index}"
        shapes[f"{key}.conv.weight"] = (128, 256 if index.endswith("0") else 128, 3, 3)
        shapes |= {f"{key}.bn.{n}": (128,) for n in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{key}.bn.num_batches_tracked"] = ()
    return shapes


def official_state(head: str, classes: int = CLASSES, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of an official file, of a size that keeps every layer's output of order 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in official_shapes(head, classes).items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(40000)
            continue
        value = torch.randn(shape, generator=generator)
        if value.dim() > 1:
            value *= value[0].numel() ** -0.5
        elif "layer_scale" in key or key.endswith("running_var"):
            value = 0.2 + 0.1 * value.abs()
        elif ("norm" in key or ".bn." in key) and key.endswith("weight"):
            value = 1 + 0.2 * value
        else:
            value *= 0.1
        state[key] = value
    return state


def official_file(path, head: str, classes: int = CLASSES, names=NAMES, seed: int = 0) -> dict:
    """Writes a whole file as mmcv does, with its optimiser; returns its tensors."""
    state = official_state(head, classes, seed)
    meta = {"mmcv_version": "1.3.18", "epoch": 12, "iter": 87972, "env_info": "", "config": "model = dict()"}
    if names is not None:
        meta["CLASSES"], meta["PALETTE"] = tuple(names), [[0, 0, 0]] * len(names)
    first = next(iter(state.values()))
    optimizer = {"state": {0: {"step": 1, "exp_avg": first}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save({"meta": meta, "state_dict": state, "optimizer": optimizer}, path)
    return state
