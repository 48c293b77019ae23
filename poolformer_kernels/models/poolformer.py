"""PoolFormer: the table of released models and the module, under the official state-dict keys."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import memory_format_of
from ..nn import GroupNorm, PoolFormerBlock, PoolFormerStage
from ..nn.chain_cache import calls_more, run_chain
from ..nn.checks import integer, positive_int, probability, tracing
from ..nn.factory import Device, placed
from ..ops.chain import Chain
from .timm_habits import FeatureInfo, Indices, TimmHabits, stage_indices

__all__ = ["CONFIGS", "HEADS", "MEDIUM", "SMALL", "ModelConfig", "PatchEmbed", "PoolFormer"]

HEADS = ("official", "timm")
_FORWARDS = ("forward", "forward_features", "forward_head")
_LAYER_NORM_EPS = 1e-6  # timm's head


@dataclass(frozen=True)
class ModelConfig:
    """What a released model is made of, how it was trained and how its images are prepared.

    ``drop_path_rate`` is the training recipe's; `create_model` uses it only when told to. ``input_size`` is
    the side of the square test image in pixels, cropped from one resized to ``input_size / crop_pct``;
    ``mean`` and ``std`` apply to RGB in [0, 1]. ``layer_scale_init`` is None for none, ``params`` None where
    nobody published a count.
    """

    name: str
    layers: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    layer_scale_init: float | None
    drop_path_rate: float
    params: int | None
    crop_pct: float
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    input_size: int = 224

    @property
    def hf_hub_id(self) -> str | None:
        """The repository of the pretrained weights on the Hugging Face hub, or None where there is none."""
        return f"timm/{self.name}.sail_in1k"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that the released weights are for."""
        return 3, self.input_size, self.input_size

    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm's tools read of a model, `timm.data.resolve_model_data_config` for one, in its names."""
        return {
            "url": "",
            "hf_hub_id": self.hf_hub_id,
            "architecture": self.name,
            "tag": "sail_in1k" if self.hf_hub_id else "",
            "num_classes": 1000,
            "input_size": self.image_shape,
            "pool_size": tuple(-(-side // 32) for side in self.image_shape[1:]),
            "crop_pct": self.crop_pct,
            "crop_mode": "center",
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }


SMALL, MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)
CONFIGS = (
    ModelConfig("poolformer_s12", (2, 2, 6, 2), SMALL, 1e-5, 0.1, 11_915_176, 0.90),
    ModelConfig("poolformer_s24", (4, 4, 12, 4), SMALL, 1e-5, 0.1, 21_388_968, 0.90),
    ModelConfig("poolformer_s36", (6, 6, 18, 6), SMALL, 1e-6, 0.2, 30_862_760, 0.90),
    ModelConfig("poolformer_m36", (6, 6, 18, 6), MEDIUM, 1e-6, 0.3, 56_172_520, 0.95),
    ModelConfig("poolformer_m48", (8, 8, 24, 8), MEDIUM, 1e-6, 0.4, 73_473_448, 0.95),
)


class PoolFormer(TimmHabits):
    """PoolFormer for classification, or with ``features_only`` as a backbone for dense prediction.

    Args:
        config: see `model_config`.
        num_classes: outputs of the classifier; 0 for none, the result is then the pooled, normed features.
        in_chans: channels of the images.
        head: ``"official"`` is GroupNorm, then mean over pixels; ``"timm"`` is mean over pixels, then
            LayerNorm with eps 1e-6, as timm >= 0.9 evaluates the same weights.
        drop_path_rate: of the last block; the rates grow linearly from 0 in the first.
        features_only: no head, see Returns.
        out_indices: of ``features_only``: the stages whose maps are returned, as timm's ``out_indices``: None
            for all, an int for the last so many, or their indices. Stages behind the last are not made.
        device, dtype: of the parameters, as in torch.nn.

    A call takes images ``[B, in_chans, H, W]`` of a floating dtype, H and W at least 3.

    Inference in channels_last is one operator call while no inner module has hooks; otherwise,
    and in training, the modules are called, with the same result up to rounding.

    Returns:
        logits ``[B, num_classes]``; with ``features_only`` a list of maps ``[B, dims[s], H_s, W_s]`` at
        strides 4, 8, 16 and 32, each through a GroupNorm of its own (``norm0``, ``norm2``, ``norm4``,
        ``norm6``), which timm's maps are not: `forward_intermediates` gives those. ``feature_info`` has their
        channels and strides.

    Raises:
        TypeError, ValueError: an argument or image of the wrong type, shape or range.

    Source: MetaFormer (arXiv 2111.11418), section 3.2 and Table 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        head: str = "official",
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        *,
        out_indices: Indices = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rate = probability("drop_path_rate", drop_path_rate)
        if out_indices is not None and not features_only:
            raise ValueError(f"out_indices is {out_indices}; allowed with features_only=True")
        stages = stage_indices("out_indices", out_indices, len(config.dims))
        self.config = config
        self.in_chans = positive_int("in_chans", in_chans)
        self.features_only = features_only
        self.head_mode = head
        self.pretrained_cfg = config.pretrained_cfg()
        self.num_features = self.head_hidden_size = config.dims[stages[-1]]
        with placed(self, device, dtype):
            self.patch_embed = self._embed(0, self.in_chans, config.dims[0], kernel=7, stride=4, padding=2)
            self.network = nn.ModuleList(self._network(stages[-1] + 1, rate))
            if features_only:
                for stage in stages:
                    self.add_module(f"norm{2 * stage}", self._norm(config.dims[stage]))
            else:
                self.norm = self._norm(self.num_features)
                self.reset_classifier(num_classes)
        self.feature_info = self._feature_info(stages)
        self.register_state_dict_post_hook(_note_head_mode)

    def _network(self, stages: int, drop_path_rate: float) -> list[nn.Module]:
        """The entries of ``network`` for so many stages."""
        config = self.config
        step = drop_path_rate / (sum(config.layers) - 1)
        network: list[nn.Module] = []
        done = 0
        for stage, (depth, dim) in enumerate(zip(config.layers[:stages], config.dims, strict=False)):
            if stage > 0:
                network.append(self._embed(stage, config.dims[stage - 1], dim, kernel=3, stride=2, padding=1))
            network += self._before(stage)
            blocks = (self._block(stage, step * i) for i in range(done, done + depth))
            network.append(PoolFormerStage(*blocks))
            done += depth
        return network

    def _feature_info(self, out_indices: tuple[int, ...]) -> FeatureInfo:
        places = [f"network.{i}" for i, m in enumerate(self.network) if isinstance(m, PoolFormerStage)]
        rows = (
            {
                "num_chs": dim,
                "reduction": 4 << stage,
                "module": f"norm{2 * stage}" if self.features_only else places[stage],
                "index": stage,
            }
            for stage, dim in enumerate(self.config.dims)
        )
        return FeatureInfo(rows, out_indices)

    # Subclasses override these.

    def _embed(self, stage: int, in_chans: int, dim: int, **convolution: int) -> nn.Module:
        return PatchEmbed(in_chans, dim, **convolution)

    def _before(self, stage: int) -> list[nn.Module]:
        """Modules that a subclass puts into `network` between a stage's downsample and its blocks."""
        return []

    def _block(self, stage: int, drop_path: float) -> nn.Module:
        config = self.config
        return PoolFormerBlock(
            config.dims[stage], drop_path=drop_path, layer_scale_init_value=config.layer_scale_init
        )

    def _norm(self, dim: int) -> nn.Module:
        return GroupNorm(dim)

    def _notes(self) -> dict[str, str]:
        """What a state dict's metadata says of the model; ``structure``: how it differs from a PoolFormer."""
        return {"head_mode": self.head_mode, "structure": ""}

    @property
    def heads(self) -> tuple[str, ...]:
        """The head modes that the model can be evaluated with, its own first."""
        return HEADS

    @property
    def head_mode(self) -> str:
        """``"official"`` or ``"timm"``: how the head's weights are evaluated."""
        return self._head_mode

    @head_mode.setter
    def head_mode(self, mode: str) -> None:
        if mode not in self.heads:
            raise ValueError(f"head is {mode!r}; allowed: {', '.join(self.heads)}")
        self._head_mode = mode

    def reset_classifier(
        self,
        num_classes: int,
        global_pool: str | None = None,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Replace the classifier by a new one of so many outputs (0: none), on the model's device and dtype.

        Args:
            num_classes: its outputs.
            global_pool: timm's argument: None or ``"avg"``, the mean over pixels that the model has.
            device, dtype: where not the model's.

        Raises:
            TypeError, ValueError: num_classes is not an int, or negative; another global_pool.
            RuntimeError: the model has no head (``features_only``).
        """
        self._require_head()
        if integer("num_classes", num_classes) < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool is {global_pool!r}; allowed: None, 'avg'")
        self.num_classes = int(num_classes)
        self.head: nn.Module = nn.Identity()
        if self.num_classes > 0:
            like = next(self.patch_embed.parameters())
            device = like.device if device is None else device
            head = nn.Linear(self.num_features, self.num_classes, device=device, dtype=dtype or like.dtype)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.head = head
        self.head.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map ``[B, dims[3], H_3, W_3]`` at stride 32, before any norm."""
        x = self.patch_embed(self._checked(x))
        for module in self.network:
            x = module(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits from `forward_features`' map; with ``pre_logits`` the features that the classifier sees."""
        self._require_head()
        if self._head_mode == "official":
            x = self.norm(x).mean((2, 3))
        else:
            norm = self.norm
            x = F.layer_norm(x.mean((2, 3)), (self.num_features,), norm.weight, norm.bias, _LAYER_NORM_EPS)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if not self.features_only:
            x = self._checked(x)
            logits = run_chain(self, x, _channels_last(x, self.patch_embed))
            return self.forward_head(self.forward_features(x)) if logits is None else logits
        wanted = self.feature_info.out_indices
        return self.forward_intermediates(x, wanted, norm=True, stop_early=True, intermediates_only=True)

    def add_to(self, chain: Chain) -> bool:
        """Adds the whole model to a chain of layers; see `poolformer_kernels.nn.chain_cache.Chained`."""
        modules = self._modules
        norm, head = modules.get("norm"), modules.get("head")
        layers = (modules["patch_embed"], *modules["network"])
        if (
            any(getattr(type(self), name) is not getattr(PoolFormer, name) for name in _FORWARDS)
            or "forward_features" in self.__dict__
            or "forward_head" in self.__dict__
            or type(norm) is not GroupNorm
            or norm.num_groups != 1
            or type(head) not in (nn.Linear, nn.Identity)
            or any(map(calls_more, (*layers, modules["network"], norm, head)))
            or not all(type(m) in (PatchEmbed, PoolFormerStage) and m.add_to(chain) for m in layers)
        ):
            return False
        eps = norm.eps if self._head_mode == "official" else _LAYER_NORM_EPS
        chain.pool(self._head_mode, norm._parameters["weight"], norm._parameters["bias"], float(eps))
        if type(head) is nn.Linear:
            chain.conv(head._parameters["weight"], head._parameters["bias"])
        return True

    def _checked(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"x must be of a floating dtype, got {x.dtype}")
        if tracing():  # what is asked of sizes now would be constants of the trace
            return x
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x must have shape [B, {self.in_chans}, H, W], got {list(x.shape)}")
        if x.shape[2] < 3 or x.shape[3] < 3:
            raise ValueError(f"x must be at least 3 pixels high and wide, got {x.shape[2]} x {x.shape[3]}")
        return x


class PatchEmbed(nn.Module):
    """The stem and the downsamples: one convolution, no norm."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        y = run_chain(self, x, isinstance(x, Tensor) and _channels_last(x, self))
        return self.proj(x) if y is None else y

    def add_to(self, chain: Chain) -> bool:
        """Adds the convolution to a chain of layers; see `poolformer_kernels.nn.chain_cache.Chained`."""
        proj = self._modules["proj"]
        if type(proj) is not nn.Conv2d or calls_more(proj) or proj.padding_mode != "zeros":
            return False
        (stride, stride_w), padding = proj.stride, proj.padding
        if stride != stride_w or type(padding) is str or padding[0] != padding[1]:
            return False
        if proj.dilation != (1, 1) or proj.groups != 1:
            return False
        chain.conv(proj._parameters["weight"], proj._parameters["bias"], stride, padding[0])
        return True


def _channels_last(x: Tensor, embed: nn.Module) -> bool:
    """Whether the convolution's result is channels_last: where x or its weight is."""
    proj = embed._modules.get("proj")
    weight = None if proj is None else proj._parameters.get("weight")
    return any(
        isinstance(t, Tensor) and t.dim() == 4 and memory_format_of(t) == torch.channels_last
        for t in (x, weight)
    )


def _note_head_mode(
    model: PoolFormer, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """What no key could hold and stay official goes into the state dict's metadata."""
    local_metadata.update(model._notes())
