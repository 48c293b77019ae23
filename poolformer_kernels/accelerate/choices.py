"""Which backend runs a layer's operator calls now, or why its modules run: what `explain` lists."""

import torch
from torch import nn

from ..nn import MetaFormerBlock, Mlp, PoolFormerBlock, PoolMixer
from ..nn.fusion import MIXER, MLP
from ..nn.names import class_path
from ..ops.dispatch import explain_selection, mlp_backend
from .layouts import FC1, FC2, BlockLayout
from .recipe import Reasons

__all__ = ["MODULES", "OWN", "Choice", "Row", "choices", "own_choices"]

OWN = (PoolFormerBlock, PoolMixer, Mlp)
MODULES = "modules"
Choice = tuple[str, str]  # the backend and the reason of a `poolformer_kernels.explain.Call`
Row = tuple[str, int, Choice]  # of a sub-block: its path in the layer, MIXER or MLP, the choice


def choices(block: nn.Module, layout: BlockLayout, reasons: Reasons) -> list[Row]:
    """Of another package's block; ``reasons``: why its sub-blocks are modules, None where operators.

    A layer of this package that was put in as its mixer or MLP is left out: it has rows of its own.
    """
    rows: list[Row] = []
    for which, (body, reason) in enumerate(zip(layout.bodies, reasons, strict=True)):
        if isinstance(block._modules[body], OWN):
            continue
        if reason is not None:
            choice = MODULES, reason
        elif which == MIXER:
            choice = _selected(block)
        else:
            parts = layout.parts(block, MLP)
            choice = _mlp_selected(parts[FC1], parts[FC2])
        rows.append((body, which, choice))
    return rows


def own_choices(layer: nn.Module) -> list[Row]:
    """Of a layer of this package, one of `OWN`; a block's MLP is among its rows."""
    if isinstance(layer, PoolMixer):
        reason = _other_method(layer, "forward")
        return [("", MIXER, _selected(layer) if reason is None else (MODULES, reason))]
    if isinstance(layer, Mlp):
        return [("", MLP, _mlp_choice(layer))]
    reason = _other_method(layer, "forward", "forward_with_stats", "mixer_with_stats")
    reason = reason or layer.mixer_unfused_reason()
    rows: list[Row] = [("token_mixer", MIXER, _selected(layer) if reason is None else (MODULES, reason))]
    return rows if layer.mlp is None else [*rows, ("mlp", MLP, _block_mlp_choice(layer))]


def _block_mlp_choice(block: PoolFormerBlock) -> Choice:
    reason = _other_method(block, "forward", "forward_with_stats", "mlp_with_stats")
    if reason is not None:
        return MODULES, reason
    reason = block.mlp_unfused_reason()
    if reason is None:
        return _mlp_selected(block.mlp.fc1, block.mlp.fc2)
    if isinstance(block.mlp, Mlp):
        # It is not one call with its norm and residual; it may still be one without them.
        backend, why = _mlp_choice(block.mlp)
        if backend != MODULES:
            return backend, f"{why}; norm and residual as modules: {reason}"
    return MODULES, reason


def _mlp_choice(mlp: Mlp) -> Choice:
    reason = _other_method(mlp, "forward") or mlp.unfused_reason()
    return _mlp_selected(mlp.fc1, mlp.fc2) if reason is None else (MODULES, reason)


def _other_method(layer: nn.Module, *names: str) -> str | None:
    """Why it is not known what a layer of this package calls, or None: one of these methods is not ours."""
    for name in names:
        if name in vars(layer):
            return f"{name} was set on the module itself"
        ours = [kind for kind in (MetaFormerBlock, *OWN) if isinstance(layer, kind) and name in vars(kind)]
        if all(getattr(type(layer), name) is not vars(kind)[name] for kind in ours):
            return f"{class_path(layer)} overrides the {name} of {class_path(ours[0])}"
    return None


def _mlp_selected(fc1: nn.Module, fc2: nn.Module) -> Choice:
    """The backend of the forward of an MLP of these layers, and where the backward's is another, both."""
    selected, why = _selected(fc1)
    if selected == "none":
        return selected, why
    w1, w2 = fc1.weight, fc2.weight
    sizes = w1.shape[1], w1.shape[0], w2.shape[0]
    backend, reason = mlp_backend(selected, w1.device, sizes, w1.dtype)
    nothing = "none" if why == "asked for" else "reference"
    if reason is not None:
        return nothing if backend == "reference" else backend, f"{why}; {selected} has no kernel for {reason}"
    other, reason = mlp_backend(selected, w1.device, sizes, w1.dtype, backward=True)
    if reason is None:
        return backend, why
    if other == "reference":  # then the forward runs there, too
        return backend, f"{why}; with gradients {nothing}: no {selected} kernel for the backward of {reason}"
    return backend, f"{why}; backward in {other}: no {selected} kernel for {reason}"


def _selected(module: nn.Module) -> Choice:
    parameter = next(module.parameters(), torch.empty(0))
    return explain_selection(parameter.device, parameter.dtype)
