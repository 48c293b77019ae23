"""One call that makes other people's PoolFormer fast, and one that undoes it."""

import copy
import logging
import sys
import warnings
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from ..nn import PoolFormerBlock
from ..nn.chain_cache import CHANGES, forget_chain, modules_of
from ..nn.checks import boolean
from ..nn.names import class_path
from ..ops.torch_private import has_global_hooks
from .blocks import Sequential, accelerated_class, recipe_in, recipe_of, renewed
from .choices import MODULES, OWN, Choice, Row, choices, own_choices
from .equivalence import check_equivalence
from .layouts import LAYOUTS, layout_of
from .recipe import OUTDATED, Reasons, Recipe

__all__ = ["accelerate", "gathered_modules", "restore", "unfused_reasons"]

Model = TypeVar("Model", bound=nn.Module)
_SHOWN = 3  # different reasons in the line that is logged
_NOT_YET = "not accelerated: see poolformer_kernels.accelerate"
_ALL_HOOKED = "hooks are set that every module's call runs"
_log = logging.getLogger("poolformer_kernels")


def accelerate(
    model: Model,
    *,
    mixer: bool = True,
    mlp: bool = True,
    inplace: bool = True,
    strict: bool = False,
    save_hidden: bool | None = None,
) -> Model:
    """Lets the PoolFormer blocks of a model run as operator calls; everything else about it stays.

    Equivalent PyTorch: the model itself. Each block found computes its forward as::

        x = ops.pool_mixer(x, norm1.weight, norm1.bias, layer_scale=..., residual=True, ...)
        x = ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, layer_scale=..., residual=True, ...)

    Blocks are found by what they consist of: timm's ``MetaFormerBlock`` (``poolformer_*`` and
    ``poolformerv2_*``), ``PoolFormerLayer`` of transformers, the ``PoolFormerBlock`` of the official code and
    of mmpretrain. Modules, parameters, buffers, their names and the state dict stay the same objects, so
    optimisers, hooks on blocks and checkpoints go on working; a block becomes an instance of a subclass of
    its class, which copies and pickles keep. Wrappers (DistributedDataParallel, what torch.compile returns)
    are looked into.

    A sub-block that no operator computes (attention or another mixer, another norm or activation, hooks on a
    module inside, ...) is left alone; `poolformer_kernels.explain` lists it with the reason. What can change
    (train and eval, dropout, hooks, modules replaced, put back, wrapped or unwrapped) is looked at in every
    call: a sub-block whose LoRA layers are merged, say, is an operator call from then on. What was not there
    before must be compared first, and compilers cannot: before torch.compile or torch.export call the model
    once, or `accelerate` or `explain` again. Only where no sub-block fits at all does the model stay as it
    is. Layers of this package need nothing, and keep their own ``save_hidden``.

    Other threads may call the model meanwhile: a call computes the same before and afterwards. Blocks are
    compared with the operators on random numbers, which come from no generator of torch's own.

    One line about what was taken is logged to the logger ``poolformer_kernels``, at level INFO.

    Args:
        model: any module.
        mixer: accelerate the token mixer sub-blocks.
        mlp: accelerate the MLP sub-blocks.
        inplace: change the model itself; otherwise a deep copy of it.
        strict: raise where a sub-block that was asked for would run as modules now.
        save_hidden: of the MLPs' operator calls; see `poolformer_kernels.ops.mlp`.

    Returns:
        The model, or its copy. Called again, the last call counts.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: neither ``mixer`` nor ``mlp``; ``save_hidden`` without ``mlp``; no block was recognised;
            or ``strict``, with the paths and reasons of what was left alone. The model is untouched then.
        RuntimeError: called again with other arguments, after a block's class was derived further from what
            the first call made, as ``fully_shard`` does.

    Warns:
        UserWarning: there are blocks, and no sub-block of any runs as an operator call on a kernel now.

    Example::

        >>> model = poolformer_kernels.accelerate(timm.create_model("poolformer_s12").eval(), strict=True)
        >>> print(poolformer_kernels.explain(model).summary)
        24 of 24 on cpp
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = bool(boolean("mixer", mixer)), bool(boolean("mlp", mlp))
    boolean("strict", strict)
    boolean("save_hidden", save_hidden, optional=True)
    if not any(wanted):
        raise ValueError("mixer and mlp must not both be False: nothing would be accelerated")
    if save_hidden is not None and not mlp:
        raise ValueError(f"save_hidden is {save_hidden} and mlp is False: no MLP heeds it; allowed: None")
    if not boolean("inplace", inplace):
        with CHANGES:  # no call in another thread adds an attribute while they are copied
            model = copy.deepcopy(model)
    found, own = _blocks_of(model, wanted, save_hidden)
    if not found and not own:
        looked_for = f"looked for {', '.join(LAYOUTS)} and the layers of poolformer_kernels.nn"
        raise ValueError(f"no block to accelerate in {class_path(model)}; {looked_for}{_hint(model)}")
    rows = [row for block in found for row in block.rows]
    left = [(path, reason) for path, (backend, reason) in rows + (own or []) if backend == MODULES]
    if strict and left:
        listed = "".join(f"\n  {path}: {reason}" for path, reason in left)
        count = f"{len(left)} of {len(rows) + len(own or [])} sub-blocks"
        raise ValueError(f"strict is True, and {count} would run as modules:{listed}")
    _change_classes(model, found)
    if rows:
        _tell(model, [choice for _, choice in rows])
    else:
        _tell_of_own(model, [choice for _, choice in own or []])
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`: every block is of its own class again.

    Returns:
        The model. Other threads may call it meanwhile.

    Raises:
        TypeError: not a module.
        RuntimeError: a block's class was derived further after `accelerate`, as ``fully_shard`` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with CHANGES:
        modules = [*modules_of(model)]
        blocks = [(path, block, recipe_of(block)) for path, block in modules]
        for path, block, recipe in blocks:
            if recipe is not None and type(block) is not accelerated_class(recipe):
                raise _derived_further(path, block)
        for _, block, recipe in blocks:
            if recipe is not None:
                block.__class__ = recipe.original
                forget_chain(block)
        for _, module in modules:
            if type(module) is Sequential:
                module.__class__ = nn.Sequential
                forget_chain(module)
    return model


def _derived_further(path: str, block: nn.Module) -> RuntimeError:
    where = f"block {path!r}" if path else "the block"
    return RuntimeError(f"{where} became {class_path(block)} after accelerate(); undo that first")


def unfused_reasons(block: nn.Module, gathered: bool = False) -> Reasons:
    """Why the token mixer and the MLP of a block are modules when it is called now; None where operators.

    ``gathered``: the block is one of `gathered_modules`. Where modules were replaced the block is compared
    anew, as in a call, so that the answer holds for compilers, too.
    """
    kind = type(block)  # read once: another thread may accelerate or restore the block meanwhile
    recipe = recipe_in(kind)
    if recipe is None:
        mixer, mlp = _reasons(block, check_equivalence(block, kind), gathered)
        return mixer or _NOT_YET, mlp or _NOT_YET
    reasons = _reasons(block, recipe, gathered)
    if OUTDATED in reasons and kind is accelerated_class(recipe):
        reasons = _reasons(block, renewed(block, recipe), gathered)
    return reasons


def gathered_modules(model: nn.Module) -> set[nn.Module]:
    """The modules whose parameters ``fully_shard`` keeps in shards, and makes whole when they are called."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has used it has imported it
    if fsdp is None:
        return set()
    sharded = (module for _, module in modules_of(model) if isinstance(module, fsdp.FSDPModule))
    return {module for outer in sharded for _, module in modules_of(outer)}


def _reasons(block: nn.Module, recipe: Recipe, gathered: bool) -> Reasons:
    return (_ALL_HOOKED, _ALL_HOOKED) if has_global_hooks() else recipe.reasons(block, gathered)


_Row = tuple[str, Choice]  # of a sub-block that was asked for: its path in the model, and what runs it


@dataclass(frozen=True)
class _Block:
    """A block that `accelerate` has recognised."""

    module: nn.Module
    recipe: Recipe
    original: type[nn.Module]
    rows: list[_Row]

    @property
    def fits(self) -> bool:
        """Whether an operator computes a sub-block that was asked for, unless something is in its way now."""
        recipe = self.recipe
        return recipe.wrong is None and any(
            want and types is not None for want, types in zip(recipe.wanted, recipe.types, strict=True)
        )


def _blocks_of(
    model: nn.Module, wanted: tuple[bool, bool], save_hidden: bool | None
) -> tuple[list[_Block], list[_Row] | None]:
    """The blocks to accelerate, and the rows of this package's layers; None where there are none."""
    found: list[_Block] = []
    own: list[_Row] | None = None
    gathered, listed = gathered_modules(model), set[nn.Module]()
    for path, module in modules_of(model):
        layout = layout_of(module)
        if isinstance(module, OWN):
            rows = own_choices(module) if module not in listed else []
            own = (own or []) + _asked_for(path, rows, wanted)
            if isinstance(module, PoolFormerBlock):
                listed.add(module.mlp)
        elif layout is not None:
            kind = type(module)  # read once: another thread may accelerate or restore the block meanwhile
            recipe = recipe_in(kind)
            original = kind if recipe is None else recipe.original
            if recipe is None or kind is accelerated_class(recipe):
                recipe = check_equivalence(module, original, wanted, save_hidden)
            elif (recipe.wanted, recipe.save_hidden) != (wanted, save_hidden):
                raise _derived_further(path, module)
            reasons = _reasons(module, recipe, module in gathered)
            rows = choices(module, layout, reasons)
            found.append(_Block(module, recipe, original, _asked_for(path, rows, wanted)))
    return found, own


def _asked_for(path: str, rows: list[Row], wanted: tuple[bool, bool]) -> list[_Row]:
    return [(f"{path}.{part}".strip("."), choice) for part, which, choice in rows if wanted[which]]


def _change_classes(model: nn.Module, found: list[_Block]) -> None:
    """Makes each block what its recipe says, in a model of which something fits or fitted before.

    A block of which nothing fits is then prepared for modules that may be put into it; but for one with a
    forward that computes something else.
    """
    fits = any(block.fits for block in found)
    with CHANGES:
        for block in found:
            module, recipe = block.module, recipe_of(block.module)
            if fits if recipe is None else type(module) is accelerated_class(recipe):
                prepared = block.recipe.wrong is None
                module.__class__ = accelerated_class(block.recipe) if prepared else block.original
                forget_chain(module)
        for _, module in modules_of(model):
            if type(module) is nn.Sequential and len(module) and all(map(recipe_of, module)):
                module.__class__ = Sequential


def _tell(model: nn.Module, rows: list[Choice]) -> None:
    """Logs how many sub-blocks run as operator calls now, and warns where none does so on a kernel."""
    reasons = [reason for backend, reason in rows if backend == MODULES]
    distinct = sorted(dict.fromkeys(reasons), key=reasons.count, reverse=True)
    shown = [f"{reason} ({reasons.count(reason)})" for reason in distinct[:_SHOWN]]
    if len(distinct) > _SHOWN:
        shown.append(f"and {len(distinct) - _SHOWN} more: see poolformer_kernels.explain")
    taken = [choice for choice in rows if choice[0] != MODULES]
    line = f"{len(taken)} of {len(rows)} sub-blocks of {class_path(model)} run as operator calls"
    slow = [reason for backend, reason in taken if backend == "reference"]
    if slow:
        line += f", {len(slow)} of them on the reference: {slow[0]}"
    why = f"{line}, {len(reasons)} as modules: {'; '.join(shown)}" if reasons else line
    _log.info("accelerate: %s", why)
    decided = slow and "asked for" not in slow and not _is_meta(model)  # that it is the reference
    if not taken or (decided and len(slow) == len(taken)):
        warnings.warn(f"accelerate made nothing faster: {why}", UserWarning, stacklevel=3)


def _tell_of_own(model: nn.Module, rows: list[Choice]) -> None:
    """Logs that there was nothing to do, and whether all is fast."""
    slow = any(backend in (MODULES, "reference", "none") for backend, _ in rows)
    how = ": see poolformer_kernels.explain" if slow else " and fast already"
    _log.info("accelerate: the layers of %s are this package's own%s", class_path(model), how)


def _is_meta(model: nn.Module) -> bool:
    """Whether it is not known yet where the model will run."""
    return any(parameter.is_meta for parameter in model.parameters())


def _hint(model: nn.Module) -> str:
    """Why there may be no blocks, where the model is a compiled or traced one."""
    kinds = [type(module) for _, module in modules_of(model)]
    if any(issubclass(kind, torch.jit.ScriptModule) for kind in kinds):
        return "; TorchScript has compiled some modules: accelerate the model before torch.jit"
    if any(issubclass(kind, torch.fx.GraphModule) for kind in kinds):
        return "; a tracer has made graphs of some modules: accelerate the model before it is traced"
    return ""
