"""PoolFormerV2: PoolFormer with StarReLU, ResScale and norms without biases."""

import torch
from torch import Tensor, nn

from ..nn import ChannelLayerNorm, GroupNorm, MetaFormerBlock, StarReLU
from ..nn.factory import Device
from .poolformer import MEDIUM, SMALL, ModelConfig, PatchEmbed, PoolFormer
from .timm_habits import Indices

__all__ = ["CONFIGS_V2", "PoolFormerV2"]

_EPS = 1e-6  # of every norm

CONFIGS_V2 = (
    ModelConfig("poolformerv2_s12", (2, 2, 6, 2), SMALL, None, 0.1, 11_891_712, 1.0),
    ModelConfig("poolformerv2_s24", (4, 4, 12, 4), SMALL, None, 0.1, 21_341_464, 1.0),
    ModelConfig("poolformerv2_s36", (6, 6, 18, 6), SMALL, None, 0.2, 30_791_216, 1.0),
    ModelConfig("poolformerv2_m36", (6, 6, 18, 6), MEDIUM, None, 0.3, 56_077_168, 1.0),
    ModelConfig("poolformerv2_m48", (8, 8, 24, 8), MEDIUM, None, 0.4, 73_346_056, 1.0),
)


class PoolFormerV2(PoolFormer):
    """PoolFormerV2 for classification, or with ``features_only`` as a backbone for dense prediction.

    Equivalent PyTorch of a block, its norms without biases, ``r`` (ResScale) in the last two stages only::

        x = r1 * x + drop_path(pool(norm1(x)) - norm1(x))
        x = r2 * x + drop_path(conv2d(scale * relu(conv2d(norm2(x), w1))**2 + bias, w2))

    with a channel LayerNorm behind the stem and before each downsample, and a head of mean over pixels,
    LayerNorm and classifier, which is called head mode ``"timm"``.

    The names of the parameters are PoolFormer's; what PoolFormer has not, and where timm's checkpoints have
    it, which `convert_state_dict` renames:

    =================================  =========================================
    ours, stage s, block i             timm
    =================================  =========================================
    ``patch_embed.norm.weight``        ``stem.norm.weight``
    ``network.{2s-1}.norm.weight``     ``stages.{s}.downsample.norm.weight``
    ``network.{2s}.{i}.mlp.act.*``     ``stages.{s}.blocks.{i}.mlp.act.*``
    ``network.{2s}.{i}.res_scale_1``   ``stages.{s}.blocks.{i}.res_scale1.scale``
    =================================  =========================================

    Args: see `PoolFormer`; ``head`` is ``"timm"``.

    A call takes images ``[B, in_chans, H, W]`` of a floating dtype; the result, logits ``[B, num_classes]``
    or four maps, and the errors are `PoolFormer`'s.

    Source: MetaFormer Baselines for Vision (arXiv 2210.13452), Table 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        head: str = "timm",
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        *,
        out_indices: Indices = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            config,
            num_classes,
            in_chans,
            head,
            drop_path_rate,
            features_only,
            out_indices=out_indices,
            device=device,
            dtype=dtype,
        )
        for module in self.modules():
            if isinstance(module, NormedPatchEmbed):
                nn.init.trunc_normal_(module.proj.weight, std=0.02)
                nn.init.zeros_(module.proj.bias)

    @property
    def heads(self) -> tuple[str, ...]:
        return ("timm",)

    def _embed(self, stage: int, in_chans: int, dim: int, **convolution: int) -> nn.Module:
        return NormedPatchEmbed(in_chans, dim, norm_first=stage > 0, **convolution)

    def _block(self, stage: int, drop_path: float) -> nn.Module:
        return MetaFormerBlock(
            self.config.dims[stage],
            act_layer=StarReLU,
            norm_layer=_group_norm,
            drop_path=drop_path,
            use_layer_scale=False,
            mlp_bias=False,
            res_scale_init_value=1.0 if stage >= 2 else None,
        )

    def _norm(self, dim: int) -> nn.Module:
        return _group_norm(dim) if self.features_only else nn.LayerNorm(dim, _EPS)


class NormedPatchEmbed(PatchEmbed):
    """The convolution with a channel LayerNorm without bias behind it (stem) or before it (downsamples)."""

    def __init__(self, in_chans: int, dim: int, *, norm_first: bool, **convolution: int) -> None:
        super().__init__(in_chans, dim, **convolution)
        self.norm_first = norm_first
        self.norm = ChannelLayerNorm(in_chans if norm_first else dim, _EPS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x)) if self.norm_first else self.norm(self.proj(x))


def _group_norm(dim: int) -> GroupNorm:
    norm = GroupNorm(dim, eps=_EPS)
    norm.register_parameter("bias", None)
    return norm
