"""The paper's Tables 1 and 2 (its MACs), counted from the modules."""

import torch

from ..models import create_model, list_models
from ..models.poolformer import PoolFormer
from ..nn import PoolFormerStage
from .profile import profile

__all__ = ["paper_figures"]


def paper_figures(size: int = 224) -> dict[str, dict]:
    """What Table 1 of the paper states of each model, and Table 2 of its cost, counted from the modules.

    Returns:
        name -> ``{"size", "params", "macs", "stages"}``, MACs in fvcore's convention for one image of
        ``size`` x ``size``. A stage is ``{"stride", "patch_size", "patch_stride", "dim", "pool_size",
        "mlp_ratio", "blocks"}``; its tokens are H / stride x W / stride.

    Source: MetaFormer (arXiv 2111.11418), Tables 1 and 2.
    """
    return {name: _figures(name, size) for name in list_models("poolformer_*")}


def _figures(name: str, size: int) -> dict:
    with torch.device("meta"):
        model = create_model(name)
    total = profile(model, size, measure=False).total
    return {"size": size, "params": total.params, "macs": total.macs_fvcore, "stages": _stages(model)}


def _stages(model: PoolFormer) -> list[dict]:
    stages, stride, embedding = [], 1, model.patch_embed
    for module in model.network:
        if not isinstance(module, PoolFormerStage):
            embedding = module
            continue
        conv, block = embedding.proj, module[0]
        stride *= conv.stride[0]
        stages.append(
            {
                "stride": stride,
                "patch_size": conv.kernel_size[0],
                "patch_stride": conv.stride[0],
                "dim": conv.out_channels,
                "pool_size": block.token_mixer.pool_size,
                "mlp_ratio": block.mlp.fc1.out_channels / conv.out_channels,
                "blocks": len(module),
            }
        )
    return stages
