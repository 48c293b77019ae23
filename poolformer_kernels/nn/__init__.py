"""Drop-in layers under the official parameter names; the work is done by `poolformer_kernels.ops`."""

from .block import PoolFormerBlock, PoolFormerStage
from .layers import ChannelLayerNorm, DropPath, GroupNorm, Pooling, PoolMixer, StarReLU
from .metaformer import MetaFormerBlock
from .mlp import Mlp
from .token_mixers import Attention, PositionEmbedding, RandomMatrix, SpatialFC

__all__ = [
    "Attention",
    "ChannelLayerNorm",
    "DropPath",
    "GroupNorm",
    "MetaFormerBlock",
    "Mlp",
    "PoolFormerBlock",
    "PoolFormerStage",
    "PoolMixer",
    "Pooling",
    "PositionEmbedding",
    "RandomMatrix",
    "SpatialFC",
    "StarReLU",
]
