"""Models made of the package's layers, with the official parameter names; any released checkpoint loads."""

from os import PathLike

from .checkpoints import CheckpointReport, convert_state_dict, download_pretrained, load_checkpoint
from .poolformer import HEADS, ModelConfig, PoolFormer, list_models, model_config

__all__ = [
    "HEADS",
    "CheckpointReport",
    "ModelConfig",
    "PoolFormer",
    "convert_state_dict",
    "create_model",
    "list_models",
    "load_checkpoint",
    "model_config",
]


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    head: str = "official",
    drop_path_rate: float | None = None,
    features_only: bool = False,
    checkpoint: str | PathLike | None = None,
    pretrained: bool = False,
) -> PoolFormer:
    """A PoolFormer by name, with random weights or those of a checkpoint.

    Args:
        name: one of `list_models`.
        num_classes, in_chans, head, features_only: see `PoolFormer`.
        drop_path_rate: stochastic depth of the last block; None is 0, as in the official code and timm. The
            training recipe's rate is ``model_config(name).drop_path_rate``.
        checkpoint: a file for `load_checkpoint`, which also sets the head mode that belongs to it.
        pretrained: ImageNet-1k weights from the Hugging Face hub (``timm/<name>.sail_in1k``, so head mode
            ``"timm"``); for another number of classes load 1000 and call ``reset_classifier``.

    Raises:
        TypeError, ValueError: an unknown name, an argument of the wrong type or range, checkpoint and
            pretrained together, or weights that do not fit.
        FileNotFoundError, ImportError, ConnectionError: see `load_checkpoint`; the hub client or the hub is
            missing.

    Source: MetaFormer (arXiv 2111.11418), Table 1.
    """
    if checkpoint is not None and pretrained:
        raise ValueError("checkpoint and pretrained=True are both given; allowed: one of them")
    config = model_config(name)
    if pretrained and not features_only and num_classes not in (0, 1000):
        raise ValueError(
            f"num_classes is {num_classes}; allowed with pretrained=True: 1000 or 0; then reset_classifier"
        )
    if pretrained and in_chans != 3:
        raise ValueError(f"in_chans is {in_chans}; allowed with pretrained=True: 3")
    model = PoolFormer(
        config,
        num_classes=num_classes,
        in_chans=in_chans,
        head=head,
        drop_path_rate=0.0 if drop_path_rate is None else drop_path_rate,
        features_only=features_only,
    )
    if pretrained:
        checkpoint = download_pretrained(config.hf_hub_id)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
