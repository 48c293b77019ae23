"""MetaFormer: PoolFormer's skeleton with any token mixer, norm and activation, or without a part of it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..nn import (
    Attention,
    ChannelLayerNorm,
    GroupNorm,
    MetaFormerBlock,
    PoolFormerBlock,
    PoolFormerStage,
    Pooling,
    PositionEmbedding,
    RandomMatrix,
    SpatialFC,
    StarReLU,
)
from ..nn.checks import boolean, finite, not_negative, odd, positive_int, tracing
from .poolformer import CONFIGS, HEADS, SMALL, ModelConfig, PoolFormer

__all__ = ["METAFORMER_CONFIGS", "MetaFormer", "MetaFormerConfig"]

Layer = str | Callable[[int], nn.Module]

TOKEN_MIXERS = ("pooling", "identity", "random_matrix", "convolution", "attention", "spatial_fc")
NORMS = {"group": GroupNorm, "layer": ChannelLayerNorm, "batch": nn.BatchNorm2d, "none": nn.Identity}
ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "star_relu": StarReLU,
}
SIZED = {  # the mixers that are made for one size of images, and what is
    "random_matrix": "random matrices",
    "attention": "a position embedding",
    "spatial_fc": "spatial FCs",
}


@dataclass(frozen=True)
class MetaFormerConfig(ModelConfig):
    """What a `MetaFormer` is made of; a part is named, or is a callable that makes it.

    Args:
        token_mixers: ``"pooling"`` (average pool minus identity), ``"identity"``, ``"random_matrix"``
            (frozen), ``"convolution"`` (depthwise, with bias), ``"attention"`` or ``"spatial_fc"``, or a
            callable dim -> module; one for all stages, or a tuple of four. Attention adds a learned position
            embedding before its first stage.
        pool_size: side of pool and convolution, odd.
        norm_layer: ``"group"`` (GroupNorm of one group), ``"layer"`` (LayerNorm over channels), ``"batch"``
            or ``"none"``, or a callable dim -> module; of the blocks and of the head.
        act_layer: ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"silu"`` or ``"star_relu"``, or a callable
            () -> module.
        residual, mlp: False leaves the residual connections or the MLPs out.
        layer_scale_init: initial value of LayerScale, None for none.
        image_size: side or (H, W) of the images. The position embedding, random matrices and spatial FCs are
            made for it, and their model takes no others.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Source: MetaFormer (arXiv 2111.11418), section 4.4 and Table 5.
    """

    token_mixers: Layer | tuple[Layer, ...] = "pooling"
    pool_size: int = 3
    norm_layer: Layer = "group"
    act_layer: str | Callable[[], nn.Module] = "gelu"
    residual: bool = True
    mlp: bool = True
    image_size: int | tuple[int, int] = 224

    def __post_init__(self) -> None:
        mixers = self.token_mixers
        if isinstance(mixers, (tuple, list)):
            if len(mixers) != len(self.layers):
                raise ValueError(
                    f"token_mixers must be one or {len(self.layers)}, one a stage, got {len(mixers)}"
                )
        else:
            mixers = (mixers,) * len(self.layers)
        for mixer in mixers:
            _check_layer("token_mixers", mixer, TOKEN_MIXERS)
        object.__setattr__(self, "token_mixers", tuple(mixers))
        object.__setattr__(self, "pool_size", odd("pool_size", self.pool_size))
        _check_layer("norm_layer", self.norm_layer, NORMS)
        _check_layer("act_layer", self.act_layer, ACTIVATIONS)
        boolean("residual", self.residual)
        boolean("mlp", self.mlp)
        if self.layer_scale_init is not None:
            not_negative("layer_scale_init", finite("layer_scale_init", self.layer_scale_init))
        size = self.image_size if isinstance(self.image_size, (tuple, list)) else (self.image_size,) * 2
        if len(size) != 2:
            raise ValueError(f"image_size must be an int or (height, width), got {self.image_size!r}")
        for side in size:
            if positive_int("image_size", side) < 3:
                raise ValueError(f"image_size must be at least 3, got {side}")
        object.__setattr__(self, "image_size", tuple(map(int, size)))

    @property
    def hf_hub_id(self) -> None:
        """None: the released weights are files of the official repository."""
        return None

    @property
    def differences(self) -> str:
        """The parts that a PoolFormer has otherwise: ``"pool_size=5, act_layer=relu"``; empty for none."""
        usual = MetaFormerConfig(**{field.name: getattr(self, field.name) for field in fields(ModelConfig)})
        parts = ("token_mixers", "pool_size", "norm_layer", "act_layer", "residual", "mlp")
        changed = [part for part in parts if getattr(self, part) != getattr(usual, part)]
        changed += ["layer_scale_init"] if self.layer_scale_init is None else []
        return ", ".join(f"{part}={_described(getattr(self, part))}" for part in changed)

    @property
    def image_sides(self) -> tuple[int, int]:
        """``image_size`` as (height, width)."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that the model is made for."""
        return 3, *self.image_sides

    def stage_size(self, stage: int, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(H, W) of a stage's maps for images of ``image_size``, by default the configuration's."""
        height, width = ((side + 4 - 7) // 4 + 1 for side in image_size or self.image_sides)
        for _ in range(stage):
            height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
        return height, width


class MetaFormer(PoolFormer):
    """A MetaFormer of PoolFormer's skeleton, for classification or (``features_only``) dense prediction.

    A sub-block whose mixer is pooling with GroupNorm is the operator of `PoolFormerBlock`, and so is an MLP
    with GroupNorm; an MLP with another norm is the operator without the norm; the rest are modules.

    The parameters have the names of the official MetaFormer. A position embedding is an entry of ``network``
    and moves the entries after it.

    `create_model` makes every row of the paper's Table 5 (S12):

    =========================  ================================================================
    baseline                   ``create_model("poolformer_s12")``
    identity mapping           ``create_model("metaformer_id_s12")``
    global random matrix       ``create_model("metaformer_s12", token_mixers="random_matrix")``
    depthwise convolution      ``create_model("metaformer_s12", token_mixers="convolution")``
    pool size 5                ``create_model("poolformer_s12", pool_size=5)``
    pool size 7                ``create_model("poolformer_s12", pool_size=7)``
    pool size 9                ``create_model("poolformer_s12", pool_size=9)``
    Layer Normalization        ``create_model("poolformer_s12", norm_layer="layer")``
    Batch Normalization        ``create_model("poolformer_s12", norm_layer="batch")``
    no normalization           ``create_model("poolformer_s12", norm_layer="none")``
    ReLU                       ``create_model("poolformer_s12", act_layer="relu")``
    SiLU                       ``create_model("poolformer_s12", act_layer="silu")``
    no residual connection     ``create_model("poolformer_s12", residual=False)``
    no channel MLP             ``create_model("poolformer_s12", mlp=False)``
    Pool, Pool, Pool, Attn     ``create_model("metaformer_pppa_s12_224")``
    Pool, Pool, Attn, Attn     ``create_model("metaformer_ppaa_s12_224")``
    Pool, Pool, Pool, SpFC     ``create_model("metaformer_pppf_s12_224")``
    Pool, Pool, SpFC, SpFC     ``create_model("metaformer_ppff_s12_224")``
    =========================  ================================================================

    Args:
        config: a `MetaFormerConfig`.
        num_classes, in_chans, head, drop_path_rate, features_only, out_indices, device, dtype: see
            `PoolFormer`; head mode ``"timm"`` needs a norm that is ``"group"`` or ``"layer"``.

    A call takes images ``[B, in_chans, H, W]`` of a floating dtype; the result, logits ``[B, num_classes]``
    or four maps, is `PoolFormer`'s.

    Raises:
        TypeError, ValueError: as `PoolFormer`; images of another size than ``image_size`` where a part is
            made for that.

    Source: MetaFormer (arXiv 2111.11418), section 4.4 and Table 5.
    """

    config: MetaFormerConfig

    @property
    def heads(self) -> tuple[str, ...]:
        return HEADS if self.config.norm_layer in ("group", "layer") else ("official",)

    def _checked(self, x: Tensor) -> Tensor:
        x = super()._checked(x)
        config = self.config
        stages = range(sum(isinstance(module, PoolFormerStage) for module in self.network))
        sized = next((s for s in stages if config.token_mixers[s] in SIZED), None)
        if sized is None or tracing():
            return x
        height, width = x.shape[2:]
        if config.stage_size(sized, (height, width)) != config.stage_size(sized):
            made, got = (f"{h} x {w}" for h, w in (config.image_sides, (height, width)))
            raise ValueError(
                f"x has images of {got} pixels; this {config.name} has {SIZED[config.token_mixers[sized]]}"
                f" for image_size={config.image_sides}: allowed are images of {made} pixels, or a model of"
                f" create_model({config.name!r}, image_size=({height}, {width}))"
            )
        return x

    def _before(self, stage: int) -> list[nn.Module]:
        config = self.config
        if "attention" not in config.token_mixers or config.token_mixers.index("attention") != stage:
            return []
        return [PositionEmbedding(config.dims[stage], config.stage_size(stage))]

    def _block(self, stage: int, drop_path: float) -> nn.Module:
        config = self.config
        parts = {"residual": config.residual, "mlp": config.mlp}
        whole = all(parts.values())
        return (PoolFormerBlock if whole else MetaFormerBlock)(
            config.dims[stage],
            act_layer=_made(config.act_layer, ACTIVATIONS),
            norm_layer=self._norm,
            drop_path=drop_path,
            use_layer_scale=config.layer_scale_init is not None,
            layer_scale_init_value=config.layer_scale_init or 0.0,
            token_mixer=self._token_mixer(stage),
            **({} if whole else parts),
        )

    def _token_mixer(self, stage: int) -> Callable[[int], nn.Module]:
        config = self.config
        pool_size, size = config.pool_size, config.stage_size(stage)
        made = {
            "pooling": lambda dim: Pooling(pool_size),
            "identity": lambda dim: nn.Identity(),
            "random_matrix": lambda dim: RandomMatrix(size),
            "convolution": lambda dim: nn.Conv2d(dim, dim, pool_size, padding=pool_size // 2, groups=dim),
            "attention": Attention,
            "spatial_fc": lambda dim: SpatialFC(size),
        }
        return _made(config.token_mixers[stage], made)

    def _norm(self, dim: int) -> nn.Module:
        return _made(self.config.norm_layer, NORMS)(dim)

    def _notes(self) -> dict[str, str]:
        return {**super()._notes(), "structure": self.config.differences}


def _made(layer: Any, named: Mapping[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    return named[layer] if isinstance(layer, str) else layer


def _described(part: object) -> str:
    if isinstance(part, tuple):
        of_each = [_described(one) for one in part]
        return of_each[0] if len(set(of_each)) == 1 else "/".join(of_each)
    return getattr(part, "__qualname__", type(part).__name__) if callable(part) else str(part)


def _check_layer(name: str, layer: object, names: Collection[str]) -> None:
    allowed = f"{', '.join(names)} or a callable that makes the module"
    if isinstance(layer, nn.Module) or not (isinstance(layer, str) or callable(layer)):
        raise TypeError(f"{name} must be {allowed}, got {type(layer).__name__}")
    if isinstance(layer, str) and layer not in names:
        raise ValueError(f"{name} must be {allowed}, got {layer!r}")


def _released(name: str, params: int, crop_pct: float, mixers: str, norm: str = "group") -> MetaFormerConfig:
    kinds = {"i": "identity", "p": "pooling", "a": "attention", "f": "spatial_fc"}
    stages = tuple(kinds[letter] for letter in mixers)
    return MetaFormerConfig(
        name, (2, 2, 6, 2), SMALL, 1e-5, 0.1, params, crop_pct, token_mixers=stages, norm_layer=norm
    )


METAFORMER_CONFIGS = (
    _released("metaformer_id_s12", 11_915_176, 0.90, "iiii"),
    _released("metaformer_pppa_s12_224", 14_038_440, 0.95, "pppa", "layer"),
    _released("metaformer_ppaa_s12_224", 16_535_592, 0.95, "ppaa", "layer"),
    _released("metaformer_pppf_s12_224", 11_919_978, 0.90, "pppf"),
    _released("metaformer_ppff_s12_224", 12_150_474, 0.95, "ppff"),
    *(
        MetaFormerConfig(
            config.name.replace("pool", "meta"),
            config.layers,
            config.dims,
            config.layer_scale_init,
            config.drop_path_rate,
            config.params,
            config.crop_pct,
            token_mixers="identity",
        )
        for config in CONFIGS
    ),
)
