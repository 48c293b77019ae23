"""What an accelerated block computes: each sub-block one operator call, or its modules as they were."""

import torch
from torch import Tensor, nn

from ..nn.layers import fold_star_relu
from ..ops.chain import Chain
from ..ops.dispatch import select_backend
from ..ops.mlp import mlp_with_stats
from ..ops.pool_mixer import pool_mixer_with_stats
from ..ops.torch_private import forward_mode, has_global_hooks, in_transform
from .layouts import (
    ACT,
    BODY,
    DROP_PATH,
    FC1,
    FC2,
    MIXER,
    MLP,
    NORM,
    PLAIN,
    STAR_RELU,
    Structure,
    drops_paths,
    is_star_relu,
)

__all__ = ["add_to_chain", "run", "takes"]


def takes(x: object) -> bool:
    """Whether operators compute on x what modules do: a plain image, outside of transforms and tracers."""
    if torch.compiler.is_compiling():
        plain = isinstance(x, Tensor) and x.dim() == 4 and not has_global_hooks()
        return plain and not torch.onnx.is_in_onnx_export()  # which knows no operators of ours
    return (
        type(x) in PLAIN
        and x.dim() == 4
        and x.layout == torch.strided
        and x.is_floating_point()
        and not has_global_hooks()
        and not torch.jit.is_tracing()  # a trace runs anywhere, and is the same with and without gradients
        and not in_transform()
        and not forward_mode()
    )


def run(
    structure: Structure,
    block: nn.Module,
    x: Tensor,
    fused: tuple[bool, bool],
    activation: str | None,
    stats: Tensor | None = None,
    return_stats: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The block's result and, where asked and cheap, its statistics; ``stats`` are those of x.

    ``fused`` says which of the mixer and the MLP are operator calls.
    """
    if fused[MIXER]:
        x, stats = _mixer(structure, block, x, stats, fused[MLP])
    else:
        x, stats = _modules(structure, block, x, MIXER), None
    if fused[MLP]:
        return _mlp(structure, block, x, activation, stats, return_stats)
    return _modules(structure, block, x, MLP), None


def add_to_chain(structure: Structure, block: nn.Module, activation: str, chain: Chain) -> bool:
    """Adds a block of two operator calls to a chain; False where a chain computes something else."""
    (norm1, drop_path, _, pool, *_), mlp = structure.parts(block, MIXER), structure.parts(block, MLP)
    norm2, fc1, act, fc2 = mlp[NORM], mlp[FC1], mlp[ACT], mlp[FC2]
    scales = [structure.layer_scale(block, which) for which in (MIXER, MLP)]
    inner = _inner_drop_path(structure, mlp)
    if (
        any(structure.residual_scale(block, which) is not None for which in (MIXER, MLP))
        or any(scale is not None and scale.dtype != fc1.weight.dtype for scale in scales)  # it would widen x
        or any(map(drops_paths, (drop_path, mlp[DROP_PATH], *([] if inner is None else [inner]))))
        or is_star_relu(act)
    ):
        return False
    chain.mixer(norm1.weight, norm1.bias, scales[MIXER], _size(pool), float(norm1.eps))
    vectors = fc1.bias, fc2.bias, norm2.weight, norm2.bias, scales[MLP]
    chain.mlp(fc1.weight, fc2.weight, vectors, activation, float(norm2.eps))
    return True


def _modules(structure: Structure, block: nn.Module, x: Tensor, which: int) -> Tensor:
    """A sub-block as its modules compute it, operation by operation as in the original forward."""
    modules = block._modules
    y = modules[structure.bodies[which]](modules[structure.norms[which]](x))
    drop_path = modules[structure.drop_paths[which]]
    if structure.residual_scales is not None:
        scale, residual = structure.scales[which], structure.residual_scales[which]
        return modules[residual](x) + modules[scale](drop_path(y))
    scale = structure.layer_scale(block, which)
    return x + drop_path(y if scale is None else scale.unsqueeze(-1).unsqueeze(-1) * y)


def _mixer(
    structure: Structure, block: nn.Module, x: Tensor, stats: Tensor | None, return_stats: bool
) -> tuple[Tensor, Tensor | None]:
    norm, drop_path, _, pool, *_ = structure.parts(block, MIXER)
    scale, shortcut = structure.layer_scale(block, MIXER), structure.residual_scale(block, MIXER)
    x = _widened(x, scale)
    y, stats = pool_mixer_with_stats(
        x,
        norm.weight,
        norm.bias,
        pool_size=_size(pool),
        eps=norm.eps,
        layer_scale=scale,
        drop_scale=_drop_scale(drop_path, x),
        residual=shortcut is None,
        stats=stats,
        return_stats=return_stats and shortcut is None and _on_kernels(x),
    )
    return _with_shortcut(y, x, shortcut), stats


def _mlp(
    structure: Structure,
    block: nn.Module,
    x: Tensor,
    activation: str,
    stats: Tensor | None,
    return_stats: bool,
) -> tuple[Tensor, Tensor | None]:
    parts = structure.parts(block, MLP)
    norm, fc1, act, fc2 = parts[NORM], parts[FC1], parts[ACT], parts[FC2]
    scale, shortcut = structure.layer_scale(block, MLP), structure.residual_scale(block, MLP)
    x = _widened(x, scale)
    w2, b2, constant = fc2.weight, fc2.bias, None
    if activation == STAR_RELU:
        w2, b2 = fold_star_relu(act.scale, act.bias, w2, b2)
        activation = "relu_squared"
    inner = _inner_drop_path(structure, parts)
    if inner is None or not drops_paths(inner):
        drop_scale = _drop_scale(parts[DROP_PATH], x)
    else:  # d3 s (d2 (W2 (d1 p) + b2)), where d1 spares the bias
        d1, d2, d3 = _drop_scale(inner, x), _drop_scale(inner, x), _drop_scale(parts[DROP_PATH], x)
        d2 = d2 if d3 is None else d2 * d3
        drop_scale = d1 * d2
        if b2 is not None:
            constant = d2.view(-1, 1, 1, 1), (b2 if scale is None else scale * b2).view(-1, 1, 1)
            b2 = None
    alone = shortcut is None and constant is None
    y, stats = mlp_with_stats(
        x,
        fc1.weight,
        fc1.bias,
        w2,
        b2,
        activation=activation,
        norm=True,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        eps=norm.eps,
        layer_scale=scale,
        drop_scale=drop_scale,
        residual=shortcut is None,
        save_hidden=None,
        stats=stats,
        return_stats=return_stats and alone and _on_kernels(x),
    )
    if constant is not None:
        y = torch.addcmul(y, *(t.to(y.dtype) for t in constant))
    return _with_shortcut(y, x, shortcut), stats


def _size(pool: nn.AvgPool2d) -> int:
    return pool.kernel_size if isinstance(pool.kernel_size, int) else pool.kernel_size[0]


def _inner_drop_path(structure: Structure, parts: list[nn.Module]) -> nn.Module | None:
    name = structure.inner_drop_path
    return None if name is None else parts[BODY]._modules[name]


def _widened(x: Tensor, scale: Tensor | None) -> Tensor:
    """A wider LayerScale widens the stream, under autocast for one."""
    return x if scale is None else x.to(torch.promote_types(x.dtype, scale.dtype))


def _with_shortcut(y: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
    return y if scale is None else torch.addcmul(y, x, scale.view(-1, 1, 1))


def _drop_scale(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """What a DropPath multiplies each sample by, ``[B]``: its own draw, the same as without us."""
    if not drops_paths(drop_path):
        return None
    scale = drop_path(x.new_ones((x.shape[0], 1, 1, 1))).flatten()
    return scale if scale.dtype == torch.float64 else scale.float()


def _on_kernels(x: Tensor) -> bool:
    """The reference gains nothing by statistics that it would have to compute in another pass."""
    return select_backend(x.device, x.dtype) != "reference"
