"""What timm's users and tools ask a model for: its classifier, maps by stage, groups of parameters."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, Literal, overload

from torch import Tensor, nn

from ..nn import PoolFormerStage, PositionEmbedding
from ..nn.checks import boolean, integer

__all__ = ["FeatureInfo", "TimmHabits", "stage_indices"]

Indices = int | Sequence[int] | None


class FeatureInfo(list[dict[str, Any]]):
    """A row for each of the model's stages, and timm's ways to ask for those whose maps are returned.

    Each row has ``num_chs`` (channels), ``reduction`` (pixels of the image per pixel of the map), ``module``
    (the name of the module whose result the map is) and ``index``. Example::

        model = create_model("poolformer_s12", features_only=True, out_indices=(1, 3))
        model.feature_info.channels()   # [128, 512]
        model.feature_info.reduction()  # [8, 32]
    """

    def __init__(self, rows: Iterable[dict[str, Any]], out_indices: tuple[int, ...]) -> None:
        super().__init__(rows)
        self.out_indices = out_indices

    @property
    def info(self) -> list[dict[str, Any]]:
        """The rows of all stages."""
        return [*self]

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """An entry of one row, or of each of several; of the maps returned when idx is None."""
        if isinstance(idx, Integral):
            return self[int(idx)][key]
        return [self[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """Rows, with these keys or all; which rows, see `get`."""

        def row(i: int) -> dict[str, Any]:
            return self[i] if keys is None else {key: self[i][key] for key in keys}

        if isinstance(idx, Integral):
            return row(int(idx))
        return [row(i) for i in (self.out_indices if idx is None else idx)]

    @overload
    def channels(self, idx: int) -> int: ...
    @overload
    def channels(self, idx: Sequence[int] | None = None) -> list[int]: ...
    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Channels of the maps; see `get`."""
        return self.get("num_chs", idx)

    @overload
    def reduction(self, idx: int) -> int: ...
    @overload
    def reduction(self, idx: Sequence[int] | None = None) -> list[int]: ...
    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Strides of the maps in pixels of the image; see `get`."""
        return self.get("reduction", idx)

    @overload
    def module_name(self, idx: int) -> str: ...
    @overload
    def module_name(self, idx: Sequence[int] | None = None) -> list[str]: ...
    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Names of the modules whose results the maps are; see `get`."""
        return self.get("module", idx)


def stage_indices(name: str, indices: Indices, stages: int) -> tuple[int, ...]:
    """The stages that timm's argument of this name means, ascending.

    Args:
        indices: None for all, an int for the last so many, or stages; negative ones count from the end.

    Raises:
        TypeError, ValueError: not ints, or no such stages.
    """
    allowed = f"1 to {stages} for the last so many, or stages from {-stages} to {stages - 1}"
    if indices is None:
        return tuple(range(stages))
    if not isinstance(indices, Iterable):
        if not 1 <= integer(name, indices) <= stages:
            raise ValueError(f"{name} is {indices}; allowed: {allowed}")
        return tuple(range(stages - int(indices), stages))
    taken = [integer(name, index) for index in indices]
    if not taken or not all(-stages <= index < stages for index in taken):
        raise ValueError(f"{name} is {indices}; allowed: {allowed}")
    return tuple(sorted({index % stages for index in taken}))


class TimmHabits(nn.Module):
    """The methods of timm's models that `PoolFormer` has, under the same names."""

    patch_embed: nn.Module
    network: nn.ModuleList
    features_only: bool
    feature_info: FeatureInfo
    pretrained_cfg: dict[str, Any]
    grad_checkpointing = False

    def _checked(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's older name of ``pretrained_cfg``."""
        return self.pretrained_cfg

    def get_classifier(self) -> nn.Module:
        """The last layer, ``nn.Linear``, or ``nn.Identity`` for no classes.

        Raises:
            RuntimeError: the model has no head (``features_only``).
        """
        self._require_head()
        return self.get_submodule("head")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Train in less memory and a third more time: each block keeps its input alone for the backward.

        The gradients are the same: the backward computes the block again, with the same samples dropped.
        Norms that keep running statistics (``norm_layer="batch"``) update them in both, as in timm.
        """
        self.grad_checkpointing = boolean("enable", enable)
        for module in self.modules():
            if isinstance(module, PoolFormerStage):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The parameters of more than one dimension that no weight decay should shrink: position embeddings.

        timm's optimisers ask for them; that of vectors (norms, biases, scales) they leave out by themselves.
        """
        modules = self.named_modules()
        return {f"{name}.pos_embed" for name, module in modules if isinstance(module, PositionEmbedding)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for timm's layer-wise learning rates.

        Groups are the stem, each downsample and each block; with ``coarse`` the stem and each entry of
        ``network``. The norm and the head come last.
        """
        fine = [(r"^network\.(\d+)\.(\d+)\.", None), (r"^network\.(\d+)\.", (0,))]
        return {"stem": r"^patch_embed", "blocks": r"^network\.(\d+)" if coarse else fine}

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        *,
        intermediates_only: Literal[True],
    ) -> list[Tensor]: ...
    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: Literal[False] = False,
    ) -> tuple[Tensor, list[Tensor]]: ...
    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The result of `forward_features` and the maps of stages, ``[B, dims[s], H_s, W_s]``, in order.

        Args:
            x: see `PoolFormer`.
            indices: the stages: None for all, an int for the last so many, or their indices.
            norm: each map through the GroupNorm that belongs to it, which models with ``features_only`` have;
                False gives what timm's models give.
            stop_early: do not compute the stages behind the last that is asked for.
            output_fmt: ``"NCHW"``.
            intermediates_only: the maps alone.

        Raises:
            TypeError, ValueError: an argument of the wrong type or range, or norm for maps without one.
        """
        taken = stage_indices("indices", indices, sum(isinstance(m, PoolFormerStage) for m in self.network))
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; allowed: NCHW")
        own = self.feature_info.out_indices if self.features_only else ()
        if norm and not set(taken) <= set(own):
            normed = f"for stages {', '.join(map(str, own))}" if own else "of a model with features_only=True"
            raise ValueError(f"norm is True for stages {', '.join(map(str, taken))}; allowed {normed}")
        x = self.patch_embed(self._checked(x))
        maps: list[Tensor] = []
        stage = 0
        for module in self.network:
            x = module(x)
            if not isinstance(module, PoolFormerStage):
                continue
            if stage in taken:
                maps.append(self.get_submodule(f"norm{2 * stage}")(x) if norm else x)
            if stop_early and stage == taken[-1]:
                break
            stage += 1
        return maps if intermediates_only else (x, maps)

    def _require_head(self) -> None:
        if self.features_only:
            raise RuntimeError("this model was created with features_only=True and has no head")
