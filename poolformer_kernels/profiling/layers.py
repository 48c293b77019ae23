"""A PoolFormer as a row of layers, each in plain PyTorch and through our operators."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.poolformer import PoolFormer
from ..nn import PoolFormerBlock, PoolFormerStage

__all__ = ["Layer", "layers"]


@dataclass(frozen=True)
class Layer:
    """A layer: eager(x) in plain PyTorch, and ours(x, stats) -> (y, stats)."""

    name: str
    kind: str
    stage: int | None
    parameters: list[nn.Parameter]
    eager: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    side: bool = False  # its result is a feature map, not the next layer's input


def layers(model: PoolFormer) -> Iterator[Layer]:
    """The layers of a model in eval mode, in the order in which they run.

    A token mixer or MLP with its norm, LayerScale and residual is one layer, and one operator call where
    `PoolFormerBlock` makes one.
    """
    yield _plain("patch_embed", "stem", 1, model.patch_embed)
    for index, module in enumerate(model.network):
        stage = index // 2 + 1
        if not isinstance(module, PoolFormerStage):
            yield _plain(f"network.{index}", "downsample", stage + 1, module)
            continue
        for i, block in enumerate(module):
            yield _mixer_layer(f"network.{index}.{i}", stage, block)
            yield _mlp_layer(f"network.{index}.{i}", stage, block, return_stats=i + 1 < len(module))
        if model.features_only:
            yield _plain(f"norm{index}", "norm", None, model.get_submodule(f"norm{index}"), side=True)
    if not model.features_only:
        yield from _head_layers(model)


def _head_layers(model: PoolFormer) -> Iterator[Layer]:
    pooling = _plain("pooling", "pooling", None, lambda x: x.mean((2, 3)), [])
    if model.head_mode == "official":
        yield _plain("norm", "norm", None, model.norm)
        yield pooling
    else:
        norm, channels = model.norm, (model.num_features,)
        yield pooling
        yield _plain(
            "norm",
            "norm",
            None,
            lambda x: F.layer_norm(x, channels, norm.weight, norm.bias, 1e-6),
            list(norm.parameters()),
        )
    if model.num_classes > 0:
        yield _plain("head", "classifier", None, model.head)


def _plain(name, kind, stage, call, parameters=None, side=False) -> Layer:
    """A layer that is computed as it is written."""
    if parameters is None:
        parameters = list(call.parameters())
    return Layer(name, kind, stage, parameters, call, lambda x, _: (call(x), None), side)


def _mixer_layer(name: str, stage: int, block: PoolFormerBlock) -> Layer:
    norm, mixer, scale = block.norm1, block.token_mixer, block.layer_scale_1

    def eager(x: Tensor) -> Tensor:
        return _add(x, mixer(norm(x)), scale)

    def ours(x: Tensor, stats: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return block.mixer_with_stats(x, stats, block.mlp_unfused_reason() is None)

    parameters = _parameters(scale, norm, mixer)
    return Layer(f"{name}.mixer", "mixer", stage, parameters, eager, ours)


def _mlp_layer(name: str, stage: int, block: PoolFormerBlock, return_stats: bool) -> Layer:
    norm, mlp, scale = block.norm2, block.mlp, block.layer_scale_2

    def eager(x: Tensor) -> Tensor:
        return _add(x, mlp.drop(mlp.fc2(mlp.drop(mlp.act(mlp.fc1(norm(x)))))), scale)

    def ours(x: Tensor, stats: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return block.mlp_with_stats(x, stats, return_stats)

    return Layer(f"{name}.mlp", "mlp", stage, _parameters(scale, norm, mlp), eager, ours)


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return x + (branch if scale is None else scale.view(-1, 1, 1) * branch)


def _parameters(scale: nn.Parameter | None, *modules: nn.Module) -> list[nn.Parameter]:
    return [p for p in (scale, *(p for m in modules for p in m.parameters())) if p is not None]
