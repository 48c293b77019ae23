"""One call that makes other people's PoolFormer fast, and one that undoes it."""

import copy
from dataclasses import replace

from torch import nn

from ..nn import Mlp, PoolFormerBlock, PoolMixer
from ..nn.chain_cache import forget_chain
from ..nn.checks import boolean
from .blocks import Sequential, accelerated_class, recipe_of
from .equivalence import check_equivalence
from .layouts import LAYOUTS, layout_of

__all__ = ["accelerate", "restore", "unfused_reasons"]

_OWN = (PoolFormerBlock, PoolMixer, Mlp)


def accelerate(model: nn.Module, *, mixer: bool = True, mlp: bool = True, inplace: bool = True) -> nn.Module:
    """Lets the PoolFormer blocks of a model run as operator calls; everything else about it stays.

    Equivalent PyTorch: the model itself. Each block found computes its forward as::

        x = ops.pool_mixer(x, norm1.weight, norm1.bias, layer_scale=..., residual=True, ...)
        x = ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, layer_scale=..., residual=True, ...)

    Blocks are found by what they consist of: timm's ``MetaFormerBlock`` (``poolformer_*`` and
    ``poolformerv2_*``), ``PoolFormerLayer`` of transformers, the ``PoolFormerBlock`` of the official code and
    of mmpretrain. Modules, parameters, buffers, their names and the state dict stay the same objects, so
    optimisers, hooks on blocks and checkpoints go on working; a block becomes an instance of a subclass of
    its class, which copies and pickles keep.

    A sub-block that no operator computes (attention or another mixer, another norm or activation, hooks on a
    module inside, ...) is left alone; `poolformer_kernels.explain` lists it with the reason. What can change
    (train and eval, dropout, hooks, modules replaced) is looked at in every call. Layers of this package are
    fast already.

    Args:
        model: any module.
        mixer: accelerate the token mixer sub-blocks.
        mlp: accelerate the MLP sub-blocks.
        inplace: change the model itself; otherwise a deep copy of it.

    Returns:
        The model, or its copy. Called again, the last call counts.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: neither ``mixer`` nor ``mlp``; or no block was recognised.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = boolean("mixer", mixer), boolean("mlp", mlp)
    if not any(wanted):
        raise ValueError("mixer and mlp must not both be False: nothing would be accelerated")
    if not boolean("inplace", inplace):
        model = copy.deepcopy(model)
    recognised = False
    for module in model.modules():
        recognised |= isinstance(module, _OWN)
        if isinstance(module, _OWN) or layout_of(module) is None:
            continue
        recognised = True
        recipe = recipe_of(module)
        if recipe is not None and type(module) is not accelerated_class(recipe):
            continue  # its class was derived further after accelerate, as fully_shard does
        original = type(module) if recipe is None else recipe.original
        recipe, _ = check_equivalence(module, original)
        types = tuple(t if want else None for t, want in zip(recipe.types, wanted, strict=True))
        recipe = replace(recipe, types=types)
        module.__class__ = accelerated_class(recipe) if any(types) else original
    for module in model.modules():
        if type(module) is nn.Sequential and len(module) and all(map(recipe_of, module)):
            module.__class__ = Sequential
    if not recognised:
        raise ValueError(
            f"no block to accelerate in {type(model).__name__}; looked for {', '.join(LAYOUTS)}"
            " and the layers of poolformer_kernels.nn"
        )
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`: every block is of its own class again.

    Returns:
        The model.

    Raises:
        TypeError: not a module.
        RuntimeError: a block's class was derived further after `accelerate`, as ``fully_shard`` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    blocks = [(block, recipe_of(block)) for block in model.modules() if recipe_of(block) is not None]
    for block, recipe in blocks:
        if type(block) is not accelerated_class(recipe):
            raise RuntimeError(f"a block became {type(block).__name__} after accelerate(); undo that first")
    for block, recipe in blocks:
        block.__class__ = recipe.original
        forget_chain(block)
    for module in model.modules():
        if type(module) is Sequential:
            module.__class__ = nn.Sequential
            forget_chain(module)
    return model


def unfused_reasons(block: nn.Module) -> tuple[str | None, str | None]:
    """Why the token mixer and the MLP of a block are modules when it is called now; None where operators."""
    recipe = recipe_of(block)
    if recipe is not None:
        return recipe.unfused_reason(block, 0), recipe.unfused_reason(block, 1)
    recipe, foreign = check_equivalence(block, type(block))
    return tuple(
        reason or recipe.unfused_reason(block, which) or "not accelerated: see poolformer_kernels.accelerate"
        for which, reason in enumerate(foreign)
    )
