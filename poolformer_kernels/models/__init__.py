"""Models made of the package's layers, with the official parameter names; any released checkpoint loads."""

from os import PathLike
from typing import Any

import torch

from ..nn.factory import Device
from .checkpoints import (
    CheckpointReport,
    check_memory,
    convert_state_dict,
    download_pretrained,
    load_checkpoint,
)
from .export import export_state_dict
from .metaformer import MetaFormer, MetaFormerConfig
from .poolformer import HEADS, ModelConfig, PoolFormer
from .poolformerv2 import PoolFormerV2
from .registry import list_models, model_class, model_config, structured
from .timm_habits import FeatureInfo, Indices

__all__ = [
    "HEADS",
    "CheckpointReport",
    "FeatureInfo",
    "MetaFormer",
    "MetaFormerConfig",
    "ModelConfig",
    "PoolFormer",
    "PoolFormerV2",
    "convert_state_dict",
    "create_model",
    "export_state_dict",
    "list_models",
    "load_checkpoint",
    "model_config",
]


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    head: str | None = None,
    drop_path_rate: float | None = None,
    features_only: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    pretrained: bool = False,
    *,
    out_indices: Indices = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    **structure: Any,
) -> PoolFormer:
    """A PoolFormer, PoolFormerV2 or MetaFormer by name, with random weights or those of a checkpoint.

    Args:
        name: one of `list_models`. ``metaformer_s12`` to ``_m48`` are PoolFormer's skeletons with identity
            as the token mixer.
        num_classes, in_chans, features_only, out_indices: see `PoolFormer`.
        head: ``"official"`` or ``"timm"``, see `PoolFormer`; None is ``"timm"`` for PoolFormerV2, which has
            no other, else ``"official"``.
        drop_path_rate: stochastic depth of the last block; None is 0, as in the official code and timm. The
            training recipe's rate is ``model_config(name).drop_path_rate``.
        checkpoint: a file, or a folder of transformers' ``save_pretrained``, for `load_checkpoint`, which
            also sets the head mode that belongs to it.
        pretrained: ImageNet-1k weights from the Hugging Face hub (``timm/<name>.sail_in1k``, so head mode
            ``"timm"``); for another number of classes load 1000 and call ``reset_classifier``. Of
            ``poolformer_*`` and ``poolformerv2_*``.
        device, dtype: of the parameters, as in torch.nn; ``device="meta"`` makes a model without memory.
        structure: keywords of `MetaFormerConfig`, ``token_mixers`` to ``image_size`` and
            ``layer_scale_init``, that change the model from what its name says: `MetaFormer` has a table. Not
            of PoolFormerV2.

    Raises:
        TypeError, ValueError: an unknown name or keyword, an argument of the wrong type or range, checkpoint
            and pretrained together, or weights that do not fit.
        FileNotFoundError, ImportError, ConnectionError: see `load_checkpoint`; the hub client or the hub is
            missing.

    Source: MetaFormer (arXiv 2111.11418), Tables 1 and 5.
    """
    if checkpoint is not None and pretrained:
        raise ValueError("checkpoint and pretrained=True are both given; allowed: one of them")
    config = structured(model_config(name), structure)
    if pretrained and config.hf_hub_id is None:
        what = f"{next(iter(structure))} changes {name}" if structure else f"{name} is not on the hub"
        raise ValueError(f"pretrained is True, but {what}; allowed: a file of its weights as checkpoint")
    if pretrained and not features_only and num_classes not in (0, 1000):
        raise ValueError(
            f"num_classes is {num_classes}; allowed with pretrained=True: 1000 or 0; then reset_classifier"
        )
    if pretrained and in_chans != 3:
        raise ValueError(f"in_chans is {in_chans}; allowed with pretrained=True: 3")
    cls = model_class(config)
    options = {} if head is None else {"head": head}
    model = cls(
        config,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=0.0 if drop_path_rate is None else drop_path_rate,
        features_only=features_only,
        out_indices=out_indices,
        device=device,
        dtype=dtype,
        **options,
    )
    if pretrained or checkpoint is not None:
        check_memory(model)
    if pretrained and config.hf_hub_id is not None:
        checkpoint = download_pretrained(config.hf_hub_id)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
