"""Drop-in layers under the official parameter names; the work is done by `poolformer_kernels.ops`."""

from .block import PoolFormerBlock, PoolFormerStage
from .layers import DropPath, GroupNorm, Pooling, PoolMixer
from .mlp import Mlp

__all__ = ["DropPath", "GroupNorm", "Mlp", "PoolFormerBlock", "PoolFormerStage", "PoolMixer", "Pooling"]
